# SPDX-License-Identifier: Apache-2.0
"""Weights of a model folder read in pieces: each process reads what it keeps and no byte more.

A safetensors file is the length of its header (8 bytes), the header (JSON: dtype, shape and byte
range of each tensor) and the numbers, row by row. So rows of a tensor are one run of bytes. Files
are read, not mapped: pages of a map would count as memory of the process.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from fastvideo.log import logger
from fastvideo.models.folder import loading
from fastvideo.models.parts import refuse_missing

NAME = "diffusion_pytorch_model.safetensors"
INDEX = f"{NAME}.index.json"
"""Of a model in several files: where each tensor is."""
READ_BYTES = 16 * 2**20
"""The most that is read at once: what a process needs on top of the weights that it keeps."""
MAX_HEADER_BYTES = 100_000_000
"""Of the format itself."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredWeight:
    """Where a tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def bytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFiles:
    """The safetensors files of a transformer: one, or several with an index.

    ``tensors`` maps names to places; ``bytes_read`` counts every byte that was read of the files,
    headers included.
    """

    def __init__(self, path: Path, *, folder: str) -> None:
        """Read the headers of the files in ``folder`` of the model at ``path``.

        Raises:
            UserError: A file is missing, cut, or no safetensors file, or the index is not theirs.
        """
        self.path, self.folder, self.bytes_read = path, folder, 0
        with loading(path, folder):
            self.tensors = self._find()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read a tensor as it is stored, or the rows ``start:stop`` of its first dimension.

        Raises:
            UserError: The file has changed since its header was read.
        """
        stored = self.tensors[name]
        shape, offset = stored.shape, stored.offset
        if rows is not None:
            row = math.prod(shape[1:]) * stored.dtype.itemsize
            assert 0 <= rows.start <= rows.stop <= shape[0] and rows.step is None
            shape, offset = (rows.stop - rows.start, *shape[1:]), offset + rows.start * row
        data = torch.empty(math.prod(shape) * stored.dtype.itemsize, dtype=torch.uint8)
        with loading(self.path, self.folder), open(stored.file, "rb", buffering=0) as stream:
            stream.seek(offset)
            self._fill(stream, data.numpy().data)
        return data.view(stored.dtype).view(shape)

    def _find(self) -> dict[str, StoredWeight]:
        directory = self.path / self.folder
        index = directory / INDEX
        if not index.is_file():
            if not (directory / NAME).is_file():
                raise ValueError(f"it has no {NAME}, the only format read here")
            return self._header(directory / NAME)
        named = _weight_map(index)
        headers = {file: self._header(directory / file) for file in sorted(set(named.values()))}
        for name, file in named.items():
            if name not in headers[file]:
                raise ValueError(f"{index.name} says that {name} is in {file}, which has it not")
        return {name: headers[file][name] for name, file in named.items()}

    def _header(self, file: Path) -> dict[str, StoredWeight]:
        with open(file, "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < 8:
                raise ValueError(f"{file.name} is cut")
            length = int.from_bytes(self._fill(stream, memoryview(bytearray(8))), "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"{file.name} is cut, or no safetensors file")
            text = self._fill(stream, memoryview(bytearray(length)))
        return _places(file, bytes(text), size=size)

    def _fill(self, stream: BinaryIO, view: memoryview) -> memoryview:
        done = 0
        while done < len(view):
            count = stream.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise ValueError(f"{Path(stream.name).name} is cut")
            done += count
        self.bytes_read += done
        return view


def materialise(model: nn.Module, device: torch.device | str) -> None:
    """Give what is on the meta device memory on ``device``, and bring there what has numbers.

    Unlike ``to_empty`` this keeps tables that are computed rather than loaded. Parameters become
    new objects: optimizers are made after it.
    """

    def bring(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    model._apply(bring)


Names = Callable[[Iterable[str]], Mapping[str, str]]
"""Names of a model's tensors to those in its files."""


def same_names(names: Iterable[str]) -> dict[str, str]:
    """Every tensor is in the files, by its own name."""
    return {name: name for name in names}


@torch.no_grad()
def load_weights(model: nn.Module, files: WeightFiles, *, names: Names = same_names) -> None:
    """Fill parameters and persistent buffers, sharded ones with the rows that this process keeps.

    Args:
        model: Of plain tensors and of DTensors that are replicated or sharded by their first
            dimension, as ``fully_shard`` makes them; they have memory, see `materialise`.
        files: Read for exactly these rows; numbers are converted to the model's dtypes.
        names: Those it leaves out are not in the files and keep what they have.

    Raises:
        UserError: The files lack tensors, or have them with other shapes.
    """
    tensors = model.state_dict()
    wanted = {file_name: tensors[name] for name, file_name in names(tensors).items()}
    refuse_missing(wanted.keys() - files.tensors.keys(), files.path, files.folder)
    with loading(files.path, files.folder):
        for name, tensor in wanted.items():
            _check_shape(name, tuple(tensor.shape), files.tensors[name])
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    _warn_of_others(files, known=wanted.keys(), ignored=ignored)
    for name in sorted(wanted, key=lambda name: _order(files.tensors[name])):
        _load_tensor(wanted[name], name, files)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The part of a tensor that this process keeps, and the row of the whole it begins with.

    Rows are dealt as ``torch.chunk`` does: ``ceil(rows / processes)`` each, the last ones may get
    fewer or none.
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0
    first, count = 0, tensor.shape[0]
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        assert isinstance(placement, Shard) and placement.dim == 0, placement
        each = math.ceil(count / tensor.device_mesh.size(dim))
        start = min(tensor.device_mesh.get_local_rank(dim) * each, count)
        first, count = first + start, min(each, count - start)
    local: Tensor = tensor.to_local()
    assert len(local) == count, f"{len(local)} rows are here, by the placements {count}"
    return local, first


def _load_tensor(tensor: Tensor, name: str, files: WeightFiles) -> None:
    local, first = local_rows(tensor)
    if local.ndim == 0:
        local.copy_(files.read(name))
        return
    stored = files.tensors[name]
    row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    each = max(1, READ_BYTES // max(1, row_bytes))
    for part in local.split(each):
        part.copy_(files.read(name, slice(first, first + len(part))))
        first += len(part)


def _check_shape(name: str, wanted: tuple[int, ...], stored: StoredWeight) -> None:
    if stored.shape != wanted:
        raise ValueError(
            f"{name} has shape {stored.shape} in {stored.file.name}, {wanted} by config.json"
        )


def _warn_of_others(files: WeightFiles, *, known: Iterable[str], ignored: Iterable[str]) -> None:
    others = sorted(
        name
        for name in files.tensors.keys() - known
        if not any(re.search(pattern, name) for pattern in ignored)
    )
    if others:
        logger.warning(
            "%s: %d tensors in %s belong to no part of the model and stay unread (%s)",
            files.path,
            len(others),
            files.folder,
            ", ".join([*others[:3], *(["..."] if len(others) > 3 else [])]),
        )


def _order(stored: StoredWeight) -> tuple[Path, int]:
    return stored.file, stored.offset


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor by its index; a ``ValueError`` for anything else."""
    try:
        named: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all(Path(file).name == file for file in named.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    if not plain:
        raise ValueError(f"{index.name} is damaged")
    return named


def _places(file: Path, text: bytes, *, size: int) -> dict[str, StoredWeight]:
    """The tensors of a header; a ``ValueError`` unless they fill the file without overlap."""
    start = 8 + len(text)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        found = {name: _place(file, entry, start=start) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the header of {file.name} is damaged ({error})") from None
    end = start
    for name, stored in sorted(found.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if stored.offset != end:
            raise ValueError(f"the header of {file.name} is damaged at {name}")
        end += stored.bytes
    if end != size:
        raise ValueError(f"{file.name} has {size} bytes, its header says {end}")
    return found


def _place(file: Path, entry: Mapping[str, Any], *, start: int) -> StoredWeight:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']}")
    first, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (first, end, *shape)):
        raise ValueError("negative or no numbers")
    stored = StoredWeight(file, DTYPES[entry["dtype"]], shape, start + first)
    if end - first != stored.bytes:
        raise ValueError(f"{end - first} bytes for shape {shape}")
    return stored
