# SPDX-License-Identifier: Apache-2.0
"""Asks Slurm's own tools, each with a limit of time; one that fails rests for a while."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# What Slurm answers where it is well and the job is not there.
_NO_SUCH_JOB = "invalid job id"
_NO_ACCOUNTING = "accounting storage is disabled"


@dataclass
class Tool:
    """``sacct``, ``squeue`` or ``scontrol``."""

    name: str
    timeout_s: float
    """How long an answer may take."""
    rest_s: float
    """How long it is not asked again after it failed."""
    trouble: str = ""
    """Why it gives no answer; empty if it does."""
    never_answers: bool = False
    """This cluster does without it: there is nothing to wait for."""
    _asked_again_at_s: float = field(default=0.0, repr=False)

    def ask(self, *arguments: str) -> str | None:
        """What it prints; None if it gives no answer, as ``trouble`` tells."""
        if self.trouble and time.monotonic() < self._asked_again_at_s:
            return None
        output, trouble, self.never_answers = self._try(arguments)
        self.trouble = f"{self.name}: {trouble.removeprefix(f'{self.name}: ')}" if trouble else ""
        self._asked_again_at_s = time.monotonic() + self.rest_s
        return None if trouble else output

    def _try(self, arguments: tuple[str, ...]) -> tuple[str, str, bool]:
        """Its output, its trouble, and whether that will stay."""
        try:
            command, limit_s = [self.name, *arguments], self.timeout_s
            code, output, errors = run(command, environment=_environment(), timeout_s=limit_s)
        except FileNotFoundError:
            return "", "not installed here", True
        except OSError as error:
            return "", str(error), False
        except subprocess.TimeoutExpired:
            return "", f"no answer within {self.timeout_s:g} s", False
        if code == 0 or _NO_SUCH_JOB in errors.lower():
            return output, "", False
        lines = errors.strip().splitlines() or [f"exit code {code}"]
        return "", lines[-1], _NO_ACCOUNTING in errors.lower()


def run(
    command: Sequence[str], *, environment: Mapping[str, str], timeout_s: float
) -> tuple[int, str, str]:
    """Run one of Slurm's commands; on a time-out all it started is killed.

    Returns:
        Exit code, output and errors.

    Raises:
        subprocess.TimeoutExpired: It did not answer in time.
        OSError: It cannot be started.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=environment,
        process_group=0,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        finally:
            if process.returncode is None:
                # Sites wrap these tools in scripts, whose children would live on.
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


def _environment() -> dict[str, str]:
    """Ours, without the user's filters and formats, which would hide jobs from us."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SACCT_", "SQUEUE_", "SCONTROL_"))
    }
    return {**kept, "SLURM_BITSTR_LEN": "0", "SLURM_TIME_FORMAT": "%s"}
