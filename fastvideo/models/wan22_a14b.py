# SPDX-License-Identifier: Apache-2.0
"""Wan2.2 A14B, text-to-video and image-to-video: two experts, one for each range of noise levels.

A transformer, text and VAE are Wan2.1's; image-to-video has no CLIP features.
"""

from pathlib import Path

from fastvideo.models.detect import check
from fastvideo.models.family import Interval
from fastvideo.models.wan21 import Wan21


class Wan22A14B(Wan21):
    """The family ``wan2.2-a14b``; see ``fastvideo.models.family.Family`` for each method."""

    def interval(self, path: Path, *, folder: str) -> Interval:
        """``transformer`` denoises from the checkpoint's ``boundary_ratio`` upwards."""
        boundary = check(path, self._model).boundary
        assert boundary is not None
        is_high = folder == self._facts.experts["high"]
        return Interval(low=boundary) if is_high else Interval(high=boundary)
