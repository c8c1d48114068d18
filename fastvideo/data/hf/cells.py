# SPDX-License-Identifier: Apache-2.0
"""Values of Arrow's columns: captions as plain texts, and where the video of a row is."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fastvideo.errors import UserError


@dataclass(frozen=True)
class VideoCell:
    """What a row says of its video."""

    path: Any
    """A file, or the name of one that is embedded; None if it does not say."""
    embedded: bool
    """Whether the row holds the bytes."""


@dataclass(frozen=True)
class TableRow:
    """A row of a data file, without its video."""

    index: int
    """Position in the file, from 0."""
    video: VideoCell
    caption: Any
    """A text, a list of texts, None, or anything else where the form has no types."""


def holds_texts(kind: pa.DataType) -> bool:
    """Whether a column may hold captions: texts, lists of them, or nothing at all."""
    if _is_list(kind):
        kind = kind.value_type
    return _is_text(kind) or pa.types.is_null(kind)


def holds_videos(kind: pa.DataType) -> bool:
    """Whether a column may hold videos: bytes, paths, or structs of both."""
    if pa.types.is_struct(kind):
        return is_video_struct(kind)
    return _is_text(kind) or is_bytes(kind)


def is_video_struct(kind: pa.DataType) -> bool:
    """Whether a column is as `datasets` stores videos: a struct of ``bytes`` and ``path``."""
    if not pa.types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    bytes_are = "bytes" in fields and is_bytes(fields["bytes"])
    paths_are = "path" in fields and _is_text(fields["path"])
    return bytes_are or paths_are


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds bytes alone."""
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def texts(array: pa.Array) -> list[Any]:
    """Texts, or lists of texts, as Python has them; what is not UTF-8 becomes half characters."""
    if isinstance(array, pa.ChunkedArray):
        return [text for chunk in array.chunks for text in texts(chunk)]
    if pa.types.is_dictionary(array.type):
        return texts(array.dictionary_decode())
    if _is_list(array.type):
        return [texts(value.values) if value.is_valid else None for value in array]
    if not _is_text(array.type):
        return [None] * len(array)
    stored = array.cast(pa.large_binary()).to_pylist()
    return [None if value is None else str(value, "utf-8", "surrogateescape") for value in stored]


def video_cells(array: pa.Array) -> list[VideoCell]:
    """What each row says; bytes are not looked at, but must be in the column."""
    if is_bytes(array.type):
        return [VideoCell(None, value) for value in array.is_valid().to_pylist()]
    if not pa.types.is_struct(array.type):
        return [VideoCell(path, False) for path in texts(array)]
    empty = pa.nulls(len(array), pa.string())
    # Flattened: what a row without a struct has in its fields does not count.
    names = (field.name for field in array.type)
    fields = dict(zip(names, array.flatten(), strict=True))
    paths = texts(fields.get("path", empty))
    embedded = fields.get("bytes", empty).is_valid().to_pylist()
    return [VideoCell(*cell) for cell in zip(paths, embedded, strict=True)]


def embedded_bytes(array: pa.Array, row: int) -> bytes | None:
    """The bytes in a row of a column of videos."""
    values = array if is_bytes(array.type) else array.field("bytes")
    value: bytes | None = values[row].as_py()
    return value


@contextlib.contextmanager
def reading(file: str, *, form: str) -> Iterator[None]:
    """Turn what Arrow says of a damaged file into a ``UserError``; failures of the disk pass."""
    fix = "make or download it again"
    try:
        yield
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: is not a whole {form} file ({error}); {fix}") from error
    except OSError as error:
        # Damage found by Arrow has no number and no class of its own.
        if type(error) is not OSError or error.errno is not None:
            raise
        raise UserError(f"{file}: is damaged ({error}); {fix}") from error


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
