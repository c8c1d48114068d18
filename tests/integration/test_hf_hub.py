# SPDX-License-Identifier: Apache-2.0
"""A data set on a Hub of this machine: downloaded and kept, or streamed, each byte as needed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastvideo.data.manifest import read_rows
from fastvideo.state import ShardStore, ledger
from tests.hf_sets import clip_bytes, write_csv, write_rows, write_tar
from tests.hub_server import REPOSITORY, hub
from tests.tiny_world import World, make_world

NUM_CLIPS, PADDING = 12, 1 << 20
NOWHERE = "http://127.0.0.1:9"
STREAM = "source.streaming=true"
PLAN = None

# A process that takes one step after the other, and what each of them made the Hub send.
JOB = """
import json, sys, urllib.request
from pathlib import Path
from fastvideo.config.recipe import Recipe
from fastvideo.data.listing import open_footage
from fastvideo.data.manifest import read_rows
from fastvideo.errors import UserError
from fastvideo.preprocess import preprocess
from fastvideo.state import ShardStore

recipe, address, steps = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
results = []
for overrides, shard in steps:
    error, job = "", Recipe.load(recipe, overrides)
    try:
        if shard is None:
            preprocess(job, manifest_only=True)
        else:
            rows = read_rows(ShardStore(job.shards.path), shard)
            assert len(list(open_footage(job.source).read(row.origin for row in rows))) == 4
    except UserError as mistake:
        error = str(mistake)
    with urllib.request.urlopen(address + "/sent") as sent:
        results.append([error, json.load(sent) / 2**20])
print(json.dumps(results))
"""


@dataclass(frozen=True)
class Job:
    """A recipe whose clips are on the Hub."""

    world: World
    address: str

    def run(self, *steps: tuple[list[str], int | None], **environment: str) -> list[Any]:
        """Plan with overrides, or read the clips of a shard; the error and the MiB sent of each."""
        places = {"HF_ENDPOINT": self.address, "HF_HOME": str(self.home), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", JOB, self.world.recipe, self.address, json.dumps(steps)],
            env={**os.environ, "PYTHONPATH": os.getcwd(), **places, **environment},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        results: list[Any] = json.loads(done.stdout.splitlines()[-1])
        return results

    @property
    def home(self) -> Path:
        """Where the libraries keep what they fetched."""
        return self.world.root / "home"

    def kept_mib(self) -> float:
        files = (path for path in self.home.rglob("*") if not path.is_symlink() and path.is_file())
        return sum(path.stat().st_size for path in files) / 2**20


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> Iterator[Job]:
    """Twelve clips of 1 MiB, four to a shard."""
    world = make_world(tmp_path, clips=0, model=tiny_model)
    tree = yaml.safe_load(world.recipe.read_text())
    tree["source"] = {"kind": "hf", "path": REPOSITORY}
    tree["clip"].update(num_frames=5, fps=10)
    tree["shards"]["rows"] = 4
    world.recipe.write_text(yaml.safe_dump(tree))
    as_parquet(tmp_path / "set", [padded(tmp_path, number) for number in range(NUM_CLIPS)])
    with hub(tmp_path / "set") as address:
        yield Job(world, address)


def as_parquet(root: Path, videos: list[bytes]) -> None:
    """Six row groups."""
    rows = [{"bytes": data, "path": f"{number}.mp4"} for number, data in enumerate(videos)]
    captions = [f"caption {number}" for number in range(len(videos))]
    write_rows(root / "r.parquet", rows, captions, features=True, row_group_size=2)


def as_tar(root: Path, videos: list[bytes]) -> None:
    members: list[tuple[str, bytes]] = []
    for number, data in enumerate(videos):
        members += [(f"{number}.mp4", data), (f"{number}.txt", b"caption %d" % number)]
    write_tar(root / "r.tar", members)


def as_folder(root: Path, videos: list[bytes]) -> None:
    """And metadata that names a video too many."""
    (root / "clips").mkdir(parents=True)
    for number, data in enumerate(videos):
        (root / f"clips/{number}.mp4").write_bytes(data)
    names = [*(f"{number}.mp4" for number in range(len(videos))), "gone.mp4", "."]
    write_csv(root / "clips/metadata.csv", [{"file_name": n, "caption": n} for n in names])


def padded(folder: Path, number: int) -> bytes:
    """A clip that ends with 1 MiB which players skip and nothing compresses."""
    space = (PADDING + 8).to_bytes(4, "big") + b"free" + os.urandom(PADDING)
    return clip_bytes(folder, number) + space


def test_streaming_passes_once_over_the_set_and_then_reads_what_a_shard_needs(job: Job) -> None:
    planned, filled, again = job.run(([STREAM], PLAN), ([STREAM], 1), ([STREAM], PLAN))
    assert [planned[0], filled[0], again[0]] == [""] * 3
    assert NUM_CLIPS < planned[1] < NUM_CLIPS * 1.2
    assert 4 < filled[1] < 8
    assert again[1] < 1, "unchanged clips are not read again"
    store = ShardStore(job.world.shards)
    plan = store.read_plan()
    assert plan is not None
    assert [row.state for row in ledger(store, plan)] == ["pending"] * NUM_CLIPS
    assert job.kept_mib() < 1


@pytest.mark.parametrize("write", [as_tar, as_folder])
def test_other_forms_are_streamed_as_sparingly(
    job: Job, write: Callable[[Path, list[bytes]], None], tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "set")
    write(tmp_path / "set", [padded(tmp_path, number) for number in range(NUM_CLIPS)])
    planned, filled, again = job.run(([STREAM], PLAN), ([STREAM], 1), ([STREAM], PLAN))
    assert [planned[0], filled[0], again[0]] == [""] * 3
    assert NUM_CLIPS < planned[1] < NUM_CLIPS * 1.4
    assert 4 < filled[1] < 7
    assert again[1] < 3
    reasons = [row.reason for row in read_rows(ShardStore(job.world.shards))]
    others = ["missing_file", "not_a_file"] if write is as_folder else []
    assert reasons == [""] * NUM_CLIPS + others


def test_a_download_is_kept_and_needs_no_network_again(job: Job) -> None:
    ((error, sent_mib),) = job.run(([], PLAN))
    assert error == "" and NUM_CLIPS <= sent_mib < NUM_CLIPS + 1
    assert job.kept_mib() >= NUM_CLIPS
    before = (job.world.shards / "manifest.parquet").read_bytes()
    offline = job.run(([], PLAN), ([STREAM], PLAN), HF_ENDPOINT=NOWHERE, HF_HUB_OFFLINE="1")
    unreachable = job.run(([], PLAN), HF_ENDPOINT=NOWHERE)
    assert [*offline, *unreachable] == [["", 0]] * 3
    assert (job.world.shards / "manifest.parquet").read_bytes() == before


def test_what_the_hub_has_not_is_told(job: Job) -> None:
    mistakes = {
        "source.path=someone/none": "no data set on the Hub that you may read",
        "source.revision=v9": "source.revision=v9: the data set someone/clips on the Hub has none",
        "source.split=test": "source.split=test: someone/clips has the splits train",
    }
    steps = [([key, *stream], PLAN) for key in mistakes for stream in ([], [STREAM])]
    errors = [error for error, _ in job.run(*steps)]
    assert [m in e for m, e in zip(_twice(mistakes.values()), errors, strict=True)] == [True] * 6
    steps = [(stream, PLAN) for stream in ([], [STREAM])]
    elsewhere = str(job.world.root / "elsewhere")
    for error, _ in job.run(*steps, HF_ENDPOINT=NOWHERE, HF_HOME=elsewhere):
        assert "which holds no copy of it (the Hub was not reached" in error
        assert "`hf download --repo-type dataset someone/clips --revision main`" in error


def _twice(values: Any) -> list[str]:
    return [value for value in values for _ in range(2)]
