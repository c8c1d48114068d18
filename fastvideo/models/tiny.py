# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the real architectures: a trained VAE, all else random; for CPU, in seconds."""

import itertools
import string
from importlib.resources import as_file, files
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from fastvideo import atomic
from fastvideo.models.family import quiet_libraries

TEXT_DIM = 32


def write_tiny(folder: Path, *, seed: int = 0) -> None:
    """Write a complete Wan2.1 text-to-video model in diffusers format, about 3 MB.

    The folder appears at once, complete. The transformer has 0.59 M parameters in 2 blocks and
    the text encoder 2 layers, both random from ``seed``; the VAE is the trained one of this
    package.
    """
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=_text_encoder(len(tokenizer)),
            vae=tiny_vae(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                num_train_timesteps=1000,
                flow_shift=3.0,
            ),
            transformer=_transformer(),
        )
    quiet_libraries()
    temporary = atomic.temporary_name(folder)
    atomic.sweep(folder)
    pipeline.save_pretrained(temporary)
    temporary.rename(folder)


def tiny_vae() -> AutoencoderKLWan:
    """Load the trained VAE of 0.22 M parameters; ``tiny_vae/README.md`` says from what."""
    with as_file(files("fastvideo.models").joinpath("tiny_vae")) as folder:
        vae: AutoencoderKLWan = AutoencoderKLWan.from_pretrained(folder, local_files_only=True)
    return vae


def _transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=256,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


def _text_encoder(vocabulary: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=True,
    )
    return UMT5EncoderModel(config).eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    """T5's kind of tokenizer over letters and pairs of letters; other characters by their bytes."""
    letters = string.ascii_lowercase
    pairs = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
    singles = sorted({*string.digits, *string.ascii_letters, *string.punctuation, "▁"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(piece, -8.0) for piece in singles]
    pieces += [(piece, -9.0) for piece in pairs]
    tokenizer = Tokenizer(token_models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )
