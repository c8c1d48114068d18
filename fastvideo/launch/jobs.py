# SPDX-License-Identifier: Apache-2.0
"""A job that was submitted: how far it is, what it said, what came of it, and how to end it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastvideo.errors import Failed, UserError
from fastvideo.launch import local, slurm
from fastvideo.launch.folder import JobFolder
from fastvideo.launch.record import Part, Record
from fastvideo.launch.states import State
from fastvideo.launch.statuses import JobStatus, reasons, statuses
from fastvideo.launch.watch import Watcher
from fastvideo.launch.word import newest_words


class Job:
    """A job that was submitted, now or earlier, here or elsewhere."""

    def __init__(self, folder: JobFolder | Path, *, watcher: Watcher | None = None) -> None:
        """Open a job's folder.

        Args:
            folder: ``run_dir/jobs/NAME``.
            watcher: Asks Slurm; one for several jobs asks it once for all.

        Raises:
            UserError: There is no job.
        """
        self.folder = folder if isinstance(folder, JobFolder) else JobFolder(folder)
        self._watcher = watcher or Watcher()
        assert self.record  # says now if there is none

    @property
    def record(self) -> Record:
        """What was submitted."""
        record = Record.read(self.folder)
        if record is None:
            raise UserError(f"{self.folder.root}: holds no job; see run_dir/jobs")
        return record

    def status(self) -> JobStatus:
        """How far it is now."""
        return next(iter(statuses([self.folder], watcher=self._watcher)))

    def follow(self, *, timeout_s: float | None = None) -> Iterator[JobStatus]:
        """How far it is, again and again with growing pauses, until it is over or the time is up.

        Raises:
            UserError: None of Slurm's tools is here, so that nobody will ever know.
        """
        for _ in self._watcher.turns(timeout_s=timeout_s):
            status = self.status()
            yield status
            if status.is_final:
                return

    def wait(self, *, timeout_s: float | None = None) -> JobStatus:
        """Wait until it is over, however it ends.

        Raises:
            TimeoutError: It is not, after ``timeout_s``.
            UserError: None of Slurm's tools is here, so that nobody will ever know.
        """
        for status in self.follow(timeout_s=timeout_s):
            if status.is_final:
                return status
        raise TimeoutError(f"{self.folder.name}: is {status.state} after {timeout_s:g} s")

    def logs(self) -> dict[str, dict[int, str]]:
        """What was said, by part and task; tasks that have not begun are left out."""
        found: dict[str, dict[int, str]] = {}
        for part in self.record.parts:
            paths = {number: self.log(part, number) for number in part.numbers}
            found[part.name] = {
                number: path.read_text(encoding="utf-8", errors="replace")
                for number, path in paths.items()
                if path.exists()
            }
        return found

    def log(self, part: Part, task: int) -> Path:
        """The file that holds what a task says."""
        return self.folder.part(part.name).log(None if part.tasks is None else task)

    def cancel(self) -> None:
        """End it; what is complete stays. Of a local job this waits until it has ended.

        Raises:
            Failed: Slurm does not answer, or a local job cannot be reached.
        """
        record = self.record
        if record.executor == "slurm":
            slurm.cancel([part.slurm_id for part in record.parts if part.slurm_id])
            return
        left = [name for name, tasks in local.cancel(self.folder).items() if _is_left(tasks)]
        if left:
            raise Failed(
                f"{self.folder.name}: {', '.join(left)} did not end; it was started on "
                f"{record.host}, cancel it there"
            )

    def result(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Wait, and return what the verbs returned.

        Returns:
            By part the result of its verb, as ``--json`` prints it; of an array by task.

        Raises:
            Failed: A part failed or was cancelled, with the reason.
            TimeoutError: It is not over after ``timeout_s``.
        """
        status = self.wait(timeout_s=timeout_s)
        if status.state != State.COMPLETED:
            raise Failed("\n".join(reasons(status)))
        found = {}
        for part in self.record.parts:
            words = newest_words(self.folder.part(part.name), part.numbers)
            results = {task: word.result for task, word in words.items()}
            found[part.name] = results.get(0) if part.tasks is None else results
        return found


def _is_left(tasks: Mapping[int, local.LocalTask]) -> bool:
    return not all(task.is_final for task in tasks.values())
