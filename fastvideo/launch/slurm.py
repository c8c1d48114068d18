# SPDX-License-Identifier: Apache-2.0
"""Hands parts to Slurm, by sbatch or through submitit, and takes them back."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fastvideo.errors import Failed, UserError
from fastvideo.launch import batch
from fastvideo.launch.folder import JobFolder
from fastvideo.launch.job import JobSpec
from fastvideo.launch.render import Options, Rendered, render
from fastvideo.launch.slurm_tools import run
from fastvideo.launch.stages import USUAL_MAX_ARRAY

TIMEOUT_S = 60.0
"""How long Slurm's commands may take; a busy controller takes seconds."""
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
"""Variables of Slurm that say where it is, rather than which job this is."""
OURS = ("SLURM_", "SBATCH_", "FASTVIDEO_")
USUAL = ("account", "partition", "qos", "reservation", "constraint", "timelimit")
"""Options that users set once and for all, as ``SBATCH_ACCOUNT``."""

# submitit fills them in wherever they stand.
_MARKS_OF_SUBMITIT = re.compile("%[jtAa]")


def max_array_size() -> int:
    """``MaxArraySize`` of this cluster."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _call(["scontrol", "show", "config"]), re.M)
    return max(1, int(found[1])) if found else USUAL_MAX_ARRAY


def submit(
    folder: JobFolder,
    specs: Sequence[JobSpec],
    *,
    through: str,
    submitted: Callable[[str, str], None],
) -> None:
    """Hand over all parts, in order; none of them if one is refused.

    Args:
        folder: Of the job; the scripts are written there.
        specs: Parts, each after those it waits for.
        through: ``submitit`` or ``sbatch``.
        submitted: Told the name and the id of each part once Slurm has it.

    Raises:
        UserError: Slurm refuses a part; those before were taken back.
    """
    ids: dict[str, str] = {}
    hand_over = _through_submitit if through == "submitit" else _through_sbatch
    for spec in specs:
        try:
            rendered = render(spec, after=[ids[name] for name in spec.after])
            script = folder.script(spec.name)
            script.write_text(rendered.script, encoding="utf-8")
            spec.folder.mkdir(parents=True, exist_ok=True)
            ids[spec.name] = hand_over(spec, rendered, script)
        except BaseException as error:  # goes on
            _take_back(list(ids.values()), error)
            raise
        submitted(spec.name, ids[spec.name])


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs, with all tasks of arrays; those that are over stay as they are."""
    if ids:
        _call(["scancel", *ids])


def _take_back(ids: Sequence[str], error: BaseException) -> None:
    """Cancel what was submitted before ``error``, which is told if that fails."""
    try:
        cancel(ids)
    except (UserError, Failed) as failure:
        left = f"jobs {', '.join(ids)} were submitted and are still there: {failure}"
        error.args = (f"{error}; {left}",)


def dry_run(folder: JobFolder, specs: Sequence[JobSpec]) -> str:
    """What ``submit`` would write and hand over, part by part."""
    texts = []
    for spec in specs:
        rendered = render(spec, after=[f"<id of {name}>" for name in spec.after])
        texts.append(f"# {folder.script(spec.name)}\n{rendered.script}")
    return "\n".join(texts)


def _through_sbatch(spec: JobSpec, rendered: Rendered, script: Path) -> str:
    command = ["sbatch", "--parsable", str(script)]
    said = _call(command, part=spec.name, options=rendered.options)
    # Of several clusters it names the one; sites wrap sbatch in scripts that say more.
    found = re.findall(r"^(?:.*Submitted batch job )?(\d+)(?:;\S*)?\s*$", said, re.M)
    if not found:
        raise Failed(
            f"{spec.name}: sbatch said {said.strip()!r}, which names no job; look for "
            f"{spec.label!r} in squeue and cancel it before you submit again"
        )
    return str(found[-1])


def _through_submitit(spec: JobSpec, rendered: Rendered, script: Path) -> str:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths

    _find("srun")
    if mark := _MARKS_OF_SUBMITIT.search(str(spec.folder)):
        raise UserError(
            f"{spec.folder}: submitit takes no {mark[0]} in a path; choose another run_dir, or set "
            "submitter: sbatch in the cluster file"
        )
    executor = submitit.SlurmExecutor(folder=spec.folder / "submitit")
    # submitit's own defaults give way: it asks for five minutes and a work key of its name.
    options = {
        name.replace("-", "_"): True if value is None else value
        for name, value in rendered.options.items()
    }
    executor.update_parameters(
        time=None, wckey=None, use_srun=False, stderr_to_stdout=True, additional_parameters=options
    )
    before = _set_environment(_clean(os.environ, rendered.options))
    try:
        job = executor.submit(batch.run, str(script), str(spec.folder))
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        raise _refused(spec.name, str(error)) from None
    finally:
        _set_environment(before)
    for number in spec.array.values if spec.array else ():
        # Tasks of an array look for a file each; here all of them run the same.
        task = JobPaths(executor.folder, job_id=f"{job.job_id}_{number}").submitted_pickle
        try:
            os.link(job.paths.submitted_pickle, task)
        except OSError:  # some file systems have no hard links
            shutil.copy(job.paths.submitted_pickle, task)
    return str(job.job_id)


def _call(command: Sequence[str], *, part: str = "", options: Options | None = None) -> str:
    """Run one of Slurm's commands and return what it prints."""
    _find(command[0])
    try:
        code, output, errors = run(
            command, environment=_clean(os.environ, options or {}), timeout_s=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise Failed(
            f"{' '.join(command[:3])}: no answer for {TIMEOUT_S:g} s; look with squeue whether it "
            "did its work, and try again"
        ) from None
    if code == 0:
        return output
    if part:
        raise _refused(part, errors)
    raise Failed(f"{' '.join(command[:3])}: {_last_lines(errors)}")


def _find(command: str) -> None:
    if shutil.which(command) is None:
        raise UserError(
            f"{command}: is not on PATH; submit where Slurm's commands are, or use a cluster file "
            "with executor: local"
        )


def _refused(part: str, reason: str) -> UserError:
    return UserError(
        f"{part}: Slurm refuses it: {_last_lines(reason)}; see the keys of the cluster file and "
        "`sinfo`. Nothing is submitted: parts that were are cancelled"
    )


def _last_lines(text: str) -> str:
    return "; ".join([line.strip() for line in text.splitlines() if line.strip()][-3:])


def _clean(environment: Mapping[str, str], options: Options) -> dict[str, str]:
    """Without what belongs to the job that we may run in ourselves, or would override options.

    sbatch believes ``SBATCH_…`` more than the script. A user's own account and the like stay where
    the cluster file leaves them open.
    """
    given = {"timelimit" if name == "time" else name for name in options}
    usual = {f"SBATCH_{name.upper().replace('-', '_')}" for name in USUAL if name not in given}
    return {
        name: value
        for name, value in environment.items()
        if name in KEPT or name in usual or not name.startswith(OURS)
    }


def _set_environment(wanted: Mapping[str, str]) -> dict[str, str]:
    """Replace the environment, which submitit hands on; returns what it was."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(wanted)
    return before
