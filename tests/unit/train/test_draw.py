# SPDX-License-Identifier: Apache-2.0
"""What a training sample is made of, and on what its randomness depends."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor

from fastvideo.config.train import Timesteps
from fastvideo.data.loader import Order, Place, Samples, read_ahead
from fastvideo.models.family import LatentStatistics
from fastvideo.state import ShardStore
from fastvideo.train.draw import Draw, Drawn, collate

MEAN, STD = (5.0, 4.0, 6.0, 5.5), (3.0, 2.0, 4.0, 0.5)
EMPTY = torch.arange(16.0).reshape(2, 8)
EPOCHS = 400


@pytest.fixture(scope="module")
def draw(store: ShardStore) -> Draw:
    return Draw(
        samples=Samples(store, split="train"),
        statistics=LatentStatistics(MEAN, STD),
        timesteps=Timesteps(),
        shift=1.0,
        seed=0,
        text_dropout=0.0,
        empty_text=EMPTY,
    )


def same(a: Drawn, b: Drawn) -> bool:
    pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def caption_of(drawn: Drawn, captions: tuple[Tensor, ...]) -> int:
    """Which caption was drawn, -1 for the empty prompt."""
    texts = (EMPTY, *captions)
    (found,) = [number for number, text in enumerate(texts) if torch.equal(drawn.text, text)]
    return found - 1


def test_latents_are_normalised_channel_by_channel(draw: Draw) -> None:
    for index in range(len(draw.samples)):
        raw = draw.samples[index].vae_latent
        expected = torch.stack(
            [(raw[c] - mean) / std for c, (mean, std) in enumerate(zip(MEAN, STD, strict=True))]
        )
        for drawn in (draw.training(Place(0, index)), draw.heldout(index, quantile=0.5)):
            torch.testing.assert_close(drawn.latent, expected)


def test_dropped_text_is_the_embedding_of_the_empty_prompt(draw: Draw) -> None:
    always = dataclasses.replace(draw, text_dropout=1.0)
    for place in (Place(epoch, index) for epoch in range(3) for index in range(5)):
        assert torch.equal(always.training(place).text, EMPTY)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_text_is_dropped_in_the_asked_share_of_samples(draw: Draw, share: float) -> None:
    some = dataclasses.replace(draw, text_dropout=share)
    captions = draw.samples[1].texts
    drawn = [caption_of(some.training(Place(epoch, 1)), captions) for epoch in range(EPOCHS)]
    assert drawn.count(-1) / EPOCHS == pytest.approx(share, abs=0.08 if share else 0)


def test_every_caption_of_a_clip_is_drawn_equally_often(draw: Draw) -> None:
    captions = draw.samples[0].texts
    assert len(captions) == 3
    drawn = (caption_of(draw.training(Place(epoch, 0)), captions) for epoch in range(EPOCHS))
    counts = Counter(drawn)
    assert counts.keys() == {0, 1, 2}
    assert all(count / EPOCHS == pytest.approx(1 / 3, abs=0.08) for count in counts.values())


def test_the_heldout_loss_takes_the_first_caption_and_drops_none(draw: Draw) -> None:
    always = dataclasses.replace(draw, text_dropout=1.0)
    for index in range(len(draw.samples)):
        first = draw.samples[index].texts[0]
        for quantile in (0.1, 0.5, 0.9):
            assert torch.equal(always.heldout(index, quantile=quantile).text, first)


def test_noise_levels_are_spread_evenly_before_the_shift(draw: Draw) -> None:
    sigmas = torch.stack([draw.training(Place(epoch, 2)).sigma for epoch in range(EPOCHS)])
    shares = torch.histc(sigmas, bins=4, min=0, max=1) / EPOCHS
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.08, rtol=0)


def test_the_shift_moves_the_same_noise_levels_up(draw: Draw) -> None:
    shifted = dataclasses.replace(draw, shift=3.0)
    for epoch in range(10):
        u = draw.training(Place(epoch, 0)).sigma
        sigma = shifted.training(Place(epoch, 0)).sigma
        torch.testing.assert_close(sigma, 3 * u / (1 + 2 * u))
    for quantile in (0.1, 0.5, 0.9):
        sigma = shifted.heldout(0, quantile=quantile).sigma
        assert float(sigma) == pytest.approx(3 * quantile / (1 + 2 * quantile))


def test_noise_is_unit_normal_and_not_that_of_another_sample(draw: Draw) -> None:
    places = [Place(epoch, index) for epoch in range(10) for index in range(5)]
    noise = torch.stack([draw.training(place).noise.flatten() for place in places])
    assert noise.mean().item() == pytest.approx(0, abs=0.05)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    correlation = noise @ noise.T / noise.shape[1] - torch.eye(len(places))
    assert correlation.abs().max() < 0.6


def test_a_sample_is_a_function_of_seed_epoch_and_index(draw: Draw) -> None:
    place = Place(3, 1)
    expected = draw.training(place)
    assert same(draw.training(place), expected)
    other_seed = dataclasses.replace(draw, seed=1).training(place)
    for other in (draw.training(Place(4, 1)), draw.training(Place(3, 2)), other_seed):
        assert other.sigma != expected.sigma
        assert not torch.equal(other.noise, expected.noise)


def test_noise_and_noise_level_do_not_depend_on_the_choice_of_text(draw: Draw) -> None:
    dropping = dataclasses.replace(draw, text_dropout=1.0)
    for index in range(len(draw.samples)):
        one, other = (d.training(Place(0, index)) for d in (draw, dropping))
        assert torch.equal(one.noise, other.noise) and torch.equal(one.sigma, other.sigma)


def test_heldout_noise_is_fixed_for_each_clip_and_quantile(draw: Draw) -> None:
    assert same(draw.heldout(0, quantile=0.3), draw.heldout(0, quantile=0.3))
    noise = [draw.heldout(i, quantile=q).noise for i in (0, 1) for q in (0.3, 0.7)]
    assert len({tuple(tensor.flatten().tolist()) for tensor in noise}) == 4


@pytest.mark.parametrize("threads", [1, 3])
def test_samples_do_not_depend_on_threads_that_read_ahead(draw: Draw, threads: int) -> None:
    order = Order(len(draw.samples), seed=0)
    places = [order[position] for position in range(20)]
    alone = [draw.training(place) for place in places]
    ahead = read_ahead(draw.training, places, threads=threads, ahead=8)
    assert all(same(one, other) for one, other in zip(alone, ahead, strict=True))


def test_drawing_leaves_the_global_generator_alone(draw: Draw) -> None:
    before = torch.get_rng_state()
    draw.training(Place(0, 0))
    draw.heldout(0, quantile=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_holds_its_samples_in_order_whatever_else_is_in_it(draw: Draw) -> None:
    drawn = [draw.training(Place(0, index)) for index in (2, 0, 1)]
    batch = collate(drawn, device="cpu")
    for number, sample in enumerate(drawn):
        assert torch.equal(batch.latents[number], sample.latent)
        assert torch.equal(batch.noise[number], sample.noise)
        assert torch.equal(batch.sigma[number], sample.sigma)
        assert torch.equal(batch.texts[number], sample.text)
    assert {t.dtype for t in (batch.latents, batch.noise, batch.sigma)} == {torch.float32}
    assert len({len(text) for text in batch.texts}) > 1, "texts are not padded here"
