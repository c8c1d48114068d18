# SPDX-License-Identifier: Apache-2.0
"""Videos of the validation prompts while a transformer trains, by the pipeline of diffusers.

All processes call the same functions in the same order. Prompts are dealt out to the groups that
samples are dealt out to; where weights are sharded, every denoising step needs all of them.

Axes: F pixel frames, H, W pixels.
"""

import contextlib
import functools
import gc
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from fastvideo import atomic, hashing, state, trained
from fastvideo.checkpoint import Saved
from fastvideo.config.recipe import Recipe
from fastvideo.data.decode import decode_clip
from fastvideo.data.prompts import read_encoded
from fastvideo.errors import Failed
from fastvideo.generate import denoise, is_made, read_requests, to_frames, write_made
from fastvideo.log import logger
from fastvideo.models.denoiser import Denoiser, give_clip_feature
from fastvideo.models.family import SamplerSettings, find_family
from fastvideo.state import RunDir, ShardStore, TrainDir
from fastvideo.train import average
from fastvideo.train.node.pulse import OPEN, SAMPLING
from fastvideo.train.parallel import Team

Pixels = npt.NDArray[np.uint8]
Load = Callable[[str, Path | None], nn.Module]
"""A transformer by its folder, from a checkpoint, or None for the base model's."""
Show = Callable[[int, Mapping[str, Pixels]], None]
"""Takes a step and pictures (H, W, 3) by name."""

STRIP_FRAMES, STRIP_HEIGHT = 6, 240
"""How many frames of a video are shown beside each other, and from which height they shrink."""


@dataclass(frozen=True)
class Video:
    """One to make."""

    index: int
    """Place of its prompt."""
    path: Path
    about: dict[str, Any]
    """All that decides it, which is written beside it."""


@dataclass(frozen=True)
class Todo:
    """What is to be done at a step, as process 0 found it."""

    videos: list[Video]
    left: list[Video]
    """Those that are not made yet."""
    others: dict[str, Path | None]
    """Checkpoints of the transformers that do not train now; None is the base model's weights."""


class _StopAsked(Exception):
    """Unwinds a pipeline; never leaves this module."""


class Sampler:
    """Makes the videos of a step that are not there yet."""

    def __init__(
        self,
        recipe: Recipe,
        path: Path,
        *,
        team: Team,
        transformer: str,
        saved: Saved,
        load: Load,
    ) -> None:
        """Read the encoded prompts, which may be written anew later.

        Args:
            recipe: With ``train.samples``.
            path: The model's folder.
            team: Who samples.
            transformer: Folder of what trains.
            saved: What trains, with our forward; its average is sampled where there is one.
            load: Loads a transformer in the layout of what trains.
        """
        assert recipe.train.samples is not None and recipe.validation.prompts is not None
        self._recipe, self._path, self._spec = recipe, path, recipe.train.samples
        self._family, self._team = find_family(recipe), team
        self._transformer, self._saved, self._load = transformer, saved, load
        self._directory = RunDir(recipe.run_dir).training(transformer)
        requests = read_requests(recipe, recipe.validation.prompts)[: self._spec.max_prompts]
        # Computed as training computes; `generate.dtype` is that of weights that do not train.
        self._requests = [{**request, "dtype": recipe.train.dtype} for request in requests]
        store = ShardStore(recipe.shards.path)
        captions = [request["prompt"] for request in requests]
        self._encoded = read_encoded(recipe, store, captions=captions)

    def sample(self, step: int, *, show: Show | None) -> bool:
        """Make what is missing of the videos after ``step``, if they are due.

        Args:
            step: Finished optimizer steps.
            show: Called with frames of each video, on process 0.

        Returns:
            False if a stop was asked for before all were made.
        """
        if not self._spec.due(step, steps=self._recipe.train.steps):
            return True
        todo: Todo | None = self._team.agreed(self._todo(step) if self._team.leads else None)
        if todo is None:
            return True
        if show is not None and step == 0:  # what was shown of this step before is forgotten
            show(step, _strips([video for video in todo.videos if video not in todo.left]))
        made = self._make(step, todo, show)
        _release(self._team.device)
        if made and self._team.leads:
            names = [video.path.name for video in todo.videos]
            marker = self._directory.sampled_marker(step)
            with _writing(marker):
                atomic.write_json(marker, {"step": step, "videos": names}, point="samples.marker")
            logger.info("step %d: %d videos in %s", step, len(names), marker.parent)
        return made

    # ------------------------------------------------------------ what is to be done

    def _todo(self, step: int) -> Todo | None:
        """What process 0 finds; None if the step is complete."""
        if self._directory.sampled_marker(step).is_file():
            return None
        others = {
            name: trained.newest_of(self._recipe, self._path, transformer=name)
            for name in self._recipe.architecture.transformers
            if name != self._transformer
        }
        model = {
            "path": self._recipe.model.path,
            "files": hashing.folder_stamp(self._path),
            "encoded": self._encoded.fingerprint,
            "transformers": {
                self._transformer: {"step": step},
                **{name: _identity(newest) for name, newest in others.items()},
            },
        }
        folder = self._directory.sampled(step)
        videos = [
            Video(index, folder / f"{index:04d}.mp4", {"model": model, **request})
            for index, request in enumerate(self._requests)
        ]
        left = [video for video in videos if not is_made(video.path, video.about)]
        return Todo(videos, left, others)

    # ------------------------------------------------------------ making it

    def _make(self, step: int, todo: Todo, show: Show | None) -> bool:
        """Make the videos that are left; training's mode and random numbers stay as they are."""
        if not todo.left:
            return True
        gpus = [torch.cuda.current_device()] if self._team.device == "cuda" else []
        try:
            self._look(step)
            if self._team.leads:
                logger.info("step %d: sampling %d videos", step, len(todo.left))
            with average.evaluated(self._saved), torch.random.fork_rng(devices=gpus):
                pipeline = self._open(step, todo.others)
                for together in rounds(todo.left, groups=self._team.layout.data):
                    strips = self._round(pipeline, step, together)
                    if show is not None:
                        show(step, strips)
        except _StopAsked:
            return False
        return True

    def _open(self, step: int, others: Mapping[str, Path | None]) -> Any:
        """The pipeline with the VAE, what trains and, of a model with two experts, the other."""
        self._beat(step, OPEN)
        spec, device = self._recipe.generate, self._team.device
        settings = SamplerSettings(
            dtype="float32",
            device=device,
            vae_tiling=spec.vae_tiling,
            flow_shift=spec.flow_shift,
        )
        pipeline = self._family.load_decoder(self._path, settings=settings)
        models = {self._transformer: self._saved.model}
        models |= {name: self._other(name, newest) for name, newest in others.items()}
        compute = self._recipe.train.dtype
        pipeline.register_modules(
            **{name: Denoiser(m, device=device, compute=compute) for name, m in models.items()}
        )
        return pipeline

    def _other(self, transformer: str, newest: Path | None) -> nn.Module:
        if self._team.leads:
            logger.info("sampling with %s of %s", transformer, newest or "the base model")
        return self._load(transformer, newest)

    def _round(self, pipeline: Any, step: int, together: Sequence[Video]) -> dict[str, Pixels]:
        """Make a video in each group; frames of all of them, in all processes.

        A group for which none is left repeats the last one, as every denoising step needs all.
        """
        team = self._team
        video = together[min(team.place, len(together) - 1)]
        ours = team.place < len(together) and team.process.rank % team.layout.sequence == 0
        made = self._denoised(pipeline, step, video, decode=ours)
        found: dict[str, Pixels] = {}
        if ours:
            frames = to_frames(made)
            _write(video, frames)
            found = {_name(video): strip(frames)}
        return {name: one for part in team.gathered(found) for name, one in part.items()}

    def _denoised(self, pipeline: Any, step: int, video: Video, *, decode: bool) -> Any:
        """Run the pipeline on what the encoders left of a prompt.

        First images go through the VAE again, which is open to decode, as in ``generate``: what is
        stored of them may have been rounded.
        """
        encoded, device = self._encoded.prompts[video.index], self._team.device
        found = self._family.conditions(encoded.text, self._encoded.negative)
        given: dict[str, Any] = {name: tensor.to(device) for name, tensor in found.items()}
        if encoded.image_HWC is not None:
            given["image"] = Image.fromarray(encoded.image_HWC)
        if encoded.clip_feature is not None:
            give_clip_feature(pipeline, encoded.clip_feature)
        self._look(step)
        return denoise(
            pipeline,
            video.about,
            output_type="np" if decode else "latent",
            callback_on_step_end=functools.partial(self._after_step, step),
            **given,
        )

    def _after_step(self, step: int, *_: Any) -> dict[str, Any]:
        """Called by the pipeline after each denoising step; nothing of its state changes."""
        self._look(step)
        return {}

    def _look(self, step: int) -> None:
        """Give a sign of life, and unwind if a stop was asked for anywhere."""
        self._beat(step, SAMPLING)
        if any(self._team.any(self._team.process.stop.reason() is not None)):
            raise _StopAsked

    def _beat(self, step: int, phase: str) -> None:
        self._team.process.pulse.beat(step, phase)


def forget_after(directory: TrainDir, step: int) -> None:
    """Remove what a run that was killed sampled after the ``step`` from which another goes on.

    A run that begins anew looks at the videos of the base model one by one.
    """
    for other, folder in directory.sample_folders().items():
        if other > step or step == 0:
            directory.sampled_marker(other).unlink(missing_ok=True)
        if other > step:
            shutil.rmtree(folder)


def rounds(videos: Sequence[Video], *, groups: int) -> Iterator[list[Video]]:
    """Deal videos out to groups, which go through equally many denoising steps in a round."""
    ordered = sorted(videos, key=_steps)
    for _, alike in itertools.groupby(ordered, key=_steps):
        left = list(alike)
        for first in range(0, len(left), groups):
            yield left[first : first + groups]


def _write(video: Video, frames_FHWC: Pixels) -> None:
    with _writing(video.path):
        write_made(video.path, frames_FHWC, video.about)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failed(
            f"{path}: cannot be written ({error.strerror}); checkpoints are intact. Free "
            "some space, or remove train.samples, and run the same command again"
        ) from error


def _steps(video: Video) -> int:
    steps: int = video.about["num_inference_steps"]
    return steps


def _identity(newest: Path | None) -> Any:
    """What tells a checkpoint from others."""
    marker = state.read_checkpoint_marker(newest) if newest is not None else None
    return "base" if marker is None else {"step": marker["step"], "id": marker["id"]}


def _release(device: str) -> None:
    """Give back what sampling held: pipelines lie in cycles, and training needs large blocks."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- pictures for the trackers


def strip(frames_FHWC: Pixels) -> Pixels:
    """Some frames of a video beside each other, (H, W, 3)."""
    count = min(len(frames_FHWC), STRIP_FRAMES)
    chosen = np.linspace(0, len(frames_FHWC) - 1, count).round().astype(int)
    image = Image.fromarray(np.concatenate(frames_FHWC[chosen], axis=1))
    return np.asarray(image.reduce(max(1, image.height // STRIP_HEIGHT)))


def _strips(videos: Sequence[Video]) -> dict[str, Pixels]:
    """Strips of videos that are on disk."""
    found = {}
    for video in videos:
        shape = {name: video.about[name] for name in ("num_frames", "height", "width", "fps")}
        found[_name(video)] = strip(decode_clip(video.path, **shape))
    return found


def _name(video: Video) -> str:
    return f"samples/{video.path.stem}"
