# SPDX-License-Identifier: Apache-2.0
"""The items of a Hugging Face data set: its rows, without their videos."""

import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvideo.config.source import HfSource
from fastvideo.data.footage import Origin, Stamp
from fastvideo.data.hf.cells import TableRow
from fastvideo.data.hf.columns import Chosen, Types, choose_columns
from fastvideo.data.hf.footage import DatasetFootage, Table, open_table
from fastvideo.data.hf.root import LocalRoot, Root, find_root
from fastvideo.data.hf.split import SplitFiles, find_files
from fastvideo.data.items import (
    Item,
    UnusableError,
    captions_of,
    clipped,
    is_unicode,
    relative_path,
    short,
)
from fastvideo.errors import UserError
from fastvideo.log import logger


def list_dataset(source: HfSource) -> tuple[list[Item], DatasetFootage]:
    """Return the rows of the split in order, and their clips; one that cannot be used says why.

    Raises:
        UserError: The data set is not there, or not as the recipe says.
        OSError: The disk or the network failed.
    """
    root = find_root(source)
    items: list[Item] = []
    seen: dict[str, int] = {}
    files = find_files(source, root)
    for table, row in _rows(source, root, files):
        item = _item(len(items), row, table, seen=seen)
        if item.origin is not None and item.origin.row is None:
            seen[item.origin.file] = item.index
        items.append(item)
    if not items:
        raise UserError(f"source.split={source.split}: this split of {source.path} has no rows")
    _warn_of_others(files, items)
    return items, DatasetFootage(source, root)


def _warn_of_others(files: SplitFiles, items: Sequence[Item]) -> None:
    named = {item.id for item in items}
    others = [video for video in files.videos if video not in named]
    if others:
        logger.warning(
            "%d videos are not used, as no metadata names them: %s%s",
            len(others),
            ", ".join(others[:3]),
            ", ..." if len(others) > 3 else "",
        )


@dataclass(frozen=True)
class _Table:
    """A data file whose rows are listed."""

    root: Root
    file: str
    stamp: Stamp
    columns: Chosen
    folders: tuple[str, ...]
    """Where files that it names may be, relative to the root."""


def _rows(source: HfSource, root: Root, files: SplitFiles) -> Iterator[tuple[_Table, TableRow]]:
    for file in files.tables:
        opened = open_table(root, file)
        columns = choose_columns(
            source, _types(opened, root), file=f"{root.address}/{file}", is_folder=files.is_folder
        )
        beside = posixpath.dirname(file)
        folders = (beside,) if files.is_folder or not beside else (beside, "")
        table = _Table(root, file, root.stamp(file), columns, folders)
        for row in opened.rows(video=columns.video, caption=columns.caption):
            yield table, row


def _types(table: Table, root: Root) -> Types:
    try:
        return table.columns()
    except FileNotFoundError:
        raise UserError(
            f"{root.address}/{table.file}: is not there, though the data set lists it; copy or "
            "download the data set again"
        ) from None


def _item(index: int, row: TableRow, table: _Table, *, seen: dict[str, int]) -> Item:
    path, captions = row.video.path, tuple[str, ...]()
    name = path if isinstance(path, str) and is_unicode(path) else ""
    if name and not row.video.embedded:
        name = posixpath.normpath(posixpath.join(table.folders[0], name))
    try:
        captions = captions_of(row.caption, key=table.columns.caption)
        if row.video.embedded:
            origin, stamp = Origin(table.file, row.index), table.stamp
        else:
            origin, stamp = _locate(row, table)
            name = origin.file
            if origin.file in seen:
                detail = f"{short(path)} is the file of item {seen[origin.file]}"
                raise UnusableError("filtered", "duplicate_path", detail)
        if not captions:
            detail = f"{table.columns.caption} is {short(row.caption)}"
            raise UnusableError("filtered", "no_caption", detail)
    except UnusableError as problem:
        name = name or f"{table.file}#{row.index}"
        return Item(index, name, None, (0, 0), captions, None, problem.args)
    return Item(index, name, origin, stamp, captions, None, None)


def _locate(row: TableRow, table: _Table) -> tuple[Origin, Stamp]:
    """The file that a row names: beside the data file, or below the folder of the data set."""
    path, key = row.video.path, table.columns.video
    if path is None or path == "":
        detail = f"{key} of row {row.index} of {table.file} holds no bytes and names no file"
        raise UnusableError("failed", "no_video", detail)
    folders = table.folders
    if inside := _inside(table.root, path):
        path, folders = inside, ("",)
    problems = []
    for folder in folders:
        try:
            file = relative_path(path, key=key, folder=folder, root=clipped(table.root.address))
            return Origin(file), table.root.stamp(file)
        except UnusableError as problem:
            problems.append(problem)
    raise problems[0]


def _inside(root: Root, path: object) -> str | None:
    """An absolute path below the folder of the data set, relative to it."""
    if not isinstance(root, LocalRoot) or not isinstance(path, str) or not os.path.isabs(path):
        return None
    file = Path(os.path.normpath(path))
    return root.relative(str(file)) if file.is_relative_to(root.folder) else None
