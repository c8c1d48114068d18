# SPDX-License-Identifier: Apache-2.0
"""What training passes to a transformer, from Parquet, is what the pipeline passes in sampling."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from torch import Tensor

from fastvideo import state
from fastvideo.config.prompts import load_prompts
from fastvideo.config.recipe import Recipe
from fastvideo.data.decode import decode_clip
from fastvideo.data.first_image import first_image
from fastvideo.data.loader import Place
from fastvideo.data.shard import stored_tensor
from fastvideo.models import family as families
from fastvideo.models import flow, hunyuan, wan21, wan_encoders
from fastvideo.models.execution import Execution
from fastvideo.models.family import Batch, Family, LatentStatistics, SamplerSettings, Text
from fastvideo.models.tiny import write_tiny
from fastvideo.models.wan22_ti2v import Wan22TI2V
from fastvideo.preprocess import preprocess
from fastvideo.state import ShardStore
from fastvideo.train import worker
from fastvideo.train.draw import collate
from tests.tiny_world import PAIRS, WAN21, Pair, World, make_world

STEPS = 4
CLIP = 1
"""Which clip is looked at; not the first, so that an index mistaken for 0 shows."""


@dataclass(frozen=True)
class Call:
    """Arguments of a transformer by name, and what came out."""

    arguments: Mapping[str, Any]
    output: Tensor


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Pair], Path]:
    root = tmp_path_factory.mktemp("models")

    def model(pair: Pair) -> Path:
        folder = root / str(pair)
        if not folder.exists():
            write_tiny(folder, family=pair.family, task=pair.task)
        return folder

    return model


@dataclass(frozen=True)
class Job:
    """A preprocessed job of one pair."""

    world: World
    recipe: Recipe
    family: Family

    def training_batch(self, *, sigma: float) -> Batch:
        """The clip as the training loop gets it, at a chosen noise level."""
        store = ShardStore(self.recipe.shards.path)
        plan = store.read_plan()
        assert plan is not None
        path = Path(self.recipe.model.path)
        about = {"shift": 1.0, "interval": [0.0, 1.0]}
        columns = self.family.columns(path)
        draw, _ = worker._draws(self.recipe, plan, columns=columns, about=about)
        drawn = dataclasses.replace(draw.training(Place(0, CLIP)), sigma=torch.tensor(sigma))
        return collate([drawn], device="cpu")

    def pipeline(self) -> Any:
        settings = SamplerSettings(dtype="float32", device="cpu")
        path = Path(self.recipe.model.path)
        return self.family.load_pipeline(path, settings=settings, transformers={})


@pytest.fixture
def prepare(tmp_path: Path, models: Callable[[Pair], Path]) -> Callable[[Pair], Job]:
    def job(pair: Pair) -> Job:
        world = make_world(tmp_path, clips=2, model=models(pair), pair=pair)
        overrides = ["shards.dtype=float32", "train.text_dropout=0"]
        if pair.family == "hunyuan-video":
            overrides += ["train.guidance=6", "generate.guidance_scale=6"]
        recipe = world.load(*overrides)
        preprocess(recipe)
        return Job(world, recipe, families.find_family(recipe))

    return job


def sampled(job: Job, pipeline: Any, latents: Tensor) -> dict[str, list[Call]]:
    """Calls of each transformer while the pipeline makes the clip's caption and first frame."""
    recipe = job.recipe
    calls: dict[str, list[Call]] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(_: Any, __: Any, arguments: dict[str, Any], output: Any) -> None:
            kept = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
            calls.setdefault(name, []).append(Call(kept, output[0].clone()))

        return record

    for name in recipe.architecture.transformers:
        getattr(pipeline, name).register_forward_hook(recorder(name), with_kwargs=True)
    item = job.world.items[CLIP]
    clip = recipe.clip
    given: dict[str, Any] = {}
    if recipe.model.task == "i2v":
        frames = decode_clip(
            job.world.root / "clips/videos" / item["path"],
            num_frames=1,
            height=clip.height,
            width=clip.width,
            fps=clip.fps,
        )
        given["image"] = Image.fromarray(frames[0])
    pipeline(
        prompt=item["cap"][0],
        num_frames=clip.num_frames,
        height=clip.height,
        width=clip.width,
        num_inference_steps=STEPS,
        guidance_scale=recipe.generate.guidance_scale,
        latents=latents,
        output_type="latent",
        **given,
    )
    return calls


def first_timestep(pipeline: Any) -> float:
    """Of the sampler; the same whether it was given steps or sigmas."""
    pipeline.scheduler.set_timesteps(STEPS)
    return float(pipeline.scheduler.timesteps[0])


def compared(job: Job) -> Iterator[tuple[str, list[str], float]]:
    """For each transformer: its name, the arguments that differ, and by how much outputs do.

    The first call of the pipeline is given our noised latents; a later call, which is the first of
    the low-noise expert, has latents of its own, whose place our arguments take over.
    """
    pipeline = job.pipeline()
    timestep = first_timestep(pipeline)
    batch = job.training_batch(sigma=timestep / 1000)
    noised = flow.noised(batch.latents, batch.noise, batch.sigma)
    calls = sampled(job, pipeline, noised)
    assert list(calls) == list(job.recipe.architecture.transformers)
    for name, (theirs, *_) in calls.items():
        at = theirs.arguments["timestep"].float().max()
        ours = job.family.arguments(dataclasses.replace(batch, sigma=(at / 1000)[None]))
        if name == "transformer_2":
            channels = batch.latents.shape[1]
            ours["hidden_states"] = ours["hidden_states"].clone()
            ours["hidden_states"][:, :channels] = theirs.arguments["hidden_states"][:, :channels]
        model = getattr(pipeline, name)
        with torch.no_grad():
            job.family.attach(model, Execution())
            output = model(**ours)
        assert output.shape == theirs.output.shape
        error = float((output - theirs.output).norm() / theirs.output.norm())
        yield name, differing(ours, theirs.arguments), error


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Names of the arguments that are not equal, bit for bit but for one case."""
    names = sorted(ours.keys() | theirs.keys())
    return [name for name in names if not _equal(name, ours, theirs)]


def _equal(name: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
        return False
    a, b = ours[name].float(), theirs[name].float()
    mask = theirs.get("encoder_attention_mask")
    if name == "encoder_hidden_states" and mask is not None:
        # Rows that the mask leaves out hold padding there and zeros here; the outputs say that
        # they have no effect.
        a, b = a * mask[..., None], b * mask[..., None]
    if name == "hidden_states" and theirs["timestep"].ndim == 2:
        # TI2V-5B's sampler encodes the first frame alone; a convolution over one frame rounds
        # otherwise than over all.
        return torch.allclose(a, b, rtol=0, atol=1e-6)
    return torch.equal(a, b)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_training_passes_what_the_pipeline_passes(
    pair: Pair, prepare: Callable[[Pair], Job]
) -> None:
    found = list(compared(prepare(pair)))
    assert [names for _, names, _ in found] == [[]] * len(found)
    for name, _, error in found:
        assert error <= 1e-6, f"{name}: outputs differ by {error:g}"


# ---------------------------------------------------------------- the test can fail


def no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text as long as the longest of the batch."""

    def pad(texts: Any, *, length: int) -> Tensor:
        return wan21_pad(texts, length=max(len(text.embedding) for text in texts))

    wan21_pad = families.pad_text
    monkeypatch.setattr(wan21, "pad_text", pad)


def no_mask_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(latent_BCTYX: Tensor, *, channels: int) -> Tensor:
        return torch.zeros_like(latent_BCTYX[:, :channels])

    monkeypatch.setattr(wan21, "first_frame_mask", zeros)


def one_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timestep per sample, as for the other models."""
    monkeypatch.setattr(Wan22TI2V, "arguments", wan21.Wan21.arguments)


def noised_first_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments(self: Wan22TI2V, batch: Batch) -> dict[str, Tensor]:
        noised = flow.noised(batch.latents, batch.noise, batch.sigma)
        return {**given(self, batch), "hidden_states": noised}

    given = Wan22TI2V.arguments
    monkeypatch.setattr(Wan22TI2V, "arguments", arguments)


def last_layer_of_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: Any, image: Any, device: Any = None) -> Tensor:
        pixels = self.image_processor(images=image, return_tensors="pt")
        last: Tensor = self.image_encoder(**pixels).last_hidden_state
        return last

    # only while preprocessing, whose module holds its own name of the class
    changed = type("Changed", (WanImageToVideoPipeline,), {"encode_image": encode})
    monkeypatch.setattr(wan_encoders, "WanImageToVideoPipeline", changed)


def raw_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatentStatistics, "normalise", lambda self, raw: raw)


def no_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hunyuan, "GUIDANCE_SCALE_UNIT", 1.0)


def full_text_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments(self: Any, batch: Batch) -> dict[str, Tensor]:
        found = given(self, batch)
        return {**found, "encoder_attention_mask": torch.ones_like(found["encoder_attention_mask"])}

    given = hunyuan.HunyuanVideo.arguments
    monkeypatch.setattr(hunyuan.HunyuanVideo, "arguments", arguments)


def no_pooled_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments(self: Any, batch: Batch) -> dict[str, Tensor]:
        zero = [Text(t.embedding, torch.zeros_like(t.pooled)) for t in batch.texts]  # type: ignore[arg-type]
        return given(self, dataclasses.replace(batch, texts=tuple(zero)))

    given = hunyuan.HunyuanVideo.arguments
    monkeypatch.setattr(hunyuan.HunyuanVideo, "arguments", arguments)


BROKEN = [
    (WAN21, no_padding, "encoder_hidden_states"),
    (Pair("wan2.2-a14b"), no_padding, "encoder_hidden_states"),
    (Pair(task="i2v"), no_mask_channels, "hidden_states"),
    (Pair("wan2.2-a14b", "i2v"), no_mask_channels, "hidden_states"),
    (Pair(task="i2v"), last_layer_of_clip, "encoder_hidden_states_image"),
    (Pair(task="i2v"), raw_latents, "hidden_states"),
    (Pair("wan2.2-ti2v-5b", "i2v", width=64), one_timestep, "timestep"),
    (Pair("wan2.2-ti2v-5b", "i2v", width=64), noised_first_frame, "hidden_states"),
    (Pair("wan2.2-ti2v-5b", "i2v", width=64), raw_latents, "hidden_states"),
    (Pair("hunyuan-video"), no_guidance, "guidance"),
    (Pair("hunyuan-video"), full_text_mask, "encoder_attention_mask"),
    (Pair("hunyuan-video"), no_pooled_text, "pooled_projections"),
]


@pytest.mark.parametrize(
    ("pair", "breaks", "argument"),
    BROKEN,
    ids=[f"{pair}-{breaks.__name__}" for pair, breaks, _ in BROKEN],
)
def test_a_wrong_input_is_noticed(
    pair: Pair,
    breaks: Callable[[pytest.MonkeyPatch], None],
    argument: str,
    prepare: Callable[[Pair], Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    breaks(monkeypatch)
    _, names, error = next(compared(prepare(pair)))
    assert argument in names
    assert error > 1e-3, "the model does not look at it"


# ---------------------------------------------------------------- validation's first images


I2V = [pair for pair in PAIRS if pair.task == "i2v"]


@pytest.mark.parametrize("pair", I2V, ids=str)
def test_first_images_of_prompts_are_stored_as_the_pipeline_uses_them(
    pair: Pair, prepare: Callable[[Pair], Job]
) -> None:
    job = prepare(pair)
    store = ShardStore(job.recipe.shards.path)
    marker = state.read_marker(store.validation)
    assert marker is not None
    empty, *rows = marker["rows"]
    assert "first_frame_latent" not in empty["tensors"]
    pipeline = job.pipeline()
    clip = job.recipe.clip
    for prompt, row in zip(load_prompts(job.world.root / "prompts.json"), rows, strict=True):
        stored = {
            name: tensor.read()
            for name in row["tensors"]
            if (tensor := stored_tensor(store.validation, row, name)) is not None
        }
        assert prompt.first_image is not None
        image = first_image(prompt.first_image, height=clip.height, width=clip.width)
        assert stored["pil_image"].dtype == torch.float32, "as shards.dtype says"
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
        assert torch.equal(stored["pil_image"], pixels.float())
        calls: list[dict[str, Any]] = []
        hook = pipeline.transformer.register_forward_pre_hook(
            lambda _, __, given, calls=calls: calls.append(given), with_kwargs=True
        )
        pipeline(
            image=Image.fromarray(image),
            prompt=prompt.caption,
            num_frames=clip.num_frames,
            height=clip.height,
            width=clip.width,
            num_inference_steps=2,
            guidance_scale=1.0,
            output_type="latent",
        )
        hook.remove()
        given = calls[0]
        latent = stored["first_frame_latent"]
        if pair.family == "wan2.2-ti2v-5b":
            assert torch.equal(given["hidden_states"][0, :, :1], latent)
        else:
            assert torch.equal(given["hidden_states"][0, -16:], latent)
        features = given["encoder_hidden_states_image"]
        assert ("clip_feature" in stored) == (features is not None)
        if features is not None:
            assert torch.equal(features[0], stored["clip_feature"])


def test_another_first_image_encodes_the_prompts_anew_and_no_clip(
    prepare: Callable[[Pair], Job],
) -> None:
    job = prepare(Pair("wan2.2-ti2v-5b", "i2v", width=64))
    store = ShardStore(job.recipe.shards.path)
    shard, before = store.shard(0).read_bytes(), store.validation.read_bytes()
    assert preprocess(job.recipe)["filled"] == []
    assert store.validation.read_bytes() == before
    image = Image.open(job.world.root / "first.png").rotate(180)
    image.save(job.world.root / "first.png")
    assert preprocess(job.recipe)["filled"] == []
    assert store.validation.read_bytes() != before
    assert store.shard(0).read_bytes() == shard
