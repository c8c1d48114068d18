# SPDX-License-Identifier: Apache-2.0
"""Makes real media files whose frames can be told apart by looking at them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.stream import Disposition

Image = npt.NDArray[np.uint8]
BITS = 8
CORNERS = ((200, 30, 30), (30, 180, 40), (40, 50, 210), (210, 200, 40))
"""RGB of the top left, top right, bottom left and bottom right."""


def numbered(index: int, *, height: int = 48, width: int = 64) -> Image:
    """A picture with four coloured corners and, across the middle, its number in black and white.

    The middle half of the height holds the bits, so that a square crop still shows half of them.
    """
    image = np.empty((height, width, 3), np.uint8)
    for corner, colour in enumerate(CORNERS):
        rows = slice(height // 2, None) if corner > 1 else slice(0, height // 2)
        columns = slice(width // 2, None) if corner % 2 else slice(0, width // 2)
        image[rows, columns] = colour
    for bit in range(BITS):
        left, right = width * bit // BITS, width * (bit + 1) // BITS
        image[height // 4 : height * 3 // 4, left:right] = 235 if index >> bit & 1 else 20
    return image


def number_of(image: Image) -> int:
    """The number in a picture of ``numbered``, at any size of the same shape."""
    height, width, _ = image.shape
    centres = [width * (2 * bit + 1) // (2 * BITS) for bit in range(BITS)]
    return sum(int(image[height // 2, x].mean() > 128) << bit for bit, x in enumerate(centres))


def corners_of(image: Image) -> list[tuple[int, int, int]]:
    """Nearest of ``CORNERS`` at the corners of a picture."""
    height, width, _ = image.shape
    found = []
    for y, x in ((0.1, 0.1), (0.1, 0.9), (0.9, 0.1), (0.9, 0.9)):
        pixel = image[int(height * y), int(width * x)].astype(int)
        found.append(min(CORNERS, key=lambda corner: int(np.abs(pixel - corner).sum())))
    return found


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a file is written."""

    codec: str = "libx264"
    fps: int = 30
    pixels: str = "yuv420p"
    times: Sequence[int] | None = None
    """Time of each frame in units of ``1 / ticks`` s; None for a constant rate."""
    ticks: int | None = None
    rotation: int | None = None
    """Degrees counter-clockwise that a player turns the picture."""
    mirrored: bool = False
    aspect: Fraction | None = None
    """Width by height of a stored pixel."""
    space: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``VideoFrame.reformat`` and tags of the stream."""
    codec_options: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    """Of the container."""
    container: str | None = None


def write_video(path: Path, images: Iterable[Image], encoding: Encoding | None = None) -> Path:
    """Encode ``images`` into ``path``."""
    encoding = encoding or Encoding()
    with av.open(
        str(path.absolute()), "w", format=encoding.container, options=dict(encoding.options)
    ) as container:
        stream: Any = container.add_stream(
            encoding.codec, rate=encoding.fps, options=dict(encoding.codec_options)
        )
        stream.pix_fmt = encoding.pixels
        time_base = Fraction(1, encoding.ticks or encoding.fps)
        stream.codec_context.time_base = time_base
        if encoding.aspect is not None:
            stream.codec_context.sample_aspect_ratio = encoding.aspect
        if encoding.rotation is not None or encoding.mirrored:
            stream.set_display_rotation(encoding.rotation or 0, hflip=encoding.mirrored)
        if encoding.space:
            stream.codec_context.colorspace = encoding.space["dst_colorspace"]
            stream.codec_context.color_range = encoding.space["dst_color_range"]
        for index, image in enumerate(images):
            if index == 0:
                stream.height, stream.width = image.shape[:2]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if encoding.space:
                frame = frame.reformat(format=encoding.pixels, **encoding.space)
            frame.pts = index if encoding.times is None else encoding.times[index]
            frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_numbered(
    path: Path,
    count: int,
    encoding: Encoding | None = None,
    *,
    height: int = 48,
    width: int = 64,
) -> Path:
    """Encode the numbers from 0 to ``count - 1``."""
    images = (numbered(index, height=height, width=width) for index in range(count))
    return write_video(path, images, encoding)


def write_cover(path: Path) -> Path:
    """A second of silence with the picture of an album, which is no video."""
    return write_sound(path, cover=numbered(0))


def write_sound(path: Path, *, cover: Image | None = None) -> Path:
    """A second of silence."""
    with av.open(str(path.absolute()), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        if cover is not None:
            picture: Any = container.add_stream("mjpeg", rate=1)
            picture.height, picture.width = cover.shape[:2]
            picture.pix_fmt = "yuvj420p"
            picture.disposition = Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")))
            container.mux(picture.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def flipped(path: Path) -> None:
    """Write a video that opens as if nothing were wrong and cannot be decoded."""
    noise(path, {})
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 4, len(data) // 2, 500):
        data[place] ^= 0x55
    path.write_bytes(data)


def noise(path: Path, options: dict[str, str]) -> None:
    """Write a video of noise, 1.2 s, with options of the encoder."""
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 255, (96, 128, 3), dtype=np.uint8) for _ in range(12))
    write_video(path, images, Encoding(fps=10, options=options))
