# SPDX-License-Identifier: Apache-2.0
"""The randomness of a sample, and what the loss is taken of."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastvideo.config.train import Timesteps
from fastvideo.data.loader import Place, Sample
from fastvideo.models.family import Interval, LatentStatistics, Text
from fastvideo.models.flow import sigma_at
from fastvideo.train.draw import Draw, Drawn, collate

EMPTY = Text(torch.full((1, 8), 7.0), torch.full((3,), 7.0))
STATISTICS = LatentStatistics(mean=(0.5, -1.0, 2.0, 0.0), std=(2.0, 0.5, 4.0, 1.0))


class Stored:
    """Clips in memory, as ``Samples`` gives them: sample i has ``i + 1`` captions."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        latent = torch.randn(4, 3, 2, 2, generator=generator).half()
        texts = tuple(
            Text(
                torch.full((2 + i, 8), 10.0 * index + i).bfloat16(),
                torch.full((3,), 10.0 * index + i).bfloat16(),
            )
            for i in range(index + 1)
        )
        images = {"first_frame_latent": latent + 1, "clip_feature": latent[:, 0, 0] - 1}
        return Sample(f"{index}.mp4", latent, texts, images)


def draw(**changes: object) -> Draw:
    base = Draw(
        samples=Stored(),  # type: ignore[arg-type]
        statistics=STATISTICS,
        timesteps=Timesteps(),
        shift=3.0,
        interval=Interval(),
        seed=5,
        text_dropout=0.0,
        empty_text=EMPTY,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def tensors(drawn: Drawn) -> list[Tensor]:
    assert drawn.text.pooled is not None
    text = (drawn.text.embedding, drawn.text.pooled)
    return [drawn.latent, drawn.noise, drawn.sigma, *text, *drawn.images.values()]


def equal(a: Drawn, b: Drawn) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def is_empty(text: Text) -> bool:
    assert text.pooled is not None and EMPTY.pooled is not None
    same = torch.equal(text.embedding, EMPTY.embedding)
    assert torch.equal(text.pooled, EMPTY.pooled) == same, "both or neither"
    return same


def drawn_many(given: Draw, index: int, *, epochs: int = 600) -> list[Drawn]:
    return [given.training(Place(epoch, index)) for epoch in range(epochs)]


def test_a_draw_is_a_function_of_seed_epoch_and_index() -> None:
    first = draw().training(Place(1, 2))
    draw().training(Place(0, 0))
    assert equal(draw().training(Place(1, 2)), first)
    for other in (
        draw().training(Place(2, 2)),
        draw().training(Place(1, 1)),
        draw(seed=6).training(Place(1, 2)),
    ):
        assert not torch.equal(other.noise, first.noise)
        assert other.sigma != first.sigma


def test_latents_are_normalised_with_the_vaes_statistics() -> None:
    raw = Stored()[1].vae_latent.float()
    column = [torch.tensor(v).view(4, 1, 1, 1) for v in (STATISTICS.mean, STATISTICS.std)]
    expected = (raw - column[0]) / column[1]
    torch.testing.assert_close(draw().training(Place(0, 1)).latent, expected)
    torch.testing.assert_close(draw().heldout(1, quantile=0.5).latent, expected)


def test_noise_is_unit_normal_and_everything_is_float32() -> None:
    found = drawn_many(draw(), 0, epochs=400)
    noise = torch.stack([d.noise for d in found])
    assert abs(noise.mean().item()) < 0.02
    assert abs(noise.std().item() - 1) < 0.02
    for tensor in tensors(found[0]):
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_sigma_follows_the_density_after_the_shift(shift: float) -> None:
    timesteps = Timesteps(density="logit_normal")
    found = torch.stack(
        [d.sigma for d in drawn_many(draw(timesteps=timesteps, shift=shift), 0, epochs=2000)]
    )
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    expected = sigma_at(quantiles, timesteps, shift=shift)
    torch.testing.assert_close(found.quantile(quantiles), expected, atol=0.04, rtol=0)


def test_every_caption_of_a_clip_has_its_turn() -> None:
    values = Counter(float(d.text.embedding[0, 0]) for d in drawn_many(draw(), 2))
    assert set(values) == {20.0, 21.0, 22.0}
    assert min(values.values()) > 150


def test_dropout_takes_the_embedding_of_the_empty_prompt() -> None:
    given = draw(text_dropout=0.25)
    found = drawn_many(given, 2)
    dropped = [d for d in found if is_empty(d.text)]
    assert 0.18 < len(dropped) / len(found) < 0.32
    assert all(float(d.text.embedding[0, 0]) >= 20 for d in found if not is_empty(d.text))
    assert all(is_empty(d.text) for d in drawn_many(draw(text_dropout=1.0), 1, epochs=9))


def test_dropout_changes_neither_noise_nor_sigma() -> None:
    with_text, without = draw().training(Place(3, 1)), draw(text_dropout=1.0).training(Place(3, 1))
    assert torch.equal(with_text.noise, without.noise)
    assert with_text.sigma == without.sigma


def test_held_out_draws_are_fixed_quantiles_noise_and_the_first_caption() -> None:
    given = draw(text_dropout=1.0)
    for quantile in (0.1, 0.5, 0.9):
        found = given.heldout(2, quantile=quantile)
        assert equal(found, given.heldout(2, quantile=quantile))
        assert float(found.text.embedding[0, 0]) == 20.0
        expected = sigma_at(torch.tensor(quantile, dtype=torch.float64), Timesteps(), shift=3.0)
        assert found.sigma == expected
    first, second = (given.heldout(2, quantile=q) for q in (0.1, 0.5))
    assert not torch.equal(first.noise, second.noise)


def test_a_batch_holds_its_samples_in_order() -> None:
    drawn = [draw().training(Place(0, index)) for index in (2, 0)]
    batch = collate(drawn, device="cpu")
    for place, sample in enumerate(drawn):
        assert torch.equal(batch.latents[place], sample.latent)
        assert torch.equal(batch.noise[place], sample.noise)
        assert batch.sigma[place] == sample.sigma
        assert torch.equal(batch.texts[place].embedding, sample.text.embedding)
        for name, image in sample.images.items():
            assert torch.equal(batch.images[name][place], image)
