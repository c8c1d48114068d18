# SPDX-License-Identifier: Apache-2.0
"""Upstream's Parquet: folder layouts, variants of its rows, damage, exact tensors."""

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fastvideo.data.upstream import parquet_files, read_clips, read_tensors
from fastvideo.data.upstream_tensor import TENSORS
from fastvideo.errors import UserError
from tests.upstream_files import (
    I2V,
    T2V,
    TEXT_ONLY,
    Geometry,
    Sample,
    random_samples,
    write_file,
    write_legacy,
    write_new,
)

FILE = "data_chunk_0.parquet"
LATENT_BYTES = 16 * 3 * 6 * 8 * 4


def expected(sample: Sample) -> dict[str, torch.Tensor]:
    return {stem: torch.from_numpy(tensor) for stem, tensor in sample.tensors.items()}


def equal(read: dict[str, torch.Tensor], kept: dict[str, torch.Tensor]) -> bool:
    return read.keys() == kept.keys() and all(
        read[stem].dtype == kept[stem].dtype and torch.equal(read[stem], kept[stem])
        for stem in kept
    )


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table], **options: Any) -> None:
    pq.write_table(change(pq.read_table(path, partitioning=None)), path, **options)


@pytest.mark.parametrize("write", [write_legacy, write_new])
@pytest.mark.parametrize(("task", "schema"), [("t2v", T2V), ("i2v", I2V)])
def test_every_row_of_both_folder_layouts_is_read_exactly(
    write: Callable[..., list[Path]], task: str, schema: pa.Schema, tmp_path: Path
) -> None:
    samples = random_samples(11, task=task)
    written = write(tmp_path, samples, schema=schema, samples_per_file=3)
    files = parquet_files(tmp_path)
    assert files == tuple(sorted(path.relative_to(tmp_path) for path in written))
    found: dict[str, Any] = {}
    for file in files:
        clips = read_clips(tmp_path, file)
        tensors = read_tensors(tmp_path, file, range(len(clips)))
        found |= {clip.id: (clip, read) for clip, read in zip(clips, tensors, strict=True)}
    assert found.keys() == {sample.id for sample in samples}
    for sample in samples:
        clip, read = found[sample.id]
        assert not clip.faults
        assert clip.caption == sample.caption
        assert clip.shapes.keys() == sample.tensors.keys()
        assert equal(read, expected(sample))


def test_validation_rows_are_left_out(tmp_path: Path) -> None:
    write_new(tmp_path, random_samples(2), validation=random_samples(3, seed=1))
    assert {file.parts[0] for file in parquet_files(tmp_path)} == {"training_dataset"}
    legacy = tmp_path / "legacy"
    write_legacy(legacy, random_samples(2))
    write_file(legacy / "validation_parquet_dataset" / FILE, random_samples(1))
    assert {file.parts[0] for file in parquet_files(legacy)} == {"combined_parquet_dataset"}


def test_a_folder_below_the_output_folder_serves_as_well(tmp_path: Path) -> None:
    write_legacy(tmp_path, random_samples(9))
    files = parquet_files(tmp_path / "combined_parquet_dataset")
    assert [file.as_posix() for file in files] == [
        "worker_0/data_chunk_0.parquet",
        "worker_0/data_chunk_1.parquet",
        "worker_1/data_chunk_0.parquet",
    ]


def test_hidden_and_unfinished_files_are_left_out(tmp_path: Path) -> None:
    write_file(tmp_path / "rows.parquet", random_samples(1))
    for name in ("._rows.parquet", ".cache/rows.parquet", "rows.parquet.tmp", "rows.json"):
        write_file(tmp_path / name, random_samples(1))
    assert parquet_files(tmp_path) == (Path("rows.parquet"),)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([], "is no folder"),
        (["data/"], r"holds no \*.parquet"),
        (["data/training_dataset/worker_0/", "data/rows.parquet"], "training_dataset: holds no"),
        (["data/validation_dataset/rows.parquet"], r"holds no \*.parquet"),
        (
            ["data/training_dataset/a.parquet", "data/combined_parquet_dataset/b.parquet"],
            "combined_parquet_dataset and training_dataset",
        ),
    ],
)
def test_a_folder_without_one_set_of_rows_is_refused(
    made: list[str], message: str, tmp_path: Path
) -> None:
    for name in made:
        path = tmp_path / name
        folder = path if name.endswith("/") else path.parent
        folder.mkdir(parents=True, exist_ok=True)
        if path != folder:
            path.touch()
    with pytest.raises(UserError, match=message) as raised:
        parquet_files(tmp_path / "data")
    assert str(tmp_path / "data") in str(raised.value)
    assert "source.path" in str(raised.value)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_come_in_the_type_they_are_stored_in(dtype: str, tmp_path: Path) -> None:
    (sample,) = random_samples(1, task="i2v", stored_as=dtype)
    write_file(tmp_path / FILE, [sample], I2V)
    (clip,) = read_clips(tmp_path, FILE)
    (read,) = read_tensors(tmp_path, FILE, [0])
    assert not clip.faults
    assert clip.shapes.keys() == read.keys() == {*TENSORS} - {"pil_image"}
    for stem, tensor in read.items():
        assert tensor.dtype == getattr(torch, dtype)
        torch.testing.assert_close(tensor.float(), expected(sample)[stem], rtol=2**-7, atol=2**-20)


@pytest.mark.parametrize(
    ("image", "dtype"),
    [("float32", torch.float32), ("uint8", torch.uint8), ("mislabelled", torch.uint8)],
)
def test_images_of_both_stacks_are_read(image: str, dtype: torch.dtype, tmp_path: Path) -> None:
    samples = random_samples(2, task="i2v", geometry=Geometry(image=image))
    write_file(tmp_path / FILE, samples, I2V)
    assert all(not clip.faults for clip in read_clips(tmp_path, FILE))
    for read, sample in zip(read_tensors(tmp_path, FILE, [0, 1]), samples, strict=True):
        assert read["pil_image"].dtype == dtype
        assert torch.equal(read["pil_image"], expected(sample)["pil_image"])


@pytest.mark.parametrize("dtype", ["", None, "torch.float32"])
@pytest.mark.parametrize("image", ["float32", "uint8"])
def test_an_unnamed_type_is_float32(dtype: str | None, image: str, tmp_path: Path) -> None:
    columns = {f"{stem}_dtype": dtype for stem in TENSORS}
    geometry = Geometry(image=image)
    (sample,) = random_samples(1, task="i2v", geometry=geometry, columns=columns)
    write_file(tmp_path / FILE, [sample], I2V)
    assert not read_clips(tmp_path, FILE)[0].faults
    assert equal(next(read_tensors(tmp_path, FILE, [0])), expected(sample))


def test_type_columns_may_be_missing(tmp_path: Path) -> None:
    (sample,) = random_samples(1)
    path = write_file(tmp_path / FILE, [sample])
    rewritten(
        path, lambda table: table.drop_columns([f"{stem}_dtype" for stem in list(TENSORS)[:2]])
    )
    assert not read_clips(tmp_path, FILE)[0].faults
    assert equal(next(read_tensors(tmp_path, FILE, [0])), expected(sample))


@pytest.mark.parametrize("empty", [(b"", [], ""), (None, None, None), (b"", [], "unknown")])
def test_optional_tensors_may_be_empty(empty: tuple[Any, Any, Any], tmp_path: Path) -> None:
    columns = {
        f"{stem}_{part}": value
        for stem in ("clip_feature", "pil_image")
        for part, value in zip(("bytes", "shape", "dtype"), empty, strict=True)
    }
    write_file(tmp_path / FILE, random_samples(1, task="i2v", columns=columns), I2V)
    (clip,) = read_clips(tmp_path, FILE)
    assert not clip.faults
    assert clip.shapes.keys() == {"vae_latent", "text_embedding", "first_frame_latent"}
    assert next(read_tensors(tmp_path, FILE, [0])).keys() == clip.shapes.keys()


def test_rows_say_what_clip_they_are(tmp_path: Path) -> None:
    (sample,) = random_samples(1, id="ü 1", caption="two\nlines", fps=30.0)
    write_file(tmp_path / "a" / FILE, [sample])
    (clip,) = read_clips(tmp_path, Path("a") / FILE)
    assert (clip.file, clip.row, clip.id, clip.caption) == (f"a/{FILE}", 0, "ü 1", "two\nlines")
    assert (clip.width, clip.height) == (64, 48)
    assert (clip.fps, clip.duration_s) == (30.0, 0.3)
    assert clip.shapes == {"vae_latent": (16, 3, 6, 8), "text_embedding": (5, 32)}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("sides", "size"), [((6, 8), (64, 48)), ((8, 6), (48, 64))])
def test_width_and_height_are_upright_in_both_stacks(
    swapped: bool, sides: tuple[int, int], size: tuple[int, int], tmp_path: Path
) -> None:
    geometry = Geometry(latent=(16, 3, *sides))
    write_file(tmp_path / FILE, random_samples(1, geometry=geometry, swapped=swapped))
    (clip,) = read_clips(tmp_path, FILE)
    assert (clip.width, clip.height) == size


def test_latent_frames_are_counted_in_the_latent(tmp_path: Path) -> None:
    # Upstream's script for HunyuanVideo writes the frames of the video into num_frames.
    write_file(tmp_path / FILE, random_samples(1, columns={"num_frames": 9}))
    assert read_clips(tmp_path, FILE)[0].shapes["vae_latent"][1] == 3


def test_what_a_clip_can_do_without_may_be_missing(tmp_path: Path) -> None:
    path = write_file(tmp_path / FILE, random_samples(1))
    about = ["file_name", "media_type", "width", "height", "num_frames", "duration_sec", "fps"]
    rewritten(path, lambda table: table.drop_columns(about))
    (clip,) = read_clips(tmp_path, FILE)
    assert not clip.faults
    assert (clip.width, clip.height, clip.fps, clip.duration_s) == (0, 0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("columns", "reason", "detail"),
    [
        ({"vae_latent_bytes": b""}, "empty_latent", "[16, 3, 6, 8]"),
        ({"vae_latent_bytes": None}, "empty_latent", "0 bytes"),
        ({"vae_latent_bytes": b"", "vae_latent_shape": []}, "empty_latent", "[]"),
        ({"text_embedding_bytes": b"", "text_embedding_shape": [0, 32]}, "empty_text", "[0, 32]"),
        ({"vae_latent_bytes": b"1234"}, "wrong_byte_count", "4 bytes"),
        ({"vae_latent_dtype": "float16"}, "wrong_byte_count", f"{LATENT_BYTES} bytes"),
        ({"text_embedding_shape": [6, 32]}, "wrong_byte_count", "[6, 32]"),
        ({"clip_feature_bytes": b""}, "wrong_byte_count", "clip_feature has 0 bytes"),
        ({"vae_latent_shape": [16, 3, 48]}, "wrong_rank", "has 3 axes, not 4"),
        ({"text_embedding_shape": [1, 5, 32]}, "wrong_rank", "[1, 5, 32]"),
        ({"vae_latent_shape": []}, "wrong_rank", "has 0 axes"),
        ({"vae_latent_shape": [16, 3, -6, -8]}, "bad_shape", "[16, 3, -6, -8]"),
        ({"vae_latent_shape": [16, 3, None, 8]}, "bad_shape", "None"),
        ({"vae_latent_dtype": "float64"}, "unknown_dtype", "'float64'"),
        ({"vae_latent_dtype": "uint8"}, "unknown_dtype", "'uint8'"),
        ({"text_embedding_dtype": "unknown"}, "unknown_dtype", "text_embedding_dtype"),
        ({"pil_image_bytes": b"123"}, "wrong_byte_count", "pil_image has 3 bytes"),
        ({"first_frame_latent_shape": [16, 6, 3, 8]}, "unequal_latents", "[16, 6, 3, 8]"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(
    columns: dict[str, Any], reason: str, detail: str, tmp_path: Path
) -> None:
    geometry = Geometry(image="uint8")
    sound = random_samples(2, task="i2v", geometry=geometry)
    damaged = random_samples(1, task="i2v", geometry=geometry, columns=columns)
    write_file(tmp_path / FILE, [sound[0], *damaged, sound[1]], I2V)
    before, clip, after = read_clips(tmp_path, FILE)
    ((stem, fault),) = clip.faults.items()
    assert stem not in clip.shapes
    assert fault[0] == reason
    assert detail in fault[1]
    assert not before.faults
    assert not after.faults
    for read, sample in zip(read_tensors(tmp_path, FILE, [0, 2]), sound, strict=True):
        assert equal(read, expected(sample))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_that_are_not_finite_are_a_fault(dtype: str, value: float, tmp_path: Path) -> None:
    largest = 65504 if dtype == "float16" else 3e38
    for spoiled in (largest, -largest, value):
        (sample,) = random_samples(1, stored_as=dtype)
        sample.tensors["text_embedding"][-1, -1] = spoiled
        write_file(tmp_path / FILE, [sample])
        fault = read_clips(tmp_path, FILE)[0].faults.get("text_embedding")
        detail = "text_embedding holds values that are not finite"
        assert fault == (None if np.isfinite(spoiled) else ("not_finite", detail))


def test_rows_of_other_shape_or_type_have_other_content(tmp_path: Path) -> None:
    (one,) = random_samples(1, stored_as="float16")
    shape, dtype = {"vae_latent_shape": [16, 3, 8, 6]}, {"vae_latent_dtype": "bfloat16"}
    others = [dataclasses.replace(one, columns=columns) for columns in ({}, shape, dtype)]
    write_file(tmp_path / FILE, [one, *others])
    first, same, *changed = (clip.sha256 for clip in read_clips(tmp_path, FILE))
    assert first == same
    assert len({first, *changed}) == 3


def test_a_tensor_without_its_shape_is_a_fault_of_every_row(tmp_path: Path) -> None:
    path = write_file(tmp_path / FILE, random_samples(2, task="i2v"), I2V)
    rewritten(path, lambda table: table.drop_columns(["clip_feature_shape"]))
    faults = [clip.faults for clip in read_clips(tmp_path, FILE)]
    assert faults == [{"clip_feature": ("missing_column", "clip_feature_shape is missing")}] * 2
    assert "clip_feature" not in next(read_tensors(tmp_path, FILE, [0]))


def test_text_that_is_not_utf_8_is_no_reason_to_stop(tmp_path: Path) -> None:
    path = write_file(tmp_path / FILE, random_samples(1))

    def spoil(table: pa.Table) -> pa.Table:
        spoiled = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
        return table.set_column(table.schema.get_field_index("caption"), "caption", spoiled)

    rewritten(path, spoil)
    assert read_clips(tmp_path, FILE)[0].caption == "caf\ufffd"


@pytest.mark.parametrize("wanted", [[], [0], [6], [1, 2, 5], list(range(7))])
@pytest.mark.parametrize("group", [1, 2, 3, 100])
def test_rows_are_found_in_any_row_group(wanted: list[int], group: int, tmp_path: Path) -> None:
    samples = random_samples(7)
    path = write_file(tmp_path / FILE, samples)
    rewritten(path, lambda table: table, row_group_size=group)
    assert [clip.id for clip in read_clips(tmp_path, FILE)] == [sample.id for sample in samples]
    read = list(read_tensors(tmp_path, FILE, wanted))
    assert len(read) == len(wanted)
    assert all(
        equal(tensors, expected(samples[row])) for tensors, row in zip(read, wanted, strict=True)
    )


@pytest.mark.parametrize(
    "options", [{"compression": "snappy"}, {"compression": "none", "use_dictionary": False}]
)
def test_other_encodings_are_read_too(options: dict[str, Any], tmp_path: Path) -> None:
    samples = random_samples(3)
    path = write_file(tmp_path / FILE, samples)

    def widened(table: pa.Table) -> pa.Table:
        kinds = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
        fields = [field.with_type(kinds.get(field.type, field.type)) for field in table.schema]
        return table.cast(pa.schema(fields))

    rewritten(path, widened, **options)
    assert [clip.faults for clip in read_clips(tmp_path, FILE)] == [{}] * 3
    for read, sample in zip(read_tensors(tmp_path, FILE, range(3)), samples, strict=True):
        assert equal(read, expected(sample))


def test_only_the_wanted_tensors_are_read(tmp_path: Path) -> None:
    write_file(tmp_path / FILE, random_samples(1, task="i2v"), I2V)
    (read,) = read_tensors(tmp_path, FILE, [0], only=["text_embedding"])
    assert read.keys() == {"text_embedding"}


def test_tensors_can_be_written_to(tmp_path: Path) -> None:
    write_file(tmp_path / FILE, random_samples(2))
    first, second = read_tensors(tmp_path, FILE, [0, 1])
    first["vae_latent"].zero_()
    assert second["vae_latent"].any()


def test_tables_beside_our_own_shards_are_left_out(tmp_path: Path) -> None:
    for name in ("shard-00000", "manifest", "validation"):
        write_file(tmp_path / f"{name}.parquet", random_samples(1))
    assert parquet_files(tmp_path) == (Path("shard-00000.parquet"),)


def test_a_file_without_rows_has_no_clips(tmp_path: Path) -> None:
    write_file(tmp_path / FILE, [])
    assert read_clips(tmp_path, FILE) == []
    assert list(read_tensors(tmp_path, FILE, [])) == []


def test_text_only_rows_are_refused_with_what_they_lack(tmp_path: Path) -> None:
    write_file(tmp_path / FILE, random_samples(1), TEXT_ONLY)
    with pytest.raises(UserError, match="lacks vae_latent_bytes, vae_latent_shape") as raised:
        read_clips(tmp_path, FILE)
    assert str(tmp_path / FILE) in str(raised.value)


@pytest.mark.parametrize("name", ["vae_latent_bytes", "vae_latent_shape", "caption", "width"])
def test_a_column_of_another_type_is_refused(name: str, tmp_path: Path) -> None:
    path = write_file(tmp_path / FILE, random_samples(1))

    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.schema.get_field_index(name), name, pa.array([1.5]))

    rewritten(path, change)
    with pytest.raises(UserError, match=f"column {name} is of type double"):
        read_clips(tmp_path, FILE)


@pytest.mark.parametrize("cut", [0, 3, 100, -1])
def test_a_file_that_is_cut_is_refused(cut: int, tmp_path: Path) -> None:
    path = write_file(tmp_path / FILE, random_samples(2))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=f"{FILE}: is not a whole Parquet file"):
        read_clips(tmp_path, FILE)


def test_a_file_whose_pages_are_overwritten_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / FILE, random_samples(2))
    data = bytearray(path.read_bytes())
    start = data.index(b"\x28\xb5\x2f\xfd", 2000)  # the magic number of zstd, in a latent's page
    data[start : start + 64] = bytes(64)
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{FILE}: is"):
        read_clips(tmp_path, FILE)
    with pytest.raises(UserError, match=f"{FILE}: is"):
        list(read_tensors(tmp_path, FILE, [0, 1]))


def test_a_file_that_cannot_be_opened_is_no_mistake_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:
        read_clips(tmp_path, FILE)
    assert raised.value.errno == errno.ENOENT


def test_a_file_changed_since_it_was_listed_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path / FILE, random_samples(1, columns={"vae_latent_bytes": b"1234"}))
    with pytest.raises(UserError, match=r"row 0: vae_latent has 4 bytes.*changed"):
        list(read_tensors(tmp_path, FILE, [0]))
    with pytest.raises(UserError, match=r"row 5: there are 1 rows.*changed"):
        list(read_tensors(tmp_path, FILE, [5]))


def test_made_files_are_as_upstream_makes_them(tmp_path: Path) -> None:
    metadata = pq.ParquetFile(write_file(tmp_path / FILE, random_samples(9))).metadata
    column = metadata.row_group(0).column(1)
    assert (metadata.num_row_groups, metadata.num_rows) == (1, 9)
    assert (column.compression, column.path_in_schema) == ("ZSTD", "vae_latent_bytes")
    assert "RLE_DICTIONARY" in column.encodings
    assert set(metadata.metadata) == {b"ARROW:schema"}
    assert np.dtype("float32").itemsize * 16 * 3 * 6 * 8 == LATENT_BYTES
