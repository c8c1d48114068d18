# SPDX-License-Identifier: Apache-2.0
"""Where clips and captions come from."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from fastvideo.config.paths import File, Place, Text
from fastvideo.config.spec import Spec
from fastvideo.config.train import Share


class Filters(Spec):
    """Which clips are used; one that is not becomes a `filtered` row with the reason."""

    min_duration_s: PositiveFloat | None = None
    """Shortest clip; clips shorter than `clip` needs are always filtered."""
    max_duration_s: PositiveFloat | None = None
    """Longest clip."""
    min_fps: PositiveFloat | None = None
    """Lowest frame rate of the file; below `clip.fps` frames repeat."""
    max_fps: PositiveFloat | None = None
    """Highest frame rate of the file."""
    min_frames: PositiveInt | None = None
    """Fewest frames in the file."""
    min_height: PositiveInt | None = None
    """Pixels, after rotation."""
    min_width: PositiveInt | None = None
    """Pixels, after rotation."""
    min_caption_chars: PositiveInt = 1
    """Captions shorter than this, white space stripped, are left out."""
    max_caption_chars: PositiveInt = 10_000
    """Captions longer than this are left out; text past the encoder's tokens has no effect."""
    allow_duplicates: bool = False
    """Keep files with the same content as an earlier one, all in one split unless items say it."""


class MergedSource(Spec):
    """A folder with `videos/` and `videos2caption.json`."""

    kind: Literal["merged"] = "merged"
    """Form of the data set."""
    path: File
    """The folder."""
    max_failed: Share = 0.1
    """Share of clips that may fail before preprocessing counts as failed."""
    heldout: Share = 0.0
    """Share of clips kept out of training, by a seeded hash of the id, where an item does not say
    `split`."""
    heldout_seed: NonNegativeInt = 0
    """Seed of that hash."""
    filters: Filters = Filters()
    """Which clips are used."""


class Columns(Spec):
    """Which columns of a Hugging Face data set are used; the others are not read."""

    video: Text | None = None
    """The clip: bytes, a path, or both; empty looks for `video` and other usual names."""
    caption: Text | None = None
    """A text or a list of texts; empty looks for `caption` and other usual names."""


class HfSource(Spec):
    """A data set that Hugging Face's `datasets` understands; see docs/datasets.md."""

    kind: Literal["hf"] = "hf"
    """Form of the data set."""
    path: Place
    """A folder, or the id of a data set on the Hugging Face Hub."""
    name: Text | None = None
    """Its configuration; needed where there are several and none is the default."""
    split: Text = "train"
    """The split that is used; `heldout` takes clips of it."""
    revision: Text | None = None
    """Branch, tag or commit on the Hub; empty takes `main`."""
    columns: Columns = Columns()
    """Which columns are used."""
    streaming: bool = False
    """Read clips from the Hub as they are needed, and store none; a folder is read in place either
    way."""
    max_failed: Share = 0.1
    """Share of rows that may fail before preprocessing counts as failed."""
    heldout: Share = 0.0
    """Share of clips kept out of training, by a seeded hash of the id."""
    heldout_seed: NonNegativeInt = 0
    """Seed of that hash."""
    filters: Filters = Filters()
    """Which clips are used."""


class ParquetSource(Spec):
    """Parquet files that upstream FastVideo's preprocessing wrote: nothing is encoded again.

    Rows with an empty caption train without a text, as its `training_cfg_rate` means them.
    """

    kind: Literal["parquet"] = "parquet"
    """Form of the data set."""
    path: File
    """The folder; `training_dataset/` or `combined_parquet_dataset/` in it is found."""
    latents: Literal["raw", "normalised"] = "raw"
    """What `vae_latent` holds: the VAE's output as upstream writes it, or already normalised."""
    max_failed: Share = 0.1
    """Share of rows that may be unusable before preprocessing counts as failed."""
    heldout: Share = 0.0
    """Share of clips kept out of training, by a seeded hash of the id."""
    heldout_seed: NonNegativeInt = 0
    """Seed of that hash."""
    allow_duplicates: bool = False
    """Keep rows with the same content as an earlier one."""


Source = MergedSource | HfSource | ParquetSource
