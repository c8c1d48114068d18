# SPDX-License-Identifier: Apache-2.0
"""WebDataset: a tar file in which the members ``KEY.mp4``, ``KEY.txt``, ``KEY.json`` are a row."""

import contextlib
import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

from fastvideo.data.hf.cells import TableRow, VideoCell
from fastvideo.data.hf.root import Root
from fastvideo.errors import UserError

_Sample = dict[str, tarfile.TarInfo]
"""Members of a row by what follows their key."""

_END_BYTES = 1 << 16


class TarTable:
    """A tar file; of its videos only the headers are read until they are needed."""

    def __init__(self, root: Root, file: str) -> None:
        """Name it; it is opened when it is read."""
        self.file = file
        self._root = root

    def columns(self) -> dict[str, None]:
        """Suffixes of the members; of a JSON object the keys as well, as ``json.KEY``."""
        with self._opened() as (tar, samples):
            names = dict.fromkeys(suffix for sample in samples for suffix in sample)
            values = (_value(tar, sample, "json") for sample in samples if "json" in sample)
            objects = (value for value in values if isinstance(value, dict))
            return names | dict.fromkeys(f"json.{key}" for value in objects for key in value)

    def rows(self, *, video: str, caption: str) -> Iterator[TableRow]:
        """Yield every row."""
        with self._opened() as (tar, samples):
            for index, sample in enumerate(samples):
                member = sample.get(video)
                cell = VideoCell(member.name if member else None, member is not None)
                yield TableRow(index, cell, _value(tar, sample, caption))

    def contents(self, video: str, rows: Sequence[int]) -> Iterator[bytes | None]:
        """Yield the videos of ``rows``; None where a row has none, or is gone."""
        with self._opened() as (tar, samples):
            for row in rows:
                yield _read(tar, samples[row], video) if row < len(samples) else None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[tarfile.TarFile, list[_Sample]]]:
        try:
            with (
                self._root.open(self.file, sparse=True) as file,
                tarfile.open(fileobj=file, mode="r:") as tar,
            ):
                yield tar, _samples(tar)
        except tarfile.TarError as error:
            raise UserError(
                f"{self._root.address}/{self.file}: is not a whole tar file ({error}); make or "
                "download it again"
            ) from error


def _samples(tar: tarfile.TarFile) -> list[_Sample]:
    """Members by row; one whose name comes again begins a row of its own."""
    samples: list[_Sample] = []
    latest: dict[str, _Sample] = {}
    for member in tar:
        folder, name = posixpath.split(member.name)
        stem, _, suffix = name.partition(".")
        key, suffix = posixpath.join(folder, stem), suffix.lower()
        if not member.isfile() or not stem:
            continue
        if key not in latest or suffix in latest[key]:
            latest[key] = {}
            samples.append(latest[key])
        latest[key][suffix] = member
    _require_end(tar)
    return samples


def _require_end(tar: tarfile.TarFile) -> None:
    """Only zeros may follow the last member: ``tarfile`` takes damage for the end as well."""
    file = tar.fileobj
    assert file is not None
    file.seek(tar.offset)
    first = file.read(tarfile.BLOCKSIZE)
    rest = iter(lambda: file.read(_END_BYTES), b"")
    is_end = len(first) == tarfile.BLOCKSIZE and not first.strip(b"\0")
    if not is_end or any(data.strip(b"\0") for data in rest):
        raise tarfile.ReadError(f"neither a member nor the end at byte {tar.offset}")


def _value(tar: tarfile.TarFile, sample: _Sample, column: str) -> Any:
    """A text, or what a JSON member or one of its keys holds; what cannot be read stays bytes."""
    suffix, _, key = column.partition(".")
    suffix = column if column in sample else suffix
    data = _read(tar, sample, suffix)
    if data is None or suffix.rpartition(".")[2] != "json":
        return None if data is None else str(data, "utf-8", "surrogateescape")
    try:
        value = json.loads(data)
    except ValueError:
        return data
    return value.get(key) if isinstance(value, dict) and suffix != column else value


def _read(tar: tarfile.TarFile, sample: _Sample, suffix: str) -> bytes | None:
    member = sample.get(suffix)
    file = tar.extractfile(member) if member else None
    return file.read() if file else None
