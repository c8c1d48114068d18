# SPDX-License-Identifier: Apache-2.0
"""What autograd keeps of Wan's forward pass, in the order of ``fastvideo.models.wan_forward``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastvideo.cost.layers import Tokens
from fastvideo.cost.tape import FLOAT32, Tape, Value
from fastvideo.cost.wan import width


@dataclass(frozen=True)
class Conditioning:
    """What every block sees beside the tokens."""

    modulation: Value
    text: Value
    image: Value | None
    rotary: Value

    @property
    def values(self) -> list[Value]:
        """All of it, alive as long as a block is to be computed again."""
        found = [self.modulation, self.text, self.image, self.rotary]
        return [value for value in found if value is not None]


class WanSaved:
    """The parts of the forward pass for one micro-batch; ``shared`` processes share a sample."""

    def __init__(self, config: Mapping[str, Any], tokens: Tokens, *, shared: int = 1) -> None:
        """``tokens`` are those of the whole sample."""
        self._config, self._tokens, self._shared = config, tokens, shared
        self._wide = width(config)
        self._rows = tokens.batch * math.ceil(tokens.video / shared)
        self._spread = shared > 1 and tokens.runs > 1

    @property
    def blocks(self) -> list[str]:
        """Kind of each block in order."""
        return ["block"] * int(self._config["num_layers"])

    def entry(self, tape: Tape) -> tuple[Value, Conditioning]:
        """Patchify and embed."""
        config, tokens, wide = self._config, self._tokens, self._wide
        time = self._time(tape)
        modulation = tape.linear(tape.activation(time), 6 * wide)
        text = Value(tokens.batch * tokens.text, config["text_dim"], FLOAT32)
        text = tape.linear(tape.activation(tape.linear(text, wide)), wide)
        angles = Value(2 * tokens.video, config["attention_head_dim"], FLOAT32)
        condition = Conditioning(modulation, text, self._image(tape), angles)
        patch = config["in_channels"] * math.prod(config["patch_size"])
        tape.latents(tokens.batch * tokens.video, self._rows, patch)
        return Value(self._rows, wide, tape.size), condition

    def block(self, tape: Tape, kind: str, x: Value, condition: Conditioning) -> Value:
        """One block; there is one kind."""
        config, wide = self._config, self._wide
        vectors = tape.like(condition.modulation, Value(1, 1, FLOAT32))
        gates = [vectors, vectors]
        if self._spread:
            gates = [Value(self._rows, wide, FLOAT32) for _ in range(2)]

        normed = tape.cast(self._modulated_norm(tape, x), x.size)
        attended = self._gated(tape, self._self_attention(tape, normed, condition), gates[0])
        x = tape.cast(tape.like(x, attended), x.size)

        normed = x
        if config.get("cross_attn_norm", True):
            normed = tape.cast(tape.layer_norm(tape.cast(x, FLOAT32)), x.size)
        self._cross_attention(tape, normed, condition)
        x = tape.like(x)

        normed = tape.cast(self._modulated_norm(tape, x), x.size)
        hidden = tape.activation(tape.linear(normed, config["ffn_dim"]))
        out = tape.cast(tape.linear(hidden, wide), FLOAT32)
        return tape.cast(tape.like(x, self._gated(tape, out, gates[1])), x.size)

    def leave(self, tape: Tape, x: Value) -> None:
        """Final norm and projection."""
        normed = tape.cast(self._modulated_norm(tape, x), x.size)
        tape.linear(normed, self._wide)

    def _time(self, tape: Tape) -> Value:
        """Embed the timesteps, in float32 whatever autocast says."""
        rows = self._tokens.batch * self._tokens.runs
        tape.keep(Value(rows, self._config["freq_dim"], FLOAT32))
        tape.keep(tape.activation(Value(rows, self._wide, FLOAT32)))
        return Value(rows, self._wide, FLOAT32)

    def _image(self, tape: Tape) -> Value | None:
        config, tokens = self._config, self._tokens
        if not config.get("image_dim"):
            return None
        picture = Value(tokens.batch * tokens.image, config["image_dim"], FLOAT32)
        normed = tape.layer_norm(picture)
        hidden = tape.activation(tape.linear(normed, config["image_dim"]))
        embedded = tape.linear(hidden, self._wide)
        return tape.cast(tape.layer_norm(tape.cast(embedded, FLOAT32)), embedded.size)

    def _modulated_norm(self, tape: Tape, x: Value) -> Value:
        """Layer norm in float32, scaled and shifted by vectors of each run of tokens."""
        runs = self._rows if self._spread else self._tokens.batch * self._tokens.runs
        normed = tape.layer_norm(tape.cast(x, FLOAT32))
        return tape.like(tape.multiply(normed, Value(runs, self._wide, FLOAT32)))

    def _gated(self, tape: Tape, x: Value, gate: Value) -> Value:
        return tape.multiply(x, gate)

    def _self_attention(self, tape: Tape, x: Value, condition: Conditioning) -> Value:
        wide = self._wide
        tape.keep(condition.rotary)
        q, k = (tape.like(tape.rms_norm(tape.linear(x, wide))) for _ in range(2))
        out = tape.attention(q, k, tape.linear(x, wide), heads=self._heads)
        if self._shared > 1:  # comes back from the others as a tensor of its own
            out = tape.like(out)
        return tape.linear(out, wide)

    def _cross_attention(self, tape: Tape, x: Value, condition: Conditioning) -> Value:
        wide = self._wide
        q = tape.rms_norm(tape.linear(x, wide))
        out = self._attend(tape, q, condition.text)
        if condition.image is not None:
            out = tape.like(out, self._attend(tape, q, condition.image))
        return tape.linear(out, wide)

    def _attend(self, tape: Tape, q: Value, given: Value) -> Value:
        k = tape.rms_norm(tape.linear(given, self._wide))
        return tape.attention(q, k, tape.linear(given, self._wide), heads=self._heads)

    @property
    def _heads(self) -> int:
        return int(self._config["num_attention_heads"])
