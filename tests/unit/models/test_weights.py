# SPDX-License-Identifier: Apache-2.0
"""Weights read in pieces: which bytes, into which rows, and what is said of wrong files."""

import json
import logging
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastvideo.config.recipe import Recipe
from fastvideo.errors import UserError
from fastvideo.models import weights
from fastvideo.models.family import Family, find_family
from fastvideo.models.tiny import write_tiny
from fastvideo.models.weights import (
    DTYPES,
    INDEX,
    NAME,
    WeightFiles,
    load_weights,
    local_rows,
    materialise,
)
from tests.ranks import in_ranks
from tests.tiny_world import PAIRS, Pair, make_world

ROWS = {"one": 1, "three": 3, "five": 5, "eight": 8}


class Odd(nn.Module):
    """Parameters of every number of rows, a scalar and both kinds of buffers."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, rows in ROWS.items():
            self.register_parameter(name, nn.Parameter(torch.empty(rows, 2, 3)))
        self.scalar = nn.Parameter(torch.empty(()))
        self.bias = nn.Parameter(torch.empty(7, dtype=torch.bfloat16))
        self.register_buffer("count", torch.empty(2, dtype=torch.int64))
        self.register_buffer("table", torch.arange(4.0, device="cpu"), persistent=False)


def empty() -> Odd:
    with torch.device("meta"):
        return Odd()


def stored() -> dict[str, Tensor]:
    """What a file has for `Odd`: float16 where the model has float32."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(rows, 2, 3).half() for name, rows in ROWS.items()}
    bias, scalar = torch.randn(7), torch.tensor(2.5)
    return {**tensors, "scalar": scalar, "bias": bias, "count": torch.tensor([3, 1 << 40])}


def write(path: Path, files: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write a transformer, with an index if it has several files."""
    folder = path / "transformer"
    folder.mkdir(parents=True)
    for file, tensors in files.items():
        save_file(dict(tensors), folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        named = {name: file for file, tensors in files.items() for name in tensors}
        (folder / INDEX).write_text(json.dumps({"weight_map": named}))
    return folder


def test_rows_are_read_as_they_are_and_nothing_else(tmp_path: Path) -> None:
    tensor = torch.arange(60, dtype=torch.bfloat16).view(5, 4, 3)
    write(tmp_path, {NAME: {"a": torch.ones(3), "b": tensor}})
    files = WeightFiles(tmp_path, folder="transformer")
    before = files.bytes_read
    for rows in (slice(0, 5), slice(1, 3), slice(4, 5), slice(2, 2), slice(5, 5)):
        found = files.read("b", rows)
        assert found.dtype == torch.bfloat16 and torch.equal(found, tensor[rows])
    assert files.bytes_read - before == 8 * 12 * 2
    assert torch.equal(files.read("b"), tensor)


def test_every_dtype_is_read_as_safetensors_wrote_it(tmp_path: Path) -> None:
    tensors = {name: torch.tensor([[0, 1], [1, 0]]).to(dtype) for name, dtype in DTYPES.items()}
    tensors["scalar"], tensors["nothing"] = torch.tensor(3.0), torch.empty(0, 4)
    write(tmp_path, {NAME: tensors})
    files = WeightFiles(tmp_path, folder="transformer")
    for name, tensor in tensors.items():
        found = files.read(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape, name
        assert torch.equal(found.float(), tensor.float()), name


def check_odd(model: Odd) -> None:
    expected = stored()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert torch.equal(model.table, torch.arange(4.0)), "a computed table is kept"


@pytest.mark.parametrize("read_bytes", [1, 30, 2**24])
def test_pieces_of_any_size_make_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    monkeypatch.setattr(weights, "READ_BYTES", read_bytes)
    write(tmp_path, {NAME: stored()})
    model = empty()
    materialise(model, "cpu")
    load_weights(model, WeightFiles(tmp_path, folder="transformer"))
    check_odd(model)


@pytest.mark.parametrize("sizes", [(1, 4), (2, 2), (4, 1)])
def test_each_process_reads_the_rows_it_keeps(tmp_path: Path, sizes: tuple[int, int]) -> None:
    """More processes than rows, uneven rows, copies, and parameters beside the sharded ones."""
    tensors = stored()
    write(tmp_path, {"a": {n: tensors.pop(n) for n in ("one", "bias")}, "b": tensors})

    def check(rank: int) -> None:
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
        model: Any = empty()
        fully_shard(model, mesh=mesh, ignored_params={model.scalar, model.eight})
        materialise(model, "cpu")
        files = WeightFiles(tmp_path, folder="transformer")
        headers = files.bytes_read
        load_weights(model, files)
        share, expected = 8 * 6 * 2 + 4 + 2 * 8, stored()  # of those that are not sharded
        for name, tensor in model.state_dict().items():
            whole = expected[name].to(tensor.dtype)
            assert isinstance(tensor, DTensor) == (name not in ("scalar", "eight", "count")), name
            if not isinstance(tensor, DTensor):
                assert torch.equal(tensor, whole), name
                continue
            local, first = local_rows(tensor)
            assert torch.equal(local, whole[first : first + len(local)]), name
            assert torch.equal(tensor.full_tensor(), whole), name
            share += local.numel() * expected[name].dtype.itemsize
        assert files.bytes_read - headers == share
        assert torch.equal(model.table, torch.arange(4.0))

    in_ranks(4, check)


def family_of(root: Path, pair: Pair, model: Path) -> Family:
    return find_family(Recipe.load(make_world(root, clips=0, model=model, pair=pair).recipe, ()))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_model_that_is_filled_equals_the_loaded_one(
    tmp_path: Path, pair: Pair, dtype: str
) -> None:
    path = tmp_path / "model"
    write_tiny(path, family=pair.family, task=pair.task)
    family = family_of(tmp_path, pair, path)
    for folder in sorted(part.name for part in path.glob("transformer*")):
        loaded: Any = family.load_transformer(path, folder=folder, dtype=dtype)
        filled: Any = family.empty_transformer(path, folder=folder, dtype=dtype)
        assert all(parameter.is_meta for parameter in filled.parameters())
        materialise(filled, "cpu")
        load_weights(filled, WeightFiles(path, folder=folder))
        assert loaded.training == filled.training
        for every in ("named_parameters", "named_buffers"):
            expected, found = (list(getattr(model, every)()) for model in (loaded, filled))
            assert [name for name, _ in expected] == [name for name, _ in found]
            for (name, left), (_, right) in zip(expected, found, strict=True):
                assert left.dtype == right.dtype and torch.equal(left, right), name


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_an_empty_model_that_is_filled_computes_the_same(tmp_path: Path, pair: Pair) -> None:
    path = tmp_path / "model"
    write_tiny(path, family=pair.family, task=pair.task)
    family = family_of(tmp_path, pair, path)
    filled: Any = family.empty_transformer(path, folder="transformer")
    materialise(filled, "cpu")
    load_weights(filled, WeightFiles(path, folder="transformer"))
    torch.manual_seed(0)
    config = filled.config
    given = {
        "hidden_states": torch.randn(1, config["in_channels"], 3, 4, 6),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 32),
    }
    if pair.family == "hunyuan-video":
        given["encoder_attention_mask"] = torch.ones(1, 8)
        given["pooled_projections"] = torch.randn(1, config["pooled_projection_dim"])
        given["guidance"] = torch.tensor([6000.0])
    elif config["image_dim"] is not None:
        given["encoder_hidden_states_image"] = torch.randn(1, 257, config["image_dim"])
    loaded: Any = family.load_transformer(path, folder="transformer")
    for parameter in loaded.parameters():
        # Kernels round by the place in memory, which diffusers leaves to the file it maps.
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        assert torch.equal(loaded(**given).sample, filled(**given).sample)


def test_tensors_in_the_files_only_are_said_unless_diffusers_knows_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The published Wan2.1 I2V has norm_added_q, which no class uses."""
    pair = Pair(task="i2v")
    write_tiny(tmp_path / "model", family=pair.family, task=pair.task)
    family = family_of(tmp_path, pair, tmp_path / "model")
    file = tmp_path / "model/transformer" / NAME
    known = {"blocks.0.attn2.norm_added_q.weight": torch.ones(128)}
    model: Any = family.empty_transformer(tmp_path / "model", folder="transformer")
    materialise(model, "cpu")
    others = {f"blocks.{index}.adapter": torch.ones(1) for index in range(5)}
    for more, words in ((known, ()), (known | others, ("5 tensors", "blocks.0.adapter", "..."))):
        save_file(load_file(file) | more, file, metadata={"format": "pt"})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_weights(model, WeightFiles(tmp_path / "model", folder="transformer"))
        assert all(word in caplog.text for word in words) and bool(caplog.text) == bool(words)
        assert "norm_added_q" not in caplog.text


def test_missing_tensors_and_other_shapes_are_refused(tmp_path: Path) -> None:
    model = empty()
    materialise(model, "cpu")
    lacking = {name: tensor for name, tensor in stored().items() if name not in ("five", "bias")}
    write(tmp_path / "lacking", {NAME: lacking})
    with pytest.raises(UserError, match=r"weights in transformer lack 2 tensors.*\(bias, \.\.\.\)"):
        load_weights(model, WeightFiles(tmp_path / "lacking", folder="transformer"))
    write(tmp_path / "other", {NAME: stored() | {"five": torch.ones(4, 2, 3)}})
    with pytest.raises(UserError, match=r"five has shape \(4, 2, 3\) in .*, \(5, 2, 3\) by config"):
        load_weights(model, WeightFiles(tmp_path / "other", folder="transformer"))


def header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of a file, its length and nothing else."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def shift(by: int) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        last = max(table, key=lambda name: table[name].get("data_offsets", [0])[0])
        table[last]["data_offsets"] = [place + by for place in table[last]["data_offsets"]]

    return change


def entry(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda table: table["one"].__setitem__(key, value)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda file: file.unlink(), f"it has no {NAME}"),
    "empty": (lambda file: file.write_bytes(b""), "is cut"),
    "cut in the header": (lambda file: file.write_bytes(file.read_bytes()[:30]), "is cut"),
    "cut in the numbers": (
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        r"has \d+ bytes, its header says \d+",
    ),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"\0"), r"its header says \d+"),
    "no safetensors file": (lambda file: file.write_bytes(b"<html>" * 99), "no safetensors file"),
    "no JSON": (lambda file: file.write_bytes(b"\2" + b"\0" * 7 + b"[}"), "header .* is damaged"),
    "no table": (lambda file: file.write_bytes(b"\2" + b"\0" * 7 + b"[]"), "header .* is damaged"),
    "an overlap": (lambda file: header(file, shift(-2)), "header .* is damaged at"),
    "a hole": (lambda file: header(file, shift(2)), "header .* is damaged at"),
    "out of the file": (lambda file: header(file, shift(2**40)), "header .* is damaged at"),
    "before the file": (lambda file: header(file, shift(-(2**20))), "negative"),
    "another shape": (lambda file: header(file, entry("shape", [1, 2, 4])), r"12 bytes for shape"),
    "no numbers": (lambda file: header(file, entry("shape", [1, 2, "3"])), "no numbers"),
    "an unknown dtype": (lambda file: header(file, entry("dtype", "F4")), "dtype F4"),
    "no dtype": (lambda file: header(file, lambda t: t["one"].pop("dtype")), "header .* damaged"),
}


@pytest.mark.parametrize("what", WRONG)
def test_files_that_are_wrong_are_refused_by_name(tmp_path: Path, what: str) -> None:
    damage, words = WRONG[what]
    damage(write(tmp_path, {NAME: stored()}) / NAME)
    with pytest.raises(UserError, match=words) as refusal:
        WeightFiles(tmp_path, folder="transformer")
    assert f"model.path={tmp_path}" in str(refusal.value) and NAME in str(refusal.value)
    assert "fetch it again" in str(refusal.value)


INDEXES: dict[str, tuple[object, str]] = {
    "no table": ([], "is damaged"),
    "no map": ({"weight_map": 3}, "is damaged"),
    "a file elsewhere": ({"weight_map": {"one": "../a"}}, "is damaged"),
    "a file that is not there": ({"weight_map": {"one": "c"}}, "No such file.*transformer/c"),
    "a tensor that is not there": ({"weight_map": {"four": "a"}}, "four is in a, which has it not"),
}


@pytest.mark.parametrize("what", INDEXES)
def test_an_index_that_is_wrong_is_refused(tmp_path: Path, what: str) -> None:
    index, words = INDEXES[what]
    folder = write(tmp_path, {"a": {"one": torch.ones(1)}, "b": {"two": torch.ones(1)}})
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=words):
        WeightFiles(tmp_path, folder="transformer")


def test_an_index_decides_between_files_that_have_the_same_tensor(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a": {"one": torch.ones(1)}, "b": {"one": torch.zeros(1)}})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"one": "a"}}))
    assert WeightFiles(tmp_path, folder="transformer").read("one").item() == 1


def test_a_file_that_is_cut_later_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, {NAME: stored()})
    files = WeightFiles(tmp_path, folder="transformer")
    with open(folder / NAME, "r+b") as file:
        file.truncate(files.tensors["one"].offset)
    with pytest.raises(UserError, match=f"{NAME} is cut"):
        for name in files.tensors:
            files.read(name)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="cannot be loaded"):
        files.read("one")
