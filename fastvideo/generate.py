# SPDX-License-Identifier: Apache-2.0
"""Prompts to mp4 files through the diffusers pipeline, resumable video by video."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo import atomic, hashing, trained
from fastvideo.config.prompts import Prompt, load_prompts
from fastvideo.config.recipe import Recipe
from fastvideo.data.first_image import first_image, prompt_to_encode
from fastvideo.errors import UserError
from fastvideo.log import Progress, logger
from fastvideo.models.family import SamplerSettings, find_family, pick_device
from fastvideo.models.folder import find_model
from fastvideo.models.lora_folder import Chosen, check_chosen, choose
from fastvideo.models.lora_header import read_header
from fastvideo.state import RunDir, checkpoint_marker

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
        UserError: No prompts, a size the model cannot make, nothing exported yet, or a LoRA that
            does not fit.
    """
    run_dir = RunDir(recipe.run_dir)
    wanted = requests(recipe)
    checkpoints = _checkpoints(recipe)
    model = _model(recipe, run_dir, checkpoints)
    check_chosen(_loras(recipe), find_model(model["path"]), recipe.model.family)
    folder = run_dir.generated(recipe.generate.weights)
    pipeline = cache(lambda: _load(recipe, model["path"], checkpoints))
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
        UserError: No prompts, or one that this model cannot make, or a file that is no LoRA.
    """
    file = recipe.generate.prompts
    if file is None:
        raise UserError("generate.prompts: is missing; name a JSON file with prompts")
    loras = [_about(lora) for lora in _loras(recipe)]
    if (base := Path(recipe.model.path).expanduser()).is_dir():
        check_chosen(_loras(recipe), base, recipe.model.family)
    return [
        _request(recipe, prompt, index, origin=f"{file}: data[{index}]")
        | ({"loras": loras} if loras else {})
        for index, prompt in enumerate(load_prompts(file))
    ]


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


def _loras(recipe: Recipe) -> list[Chosen]:
    return [
        chosen
        for index, lora in enumerate(recipe.generate.loras)
        for chosen in choose(
            lora.path,
            scale=lora.scale,
            transformer=lora.transformer,
            known=recipe.architecture.transformers,
            key=f"generate.loras[{index}]",
        )
    ]


def _about(lora: Chosen) -> dict[str, Any]:
    read_header(lora.file).sizes()  # refuses what is none
    return {
        "path": str(lora.file),
        "transformer": lora.transformer,
        "scale": lora.scale,
        "sha256": hashing.file_sha256(lora.file),
    }


def _checkpoints(recipe: Recipe) -> dict[str, Path]:
    """Those to sample instead of the base model's transformers."""
    if recipe.generate.weights != "checkpoint":
        return {}
    return trained.newest(recipe, find_model(recipe.model.path))


def _model(recipe: Recipe, run_dir: RunDir, checkpoints: dict[str, Path]) -> dict[str, Any]:
    """The model's folder and what tells it from another one."""
    base = find_model(recipe.model.path)
    find_family(recipe).check(base)
    if recipe.generate.weights == "base":
        return {"path": recipe.model.path, "files": hashing.folder_stamp(base)}
    if recipe.generate.weights == "checkpoint":
        return {
            "path": recipe.model.path,
            "files": hashing.folder_stamp(base, without=tuple(checkpoints)),
            "checkpoints": {
                name: hashing.file_sha256(checkpoint_marker(path))
                for name, path in checkpoints.items()
            },
        }
    made_from = atomic.read_json(run_dir.export_marker)
    if made_from is None:
        raise UserError(f"{run_dir.export}: holds no complete export; run export first")
    return {"path": str(run_dir.export), "made_from": made_from}


def _made(video: Path, about: dict[str, Any]) -> bool:
    return video.is_file() and atomic.read_json(video.with_suffix(".json")) == about


def _load(recipe: Recipe, path: str, checkpoints: dict[str, Path]) -> "DiffusionPipeline":
    spec, family, folder = recipe.generate, find_family(recipe), find_model(path)
    device = pick_device(spec.device)
    if spec.offload != "none" and device == "cpu":
        raise UserError(f"generate.offload={spec.offload}: is for a GPU; use none on the CPU")
    settings = SamplerSettings(
        dtype=spec.dtype,
        device=device,
        offload=spec.offload,
        vae_tiling=spec.vae_tiling,
        flow_shift=spec.flow_shift,
    )
    transformers = {}
    for name, checkpoint in checkpoints.items():
        from fastvideo.checkpoint import load_weights, verify
        from fastvideo.models.weights import materialise

        model: Any = family.empty_transformer(folder, folder=name, dtype=spec.dtype)
        materialise(model, "cpu")
        verify(checkpoint)
        load_weights(checkpoint, model)
        transformers[name] = model
    pipeline = family.load_pipeline(folder, settings=settings, transformers=transformers)
    if loras := _loras(recipe):
        from fastvideo.models.lora_apply import apply_loras

        apply_loras(pipeline, loras)
    return pipeline


CALL_ARGUMENTS = (
    "prompt",
    "negative_prompt",
    "num_frames",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
)
"""Of a pipeline, by the name they have in a request."""


def _sample(pipeline: Any, about: dict[str, Any]) -> "npt.NDArray[np.uint8]":
    """Run the pipeline; noise comes from a CPU generator, the same on every device."""
    import numpy as np
    import torch
    from PIL import Image

    given = {name: about[name] for name in CALL_ARGUMENTS if name in about}
    if "image" in about:
        size = {"height": about["height"], "width": about["width"]}
        given["image"] = Image.fromarray(first_image(Path(about["image"]["path"]), **size))
    video = pipeline(
        **given, generator=torch.Generator().manual_seed(about["seed"]), output_type="np"
    ).frames[0]
    frames: npt.NDArray[np.uint8] = np.clip(np.rint(video * 255), 0, 255).astype(np.uint8)
    return frames
