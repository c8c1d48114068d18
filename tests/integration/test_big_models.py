# SPDX-License-Identifier: Apache-2.0
"""A model too large to hold: each process reads its share and holds its share, exports hold a file.

The checkpoint is synthetic: Wan's architecture, 63 M parameters, bfloat16 in five files. Memory is
the peak of the resident memory over what it was when the modules stood on the meta device.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastvideo.config.recipe import Model
from fastvideo.export_weights import write_weights
from fastvideo.models.wan21 import Wan21
from fastvideo.models.weights import INDEX, WeightFiles, load_weights, materialise
from tests.memory import Memory
from tests.ranks import in_ranks
from tests.tiny_world import in_fork

WORLD = 4
MIB = 2**20
FILE_BYTES = 32 * MIB
CONSTANT = 24 * MIB
"""Beside its share: pieces under way, and what allocators and libraries keep."""
CONFIG = {
    "num_attention_heads": 8,
    "attention_head_dim": 64,
    "text_dim": 512,
    "ffn_dim": 2048,
    "num_layers": 14,
}
MODEL = Model(family="wan2.1", task="t2v", path="unused")


@dataclass(frozen=True)
class Figures:
    """Of one process, in bytes."""

    headers: int
    """Read of the files before any tensor."""
    read: int
    """Read of the files in all."""
    share: int
    """What it keeps, as stored."""
    held: int
    """What it keeps, in memory."""
    peak: int


@dataclass(frozen=True)
class Big:
    """The model folder, a checkpoint of it and what each process saw."""

    model: Path
    checkpoint: Path
    figures: list[Figures]
    bytes: int
    """Of the whole model in float32."""


def empty(path: Path, dtype: str = "float32") -> Any:
    return Wan21(MODEL).empty_transformer(path, folder="transformer", dtype=dtype)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Big]:
    root = tmp_path_factory.mktemp("big")
    # In a fork, whose memory goes with it.
    assert in_fork(lambda: write_model(root / "model")) == 0
    figures = in_ranks(WORLD, lambda rank: load_and_save(root))
    whole = sum(parameter.nbytes for parameter in empty(root / "model").parameters())
    yield Big(root / "model", root / "checkpoint", figures, whole)
    shutil.rmtree(root)


def write_model(path: Path) -> None:
    folder = path / "transformer"
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = WanTransformer3DModel(**CONFIG).bfloat16()
    model.save_config(folder)
    wanted, random = model.state_dict(), np.random.default_rng(0)
    split = split_torch_state_dict_into_shards(wanted, max_shard_size=FILE_BYTES)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: torch.empty_like(wanted[name], device="cpu") for name in names}
        for tensor in tensors.values():
            tensor.copy_(torch.from_numpy(random.random(tensor.shape, np.float32)))
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(
        json.dumps({"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    )


def load_and_save(root: Path) -> Figures:
    """Load this process's part, and save a checkpoint together."""
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("replicate", "shard"))
    model = empty(root / "model")
    whole = {parameter for parameter in model.parameters() if parameter.ndim < 2}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    memory = Memory()
    materialise(model, "cpu")
    files = WeightFiles(root / "model", folder="transformer")
    headers = files.bytes_read
    load_weights(model, files)
    peak = memory.peak()
    kept = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    figures = Figures(
        headers=headers,
        read=files.bytes_read,
        share=sum(tensor.numel() * 2 for tensor in kept),
        held=sum(tensor.nbytes for tensor in kept),
        peak=peak,
    )
    dcp_save(
        {"model": model.state_dict()},
        storage_writer=FileSystemWriter(root / "checkpoint", sync_files=False),
    )
    return figures


def test_each_process_reads_the_bytes_of_its_share_and_no_other(big: Big) -> None:
    for figures in big.figures:
        assert figures.read == figures.headers + figures.share
        assert figures.headers < 0.01 * figures.read
    shares = [figures.share for figures in big.figures]
    assert max(shares) < 1.02 * big.bytes / 2 / WORLD, "bfloat16, and the small ones whole"
    assert sum(shares) >= big.bytes / 2


def test_each_process_holds_its_share_and_a_constant(big: Big) -> None:
    for figures in big.figures:
        assert figures.held <= figures.peak <= figures.held + CONSTANT < big.bytes / 2


def export(big: Big, target: Path, dtype: str) -> None:
    """Export in a process of its own, that tells its peak."""

    def run() -> None:
        like = empty(big.model, dtype).state_dict()
        written = {"like": like, "checkpoint": big.checkpoint, "max_bytes": FILE_BYTES}
        # The first time counts modules that are imported, code that is mapped, and pages of the
        # test's own process that the fork makes its own.
        write_weights(target, **written)
        shutil.rmtree(target)
        memory = Memory()
        write_weights(target, **written)
        target.with_suffix(".peak").write_text(str(memory.peak()))
        (target / "config.json").write_bytes((big.model / "transformer/config.json").read_bytes())

    assert in_fork(run) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_holds_one_file_and_a_constant(big: Big, tmp_path: Path, dtype: str) -> None:
    target = tmp_path / "transformer"
    export(big, target, dtype)
    peak = int(target.with_suffix(".peak").read_text())
    files = sorted(target.glob("*.safetensors"))
    assert len(files) >= big.bytes / FILE_BYTES / (1 if dtype == "float32" else 2)
    assert all(file.stat().st_size < FILE_BYTES + MIB for file in files)
    assert peak <= FILE_BYTES + CONSTANT < big.bytes / 3
    sources = (big.model / "transformer").glob("*.safetensors")
    stored = {name: tensor for file in sources for name, tensor in load_file(file).items()}
    model: Any = WanTransformer3DModel.from_pretrained(target, torch_dtype=getattr(torch, dtype))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), name
    shutil.rmtree(target)


def test_the_measure_sees_a_whole_model(big: Big, tmp_path: Path) -> None:
    """What the other tests would find if each process held everything for a moment."""

    def load() -> None:
        memory = Memory()
        Wan21(MODEL).load_transformer(big.model, folder="transformer")
        (tmp_path / "peak").write_text(str(memory.peak()))

    assert in_fork(load) == 0
    assert int((tmp_path / "peak").read_text()) > big.bytes
