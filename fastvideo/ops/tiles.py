# SPDX-License-Identifier: Apache-2.0
"""Tiles of a video's tokens: which tokens lie together, in what order, and where each tile begins.

A video of latent patches (T, H, W) is cut into tiles of up to 64 neighbouring tokens. Tokens in
*raster* order have w fastest; in *tile* order, those of a tile follow each other. Sparse attention
reads tokens in tile order, either *ragged*, with no padding, or *padded*, with as many slots for
every tile and the last ones of a tile at the border empty, as FastVideo has it.

The functions at the end have the names, arguments and results of FastVideo's ``vsa_utils``.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VSA_TILE_SIZE = (4, 4, 4)
MAX_TOKENS = 64
"""The most tokens a tile can have."""

Size = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles of a sequence of tokens, in order."""

    table: Tensor
    """int32 (tiles, 2): first token and number of tokens, as the operators take it."""
    num_tokens: int
    """Length of the sequence, padding slots included."""
    order: Tensor | None = None
    """int64 (num_tokens,): place in raster order of each token in tile order; None if padded."""
    inverse: Tensor | None = None
    """int64 (num_tokens,): place in tile order of each token in raster order; None if padded."""

    @staticmethod
    def from_geometry(
        num_frames: int,
        height: int,
        width: int,
        *,
        tile: Size = VSA_TILE_SIZE,
        device: torch.device | str = "cpu",
    ) -> "Tiles":
        """Ragged tiles of a video; the same object for the same arguments.

        Args:
            num_frames: Tokens along time, T.
            height: Tokens along the height, H.
            width: Tokens along the width, W.
            tile: Tokens of a tile along each axis; tiles at the border have what is left.
            device: Where the tensors are.

        Raises:
            ValueError: A size is not positive, or a tile has more than 64 tokens.
        """
        _check_size("num_frames, height, width", (num_frames, height, width))
        _check_size("tile", tile)
        if math.prod(tile) > MAX_TOKENS:
            raise ValueError(
                f"tile={tile} has {math.prod(tile)} tokens, at most {MAX_TOKENS} are supported: "
                f"use {VSA_TILE_SIZE}"
            )
        return _from_geometry((num_frames, height, width), tile, _resolved(device))

    @staticmethod
    def from_block_sizes(variable_block_sizes: Tensor, slots: int = MAX_TOKENS) -> "Tiles":
        """Padded tiles: tile i has the first ``variable_block_sizes[i]`` of its ``slots`` tokens.

        Args:
            variable_block_sizes: Integers (tiles,), 1 to ``slots``; checked without a wait for the
                device.
            slots: Tokens from one tile's first to the next one's.

        Raises:
            ValueError: Shape, dtype or ``slots`` is not as above.
            RuntimeError: A size is out of range; on CUDA, an assertion of the device.
        """
        sizes = variable_block_sizes
        if sizes.dim() != 1 or sizes.numel() == 0 or sizes.dtype not in _INTEGERS:
            raise ValueError(
                f"variable_block_sizes is {sizes.dtype} of shape {tuple(sizes.shape)}, expected "
                "integers (tiles,)"
            )
        if not 1 <= slots <= MAX_TOKENS:
            raise ValueError(f"slots is {slots}, expected 1 to {MAX_TOKENS}")
        torch._assert_async(
            ((sizes >= 1) & (sizes <= slots)).all(),
            f"variable_block_sizes must be 1 to {slots}, the slots of a tile",
        )
        first = torch.arange(sizes.shape[0], dtype=torch.int32, device=sizes.device) * slots
        table = torch.stack((first, sizes.to(torch.int32)), dim=1)
        return Tiles(table, sizes.shape[0] * slots)

    @property
    def num_tiles(self) -> int:
        """How many tiles there are."""
        return self.table.shape[0]

    def to_tile_order(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """Tokens along ``dim`` from raster to tile order."""
        return x.index_select(dim, self._known(self.order))

    def to_raster_order(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """Tokens along ``dim`` from tile to raster order."""
        return x.index_select(dim, self._known(self.inverse))

    def _known(self, order: Tensor | None) -> Tensor:
        if order is None:
            raise ValueError(
                "these tiles were made of block sizes, which do not tell where a token lies in the "
                "video: use Tiles.from_geometry"
            )
        return order


@functools.lru_cache(maxsize=64)
def _from_geometry(shape: Size, tile: Size, device: torch.device) -> Tiles:
    order = get_tile_partition_indices(shape, tile, device)
    inverse = get_reverse_tile_partition_indices(shape, tile, device)
    with torch.inference_mode(False):
        sizes = construct_variable_block_sizes(shape, _num_tiles(shape, tile), device, tile)
        ends = sizes.cumsum(0, dtype=torch.int32)
        table = torch.stack((ends - sizes, sizes), dim=1)
    return Tiles(table, math.prod(shape), order, inverse)


# Tensors that are cached outlive the call, so none may be of the kind that inference mode makes:
# autograd refuses to save those.


@functools.lru_cache(maxsize=64)
def get_tile_partition_indices(
    dit_seq_shape: Size, tile_size: Size, device: torch.device
) -> Tensor:
    """Return int64 (T*H*W,): the raster index of each token in tile order."""
    with torch.inference_mode(False):
        tile = torch.zeros((1, 1, 1), dtype=torch.int64, device=device)
        counts = _num_tiles(dit_seq_shape, tile_size)
        for axis, (length, size, count) in enumerate(
            zip(dit_seq_shape, tile_size, counts, strict=True)
        ):
            along = torch.arange(length, device=device) // size
            tile = tile * count + along.reshape([-1 if i == axis else 1 for i in range(3)])
        return tile.flatten().argsort(stable=True)


@functools.lru_cache(maxsize=64)
def get_reverse_tile_partition_indices(
    dit_seq_shape: Size, tile_size: Size, device: torch.device
) -> Tensor:
    """Return int64 (T*H*W,): the place in tile order of each token in raster order."""
    with torch.inference_mode(False):
        return get_tile_partition_indices(dit_seq_shape, tile_size, device).argsort()


@functools.lru_cache(maxsize=64)
def construct_variable_block_sizes(
    dit_seq_shape: Size,
    num_tiles: Size,
    device: torch.device,
    tile_size: Size = VSA_TILE_SIZE,
) -> Tensor:
    """Return int32 (tiles,): the number of tokens of each tile."""
    with torch.inference_mode(False):
        sizes = torch.ones((1,), dtype=torch.int32, device=device)
        for length, count, size in zip(dit_seq_shape, num_tiles, tile_size, strict=True):
            firsts = torch.arange(count, dtype=torch.int32, device=device) * size
            sizes = (sizes[:, None] * (length - firsts).clamp(max=size)).flatten()
        return sizes


def get_non_pad_index(variable_block_sizes: Tensor, max_block_size: int) -> Tensor:
    """Return int64 (tokens,): the slots that hold a token, of ``max_block_size`` for each tile."""
    slots = torch.arange(max_block_size, device=variable_block_sizes.device)
    return (slots < variable_block_sizes[:, None]).flatten().nonzero().squeeze(1)


def build_vsa_metadata(
    dit_seq_shape: Size,
    tile_size: Size = VSA_TILE_SIZE,
    device: torch.device | str = "cuda",
) -> dict[str, Any]:
    """Return the results of the functions above by name, and num_tiles and max_block_size."""
    device = torch.device(device)
    num_tiles = _num_tiles(dit_seq_shape, tile_size)
    sizes = construct_variable_block_sizes(dit_seq_shape, num_tiles, device, tile_size)
    max_block_size = math.prod(tile_size)
    reverse = get_reverse_tile_partition_indices(dit_seq_shape, tile_size, device)
    return {
        "tile_partition_indices": get_tile_partition_indices(dit_seq_shape, tile_size, device),
        "reverse_tile_partition_indices": reverse,
        "variable_block_sizes": sizes,
        "non_pad_index": get_non_pad_index(sizes, max_block_size),
        "num_tiles": num_tiles,
        "max_block_size": max_block_size,
    }


_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.uint8)


def _num_tiles(shape: Size, tile: Size) -> Size:
    frames, height, width = (-(-length // size) for length, size in zip(shape, tile, strict=True))
    return frames, height, width


def _check_size(name: str, size: Size) -> None:
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"{name} is {size}, expected three positive numbers")


def _resolved(device: torch.device | str) -> torch.device:
    """``cuda`` is another device after torch.cuda.set_device: cache by the one it is now."""
    return torch.empty(0, device=device).device
