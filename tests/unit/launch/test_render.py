# SPDX-License-Identifier: Apache-2.0
"""Tests of the text for sbatch, run by a real shell with strict stand-ins for Slurm's commands."""

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastvideo.config.cluster import Cluster
from fastvideo.errors import UserError
from fastvideo.launch.job import Array, JobSpec
from fastvideo.launch.local_render import local_part
from fastvideo.launch.render import render
from tests import stand_ins
from tests.hostile_strings import HOSTILE
from tests.stand_ins import StandIns, run_script

ROOT = Path(__file__).parents[3]
BROKEN = ("a\nb", "a\n#SBATCH --uid=0", "a\rb", "a\tb", "a\x1bb", "", "a\0b")
"""What cannot be told to Slurm in a line."""


@pytest.fixture
def tools(tmp_path: Path) -> StandIns:
    found = stand_ins.make(tmp_path / "bin")
    found.recorder()
    return found


def spec(tmp_path: Path, **changes: Any) -> JobSpec:
    cluster = changes.pop("cluster", Cluster(executor="slurm"))
    values: dict[str, Any] = {
        "name": "train",
        "command": ("train", "recipe.yaml"),
        "resources": cluster.resources("train"),
        "cluster": cluster,
        "folder": tmp_path / "job",
        "work_dir": tmp_path,
    }
    return JobSpec(**{**values, **changes})


def run(text: str, tools: StandIns, tmp_path: Path, **variables: str) -> dict[str, Any]:
    done = run_script(text, tools, cwd=tmp_path, environment=variables)
    assert done.returncode == 0, done.stderr
    (seen,) = tools.recorded()
    assert not (tmp_path / "injected").exists()
    return seen


def given(seen: Mapping[str, Any], prefix: str = "FASTVIDEO_") -> dict[str, str]:
    return {k: v for k, v in seen["environment"].items() if k.startswith(prefix)}


# ---------------------------------------------------------------- the step


def test_a_step_is_the_verb_with_what_a_node_needs_to_know(tmp_path: Path, tools: StandIns) -> None:
    text = render(spec(tmp_path, nodes=2)).script
    seen = run(text, tools, tmp_path, SLURM_JOB_NUM_NODES="2", SLURM_RESTART_COUNT="3")
    assert seen["argv"] == ["train", "recipe.yaml"]
    assert given(seen) == {
        "FASTVIDEO_JOB_DIR": str(tmp_path / "job"),
        "FASTVIDEO_TASK": "0",
        "FASTVIDEO_RESTART": "3",
        "FASTVIDEO_NODES": "2",
        "FASTVIDEO_NODE_RANK": "$SLURM_PROCID",
        "FASTVIDEO_RENDEZVOUS": "n1:20346",
        "FASTVIDEO_LAUNCH_ID": "1234-3",
    }
    (srun,) = tools.started()
    assert srun["flags"] == [
        ["--kill-on-bad-exit", "1"],
        ["--wait", "60"],
        ["--export", "ALL"],
        ["--cpus-per-task", "4"],
    ]


def test_ports_differ_between_jobs_and_restarts(tmp_path: Path, tools: StandIns) -> None:
    text = render(spec(tmp_path)).script
    ports = set()
    for job in range(20):
        for restart in range(5):
            variables = {"SLURM_JOB_ID": str(9_999_990 + job), "SLURM_RESTART_COUNT": str(restart)}
            run_script(text, tools, cwd=tmp_path, environment=variables)
    for seen in tools.recorded():
        ports.add(int(seen["environment"]["FASTVIDEO_RENDEZVOUS"].partition(":")[2]))
    assert len(ports) == 100
    assert min(ports) >= 20_000 and max(ports) < 32_768


def test_a_task_of_an_array_gets_its_own_value(tmp_path: Path, tools: StandIns) -> None:
    array = Array("--shards", {3: "3-4,9", 12: "12"}, parallelism=1)
    rendered = render(spec(tmp_path, array=array))
    assert rendered.options["array"] == "3,12%1"
    variables = {"SLURM_ARRAY_JOB_ID": "1200", "SLURM_ARRAY_TASK_ID": "3"}
    seen = run(rendered.script, tools, tmp_path, **variables)
    assert seen["argv"] == ["train", "recipe.yaml", "--shards", "3-4,9"]
    assert seen["environment"]["FASTVIDEO_TASK"] == "3"


def test_what_the_cluster_sets_reaches_the_step(tmp_path: Path, tools: StandIns) -> None:
    setup = tmp_path / "set up.sh"
    setup.write_text("unset_is_fine=$nothing\nexport FROM_SETUP=yes\n")
    cluster = Cluster(
        executor="slurm",
        threads=3,
        interface="ib0",
        cache_dir="/tmp/cache-%u-%j",
        environment={"NCCL_DEBUG": "INFO"},
        setup=setup,
    )
    text = render(spec(tmp_path, cluster=cluster)).script
    seen = run(text, tools, tmp_path, USER="me")["environment"]
    assert seen["OMP_NUM_THREADS"] == "3"
    assert seen["NCCL_SOCKET_IFNAME"] == seen["GLOO_SOCKET_IFNAME"] == "ib0"
    assert seen["TRITON_CACHE_DIR"] == "/tmp/cache-me-1234/triton"
    assert seen["NCCL_DEBUG"] == "INFO" and seen["FROM_SETUP"] == "yes"


def test_the_steps_exit_code_is_that_of_the_job(tmp_path: Path, tools: StandIns) -> None:
    tools.recorder(more="sys.exit(2)")
    done = run_script(render(spec(tmp_path)).script, tools, cwd=tmp_path, environment={})
    assert done.returncode == 2
    assert tools.asked("scontrol") == []


# ---------------------------------------------------------------- queued again

NOTE = """
note = os.environ["FASTVIDEO_JOB_DIR"] + "/requeue/" + os.environ["FASTVIDEO_TASK"]
os.makedirs(os.path.dirname(note), exist_ok=True)
open(note, "w").close()
sys.exit(75)
"""


@pytest.mark.parametrize("array", [None, Array("--every", {3: "3/8"})])
def test_a_job_whose_step_asks_for_it_is_queued_again(
    tmp_path: Path, tools: StandIns, array: Array | None
) -> None:
    tools.recorder(more=NOTE)
    of_array = {"SLURM_ARRAY_JOB_ID": "1200", "SLURM_ARRAY_TASK_ID": "3"} if array else {}
    variables = {**of_array, "SLURM_RESTART_COUNT": "1"}
    text = render(spec(tmp_path, array=array)).script
    done = run_script(text, tools, cwd=tmp_path, environment=variables)
    assert tools.asked("scontrol") == [f"requeue {'1200_3' if array else '1234'}"]
    assert (tmp_path / f"job/requeue/{3 if array else 0}.1").exists()
    assert not (tmp_path / f"job/requeue/{3 if array else 0}").exists()
    assert done.returncode == 75


@pytest.mark.parametrize("state", ["COMPLETING", "", "CANCELLED"])
def test_a_job_that_was_cancelled_or_is_queued_again_anyway_is_left_alone(
    tmp_path: Path, tools: StandIns, state: str
) -> None:
    tools.recorder(more=NOTE)
    tools.answer("squeue", f"{state}\n")
    done = run_script(render(spec(tmp_path)).script, tools, cwd=tmp_path, environment={})
    assert tools.asked("squeue") == ["-h -o %T -j 1234"]
    assert tools.asked("scontrol") == []
    assert done.returncode == 75


# ---------------------------------------------------------------- options


def test_options_are_those_of_the_cluster(tmp_path: Path) -> None:
    cluster = Cluster(
        executor="slurm",
        nodes=2,
        gpus_per_node=8,
        memory_gib=100,
        time_minutes=90,
        partition="gpu",
        account="mine",
        qos="high",
        options={"constraint": "a100&nvlink", "exclusive": None},
    )
    made = spec(tmp_path, cluster=cluster, nodes=2, label="train run")
    assert render(made, after=["7", "8"]).options == {
        "job-name": "train run",
        "chdir": str(tmp_path),
        "output": f"{tmp_path}/job/log.txt",
        "open-mode": "append",
        "nodes": "2",
        "ntasks-per-node": "1",
        "cpus-per-task": "4",
        "signal": "USR2@120",
        "requeue": None,
        "gpus-per-node": "8",
        "mem": "100G",
        "time": "90",
        "partition": "gpu",
        "account": "mine",
        "qos": "high",
        "dependency": "afterok:7:8",
        "kill-on-invalid-dep": "yes",
        "constraint": "a100&nvlink",
        "exclusive": None,
    }


def test_gpus_may_be_asked_for_by_gres(tmp_path: Path) -> None:
    cluster = Cluster(executor="slurm", gpus_per_node=4, gpu_option="gres")
    options = render(spec(tmp_path, cluster=cluster)).options
    assert options["gres"] == "gpu:4" and "gpus-per-node" not in options


def test_the_text_is_a_clean_script(tmp_path: Path) -> None:
    cluster = Cluster(executor="slurm", cache_dir="/tmp/%u", environment={"A": "b c"})
    array = Array("--every", {0: "0/2", 1: "1/2"})
    text = render(spec(tmp_path, cluster=cluster, array=array)).script
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.stdout == done.stderr == ""


# ---------------------------------------------------------------- hostile strings


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_arrive_as_they_are(tmp_path: Path, tools: StandIns, text: str) -> None:
    folder = tmp_path / "jobs" / text.replace("/", "_")
    cluster = Cluster(
        executor="slurm",
        partition=text,
        account=text,
        qos=text,
        interface=text,
        threads=1,
        cache_dir=f"/tmp/{text.replace('%', '')}",
        environment={"VALUE": text},
        options={"comment": text},
    )
    made = spec(
        tmp_path,
        cluster=cluster,
        folder=folder,
        label=text,
        command=("train", text, f"model.path={text}"),
        array=Array("--shards", {0: text}),
    )
    try:
        rendered = render(made)
    except UserError as error:
        assert "\\" in text and "backslash" in str(error)
        rendered = render(spec(tmp_path, cluster=cluster, command=made.command, array=made.array))
    of_array = {"SLURM_ARRAY_JOB_ID": "1200", "SLURM_ARRAY_TASK_ID": "0"}
    seen = run(rendered.script, tools, tmp_path, **of_array)
    assert seen["argv"] == ["train", text, f"model.path={text}", "--shards", text]
    assert seen["environment"]["VALUE"] == text
    assert seen["environment"]["NCCL_SOCKET_IFNAME"] == text
    assert seen["environment"]["TRITON_CACHE_DIR"] == f"/tmp/{text.replace('%', '')}/triton"
    read = dict(map(read_option, re.findall(r"^#SBATCH (.*)$", rendered.script, re.M)))
    assert read["comment"] == read["partition"] == read["account"] == read["qos"] == text
    part = local_part(made)
    assert part.argv[0] == ("fastvideo", *seen["argv"])
    assert part.environment["VALUE"] == text


def read_option(line: str) -> tuple[str, str | None]:
    """As Slurm reads it: quotes as in a shell, no expansion."""
    (word,) = shlex.split(line)
    name, equals, value = word.removeprefix("--").partition("=")
    return name, value if equals else None


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("key", ["partition", "account", "qos", "interface", "options"])
def test_what_breaks_a_line_is_refused(text: str, key: str) -> None:
    value: Any = {"comment": text} if key == "options" else text
    with pytest.raises(UserError, match=key):
        Cluster.parse({"executor": "slurm", key: value}, origin="cluster.yaml")


@pytest.mark.parametrize("name", ["a b", "", "A;b", "FASTVIDEO_TASK", "1A", "a\n", "SLURM_JOB_ID"])
def test_names_of_variables_are_names(name: str) -> None:
    with pytest.raises(UserError, match="environment"):
        Cluster.parse({"environment": {name: "x"}}, origin="cluster.yaml")


@pytest.mark.parametrize("name", ["array", "job-name", "Comment", "x y", "output", "-x", "a=b"])
def test_options_that_are_ours_or_none_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="options"):
        Cluster.parse({"executor": "slurm", "options": {name: "x"}}, origin="cluster.yaml")


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\x1bb"])
def test_paths_that_slurm_cannot_take_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="rename"):
        render(spec(tmp_path, folder=tmp_path / name))


# ---------------------------------------------------------------- containers


def cluster_in(kind: str, **changes: Any) -> Cluster:
    container = {"kind": kind, "image": "my image.sif", "binds": ["/data:/mnt:ro"]}
    tree = {"executor": "slurm", "gpus_per_node": 2, "container": container, **changes}
    return Cluster.parse(tree, origin="cluster.yaml")


@pytest.mark.parametrize("kind", ["apptainer", "pyxis", "docker"])
def test_verbs_run_in_the_container_and_slurm_outside(
    tmp_path: Path, tools: StandIns, kind: str
) -> None:
    tools.recorder(more=NOTE)
    more = {"options": {"exclusive": None}, "environment": {"NCCL_DEBUG": "INFO"}}
    made = spec(tmp_path, cluster=cluster_in(kind, **more), binds=(tmp_path / "run s",))
    variables = {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_PROCID": "0"}
    done = run_script(render(made).script, tools, cwd=tmp_path, environment=variables)
    assert done.returncode == 75, done.stderr
    (seen,) = tools.recorded()
    assert seen["argv"] == ["train", "recipe.yaml"]
    assert tools.asked("scontrol") == ["requeue 1234"]
    *_, entered = tools.started()
    flags = [tuple(flag) if isinstance(flag, list) else flag for flag in entered["flags"]]
    folder = f"{tmp_path}/run s"
    if kind == "apptainer":
        binds = [("--bind", "/data:/mnt:ro")]
        assert flags == ["exec", "--nv", *binds, ("--pwd", str(tmp_path))]
        assert entered["image"] == ["my image.sif"]
    elif kind == "pyxis":
        wanted = dict(flag for flag in flags if isinstance(flag, tuple))
        assert wanted["--container-mounts"] == f"{folder}:{folder},/data:/mnt:ro"
        assert wanted["--container-image"] == "my image.sif"
        assert "NCCL_DEBUG" in wanted["--container-env"].split(",")
    else:
        assert ("--volume", f"{folder}:{folder}") in flags
        assert seen["environment"]["NCCL_DEBUG"] == "INFO"
        assert seen["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert seen["environment"]["FASTVIDEO_NODE_RANK"] == "$SLURM_PROCID"
        assert seen["environment"]["SLURM_PROCID"] == "0"
    assert seen["environment"]["PYTHONNOUSERSITE"] == "1"


def test_folders_of_the_recipe_are_shown_to_apptainer_but_for_tmp(tmp_path: Path) -> None:
    made = spec(
        tmp_path, cluster=cluster_in("apptainer"), binds=(Path("/scratch/x"), Path("/tmp/y"))
    )
    assert "--bind /scratch/x --bind /data:/mnt:ro --pwd" in render(made).body


def test_caches_on_the_nodes_disk_are_shown_too(tmp_path: Path) -> None:
    made = spec(tmp_path, cluster=cluster_in("apptainer", cache_dir="/local/%u/x"))
    assert "--bind /local --bind" in render(made).body


@pytest.mark.parametrize("kind", ["apptainer", "pyxis"])
def test_a_cpu_job_asks_for_no_gpu_in_the_container(tmp_path: Path, kind: str) -> None:
    cluster = cluster_in(kind, gpus_per_node=0)
    assert "--nv" not in render(spec(tmp_path, cluster=cluster)).body


def test_a_folder_that_cannot_be_mounted_is_named(tmp_path: Path) -> None:
    made = spec(tmp_path, cluster=cluster_in("pyxis"), binds=(Path("/data/a:b"),))
    with pytest.raises(UserError, match=r"/data/a:b.*':'.*rename"):
        render(made)


def test_docker_does_not_show_other_jobs_gpus_unasked() -> None:
    with pytest.raises(UserError, match="exclusive"):
        cluster_in("docker")


# ---------------------------------------------------------------- the templates

TEMPLATES = {
    "train.sbatch": ("train", None),
    "generate.sbatch": ("generate", None),
    "preprocess.sbatch": ("preprocess", Array("--every", {2: "2/4"})),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_runs_what_the_renderer_does(tmp_path: Path, tools: StandIns, name: str) -> None:
    verb, array = TEMPLATES[name]
    variables = {"SLURM_RESTART_COUNT": "1"}
    job = "1234"
    if array:
        job = "1200"
        more = {"SLURM_ARRAY_JOB_ID": "1200", "SLURM_ARRAY_TASK_ID": "2"}
        variables |= {**more, "SLURM_ARRAY_TASK_COUNT": "4"}
    command = (verb, "re cipe.yaml", "train.steps=2")
    cluster = Cluster(executor="slurm", cpus_per_task=8)
    folder = tmp_path / f"slurm-{job}"
    made = spec(tmp_path, cluster=cluster, folder=folder, command=command, array=array)
    run_script(render(made).script, tools, cwd=tmp_path, environment=variables)
    text = (ROOT / "slurm" / name).read_text()
    call = f"set -- {shlex.join(command[1:])}\n"
    done = run_script(call + text, tools, cwd=tmp_path, environment=variables)
    assert done.returncode == 0, done.stderr
    rendered, template = tools.recorded()
    assert template["argv"] == rendered["argv"]
    assert template["cwd"] == rendered["cwd"]
    own = given(template)
    # What only training reads is left out elsewhere.
    assert own.items() <= given(rendered).items()
    assert verb != "train" or own == given(rendered)
    assert tools.started()[0] == tools.started()[1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_queues_again_as_the_renderer_does(
    tmp_path: Path, tools: StandIns, name: str
) -> None:
    tools.recorder(more=NOTE)
    text = (ROOT / "slurm" / name).read_text()
    array = {
        "SLURM_ARRAY_JOB_ID": "1200",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_ARRAY_TASK_COUNT": "4",
    }
    is_array = TEMPLATES[name][1] is not None
    done = run_script(
        "set -- recipe.yaml\n" + text, tools, cwd=tmp_path, environment=array if is_array else {}
    )
    assert done.returncode == 75, done.stderr
    assert tools.asked("scontrol") == [f"requeue {'1200_2' if is_array else '1234'}"]


@pytest.mark.parametrize("name", [*TEMPLATES, "pipeline.sh"])
def test_templates_are_short(name: str) -> None:
    assert len((ROOT / "slurm" / name).read_text().splitlines()) <= 30


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_may_run_verbs_in_a_container(
    tmp_path: Path, tools: StandIns, name: str
) -> None:
    variables = {"FASTVIDEO": "apptainer exec --nv --bind /data x.sif fastvideo"}
    text = "set -- recipe.yaml\n" + (ROOT / "slurm" / name).read_text()
    done = run_script(text, tools, cwd=tmp_path, environment=variables)
    assert done.returncode == 0, done.stderr
    assert [starter["name"] for starter in tools.started()] == ["srun", "apptainer"]
