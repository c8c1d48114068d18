# SPDX-License-Identifier: Apache-2.0
"""The recipe: which model, which clips, how to train and what to sample. One file, every verb."""

import itertools
import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from fastvideo.config.architectures import Architecture, architecture
from fastvideo.config.parallel import Parallel
from fastvideo.config.paths import File, Place
from fastvideo.config.source import HfSource, Source
from fastvideo.config.spec import Spec
from fastvideo.config.train import Lora, Train


class Model(Spec):
    """The pretrained diffusers model to start from."""

    family: Literal["wan2.1", "wan2.2-a14b", "wan2.2-ti2v-5b", "hunyuan-video"]
    """Architecture."""
    task: Literal["t2v", "i2v"] = "t2v"
    """Text-to-video, or image-to-video: the first frame is given."""
    path: Place
    """Folder in diffusers format, or the id of a model on the Hugging Face Hub."""


class Clip(Spec):
    """The one shape every clip is brought to."""

    num_frames: PositiveInt = 81
    """Pixel frames; temporal stride of the VAE times n, plus 1."""
    height: PositiveInt = 480
    """Pixels; a multiple of VAE stride times patch."""
    width: PositiveInt = 832
    """Pixels; a multiple of VAE stride times patch."""
    fps: PositiveFloat = 16.0
    """Frames per second after resampling by time stamps."""


class Shards(Spec):
    """The Parquet files between preprocessing and training."""

    path: File
    """Folder; recipes with the same encoders, clip and source share it."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of stored latents and CLIP features; float32 stores every tensor so, and upstream FastVideo
    can read it."""
    rows: PositiveInt = 64
    """Clips per shard."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the VAE computes."""
    text_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """In which the text encoder computes, and its embeddings are stored."""


class Preprocess(Spec):
    """How preprocessing uses the machine; none of it changes what the shards hold."""

    processes: PositiveInt | None = None
    """Processes that fill shards at the same time; empty: one per visible GPU, 1 on a CPU."""
    decode_workers: NonNegativeInt = 2
    """Processes that decode ahead of the encoders, for each process that fills shards; 0 decodes in
    the encoders' process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoders run; auto takes the GPU if there is one."""


class Validation(Spec):
    """Prompts that are encoded in preprocessing, for `train.samples` without a text encoder."""

    prompts: File | None = None
    """A JSON file as `generate.prompts`; empty for none. `generate.negative_prompt` is encoded with
    them where guidance takes it."""


class Export(Spec):
    """The folder that diffusers loads: a whole model, or with adapters their LoRA files."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the trained weights, which training keeps in float32; parts that diffusers keeps in
    float32 stay so."""
    max_shard_gib: PositiveFloat = 5.0
    """Largest safetensors file of a whole model; larger weights are split, with an index."""
    components: Literal["link", "copy"] = "link"
    """How the untouched weights of a whole model come in: hard links where the file system allows,
    else copies."""
    ema: bool | None = None
    """Take the average of `train.ema` instead of the last weights; empty does where it is kept."""
    comfyui: bool = False
    """Write LoRA files for ComfyUI as well; of adapters only."""


class LoraFile(Spec):
    """A LoRA for sampling."""

    path: File
    """A file of diffusers, PEFT, ComfyUI or kohya, or a folder with
    `pytorch_lora_weights.safetensors`, for Wan2.2 A14B `pytorch_lora_weights_2.safetensors` too."""
    scale: float = 1.0
    """What its effect is multiplied by, beside its own alpha / rank."""
    transformer: Literal["transformer", "transformer_2"] | None = None
    """What a file is for, where the model has two transformers and the name does not say it."""


class Generate(Spec):
    """Sampling with the diffusers pipeline."""

    prompts: File | None = None
    """JSON: upstream's `{"data": [{"caption": ...}]}` or a list of prompts."""
    weights: Literal["export", "checkpoint", "base"] = "export"
    """Sample the exported model, the newest checkpoint without an export, or the base model."""
    loras: tuple[LoraFile, ...] = ()
    """LoRAs that are added to these weights while sampling."""
    seed: NonNegativeInt = 0
    """Of the first prompt; prompt i takes seed + i."""
    num_inference_steps: PositiveInt = 50
    """For prompts that do not say their own."""
    guidance_scale: float = Field(default=5.0, ge=1)
    """Classifier-free guidance, 1 switches it off; HunyuanVideo takes it as an input instead."""
    guidance_scale_2: float | None = Field(default=None, ge=1)
    """The same for the low-noise expert of Wan2.2 A14B; empty takes `guidance_scale`."""
    negative_prompt: str = ""
    """What classifier-free guidance leads away from."""
    flow_shift: PositiveFloat | None = None
    """Shift of the sampler's noise levels; empty takes the model's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to sample; auto takes the GPU if there is one."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the transformer and the text encoder; the VAE stays float32."""
    offload: Literal["none", "model", "sequential"] = "none"
    """What waits in host memory while it is not needed: nothing, whole models, or each layer."""
    vae_tiling: bool = False
    """Decode in overlapping tiles: less memory, faint seams are possible."""


class Recipe(Spec):
    """Raw videos in, finetuned model and samples out. Paths are relative to the working folder."""

    model: Model
    """Where to start from."""
    clip: Clip = Clip()
    """Shape of a clip."""
    source: Annotated[Source, Field(discriminator="kind")]
    """The clips."""
    shards: Shards
    """What preprocessing writes."""
    run_dir: File
    """What training, export and sampling write."""
    preprocess: Preprocess = Preprocess()
    """How preprocessing uses the machine."""
    train: Train = Train()
    """Training."""
    parallel: Parallel = Parallel()
    """Processes that train together."""
    validation: Validation = Validation()
    """Prompts for samples."""
    export: Export = Export()
    """The result."""
    generate: Generate = Generate()
    """Sampling after training."""

    @property
    def architecture(self) -> Architecture:
        """The facts of ``model.family``."""
        return architecture(self.model.family)

    @property
    def guided(self) -> bool:
        """Whether sampling calls the model for the negative prompt as well."""
        return self.generate.guidance_scale > 1 and not self.architecture.embedded_guidance

    @property
    def averaged(self) -> bool:
        """Whether the average is what is exported, and sampled of a checkpoint."""
        return self.train.ema is not None if self.export.ema is None else self.export.ema

    @property
    def transformers(self) -> tuple[str, ...]:
        """Folders of the transformers that are trained, in this order."""
        experts, chosen = self.architecture.experts, self.train.expert
        return (experts[chosen],) if chosen else self.architecture.transformers

    @model_validator(mode="after")
    def _clip_fits_the_model(self) -> Self:
        clip = self.clip
        problems = self.architecture.misfits(
            num_frames=clip.num_frames, height=clip.height, width=clip.width
        )
        if problems:
            raise ValueError("; ".join(f"clip.{problem}" for problem in problems))
        return self

    @model_validator(mode="after")
    def _folders_are_apart(self) -> Self:
        folders = {
            "model.path": Path(self.model.path),
            "source.path": self.source.path,
            "shards.path": self.shards.path,
            "run_dir": self.run_dir,
        }
        for (name, one), (other, two) in itertools.combinations(folders.items(), 2):
            if os.path.realpath(one) == os.path.realpath(two):
                raise ValueError(f"{other}={two}: is {name} as well; give each a folder of its own")
        if Path(os.path.realpath(self.model.path)).is_relative_to(os.path.realpath(self.run_dir)):
            raise ValueError(
                f"model.path={self.model.path}: lies in run_dir, whose export would replace it; "
                "choose another run_dir"
            )
        return self

    @model_validator(mode="after")
    def _set_holds_no_files_of_ours(self) -> Self:
        if not isinstance(self.source, HfSource):
            return self
        folder = Path(self.source.path).expanduser()
        for key, ours in {"shards.path": self.shards.path, "run_dir": self.run_dir}.items():
            inside = Path(os.path.realpath(ours)).is_relative_to(os.path.realpath(folder))
            if inside and folder.is_dir():
                raise ValueError(
                    f"{key}={ours}: lies in source.path={self.source.path}, where `datasets` takes "
                    "every file for a part of the set; choose a folder outside of it"
                )
        return self

    @model_validator(mode="after")
    def _model_has_the_task(self) -> Self:
        tasks = self.architecture.tasks
        if self.model.task not in tasks:
            raise ValueError(
                f"model.task={self.model.task}: {self.model.family} does {' and '.join(tasks)} "
                "only; choose another family or task"
            )
        if self.model.task == "i2v" and self.clip.num_frames == 1:
            raise ValueError(
                "clip.num_frames=1: image-to-video needs frames after the first; the least is "
                f"{self.architecture.temporal_stride + 1}"
            )
        return self

    @model_validator(mode="after")
    def _experts_exist(self) -> Self:
        experts = self.architecture.experts
        chosen: dict[str, object] = {
            "train.expert": self.train.expert,
            "generate.guidance_scale_2": self.generate.guidance_scale_2,
        }
        for index, lora in enumerate(self.generate.loras):
            if lora.transformer == "transformer_2":
                chosen[f"generate.loras[{index}].transformer"] = lora.transformer
        for key, value in chosen.items():
            if value is not None and not experts:
                raise ValueError(
                    f"{key}={value}: {self.model.family} has one transformer; remove the key"
                )
        second = self.generate.guidance_scale_2 or 1
        if self.generate.guidance_scale == 1 and second > 1:
            raise ValueError(
                f"generate.guidance_scale_2={second:g}: has no effect while guidance_scale=1 "
                "switches guidance off; raise that one too, or remove this key"
            )
        return self

    @model_validator(mode="after")
    def _samples_have_prompts(self) -> Self:
        if self.train.samples is not None and self.validation.prompts is None:
            raise ValueError(
                "train.samples: there is nothing to sample; name a JSON file with prompts as "
                "validation.prompts and run preprocess, or remove train.samples"
            )
        return self

    @model_validator(mode="after")
    def _what_is_exported_is_trained(self) -> Self:
        if self.export.ema and self.train.ema is None:
            raise ValueError(
                "export.ema=True: training keeps no average; set train.ema before training, or "
                "leave it out"
            )
        if self.export.comfyui and not isinstance(self.train.method, Lora):
            raise ValueError(
                f"export.comfyui=True: is for adapters, train.method.kind is "
                f"{self.train.method.kind}; remove the key"
            )
        return self

    @model_validator(mode="after")
    def _guidance_is_of_the_models_kind(self) -> Self:
        embedded = self.architecture.embedded_guidance
        if self.train.guidance is not None and not embedded:
            raise ValueError(
                f"train.guidance={self.train.guidance:g}: {self.model.family} takes no guidance as "
                "an input; remove the key"
            )
        if self.generate.negative_prompt and embedded:
            raise ValueError(
                f"generate.negative_prompt: {self.model.family} is distilled for guidance and "
                "takes no negative prompt; remove the key"
            )
        return self
