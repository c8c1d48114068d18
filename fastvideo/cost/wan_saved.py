# SPDX-License-Identifier: Apache-2.0
"""What autograd keeps of Wan's forward pass, in the order of ``fastvideo.models.wan_forward``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastvideo.cost.layers import Tokens
from fastvideo.cost.tape import FLOAT32, Tape, Value, new
from fastvideo.cost.wan import width

EMBED = "condition_embedder"


@dataclass(frozen=True)
class Conditioning:
    """What every block sees beside the tokens; ``time`` the exit only."""

    modulation: Value
    text: Value
    image: Value | None
    rotary: Value
    time: Value

    @property
    def values(self) -> list[Value]:
        """All that is alive as long as a block is to be computed again."""
        found = [self.modulation, self.text, self.image, self.rotary]
        return [value for value in found if value is not None]


class WanSaved:
    """The parts of the forward pass for one micro-batch; ``shared`` processes share a sample."""

    def __init__(self, config: Mapping[str, Any], tokens: Tokens, *, shared: int = 1) -> None:
        """``tokens`` are those of the whole sample."""
        self._config, self._tokens, self._shared = config, tokens, shared
        self._wide, self._heads = width(config), int(config["num_attention_heads"])
        self._rows = tokens.batch * math.ceil(tokens.video / shared)
        self._spread = shared > 1 and tokens.runs > 1

    def entry(self, tape: Tape) -> tuple[Value, Conditioning]:
        """Patchify and embed."""
        config, tokens = self._config, self._tokens
        time = self._time(tape)
        modulation = tape.linear(tape.activation(time), f"{EMBED}.time_proj")
        text = Value(tokens.batch * tokens.text, config["text_dim"], FLOAT32)
        text = tape.activation(tape.linear(text, f"{EMBED}.text_embedder.linear_1"))
        text = tape.linear(text, f"{EMBED}.text_embedder.linear_2")
        angles = Value(2 * tokens.video, config["attention_head_dim"], FLOAT32)
        condition = Conditioning(modulation, text, self._image(tape), angles, time)
        patches = tokens.batch * tokens.video
        return tape.latents(patches, "patch_embedding", ours=self._rows), condition

    def block(self, tape: Tape, name: str, x: Value, condition: Conditioning) -> Value:
        """One block; there is one kind."""
        vectors = tape.like(condition.modulation, tape.table(f"{name}.scale_shift_table"))

        normed = tape.cast(self._modulated_norm(tape, x, vectors), x.size)
        attended = self._self_attention(tape, f"{name}.attn1", normed, condition)
        attended = tape.multiply(attended, self._gate(vectors))
        x = tape.cast(tape.like(x, attended), x.size)

        normed = x
        if self._config.get("cross_attn_norm", True):
            normed = tape.layer_norm(tape.cast(x, FLOAT32), f"{name}.norm2")
            normed = tape.cast(normed, x.size)
        x = tape.like(x, self._cross_attention(tape, f"{name}.attn2", normed, condition))

        normed = tape.cast(self._modulated_norm(tape, x, vectors), x.size)
        hidden = tape.activation(tape.linear(normed, f"{name}.ffn.net.0.proj"))
        out = tape.cast(tape.linear(hidden, f"{name}.ffn.net.2"), FLOAT32)
        out = tape.multiply(out, self._gate(vectors))
        return tape.cast(tape.like(x, out), x.size)

    def leave(self, tape: Tape, x: Value, condition: Conditioning) -> None:
        """Final norm and projection."""
        vectors = tape.like(condition.time, tape.table("scale_shift_table"))
        normed = tape.cast(self._modulated_norm(tape, x, vectors), x.size)
        tape.linear(normed, "proj_out")

    def _time(self, tape: Tape) -> Value:
        rows = self._tokens.batch * self._tokens.runs
        waves = Value(rows, self._config["freq_dim"], FLOAT32)
        hidden = tape.activation(tape.linear(waves, f"{EMBED}.time_embedder.linear_1"))
        return tape.linear(hidden, f"{EMBED}.time_embedder.linear_2")

    def _image(self, tape: Tape) -> Value | None:
        config, tokens, embed = self._config, self._tokens, f"{EMBED}.image_embedder"
        if not config.get("image_dim"):
            return None
        picture = Value(tokens.batch * tokens.image, config["image_dim"], FLOAT32)
        normed = tape.layer_norm(picture, f"{embed}.norm1")
        hidden = tape.activation(tape.linear(normed, f"{embed}.ff.net.0.proj"))
        embedded = tape.linear(hidden, f"{embed}.ff.net.2")
        normed = tape.layer_norm(tape.cast(embedded, FLOAT32), f"{embed}.norm2")
        return tape.cast(normed, embedded.size)

    def _modulated_norm(self, tape: Tape, x: Value, vectors: Value) -> Value:
        """Layer norm in float32, scaled and shifted by vectors of each run of tokens."""
        runs = self._rows if self._spread else self._tokens.batch * self._tokens.runs
        normed = tape.layer_norm(tape.cast(x, FLOAT32))
        scale = new(runs, self._wide, FLOAT32, of=[vectors])
        return tape.like(tape.multiply(normed, scale), vectors)

    def _gate(self, vectors: Value) -> Value:
        """A view of the vectors, or where runs differ in length one for each token."""
        return new(self._rows, self._wide, FLOAT32, of=[vectors]) if self._spread else vectors

    def _self_attention(self, tape: Tape, name: str, x: Value, condition: Conditioning) -> Value:
        q, k = (
            tape.rotate(
                tape.rms_norm(tape.linear(x, f"{name}.to_{which}"), f"{name}.norm_{which}"),
                condition.rotary,
            )
            for which in "qk"
        )
        out = tape.attention(name, q, k, tape.linear(x, f"{name}.to_v"), heads=self._heads)
        if self._shared > 1:  # comes back from the others as a tensor of its own
            out = tape.like(out)
        return tape.linear(out, f"{name}.to_out.0")

    def _cross_attention(self, tape: Tape, name: str, x: Value, condition: Conditioning) -> Value:
        q = tape.rms_norm(tape.linear(x, f"{name}.to_q"), f"{name}.norm_q")
        given, image = condition.text, condition.image
        k = tape.rms_norm(tape.linear(given, f"{name}.to_k"), f"{name}.norm_k")
        v = tape.linear(given, f"{name}.to_v")
        out = tape.attention(name, q, k, v, heads=self._heads)
        if image is not None:
            k = tape.rms_norm(tape.linear(image, f"{name}.add_k_proj"), f"{name}.norm_added_k")
            v = tape.linear(image, f"{name}.add_v_proj")
            added = tape.attention(f"{name}.added", q, k, v, heads=self._heads)
            out = tape.like(out, added)
        return tape.linear(out, f"{name}.to_out.0")
