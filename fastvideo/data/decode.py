# SPDX-License-Identifier: Apache-2.0
"""Video files to frames, with PyAV: frames are picked by time stamp, faults are never papered over.

Only numpy and PyAV are imported, so that worker processes start fast.
"""

import collections
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from fastvideo.data.container import ClipFault, check_complete, check_size, open_video
from fastvideo.data.footage import Content
from fastvideo.data.picture import Fit, orientation_of, shown_size

__all__ = ["DECODE_SETTINGS", "ClipFault", "VideoInfo", "decode_clip", "die_with_parent", "probe"]

DECODE_SETTINGS: dict[str, Any] = {
    "backend": "pyav",
    "sampling": "nearest time stamp, from the first frame on",
    "resampling": "bicubic, antialiased",
    "crop": "centre",
    "version": 1,
}
"""What the frames depend on besides file and clip; the version counts changes of this code."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds."""

    width: int
    """Pixels as shown: rotated, and with square pixels."""
    height: int
    """Pixels as shown."""
    rotation: int
    """Degrees that the stored picture is turned counter-clockwise to be shown: 0, 90, 180, 270."""
    fps: float
    """Mean frames per second; 0 for a single frame of unknown duration."""
    num_frames: int
    """Frames that are shown."""
    duration_s: float
    """From the first frame to the end of the last, which takes the mean interval."""
    codec: str
    """FFmpeg's name of the codec."""


def probe(video: Content) -> VideoInfo:
    """Read the headers, the time stamps of all packets and the first frame.

    Raises:
        ClipFault: ``empty_file``, ``not_a_video``, ``no_video_stream``, ``unsupported_codec``,
            ``too_large`` or ``corrupt``.
        OSError: A file could not be read; the clip is not to blame.
    """
    with open_video(video) as (container, stream, size):
        first: VideoFrame | None = None
        shown: list[tuple[int, int]] = []
        for packet in itertools.chain(_packets(container, stream), [None]):
            if first is None:
                first = next(iter(stream.decode(packet)), None)
            if packet is not None and not packet.is_discard:
                ticks = _ticks(packet, container)
                shown += [] if ticks is None else [(ticks, packet.duration or 0)]
        if first is None or not shown:
            raise ClipFault("corrupt", "holds no frame that can be decoded")
        check_complete(container, stream, size=size)
        if container.format.name != "avi" and first.pts is not None:
            # Pictures before the first key frame are dropped by the decoder.
            shown = [(ticks, length) for ticks, length in shown if ticks >= first.pts]
        return _describe(stream, first, sorted(shown))


def decode_clip(
    video: Content, *, num_frames: int, height: int, width: int, fps: float
) -> npt.NDArray[np.uint8]:
    """Decode the first ``num_frames`` at ``fps`` as RGB.

    Frame i is the one whose time stamp is nearest to that of the first frame + i / ``fps``; of two
    equally near ones the earlier. The picture is rotated as the file asks, scaled with square
    pixels until it covers ``height`` and ``width``, and cropped in the centre.

    Returns:
        uint8 (F, H, W, 3), 0 to 255.

    Raises:
        ClipFault: As `probe`, or ``too_short`` or ``bad_timestamps``.
        OSError: A file could not be read; the clip is not to blame.
    """
    frames_FHWC = np.empty((num_frames, height, width, 3), np.uint8)
    rate = Fraction(repr(fps))
    offsets = [Fraction(i) / rate for i in range(num_frames)]
    with open_video(video) as (container, stream, _):
        fit = Fit(height=height, width=width, aspect=_aspect(stream))
        latest: VideoFrame | None = None
        for i, frame in enumerate(_nearest(_timed(container, stream), offsets=offsets)):
            if frame is latest:
                frames_FHWC[i] = frames_FHWC[i - 1]
            else:
                frames_FHWC[i] = fit(frame)
            latest = frame
    return frames_FHWC


def die_with_parent() -> None:
    """Set up a worker process: it ends when its parent does, however that ends."""
    # Ctrl-C and Slurm's warning reach the whole process group; the parent decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL))
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():
        os._exit(1)  # it ended before


# ---------------------------------------------------------------- time


def _packets(container: InputContainer, stream: VideoStream) -> "Iterator[Packet[VideoStream]]":
    return (packet for packet in container.demux(stream) if packet.size)


def _ticks(packet: "Packet[VideoStream]", container: InputContainer) -> int | None:
    # AVI stores no presentation times; those that FFmpeg makes up are wrong with B-frames.
    if packet.pts is None or container.format.name == "avi":
        return packet.dts
    return packet.pts


def _timed(container: InputContainer, stream: VideoStream) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Yield (time in s, frame) in the order of display."""
    base = stream.time_base
    # In AVI, which stores the order of decoding only, the n-th frame shown has the n-th time.
    clock: collections.deque[int | None] = collections.deque()
    for packet in itertools.chain(_packets(container, stream), [None]):
        if packet is not None and container.format.name == "avi":
            clock.append(packet.dts)
        for frame in stream.decode(packet):
            ticks = clock.popleft() if clock else frame.pts
            if frame.is_corrupt:
                raise ClipFault("corrupt", f"the frame at {ticks} ticks is damaged")
            if ticks is None or base is None:
                raise ClipFault("bad_timestamps", "a frame has no time stamp")
            yield ticks * base, frame


def _nearest(
    frames: Iterator[tuple[Fraction, VideoFrame]], *, offsets: list[Fraction]
) -> Iterator[VideoFrame]:
    """Yield the frame nearest to each of the ascending ``offsets`` (s) from the first frame."""
    start, held = next(frames, (Fraction(0), None))
    if held is None:
        raise ClipFault("corrupt", "holds no frame that can be decoded")
    at, count = start, 1
    wanted = collections.deque(offsets)
    for time, frame in frames:
        if time < at:
            detail = f"frame {count} is shown at {float(time):.3f} s, after {float(at):.3f} s"
            raise ClipFault("bad_timestamps", detail)
        while wanted and (start + wanted[0]) - at <= time - (start + wanted[0]):
            wanted.popleft()
            yield held
        if not wanted:
            return
        at, held, count = time, frame, count + 1
    half_s = (at - start) / (count - 1) / 2 if count > 1 else Fraction(0)
    while wanted and start + wanted[0] <= at + half_s:
        wanted.popleft()
        yield held
    if wanted:
        detail = (
            f"its last frame is at {float(at - start):.3f} s, "
            f"one at {float(offsets[-1]):.3f} s is wanted"
        )
        raise ClipFault("too_short", detail)


def _describe(stream: VideoStream, first: VideoFrame, packets: list[tuple[int, int]]) -> VideoInfo:
    base = stream.time_base or Fraction(0)
    span_s = (packets[-1][0] - packets[0][0]) * base
    interval_s = span_s / (len(packets) - 1) if len(packets) > 1 else packets[0][1] * base
    fps = 1 / interval_s if interval_s > 0 else Fraction(0)
    # Time stamps may be rounded, in Matroska to 1 ms; the header has the rate as it was meant.
    if stream.average_rate and abs(stream.average_rate - fps) < fps / 200:
        fps = stream.average_rate
    check_size(first.width, first.height)
    height, width = map(round, shown_size(first, _aspect(stream)))
    check_size(width, height)
    return VideoInfo(
        width=width,
        height=height,
        rotation=orientation_of(first).degrees,
        fps=float(fps),
        num_frames=len(packets),
        duration_s=float(span_s + interval_s),
        codec=stream.codec_context.codec.canonical_name,
    )


def _aspect(stream: VideoStream) -> Fraction:
    """Width by height of a stored pixel; files that do not say mean squares."""
    return stream.sample_aspect_ratio or Fraction(1)
