# SPDX-License-Identifier: Apache-2.0
"""Where the files of a Hugging Face data set are: a folder here, or a repository on the Hub."""

import contextlib
import functools
import io
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

from fastvideo import hashing
from fastvideo.config.source import HfSource
from fastvideo.data.footage import Content, Stamp
from fastvideo.data.items import UnusableError, clipped, stamp_of_file
from fastvideo.errors import UserError


class Root(Protocol):
    """Files by their path relative to the data set's folder."""

    @property
    def address(self) -> str:
        """What ``datasets`` takes as a path."""
        ...

    @property
    def revision(self) -> str | None:
        """What ``datasets`` takes as a revision."""
        ...

    def relative(self, address: str) -> str:
        """The path of a file that ``datasets`` names, normalised.

        Raises:
            UserError: It is elsewhere.
        """
        ...

    def stamp(self, file: str) -> Stamp:
        """Size and time of change.

        Raises:
            UnusableError: ``missing_file`` or ``not_a_file``.
            OSError: The disk or the network failed.
        """
        ...

    def open(self, file: str, *, sparse: bool = False) -> IO[bytes]:
        """Open for reading, seekable; ``sparse`` is for little pieces that are far apart."""
        ...

    def content(self, file: str) -> Content:
        """What a decoder opens."""
        ...


def find_root(source: HfSource) -> Root:
    """Find the data set; one on the Hub is downloaded to the cache unless it is streamed.

    Raises:
        UserError: There is none, it cannot be fetched, or the recipe asks for what it cannot have.
    """
    folder = Path(source.path).expanduser()
    if folder.is_dir():
        if source.revision is not None:
            raise UserError(
                f"source.revision={source.revision}: {folder} is a folder, which has no revisions; "
                "remove the key"
            )
        return LocalRoot(folder.resolve())
    if folder.exists():
        raise UserError(f"source.path={source.path}: is a file; write the folder it is in")
    if not _is_id(source.path):
        raise UserError(
            f"source.path={source.path}: there is no such folder, and it is no id of a data set on "
            "the Hub, which is written owner/name"
        )
    from huggingface_hub import is_offline_mode

    if source.streaming and not is_offline_mode():
        return _resolve(source)
    return LocalRoot(_snapshot(source))


def _is_id(path: str) -> bool:
    """Whether the Hub could have a data set of that name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return path.count("/") == 1


def _elsewhere(root: Root, address: str) -> UserError:
    return UserError(
        f"{root.address}: its README.md or state.json names {clipped(address)} as a data file, "
        "which is elsewhere; link or copy it into the data set"
    )


# ---------------------------------------------------------------- here


@dataclass(frozen=True)
class LocalRoot:
    """A folder."""

    folder: Path
    """Absolute, links followed."""

    @property
    def address(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def revision(self) -> None:
        """A folder has none."""
        return None

    def relative(self, address: str) -> str:
        """Files come as absolute paths."""
        file = Path(os.path.normpath(address))
        if not file.is_relative_to(self.folder):
            raise _elsewhere(self, address)
        return file.relative_to(self.folder).as_posix()

    def stamp(self, file: str) -> Stamp:
        """Size and time of change."""
        return stamp_of_file(self.folder / file)

    def open(self, file: str, *, sparse: bool = False) -> IO[bytes]:
        """Open for reading."""
        return open(self.folder / file, "rb")

    def content(self, file: str) -> Content:
        """The file, which a worker opens."""
        return self.folder / file


def _snapshot(source: HfSource) -> Path:
    """The data set's folder in the cache of the Hub, complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with _network_failures():
            folder = snapshot_download(source.path, repo_type="dataset", revision=source.revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise UserError(_not_found(source, error)) from None
    return Path(folder).resolve()


def _not_found(source: HfSource, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        IncompleteSnapshotError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    revision = source.revision or constants.DEFAULT_REVISION
    if isinstance(error, RevisionNotFoundError):
        return f"source.revision={revision}: the data set {source.path} on the Hub has none"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"source.path={source.path}: is no folder here, and no data set on the Hub that you "
            "may read; correct it, or log in with `hf auth login`"
        )
    cache = f"{constants.HF_HUB_CACHE}/datasets--{source.path.replace('/', '--')}"
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    if constants.is_offline_mode():
        reason = "HF_HUB_OFFLINE is set, so the Hub was not asked"
    elif not isinstance(error, HfHubHTTPError):
        reason = f"the Hub was not reached: {reason}"
    kept = "an incomplete copy" if isinstance(error, IncompleteSnapshotError) else "no copy"
    command = f"hf download --repo-type dataset {source.path} --revision {revision}"
    return (
        f"source.path={source.path}: is no folder here; looked for revision {revision} of that "
        f"data set in {cache}, which holds {kept} of it ({reason}). Where there is a network, "
        f"fetch it with `{command}`, with HF_HOME as it is here"
    )


# ---------------------------------------------------------------- on the Hub


_AHEAD_BYTES = 5 << 20
_SPARSE_BYTES = 1 << 16


@dataclass(frozen=True)
class HubRoot:
    """A repository on the Hub at one commit."""

    repository: str
    commit: str

    @property
    def address(self) -> str:
        """The id of the data set."""
        return self.repository

    @property
    def revision(self) -> str:
        """The commit."""
        return self.commit

    def relative(self, address: str) -> str:
        """Files come as ``hf://datasets/<id>@<commit>/<path>``."""
        folder, file = f"hf://{self.prefix}/", ""
        if address.startswith(folder):
            file = posixpath.normpath(address.removeprefix(folder))
        if not file or file.startswith(("../", "/")):
            raise _elsewhere(self, address)
        return file

    def stamp(self, file: str) -> Stamp:
        """Size, and a number that stands for the content."""
        entry = _entries(self, posixpath.dirname(file)).get(f"{self.prefix}/{file}")
        if entry is None:
            detail = f"{clipped(file)}: is not in the repository at {self.commit}"
            raise UnusableError("failed", "missing_file", detail)
        if entry["type"] != "file":
            raise UnusableError("failed", "not_a_file", f"{clipped(file)}: is a folder")
        return entry["size"], hashing.seed_of(entry["blob_id"])

    def open(self, file: str, *, sparse: bool = False) -> IO[bytes]:
        """Open for reading; what is asked for is fetched, and some bytes ahead of it."""
        ahead = _SPARSE_BYTES if sparse else _AHEAD_BYTES
        with _network_failures():
            opened = _files().open(f"{self.prefix}/{file}", "rb", block_size=ahead)
        return cast(IO[bytes], _Fetched(opened))

    def content(self, file: str) -> Content:
        """The content, fetched."""
        with self.open(file) as opened:
            return opened.read()

    @property
    def prefix(self) -> str:
        """What paths begin with in the Hub's file system."""
        return f"datasets/{self.repository}@{self.commit}"


class _Fetched(io.BufferedIOBase):
    """A file of the Hub whose failures are ``OSError``, like those of a disk."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        with _network_failures():
            data: bytes = self._opened.read(-1 if size is None else size)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return int(self._opened.seek(offset, whence))

    def tell(self) -> int:
        return int(self._opened.tell())

    def close(self) -> None:
        self._opened.close()
        super().close()


@contextlib.contextmanager
def _network_failures() -> Iterator[None]:
    """Make failures of the network ``OSError``, as only some of those of the Hub's client are."""
    from httpx2 import HTTPError

    try:
        yield
    except HTTPError as error:
        if isinstance(error, OSError):
            raise
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def _files() -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem()  # the same object each time


@functools.lru_cache(maxsize=64)
def _entries(root: HubRoot, folder: str) -> dict[str, dict[str, Any]]:
    """Entries of a folder by path; a commit never changes."""
    where = posixpath.join(root.prefix, folder).rstrip("/")
    try:
        with _network_failures():
            entries = _files().ls(where, detail=True)
    except FileNotFoundError:
        return {}
    return {entry["name"]: entry for entry in entries}


def _resolve(source: HfSource) -> HubRoot:
    from huggingface_hub import HfApi

    try:
        with _network_failures():
            found = HfApi().dataset_info(source.path, revision=source.revision)
    except OSError as error:
        raise UserError(_not_found(source, error)) from None
    assert found.sha is not None
    return HubRoot(source.path, found.sha)
