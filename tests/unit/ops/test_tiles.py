# SPDX-License-Identifier: Apache-2.0
"""Tests of fastvideo/ops/tiles.py."""

import inspect

import pytest
import torch

from fastvideo.ops import tiles as tiles_module
from fastvideo.ops.tiles import (
    Tiles,
    build_vsa_metadata,
    construct_variable_block_sizes,
    get_non_pad_index,
    get_reverse_tile_partition_indices,
    get_tile_partition_indices,
)

CPU = torch.device("cpu")
SHAPES = [(4, 4, 4), (1, 1, 1), (5, 6, 7), (3, 9, 2), (21, 8, 13), (2, 4, 16)]
Size = tuple[int, int, int]


def in_loops(shape: Size, tile: Size) -> list[list[int]]:
    """Raster indices of each tile's tokens, the slow way."""
    frames, height, width = shape
    found = []
    for t in range(0, frames, tile[0]):
        for h in range(0, height, tile[1]):
            for w in range(0, width, tile[2]):
                found.append(
                    [
                        (t1 * height + h1) * width + w1
                        for t1 in range(t, min(t + tile[0], frames))
                        for h1 in range(h, min(h + tile[1], height))
                        for w1 in range(w, min(w + tile[2], width))
                    ]
                )
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", [(4, 4, 4), (1, 8, 8), (2, 3, 5)])
def test_tiles_hold_neighbouring_tokens_in_order(shape: Size, tile: Size) -> None:
    expected = in_loops(shape, tile)
    tiles = Tiles.from_geometry(*shape, tile=tile)
    assert tiles.order is not None
    assert tiles.table.dtype == torch.int32
    assert tiles.num_tiles == len(expected)
    assert tiles.num_tokens == len(tiles.order) == sum(map(len, expected))
    found = [tiles.order[first : first + count].tolist() for first, count in tiles.table.tolist()]
    assert found == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_orders_are_inverse(shape: Size) -> None:
    tiles = Tiles.from_geometry(*shape)
    x = torch.randn(2, tiles.num_tokens, 3)
    assert torch.equal(tiles.to_raster_order(tiles.to_tile_order(x)), x)
    x = x.transpose(1, 2)
    assert torch.equal(tiles.to_tile_order(tiles.to_raster_order(x, dim=2), dim=2), x)


@pytest.mark.parametrize("shape", SHAPES)
def test_upstreams_functions_describe_the_same_tiles(shape: Size) -> None:
    expected = in_loops(shape, (4, 4, 4))
    made = build_vsa_metadata(shape, device="cpu")
    assert made["tile_partition_indices"].tolist() == [place for tile in expected for place in tile]
    assert made["variable_block_sizes"].tolist() == list(map(len, expected))
    assert made["variable_block_sizes"].dtype == torch.int32
    assert made["max_block_size"] == 64
    assert made["num_tiles"] == tuple(-(-length // 4) for length in shape)
    assert made["non_pad_index"].tolist() == [
        64 * tile + slot for tile, tokens in enumerate(expected) for slot in range(len(tokens))
    ]
    # How upstream takes padded output back to raster order.
    padded = torch.full((64 * len(expected),), -1)
    padded[made["non_pad_index"]] = made["tile_partition_indices"]
    back = padded[made["non_pad_index"][made["reverse_tile_partition_indices"]]]
    assert torch.equal(back, torch.arange(len(back)))


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (get_tile_partition_indices, ["dit_seq_shape", "tile_size", "device"]),
        (get_reverse_tile_partition_indices, ["dit_seq_shape", "tile_size", "device"]),
        (
            construct_variable_block_sizes,
            ["dit_seq_shape", "num_tiles", "device", "tile_size"],
        ),
        (get_non_pad_index, ["variable_block_sizes", "max_block_size"]),
        (build_vsa_metadata, ["dit_seq_shape", "tile_size", "device"]),
    ],
)
def test_functions_have_upstreams_parameters(function: object, parameters: list[str]) -> None:
    assert callable(function)
    assert list(inspect.signature(function).parameters) == parameters


def test_the_same_geometry_is_made_once_and_fits_autograd() -> None:
    tiles_module._from_geometry.cache_clear()
    get_tile_partition_indices.cache_clear()
    with torch.inference_mode():
        first = Tiles.from_geometry(3, 5, 6)
    assert Tiles.from_geometry(3, 5, 6, device=torch.device("cpu")) is first
    assert Tiles.from_geometry(3, 5, 6, tile=(2, 2, 2)) is not first
    x = torch.randn(1, 90, 2, requires_grad=True)
    weights = torch.randn(1, 90, 2)
    (first.to_tile_order(x) * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(first.to_tile_order(x.grad), weights)


def test_block_sizes_become_padded_tiles() -> None:
    tiles = Tiles.from_block_sizes(torch.tensor([64, 1, 17]))
    assert tiles.table.tolist() == [[0, 64], [64, 1], [128, 17]]
    assert tiles.num_tokens == 192
    tiles = Tiles.from_block_sizes(torch.tensor([32, 7]), slots=32)
    assert tiles.table.tolist() == [[0, 32], [32, 7]]
    with pytest.raises(ValueError, match=r"use Tiles\.from_geometry"):
        tiles.to_raster_order(torch.zeros(1, 64, 1))


@pytest.mark.parametrize("size", [0, -3, 65])
def test_block_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(RuntimeError, match="variable_block_sizes must be 1 to 64"):
        Tiles.from_block_sizes(torch.tensor([64, size]))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"num_frames, height, width is \(0, 2, 2\)"):
        Tiles.from_geometry(0, 2, 2)
    with pytest.raises(ValueError, match=r"tile=\(4, 8, 8\) has 256 tokens, at most 64"):
        Tiles.from_geometry(4, 8, 8, tile=(4, 8, 8))
    with pytest.raises(ValueError, match=r"variable_block_sizes is torch.float32 of shape \(2,\)"):
        Tiles.from_block_sizes(torch.ones(2))
    with pytest.raises(ValueError, match="slots is 65, expected 1 to 64"):
        Tiles.from_block_sizes(torch.ones(2, dtype=torch.int32), slots=65)


def test_tiles_of_a_real_video_have_no_padding() -> None:
    tiles = Tiles.from_geometry(21, 30, 52)
    assert (tiles.num_tiles, tiles.num_tokens) == (624, 32760)
    assert construct_variable_block_sizes((21, 30, 52), (6, 8, 13), CPU).sum() == 32760
