# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases, beside what is always written; its failures never end a training."""

import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fastvideo import atomic
from fastvideo.config.train import Train, Wandb
from fastvideo.log import logger
from fastvideo.state import TrainDir

_INIT_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 30.0


class WandbRun:
    """One run there for one training here, however often it is killed and continued.

    Its id is kept in `wandb/id`; its steps are optimizer steps, so that what a killed process
    reported after its last checkpoint is not counted twice. The first error is told once, then
    nothing more is sent.
    """

    def __init__(self, directory: TrainDir, *, start_step: int, train: Train) -> None:
        """Begin at step 0, or continue."""
        assert train.wandb is not None
        self._spec: Wandb = train.wandb
        self._directory = directory
        self._run: Any = None
        self._attempt(lambda: self._begin(start_step, train))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Report the numbers of a step."""
        if self._run is not None:
            self._attempt(lambda: self._run.log(dict(values), step=step))

    def show(self, step: int, images: Mapping[str, npt.NDArray[np.uint8]]) -> None:
        """Report pictures (H, W, 3) of a step."""
        if self._run is not None:
            self._attempt(lambda: self._run.log(_pictures(images), step=step))

    def close(self) -> None:
        """Say that it is over; waits for the network for half a minute at most."""
        if self._run is not None:
            self._attempt(lambda: self._run.finish())
            self._run = None

    def _begin(self, start_step: int, train: Train) -> None:
        if self._spec.mode == "offline":  # it would call home about its own errors
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        (self._directory.root / "wandb").mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=_FINISH_TIMEOUT_S,
        )
        self._run = wandb.init(
            project=self._spec.project,
            id=self._id(start_step),
            name=f"{self._directory.root.parent.parent.name} {self._directory.root.name}",
            mode=self._spec.mode,
            resume="allow" if self._spec.mode == "online" else None,
            dir=self._directory.root,
            config=train.model_dump(mode="json"),
            settings=settings,
        )

    def _id(self, start_step: int) -> str:
        """The id of the run that is continued, or a new one where training starts anew."""
        path = self._directory.root / "wandb" / "id"
        if start_step == 0 or not path.exists():
            atomic.write_bytes(path, uuid.uuid4().hex[:8].encode(), point="wandb.id")
        return path.read_text()

    def _attempt(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, it is no reason to stop training
            self._run = None
            logger.warning(
                "train.wandb: switched off after %s: %s; metrics.jsonl goes on",
                type(error).__name__,
                error,
            )


def _pictures(images: Mapping[str, npt.NDArray[np.uint8]]) -> dict[str, Any]:
    import wandb

    return {name: wandb.Image(image_HWC) for name, image_HWC in images.items()}
