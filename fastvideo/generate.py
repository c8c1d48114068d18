# SPDX-License-Identifier: Apache-2.0
"""Prompts to mp4 files through the diffusers pipeline, resumable video by video."""

import contextlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo import atomic, hashing, sampled
from fastvideo.config.prompts import Prompt, load_prompts
from fastvideo.config.recipe import Recipe
from fastvideo.data.first_image import first_image, prompt_to_encode
from fastvideo.errors import UserError, measuring
from fastvideo.log import Progress, logger
from fastvideo.state import RunDir

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


X264 = {"crf": "17", "threads": "1", "x264-params": "mbtree=0"}
"""With several threads, or with its macroblock tree on processors that have AVX-512, x264 (165)
now and then makes other bytes of the same frames."""


def generate(recipe: Recipe) -> dict[str, Any]:
    """Sample every prompt of ``generate.prompts`` into ``run_dir/generate/<weights>``.

    A video whose JSON file says it was made from the same model, prompt and settings is kept.

    Returns:
        ``{"videos": [path, ...], "made": number sampled now}``.

    Raises:
        UserError: No prompts, a size the model cannot make, nothing exported yet, or a LoRA that
            does not fit.
    """
    run_dir = RunDir(recipe.run_dir)
    wanted = requests(recipe)
    model = sampled.find(recipe)
    folder = run_dir.generated(recipe.generate.weights)
    requested = {
        folder / f"{index:04d}.mp4": {"model": model.about, **request}
        for index, request in enumerate(wanted)
    }
    todo = [video for video, about in requested.items() if not is_made(video, about)]
    with measuring(lambda: sum(is_made(video, about) for video, about in requested.items())):
        _make(recipe, model, {video: requested[video] for video in todo})
    logger.info("%d videos in %s, %d made now", len(requested), folder, len(todo))
    return {"videos": [str(video) for video in requested], "made": len(todo)}


def _make(recipe: Recipe, model: sampled.Sampled, todo: Mapping[Path, dict[str, Any]]) -> None:
    pipeline = cache(lambda: sampled.load(recipe, model))
    with contextlib.closing(Progress("videos", total=len(todo))) as progress:
        for video, about in todo.items():
            write_made(video, _sample(pipeline(), about), about)
            progress.advance(video.name)


def requests(recipe: Recipe) -> list[dict[str, Any]]:
    """Everything that decides each video beside the model; needs no torch.

    Raises:
        UserError: No prompts, or one that this model cannot make, or a file that is no LoRA.
    """
    file = recipe.generate.prompts
    if file is None:
        raise UserError("generate.prompts: is missing; name a JSON file with prompts")
    loras = sampled.about_loras(recipe)
    return [
        {**request, **({"loras": loras} if loras else {})}
        for request in read_requests(recipe, file)
    ]


def read_requests(recipe: Recipe, file: Path) -> list[dict[str, Any]]:
    """As `requests`, for the prompts of another file, without `generate.loras`."""
    return [
        _request(recipe, prompt, index, origin=f"{file}: data[{index}]")
        for index, prompt in enumerate(load_prompts(file))
    ]


def write_video(path: Path, frames_FHWC: "npt.NDArray[np.uint8]", *, fps: float) -> None:
    """Write H.264 in mp4 (yuv420p, visually lossless), complete or not at all.

    The same frames are the same bytes.

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
        stream = container.add_stream("libx264", rate=rate, options=X264)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(frames_FHWC[index], format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_made(video: Path, frames_FHWC: "npt.NDArray[np.uint8]", about: dict[str, Any]) -> None:
    """Write a video, and then beside it how it was made."""
    write_video(video, frames_FHWC, fps=about["fps"])
    atomic.write_json(video.with_suffix(".json"), about, point="generate.marker")


def is_made(video: Path, about: dict[str, Any]) -> bool:
    """Whether a video is there and was made in this way."""
    return video.is_file() and atomic.read_json(video.with_suffix(".json")) == about


def _request(recipe: Recipe, prompt: Prompt, index: int, *, origin: str) -> dict[str, Any]:
    spec = recipe.generate
    wanted = prompt_to_encode(recipe, prompt, origin=origin)
    request = {
        "prompt": wanted.caption,
        "num_frames": wanted.num_frames,
        "height": wanted.height,
        "width": wanted.width,
        "num_inference_steps": prompt.num_inference_steps or spec.num_inference_steps,
        "guidance_scale": spec.guidance_scale,
        "seed": spec.seed + index,
        "fps": recipe.clip.fps,
        "dtype": spec.dtype,
        "flow_shift": spec.flow_shift,
        "vae_tiling": spec.vae_tiling,
    }
    if not recipe.architecture.embedded_guidance:
        request["negative_prompt"] = spec.negative_prompt
    if spec.guidance_scale_2 is not None:
        request["guidance_scale_2"] = spec.guidance_scale_2
    if wanted.image is not None:
        path = str(wanted.image)
        request["image"] = {"path": path, "sha256": hashing.file_sha256(wanted.image)}
    return request


CALL_ARGUMENTS = (
    "num_frames",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
)
"""Of a pipeline, by the name they have in a request; prompts may come as texts or encoded."""


def _sample(pipeline: Any, about: dict[str, Any]) -> "npt.NDArray[np.uint8]":
    from PIL import Image

    texts = ("prompt", "negative_prompt")
    given: dict[str, Any] = {name: about[name] for name in texts if name in about}
    if "image" in about:
        size = {"height": about["height"], "width": about["width"]}
        given["image"] = Image.fromarray(first_image(Path(about["image"]["path"]), **size))
    return to_frames(denoise(pipeline, about, **given))


def denoise(pipeline: Any, about: dict[str, Any], *, output_type: str = "np", **given: Any) -> Any:
    """Run a pipeline for a request; noise comes from a CPU generator, the same on every device.

    Args:
        pipeline: Of diffusers.
        about: The request.
        output_type: ``np``, or ``latent`` to leave out decoding.
        given: Prompts and images, as the pipeline takes them.

    Returns:
        The video (F, H, W, 3) of numbers in [0, 1], or its latent.
    """
    import torch

    wanted = {name: about[name] for name in CALL_ARGUMENTS if name in about}
    noise = torch.Generator().manual_seed(about["seed"])
    return pipeline(**wanted, **given, generator=noise, output_type=output_type).frames[0]


def to_frames(video_FHWC: Any) -> "npt.NDArray[np.uint8]":
    """A video of numbers in [0, 1] as 8-bit RGB."""
    import numpy as np

    frames: npt.NDArray[np.uint8] = np.clip(np.rint(video_FHWC * 255), 0, 255).astype(np.uint8)
    return frames
