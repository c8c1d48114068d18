# SPDX-License-Identifier: Apache-2.0
"""What autograd keeps of HunyuanVideo's forward, in the order of its ``hunyuan_forward``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastvideo.cost.hunyuan import REFINER_RATIO, TIME_DIM, head, hidden, width
from fastvideo.cost.layers import Tokens
from fastvideo.cost.tape import FLOAT32, Tape, Value


@dataclass(frozen=True)
class Conditioning:
    """What every block sees beside the two streams."""

    time: Value
    rotary: Value

    @property
    def values(self) -> list[Value]:
        """All of it, alive as long as a block is to be computed again."""
        return [self.time, self.rotary]


@dataclass(frozen=True)
class Streams:
    """Tokens of the video and of the text; ``joint`` where both are views of one tensor."""

    video: Value
    text: Value
    joint: Value | None = None

    @property
    def values(self) -> list[Value]:
        """The memory they lie in."""
        return [self.joint] if self.joint else [self.video, self.text]


class HunyuanSaved:
    """The parts of the forward pass for one micro-batch; ``shared`` processes share a sample."""

    def __init__(self, config: Mapping[str, Any], tokens: Tokens, *, shared: int = 1) -> None:
        """``tokens`` are those of the whole sample."""
        self._config, self._tokens, self._shared = config, tokens, shared
        self._wide, self._heads = width(config), int(config["num_attention_heads"])
        self._video = tokens.batch * math.ceil(tokens.video / shared)
        self._text = tokens.batch * math.ceil(tokens.text / shared)

    @property
    def blocks(self) -> list[str]:
        """Kind of each block in order."""
        config = self._config
        return ["double"] * config["num_layers"] + ["single"] * config["num_single_layers"]

    def entry(self, tape: Tape) -> tuple[Streams, Conditioning]:
        """Patchify the video, refine the text, embed the conditions."""
        config, wide = self._config, self._wide
        batch, patch = self._tokens.batch, config.get("patch_size", 2)
        text = self._refined(tape)
        channels = config["in_channels"] * patch**2 * config.get("patch_size_t", 1)
        tape.latents(batch * self._tokens.video, self._video, channels)
        video = Value(self._video, wide, tape.size)
        self._steps(tape)
        if config.get("guidance_embeds"):
            self._steps(tape)
        pooled = Value(batch, config["pooled_projection_dim"], FLOAT32)
        tape.linear(tape.activation(tape.linear(pooled, wide)), wide)
        time = Value(batch, wide, FLOAT32)
        angles = Value(2 * self._tokens.video, head(config), FLOAT32)
        return Streams(video, text), Conditioning(time, angles)

    def block(self, tape: Tape, kind: str, x: Streams, condition: Conditioning) -> Streams:
        """A ``double`` or ``single`` block."""
        run = self._double if kind == "double" else self._single
        return run(tape, x, condition)

    def leave(self, tape: Tape, x: Streams) -> None:
        """Final norm and projection."""
        batch, wide = self._tokens.batch, self._wide
        tape.linear(tape.activation(Value(batch, wide, FLOAT32)), 2 * wide)
        normed = tape.layer_norm(x.joint or x.video, rows=self._video)
        scaled = tape.multiply(normed, Value(batch, wide, tape.size))
        tape.linear(tape.like(scaled), wide)

    def _steps(self, tape: Tape) -> None:
        """Embed one number of each sample, in float32 whatever autocast says."""
        batch = self._tokens.batch
        tape.keep(Value(batch, TIME_DIM, FLOAT32))
        tape.keep(tape.activation(Value(batch, self._wide, FLOAT32)))

    def _refined(self, tape: Tape) -> Value:
        """The text after its own blocks, which every process computes in full."""
        config, wide, batch = self._config, self._wide, self._tokens.batch
        words = batch * self._tokens.text
        self._steps(tape)
        mean = Value(batch, config["text_embed_dim"], FLOAT32)
        tape.linear(tape.activation(tape.linear(mean, wide)), wide)
        time = Value(batch, wide, FLOAT32)
        x = tape.linear(Value(words, config["text_embed_dim"], FLOAT32), wide)
        for _ in range(config["num_refiner_layers"]):
            gates = self._vectors(tape, time, 2)
            q, k, v = self._linears(tape, tape.layer_norm(x))
            tape.keep(Value(words * self._heads, self._tokens.text, tape.size))  # the mask
            attended = tape.linear(tape.attention(q, k, v, heads=self._heads), wide)
            x = tape.like(x, tape.multiply(attended, gates))
            out = self._feed_forward(tape, tape.layer_norm(x), inner=REFINER_RATIO * wide)
            x = tape.like(x, tape.multiply(out, gates))
        return Value(self._text, wide, x.size)

    def _double(self, tape: Tape, x: Streams, condition: Conditioning) -> Streams:
        """Weights of their own for video and text, which meet in the attention."""
        streams, wide = (x.video, x.text), self._wide
        gates = [self._vectors(tape, condition.time, 6) for _ in streams]
        given = [self._projections(tape, self._modulated(tape, stream)) for stream in streams]
        joined = [self._cat(tape, *pair) for pair in zip(*given, strict=True)]
        attended = self._attend(tape, joined, condition)
        outs = []
        for stream, gate in zip(streams, gates, strict=True):
            # A part of one sample is a view of the whole; of several samples it is a copy.
            single = self._tokens.batch == 1
            part = attended if single else Value(stream.rows, wide, attended.size)
            tape.linear(part, wide)
            out = Value(stream.rows, wide, tape.size)
            outs.append(tape.like(stream, tape.multiply(out, gate)))
        for index, gate in enumerate(gates):
            normed = self._modulated(tape, outs[index])
            out = self._feed_forward(tape, normed, inner=hidden(self._config))
            outs[index] = tape.like(outs[index], tape.multiply(out, gate))
        return Streams(*outs)

    def _single(self, tape: Tape, x: Streams, condition: Conditioning) -> Streams:
        """Video and text as one sequence, attention and feed-forward side by side."""
        wide = self._wide
        joint = self._cat(tape, x.video, x.text)
        gate = self._vectors(tape, condition.time, 3)
        normed = self._modulated(tape, joint)
        tape.activation(tape.linear(normed, hidden(self._config)))
        attended = self._attend(tape, self._projections(tape, normed), condition)
        both = Value(joint.rows, wide + hidden(self._config), attended.size)
        joint = tape.like(joint, tape.multiply(tape.linear(both, wide), gate))
        video, text = (Value(rows, wide, joint.size) for rows in (self._video, self._text))
        return Streams(video, text, joint)

    def _vectors(self, tape: Tape, time: Value, count: int) -> Value:
        """Shifts, scales and gates of one norm, views of one tensor."""
        return tape.linear(tape.activation(time), count * self._wide)

    def _modulated(self, tape: Tape, x: Value) -> Value:
        vectors = Value(self._tokens.batch, self._wide, tape.size)
        return tape.cast(tape.like(tape.multiply(tape.layer_norm(x), vectors)), x.size)

    def _projections(self, tape: Tape, x: Value) -> list[Value]:
        q, k, v = self._linears(tape, x)
        normed = [tape.rms_norm_in_steps(y, heads=self._heads) for y in (q, k)]
        return [*(tape.like(y) for y in normed), v]

    def _linears(self, tape: Tape, x: Value) -> list[Value]:
        """Queries, keys and values."""
        return [tape.linear(x, self._wide) for _ in range(3)]

    def _attend(self, tape: Tape, joined: list[Value], condition: Conditioning) -> Value:
        q, k, v = joined
        tape.keep(condition.rotary)
        tape.keep(Value(self._tokens.batch, self._tokens.video + self._tokens.text, tape.size))
        out = tape.attention(q, k, v, heads=self._heads)
        return out if self._shared == 1 else tape.like(out)

    def _feed_forward(self, tape: Tape, x: Value, *, inner: int) -> Value:
        return tape.linear(tape.activation(tape.linear(x, inner)), self._wide)

    def _cat(self, tape: Tape, video: Value, text: Value) -> Value:
        return Value(video.rows + text.rows, video.width, max(video.size, text.size))
