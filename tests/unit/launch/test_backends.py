# SPDX-License-Identifier: Apache-2.0
"""sbatch, submitit and the local executor run the same: each is run for real, with a recorder."""

import pickletools
import re
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastvideo.config.cluster import Cluster
from fastvideo.launch import local, local_render, slurm
from fastvideo.launch.folder import JobFolder
from fastvideo.launch.job import Array, JobSpec
from tests import stand_ins
from tests.stand_ins import StandIns, run_script

OF_SLURM = ("FASTVIDEO_NODES", "FASTVIDEO_NODE_RANK", "FASTVIDEO_RENDEZVOUS", "FASTVIDEO_LAUNCH_ID")
"""What only nodes of Slurm need to know."""
OF_SHELLS = ("_", "SHLVL", "PWD", "OLDPWD")
HARD = 'it\'s $(touch injected) "größe" %j'


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    found = stand_ins.make(tmp_path / "bin")
    found.sbatch()
    found.recorder()
    monkeypatch.setenv("PATH", found.path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, "me")
    return found


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    root = tmp_path / "run" / "jobs" / "20261129-093000-run-1f3a"
    root.mkdir(parents=True)
    return JobFolder(root)


def parts(folder: JobFolder, tools: StandIns) -> list[JobSpec]:
    """A training on a node, and an array that waits for it."""
    cluster = Cluster(
        cpus_per_task=3, threads=2, cache_dir="/tmp/cache-%u", environment={"VALUE": HARD, "A": ""}
    )
    array = Array("--shards", {3: "3-4,9", 12: "12"}, parallelism=2)
    return [
        made(folder, tools, cluster, name="train"),
        made(folder, tools, cluster, name="preprocess", array=array, after=("train",)),
    ]


def made(
    folder: JobFolder, tools: StandIns, cluster: Cluster, *, name: str, **more: Any
) -> JobSpec:
    return JobSpec(
        name=name,
        command=(name, "recipe.yaml", f"model.path={HARD}"),
        resources=cluster.resources("train"),
        cluster=cluster,
        folder=folder.part(name).root,
        work_dir=folder.root.parents[1],
        label=f"{name} {HARD}",
        program=(str(tools.folder / "fastvideo"),),
        **more,
    )


def submit(folder: JobFolder, specs: list[JobSpec], *, through: str) -> dict[str, str]:
    ids: dict[str, str] = {}
    slurm.submit(folder, specs, through=through, submitted=ids.__setitem__)
    return ids


def run_as_slurm(text: str, spec: JobSpec, tools: StandIns, *, job: str) -> None:
    """Run each task of what sbatch was given, with the variables that Slurm sets."""
    for number in spec.array.values if spec.array else (None,):
        variables = {"SLURM_JOB_ID": job, "SLURM_NTASKS": "1", "SLURM_NODEID": "0"}
        variables |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        if number is not None:
            variables |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": str(number)}
            variables["SLURM_JOB_ID"] = str(int(job) + 1000 + number)
        given = tools.submitted_with(1)
        done = run_script(text, tools, cwd=spec.work_dir, environment={**given, **variables})
        assert done.returncode == 0, done.stdout + done.stderr


def run_here(folder: JobFolder, specs: list[JobSpec]) -> None:
    local.start(folder, parts=[local_render.local_part(spec) for spec in specs], gpus=())
    deadline_s = time.monotonic() + 60
    while not all(
        task.is_final for part in local.read_local(folder).values() for task in part.values()
    ):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def seen_by(tools: StandIns) -> list[dict[str, Any]]:
    """What was recorded since the last call."""
    found = tools.recorded()
    (tools.folder / "recorded.jsonl").unlink()
    return sorted(found, key=lambda seen: str(seen["argv"]))


def environment(seen: Mapping[str, Any], *, without: tuple[str, ...] = ()) -> dict[str, str]:
    return {
        name: value
        for name, value in seen["environment"].items()
        if name not in (*OF_SHELLS, *without) and not name.startswith(("SLURM", "SUBMITIT_"))
    }


def test_sbatch_submitit_and_local_run_the_same_commands_with_the_same_variables(
    folder: JobFolder, tools: StandIns
) -> None:
    specs = parts(folder, tools)
    ran = {}
    for through in ("sbatch", "submitit"):
        ids = submit(folder, specs, through=through)
        texts = tools.submitted()[-len(specs) :]
        for text, spec in zip(texts, specs, strict=True):
            run_as_slurm(text, spec, tools, job=ids[spec.name])
        ran[through] = seen_by(tools)
    run_here(folder, specs)
    ran["local"] = seen_by(tools)

    assert [seen["argv"] for seen in ran["sbatch"]] == [
        ["preprocess", "recipe.yaml", f"model.path={HARD}", "--shards", "12"],
        ["preprocess", "recipe.yaml", f"model.path={HARD}", "--shards", "3-4,9"],
        ["train", "recipe.yaml", f"model.path={HARD}"],
    ]
    for by_sbatch, by_submitit, here in zip(*ran.values(), strict=True):
        assert by_sbatch["argv"] == by_submitit["argv"] == here["argv"]
        assert by_sbatch["cwd"] == by_submitit["cwd"] == here["cwd"] == str(specs[0].work_dir)
        # Ports and the id of a launch follow from the id of the job.
        of_job = ("FASTVIDEO_RENDEZVOUS", "FASTVIDEO_LAUNCH_ID")
        assert environment(by_sbatch, without=of_job) == environment(by_submitit, without=of_job)
        assert {name for name in by_submitit["environment"] if name.startswith("SUBMITIT")} == {
            "SUBMITIT_EXECUTOR",
            "SUBMITIT_FOLDER",
        }
        without = (*OF_SLURM, "CUDA_VISIBLE_DEVICES")
        assert environment(by_sbatch, without=without) == environment(here, without=without)
        assert here["environment"].keys().isdisjoint(OF_SLURM)
        assert here["environment"]["VALUE"] == HARD and here["environment"]["A"] == ""
        assert here["environment"]["OMP_NUM_THREADS"] == "2"
    assert [seen["environment"]["FASTVIDEO_TASK"] for seen in ran["local"]] == ["12", "3", "0"]
    assert not list(folder.root.parents[2].rglob("injected"))


def options(text: str) -> list[tuple[str, str]]:
    """The ``#SBATCH`` lines, as Slurm reads them."""
    words = [shlex.split(line)[0] for line in re.findall(r"^#SBATCH --(.*)$", text, re.M)]
    return [(name, value) for name, _, value in (word.partition("=") for word in words)]


def test_submitit_asks_slurm_for_the_same_as_sbatch_and_for_nothing_more(
    folder: JobFolder, tools: StandIns
) -> None:
    for through in ("sbatch", "submitit"):
        submit(folder, parts(folder, tools), through=through)
    plain, plain_array, submitit, submitit_array = map(options, tools.submitted())
    assert dict(plain_array)["array"] == "3,12%2" and dict(plain)["job-name"] == f"train {HARD}"
    dependency = [("dependency", "afterok:101"), ("dependency", "afterok:103")]
    assert dependency[0] in plain_array and dependency[1] in submitit_array
    plain_array[plain_array.index(dependency[0])] = dependency[1]
    # submitit says twice how the log is opened, both times the same.
    again = [("open-mode", "append")]
    assert sorted(submitit) == sorted(plain + again)
    assert sorted(submitit_array) == sorted(plain_array + again)


def test_what_submitit_pickles_is_a_name_and_strings(folder: JobFolder, tools: StandIns) -> None:
    ids = submit(folder, parts(folder, tools), through="submitit")
    pickles = sorted(folder.root.rglob("*.pkl"))
    array = ids["preprocess"]
    jobs = (ids["train"], array, f"{array}_3", f"{array}_12")
    assert {path.name for path in pickles} == {f"{job}_submitted.pkl" for job in jobs}
    for path in pickles:
        found = list(pickletools.genops(path.read_bytes()))
        made_of = {opcode.name for opcode, _, _ in found}
        texts = {value for _, value, _ in found if isinstance(value, str)}
        assert not made_of & {"REDUCE", "GLOBAL", "INST", "OBJ", "BINBYTES", "SHORT_BINBYTES"}
        assert [opcode.name for opcode, _, _ in found].count("STACK_GLOBAL") == 2
        part = path.parents[1]
        fields = {"function", "args", "kwargs", "_result", "_done"}
        assert texts - fields - {"_timeout_min", "_timeout_countdown"} == {
            *("submitit.core.utils", "DelayedSubmission", "fastvideo.launch.batch", "run"),
            *(str(part), f"{part}.sbatch"),
        }
