# SPDX-License-Identifier: Apache-2.0
"""How LoRA files call a transformer's projections, and which of diffusers' they are; no torch.

Three tongues: diffusers'; that of the models' own code, which ComfyUI reads with
``diffusion_model.`` before it; and the latter with ``_`` for every point after ``lora_unet_``, as
kohya's and musubi's trainers write it. The models' own code has some projections in one.
"""

import re
from collections.abc import Iterator, Sequence

from fastvideo.cost.transformer import is_hunyuan

FLAT_PREFIX = "lora_unet_"
PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.")
"""What may stand before a name, outermost first; each is taken off once."""
KINDS = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "lora_B.bias": "bias",
    "alpha": "alpha",
    "diff_b": "diff_b",
}
"""What a key holds, by its end: the matrices A (rank, in) and B (out, rank), the bias after B, the
alpha of this projection, or a change of the projection's own bias, which alpha does not scale."""
_END = re.compile(r"(?P<module>.+?)\.(?P<end>(?:lora_\w+|alpha|diff_b)(?:\.\w+)*)")
_NUMBER = re.compile(r"(?<=blocks[._])\d+(?=[._])")

Rows = tuple[tuple[str, tuple[str, ...]], ...]


def _each(own: str, diffusers: str, *pairs: tuple[str, str]) -> Rows:
    return tuple((own + one, (diffusers + other,)) for one, other in pairs)


_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
_ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
_IMAGE = (("k_img", "add_k_proj"), ("v_img", "add_v_proj"))
_WAN: Rows = (
    ("patch_embedding", ("patch_embedding",)),
    *_each("blocks.{}.self_attn.", "blocks.{}.attn1.", *_ATTENTION),
    *_each("blocks.{}.cross_attn.", "blocks.{}.attn2.", *_ATTENTION, *_IMAGE),
    *_each("blocks.{}.ffn.", "blocks.{}.ffn.net.", ("0", "0.proj"), ("2", "2")),
    *_each(
        "",
        "condition_embedder.",
        ("time_embedding.0", "time_embedder.linear_1"),
        ("time_embedding.2", "time_embedder.linear_2"),
        ("time_projection.1", "time_proj"),
        ("text_embedding.0", "text_embedder.linear_1"),
        ("text_embedding.2", "text_embedder.linear_2"),
        ("img_emb.proj.1", "image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3", "image_embedder.ff.net.2"),
    ),
    ("head.head", ("proj_out",)),
)


def _embedder(own: str, diffusers: str) -> Rows:
    return _each(own, diffusers, (".in_layer", ".linear_1"), (".out_layer", ".linear_2"))


def _stream(own: str, diffusers: str, *, norm: str, ff: str, qkv: Sequence[str], out: str) -> Rows:
    """Video or text in a block that has weights for each."""
    return (
        (f"{own}_mod.linear", (f"{diffusers}{norm}.linear",)),
        (f"{own}_attn_qkv", tuple(f"{diffusers}attn.{name}" for name in qkv)),
        (f"{own}_attn_proj", (f"{diffusers}attn.{out}",)),
        *_feed_forward(f"{own}_mlp", f"{diffusers}{ff}"),
    )


def _feed_forward(own: str, diffusers: str) -> Rows:
    return _each(own, f"{diffusers}.net.", (".fc1", "0.proj"), (".fc2", "2"))


_REFINER = "txt_in.individual_token_refiner.blocks.{}."
_REFINING = "context_embedder.token_refiner.refiner_blocks.{}."
_DOUBLE, _SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."
_HUNYUAN: Rows = (
    ("img_in.proj", ("x_embedder.proj",)),
    *_embedder("time_in", "time_text_embed.timestep_embedder"),
    *_embedder("guidance_in", "time_text_embed.guidance_embedder"),
    *_embedder("vector_in", "time_text_embed.text_embedder"),
    ("txt_in.input_embedder", ("context_embedder.proj_in",)),
    *_embedder("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder"),
    *_embedder("txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder"),
    (f"{_REFINER}self_attn_qkv", tuple(f"{_REFINING}attn.{name}" for name in _QKV)),
    (f"{_REFINER}self_attn_proj", (f"{_REFINING}attn.to_out.0",)),
    *_feed_forward(f"{_REFINER}mlp", f"{_REFINING}ff"),
    (f"{_REFINER}adaLN_modulation.1", (f"{_REFINING}norm_out.linear",)),
    *_stream("double_blocks.{}.img", _DOUBLE, norm="norm1", ff="ff", qkv=_QKV, out="to_out.0"),
    *_stream(
        "double_blocks.{}.txt",
        _DOUBLE,
        norm="norm1_context",
        ff="ff_context",
        qkv=_ADDED_QKV,
        out="to_add_out",
    ),
    (
        "single_blocks.{}.linear1",
        (*(f"{_SINGLE}attn.{name}" for name in _QKV), f"{_SINGLE}proj_mlp"),
    ),
    ("single_blocks.{}.linear2", (f"{_SINGLE}proj_out",)),
    ("single_blocks.{}.modulation.linear", (f"{_SINGLE}norm.linear",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
)
SWAPPED = "norm_out.linear"
"""HunyuanVideo's last modulation: diffusers has scale before shift, the model's code after it."""
MLP_RATIO = 4
"""Width inside HunyuanVideo's feed-forward layers by that of a token, in every release."""


def parse(key: str) -> tuple[str, str] | None:
    """Take a key of a file apart: its module as written there, and what it holds, see `KINDS`.

    None for what is no part of a LoRA as it is known here. Names of adapters, which PEFT may write
    between ``lora_A`` and ``weight``, are passed over.
    """
    found = _END.fullmatch(key)
    if not found:
        return None
    first, *rest = found["end"].split(".")
    kind = KINDS.get(".".join([first, *rest[-1:]]))
    return (found["module"], kind) if kind and len(rest) <= 2 else None


def diffusers_names(module: str) -> tuple[str, ...]:
    """Name a module of a file as diffusers does: one projection, or those that it has in one.

    Names in no known tongue come back without prefix, so that it can be said what they are not.
    """
    flat = module.startswith(FLAT_PREFIX)
    name = module.removeprefix(FLAT_PREFIX) if flat else _bare(module)
    number = _NUMBER.search(name)
    template = _NUMBER.sub("{}", name, count=1)
    found = (_BY_FLAT_NAME if flat else _BY_OWN_NAME).get(template)
    if found is None:
        return (name,)
    return tuple(name.format(number[0] if number else "") for name in found)


def own_name(module: str, family: str) -> tuple[str, tuple[str, ...]] | None:
    """Name a projection of diffusers as the model's own code does, with all that are in it."""
    number = _NUMBER.search(module)
    found = _BY_DIFFUSERS_NAME[is_hunyuan(family)].get(_NUMBER.sub("{}", module, count=1))
    if found is None:
        return None
    place = number[0] if number else ""
    return found[0].format(place), tuple(name.format(place) for name in found[1])


def split(outputs: int, *, inputs: int, parts: int) -> tuple[int, ...] | None:
    """Say how the outputs of a projection are dealt to its ``parts``; None if they do not fit.

    Three are queries, keys and values; a fourth is what a single block's feed-forward layer takes.
    """
    if parts == 4:
        rest = outputs - 3 * inputs
        return (inputs, inputs, inputs, rest) if rest > 0 else None
    return None if outputs % parts else (outputs // parts,) * parts


def _bare(module: str) -> str:
    for prefix in PREFIXES:
        module = module.removeprefix(prefix)
    return module


_COMFYUI = (
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("_mod.linear", "_mod.lin"),
    ("modulation.linear", "modulation.lin"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
)
_ORIGINAL = (
    ("time_in.in_layer", "time_in.mlp.0"),
    ("time_in.out_layer", "time_in.mlp.2"),
    ("guidance_in.in_layer", "guidance_in.mlp.0"),
    ("guidance_in.out_layer", "guidance_in.mlp.2"),
    ("t_embedder.in_layer", "t_embedder.mlp.0"),
    ("t_embedder.out_layer", "t_embedder.mlp.2"),
    ("c_embedder.in_layer", "c_embedder.linear_1"),
    ("c_embedder.out_layer", "c_embedder.linear_2"),
)


def _spellings(name: str) -> Iterator[str]:
    """ComfyUI renames a part of HunyuanVideo's own names, and reads the old ones of most."""
    yield name
    for changes in (_COMFYUI, _ORIGINAL):
        other = name
        for one, another in changes:
            other = other.replace(one, another)
        yield other


_BY_OWN_NAME = {
    **{spelt: parts for own, parts in _HUNYUAN for spelt in _spellings(own)},
    **dict(_WAN),
}
_BY_FLAT_NAME = {own.replace(".", "_"): parts for own, parts in _BY_OWN_NAME.items()}
_BY_DIFFUSERS_NAME = tuple(
    {part: (own, parts) for own, parts in rows for part in parts} for rows in (_WAN, _HUNYUAN)
)
"""Of Wan, of HunyuanVideo."""
