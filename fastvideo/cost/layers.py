# SPDX-License-Identifier: Apache-2.0
"""What a transformer is made of, as far as its size and its work depend on it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tokens:
    """One micro-batch as a transformer sees it; all counts but ``batch`` are of one sample.

    ``runs`` is the number of timesteps of a sample: 1, or one for each latent frame.
    """

    video: int
    text: int
    image: int = 0
    runs: int = 1
    batch: int = 1


@dataclass(frozen=True)
class Linear:
    """A matrix product, or a convolution that is one, over ``rows`` vectors a sample.

    ``exact`` are those that embed timesteps: they compute in float32, whatever autocast says.
    """

    name: str
    inputs: int
    outputs: int
    rows: int
    exact: bool = False
    convolution: bool = False
    bias: bool = True

    @property
    def flops(self) -> int:
        """Of the forward pass of one sample; a multiplication with its addition counts as 2."""
        return 2 * self.rows * self.inputs * self.outputs


@dataclass(frozen=True)
class Attention:
    """Softmax attention of one sample; ``width`` is heads times head dimension."""

    name: str
    queries: int
    keys: int
    width: int

    @property
    def flops(self) -> int:
        """Of the forward pass: queries times keys, and weights times values; no softmax."""
        return 4 * self.queries * self.keys * self.width


@dataclass(frozen=True)
class Layers:
    """A transformer, by the names of diffusers.

    ``tables`` are the parameters outside of matrices: weights and biases of norms, modulations.
    ``blocks`` are the prefixes of the repeated blocks, in order. ``frozen`` are the names of
    linears and tables that do not train. An adapter of a linear is two more, see
    `fastvideo.cost.adapters`; with ``dropout`` it gets a copy of the inputs with some left out.
    """

    linears: tuple[Linear, ...]
    tables: Mapping[str, int]
    attentions: tuple[Attention, ...]
    blocks: tuple[str, ...]
    frozen: frozenset[str] = frozenset()
    dropout: bool = False

    @property
    def trained(self) -> "Layers":
        """The part that trains."""
        return replace(
            self,
            linears=tuple(linear for linear in self.linears if linear.name not in self.frozen),
            tables={name: n for name, n in self.tables.items() if name not in self.frozen},
            frozen=frozenset(),
        )

    def sizes(self) -> dict[str, int]:
        """Numbers in each parameter."""
        return dict(self._sizes())

    def block_sizes(self) -> list[int]:
        """Parameters of each repeated block."""
        sizes = dict.fromkeys(self.blocks, 0)
        for name, size in self._sizes():
            if (block := block_of(name)) in sizes:
                sizes[block] += size
        return list(sizes.values())

    def _sizes(self) -> Iterator[tuple[str, int]]:
        for linear in self.linears:
            yield f"{linear.name}.weight", linear.inputs * linear.outputs
            if linear.bias:
                yield f"{linear.name}.bias", linear.outputs
        yield from self.tables.items()


def block_of(name: str) -> str:
    """The block that something belongs to, if ``Layers.blocks`` has it."""
    return ".".join(name.split(".", 2)[:2])
