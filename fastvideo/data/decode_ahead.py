# SPDX-License-Identifier: Apache-2.0
"""Decoding in worker processes that runs ahead of the encoder, in order, with bounded memory.

Kept free of torch and pyarrow: a worker imports this module and nothing heavier than PyAV.
"""

import functools
import operator
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastvideo.config.recipe import Clip
from fastvideo.data.decode import ClipFault, decode_clip
from fastvideo.data.footage import IO_TRIES, Planned
from fastvideo.data.workers import in_order

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Decoded:
    """Frames (F, H, W, 3) of a clip, or the (reason, detail) of its fault."""

    frames: Frames | None
    fault: tuple[str, str] | None


def decode_ahead(videos: Iterable[Planned], *, clip: Clip, workers: int) -> Generator[Decoded]:
    """Yield a result per video, in order; at most ``2 * workers`` are in memory at a time.

    Raises:
        UserError: A video is not the one the manifest was planned from.
        OSError: It could not be read, also when tried again; the clip is not to blame.
    """
    decode = functools.partial(_decode, clip=clip)
    return in_order(decode, videos, processes=workers, name=operator.attrgetter("name"))


def _decode(video: Planned, *, clip: Clip) -> Decoded:
    for attempt in range(1, IO_TRIES + 1):
        try:
            return _decode_once(video, clip=clip)
        except OSError:
            if attempt == IO_TRIES:
                raise
            time.sleep(attempt)
    raise AssertionError


def _decode_once(video: Planned, *, clip: Clip) -> Decoded:
    try:
        frames = decode_clip(
            video.unchanged(),
            num_frames=clip.num_frames,
            height=clip.height,
            width=clip.width,
            fps=clip.fps,
        )
    except ClipFault as fault:
        return Decoded(None, (fault.reason, fault.detail))
    return Decoded(frames, None)
