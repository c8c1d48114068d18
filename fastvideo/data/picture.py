# SPDX-License-Identifier: Apache-2.0
"""Decoded pictures to RGB of one size: upright, square pixels, scaled to cover, cropped."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import SideData
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from fastvideo.data.container import MAX_SIDE, ClipFault, check_size

_INTERPOLATION = (
    Interpolation.BICUBIC
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT  # the same on every CPU
)


@dataclass(frozen=True)
class Orientation:
    """How a stored picture is turned to be shown: axes are swapped first, then reversed."""

    swapped: bool = False
    y_reversed: bool = False
    x_reversed: bool = False

    @property
    def degrees(self) -> int:
        """Counter-clockwise turn: 0, 90, 180 or 270; mirroring is left out."""
        if self.swapped:
            return 90 if self.y_reversed else 270
        return 180 if self.y_reversed and self.x_reversed else 0

    def apply(self, image_HWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the picture as it is shown; a view."""
        turned = image_HWC.transpose(1, 0, 2) if self.swapped else image_HWC
        return turned[:: -1 if self.y_reversed else 1, :: -1 if self.x_reversed else 1]


class Fit:
    """Brings frames to RGB of one size."""

    def __init__(self, *, height: int, width: int, aspect: Fraction) -> None:
        """``aspect`` is width by height of a stored pixel."""
        self._height, self._width = height, width
        self._aspect = aspect
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> npt.NDArray[np.uint8]:
        """Return uint8 (H, W, 3)."""
        check_size(frame.width, frame.height)
        orientation = orientation_of(frame)
        shown = shown_size(frame, self._aspect)
        height, width = cover_size(shown, height=self._height, width=self._width)
        rgb = self._reformatter.reformat(
            frame,
            height if orientation.swapped else width,
            width if orientation.swapped else height,
            "rgb24",
            interpolation=_INTERPOLATION,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
        image_HWC = orientation.apply(cast(npt.NDArray[np.uint8], rgb.to_ndarray()))
        top, left = (height - self._height) // 2, (width - self._width) // 2
        return image_HWC[top : top + self._height, left : left + self._width]


def orientation_of(frame: VideoFrame) -> Orientation:
    """Read the display matrix, which holds multiples of 90 degrees and mirrors in practice."""
    side_data = cast(Sequence[SideData], frame.side_data)
    matrices = [data for data in side_data if data.type is SideDataType.DISPLAYMATRIX]
    if not matrices:
        return Orientation()
    # A stored point (p, q) is shown at (a p + c q, b p + d q); y points down.
    a, b, _, c, d = struct.unpack("=5i", bytes(matrices[0])[:20])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(swapped=True, y_reversed=b < 0, x_reversed=c < 0)
    return Orientation(y_reversed=d < 0, x_reversed=a < 0)


def shown_size(frame: VideoFrame, aspect: Fraction) -> tuple[Fraction, Fraction]:
    """(height, width) upright, in square pixels."""
    height, width = Fraction(frame.height), frame.width * aspect
    return (width, height) if orientation_of(frame).swapped else (height, width)


def cover_size(
    shown: tuple[Fraction | int, Fraction | int], *, height: int, width: int
) -> tuple[int, int]:
    """Smallest (height, width) of the shape of ``shown`` that covers ``height`` x ``width``.

    Raises:
        ClipFault: ``too_large``: the shape is so narrow that it would be enormous.
    """
    scale = max(Fraction(height) / shown[0], Fraction(width) / shown[1])
    scaled = round(shown[0] * scale), round(shown[1] * scale)
    if max(scaled) > MAX_SIDE:
        shape = f"{float(shown[1]):g}x{float(shown[0]):g}"
        covering = f"covers {width}x{height} only as {scaled[1]}x{scaled[0]}"
        raise ClipFault("too_large", f"a picture of {shape} {covering}")
    return scaled
