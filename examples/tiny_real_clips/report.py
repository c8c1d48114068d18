# SPDX-License-Identifier: Apache-2.0
"""Did training work? Retrieval and held-out loss before and after, and a contact sheet.

Retrieval: sample a latent for each training caption and look which training clip is nearest. A
model that ignores its text gets about one in as many as there are clips.
"""

import json
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLWan
from PIL import Image, ImageDraw
from torch import Tensor

from fastvideo import atomic, log
from fastvideo.config.prompts import load_prompts
from fastvideo.config.recipe import Recipe
from fastvideo.data.decode import decode_clip
from fastvideo.data.loader import Samples
from fastvideo.models.family import SamplerSettings, find_family
from fastvideo.models.folder import find_model
from fastvideo.state import RunDir, ShardStore

Frames = npt.NDArray[np.uint8]
SEED = 7


def main() -> None:
    """Write ``summary.json`` and ``demo.png`` into the run directory and print what they say."""
    log.setup()
    recipe = Recipe.load(Path(sys.argv[1]), sys.argv[2:])
    run_dir = RunDir(recipe.run_dir)
    captions, scenes = _captions(recipe)
    clips = _clip_latents(recipe, list(captions))
    before = _nearest(recipe, recipe.model.path, captions, clips)
    after = _nearest(recipe, str(run_dir.export), captions, clips)
    own = list(range(len(clips)))
    heldout = _heldout_losses(run_dir)
    summary = {
        "retrieval_before": _share(before, own),
        "retrieval_after": _share(after, own),
        "chance": 1 / len(clips),
        "scene_retrieval_after": _share([scenes[i] for i in after], scenes),
        "heldout_loss_before": heldout[0],
        "heldout_loss_after": heldout[-1],
        "videos": [str(path) for path in sorted(run_dir.generated("export").glob("*.mp4"))],
    }
    atomic.write_json(run_dir.root / "summary.json", summary, point="summary")
    _contact_sheet(recipe, captions, run_dir.root / "demo.png")
    _print(summary, run_dir)


def _captions(recipe: Recipe) -> tuple[dict[str, str], list[str]]:
    """Id to caption of the training clips in the order of the shards, and their scenes."""
    items = json.loads(
        (Path(recipe.source.path) / "videos2caption.json").read_text(encoding="utf-8")
    )
    by_id = {item["path"]: item for item in items}
    samples = Samples(ShardStore(recipe.shards.path), split="train", columns=())
    ids = [samples[i].id for i in range(len(samples))]
    return {i: by_id[i]["cap"][0] for i in ids}, [by_id[i]["scene"] for i in ids]


def _clip_latents(recipe: Recipe, ids: list[str]) -> Tensor:
    samples = Samples(ShardStore(recipe.shards.path), split="train", columns=())
    statistics = find_family(recipe).latent_statistics(find_model(recipe.model.path))
    return torch.stack(
        [statistics.normalise(samples[i].vae_latent.float()) for i in range(len(ids))]
    )


def _nearest(recipe: Recipe, model: str, captions: dict[str, str], clips: Tensor) -> list[int]:
    """For each caption, the index of the training clip nearest to the sampled latent."""
    pipeline: Any = find_family(recipe).load_pipeline(
        find_model(model),
        settings=SamplerSettings(dtype=recipe.generate.dtype, device="cpu"),
        transformers={},
    )
    clip, spec = recipe.clip, recipe.generate
    found = []
    for caption in captions.values():
        latent = pipeline(
            caption,
            height=clip.height,
            width=clip.width,
            num_frames=clip.num_frames,
            num_inference_steps=spec.num_inference_steps,
            guidance_scale=spec.guidance_scale,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
        ).frames[0]
        found.append(int((clips - latent).square().flatten(1).mean(1).argmin()))
    return found


def _share(found: list[Any], right: list[Any]) -> float:
    hits = [a == b for a, b in zip(found, right, strict=True)]
    return float(np.mean(hits))


def _heldout_losses(run_dir: RunDir) -> list[float]:
    lines = run_dir.training().metrics.read_text(encoding="utf-8").splitlines()
    return [r["heldout_loss"] for r in map(json.loads, lines) if "heldout_loss" in r]


def _contact_sheet(recipe: Recipe, captions: dict[str, str], path: Path) -> None:
    """A row per validation prompt: source, reconstruction, sample before and after."""
    assert recipe.generate.prompts is not None
    run_dir = RunDir(recipe.run_dir)
    ids = {caption: clip for clip, caption in captions.items()}
    vae = AutoencoderKLWan.from_pretrained(recipe.model.path, subfolder="vae")
    rows = []
    for index, prompt in enumerate(load_prompts(recipe.generate.prompts)):
        clip = recipe.clip
        source = decode_clip(
            Path(recipe.source.path) / "videos" / ids[prompt.caption],
            num_frames=clip.num_frames,
            height=clip.height,
            width=clip.width,
            fps=clip.fps,
        )
        samples = [
            read_video(run_dir.generated(w) / f"{index:04d}.mp4") for w in ("base", "export")
        ]
        rows.append((prompt.caption, [source, _reconstruct(vae, source), *samples]))
    _draw(rows).save(path)


@torch.no_grad()
def _reconstruct(vae: AutoencoderKLWan, frames_FHWC: Frames) -> Frames:
    pixels = torch.from_numpy(frames_FHWC).permute(3, 0, 1, 2)[None] / 127.5 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0].clamp(-1, 1)
    frames: Frames = ((decoded + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    return frames


def read_video(path: Path) -> Frames:
    """Decode all frames (F, H, W, 3)."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def _draw(rows: list[tuple[str, list[Frames]]]) -> Image.Image:
    size, gap, top = 128, 12, 20
    titles = ("source clip", "its VAE reconstruction", "sample before", "sample after")
    width = len(titles) * (3 * size + gap)
    sheet = Image.new("RGB", (width, top + len(rows) * (size + top)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((column * (3 * size + gap) + 4, 4), f"{title} (first, middle, last)", fill="black")
    for row, (caption, videos) in enumerate(rows):
        y = top + row * (size + top)
        for column, video in enumerate(videos):
            for place, frame in enumerate((0, len(video) // 2, len(video) - 1)):
                image = Image.fromarray(video[frame]).resize((size, size), Image.Resampling.BICUBIC)
                sheet.paste(image, (column * (3 * size + gap) + place * size, y))
        pen.text((4, y + size + 4), caption, fill="black")
    return sheet


def _print(summary: dict[str, Any], run_dir: RunDir) -> None:
    print("\nvideos (from the exported model):")
    for video in summary["videos"]:
        print(f"  {video}")
    print(f"contact sheet: {run_dir.root / 'demo.png'}")
    print(
        f"nearest clip is the caption's own: {summary['retrieval_before']:.2f} before, "
        f"{summary['retrieval_after']:.2f} after finetuning (chance {summary['chance']:.2f}); "
        f"of its own scene after: {summary['scene_retrieval_after']:.2f}"
    )
    print(
        f"held-out loss: {summary['heldout_loss_before']:.4f} before, "
        f"{summary['heldout_loss_after']:.4f} after"
    )


if __name__ == "__main__":
    main()
