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
from typing import IO, Any

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
def alone(lock: Path, *, busy: str, wait_s: float = 0.0) -> Iterator[IO[str]]:
    """Hold the lock file ``lock``; yields the open file, which others can tell the holder by.

    Args:
        lock: The file.
        busy: The message if another process holds it.
        wait_s: How long to wait for what a dead process on this host left running; as long as the
            holder itself runs there, nothing is waited for.

    Raises:
        UserError: Another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a+", encoding="utf-8") as file:
        deadline_s = time.monotonic() + wait_s
        while not _locked(file, fcntl.LOCK_EX):
            if _holds(file) or time.monotonic() > deadline_s:
                raise UserError(busy)
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}\n")
        file.flush()
        try:
            yield file
        finally:
            file.truncate(0)


def share(file: IO[str], *, busy: str) -> None:
    """Let processes of our own hold the lock of ``alone`` too: nobody else gets it before they end.

    Raises:
        UserError: Another process got it at this moment.
    """
    if not _locked(file, fcntl.LOCK_SH):
        raise UserError(busy)


@contextlib.contextmanager
def together(lock: Path, *, wait_s: float) -> Iterator[bool]:
    """Hold a lock that is shared; yields False if somebody else holds it alone for ``wait_s``."""
    with open(lock, "a+", encoding="utf-8") as file:
        deadline_s = time.monotonic() + wait_s
        while not (held := _locked(file, fcntl.LOCK_SH)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        yield held


def _locked(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some cluster file systems have no locks
        logger.warning("%s: cannot be locked (%s)", file.name, error.strerror)
    return True


def _holds(file: IO[str]) -> bool:
    """Whether the process that wrote its name into a lock file runs on this host.

    Our own id there is that of a dead one: in containers each start may get the same.
    """
    file.seek(0)
    host, _, pid = file.read().strip().partition(" ")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    return int(pid) != os.getpid() and running(int(pid))


def running(pid: int) -> bool:
    """Whether a process of this host is there and not merely waiting to be reaped."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


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
