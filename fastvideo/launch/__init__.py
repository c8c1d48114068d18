# SPDX-License-Identifier: Apache-2.0
"""Verbs as jobs: of Slurm, through submitit or plain sbatch, or of this machine; free of torch.

``submit`` submits a verb, ``dry_run`` says what that would be, ``Job`` opens one of earlier.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvideo.launch.jobs import Job
    from fastvideo.launch.submission import dry_run, submit

__all__ = ["Job", "dry_run", "submit"]


def __getattr__(name: str) -> Any:
    """Import on demand: processes of a job need none of it."""
    if name in ("dry_run", "submit"):
        from fastvideo.launch import submission

        return getattr(submission, name)
    if name == "Job":
        from fastvideo.launch.jobs import Job

        return Job
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
