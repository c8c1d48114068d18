# SPDX-License-Identifier: Apache-2.0
"""The package data of the released checkpoints is complete, consistent and read without torch."""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.resources import files

import pytest

from fastvideo.config.architectures import Release, architecture, release, releases

FAMILIES = {
    # family: (temporal stride, spatial stride, patch, experts, text tokens, tasks, guidance input)
    "hunyuan-video": (4, 8, (1, 2, 2), {}, 256, ("t2v",), True),
    "wan2.1": (4, 8, (1, 2, 2), {}, 512, ("t2v", "i2v"), False),
    "wan2.2-a14b": (
        *(4, 8, (1, 2, 2)),
        {"high": "transformer", "low": "transformer_2"},
        *(512, ("t2v", "i2v"), False),
    ),
    "wan2.2-ti2v-5b": (4, 16, (1, 2, 2), {}, 512, ("t2v", "i2v"), False),
}
NAMES = [release.name for release in releases()]
every_release = pytest.mark.parametrize("name", NAMES)


def test_the_releases_are_those_of_the_mission_sorted_by_name() -> None:
    assert NAMES == [
        "hunyuan_t2v",
        "wan2.1_i2v_14b_480p",
        "wan2.1_i2v_14b_720p",
        "wan2.1_t2v_1.3b",
        "wan2.1_t2v_14b",
        "wan2.2_i2v_a14b",
        "wan2.2_t2v_a14b",
        "wan2.2_ti2v_5b",
    ]
    assert {release.family for release in releases()} == set(FAMILIES)


def test_an_unknown_release_is_answered_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"wan3.*wan2\.1_t2v_1\.3b"):
        release("wan3")


def test_an_unknown_family_has_no_architecture() -> None:
    with pytest.raises(KeyError, match=r"wan9\.9"):
        architecture("wan9.9")


@every_release
def test_a_release_holds_exactly_the_documented_facts(name: str) -> None:
    text = files("fastvideo.config").joinpath("architectures", f"{name}.json").read_text("utf-8")
    assert {"name", *json.loads(text)} == set(Release.__dataclass_fields__)
    facts = release(name)
    folders = {"transformer", "vae", *facts.experts.values()}
    assert set(facts.parameters) == folders
    assert set(facts.weights) <= folders
    assert set(facts.sources) >= {"configs", "parameters.transformer", "parameters.vae"}
    assert all(len(source) > 40 for source in facts.sources.values())
    for config in (facts.pipeline, facts.transformer, facts.vae, facts.scheduler):
        assert config["_class_name"]
        assert "_diffusers_version" not in config


@every_release
def test_the_parts_of_a_release_fit_together(name: str) -> None:
    facts = release(name)
    width = facts.transformer.get("text_dim") or facts.transformer["text_embed_dim"]
    latents = facts.vae.get("z_dim") or facts.vae["latent_channels"]
    conditioned = (
        "i2v" in facts.tasks and facts.family != "wan2.2-ti2v-5b"
    )  # it has no mask channels
    # Published as [library, class], or [null, null] where the component is left out.
    has_image_encoder = facts.pipeline.get("image_encoder", [None, None])[1] is not None
    assert facts.text_encoder["hidden_size"] == width
    assert facts.transformer["out_channels"] == latents
    assert facts.transformer["in_channels"] == (2 * latents + 4 if conditioned else latents)
    assert len(facts.vae.get("latents_mean", [0] * latents)) == latents
    assert len(facts.vae.get("latents_std", [0] * latents)) == latents
    assert facts.pipeline["transformer"] == ["diffusers", facts.transformer["_class_name"]]
    assert facts.pipeline["vae"] == ["diffusers", facts.vae["_class_name"]]
    assert facts.pipeline["scheduler"] == ["diffusers", facts.scheduler["_class_name"]]
    assert has_image_encoder == (facts.image_encoder is not None)
    assert has_image_encoder == (facts.transformer.get("image_dim") is not None)
    assert bool(facts.experts) == (facts.pipeline.get("boundary_ratio") is not None)
    assert bool(facts.experts) == (facts.pipeline.get("transformer_2", [None, None])[0] is not None)


def test_clip_is_for_the_image_to_video_models_of_wan_21_only() -> None:
    with_clip = [facts for facts in releases() if facts.image_encoder]
    assert [facts.name for facts in with_clip] == ["wan2.1_i2v_14b_480p", "wan2.1_i2v_14b_720p"]
    for facts in with_clip:
        assert facts.image_encoder is not None
        assert facts.image_encoder["hidden_size"] == facts.transformer["image_dim"] == 1280
        side = facts.image_encoder["image_size"] // facts.image_encoder["patch_size"]
        assert facts.image_encoder["num_tokens"] == side**2 + 1 == 257


@pytest.mark.parametrize(
    ("name", "boundary"), [("wan2.2_t2v_a14b", 0.875), ("wan2.2_i2v_a14b", 0.9)]
)
def test_the_experts_meet_at_the_published_boundary(name: str, boundary: float) -> None:
    facts = release(name)
    assert facts.pipeline["boundary_ratio"] == boundary
    assert facts.parameters["transformer"] == facts.parameters["transformer_2"]


@every_release
def test_configs_are_byte_for_byte_those_published(name: str) -> None:
    """Where hashes of the published files are known: diffusers' JSON of our data has them."""
    facts = release(name)
    parts = asdict(facts)
    version = facts.digests.get("diffusers_version")
    for part, digest in facts.digests.items():
        if part != "diffusers_version":
            config = parts[part] | {"_diffusers_version": version}
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            assert hashlib.sha256(text.encode()).hexdigest() == digest, part


def test_hashes_are_known_for_both_kinds_of_wan_vae() -> None:
    hashed = {facts.name for facts in releases() if facts.digests}
    assert hashed == {"wan2.1_t2v_1.3b", "wan2.2_ti2v_5b"}
    wan_21 = release("wan2.1_t2v_1.3b").vae
    for facts in releases():
        if facts.family in {"wan2.1", "wan2.2-a14b"}:
            assert facts.vae == wan_21


@every_release
def test_counts_round_to_what_was_published_rounded(name: str) -> None:
    for folder, rounded in release(name).rounded.items():
        count, unit = release(name).parameters[folder], rounded["unit"]
        digits = {10**7: 2, 10**8: 1, 10**9: 0}[unit]
        assert f"{round(count / unit) * unit / 1e9:.{digits}f}B" == rounded["text"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_architecture_states_the_facts_of_its_family(family: str) -> None:
    facts = architecture(family)
    assert (
        facts.temporal_stride,
        facts.spatial_stride,
        facts.patch_size,
        facts.experts,
        facts.text_tokens,
        facts.tasks,
        facts.embedded_guidance,
    ) == FAMILIES[family]
    assert facts.source.startswith("config.json files of ")


@every_release
def test_every_release_agrees_with_its_family(name: str) -> None:
    facts = release(name)
    family = architecture(facts.family)
    assert facts.temporal_stride == family.temporal_stride
    assert facts.spatial_stride == family.spatial_stride
    assert facts.patch_size == family.patch_size
    assert facts.experts == family.experts
    assert facts.text_encoder["num_tokens"] == family.text_tokens
    assert bool(facts.transformer.get("guidance_embeds")) == family.embedded_guidance
    assert facts.repository in family.source


@every_release
def test_strides_stated_by_a_vae_are_those_of_its_layers(name: str) -> None:
    """Each level but the last halves the picture; Wan2.2's VAE also folds 2 x 2 pixels first."""
    facts = release(name)
    if facts.family == "hunyuan-video":
        levels = len(facts.vae["block_out_channels"])
        assert facts.spatial_stride == 2 ** (levels - 1)
    else:
        levels = len(facts.vae["dim_mult"])
        assert len(facts.vae["temperal_downsample"]) == levels - 1
        assert facts.spatial_stride == 2 ** (levels - 1) * (facts.vae.get("patch_size") or 1)
        assert facts.temporal_stride == 2 ** sum(facts.vae["temperal_downsample"])


def test_strides_follow_the_vae_and_not_the_name() -> None:
    other = {"temperal_downsample": [True, True, True, False]}
    changed = replace(release("wan2.1_t2v_1.3b"), vae=other)
    assert (changed.temporal_stride, changed.spatial_stride) == (8, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_released_clip_sizes_fit_and_others_are_refused_with_the_nearest(family: str) -> None:
    facts = architecture(family)
    multiple = 16 * facts.spatial_stride // 8
    assert facts.misfits(num_frames=81, height=480, width=832) == []
    assert facts.misfits(num_frames=121, height=704, width=1280) == []
    frames, height, width = facts.misfits(num_frames=80, height=484, width=840)
    assert "num_frames=80 is not 4n+1; the nearest is 81" in frames
    assert f"height=484 is not a multiple of {multiple}" in height
    assert "the nearest is 480" in height
    assert f"width=840 is not a multiple of {multiple}" in width
    assert "the nearest is 832" in width


def test_720_lines_fit_every_family_but_ti2v() -> None:
    for family in FAMILIES:
        problems = architecture(family).misfits(num_frames=81, height=720, width=1280)
        expected = ["height=720 is not a multiple of 32"] if family == "wan2.2-ti2v-5b" else []
        assert [problem.partition(" (")[0] for problem in problems] == expected


def test_reading_the_releases_imports_no_torch() -> None:
    code = (
        "import sys; from fastvideo.config.architectures import architecture, releases;"
        "releases(); architecture('wan2.1');"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'pydantic'};"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
