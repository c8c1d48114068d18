# SPDX-License-Identifier: Apache-2.0
"""What is fixed by a model family: strides, patches, experts; from package data, torch-free."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Architecture:
    """The facts of a family that clip geometry and layout depend on.

    ``temporal_stride`` and ``spatial_stride`` are pixels per latent of the VAE; ``patch_size`` is
    (T, H, W) in latents; ``experts`` maps ``train.expert`` names to transformer folders, and is
    empty where there is one transformer.
    """

    family: str
    temporal_stride: int
    spatial_stride: int
    patch_size: tuple[int, int, int]
    experts: dict[str, str]
    text_tokens: int
    source: str

    def misfits(self, *, num_frames: int, height: int, width: int) -> list[str]:
        """Say what is wrong with a clip's pixel geometry and the nearest that fits."""
        problems = []
        stride = self.temporal_stride * self.patch_size[0]
        if num_frames % stride != 1 % stride:
            problems.append(
                f"num_frames={num_frames} is not {stride}n+1; "
                f"the nearest is {_nearest(num_frames - 1, stride, least=0) + 1}"
            )
        for name, size, patch in (
            ("height", height, self.patch_size[1]),
            ("width", width, self.patch_size[2]),
        ):
            multiple = self.spatial_stride * patch
            if size % multiple:
                problems.append(
                    f"{name}={size} is not a multiple of {multiple} (VAE stride "
                    f"{self.spatial_stride} x patch {patch}); "
                    f"the nearest is {_nearest(size, multiple, least=multiple)}"
                )
        return problems


def _nearest(size: int, multiple: int, *, least: int) -> int:
    return max(least, round(size / multiple) * multiple)


@cache
def architecture(family: str) -> Architecture:
    """Read the facts of ``family``; a ``KeyError`` for a family that is not in the package."""
    path = files("fastvideo.config").joinpath("architectures", f"{family}.json")
    if not path.is_file():
        raise KeyError(family)
    facts = json.loads(path.read_text(encoding="utf-8"))
    return Architecture(
        family=family,
        temporal_stride=facts["vae"]["temporal_stride"],
        spatial_stride=facts["vae"]["spatial_stride"],
        patch_size=tuple(facts["transformer"]["patch_size"]),
        experts=facts["experts"],
        text_tokens=facts["text"]["num_tokens"],
        source=facts["source"],
    )
