# SPDX-License-Identifier: Apache-2.0
"""Every form of data set, offline: without torchcodec, and with one that cannot be loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastvideo.config.recipe import Recipe
from tests.hf_sets import CLIP, FORMS, Form

CONDITIONS = ("absent", "unloadable")

# What the real one does where FFmpeg's libraries are missing.
UNLOADABLE = 'raise RuntimeError("Could not load libtorchcodec. Likely causes: ...")\n'

JOB = """
import json, sys
if sys.argv[1] == "absent":
    sys.modules["torchcodec"] = None
from pathlib import Path
from fastvideo.config.recipe import Recipe
from fastvideo.data.decode import decode_clip
from fastvideo.data.listing import open_footage
from fastvideo.data.manifest import plan_manifest, read_rows
from fastvideo.state import ShardStore
from tests.media import number_of

found = {}
for path in sys.argv[2:]:
    recipe = Recipe.load(Path(path))
    store = ShardStore(recipe.shards.path)
    plan_manifest(recipe, store=store, settings={})
    rows = read_rows(store)
    contents = open_footage(recipe.source).read(row.origin for row in rows)
    clip = recipe.clip.model_dump()
    found[path] = {
        "rows": [vars(row) for row in rows],
        "frames": [[number_of(f) for f in decode_clip(c, **clip)] for c in contents],
    }
import datasets
built = "torchcodec" in sys.modules and sys.modules["torchcodec"] is not None
try:
    first = Path(sys.argv[2])
    folder = Recipe.load(first).source.path
    datasets.load_dataset(folder, split="train", cache_dir=str(first.parent / "cache"))
    theirs = "works"
except datasets.exceptions.DatasetGenerationError as error:
    theirs = repr(error.__cause__)
print(json.dumps({"forms": found, "imported": built, "theirs": theirs}))
"""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per form, and the cache of the Hub."""
    root = tmp_path_factory.mktemp("sets")
    for form in FORMS:
        form.write(root / form.name)
    return root


@pytest.fixture(scope="module", params=CONDITIONS)
def results(
    request: pytest.FixtureRequest, sets: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a process of its own makes of all forms."""
    root = tmp_path_factory.mktemp(request.param)
    package = root / "site/torchcodec"
    if request.param == "unloadable":
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(UNLOADABLE)
    recipes = [write_recipe(root, sets, form) for form in FORMS]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{os.getcwd()}{os.pathsep}{package.parent}",
        "HF_HOME": str(sets),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", JOB, request.param, *map(str, recipes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    forms = zip(FORMS, result["forms"].values(), strict=True)
    return {**result, "condition": request.param, "forms": {f.name: found for f, found in forms}}


def write_recipe(root: Path, sets: Path, form: Form) -> Path:
    folder = root / form.name
    source = {"kind": "hf", "path": str(sets / form.name), **form.source}
    tree = {
        "model": {"family": "wan2.1", "path": "none"},
        "clip": CLIP,
        "source": source,
        "shards": {"path": str(folder / "shards")},
        "run_dir": str(folder / "run"),
        "preprocess": {"decode_workers": 0},
    }
    folder.mkdir()
    (folder / "recipe.yaml").write_text(Recipe.parse(tree, origin="test").dump())
    return folder / "recipe.yaml"


@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
def test_a_data_set_of_each_form_is_planned_and_decodes(
    results: dict[str, Any], form: Form
) -> None:
    found = results["forms"][form.name]
    rows = found["rows"]
    assert [row["state"] for row in rows] == ["accepted"] * 2, rows
    digests = [row["sha256"][:16] for row in rows]
    assert [row["id"] for row in rows] == [
        name or digest for name, digest in zip(form.ids, digests, strict=True)
    ]
    assert [tuple(row["captions"]) for row in rows] == list(form.captions)
    assert [(row["num_frames"], row["fps"], row["codec"]) for row in rows] == [(8, 10, "mpeg4")] * 2
    assert found["frames"] == [[0, 1, 2, 3, 4]] * 2


def test_torchcodec_is_never_imported_though_datasets_would(results: dict[str, Any]) -> None:
    assert not results["imported"]
    expected = {"absent": "works", "unloadable": "Could not load libtorchcodec"}[
        results["condition"]
    ]
    assert expected in results["theirs"]
