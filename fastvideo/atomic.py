# SPDX-License-Identifier: Apache-2.0
"""Writes that survive a kill at any moment, and the points where tests kill; stdlib only."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvideo.errors import UserError
from fastvideo.log import logger


def fault(point: str) -> None:
    """Die here if a crash test asks for it: ``FASTVIDEO_FAULT=point`` or ``point:2`` (2nd pass).

    ``FASTVIDEO_FAULT_LOG`` names a file that lists the points passed.
    """
    log = os.environ.get("FASTVIDEO_FAULT_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(point + "\n")
    wanted, _, count = os.environ.get("FASTVIDEO_FAULT", "").partition(":")
    if wanted == point:
        remaining = int(count or 1) - 1
        os.environ["FASTVIDEO_FAULT"] = f"{point}:{remaining}"
        if remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def replacing(path: Path, *, point: str, marker: Path | None = None) -> Iterator[Path]:
    """Yield a temporary name to write; then fsync, rename to ``path`` and fsync the folder.

    A kill at any moment leaves the old file or the new one, never a part.

    Args:
        path: The file.
        point: Names the fault points.
        marker: Says what the old file is; removed before the new one takes its place, so that it
            never vouches for the wrong one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        fault(f"{point}.write")
        sync(temporary)
        fault(f"{point}.fsync")
        if marker is not None and marker.exists():
            marker.unlink()
            fault(f"{point}.unmark")
        os.replace(temporary, path)
        fault(f"{point}.rename")
        sync(path.parent)
        fault(f"{point}.done")
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, *, point: str) -> None:
    """Replace the content of ``path`` at once."""
    with replacing(path, point=point) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any, *, point: str) -> None:
    """Replace ``path`` by ``value`` as JSON."""
    text = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    write_bytes(path, text.encode(), point=point)


def read_json(path: Path) -> Any:
    """Read JSON; None if the file is missing or not JSON, which is what an old kill leaves."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


@contextlib.contextmanager
def alone(lock: Path, *, busy: str) -> Iterator[None]:
    """Hold the lock file ``lock``; a ``UserError`` that says ``busy`` if another process does."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError as error:  # some cluster file systems have no locks
            logger.warning("%s: cannot be locked (%s)", lock, error.strerror)
        yield


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A hidden name beside ``path`` that tells which process writes it."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def sweep(path: Path) -> None:
    """Remove temporary files and folders that dead processes left beside ``path``."""
    for leftover in path.parent.glob(f".{_escape(path.name)}.*.tmp"):
        host, _, pid = leftover.name[len(path.name) + 2 : -len(".tmp")].rpartition("-")
        try:
            if host == socket.gethostname() and pid.isdigit():
                dead = not _alive(int(pid))
            else:
                dead = time.time() - leftover.stat().st_mtime > 24 * 3600
            if dead:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        except FileNotFoundError:
            continue


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # our own earlier attempt
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
