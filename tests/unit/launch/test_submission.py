# SPDX-License-Identifier: Apache-2.0
"""Tests of submitting: what is written, what Slurm is told, and what is refused."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from fastvideo.config.recipe import Recipe
from fastvideo.errors import UserError
from fastvideo.launch import Job, dry_run, submit
from fastvideo.launch.folder import JobFolder
from fastvideo.launch.record import Record
from fastvideo.launch.stages import Verb
from fastvideo.launch.states import State
from fastvideo.launch.submission import VERBS
from tests.hostile_strings import HOSTILE
from tests.stand_ins import run_script
from tests.submitting import Site
from tests.tiny_world import World, fastvideo

ROOT = Path(__file__).parents[3]
NEEDED = """
pydantic pydantic_core annotated_types typing_extensions typing_inspection
yaml _yaml submitit cloudpickle tqdm
"""
"""What a login node has, with what that needs itself."""


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("submitter", ["sbatch", "submitit"])
def test_a_pipeline_is_five_jobs_that_wait_for_each_other(site: Site, submitter: str) -> None:
    cluster = site.cluster(submitter=submitter, preprocess={"tasks": 3, "parallelism": 2})
    begin_s = time.time()
    job = submit("run", "recipe.yaml", cluster, overrides=["train.steps=7"], flags=["--force"])
    record = job.record
    assert {part.name: part.slurm_id for part in record.parts} == {
        "manifest": "101",
        "preprocess": "102",
        "train": "103",
        "export": "104",
        "generate": "105",
    }
    texts = site.stand_ins.submitted()
    waits = [re.findall("--dependency=afterok:([0-9:]+)", text) for text in texts]
    assert waits == [[], ["101"], ["102"], ["103"], ["104"]]
    assert ["--kill-on-invalid-dep=yes" in text for text in texts] == [False, *[True] * 4]
    assert "#SBATCH --array=0-2%2" in texts[1]
    assert (record.verb, record.executor, record.submitter) == ("run", "slurm", submitter)
    assert begin_s <= record.created <= time.time()
    again = ("fastvideo", "run", "recipe.yaml", "train.steps=7", "--cluster", str(cluster))
    assert record.command == (*again, "--force")
    assert Recipe.load(job.folder.recipe).train.steps == 7


def test_a_jobs_folder_is_its_users_alone_and_other_folders_stay_as_they_are(site: Site) -> None:
    run_dir = site.root / "run"
    run_dir.mkdir(mode=0o751)
    job = submit("train", "recipe.yaml", site.cluster())
    assert job.folder.root.stat().st_mode & 0o777 == 0o700
    assert run_dir.stat().st_mode & 0o777 == 0o751
    assert job.folder.root.parent.stat().st_mode & 0o777 == 0o777 & ~_umask()
    assert re.fullmatch(r"\d{8}-\d{6}-train-[0-9a-f]{4}", job.folder.name)


def _umask() -> int:
    old = os.umask(0o22)
    os.umask(old)
    return old


def test_jobs_do_not_inherit_the_job_they_are_submitted_from(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "FASTVIDEO_JOB_DIR", "SLURM_CONF", "MINE"):
        monkeypatch.setenv(name, "7")
    for submitter in ("sbatch", "submitit"):
        flags = ["--force"]
        submit("train", "recipe.yaml", site.cluster(submitter=submitter), flags=flags)
    for number in (1, 2):
        given = site.stand_ins.submitted_with(number)
        assert given["MINE"] == given["SLURM_CONF"] == "7"
        assert {name for name in given if name.startswith(("SLURM_", "FASTVIDEO_"))} == {
            "SLURM_CONF"
        }
    assert os.environ["SLURM_JOB_ID"] == "7", "and the environment here stays as it was"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("submitter", ["sbatch", "submitit", "local"])
def test_a_dry_run_writes_nothing_and_prints_what_would_be_submitted(
    site: Site, verb: Verb, submitter: str
) -> None:
    slurm = submitter != "local"
    cluster = (
        site.cluster(submitter=submitter, time_minutes=9) if slurm else site.root / "here.yaml"
    )
    if not slurm:
        cluster.write_text("executor: local\n")
    before = sorted(site.root.rglob("*"))
    done = site.cli(verb, "--cluster", cluster, "--dry-run", "train.steps=7")
    assert done.code == 0, done.err
    (site.root / "stdout.txt").unlink()
    (site.root / "stderr.txt").unlink()
    log = site.root / "bin/scontrol.calls"
    log.unlink(missing_ok=True)
    (site.root / "bin/scontrol.environment").unlink(missing_ok=True)
    assert sorted(site.root.rglob("*")) == before
    if not slurm:
        assert f"{verb if verb != 'run' else 'train'} " in done.out
        return
    job = submit(verb, "recipe.yaml", cluster, overrides=["train.steps=7"])
    texts = [
        f"# {job.folder.script(part.name)}\n{job.folder.script(part.name).read_text()}"
        for part in job.record.parts
    ]
    assert without_names(done.out) == without_names("\n".join(texts))
    assert without_names(texts[0]).count("# JOB") == 1


def without_names(text: str) -> str:
    text = re.sub(r"\S*/run/jobs/[0-9]{8}-[0-9]{6}-[a-z]+-[0-9a-f]{4}", "JOB", text)
    return re.sub(r"afterok:\S+$|'afterok:.*'$", "afterok:ID", text, flags=re.M)


def test_shards_that_are_missing_are_dealt_out(site: Site) -> None:
    cluster = site.cluster(preprocess={"shards_per_task": 2, "parallelism": 4})
    job = submit("preprocess", "recipe.yaml", cluster, flags=["--shards", "0-3,7"])
    (text,) = site.stand_ins.submitted()
    assert job.record.parts[0].tasks is None and "--shards 0-3,7" in text


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("submitter", ["sbatch", "submitit"])
def test_a_part_that_slurm_refuses_takes_the_others_back(site: Site, submitter: str) -> None:
    site.stand_ins.sbatch(refuses=3)
    done = site.cli("run", "--cluster", site.cluster(submitter=submitter))
    assert done.code == 2
    assert "train: Slurm refuses it" in done.err and "Invalid qos specification" in done.err
    assert "parts that were are cancelled" in done.err
    assert site.stand_ins.asked("scancel") == ["101 102"]
    assert len(site.stand_ins.submitted()) == 3
    (folder,) = site.jobs()
    site.accounting((101, None, "CANCELLED by 1000"), *((102, i, "CANCELLED") for i in range(8)))
    status = Job(folder).status()
    assert status.is_final and status.state == State.CANCELLED
    assert status.parts["train"].tasks[0].reason == "not submitted"
    assert submit("run", "recipe.yaml", site.cluster()).record.parts[0].slurm_id == "104"


@pytest.mark.parametrize("submitter", ["sbatch", "submitit"])
def test_without_slurm_the_missing_command_is_named(
    site: Site, submitter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"scontrol: is not on PATH.*executor: local"):
        submit("train", "recipe.yaml", site.cluster(submitter=submitter))


def test_what_a_sites_own_sbatch_says_around_the_id_is_no_id(site: Site) -> None:
    site.stand_ins.answer("sbatch", "You have 7 hours left.\n4711;alpha\nGood luck\n")
    job = submit("train", "recipe.yaml", site.cluster())
    assert job.record.parts[0].slurm_id == "4711"


@pytest.mark.parametrize("submitter", ["sbatch", "submitit"])
def test_the_same_is_not_submitted_twice_unless_forced(site: Site, submitter: str) -> None:
    cluster = site.cluster(submitter=submitter)
    assert site.cli("train", "--cluster", cluster).code == 0
    site.accounting((101, None, "RUNNING"))
    site.tools.queue("101|RUNNING|0|0|n1|0:05|None")
    for verb in ("train", "run"):
        done = site.cli(verb, "--cluster", cluster)
        assert done.code == 2 and "train of this run is under way" in done.err, done.err
        assert "fastvideo cancel" in done.err and "--force" in done.err
    assert len(site.jobs()) == 1
    assert site.cli("export", "--cluster", cluster).code == 0, "which waits for nobody"
    assert site.cli("train", "--cluster", cluster, "--force").code == 0
    assert len(site.jobs()) == 3


def test_a_verb_that_knows_no_force_is_not_told_to_use_it(site: Site) -> None:
    cluster = site.cluster()
    submit("preprocess", "recipe.yaml", cluster)
    site.tools.queue("101|RUNNING|0|0|n1|0:05|None")
    done = site.cli("preprocess", "--cluster", cluster)
    assert done.code == 2 and "end it with fastvideo cancel\n" in done.err, done.err


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("preprocess", ["--force"]),
        ("run", ["--shards", "0"]),
        ("export", ["--ema"]),
        ("train", ["--every=0/2"]),
    ],
)
def test_options_of_other_verbs_are_refused(site: Site, verb: Verb, flags: list[str]) -> None:
    option = flags[0].partition("=")[0]
    with pytest.raises(UserError, match=rf"flags \['{option}'\]: are not for {verb}"):
        submit(verb, "recipe.yaml", site.cluster(), flags=flags)
    assert not site.jobs()


@pytest.mark.parametrize(
    "options", [["--shards", "5-3"], ["--every", "2/2"], ["--shards", "1", "--manifest-only"]]
)
def test_a_wrong_choice_of_shards_is_refused_before_it_waits(
    site: Site, options: list[str]
) -> None:
    done = site.cli("preprocess", "--cluster", site.cluster(), *options)
    assert done.code == 2 and options[0] in done.err, done.err
    assert not site.jobs()


@pytest.mark.parametrize(
    ("keys", "overrides", "says"),
    [
        ({"time_minutes": 2, "signal_seconds": 120}, [], r"signal_seconds=120.*time_minutes=2"),
        ({}, ["train.device=cuda"], r"train\.device=cuda.*gpus_per_node"),
        ({"gpus_per_node": 2}, ["parallel.processes=4"], r"parallel\.processes=4.*2 GPUs"),
        ({"work_dir": "here"}, [], r"work_dir=here: is not absolute"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    site: Site, keys: dict[str, Any], overrides: list[str], says: str
) -> None:
    for ask in (submit, dry_run):
        with pytest.raises(UserError, match=says):
            ask("train", "recipe.yaml", site.cluster(**keys), overrides=overrides)
    assert not site.jobs() and not site.stand_ins.submitted()


def test_a_local_job_that_cannot_start_is_over(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cluster = site.root / "local.yaml"
    cluster.write_text("executor: local\ngpus_per_node: 2\n")
    with pytest.raises(UserError, match="gpus_per_node=2"):
        submit("train", "recipe.yaml", cluster)
    (folder,) = site.jobs()
    status = Job(folder).status()
    assert status.is_final and status.parts["train"].tasks[0].reason == "not submitted"


# ---------------------------------------------------------------- hostile strings


@pytest.mark.parametrize("submitter", ["sbatch", "submitit"])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_of_the_command_line_neither_inject_nor_break(
    site: Site, text: str, submitter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = site.root / "places" / text
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    tree = yaml.safe_load(site.world.recipe.read_text())
    recipe = place / f"{text}.yaml"
    recipe.write_text(yaml.safe_dump({**tree, "run_dir": text}))
    quoted = f"model.path={json.dumps(text + '.model')}"
    cluster = site.cluster(submitter=submitter)
    done = fastvideo("train", World(site.root, recipe), quoted, "--cluster", str(cluster))
    injected = [path for path in site.root.rglob("*") if path.name in ("injected", "injected;")]
    assert injected == []
    if done.code == 2:
        because = {"\\": "rename the folder", "~": "no such user", "%": "submitit takes no %"}
        assert any(mark in text and told in done.err for mark, told in because.items()), done.err
        assert not site.stand_ins.submitted()
        return
    assert done.code == 0, done.err
    (folder,) = (place / text / "jobs").iterdir()
    record = Record.read(JobFolder(folder))
    assert record is not None
    assert record.command[2:4] == (str(recipe), quoted)
    assert Recipe.load(folder / "recipe.yaml").model.path == f"{text}.model"
    (given,) = site.stand_ins.submitted()
    variables = {"SLURM_NTASKS": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
    variables["SLURM_LOCALID"] = "0"
    variables["SLURM_JOB_ID"] = "101"
    ran = run_script(given, site.stand_ins, cwd=place, environment=variables)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (step,) = site.stand_ins.recorded()
    verb = [sys.executable, "-P", "-m", "fastvideo", "train", f"{folder}/recipe.yaml"]
    assert step["argv"][-len(verb) - 1 :] == ["-", *verb]  # after what srun and the shield take
    assert step["environment"]["FASTVIDEO_JOB_DIR"] == f"{folder}/train"
    assert step["cwd"] == str(place)


# ---------------------------------------------------------------- login nodes


@pytest.fixture
def login(site: Site, tmp_path: Path) -> dict[str, str]:
    """An environment in which Python finds what a login node has, and nothing else."""
    packages = Path(pydantic.__file__).parents[1]
    (tmp_path / "packages").mkdir()
    for name in NEEDED.split():
        (found,) = (path for path in packages.iterdir() if path.name in (name, f"{name}.py"))
        (tmp_path / "packages" / found.name).symlink_to(found)
    return {**os.environ, "PYTHONPATH": f"{tmp_path / 'packages'}:{ROOT}"}


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_login_node_needs_no_torch_nor_anything_of_it(
    site: Site, login: dict[str, str], task: str
) -> None:
    (site.root / "first.png").write_bytes(b"nobody here can read this")
    prompts = [{"caption": "a dog", **({"image_path": "first.png"} if task == "i2v" else {})}]
    (site.root / "prompts.json").write_text(json.dumps(prompts))
    clusters = [site.cluster(name, submitter=name) for name in ("sbatch", "submitit")]
    commands = [
        [
            verb,
            *["recipe.yaml", f"model.task={task}", "--cluster", str(cluster)],
            *(["--force"] if verb == "run" else []),  # beside those before
        ]
        for verb, cluster in zip((*VERBS, "run"), 3 * clusters, strict=True)
    ]
    for command in (*commands, ["status", "recipe.yaml"], ["cancel", "recipe.yaml"]):
        # Without `site` the packages of this environment are not found.
        done = subprocess.run(
            [sys.executable, "-S", "-m", "fastvideo", *command],
            env=login,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, (command, done.stderr)
    assert len(site.jobs()) == len(commands)


def test_first_images_that_are_not_there_are_missed_on_login_nodes_too(
    site: Site, login: dict[str, str]
) -> None:
    (site.root / "prompts.json").write_text('[{"caption": "a dog", "image_path": "no.png"}]')
    command = ["run", "recipe.yaml", "model.task=i2v", "--cluster", str(site.cluster())]
    start = [sys.executable, "-S", "-m", "fastvideo", *command]
    done = subprocess.run(start, env=login, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no.png" in done.stderr, done.stderr
