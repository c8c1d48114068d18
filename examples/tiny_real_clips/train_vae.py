# SPDX-License-Identifier: Apache-2.0
"""Train the tiny video VAE of the CPU recipes on the footage that download_dataset.py fetches.

Axes: B batch, C channel, T pixel frame, H height, W width. Pixels are float32 in [-1, 1].
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanRMS_norm
from download_dataset import SOURCES_FOLDER, WINDOWS, frame_at, frame_times
from footage import SOURCES
from numpy.typing import NDArray
from torch import Tensor

NUM_FRAMES, FPS, SIDE = 9, 8.0, 64
SHORT_SIDE = 128  # sources are kept at this size: twice SIDE leaves room for random crops
NOT_TRAINED_ON = ("vtest.avi",)  # whose rights are unclear; weights made from it are not shipped
MARGIN_S = 0.25  # kept free on both sides of every held-out window
SYNTHETIC_SHARE = 0.15
CROP_SIDE, CROP_SHARE = 32, 0.85  # the first steps see quarters of clips: three times as fast
BATCH_SIZE, WARMUP_SHARE, EMA_DECAY, KL_WEIGHT = 2, 0.05, 0.995, 1e-4
PEAK_LR_MUON, PEAK_LR_ADAM = 0.02, 5e-3


class Footage(NamedTuple):
    """One source video in memory, with the stretches of it that training may not see."""

    frames_TCHW: Tensor  # uint8
    times_s: list[float]
    heldout_s: list[tuple[float, float]]


def main() -> None:
    """Train, measure on the held-out clips, and save a diffusers folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/tiny_real_clips"))
    parser.add_argument("--out", type=Path, default=Path("fastvideo/models/tiny_vae"))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # one thread adds in one order: the weights depend on the seed only
    torch.manual_seed(args.seed)
    vae = new_vae()
    videos = [s.filename for s in SOURCES if s.filename not in NOT_TRAINED_ON]
    footage = [load_footage(args.data / SOURCES_FOLDER / video) for video in videos]
    heldout = load_clips(args.data, "heldout")
    average = train(vae, footage, heldout, steps=args.steps, rng=np.random.default_rng(args.seed))
    for name, clip_CTHW in heldout.items():
        print(f"{name}: {psnr(average, clip_CTHW):.2f} dB")
    print(f"mean of {len(heldout)} held-out clips: {mean_psnr(average, heldout):.2f} dB")
    set_latent_statistics(average, load_clips(args.data, "train"))
    average.save_pretrained(args.out)


def new_vae() -> AutoencoderKLWan:
    """Wan's causal video VAE with 220,107 parameters: 4x in time, 8x in space, 16 channels."""
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
    )


def train(
    vae: AutoencoderKLWan,
    footage: list[Footage],
    heldout: dict[str, Tensor],
    *,
    steps: int,
    rng: np.random.Generator,
) -> AutoencoderKLWan:
    """Fit the VAE with Muon and AdamW, warm-up and cosine decay; returns the averaged weights."""
    average = copy.deepcopy(vae)
    kernels = [p for p in vae.parameters() if p.ndim >= 4 and p.shape[0] > 1 and p.shape[1] > 1]
    others = [p for p in vae.parameters() if not any(p is kernel for kernel in kernels)]
    optimizers: list[torch.optim.Optimizer] = [
        ConvolutionMuon(kernels, lr=PEAK_LR_MUON),
        torch.optim.AdamW(others, lr=PEAK_LR_ADAM, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    shape = learning_rate_shape(steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, shape) for each in optimizers]
    forward = whole_clip_forward(vae)
    started = time.monotonic()
    for step in range(1, steps + 1):
        side = CROP_SIDE if step <= CROP_SHARE * steps else SIDE
        clips = [random_crop(random_clip(footage, rng), side, rng) for _ in range(BATCH_SIZE)]
        clips_BCTHW = torch.stack(clips)
        loss = vae_loss(forward, clips_BCTHW)
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        decay = min(EMA_DECAY, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), 1 - decay)
        if step % 500 == 0 or step == steps:
            elapsed_s = time.monotonic() - started
            decibels = mean_psnr(average, heldout)
            print(f"step {step} {elapsed_s:.0f} s loss {loss:.4f} {decibels:.2f} dB", flush=True)
    return average


class ConvolutionMuon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): Nesterov momentum whose update of each kernel is orthogonalised.

    Kernels count as matrices of output channels by the rest. On this narrow, deep network it
    needs a fraction of AdamW's steps.
    """

    def __init__(self, kernels: list[Tensor], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(kernels, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every kernel from its gradient."""
        assert closure is None
        for group in self.param_groups:
            for kernel in group["params"]:
                average = self.state[kernel].setdefault("average", torch.zeros_like(kernel))
                average.lerp_(kernel.grad, 1 - group["momentum"])
                ahead = kernel.grad.lerp(average, group["momentum"])
                update = orthogonal(ahead.flatten(1))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                kernel.add_(update.view_as(kernel), alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """Push all singular values towards 1, by five of Muon's quintic Newton-Schulz steps."""
    wide: Tensor = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-12)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def learning_rate_shape(steps: int) -> Callable[[int], float]:
    """Factor of the peak learning rate: a linear rise, then half a cosine down to zero."""
    warmup = max(1, round(steps * WARMUP_SHARE))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return factor


Forward = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def vae_loss(forward: Forward, clips_BCTHW: Tensor) -> Tensor:
    """Charbonnier and squared error, edges and colour once more, plus a small KL.

    Most of an error is one of brightness; without a weight of its own colour is learned last.
    """
    output_BCTHW, mean, logvar = forward(clips_BCTHW)
    error = output_BCTHW - clips_BCTHW
    pixels = (error.square() + 1e-4).sqrt().mean() + error.square().mean()
    colour = ((error - error.mean(dim=1, keepdim=True)).square() + 1e-4).sqrt().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return pixels + 0.25 * edges + 0.5 * colour + KL_WEIGHT * kl


# -- the model, a whole clip at a time ----------------------------------------------------------


def whole_clip_forward(vae: AutoencoderKLWan) -> Forward:
    """Make `vae` encode, sample and decode without diffusers' chunks and caches: half the time.

    Zero padding in time makes the chunked and the whole convolution the same sum, except that
    the two temporal resamplers leave frame 0 out. Checked here against diffusers itself.
    """
    original = copy.deepcopy(vae)
    for module in vae.modules():
        if isinstance(module, WanRMS_norm):
            module.forward = MethodType(rms_norm, module)
        elif isinstance(module, WanResample):
            module.forward = MethodType(whole_clip_resample, module)

    def forward(clips_BCTHW: Tensor, *, sample: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = vae.quant_conv(vae.encoder(clips_BCTHW)).chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp() if sample else mean
        return vae.decoder(vae.post_quant_conv(latents)), mean, logvar

    with torch.no_grad():
        clip = torch.rand(1, 3, NUM_FRAMES, SIDE, SIDE) * 2 - 1
        fast_BCTHW, mean, _ = forward(clip, sample=False)
        posterior = original.encode(clip).latent_dist
        torch.testing.assert_close(mean, posterior.mode(), rtol=1e-4, atol=1e-4)
        slow_BCTHW = original.decode(posterior.mode()).sample
        torch.testing.assert_close(fast_BCTHW.clamp(-1, 1), slow_BCTHW, rtol=1e-4, atol=1e-4)
    return forward


def rms_norm(self: WanRMS_norm, x: Tensor) -> Tensor:
    """WanRMS_norm.forward over channels (it has no bias here), without the slow vector norm."""
    inverse = x.square().sum(dim=1, keepdim=True).clamp_min(1e-24).rsqrt()
    normalized: Tensor = x * inverse * (self.gamma * self.scale)
    return normalized


def whole_clip_resample(self: WanResample, x: Tensor, **_caches: object) -> Tensor:
    """WanResample.forward on all frames at once."""
    if self.mode == "upsample3d":
        rest = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
        x = torch.cat([x[:, :, :1], rest.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
    frames = x.transpose(1, 2)
    x = self.resample(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)
    if self.mode == "downsample3d":
        x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
    return x


def psnr(vae: AutoencoderKLWan, clip_CTHW: Tensor) -> float:
    """Peak signal-to-noise ratio of the mode's reconstruction, pixels in [0, 1], in dB."""
    with torch.no_grad():
        latents = vae.encode(clip_CTHW[None]).latent_dist.mode()
        error = (vae.decode(latents).sample[0] - clip_CTHW) / 2
    return -10 * math.log10(error.square().mean().item())


def mean_psnr(vae: AutoencoderKLWan, clips: dict[str, Tensor]) -> float:
    """Mean over clips of the PSNR in dB."""
    return sum(psnr(vae, clip_CTHW) for clip_CTHW in clips.values()) / len(clips)


def set_latent_statistics(vae: AutoencoderKLWan, clips: dict[str, Tensor]) -> None:
    """Put the mean and deviation of each latent channel over `clips` into the configuration."""
    with torch.no_grad():
        latents = vae.encode(torch.stack(list(clips.values()))).latent_dist.mode()
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in mean.tolist()],
        latents_std=[round(value, 4) for value in std.tolist()],
    )


# -- the data -------------------------------------------------------------------------------------


def load_footage(video: Path) -> Footage:
    """Decode a whole source video, made small, and note its held-out stretches."""
    _, times_s = frame_times(video)
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        scale = SHORT_SIDE / min(stream.width, stream.height)
        width, height = round(stream.width * scale), round(stream.height * scale)
        frames = [
            frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray()
            for frame in container.decode(stream)
        ]
    heldout_s = [
        (window.start_s - MARGIN_S, window.start_s + window.duration_s + MARGIN_S)
        for window in WINDOWS
        if window.source == video.name and window.split == "heldout"
    ]
    frames_TCHW = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()
    return Footage(frames_TCHW, times_s, heldout_s)


def load_clips(data: Path, split: str) -> dict[str, Tensor]:
    """The clips of one split as models see them: 9 frames at 8 fps, 64x64 from the middle."""
    items = json.loads((data / "videos2caption.json").read_text(encoding="utf-8"))
    return {
        item["path"]: load_clip(data / "videos" / item["path"])
        for item in items
        if item["split"] == split
    }


def load_clip(video: Path) -> Tensor:
    """Float [C, T, H, W] of one finished clip."""
    fps, times_s = frame_times(video)
    indices = [frame_at(times_s, k / FPS, fps) for k in range(NUM_FRAMES)]
    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    frames_TCHW = torch.from_numpy(np.stack([frames[i] for i in indices])).permute(0, 3, 1, 2)
    height, width = frames_TCHW.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resized(frames_TCHW[..., top : top + side, left : left + side])


def resized(frames_TCHW: Tensor) -> Tensor:
    """uint8 frames of any size to float [C, T, 64, 64] in [-1, 1]."""
    pixels = frames_TCHW.float() / 127.5 - 1
    small = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
    return small.clamp(-1, 1).transpose(0, 1)


def random_clip(footage: list[Footage], rng: np.random.Generator) -> Tensor:
    """A training clip [C, T, H, W]: mostly a random window and crop of the footage."""
    if rng.random() < SYNTHETIC_SHARE:
        return synthetic_clip(rng)
    source = footage[rng.integers(len(footage))]
    indices = random_times(source, rng)
    height, width = source.frames_TCHW.shape[-2:]
    side = int(min(height, width) * rng.uniform(0.5, 1.0))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    clip_CTHW = resized(source.frames_TCHW[indices, :, top : top + side, left : left + side])
    return clip_CTHW.flip(-1) if rng.random() < 0.5 else clip_CTHW


def random_crop(clip_CTHW: Tensor, side: int, rng: np.random.Generator) -> Tensor:
    """A square cut out of a clip, the same in every frame."""
    top, left = rng.integers(SIDE - side + 1, size=2)
    return clip_CTHW[..., top : top + side, left : left + side]


def random_times(source: Footage, rng: np.random.Generator) -> list[int]:
    """Indices of 9 frames about 1/8 s apart, outside the held-out stretches."""
    times = np.asarray(source.times_s)
    while True:
        interval_s = rng.uniform(0.7, 1.3) / FPS
        start_s = rng.uniform(0, times[-1] - (NUM_FRAMES - 1) * interval_s)
        stamps_s = start_s + interval_s * np.arange(NUM_FRAMES)
        indices = np.searchsorted(times, stamps_s + 1e-3, side="right") - 1
        first_s, last_s = times[indices[0]], times[indices[-1]]
        if all(last_s < begin or first_s > end for begin, end in source.heldout_s):
            return [int(index) for index in indices]


def synthetic_clip(rng: np.random.Generator) -> Tensor:
    """Coloured shapes that move and grow over a gradient that pans and zooms."""
    t, y, x = np.meshgrid(
        np.linspace(0, 1, NUM_FRAMES),
        np.linspace(-1, 1, SIDE),
        np.linspace(-1, 1, SIDE),
        indexing="ij",
    )
    angle, zoom, pan = rng.uniform(0, 2 * np.pi), rng.uniform(-0.4, 0.4), rng.uniform(-0.6, 0.6)
    along = (x * np.cos(angle) + y * np.sin(angle)) * (1 + zoom * t) + pan * t
    wave = 0.5 + 0.5 * np.sin(along * np.exp(rng.uniform(0, 3)) + rng.uniform(0, 2 * np.pi))
    clip = blend(random_colour(rng), random_colour(rng), wave)
    for _ in range(rng.integers(1, 5)):
        dx, dy = (p - rng.uniform(-0.8, 0.8) - rng.uniform(-0.8, 0.8) * t for p in (x, y))
        radius = rng.uniform(0.1, 0.6) * (1 + rng.uniform(-0.3, 0.3) * t)
        stretch = rng.uniform(0.5, 2)
        disc, box = np.hypot(dx * stretch, dy), np.maximum(np.abs(dx * stretch), np.abs(dy))
        inside = np.clip((radius - (disc if rng.random() < 0.5 else box)) * 24 + 0.5, 0, 1)
        clip = blend(clip, random_colour(rng), inside)
    return torch.from_numpy(clip.astype(np.float32))


def random_colour(rng: np.random.Generator) -> NDArray[np.float64]:
    """One colour [C, 1, 1, 1] in [-1, 1]."""
    return rng.uniform(-1, 1, (3, 1, 1, 1))


def blend(
    below: NDArray[np.float64], above: NDArray[np.float64], share: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`above` over `below` where `share` is 1."""
    return below + (above - below) * share


if __name__ == "__main__":
    main()
