# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for sacct, squeue and scontrol: programs on PATH that print what a test lays down."""

from pathlib import Path

import pytest

SCRIPT = """#!/bin/sh
printf '%s\\n' "$*" >>"{folder}/{name}.calls"
env >"{folder}/{name}.environment"
. "{folder}/{name}.does"
"""
NO_ACCOUNTING = "Slurm accounting storage is disabled"
NO_SUCH_JOB = "slurm_load_jobs error: Invalid job id specified"
NO_CONTROLLER = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


class Tools:
    """What the tools do from now on."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        for name in ("sacct", "squeue", "scontrol"):
            program = folder / name
            program.write_text(SCRIPT.format(folder=folder, name=name))
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        self.accounting()
        self.queue(error=NO_SUCH_JOB)
        self.control(error=NO_SUCH_JOB)

    def accounting(self, text: str = "", *, error: str = "") -> None:
        """What sacct prints."""
        self._prints("sacct", text, error)

    def queue(self, text: str = "", *, error: str = "") -> None:
        """What squeue prints."""
        self._prints("squeue", text, error)

    def control(self, text: str = "", *, error: str = "") -> None:
        """What scontrol prints."""
        self._prints("scontrol", text, error)

    def hang(self, *names: str) -> None:
        """They give no answer, and a child of theirs holds the pipe."""
        for name in names:
            (self.folder / f"{name}.does").write_text("sleep 60\n")

    def calls(self, name: str) -> list[str]:
        """The command lines a tool was called with."""
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def environment(self, name: str) -> list[str]:
        """What the latest call of a tool found in its environment."""
        return (self.folder / f"{name}.environment").read_text().splitlines()

    def _prints(self, name: str, text: str, error: str) -> None:
        lines = [line.strip() for line in text.strip().splitlines()]
        output = self.folder / f"{name}.output"
        output.write_text("".join(f"{line}\n" for line in lines))
        says = f"echo '{error}' >&2; exit 1\n" if error else ""
        (self.folder / f"{name}.does").write_text(f"cat '{output}'\n{says}")
