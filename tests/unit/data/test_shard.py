# SPDX-License-Identifier: Apache-2.0
"""The shard contract: upstream's schema, exact tensors, markers, damage."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fastvideo import state
from fastvideo.data.shard import (
    Contents,
    Row,
    StoredTensor,
    cast,
    shard_schema,
    stored_tensor,
    write_shard,
)
from fastvideo.errors import UserError

# Names, order and types of upstream FastVideo's pyarrow_schema_t2v.
UPSTREAM_T2V = [
    ("id", pa.string()),
    ("vae_latent_bytes", pa.binary()),
    ("vae_latent_shape", pa.list_(pa.int64())),
    ("vae_latent_dtype", pa.string()),
    ("text_embedding_bytes", pa.binary()),
    ("text_embedding_shape", pa.list_(pa.int64())),
    ("text_embedding_dtype", pa.string()),
    ("file_name", pa.string()),
    ("caption", pa.string()),
    ("media_type", pa.string()),
    ("width", pa.int64()),
    ("height", pa.int64()),
    ("num_frames", pa.int64()),
    ("duration_sec", pa.float64()),
    ("fps", pa.float64()),
]

COLUMNS = ("vae_latent", "text_embedding")


def row(seed: int, dtype: torch.dtype = torch.float16) -> Row:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "vae_latent": torch.randn(16, 3, 8, 8, generator=generator).to(dtype),
        "text_embedding": torch.randn(5 + seed, 32, generator=generator).to(dtype),
    }
    values = {
        "id": f"clip {seed} ü.mp4",
        "caption": f"caption {seed}",
        "width": 64,
        "height": 64,
        "num_frames": 3,
        "duration_sec": 1.125,
        "fps": 8.0,
    }
    return Row(tensors, values)


def write(path: Path, rows: list[Row]) -> dict[str, object]:
    contents = Contents("fingerprint", {"latents_mean": [0.0]})
    write_shard(path, rows, schema=shard_schema(COLUMNS), contents=contents, point="shard")
    marker = state.read_marker(path, fingerprint="fingerprint")
    assert marker is not None
    return marker


def place(path: Path, marker: dict[str, object], index: int, name: str) -> StoredTensor:
    stored = stored_tensor(path, marker["rows"][index], name)  # type: ignore[index]
    assert stored is not None
    return stored


def test_columns_begin_with_upstreams_in_its_order() -> None:
    ours = [(field.name, field.type) for field in shard_schema(COLUMNS)]
    assert ours[: len(UPSTREAM_T2V)] == UPSTREAM_T2V


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_come_back_bit_for_bit_without_the_footer(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "shard-00000.parquet"
    rows = [row(seed, dtype) for seed in range(5)]
    marker = write(path, rows)
    for index, expected in enumerate(rows):
        for name, tensor in expected.tensors.items():
            found = place(path, marker, index, name).read()
            assert found.dtype == dtype
            assert torch.equal(found, tensor)


def test_a_float32_file_reads_as_upstream_reads_it(tmp_path: Path) -> None:
    """Upstream's reader: whole rows through pyarrow, np.frombuffer(float32), reshape."""
    path = tmp_path / "shard-00000.parquet"
    rows = [row(seed, torch.float32) for seed in range(3)]
    write(path, rows)
    table = pq.read_table(path)
    for expected, found in zip(rows, table.to_pylist(), strict=True):
        for name, tensor in expected.tensors.items():
            values = np.frombuffer(found[f"{name}_bytes"], dtype=np.float32)
            assert np.array_equal(values.reshape(found[f"{name}_shape"]), tensor.numpy())
        assert found["caption"] == expected.values["caption"]
        assert found["more_text_embeddings_bytes"] == b""


def test_a_row_group_holds_one_sample_without_statistics_or_compression(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    write(path, [row(seed) for seed in range(4)])
    metadata = pq.ParquetFile(path).metadata
    assert metadata.num_row_groups == 4
    for group in range(4):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            assert not chunk.is_stats_set
            assert chunk.compression == "UNCOMPRESSED"
            assert not chunk.has_dictionary_page
    assert metadata.metadata[b"fastvideo.fingerprint"] == b"fingerprint"


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "shard-00000.parquet", [row(seed) for seed in range(3)])
    for file in ("shard-00000.parquet", "shard-00000.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_empty_shard_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    assert write(path, [])["rows"] == []


def test_a_flipped_byte_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    marker = write(path, [row(0), row(1)])
    stored = place(path, marker, 1, "vae_latent")
    data = bytearray(path.read_bytes())
    data[stored.offset + 7] ^= 1
    path.write_bytes(data)
    place(path, marker, 0, "vae_latent").read()
    with pytest.raises(UserError, match=r"shard-00000\.parquet: bytes .* damaged"):
        stored.read()


def test_a_shard_that_was_cut_or_is_of_another_fingerprint_is_not_complete(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    write(path, [row(0)])
    assert state.read_marker(path, fingerprint="another") is None
    path.write_bytes(path.read_bytes()[:-1])
    assert state.read_marker(path, fingerprint="fingerprint") is None


def test_a_latent_that_does_not_fit_is_an_error_that_names_the_clip() -> None:
    with pytest.raises(UserError, match=r"clip 'a\.mp4'.*70000.*float16.*shards\.dtype: float32"):
        cast(torch.tensor([1.0, -70_000.0]), "float16", clip="a.mp4")
    cast(torch.tensor([1.0, -70_000.0]), "bfloat16", clip="a.mp4")
