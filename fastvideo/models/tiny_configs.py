# SPDX-License-Identifier: Apache-2.0
"""The config.json of each tiny model's transformer, by family and task; no torch."""

from typing import Any

TEXT_DIM = 32
IMAGE_DIM = 32
POOLED_DIM = 8
NUM_HEADS, HEAD_DIM = 4, 32

_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": NUM_HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_DIM,
    "freq_dim": 256,
    "ffn_dim": 256,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
_WAN_I2V = {**_WAN, "in_channels": 36}
_WAN_5B = {**_WAN, "in_channels": 48, "out_channels": 48}
_HUNYUAN: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": NUM_HEADS,
    "attention_head_dim": HEAD_DIM,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "guidance_embeds": True,
    "text_embed_dim": TEXT_DIM,
    "pooled_projection_dim": POOLED_DIM,
    "rope_axes_dim": (8, 12, 12),
}

TRANSFORMERS: dict[tuple[str, str], dict[str, Any]] = {
    ("wan2.1", "t2v"): _WAN,
    ("wan2.1", "i2v"): {
        **_WAN_I2V,
        "image_dim": IMAGE_DIM,
        "added_kv_proj_dim": NUM_HEADS * HEAD_DIM,
    },
    ("wan2.2-a14b", "t2v"): _WAN,
    ("wan2.2-a14b", "i2v"): _WAN_I2V,
    ("wan2.2-ti2v-5b", "t2v"): _WAN_5B,
    ("wan2.2-ti2v-5b", "i2v"): _WAN_5B,
    ("hunyuan-video", "t2v"): _HUNYUAN,
}
"""As published, the image-to-video model of Wan2.1 has CLIP features and that of A14B has none."""
