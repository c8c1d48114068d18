# SPDX-License-Identifier: Apache-2.0
"""Published and spoiled model folders: what they are is found from their configs alone."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastvideo.config.architectures import Release, release, releases
from fastvideo.config.recipe import Model
from fastvideo.errors import UserError
from fastvideo.models.detect import check, detect

NAMES = [release.name for release in releases()]
every_release = pytest.mark.parametrize("name", NAMES)
BOUNDARIES = {"wan2.2_t2v_a14b": 0.875, "wan2.2_i2v_a14b": 0.9}
WITH_CLIP = ("wan2.1_i2v_14b_480p", "wan2.1_i2v_14b_720p")


def write(folder: Path, facts: Release) -> Path:
    """The configs of a published repository, as far as they tell what it is."""
    parts = {"model_index.json": facts.pipeline}
    for name in facts.experts.values() or ("transformer",):
        parts[f"{name}/config.json"] = facts.transformer
    for name, content in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({**content, "_diffusers_version": "0.40.0"}))
    return folder


def edit(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@every_release
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "without the transformer"])
def test_every_published_checkpoint_is_found_for_what_it_is(
    name: str, whole: bool, tmp_path: Path
) -> None:
    facts = release(name)
    folder = write(tmp_path, facts)
    if not whole:
        for transformer in folder.glob("transformer*"):
            shutil.rmtree(transformer)
    found = detect(folder)
    assert (found.family, found.tasks) == (facts.family, facts.tasks)
    assert found.has_clip == (name in WITH_CLIP)
    assert found.boundary == BOUNDARIES.get(name)


@every_release
def test_a_published_checkpoint_is_taken_for_its_own_family_and_tasks_only(
    name: str, tmp_path: Path
) -> None:
    facts = release(name)
    folder = write(tmp_path, facts)
    pairs = {(other.family, task) for other in releases() for task in other.tasks}
    for family, task in sorted(pairs):
        model = Model.model_validate({"family": family, "task": task, "path": str(folder)})
        if family == facts.family and task in facts.tasks:
            assert check(folder, model) == detect(folder)
            continue
        with pytest.raises(UserError) as caught:
            check(folder, model)
        key, right = (
            ("family", facts.family) if family != facts.family else ("task", facts.tasks[0])
        )
        assert f"model.path={folder}" in str(caught.value)
        assert f"write model.{key}: {right}" in str(caught.value)


def test_a_stray_boundary_ratio_makes_no_second_expert(tmp_path: Path) -> None:
    """Some conversions of Wan2.1 carry one."""
    for name in ("wan2.1_t2v_14b", "wan2.1_i2v_14b_480p"):
        folder = write(tmp_path / name, release(name))
        expected = detect(folder)
        for transformer_2 in ({}, {"transformer_2": [None, None]}):
            edit(folder, "model_index.json", boundary_ratio=0.9, **transformer_2)
            assert detect(folder) == expected
            assert expected.boundary is None and expected.family == "wan2.1"


def test_the_image_pipeline_of_ti2v_is_the_same_model(tmp_path: Path) -> None:
    folder = write(tmp_path, release("wan2.2_ti2v_5b"))
    expected = detect(folder)
    edit(folder, "model_index.json", _class_name="WanImageToVideoPipeline")
    assert detect(folder) == expected


SPOILED: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    # what: (release, file, its new values, words of the refusal)
    "VACE": (
        *("wan2.1_t2v_14b", "model_index.json"),
        {"_class_name": "WanVACEPipeline"},
        ["is a WanVACEPipeline", "image-to-video"],
    ),
    "a pipeline of its own code": (
        *("wan2.1_t2v_14b", "model_index.json"),
        {"_class_name": ["pipeline_own", "OwnPipeline"]},
        ["OwnPipeline"],
    ),
    "HunyuanVideo I2V": (
        *("hunyuan_t2v", "model_index.json"),
        {"_class_name": "HunyuanVideoImageToVideoPipeline"},
        ["is a HunyuanVideoImageToVideoPipeline", "HunyuanVideo (text-to-video)"],
    ),
    "HunyuanVideo that is not distilled": (
        *("hunyuan_t2v", "transformer/config.json"),
        {"guidance_embeds": False},
        ["guidance_embeds"],
    ),
    "an image pipeline with a text-to-video transformer": (
        *("wan2.1_t2v_14b", "model_index.json"),
        {"_class_name": "WanImageToVideoPipeline"},
        ["16 channels", "WanImageToVideoPipeline"],
    ),
    "a text pipeline with an image-to-video transformer": (
        *("wan2.2_i2v_a14b", "model_index.json"),
        {"_class_name": "WanPipeline"},
        ["36 channels", "WanPipeline"],
    ),
    "no class": (
        "wan2.1_t2v_14b",
        "model_index.json",
        {"_class_name": None},
        ["_class_name", "model_index.json"],
    ),
    "first and last frame": (
        *("wan2.1_i2v_14b_720p", "transformer/config.json"),
        {"pos_embed_seq_len": 514},
        ["a first and a last frame", "pos_embed_seq_len"],
    ),
    "33 channels": (
        *("wan2.1_t2v_14b", "transformer/config.json"),
        {"in_channels": 33},
        ["33 channels", "16 (text-to-video) or 36 (image-to-video)"],
    ),
    "TI2V of 100 channels": (
        *("wan2.2_ti2v_5b", "transformer/config.json"),
        {"in_channels": 100},
        ["100 channels", "TI2V-5B, with 48"],
    ),
    "HunyuanVideo of 33 channels": (
        *("hunyuan_t2v", "transformer/config.json"),
        {"in_channels": 33},
        ["33 channels", "with 16"],
    ),
    "HunyuanVideo with images": (
        *("hunyuan_t2v", "transformer/config.json"),
        {"image_condition_type": "token_replace"},
        ["image_condition_type=token_replace", "text-to-video"],
    ),
    "no channels": (
        *("wan2.1_t2v_14b", "transformer/config.json"),
        {"in_channels": None},
        ["in_channels"],
    ),
    "two experts and no boundary": (
        *("wan2.2_t2v_a14b", "model_index.json"),
        {"boundary_ratio": None},
        ["two transformers", "boundary_ratio", "Wan2.2"],
    ),
    "a boundary in timesteps": (
        *("wan2.2_t2v_a14b", "model_index.json"),
        {"boundary_ratio": 875},
        ["boundary_ratio=875", "between 0 and 1"],
    ),
    "true is no boundary": (
        *("wan2.2_i2v_a14b", "model_index.json"),
        {"boundary_ratio": True},
        ["boundary_ratio=True"],
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_model_that_this_suite_does_not_train_is_refused_with_what_it_trains(
    what: str, tmp_path: Path
) -> None:
    name, file, values, words = SPOILED[what]
    folder = write(tmp_path, release(name))
    edit(folder, file, **values)
    with pytest.raises(UserError) as caught:
        detect(folder)
    message = str(caught.value)
    assert message.startswith(f"model.path={folder}: ")
    for word in words:
        assert word in message, message
    assert re.search(r"; (give|fetch|use) ", message), "the way out"
