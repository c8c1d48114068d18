# SPDX-License-Identifier: Apache-2.0
"""The sources of videos: what each lists, and where its clips are."""

from fastvideo.config.source import HfSource, MergedSource
from fastvideo.data.footage import Footage
from fastvideo.data.items import Item
from fastvideo.data.source import merged_footage, read_merged


def list_clips(source: MergedSource | HfSource) -> tuple[list[Item], Footage]:
    """Return all items of a source in its order, and their clips.

    Raises:
        UserError: The source cannot be read as the recipe says.
        OSError: The disk or the network failed.
    """
    if isinstance(source, HfSource):
        from fastvideo.data.hf.listing import list_dataset

        return list_dataset(source)
    return read_merged(source), merged_footage(source)


def open_footage(source: MergedSource | HfSource) -> Footage:
    """The clips of a source that was listed before.

    Raises:
        UserError: The source is gone.
    """
    if isinstance(source, HfSource):
        from fastvideo.data.hf.footage import dataset_footage

        return dataset_footage(source)
    return merged_footage(source)
