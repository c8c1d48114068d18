# SPDX-License-Identifier: Apache-2.0
"""Prompts to mp4 files through the diffusers pipeline, resumable video by video."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo import atomic, hashing
from fastvideo.config.prompts import Prompt, load_prompts
from fastvideo.config.recipe import Recipe
from fastvideo.errors import UserError
from fastvideo.log import Progress, logger
from fastvideo.models.family import find_model
from fastvideo.state import RunDir

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from diffusers import DiffusionPipeline


def generate(recipe: Recipe) -> dict[str, Any]:
    """Sample every prompt of ``generate.prompts`` into ``run_dir/generate/<weights>``.

    A video whose JSON file says it was made from the same model, prompt and settings is kept.

    Returns:
        ``{"videos": [path, ...], "made": number sampled now}``.

    Raises:
        UserError: No prompts, a size the model cannot make, or nothing exported yet.
    """
    run_dir = RunDir(recipe.run_dir)
    wanted = requests(recipe)
    model = _model(recipe, run_dir)
    folder = run_dir.generated(recipe.generate.weights)
    pipeline = cache(lambda: _load(recipe, model["path"]))
    videos = [folder / f"{index:04d}.mp4" for index in range(len(wanted))]
    todo = [
        (video, about)
        for video, request in zip(videos, wanted, strict=True)
        if not _made(video, about := {"model": model, **request})
    ]
    progress = Progress("videos", total=len(todo))
    for video, about in todo:
        frames = _sample(pipeline(), about)
        write_video(video, frames, fps=about["fps"])
        atomic.write_json(video.with_suffix(".json"), about, point="generate.marker")
        progress.advance(video.name)
    progress.close()
    logger.info("%d videos in %s, %d made now", len(videos), folder, len(todo))
    return {"videos": [str(video) for video in videos], "made": len(todo)}


def requests(recipe: Recipe) -> list[dict[str, Any]]:
    """Everything that decides each video beside the model; needs no torch.

    Raises:
        UserError: No prompts, or one that this model cannot make.
    """
    if recipe.generate.prompts is None:
        raise UserError("generate.prompts: is missing; name a JSON file with prompts")
    prompts = load_prompts(recipe.generate.prompts)
    return [_request(recipe, prompt, index) for index, prompt in enumerate(prompts)]


def write_video(path: Path, frames_FHWC: "npt.NDArray[np.uint8]", *, fps: float) -> None:
    """Write H.264 in mp4 (yuv420p, visually lossless), complete or not at all.

    Args:
        path: The file.
        frames_FHWC: RGB, uint8; even height and width.
        fps: Frames per second.
    """
    from fractions import Fraction

    import av

    num_frames, height, width, _ = frames_FHWC.shape
    with (
        atomic.replacing(
            path, point="generate.video", marker=path.with_suffix(".json")
        ) as temporary,
        av.open(str(temporary), "w", format="mp4") as container,
    ):
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "17"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(frames_FHWC[index], format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _request(recipe: Recipe, prompt: Prompt, index: int) -> dict[str, Any]:
    spec, clip = recipe.generate, recipe.clip
    if prompt.image_path or prompt.video_path:
        raise UserError(
            f"{spec.prompts}: data[{index}] gives a first image, which a text-to-video model does "
            "not take; remove image_path and video_path"
        )
    size = {
        "num_frames": prompt.num_frames or clip.num_frames,
        "height": prompt.height or clip.height,
        "width": prompt.width or clip.width,
    }
    problems = recipe.architecture.misfits(**size)
    if problems:
        raise UserError(f"{spec.prompts}: data[{index}]: {'; '.join(problems)}")
    return {
        "prompt": prompt.caption,
        "negative_prompt": spec.negative_prompt,
        **size,
        "num_inference_steps": prompt.num_inference_steps or spec.num_inference_steps,
        "guidance_scale": spec.guidance_scale,
        "seed": spec.seed + index,
        "fps": clip.fps,
        "dtype": spec.dtype,
    }


def _model(recipe: Recipe, run_dir: RunDir) -> dict[str, Any]:
    if recipe.generate.weights == "base":
        return {
            "path": recipe.model.path,
            "files": hashing.folder_stamp(find_model(recipe.model.path)),
        }
    made_from = atomic.read_json(run_dir.export_marker)
    if made_from is None:
        raise UserError(f"{run_dir.export}: holds no complete export; run export first")
    return {"path": str(run_dir.export), "made_from": made_from}


def _made(video: Path, about: dict[str, Any]) -> bool:
    return video.is_file() and atomic.read_json(video.with_suffix(".json")) == about


def _load(recipe: Recipe, path: str) -> "DiffusionPipeline":
    from fastvideo.models.family import find_family, pick_device

    return find_family(recipe.model.family).load_pipeline(
        find_model(path), dtype=recipe.generate.dtype, device=pick_device(recipe.generate.device)
    )


def _sample(pipeline: Any, about: dict[str, Any]) -> "npt.NDArray[np.uint8]":
    """Run the pipeline; noise comes from a CPU generator, the same on every device."""
    import numpy as np
    import torch

    names: Iterable[str] = (
        "prompt",
        "negative_prompt",
        "num_frames",
        "height",
        "width",
        "num_inference_steps",
        "guidance_scale",
    )
    video = pipeline(
        **{name: about[name] for name in names},
        generator=torch.Generator().manual_seed(about["seed"]),
        output_type="np",
    ).frames[0]
    frames: npt.NDArray[np.uint8] = np.clip(np.rint(video * 255), 0, 255).astype(np.uint8)
    return frames
