# SPDX-License-Identifier: Apache-2.0
"""Executables that stand in for Slurm and container runtimes, and refuse any flag they do not know.

They run what they are asked to run, and note how they were called.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# name: (flags with a value, flags without); what follows them is run, after so many words.
KNOWN: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "srun": (
        (
            "--kill-on-bad-exit",
            "--wait",
            "--export",
            "--cpus-per-task",
            "--container-image",
            "--container-mounts",
            "--container-workdir",
            "--container-env",
        ),
        ("--no-container-mount-home",),
        0,
    ),
    "apptainer": (("--bind", "--pwd"), ("exec", "--nv"), 1),
    "docker": (
        ("--network", "--ipc", "--user", "--gpus", "--volume", "--env", "--workdir"),
        ("run", "--rm", "--init"),
        1,
    ),
}

STARTER = """#!{python}
import json, os, sys
name, valued, plain, images = {name!r}, {valued!r}, {plain!r}, {images!r}
words, flags = sys.argv[1:], []
while words and (words[0].startswith("--") or words[0] in plain):
    word = words.pop(0)
    key, equals, value = word.partition("=")
    if word in plain:
        flags.append(word)
    elif key in valued:
        flags.append([key, value if equals else words.pop(0)])
    else:
        sys.exit(name + ": unknown flag " + word)
image = [words.pop(0) for _ in range(images)]
with open({log!r}, "a") as file:
    file.write(json.dumps({{"name": name, "flags": flags, "image": image}}) + "\\n")
if name == "docker":
    handed = [value for key, value in (f for f in flags if len(f) == 2) if key == "--env"]
    os.environ = {{k: v for k, v in os.environ.items() if k in handed or k == "PATH"}}
if name == "srun":
    os.environ.setdefault("SLURM_PROCID", "0")
os.execvpe(words[0], words, dict(os.environ))
"""

RECORDER = """#!{python}
import json, os, sys
with open({log!r}, "a") as file:
    seen = {{"argv": sys.argv[1:], "environment": dict(os.environ), "cwd": os.getcwd()}}
    file.write(json.dumps(seen) + "\\n")
{more}
"""

SBATCH = """#!/bin/bash
folder={folder} parsable=
[[ $1 == --parsable ]] && parsable=yes && shift
[[ $# == 1 && -f $1 ]] || exit 3
number=$(($(ls "$folder" | grep -c '^submitted-.*[.]sbatch$') + 1))
cp "$1" "$folder/submitted-$number.sbatch"
env -0 >"$folder/submitted-$number.environment"
if [[ $number == "$(cat "$folder/refused" 2>/dev/null)" ]]; then
  echo "sbatch: error: Batch job submission failed: Invalid qos specification" >&2
  exit 1
fi
echo "${{parsable:-Submitted batch job }}$((100 + number))" | sed s/^yes//
"""


@dataclass(frozen=True)
class StandIns:
    """A folder of executables and the notes they take."""

    folder: Path

    @property
    def path(self) -> str:
        """For ``PATH``: they come first."""
        return f"{self.folder}:{os.environ['PATH']}"

    def recorder(self, *, more: str = "") -> Path:
        """A program that notes its command line and environment, and runs ``more`` Python."""
        path, log = self.folder / "fastvideo", str(self.folder / "recorded.jsonl")
        return _write(path, RECORDER.format(python=sys.executable, log=log, more=more))

    def recorded(self) -> list[dict[str, Any]]:
        """What the recorder noted."""
        return _lines(self.folder / "recorded.jsonl")

    def started(self) -> list[dict[str, Any]]:
        """What the starters noted: name, flags and image."""
        return _lines(self.folder / "started.jsonl")

    def sbatch(self, *, refuses: int = 0) -> None:
        """Make an sbatch that keeps what it is given, as 101, 102, ...; it may refuse one part."""
        (self.folder / "refused").write_text(f"{refuses}\n")
        _write(self.folder / "sbatch", SBATCH.format(folder=self.folder))
        self.answer("scancel", "")

    def submitted(self) -> list[str]:
        """The scripts that sbatch was given."""
        numbers = range(1, len(list(self.folder.glob("submitted-*.sbatch"))) + 1)
        return [(self.folder / f"submitted-{number}.sbatch").read_text() for number in numbers]

    def submitted_with(self, number: int) -> dict[str, str]:
        """The environment of the call of sbatch, counted from 1."""
        text = (self.folder / f"submitted-{number}.environment").read_text()
        return dict(line.split("=", 1) for line in text.split("\0") if line)

    def answer(self, name: str, text: str) -> None:
        """Make a tool that prints ``text`` and notes its arguments as lines of ``NAME.txt``."""
        log = self.folder / f"{name}.txt"
        (self.folder / f"{name}.answer").write_text(text)
        _write(
            self.folder / name,
            f'#!/bin/bash\nprintf "%s\\n" "$*" >>{log}\ncat {self.folder}/{name}.answer\n',
        )

    def asked(self, name: str) -> list[str]:
        """How the tool was called."""
        log = self.folder / f"{name}.txt"
        return log.read_text().splitlines() if log.exists() else []


def make(folder: Path) -> StandIns:
    """Write them into a new folder."""
    folder.mkdir()
    found = StandIns(folder)
    for name, (valued, plain, images) in KNOWN.items():
        text = STARTER.format(
            python=sys.executable,
            name=name,
            valued=valued,
            plain=plain,
            images=images,
            log=str(folder / "started.jsonl"),
        )
        _write(folder / name, text)
    found.answer("squeue", "RUNNING\n")
    found.answer("scontrol", "")
    return found


def run_script(
    text: str, stand_ins: StandIns, *, cwd: Path, environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run the text of a batch script as Slurm would, with the variables of a job."""
    usual = {
        "PATH": stand_ins.path,
        "HOME": str(cwd),
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURMD_NODENAME": "n1",
        "SLURM_CPUS_PER_TASK": "8",
    }
    return subprocess.run(
        ["bash", "-c", text],
        cwd=cwd,
        env={**usual, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
