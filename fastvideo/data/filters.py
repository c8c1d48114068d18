# SPDX-License-Identifier: Apache-2.0
"""Decides from captions and headers alone whether a clip is used, with the reason if not."""

from collections.abc import Sequence

from fastvideo.config.recipe import Clip
from fastvideo.config.source import Filters
from fastvideo.data.container import ClipFault
from fastvideo.data.decode import VideoInfo
from fastvideo.data.picture import cover_size

Reason = tuple[str, str]


def usable_captions(captions: Sequence[str], *, filters: Filters) -> tuple[str, ...]:
    """Captions of an allowed length, as written."""
    low, high = filters.min_caption_chars, filters.max_caption_chars
    return tuple(text for text in captions if low <= len(text.strip()) <= high)


def reject_captions(captions: Sequence[str], *, filters: Filters) -> Reason | None:
    """(reason, detail) if none of the captions is usable."""
    if usable_captions(captions, filters=filters):
        return None
    length = max((len(text.strip()) for text in captions), default=0)
    if length > filters.max_caption_chars:
        limit = f"source.filters.max_caption_chars={filters.max_caption_chars}"
        return "caption_too_long", f"{length} characters; {limit}"
    limit = f"source.filters.min_caption_chars={filters.min_caption_chars}"
    return "caption_too_short", f"{length} characters; {limit}"


def reject_video(info: VideoInfo, *, clip: Clip, filters: Filters) -> Reason | None:
    """(reason, detail) if the clip cannot fill ``clip`` or a filter leaves it out."""
    needed_s = (clip.num_frames - 1) / clip.fps
    reach_s = info.duration_s * (1 - 0.5 / info.num_frames)
    if needed_s > reach_s + 1e-9:
        need = f"{clip.num_frames} frames at {clip.fps:g} fps reach to {needed_s:.3f} s"
        return "too_short", f"{info.duration_s:.3f} s, {info.num_frames} frames; {need}"
    try:
        cover_size((info.height, info.width), height=clip.height, width=clip.width)
    except ClipFault as fault:
        return fault.reason, fault.detail
    below = (
        ("too_short", "min_duration_s", info.duration_s, filters.min_duration_s),
        ("low_fps", "min_fps", info.fps, filters.min_fps),
        ("few_frames", "min_frames", info.num_frames, filters.min_frames),
        ("too_small", "min_height", info.height, filters.min_height),
        ("too_small", "min_width", info.width, filters.min_width),
    )
    above = (
        ("too_long", "max_duration_s", info.duration_s, filters.max_duration_s),
        ("high_fps", "max_fps", info.fps, filters.max_fps),
    )
    for reason, key, value, limit in below:
        if limit is not None and value < limit:
            return reason, f"{value:g} is below source.filters.{key}={limit:g}"
    for reason, key, value, limit in above:
        if limit is not None and value > limit:
            return reason, f"{value:g} is above source.filters.{key}={limit:g}"
    return None
