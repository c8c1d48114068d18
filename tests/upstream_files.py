# SPDX-License-Identifier: Apache-2.0
"""Makes Parquet files as upstream FastVideo's preprocessing lays them out, with pyarrow alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

Array = npt.NDArray[Any]


def _tensor_fields(*stems: str) -> list[pa.Field]:
    parts = {"bytes": pa.binary(), "shape": pa.list_(pa.int64()), "dtype": pa.string()}
    return [pa.field(f"{stem}_{part}", kind) for stem in stems for part, kind in parts.items()]


_ABOUT = [
    pa.field("file_name", pa.string()),
    pa.field("caption", pa.string()),
    pa.field("media_type", pa.string()),
    pa.field("width", pa.int64()),
    pa.field("height", pa.int64()),
    pa.field("num_frames", pa.int64()),
    pa.field("duration_sec", pa.float64()),
    pa.field("fps", pa.float64()),
]
_ID = pa.field("id", pa.string())
T2V = pa.schema([_ID, *_tensor_fields("vae_latent", "text_embedding"), *_ABOUT])
IMAGE_STEMS = ("clip_feature", "first_frame_latent", "pil_image")
I2V = pa.schema([_ID, *_tensor_fields("vae_latent", "text_embedding", *IMAGE_STEMS), *_ABOUT])
TEXT_ONLY = pa.schema([_ID, *_tensor_fields("text_embedding"), pa.field("caption", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A clip: its tensors by stem, as they are before they are stored, and its columns."""

    tensors: Mapping[str, Array]
    id: str = "clip.mp4"
    caption: str = "a clip"
    stride: int = 8
    swapped: bool = False
    """Width and height, as the legacy stack has them."""
    fps: float = 25.0
    stored_as: str = "float32"
    """Type of the floats in the file: float32, float16 or bfloat16."""
    columns: Mapping[str, Any] | None = None
    """Written over what the columns would hold otherwise."""

    def record(self, schema: pa.Schema) -> dict[str, Any]:
        _, frames, *sides = self.tensors["vae_latent"].shape
        height, width = (side * self.stride for side in sides)
        about = {
            "id": self.id,
            "file_name": self.id,
            "caption": self.caption,
            "media_type": "video",
            "width": height if self.swapped else width,
            "height": width if self.swapped else height,
            "num_frames": frames,
            "duration_sec": (4 * frames - 3) / self.fps,
            "fps": self.fps,
        }
        stems = [name.removesuffix("_bytes") for name in schema.names if name.endswith("_bytes")]
        for stem in stems:
            about |= _stored(stem, self.tensors.get(stem), self.stored_as)
        about |= self.columns or {}
        return {name: about[name] for name in schema.names}


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Shapes of random samples, those of a tiny model by default."""

    latent: tuple[int, int, int, int] = (16, 3, 6, 8)
    text_dim: int = 32
    text_lengths: Sequence[int] = (5, 9, 7)
    """Taken in turn."""
    image_features: tuple[int, int] | None = (5, 24)
    """Of CLIP, None for a checkpoint without."""
    image: str = "empty"
    """What pil_image holds: empty, as the legacy stack leaves it; uint8, as the new stack writes;
    float32; or mislabelled, which is uint8 bytes called float32."""
    stride: int = 8


def random_samples(
    count: int, *, task: str = "t2v", geometry: Geometry | None = None, seed: int = 0, **kept: Any
) -> list[Sample]:
    """Samples of ``task`` t2v or i2v with unlike contents; ``kept`` are fields of ``Sample``."""
    geometry = geometry or Geometry()
    made = []
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        length = geometry.text_lengths[index % len(geometry.text_lengths)]
        tensors: dict[str, Array] = {
            "vae_latent": _normal(rng, *geometry.latent),
            "text_embedding": _normal(rng, length, geometry.text_dim),
        }
        columns = dict(kept.get("columns") or {})
        if task == "i2v":
            tensors |= _image_tensors(rng, geometry)
            if geometry.image == "mislabelled":
                columns["pil_image_dtype"] = "float32"
        fields: dict[str, Any] = {
            "id": f"clip {seed} {index}.mp4",
            "caption": f"clip {index} of {seed}",
        }
        fields |= kept | {"columns": columns, "stride": geometry.stride}
        made.append(Sample(tensors=tensors, **fields))
    return made


def write_file(path: Path, samples: Iterable[Sample], schema: pa.Schema = T2V) -> Path:
    """One file as upstream's writer makes it: zstd, pyarrow's defaults, one row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([sample.record(schema) for sample in samples], schema=schema)
    pq.write_table(table, path, compression="zstd")
    return path


def write_legacy(
    root: Path,
    samples: Sequence[Sample],
    *,
    schema: pa.Schema = T2V,
    samples_per_file: int = 4,
    workers: int = 2,
) -> list[Path]:
    """``combined_parquet_dataset/worker_w/data_chunk_i.parquet``."""
    folder = root / "combined_parquet_dataset"
    return _write_chunks(folder, samples, schema, samples_per_file, workers)


def write_new(
    root: Path,
    samples: Sequence[Sample],
    *,
    schema: pa.Schema = T2V,
    samples_per_file: int = 4,
    ranks: int = 2,
    validation: Sequence[Sample] = (),
) -> list[Path]:
    """``training_dataset/worker_rank/worker_w/data_chunk_i.parquet``, and ``validation_dataset``.

    Upstream makes the folders of validation rows even if there are none.
    """
    written = []
    for rank in range(ranks):
        folder = root / "training_dataset" / f"worker_{rank}"
        written += _write_chunks(folder, samples[rank::ranks], schema, samples_per_file, 1)
        folder = root / "validation_dataset" / f"worker_{rank}"
        folder.mkdir(parents=True, exist_ok=True)
        _write_chunks(folder, validation[rank::ranks], schema, samples_per_file, 1)
    return written


def _write_chunks(
    folder: Path, samples: Sequence[Sample], schema: pa.Schema, size: int, workers: int
) -> list[Path]:
    """Deal files of ``size`` rows to the workers in turn; the last may be smaller."""
    written = []
    for chunk, start in enumerate(range(0, len(samples), size)):
        name = f"worker_{chunk % workers}/data_chunk_{chunk // workers}.parquet"
        written.append(write_file(folder / name, samples[start : start + size], schema))
    return written


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, dtype=np.float32)


def _image_tensors(rng: np.random.Generator, geometry: Geometry) -> dict[str, Array]:
    tensors = {"first_frame_latent": _normal(rng, *geometry.latent)}
    if geometry.image_features is not None:
        tensors["clip_feature"] = _normal(rng, *geometry.image_features)
    if geometry.image != "empty":
        sides = [side * geometry.stride for side in geometry.latent[2:]]
        pixels = rng.integers(0, 256, (3, *sides), dtype=np.uint8)
        floats = (pixels / 127.5 - 1).astype(np.float32)
        tensors["pil_image"] = floats if geometry.image == "float32" else pixels
    return tensors


def _stored(stem: str, tensor: Array | None, dtype: str) -> dict[str, Any]:
    if tensor is None:
        return {f"{stem}_bytes": b"", f"{stem}_shape": [], f"{stem}_dtype": ""}
    if tensor.dtype != np.float32:
        dtype = str(tensor.dtype)
    if dtype == "bfloat16":  # the upper half of a float32
        stored: Array = (tensor.view(np.uint32) >> 16).astype(np.uint16)
    else:
        stored = tensor.astype(dtype)
    return {
        f"{stem}_bytes": stored.tobytes(),
        f"{stem}_shape": list(tensor.shape),
        f"{stem}_dtype": dtype,
    }
