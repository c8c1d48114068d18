# SPDX-License-Identifier: Apache-2.0
"""What autograd keeps of a forward pass: each operation's tensors, by the rules of torch's kernels.

The activation models of the families call these operations in the order of their forward passes,
with sizes instead of tensors. Under autocast matrix products and attention compute in bfloat16.
"""

from dataclasses import dataclass

FLOAT32 = 4
"""Bytes of a number."""


@dataclass(frozen=True, eq=False)
class Value:
    """The memory of a tensor and of all its views: how many rows of a width, bytes of a number."""

    rows: int
    width: int
    size: int

    @property
    def bytes(self) -> int:
        """Of all its numbers."""
        return self.rows * self.width * self.size


class Tape:
    """Keeps every value once, however many operations want it.

    GPUs differ from CPUs in two rules: autocast computes norms in float32, and the fused RMS norm
    keeps its input instead of the steps. Parameters are never kept, nor the copies that autocast
    makes of them; `fastvideo.cost.memory` counts those as weights.
    """

    def __init__(self, *, dtype: str, gpu: bool) -> None:
        """``dtype`` is that of the computation, ``train.dtype``."""
        self.size = FLOAT32 if dtype == "float32" else 2
        self.attended: list[Value] = []
        self._gpu = gpu
        self._kept: dict[Value, None] = {}

    @property
    def bytes(self) -> int:
        """Of all values that are kept."""
        return sum(value.bytes for value in self._kept)

    def keep(self, *values: Value) -> None:
        """Keep values that are not yet."""
        self._kept.update(dict.fromkeys(values))

    def without(self, values: list[Value]) -> int:
        """Bytes of all values that are kept but ``values``."""
        return self.bytes - sum(value.bytes for value in values if value in self._kept)

    def like(self, x: Value, *others: Value) -> Value:
        """A new tensor of the shape of ``x`` and the widest of all dtypes, as a sum has."""
        return Value(x.rows, x.width, max(value.size for value in (x, *others)))

    def cast(self, x: Value, size: int) -> Value:
        """``x`` itself if its numbers have ``size`` bytes, else a copy."""
        return x if x.size == size else Value(x.rows, x.width, size)

    def linear(self, x: Value, width: int) -> Value:
        """A matrix product with trained weights."""
        x = self.cast(x, self.size)
        self.keep(x)
        return Value(x.rows, width, self.size)

    def latents(self, rows: int, ours: int, width: int) -> None:
        """The convolution of the latents' patches, ``ours`` of all ``rows``: a view, or a cast."""
        self.keep(Value(rows if self.size == FLOAT32 else ours, width, self.size))

    def activation(self, x: Value) -> Value:
        """GELU or SiLU."""
        self.keep(x)
        return self.like(x)

    def multiply(self, x: Value, y: Value) -> Value:
        """A product whose factors both have gradients; ``x`` has the shape of the result."""
        self.keep(x, y)
        return self.like(x, y)

    def layer_norm(self, x: Value, *, rows: int | None = None) -> Value:
        """Layer norm as autocast runs it, of the first ``rows`` of ``x``, a view, or of all."""
        rows = rows or x.rows
        if self._gpu and x.size != FLOAT32:
            x = Value(rows, x.width, FLOAT32)
        self.keep(x, Value(rows, 2, x.size))
        return Value(rows, x.width, x.size)

    def rms_norm(self, x: Value) -> Value:
        """RMS norm of torch with weights, which are float32."""
        wide = self.cast(x, FLOAT32)
        self.keep(wide, Value(x.rows, 1, FLOAT32))
        if self._gpu:
            return self.like(wide)
        self.keep(self.like(wide))
        return self.like(x)

    def rms_norm_in_steps(self, x: Value, *, heads: int) -> Value:
        """RMS norm of diffusers, of each head: square and mean in float32, two products."""
        self.keep(self.cast(x, FLOAT32), x, Value(x.rows, heads, FLOAT32))
        normed = Value(x.rows, x.width, FLOAT32)
        self.keep(normed)
        return self.like(normed)

    def attention(self, q: Value, k: Value, v: Value, *, heads: int) -> Value:
        """Softmax attention without the scores: queries, keys, values, output, log-sum-exp."""
        q, k, v = (self.cast(x, self.size) for x in (q, k, v))
        out, sums = self.like(q), Value(q.rows, heads, FLOAT32)
        self.keep(q, k, v, out, sums)
        if k.rows == q.rows:  # to each other, not to a text
            self.attended += [out, sums]
        return out
