# SPDX-License-Identifier: Apache-2.0
"""Decoding in worker processes that runs ahead of the encoder, in order, with bounded memory.

Kept free of torch and pyarrow: a worker imports this module and nothing heavier than PyAV.
"""

import collections
import concurrent.futures
import functools
import multiprocessing
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastvideo.config.recipe import Clip
from fastvideo.data.decode import ClipFault, decode_clip, die_with_parent
from fastvideo.errors import UserError

Frames = npt.NDArray[np.uint8]
IO_TRIES = 3


@dataclass(frozen=True)
class VideoFile:
    """A file as the manifest saw it."""

    path: Path
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Decoded:
    """Frames (F, H, W, 3) of a clip, or the (reason, detail) of its fault."""

    frames: Frames | None
    fault: tuple[str, str] | None


def decode_ahead(files: Sequence[VideoFile], *, clip: Clip, workers: int) -> Generator[Decoded]:
    """Yield a result per file, in order; at most ``2 * workers`` are in memory at a time.

    Raises:
        UserError: A file is not the one the manifest was planned from.
        OSError: It could not be read, also when tried again; the clip is not to blame.
    """
    decode = functools.partial(_decode, clip=clip)
    if workers == 0:
        yield from map(decode, files)
        return
    # spawn: a forked child of a process that uses threads or CUDA may hang
    pool = concurrent.futures.ProcessPoolExecutor(
        max(1, min(workers, len(files))),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=die_with_parent,
    )
    upcoming = iter(files)
    pending: collections.deque[tuple[VideoFile, concurrent.futures.Future[Decoded]]]
    pending = collections.deque()
    try:
        while True:
            while len(pending) < 2 * workers and (file := next(upcoming, None)) is not None:
                pending.append((file, pool.submit(decode, file)))
            if not pending:
                return
            suspects = [file for file, _ in pending][:workers]
            yield _result(pending.popleft()[1], suspects=suspects)
    finally:
        pool.shutdown(cancel_futures=True)


def _result(
    future: concurrent.futures.Future[Decoded], *, suspects: Sequence[VideoFile]
) -> Decoded:
    try:
        return future.result()
    except concurrent.futures.BrokenExecutor as error:
        names = ", ".join(str(file.path) for file in suspects)
        raise RuntimeError(
            f"a decoding process died, of a crash or for lack of memory, on one of: {names}"
        ) from error


def _decode(file: VideoFile, *, clip: Clip) -> Decoded:
    for attempt in range(1, IO_TRIES + 1):
        try:
            return _decode_once(file, clip=clip)
        except OSError:
            if attempt == IO_TRIES:
                raise
            time.sleep(attempt)
    raise AssertionError


def _decode_once(file: VideoFile, *, clip: Clip) -> Decoded:
    try:
        status = file.path.stat()
    except FileNotFoundError:
        raise UserError(f"{file.path}: is gone since the manifest was planned") from None
    if (status.st_size, status.st_mtime_ns) != (file.bytes, file.mtime_ns):
        raise UserError(f"{file.path}: changed since the manifest was planned; preprocess again")
    try:
        frames = decode_clip(
            file.path,
            num_frames=clip.num_frames,
            height=clip.height,
            width=clip.width,
            fps=clip.fps,
        )
    except ClipFault as fault:
        return Decoded(None, (fault.reason, fault.detail))
    return Decoded(frames, None)
