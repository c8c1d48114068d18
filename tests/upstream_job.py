# SPDX-License-Identifier: Apache-2.0
"""A job on Parquet of upstream FastVideo's for tests: what its samples hold, and what is kept."""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from fastvideo import state
from fastvideo.data.loader import Sample as Stored
from fastvideo.data.loader import Samples
from fastvideo.models.family import find_family, pad_text
from fastvideo.models.tiny import write_tiny
from fastvideo.models.tiny_configs import IMAGE_DIM, POOLED_DIM, TEXT_DIM
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir, ShardStore
from fastvideo.train.launcher import train
from tests.tiny_world import Pair, World, in_fork, make_world
from tests.upstream_files import I2V, T2V, Geometry, Sample, random_samples, write_file

T2V_PAIR, I2V_PAIR = Pair(), Pair(task="i2v")
HUNYUAN = Pair("hunyuan-video")
COLUMNS = ("clip_feature", "first_frame_latent")
IMAGE_FEATURES = (257, IMAGE_DIM)

Model = Callable[[Pair], Path]


def models_below(root: Path) -> Model:
    """Writes the tiny model of a pair when it is first asked for."""

    @functools.cache
    def folder(pair: Pair) -> Path:
        write_tiny(root / str(pair), family=pair.family, task=pair.task)
        return root / str(pair)

    return folder


@dataclasses.dataclass(frozen=True)
class Job:
    """A recipe whose source is the folder ``given``; shards are float32."""

    world: World
    pair: Pair

    @property
    def given(self) -> Path:
        return self.world.root / "given"

    @property
    def schema(self) -> Any:
        return I2V if self.pair.task == "i2v" else T2V

    def samples(self, count: int, *, seed: int = 0, **options: Any) -> list[Sample]:
        """What upstream's preprocessing would have made with the job's model."""
        names = {field.name for field in dataclasses.fields(Geometry)}
        shapes = {key: options.pop(key) for key in list(options) if key in names}
        wide = self.pair.family == "wan2.2-ti2v-5b"
        plain = {
            "latent": (48, 3, 2, 4) if wide else (16, 3, 4, 6),
            "stride": 16 if wide else 8,
            "text_dim": TEXT_DIM,
            "image_features": IMAGE_FEATURES if self.pair.family == "wan2.1" else None,
        }
        geometry = Geometry(**{**plain, **shapes})
        task = self.pair.task
        made = random_samples(count, task=task, geometry=geometry, seed=seed, **options)
        return [self._as_encoded(sample) for sample in made]

    def _as_encoded(self, sample: Sample) -> Sample:
        """With the latents of the model's VAE in scale, and the text as its encoders give it."""
        recipe = self.world.load()
        statistics = find_family(recipe).latent_statistics(Path(recipe.model.path))
        tensors = dict(sample.tensors)
        latent = torch.from_numpy(tensors["vae_latent"])
        if len(latent) == len(statistics.mean):
            tensors["vae_latent"] = statistics.denormalise(latent).numpy()
        if self.pair == HUNYUAN:  # row 0 is CLIP's pooled text
            tensors["text_embedding"] = tensors["text_embedding"].copy()
            tensors["text_embedding"][0, POOLED_DIM:] = 0
        return dataclasses.replace(sample, tensors=tensors)

    def write(self, samples: Sequence[Sample], name: str = "a.parquet") -> Path:
        """One file of upstream's."""
        folder = self.given / "training_dataset/worker_0/worker_0"
        return write_file(folder / name, samples, self.schema)

    def fill(self, *overrides: str, **options: Any) -> list[int]:
        filled: list[int] = preprocess(self.world.load(*overrides), **options)["filled"]
        return filled

    def stored(self, split: Any = "train") -> dict[str, Stored]:
        """What training reads, by id."""
        columns = [name for name in COLUMNS if f"{name}_bytes" in self.schema.names]
        if self.pair.family != "wan2.1":
            columns = [name for name in columns if name != "clip_feature"]
        samples = Samples(ShardStore(self.world.shards), split=split, columns=columns)
        found = [samples[i] for i in range(len(samples))]
        assert len({sample.id for sample in found}) == len(found)
        return {sample.id: sample for sample in found}

    def ledger(self) -> dict[str, tuple[str, str]]:
        """State and reason by id."""
        store = ShardStore(self.world.shards)
        plan = store.read_plan()
        assert plan is not None
        return {row.id: (row.state, row.reason) for row in state.ledger(store, plan)}

    def train(self, *overrides: str) -> list[float]:
        """Train in a fork; the losses of all transformers."""
        recipe = self.world.load(*overrides)
        shutil.rmtree(recipe.run_dir, ignore_errors=True)
        assert in_fork(lambda: train(recipe)) == 0
        losses = []
        for folder in recipe.transformers:
            directory = RunDir(recipe.run_dir).training(folder)
            assert directory.complete_checkpoints()[-1] == recipe.train.steps
            records = map(json.loads, directory.metrics.read_text().splitlines())
            found = [record["loss"] for record in records if "loss" in record]
            assert len(found) == recipe.train.steps
            losses += found
        assert all(math.isfinite(loss) for loss in losses)
        return losses


def make_job(root: Path, model: Path, pair: Pair = T2V_PAIR) -> Job:
    world = make_world(root, clips=0, model=model, pair=pair)
    tree = yaml.safe_load(world.recipe.read_text())
    tree["source"] = {"kind": "parquet", "path": str(root / "given")}
    tree["shards"]["dtype"] = "float32"
    tree["train"] |= {"steps": 3, "checkpoint": {"every_steps": 3}}
    world.recipe.write_text(yaml.safe_dump(tree))
    return Job(world, pair)


def assert_as_given(stored: Stored, sample: Sample, *, pair: Pair) -> None:
    """Bit for bit."""
    given = {stem: torch.from_numpy(tensor) for stem, tensor in sample.tensors.items()}
    assert same(stored.vae_latent, given["vae_latent"])
    for name, tensor in stored.images.items():
        assert same(tensor, given[name]), name
    (text,) = stored.texts
    rows = given["text_embedding"]
    if pair == HUNYUAN:
        assert text.pooled is not None
        assert same(text.pooled, rows[0, :POOLED_DIM])
        rows = rows[1:]
    length = 256 if pair == HUNYUAN else 512
    padded = pad_text([text], length=length)[0]
    assert text.embedding.dtype == torch.float32
    assert torch.equal(padded, upstream_pad(rows, length))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def upstream_pad(t: torch.Tensor, padding_length: int) -> torch.Tensor:
    """``pad`` of upstream's fastvideo/dataset/utils.py, without the mask."""
    length, dim = t.shape
    if padding_length > length:
        return torch.cat([t, torch.zeros(padding_length - length, dim, dtype=t.dtype)], 0)
    return t[:padding_length]
