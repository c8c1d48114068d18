# SPDX-License-Identifier: Apache-2.0
"""Exported weight files: the same as diffusers writes, but read from a checkpoint file by file."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fastvideo.checkpoint import read_tensors
from fastvideo.errors import UserError
from fastvideo.export_weights import write_weights
from fastvideo.models.parts import empty_part
from fastvideo.models.tiny import write_tiny
from fastvideo.models.weights import INDEX, WeightFiles

KINDS: dict[str, Any] = {
    "wan2.1": WanTransformer3DModel,
    "hunyuan-video": HunyuanVideoTransformer3DModel,
}


@dataclass(frozen=True)
class Trained:
    """A model folder and a checkpoint of its transformer."""

    kind: Any
    model: Path
    checkpoint: Path


def save(folder: Path, state: Mapping[str, Tensor]) -> Path:
    writer = FileSystemWriter(folder, sync_files=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_save({"model": dict(state), "optimizer": {}}, storage_writer=writer, no_dist=True)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root, kind = tmp_path_factory.mktemp("trained"), KINDS[request.param]
    write_tiny(root / "model", family=request.param)
    model = kind.from_pretrained(root / "model/transformer")
    return Trained(kind, root / "model", save(root / "checkpoint", model.state_dict()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_bytes", [2**30, 2**19, 2**10])
def test_files_are_those_of_save_pretrained(
    tmp_path: Path, trained: Trained, dtype: str, max_bytes: int
) -> None:
    """By name, tensors and index; a tensor larger than a file has one of its own."""
    theirs, ours, kind = tmp_path / "theirs", tmp_path / "ours", trained.kind
    wanted = getattr(torch, dtype)
    model = kind.from_pretrained(trained.model / "transformer", torch_dtype=wanted)
    model.save_pretrained(theirs, max_shard_size=max_bytes)
    like = empty_part(kind, trained.model, "transformer", dtype=dtype).state_dict()
    write_weights(ours, like=like, checkpoint=trained.checkpoint, max_bytes=max_bytes)
    names = sorted(file.name for file in ours.iterdir())
    assert names == sorted(file.name for file in theirs.iterdir() if file.name != "config.json")
    for name in names:
        if name == INDEX:
            assert (ours / name).read_text() == (theirs / name).read_text()
            continue
        expected, found = load_file(theirs / name), load_file(ours / name)
        assert list(expected) == list(found), "in the order of the library"
        assert all(expected[key].dtype == found[key].dtype for key in expected)
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        with safe_open(ours / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("length", range(1, 80, 7))
def test_numbers_begin_where_kernels_round_as_they_do_in_memory(
    tmp_path: Path, length: int
) -> None:
    """However long the header is."""
    like = {"a" * length: torch.ones(64), "b": torch.ones(3, 32, dtype=torch.float16)}
    checkpoint = save(tmp_path / "checkpoint", like)
    write_weights(tmp_path / "transformer", like=like, checkpoint=checkpoint, max_bytes=2**30)
    places = WeightFiles(tmp_path, folder="transformer").tensors
    assert [place.offset % 64 for place in places.values()] == [0, 0]


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "checkpoint", {"a": torch.ones(4, 2)})
    assert torch.equal(read_tensors(checkpoint, {"a": torch.empty(4, 2)})["a"], torch.ones(4, 2))
    for like in ({"b": torch.empty(4, 2)}, {"a": torch.empty(2, 4)}):
        with pytest.raises(UserError, match=f"{checkpoint}: does not fit the model"):
            read_tensors(checkpoint, like)
    for file in checkpoint.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        read_tensors(checkpoint, {"a": torch.empty(4, 2)})
