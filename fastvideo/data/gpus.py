# SPDX-License-Identifier: Apache-2.0
"""Which GPUs a process may use, without torch."""

import os
import re
import subprocess


def visible_gpus() -> list[str]:
    """Each as ``CUDA_VISIBLE_DEVICES`` names it: the ones listed there, else all of this machine.

    None where ``nvidia-smi`` is missing or fails.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _of_machine() if chosen is None else listed(chosen)


def listed(chosen: str) -> list[str]:
    """Those of ``CUDA_VISIBLE_DEVICES`` before the first that is none, as CUDA reads it."""
    names = [name.strip() for name in chosen.split(",")]
    end = next((i for i, name in enumerate(names) if not name or name.startswith("-")), len(names))
    return names[:end]


def _of_machine() -> list[str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU \d+:.*\(UUID: (GPU-[\w-]+)\)", done.stdout, re.MULTILINE)
