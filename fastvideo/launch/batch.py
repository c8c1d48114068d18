# SPDX-License-Identifier: Apache-2.0
"""What submitit runs on the first node of a job: the very script that sbatch would."""

import os
import signal
import subprocess
from pathlib import Path

from fastvideo.errors import EXIT_STOPPED
from fastvideo.launch.folder import PartFolder


def run(script: str, folder: str) -> None:
    """Run ``script`` with bash; requeues and stops are its own affair, not submitit's.

    Args:
        script: Path of the rendered script.
        folder: Of the part, see ``PartFolder``.

    Raises:
        RuntimeError: It failed, with its exit code and where its output is.
    """
    # submitit would requeue at once, while the processes of the step still save. A handler rather
    # than SIG_IGN, which bash and all that it starts would inherit.
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, lambda *_: None)
    code = subprocess.run(["bash", script], check=False).returncode
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    part = PartFolder(Path(folder))
    if part.requeued(task, restart).exists():
        os._exit(EXIT_STOPPED)  # it starts again: submitit must not file a result of this start
    if code != 0:
        raise RuntimeError(f"exit code {code}; see {part.root}")
