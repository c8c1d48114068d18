# SPDX-License-Identifier: Apache-2.0
"""The released checkpoints as package data, and what their families have in common; torch-free."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

TASKS = ("t2v", "i2v")


@dataclass(frozen=True)
class Release:
    """One released checkpoint in diffusers' layout: its configs, and how large it is.

    ``pipeline`` is its model_index.json, ``transformer`` (of every expert), ``vae`` and
    ``scheduler`` are the config.json of those folders, all as published less
    ``_diffusers_version``. ``text_encoder`` and ``image_encoder`` hold the main facts only.
    ``experts`` is as in `Architecture`. ``parameters`` counts the numbers of a component by its
    folder. ``weights`` are the published files of a folder: ``dtype``, and the bytes of each file
    (``files``) or of all tensors (``payload``), and tensors that are in the files only
    (``unused``). ``rounded`` is what was published as a rounded count: ``text``, and its last
    digit's ``unit``. ``digests`` are the SHA-256 of published files, where known. ``sources`` says
    of each fact where it comes from, and which are derived rather than published.
    """

    name: str
    repository: str
    family: str
    tasks: tuple[str, ...]
    pipeline: Mapping[str, Any]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    image_encoder: Mapping[str, Any] | None
    experts: dict[str, str]
    parameters: Mapping[str, int]
    weights: Mapping[str, Mapping[str, Any]]
    rounded: Mapping[str, Mapping[str, Any]]
    digests: Mapping[str, str]
    sources: Mapping[str, str]

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame of the VAE."""
        vae = self.vae
        if "temporal_compression_ratio" in vae:
            return int(vae["temporal_compression_ratio"])
        return int(vae.get("scale_factor_temporal", 2 ** sum(vae["temperal_downsample"])))

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent of the VAE, in each direction."""
        vae = self.vae
        if "spatial_compression_ratio" in vae:
            return int(vae["spatial_compression_ratio"])
        return int(vae.get("scale_factor_spatial", 2 ** len(vae["temperal_downsample"])))

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """(T, H, W) in latents."""
        config = self.transformer
        if "patch_size_t" in config:
            return (config["patch_size_t"], config["patch_size"], config["patch_size"])
        t, h, w = config["patch_size"]
        return (t, h, w)


@dataclass(frozen=True)
class Architecture:
    """The facts of a family that clip geometry and layout depend on.

    ``temporal_stride`` and ``spatial_stride`` are pixels per latent of the VAE; ``patch_size`` is
    (T, H, W) in latents; ``experts`` maps ``train.expert`` names to transformer folders, and is
    empty where there is one transformer. ``tasks`` are those that some release of the family was
    trained for. ``embedded_guidance``: the transformer takes the guidance scale as an input.
    """

    family: str
    temporal_stride: int
    spatial_stride: int
    patch_size: tuple[int, int, int]
    experts: dict[str, str]
    text_tokens: int
    tasks: tuple[str, ...]
    embedded_guidance: bool
    source: str

    @property
    def transformers(self) -> tuple[str, ...]:
        """Folders of the transformers of a model; of experts the high-noise one first."""
        return tuple(self.experts.values()) or ("transformer",)

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
def releases() -> tuple[Release, ...]:
    """Read every released checkpoint of the package, sorted by name."""
    folder = files("fastvideo.config").joinpath("architectures")
    found = []
    for path in folder.iterdir():
        if path.name.endswith(".json"):
            facts = json.loads(path.read_text(encoding="utf-8"))
            facts["tasks"] = tuple(facts["tasks"])
            found.append(Release(name=path.name.removesuffix(".json"), **facts))
    return tuple(sorted(found, key=lambda release: release.name))


def release(name: str) -> Release:
    """Return the released checkpoint ``name``; a ``KeyError`` names those that there are."""
    known = {release.name: release for release in releases()}
    if name not in known:
        raise KeyError(f"{name!r} is not a release; there are {', '.join(known)}")
    return known[name]


@cache
def architecture(family: str) -> Architecture:
    """Derive the facts of ``family`` from its releases; a ``KeyError`` where there are none."""
    members = [release for release in releases() if release.family == family]
    if not members:
        raise KeyError(family)
    first = members[0]  # a test holds that the releases of a family agree
    return Architecture(
        family=family,
        temporal_stride=first.temporal_stride,
        spatial_stride=first.spatial_stride,
        patch_size=first.patch_size,
        experts=first.experts,
        text_tokens=first.text_encoder["num_tokens"],
        tasks=tuple(task for task in TASKS if any(task in member.tasks for member in members)),
        embedded_guidance=bool(first.transformer.get("guidance_embeds")),
        source="config.json files of " + ", ".join(member.repository for member in members),
    )
