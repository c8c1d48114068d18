# SPDX-License-Identifier: Apache-2.0
"""What autograd keeps of HunyuanVideo's forward, in the order of its ``hunyuan_forward``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastvideo.cost.hunyuan import TIME_DIM, head, refiner_blocks, width
from fastvideo.cost.layers import Tokens
from fastvideo.cost.tape import FLOAT32, Tape, Value, new

VIDEO = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
"""Projections of a stream and the norms of the first two."""


@dataclass(frozen=True)
class Conditioning:
    """What every block sees beside the two streams."""

    time: Value
    rotary: Value
    mask: Value

    @property
    def values(self) -> list[Value]:
        """All of it, alive as long as a block is to be computed again."""
        return [self.time, self.rotary, self.mask]


@dataclass(frozen=True)
class Streams:
    """Tokens of the video and of the text, which may be parts of one tensor."""

    video: Value
    text: Value

    @property
    def values(self) -> list[Value]:
        """Both."""
        return [self.video, self.text]


class HunyuanSaved:
    """The parts of the forward pass for one micro-batch; ``shared`` processes share a sample."""

    def __init__(self, config: Mapping[str, Any], tokens: Tokens, *, shared: int = 1) -> None:
        """``tokens`` are those of the whole sample."""
        self._config, self._tokens, self._shared = config, tokens, shared
        self._wide, self._heads = width(config), int(config["num_attention_heads"])
        self._video = tokens.batch * math.ceil(tokens.video / shared)
        self._text = tokens.batch * math.ceil(tokens.text / shared)

    def entry(self, tape: Tape) -> tuple[Streams, Conditioning]:
        """Patchify the video, refine the text, embed the conditions."""
        config, batch = self._config, self._tokens.batch
        text = self._refined(tape)
        video = tape.latents(batch * self._tokens.video, "x_embedder.proj", ours=self._video)
        parts = [self._steps(tape, "time_text_embed.timestep_embedder")]
        if config.get("guidance_embeds"):
            parts.append(self._steps(tape, "time_text_embed.guidance_embedder"))
        pooled = Value(batch, config["pooled_projection_dim"], FLOAT32)
        parts.append(self._embedded(tape, pooled, "time_text_embed.text_embedder"))
        angles = Value(2 * self._tokens.video, head(config), FLOAT32)
        mask = Value(batch, self._tokens.video + self._tokens.text, 1)
        return Streams(video, text), Conditioning(tape.like(*parts), angles, mask)

    def block(self, tape: Tape, name: str, x: Streams, condition: Conditioning) -> Streams:
        """A double or a single block."""
        run = self._single if name.startswith("single") else self._double
        return run(tape, name, x, condition)

    def leave(self, tape: Tape, x: Streams, condition: Conditioning) -> None:
        """Final norm and projection."""
        vectors = tape.linear(tape.activation(condition.time), "norm_out.linear")
        scaled = tape.multiply(tape.layer_norm(x.video), self._vector(tape, vectors))
        tape.linear(tape.like(scaled, vectors), "proj_out")

    def _steps(self, tape: Tape, name: str) -> Value:
        """Embed one number of each sample, in float32 whatever autocast says."""
        return self._embedded(tape, Value(self._tokens.batch, TIME_DIM, FLOAT32), name)

    def _embedded(self, tape: Tape, x: Value, name: str) -> Value:
        hidden = tape.activation(tape.linear(x, f"{name}.linear_1"))
        return tape.linear(hidden, f"{name}.linear_2")

    def _refined(self, tape: Tape) -> Value:
        """The text after its own blocks, which every process computes in full."""
        config, batch, embed = self._config, self._tokens.batch, "context_embedder"
        words = batch * self._tokens.text
        steps = self._steps(tape, f"{embed}.time_text_embed.timestep_embedder")
        mean = Value(batch, config["text_embed_dim"], FLOAT32)
        mean = self._embedded(tape, mean, f"{embed}.time_text_embed.text_embedder")
        time = tape.like(steps, mean)
        x = Value(words, config["text_embed_dim"], FLOAT32)
        x = tape.linear(x, f"{embed}.proj_in")
        for name in refiner_blocks(config):
            x = self._refine(tape, name, x, time)
        return x.part(self._text)

    def _refine(self, tape: Tape, name: str, x: Value, time: Value) -> Value:
        gates = tape.linear(tape.activation(time), f"{name}.norm_out.linear")
        normed = tape.layer_norm(x, f"{name}.norm1")
        q, k, v = (tape.linear(normed, f"{name}.attn.to_{which}") for which in "qkv")
        mask = Value(x.rows * self._heads, self._tokens.text, tape.size)
        attended = tape.attention(f"{name}.attn", q, k, v, heads=self._heads, mask=mask)
        attended = tape.linear(attended, f"{name}.attn.to_out.0")
        x = tape.like(x, tape.multiply(attended, gates))
        out = self._feed_forward(tape, tape.layer_norm(x, f"{name}.norm2"), f"{name}.ff")
        return tape.like(x, tape.multiply(out, gates))

    def _double(self, tape: Tape, name: str, x: Streams, condition: Conditioning) -> Streams:
        """Weights of their own for video and text, which meet in the attention."""
        streams = (x.video, x.text)
        gates = [
            tape.linear(tape.activation(condition.time), f"{name}.{norm}.linear")
            for norm in ("norm1", "norm1_context")
        ]
        given = [
            self._projections(tape, f"{name}.attn", self._modulated(tape, *pair), names)
            for *pair, names in zip(streams, gates, (VIDEO, TEXT), strict=True)
        ]
        joined = [cat(*pair) for pair in zip(*given, strict=True)]
        attended = self._attend(tape, f"{name}.attn", joined, condition)
        outs = []
        for stream, gate, out in zip(streams, gates, ("to_out.0", "to_add_out"), strict=True):
            part = attended.part(stream.rows)
            if self._tokens.batch > 1:  # rows of several samples are apart
                part = tape.like(part)
            product = tape.linear(part, f"{name}.attn.{out}")
            outs.append(tape.like(stream, tape.multiply(product, gate)))
        for index, feed_forward in enumerate(("ff", "ff_context")):
            normed = self._modulated(tape, outs[index], gates[index])
            product = self._feed_forward(tape, normed, f"{name}.{feed_forward}")
            outs[index] = tape.like(outs[index], tape.multiply(product, gates[index]))
        return Streams(*outs)

    def _single(self, tape: Tape, name: str, x: Streams, condition: Conditioning) -> Streams:
        """Video and text as one sequence, attention and feed-forward side by side."""
        joint = cat(x.video, x.text)
        gate = tape.linear(tape.activation(condition.time), f"{name}.norm.linear")
        normed = self._modulated(tape, joint, gate)
        hidden = tape.activation(tape.linear(normed, f"{name}.proj_mlp"))
        given = self._projections(tape, f"{name}.attn", normed, VIDEO)
        attended = self._attend(tape, f"{name}.attn", given, condition)
        both = Value(joint.rows, attended.width + hidden.width, attended.size)
        both = tape.like(both, attended, hidden)
        joint = tape.like(joint, tape.multiply(tape.linear(both, f"{name}.proj_out"), gate))
        return Streams(joint.part(self._video), joint.part(self._text))

    def _vector(self, tape: Tape, vectors: Value) -> Value:
        """One plus a scale, of each sample."""
        return new(self._tokens.batch, self._wide, tape.size, of=[vectors])

    def _modulated(self, tape: Tape, x: Value, vectors: Value) -> Value:
        scaled = tape.multiply(tape.layer_norm(x), self._vector(tape, vectors))
        return tape.cast(tape.like(scaled, vectors), x.size)

    def _projections(self, tape: Tape, name: str, x: Value, names: tuple[str, ...]) -> list[Value]:
        """Normalised queries and keys, and values."""
        *projected, v = (tape.linear(x, f"{name}.{projection}") for projection in names[:3])
        q, k = (
            tape.rms_norm_in_steps(y, f"{name}.{norm}", heads=self._heads)
            for y, norm in zip(projected, names[3:], strict=True)
        )
        return [q, k, v]

    def _attend(self, tape: Tape, name: str, joined: list[Value], condition: Conditioning) -> Value:
        q, k, v = joined
        mask = tape.cast(condition.mask, tape.size)  # it is bool
        q, k = (tape.rotate(x, condition.rotary) for x in (q, k))
        out = tape.attention(name, q, k, v, heads=self._heads, mask=mask)
        return out if self._shared == 1 else tape.like(out)

    def _feed_forward(self, tape: Tape, x: Value, name: str) -> Value:
        return tape.linear(tape.activation(tape.linear(x, f"{name}.net.0.proj")), f"{name}.net.2")


def cat(video: Value, text: Value) -> Value:
    """Both one after the other."""
    size = max(video.size, text.size)
    return new(video.rows + text.rows, video.width, size, of=[video, text])
