# SPDX-License-Identifier: Apache-2.0
"""The released checkpoints built on the meta device: counts, tensor names, shapes, file sizes.

Where the expected numbers and names come from is said per release in `sources` of
fastvideo/config/architectures/*.json, and here above each table.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)

from fastvideo.config.architectures import Release, release, releases

CLASSES = {
    cls.__name__: cls
    for cls in (
        WanTransformer3DModel,
        HunyuanVideoTransformer3DModel,
        AutoencoderKLWan,
        AutoencoderKLHunyuanVideo,
    )
}
BYTES = {"F32": 4, "BF16": 2}
SHARD_BYTES = 5 * 10**9
"""max_shard_size="5GB" of diffusers' conversion scripts."""
ATTENTION_ORDER = (
    *("norm_q", "norm_k", "to_q", "to_k", "to_v", "add_k_proj", "add_v_proj"),
    *("to_out", "norm_added_q", "norm_added_k"),
)
"""Order of an attention's layers in diffusers when the checkpoints were converted."""

Shapes = Mapping[str, tuple[int, ...]]
NAMES = [facts.name for facts in releases()]
every_release = pytest.mark.parametrize("name", NAMES)


@cache
def shapes_of(name: str, part: str) -> Shapes:
    """Names and shapes of the parameters of a release's transformer or VAE."""
    config = dict(getattr(release(name), part))
    model_class = CLASSES[config.pop("_class_name")]
    config.pop("clip_output", None)  # in Wan2.2's published VAE config, and in no code
    with torch.device("meta"):
        model = model_class(**config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes.keys() == dict(model.named_parameters()).keys()  # no buffers are saved
    return shapes


def count(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


@every_release
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_parameter_counts_equal_those_recorded_for_the_checkpoint(name: str, part: str) -> None:
    assert count(shapes_of(name, part)) == release(name).parameters[part]


# The counts again, by hand from the layers of the original code, which has other classes and
# names: Wan-Video/Wan2.1 wan/modules/model.py and Tencent-Hunyuan/HunyuanVideo
# hyvideo/modules/{models,token_refiner}.py, with the sizes of their config files.


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def wan(*, width: int, ffn: int, layers: int, channels: tuple[int, int], clip: int = 0) -> int:
    attention = 4 * linear(width, width) + 2 * width  # q, k, v, o and the norms of q and k
    block = 2 * attention + linear(width, ffn) + linear(ffn, width)
    block += 2 * width + 6 * width  # norm3 and modulation
    image = 0
    if clip:  # k_img, v_img and their norm in each block, and MLPProj
        block += 2 * linear(width, width) + width
        image = 2 * clip + linear(clip, clip) + linear(clip, width) + 2 * width
    patches = linear(channels[0] * 4, width)
    text = linear(4096, width) + linear(width, width)
    time = linear(256, width) + linear(width, width) + linear(width, 6 * width)
    head = linear(width, channels[1] * 4) + 2 * width
    return layers * block + image + patches + text + time + head


def hunyuan(*, width: int, double: int, single: int, refiner: int) -> int:
    mlp, head, text = 4 * width, 128, 4096
    embedder = linear(256, width) + linear(width, width)  # of time, and of guidance
    feed_forward = linear(width, mlp) + linear(mlp, width)
    attention = linear(width, 3 * width) + linear(width, width)
    stream = linear(width, 6 * width) + attention + 2 * head + feed_forward
    one = linear(width, 3 * width + mlp) + linear(width + mlp, width)
    one += 2 * head + linear(width, 3 * width)
    refined = attention + 2 * (2 * width) + feed_forward + linear(width, 2 * width)
    text_in = linear(text, width) + embedder
    text_in += linear(text, width) + linear(width, width) + refiner * refined
    patches = linear(16 * 4, width)
    pooled = linear(768, width) + linear(width, width)
    final = linear(width, 16 * 4) + linear(width, 2 * width)
    return double * 2 * stream + single * one + text_in + patches + pooled + 2 * embedder + final


BY_HAND = {
    "hunyuan_t2v": hunyuan(width=3072, double=20, single=40, refiner=2),
    "wan2.1_i2v_14b_480p": wan(width=5120, ffn=13824, layers=40, channels=(36, 16), clip=1280),
    "wan2.1_i2v_14b_720p": wan(width=5120, ffn=13824, layers=40, channels=(36, 16), clip=1280),
    "wan2.1_t2v_1.3b": wan(width=1536, ffn=8960, layers=30, channels=(16, 16)),
    "wan2.1_t2v_14b": wan(width=5120, ffn=13824, layers=40, channels=(16, 16)),
    "wan2.2_i2v_a14b": wan(width=5120, ffn=13824, layers=40, channels=(36, 16)),
    "wan2.2_t2v_a14b": wan(width=5120, ffn=13824, layers=40, channels=(16, 16)),
    "wan2.2_ti2v_5b": wan(width=3072, ffn=14336, layers=30, channels=(48, 48)),
}


@every_release
def test_recorded_counts_follow_from_the_original_layers(name: str) -> None:
    assert release(name).parameters["transformer"] == BY_HAND[name]


# Published file sizes: a safetensors file is 8 bytes, a JSON header with every name, dtype, shape
# and offset, and the numbers. So its exact size checks the names and shapes of all its tensors.


def file_bytes(shapes: Shapes, dtype: str) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"))
    return 8 + math.ceil(len(text) / 8) * 8 + end


def test_file_sizes_are_computed_as_safetensors_writes_them() -> None:
    shapes = {"b.weight": (3, 5), "a.bias": (7,), "a.weight": (2, 1, 4)}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    written = safetensors.torch.save(tensors, metadata={"format": "pt"})
    assert len(written) == file_bytes(shapes, "F32")


def as_converted(facts: Release, shapes: Shapes) -> Shapes:
    """Put the tensors in the order in which they were saved, with those no longer built."""
    unused = facts.weights["transformer"].get("unused")
    order: dict[tuple[int, int, int], str] = {}
    modules: dict[str, int] = {}
    stored = dict(shapes)
    if unused:
        for block in range(facts.transformer["num_layers"]):
            stored[unused["name"].format(block=block)] = tuple(unused["shape"])
    for position, name in enumerate(stored):
        attention = re.match(r"(blocks\.\d+\.attn\d)\.(\w+)", name)
        if attention:
            module = modules.setdefault(attention[1], position)
            order[module, ATTENTION_ORDER.index(attention[2]), position] = name
        else:
            order[position, 0, position] = name
    return {order[key]: stored[order[key]] for key in sorted(order)}


def shards(shapes: Shapes, dtype: str) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        tensor = math.prod(shape) * BYTES[dtype]
        if size + tensor > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += tensor
    yield shard


SIZED = [facts.name for facts in releases() if "files" in facts.weights.get("transformer", {})]


def test_shard_sizes_are_known_for_every_shape_of_wan_transformer_but_one() -> None:
    assert SIZED == ["wan2.1_i2v_14b_480p", "wan2.1_t2v_1.3b", "wan2.2_t2v_a14b", "wan2.2_ti2v_5b"]


@pytest.mark.parametrize("name", SIZED)
def test_the_published_shards_have_the_size_of_exactly_these_tensors(name: str) -> None:
    facts = release(name)
    shapes = as_converted(facts, shapes_of(name, "transformer"))
    for folder in ("transformer", *facts.experts.values()):
        published = facts.weights[folder]
        sizes = [file_bytes(shard, published["dtype"]) for shard in shards(shapes, "F32")]
        assert sizes == published["files"]


@every_release
def test_published_payloads_and_vae_files_have_the_size_of_exactly_these_tensors(name: str) -> None:
    facts = release(name)
    vae = facts.weights["vae"]
    assert vae["files"] == [file_bytes(shapes_of(name, "vae"), vae["dtype"])]
    for folder, weights in facts.weights.items():
        if "payload" in weights:
            assert weights["payload"] == facts.parameters[folder] * BYTES[weights["dtype"]]


@every_release
def test_diffusers_ignores_the_stored_tensors_that_it_does_not_build(name: str) -> None:
    unused = release(name).weights.get("transformer", {}).get("unused")
    if unused:
        stored = unused["name"].format(block=0)
        assert stored not in shapes_of(name, "transformer")
        ignored = WanTransformer3DModel._keys_to_ignore_on_load_unexpected
        assert any(re.search(pattern, stored) for pattern in ignored)


# Names of the converted tensors are what diffusers' scripts/convert_wan_to_diffusers.py and
# convert_hunyuan_video_to_diffusers.py make of the original names; shapes are those of the
# original layers (the right-hand sides), which the scripts keep or split.
WAN_14B = {
    "patch_embedding.weight": (5120, 16, 1, 2, 2),  # patch_embedding
    "condition_embedder.time_embedder.linear_1.weight": (5120, 256),  # time_embedding.0
    "condition_embedder.time_proj.weight": (30720, 5120),  # time_projection.1
    "condition_embedder.text_embedder.linear_1.weight": (5120, 4096),  # text_embedding.0
    "blocks.39.scale_shift_table": (1, 6, 5120),  # blocks.39.modulation
    "blocks.39.attn1.to_q.weight": (5120, 5120),  # blocks.39.self_attn.q
    "blocks.39.attn1.norm_k.weight": (5120,),  # blocks.39.self_attn.norm_k
    "blocks.39.attn2.to_out.0.bias": (5120,),  # blocks.39.cross_attn.o
    "blocks.39.norm2.weight": (5120,),  # blocks.39.norm3
    "blocks.39.ffn.net.0.proj.weight": (13824, 5120),  # blocks.39.ffn.0
    "blocks.39.ffn.net.2.weight": (5120, 13824),  # blocks.39.ffn.2
    "scale_shift_table": (1, 2, 5120),  # head.modulation
    "proj_out.weight": (64, 5120),  # head.head
}
WITH_CLIP = {
    "patch_embedding.weight": (5120, 36, 1, 2, 2),
    "blocks.39.attn2.add_k_proj.weight": (5120, 5120),  # blocks.39.cross_attn.k_img
    "blocks.39.attn2.add_v_proj.bias": (5120,),  # blocks.39.cross_attn.v_img
    "blocks.39.attn2.norm_added_k.weight": (5120,),  # blocks.39.cross_attn.norm_k_img
    "condition_embedder.image_embedder.norm1.weight": (1280,),  # img_emb.proj.0
    "condition_embedder.image_embedder.ff.net.0.proj.weight": (1280, 1280),  # img_emb.proj.1
    "condition_embedder.image_embedder.ff.net.2.weight": (5120, 1280),  # img_emb.proj.3
    "condition_embedder.image_embedder.norm2.weight": (5120,),  # img_emb.proj.4
}
TENSORS: dict[str, Shapes] = {
    "wan2.1_t2v_1.3b": {
        "patch_embedding.weight": (1536, 16, 1, 2, 2),
        "condition_embedder.time_proj.weight": (9216, 1536),
        "blocks.29.attn1.to_q.weight": (1536, 1536),
        "blocks.29.ffn.net.0.proj.weight": (8960, 1536),
        "proj_out.weight": (64, 1536),
    },
    "wan2.1_t2v_14b": WAN_14B,
    "wan2.1_i2v_14b_480p": WAN_14B | WITH_CLIP,
    "wan2.1_i2v_14b_720p": WAN_14B | WITH_CLIP,
    "wan2.2_t2v_a14b": WAN_14B,
    "wan2.2_i2v_a14b": WAN_14B | {"patch_embedding.weight": (5120, 36, 1, 2, 2)},
    "wan2.2_ti2v_5b": {
        "patch_embedding.weight": (3072, 48, 1, 2, 2),
        "blocks.29.attn2.to_v.weight": (3072, 3072),
        "blocks.29.ffn.net.0.proj.weight": (14336, 3072),
        "proj_out.weight": (192, 3072),
    },
    "hunyuan_t2v": {
        "x_embedder.proj.weight": (3072, 16, 1, 2, 2),  # img_in.proj
        "context_embedder.proj_in.weight": (3072, 4096),  # txt_in.input_embedder
        # txt_in.individual_token_refiner.blocks.1.self_attn_qkv, a third of 9216
        "context_embedder.token_refiner.refiner_blocks.1.attn.to_q.weight": (3072, 3072),
        "time_text_embed.text_embedder.linear_1.weight": (3072, 768),  # vector_in.in_layer
        "time_text_embed.guidance_embedder.linear_1.weight": (3072, 256),  # guidance_in.mlp.0
        "transformer_blocks.19.attn.add_k_proj.weight": (3072, 3072),  # a third of txt_attn_qkv
        "transformer_blocks.19.attn.norm_added_q.weight": (128,),  # txt_attn_q_norm
        "transformer_blocks.19.norm1_context.linear.weight": (18432, 3072),  # txt_mod.linear
        "transformer_blocks.19.ff.net.0.proj.weight": (12288, 3072),  # img_mlp.fc1
        "single_transformer_blocks.39.attn.to_q.weight": (3072, 3072),  # part of linear1
        "single_transformer_blocks.39.proj_mlp.weight": (12288, 3072),  # part of linear1
        "single_transformer_blocks.39.proj_out.weight": (3072, 15360),  # linear2
        "norm_out.linear.weight": (6144, 3072),  # final_layer.adaLN_modulation.1
        "proj_out.weight": (64, 3072),  # final_layer.linear
    },
}


@every_release
def test_published_tensors_are_there_with_their_shapes(name: str) -> None:
    shapes = shapes_of(name, "transformer")
    for tensor, shape in TENSORS[name].items():
        assert shapes[tensor] == shape, tensor


# Number of tensors: 825 in the file of the original 1.3B and 5B, 1095 in T2V-14B's index, in that
# of an expert of T2V-A14B and in the original I2V-A14B; 480P I2V: those of T2V and eight of
# img_emb, and per block the weights and biases of k_img and v_img, and norm_k_img.
NUM_TENSORS = {
    "wan2.1_t2v_1.3b": 825,
    "wan2.1_t2v_14b": 1095,
    "wan2.1_i2v_14b_480p": 1095 + 8 + 40 * 5,
    "wan2.1_i2v_14b_720p": 1095 + 8 + 40 * 5,
    "wan2.2_t2v_a14b": 1095,
    "wan2.2_i2v_a14b": 1095,
    "wan2.2_ti2v_5b": 825,
}


@pytest.mark.parametrize("name", NUM_TENSORS)
def test_the_number_of_tensors_is_the_published_one(name: str) -> None:
    assert len(shapes_of(name, "transformer")) == NUM_TENSORS[name]


@every_release
def test_only_releases_with_clip_have_tensors_for_it(name: str) -> None:
    image = [key for key in shapes_of(name, "transformer") if "image_embedder" in key]
    added = [key for key in shapes_of(name, "transformer") if "attn2.add_k_proj" in key]
    has_clip = release(name).image_encoder is not None
    assert (bool(image), bool(added)) == (has_clip, has_clip)
