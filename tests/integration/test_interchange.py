# SPDX-License-Identifier: Apache-2.0
"""Shards in float32 are what upstream FastVideo trains on, and they come back the same.

Schemas and reader are copied from upstream's fastvideo/dataset (dataloader/schema.py, utils.py,
parquet_dataset_map_style.py) as of August 2026, without what needs no test.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from fastvideo.config.recipe import Recipe
from fastvideo.data.loader import Sample, Samples
from fastvideo.errors import UserError
from fastvideo.models.family import pad_text
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir, ShardStore
from fastvideo.train.launcher import train
from tests.tiny_world import Pair, World, in_fork, make_world

TENSOR = (("bytes", pa.binary()), ("shape", pa.list_(pa.int64())), ("dtype", pa.string()))
ABOUT = [
    ("file_name", pa.string()),
    ("caption", pa.string()),
    ("media_type", pa.string()),
    ("width", pa.int64()),
    ("height", pa.int64()),
    ("num_frames", pa.int64()),
    ("duration_sec", pa.float64()),
    ("fps", pa.float64()),
]


def tensor(stem: str) -> list[tuple[str, pa.DataType]]:
    return [(f"{stem}_{part}", kind) for part, kind in TENSOR]


PYARROW_SCHEMA_T2V = [
    ("id", pa.string()),
    *tensor("vae_latent"),
    *tensor("text_embedding"),
    *ABOUT,
]
PYARROW_SCHEMA_I2V = [
    ("id", pa.string()),
    *tensor("vae_latent"),
    *tensor("text_embedding"),
    *tensor("clip_feature"),
    *tensor("first_frame_latent"),
    *tensor("pil_image"),
    *ABOUT,
]
TEXT_TOKENS = 512
WANS = [Pair(family, task) for family in ("wan2.1", "wan2.2-a14b") for task in ("t2v", "i2v")]
PAIRS = [*WANS, Pair("wan2.2-ti2v-5b", width=64)]


@dataclass(frozen=True)
class Written:
    """Raw clips through preprocessing into float32 shards, three clips and one."""

    pair: Pair
    world: World

    @property
    def columns(self) -> list[str]:
        """Image columns that the model trains on."""
        if self.pair.task == "t2v":
            return []
        has_clip = self.pair.family == "wan2.1"
        return (["clip_feature"] if has_clip else []) + ["first_frame_latent"]

    @property
    def schema(self) -> list[tuple[str, pa.DataType]]:
        """Upstream's."""
        return PYARROW_SCHEMA_I2V if self.pair.task == "i2v" else PYARROW_SCHEMA_T2V

    @property
    def shards(self) -> list[Path]:
        return sorted(self.world.shards.glob("shard-*.parquet"))

    def samples(self, shards: Path | None = None) -> list[Sample]:
        """As our training reads them."""
        store = ShardStore(shards or self.world.shards)
        found = Samples(store, split="train", columns=self.columns)
        return [found[i] for i in range(len(found))]


@pytest.fixture(scope="module", params=PAIRS, ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    pair: Pair = request.param
    root = tmp_path_factory.mktemp(str(pair))
    write_tiny(root / "model", family=pair.family, task=pair.task)
    world = make_world(root, clips=4, model=root / "model", pair=pair)
    tree = yaml.safe_load(world.recipe.read_text())
    tree["shards"] |= {"dtype": "float32", "text_dtype": "bfloat16"}
    tree["train"] |= {"steps": 3, "checkpoint": {"every_steps": 3}, "heldout": {}}
    world.recipe.write_text(yaml.safe_dump(tree))
    assert in_fork(lambda: preprocess(world.load())) == 0
    return Written(pair, world)


def upstream_rows(path: Path) -> list[dict[str, Any]]:
    """``read_row_from_parquet_file`` for every row."""
    file = pq.ParquetFile(path)
    rows = []
    for group in range(file.num_row_groups):
        columns = file.read_row_group(group).to_pydict()
        count = file.metadata.row_group(group).num_rows
        rows += [{key: values[i] for key, values in columns.items()} for i in range(count)]
    return rows


def upstream_batch(
    rows: list[dict[str, Any]], names: list[str], text_padding_length: int
) -> dict[str, torch.Tensor]:
    """``collate_rows_from_parquet_schema`` without dropout and information on the clips."""
    tensor_names = [name.replace("_bytes", "") for name in names if name.endswith("_bytes")]
    batch: dict[str, torch.Tensor] = {}
    for name in tensor_names:
        found = []
        for row in rows:
            shape, data = row[f"{name}_shape"], row[f"{name}_bytes"]
            if len(data) == 0:
                found.append(torch.zeros(0, dtype=torch.bfloat16))
            else:
                array = np.frombuffer(data, dtype=np.float32).reshape(shape).copy()
                found.append(torch.from_numpy(array))
        if name == "text_embedding":
            padded = [upstream_pad(tensor, text_padding_length) for tensor in found]
            batch[name] = torch.stack([tensor for tensor, _ in padded])
            batch["text_attention_mask"] = torch.stack([mask for _, mask in padded])
        else:
            batch[name] = torch.stack(found)
    return batch


def upstream_pad(t: torch.Tensor, padding_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    length, dim = t.shape
    if padding_length > length:
        pad = torch.zeros(padding_length - length, dim, dtype=t.dtype, device=t.device)
        mask = [torch.ones(length), torch.zeros(padding_length - length)]
        return torch.cat([t, pad], 0), torch.cat(mask, 0)
    return t[:padding_length], torch.ones(padding_length)


def test_columns_begin_with_upstreams_in_name_order_and_type(written: Written) -> None:
    assert len(written.shards) == 2
    for path in written.shards:
        schema = pq.ParquetFile(path).schema_arrow
        found = [(field.name, field.type) for field in schema]
        assert found[: len(written.schema)] == written.schema
        further = [name for name, _ in found[len(written.schema) :]]
        assert all(name.startswith("more_") for name in further)


def test_every_tensor_has_the_bytes_of_its_shape_in_float32(written: Written) -> None:
    expected = {"vae_latent", "text_embedding", *written.columns}
    for path in written.shards:
        for row in pq.read_table(path).to_pylist():
            held = set()
            for name in (key.removesuffix("_bytes") for key in row if key.endswith("_bytes")):
                data, shape, dtype = (row[f"{name}_{part}"] for part, _ in TENSOR)
                if data:
                    held.add(name)
                    assert dtype == "float32"
                    assert len(data) == 4 * math.prod(shape)
                else:
                    assert (data, shape, dtype) == (b"", [], "")
            assert held == expected


def test_values_mean_what_they_do_upstream(written: Written) -> None:
    stride = 16 if written.pair.family == "wan2.2-ti2v-5b" else 8
    channels = 48 if stride == 16 else 16
    latent = [channels, 3, 32 // stride, written.pair.width // stride]
    captions = {item["path"]: item["cap"][0] for item in written.world.items}
    for path in written.shards:
        for row in pq.read_table(path).to_pylist():
            assert not [name for name, value in row.items() if value is None]
            assert row["vae_latent_shape"] == latent
            assert row["num_frames"] == latent[1], "latent frames"
            assert (row["width"], row["height"]) == (written.pair.width, 32)
            assert row["id"] == row["file_name"]
            assert row["caption"] == captions[row["id"]]
            assert row["media_type"] == "video"
            assert (row["fps"], row["duration_sec"]) == (8.0, 9 / 8)
            assert row["text_embedding_shape"][0] <= TEXT_TOKENS
            if "first_frame_latent" in written.columns:
                assert row["first_frame_latent_shape"] == latent


def test_upstreams_reader_finds_the_tensors_that_ours_does(written: Written) -> None:
    """Upstream reads the bytes of each tensor as float32 and stacks those of a batch."""
    rows = [row for path in written.shards for row in upstream_rows(path)]
    batch = upstream_batch(rows, [name for name, _ in written.schema], TEXT_TOKENS)
    samples = written.samples()
    assert [row["id"] for row in rows] == [sample.id for sample in samples]
    assert torch.equal(batch["vae_latent"], torch.stack([s.vae_latent for s in samples]))
    texts = [sample.texts[0] for sample in samples]
    assert torch.equal(batch["text_embedding"], pad_text(texts, length=TEXT_TOKENS))
    assert batch["text_attention_mask"].sum(1).tolist() == [len(t.embedding) for t in texts]
    for name in written.columns:
        assert torch.equal(batch[name], torch.stack([s.images[name] for s in samples]))
    empty = {"clip_feature", "first_frame_latent", "pil_image"} - set(written.columns)
    for name in empty & batch.keys():
        assert batch[name].shape == (len(rows), 0)


def test_float32_shards_come_back_the_same_and_train_to_the_same_losses(
    written: Written, tmp_path: Path
) -> None:
    """Read as if upstream had made them, manifest and prompts beside them and all."""
    again = written.world.load(
        f"source={{kind: parquet, path: {written.world.shards}}}",
        f"shards.path={tmp_path / 'shards'}",
        f"run_dir={tmp_path / 'run'}",
    )
    assert preprocess(again)["clips"] == {"encoded": 4}
    for one, other in zip(written.samples(), written.samples(again.shards.path), strict=True):
        assert one.id == other.id
        assert torch.equal(one.vae_latent, other.vae_latent)
        assert one.images.keys() == other.images.keys()
        assert all(torch.equal(one.images[name], other.images[name]) for name in one.images)
        (text,), (text_again,) = one.texts, other.texts
        assert torch.equal(text.embedding, text_again.embedding)
    first, second = trained(written.world.load()), trained(again)
    assert first == second
    assert len(first) == 3 * len(again.transformers)


def trained(recipe: Recipe) -> list[tuple[float, float]]:
    """Loss and norm of the gradient of each step."""
    assert in_fork(lambda: train(recipe)) == 0
    found = []
    for transformer in recipe.transformers:
        directory = RunDir(recipe.run_dir).training(transformer)
        assert directory.complete_checkpoints() == [3]
        records = map(json.loads, directory.metrics.read_text().splitlines())
        found += [(record["loss"], record["grad_norm"]) for record in records if "loss" in record]
    return found


def test_shards_with_pooled_text_are_not_taken_for_upstreams(tmp_path: Path) -> None:
    """Upstream's first row of ``text_embedding`` is not ours, and would be lost without a word."""
    pair = Pair("hunyuan-video")
    write_tiny(tmp_path / "model", family=pair.family)
    world = make_world(tmp_path, clips=1, model=tmp_path / "model", pair=pair)
    preprocess(world.load("shards.dtype=float32"))
    again = world.load(
        f"source={{kind: parquet, path: {world.shards}}}", f"shards.path={tmp_path / 'again'}"
    )
    with pytest.raises(UserError, match=r"shard-00000\.parquet: is a shard of this suite"):
        preprocess(again)
