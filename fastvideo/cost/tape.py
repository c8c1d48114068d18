# SPDX-License-Identifier: Apache-2.0
"""What autograd keeps of a forward pass: each operation's tensors, by the rules of torch's kernels.

The activation models of the families call these operations in the order of their forward passes,
with sizes instead of tensors. Under autocast matrix products and attention compute in bfloat16.
An operation keeps what the gradients need that flow through it, and only those that do: of what
trains, and of what depends on it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fastvideo.cost.adapters import DOWN, UP
from fastvideo.cost.layers import Layers

FLOAT32 = 4
"""Bytes of a number."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor: how many rows of a width, bytes of a number.

    ``grad`` is whether something that trains went into it. Views of all its rows are the same
    value; a part of them is a value of its own in the memory of the ``whole``.
    """

    rows: int
    width: int
    size: int
    grad: bool = False
    whole: "Value | None" = None

    @property
    def memory(self) -> "Value":
        """What is kept where it is."""
        return self.whole or self

    @property
    def bytes(self) -> int:
        """Of all its numbers."""
        return self.rows * self.width * self.size

    def part(self, rows: int) -> "Value":
        """A view of some rows."""
        return Value(rows, self.width, self.size, self.grad, self.memory)


class Tape:
    """Keeps every value once, however many operations want it.

    GPUs differ from CPUs in two rules: autocast computes norms in float32, and the fused RMS norm
    keeps its input instead of the steps. Parameters are never kept, nor the copies that autocast
    makes of them; `fastvideo.cost.memory` counts those as weights.
    """

    def __init__(self, found: Layers, *, batch: int, dtype: str, gpu: bool) -> None:
        """Of ``batch`` samples; ``dtype`` is that of the computation, ``train.dtype``."""
        self.size = FLOAT32 if dtype == "float32" else 2
        self.attended: list[Value] = []
        self.reached: set[str] = set()
        """Linears whose input has a gradient."""
        self.products: dict[str, int] = {}
        """Of each attention's four matrix products in the backward pass, how many are computed."""
        self._found, self._batch, self._dtype, self._gpu = found, batch, dtype, gpu
        self._linears = {linear.name: linear for linear in found.linears}
        self._kept: dict[Value, None] = {}

    @property
    def bytes(self) -> int:
        """Of all values that are kept."""
        return sum(value.bytes for value in self._kept)

    def fresh(self) -> "Tape":
        """An empty one for the same layers."""
        return Tape(self._found, batch=self._batch, dtype=self._dtype, gpu=self._gpu)

    def keep(self, *values: Value) -> None:
        """Keep values that are not yet."""
        self._kept.update(dict.fromkeys(value.memory for value in values))

    def without(self, values: list[Value]) -> int:
        """Bytes of all values that are kept but ``values``."""
        known = {value.memory for value in values}
        return sum(value.bytes for value in self._kept if value not in known)

    def like(self, x: Value, *others: Value) -> Value:
        """A new tensor of the shape of ``x`` and the widest of all dtypes, as a sum has."""
        return new(x.rows, x.width, max(value.size for value in (x, *others)), of=(x, *others))

    def cast(self, x: Value, size: int) -> Value:
        """``x`` itself if its numbers have ``size`` bytes, else a copy."""
        return x if x.size == size else Value(x.rows, x.width, size, x.grad)

    def table(self, name: str) -> Value:
        """A parameter outside of matrices."""
        return Value(1, self._found.tables[name], FLOAT32, self._trains(name))

    def linear(self, x: Value, name: str) -> Value:
        """A matrix product with weights, and what an adapter of them adds."""
        out = self._product(x, name)
        if f"{name}.{DOWN}" not in self._linears:
            return out
        if self._found.dropout:  # the same of all tokens of a sample
            x = self.multiply(x, Value(self._batch, x.width, x.size))
        added = self._product(self._product(x, f"{name}.{DOWN}"), f"{name}.{UP}")
        return self.like(out, added)

    def latents(self, rows: int, name: str, *, ours: int) -> Value:
        """The convolution of the latents' patches, ``ours`` of all ``rows``: a view, or a cast."""
        linear, trains = self._linears[name], self._trains(name)
        if trains:
            rows = rows if self.size == FLOAT32 else ours
            self.keep(Value(rows, linear.inputs, self.size))
        return Value(ours, linear.outputs, self.size, trains)

    def activation(self, x: Value) -> Value:
        """GELU or SiLU."""
        if x.grad:
            self.keep(x)
        return self.like(x)

    def multiply(self, x: Value, y: Value) -> Value:
        """A product, of which each factor's gradient needs the other; shaped as ``x``."""
        if x.grad:
            self.keep(y)
        if y.grad:
            self.keep(x)
        return self.like(x, y)

    def layer_norm(self, x: Value, name: str = "") -> Value:
        """Layer norm as autocast runs it.

        With ``name`` it has weights, which are float32, as are its statistics then.
        """
        grad = x.grad or self._trains(f"{name}.weight")
        if self._gpu:
            x = self.cast(x, FLOAT32)
        if grad:
            self.keep(x, Value(x.rows, 2, FLOAT32 if name else x.size))
        return Value(x.rows, x.width, x.size, grad)

    def rms_norm(self, x: Value, name: str) -> Value:
        """RMS norm of torch with weights, which are float32."""
        trains = self._trains(f"{name}.weight")
        wide, normed = self.cast(x, FLOAT32), Value(x.rows, x.width, FLOAT32)
        if x.grad or (trains and self._gpu):
            self.keep(wide, Value(x.rows, 1, FLOAT32))
        if trains and not self._gpu:
            self.keep(normed)
        return Value(x.rows, x.width, FLOAT32 if self._gpu else x.size, x.grad or trains)

    def rms_norm_in_steps(self, x: Value, name: str, *, heads: int) -> Value:
        """RMS norm of diffusers, of each head: square and mean in float32, two products."""
        trains = self._trains(f"{name}.weight")
        normed = Value(x.rows, x.width, FLOAT32, x.grad or trains)
        if x.grad:
            self.keep(self.cast(x, FLOAT32), x, Value(x.rows, heads, FLOAT32))
        if trains:
            self.keep(normed)
        return self.like(normed)

    def rotate(self, x: Value, angles: Value) -> Value:
        """Rotary positions."""
        if x.grad:
            self.keep(angles)
        return self.like(x)

    def attention(
        self, name: str, q: Value, k: Value, v: Value, *, heads: int, mask: Value | None = None
    ) -> Value:
        """Softmax attention without the scores: queries, keys, values, output, log-sum-exp."""
        q, k, v = (self.cast(x, self.size) for x in (q, k, v))
        out, sums = new(q.rows, q.width, self.size, of=(q, k, v)), Value(q.rows, heads, FLOAT32)
        self.products[name] = sum((q.grad, k.grad, q.grad or k.grad, v.grad))
        if out.grad:
            self.keep(q, k, v, out, sums, *([mask] if mask else []))
            if k.rows == q.rows:  # to each other, not to a text
                self.attended += [out, sums]
        return out

    def _trains(self, name: str) -> bool:
        known = name in self._linears or name in self._found.tables
        return known and name not in self._found.frozen

    def _product(self, x: Value, name: str) -> Value:
        linear, trains = self._linears[name], self._trains(name)
        x = self.cast(x, FLOAT32 if linear.exact else self.size)
        if trains:
            self.keep(x)
        if x.grad:
            self.reached.add(name)
        return Value(x.rows, linear.outputs, x.size, x.grad or trains)


def new(rows: int, width: int, size: int, *, of: Iterable[Value]) -> Value:
    """A tensor that is computed from others."""
    return Value(rows, width, size, any(value.grad for value in of))
