# SPDX-License-Identifier: Apache-2.0
"""Decoding picks the right frames, upright, in the right colours, and says what is wrong."""

import errno
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from fastvideo.data import container
from fastvideo.data.decode import ClipFault, decode_clip, probe
from tests.media import (
    CORNERS,
    Encoding,
    Image,
    corners_of,
    number_of,
    numbered,
    write_numbered,
    write_sound,
    write_video,
)


def numbers(path: Path, *, num_frames: int, fps: float) -> list[int]:
    frames = decode_clip(path, num_frames=num_frames, height=48, width=64, fps=fps)
    return [number_of(frame) for frame in frames]


def nearest(times_s: Sequence[float], *, num_frames: int, fps: float) -> list[int]:
    at = np.asarray(times_s) - times_s[0]
    return [int(np.abs(at - i / fps).argmin()) for i in range(num_frames)]


# ---------------------------------------------------------------- which frames

KINDS = {
    "h264.mp4": Encoding(),
    "h265.mp4": Encoding(codec="libx265", codec_options={"x265-params": "log-level=none"}),
    "mpeg4.mp4": Encoding(codec="mpeg4"),
    "fragmented.mp4": Encoding(options={"movflags": "frag_keyframe+empty_moov"}),
    "h264.mov": Encoding(),
    "h264.mkv": Encoding(),
    "ffv1.mkv": Encoding(codec="ffv1"),
    "vp8.webm": Encoding(codec="libvpx"),
    "vp9.webm": Encoding(codec="libvpx-vp9", codec_options={"deadline": "realtime"}),
    "mpeg4.avi": Encoding(codec="mpeg4"),
    "b_frames.avi": Encoding(),
    "mjpeg.avi": Encoding(codec="mjpeg", pixels="yuvj420p"),
    "h264.ts": Encoding(),
    "mpeg2.mpg": Encoding(codec="mpeg2video"),
    "h264.flv": Encoding(),
    "vp8.ogv": Encoding(codec="libvpx", container="ogg"),
    "mpeg4.wmv": Encoding(codec="mpeg4", container="asf"),
    "animated.gif": Encoding(codec="gif", pixels="rgb8", fps=25),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_frames_nearest_in_time(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    path = write_numbered(tmp_path / name, 40, kind)
    times_s = [i / kind.fps for i in range(40)]
    for fps in (kind.fps, 7, 16):
        count = int(39 / kind.fps * fps) + 1
        assert numbers(path, num_frames=count, fps=fps) == nearest(
            times_s, num_frames=count, fps=fps
        )
    info = probe(path)
    assert (info.width, info.height, info.num_frames) == (64, 48, 40)
    assert info.fps == pytest.approx(kind.fps, rel=1e-6)
    assert info.duration_s == pytest.approx(40 / kind.fps, abs=2e-3)
    assert info.codec in {"h264", "hevc", "mpeg4", "ffv1", "vp8", "vp9", "mjpeg"} | {
        "mpeg2video",
        "gif",
    }


def test_av1_decodes(tmp_path: Path) -> None:
    options = {"preset": "12", "svtav1-params": "lp=1"}
    path = write_numbered(
        tmp_path / "a.mp4", 10, Encoding(codec="libsvtav1", codec_options=options)
    )
    assert numbers(path, num_frames=10, fps=30) == list(range(10))
    assert probe(path).codec == "av1"


def test_frames_repeat_where_more_are_wanted_than_there_are(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "slow.mp4", 4, Encoding(fps=8))
    assert numbers(path, num_frames=8, fps=16) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv", "vfr.ts"])
def test_variable_rate_is_sampled_by_time_not_by_index(name: str, tmp_path: Path) -> None:
    gaps_ms = np.random.default_rng(0).choice([17, 33, 50, 200, 400], 60)
    times_ms = [0, *np.cumsum(gaps_ms).tolist()][:60]
    path = write_numbered(tmp_path / name, 60, Encoding(times=times_ms, ticks=1000))
    times_s = [t / 1000 for t in times_ms]
    for fps in (3.0, 16.0, 23.976):
        count = int(times_s[-1] * fps)
        assert numbers(path, num_frames=count, fps=fps) == nearest(
            times_s, num_frames=count, fps=fps
        )
    assert probe(path).fps == pytest.approx(59 / times_s[-1], rel=5e-3)


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts"])
def test_time_starts_at_the_first_frame(name: str, tmp_path: Path) -> None:
    encoding = Encoding(times=range(150, 180))
    path = write_numbered(tmp_path / name, 30, encoding)
    assert numbers(path, num_frames=10, fps=10) == list(range(0, 30, 3))
    assert probe(path).duration_s == pytest.approx(1.0, abs=2e-3)


def test_frames_before_the_edit_lists_start_are_not_shown(tmp_path: Path) -> None:
    encoding = Encoding(times=range(-12, 28), codec_options={"g": "5", "bf": "0"})
    path = write_numbered(tmp_path / "edited.mp4", 40, encoding)
    assert probe(path).num_frames == 28
    assert numbers(path, num_frames=28, fps=30) == list(range(12, 40))


def test_a_clip_ends_half_an_interval_after_its_last_frame(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "ten.mp4", 10, Encoding(fps=10))
    assert numbers(path, num_frames=10, fps=10)[-1] == 9
    assert numbers(path, num_frames=20, fps=20)[-1] == 9  # 0.95 s
    with pytest.raises(ClipFault, match=r"last frame is at 0\.900 s, one at 1\.000 s") as caught:
        numbers(path, num_frames=11, fps=10)
    assert caught.value.reason == "too_short"


def test_a_single_frame_is_a_clip_of_one(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "one.mp4", 1)
    assert numbers(path, num_frames=1, fps=16) == [0]
    assert probe(path).num_frames == 1


def test_decoding_stops_after_the_last_wanted_frame(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(60))
    options = {"g": "1", "bf": "0", "tune": "zerolatency"}
    path = write_video(tmp_path / "a.mp4", images, Encoding(codec_options=options))
    data = bytearray(path.read_bytes())
    begin = len(data) // 2
    data[begin : begin + 2000] = bytes(2000)
    path.write_bytes(data)
    decode_clip(path, num_frames=20, height=48, width=64, fps=30)
    with pytest.raises(ClipFault) as caught:
        decode_clip(path, num_frames=50, height=48, width=64, fps=30)
    assert caught.value.reason == "corrupt"


def test_memory_holds_the_wanted_frames_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (540, 960, 3), dtype=np.uint8)
    options = {"preset": "ultrafast", "crf": "40"}
    path = tmp_path / "long.mp4"
    write_video(path, (noise for _ in range(300)), Encoding(codec_options=options))
    code = (
        "import resource, sys; from pathlib import Path; from fastvideo.data.decode import *\n"
        "path = Path(sys.argv[1]); used = lambda: resource.getrusage(0).ru_maxrss / 1024\n"
        "decode_clip(path, num_frames=1, height=64, width=96, fps=1); before = used()\n"
        "decode_clip(path, num_frames=10, height=64, width=96, fps=1); print(used() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True)
    assert float(done.stdout) < 60, "300 frames are 445 MiB"


def test_decoding_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    encoding = Encoding(pixels="yuv444p")
    path = write_numbered(tmp_path / "a.mp4", 10, encoding, height=241, width=321)
    size = {"num_frames": 10, "height": 104, "width": 152, "fps": 30.0}
    first: Any = decode_clip(path, **size)  # type: ignore[arg-type]
    assert first.tobytes() == decode_clip(path, **size).tobytes()  # type: ignore[arg-type]


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_rotated_and_mirrored_videos_look_as_their_upright_original(
    turn: int, mirrored: bool, tmp_path: Path
) -> None:
    upright = numbered(77)
    stored = np.rot90(upright[:, ::-1] if mirrored else upright, k=-turn // 90)
    images = [np.ascontiguousarray(stored)] * 4
    encoding = Encoding(rotation=turn, mirrored=mirrored, codec_options={"crf": "5"})
    path = write_video(tmp_path / "a.mp4", images, encoding)
    info = probe(path)
    assert (info.width, info.height) == (64, 48)
    assert mirrored or info.rotation == turn
    frame = decode_clip(path, num_frames=1, height=48, width=64, fps=30)[0]
    assert corners_of(frame) == list(CORNERS)
    assert number_of(frame) == 77
    assert np.abs(frame.astype(int) - upright).mean() < 4


@pytest.mark.parametrize(
    ("height", "width"), [(96, 64), (48, 128), (32, 96), (200, 40), (97, 33), (480, 640)]
)
def test_the_crop_is_central_and_fills_the_target(height: int, width: int, tmp_path: Path) -> None:
    y, x = np.mgrid[0:120, 0:200]
    image = np.stack([x * 255 // 199, y * 255 // 119, np.full_like(x, 128)], -1).astype(np.uint8)
    encoding = Encoding(pixels="yuv444p", codec_options={"crf": "1"})
    path = write_video(tmp_path / "a.mp4", [image] * 2, encoding)
    frame = decode_clip(path, num_frames=1, height=height, width=width, fps=30)[0].astype(int)
    assert frame.shape == (height, width, 3)
    scale = max(height / 120, width / 200)
    for axis, (wanted, size) in enumerate([(width, 200), (height, 120)]):
        shown = wanted / scale / size  # share of the picture along this axis
        line = frame[height // 2, :, 0] if axis == 0 else frame[:, width // 2, 1]
        edges = 255 * (0.5 - shown / 2), 255 * (0.5 + shown / 2)
        assert line[0] == pytest.approx(edges[0], abs=6)
        assert line[-1] == pytest.approx(edges[1], abs=6)


def test_pixels_that_are_not_square_are_stretched(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", 2, Encoding(aspect=Fraction(2)), width=32)
    info = probe(path)
    assert (info.width, info.height) == (64, 48)
    frame = decode_clip(path, num_frames=1, height=48, width=64, fps=30)[0]
    assert number_of(frame) == 0
    assert corners_of(frame) == list(CORNERS)


@pytest.mark.parametrize(("height", "width"), [(241, 321), (35, 77), (17, 19)])
def test_odd_sizes_decode(height: int, width: int, tmp_path: Path) -> None:
    encoding = Encoding(pixels="yuv444p")
    path = write_numbered(tmp_path / "a.mp4", 3, encoding, height=height, width=width)
    frame = decode_clip(path, num_frames=3, height=241, width=321, fps=30)[2]
    assert corners_of(frame) == list(CORNERS)


def test_shrinking_averages_instead_of_skipping(tmp_path: Path) -> None:
    stripes = np.zeros((192, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    encoding = Encoding(pixels="yuv444p", codec_options={"crf": "1"})
    path = write_video(tmp_path / "a.mp4", [stripes] * 2, encoding)
    frame = decode_clip(path, num_frames=1, height=48, width=64, fps=30)[0]
    assert np.abs(frame.astype(int) - 127).max() < 20


# ---------------------------------------------------------------- colour


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("space", ["ITU601", "ITU709", "BT2020"])
def test_colours_follow_the_files_matrix_and_range(
    space: str, full: bool, pixels: str, tmp_path: Path
) -> None:
    image = numbered(0, height=64, width=64)
    tags = {
        "dst_colorspace": Colorspace[space],
        "dst_color_range": ColorRange.JPEG if full else ColorRange.MPEG,
    }
    encoding = Encoding(pixels=pixels, space=tags, codec_options={"crf": "1"})
    path = write_video(tmp_path / "a.mp4", [image] * 2, encoding)
    frame = decode_clip(path, num_frames=1, height=64, width=64, fps=30)[0].astype(int)
    for y, x in ((5, 5), (5, 58), (58, 5), (58, 58), (32, 32)):
        assert np.abs(frame[y, x] - image[y, x]).max() <= 4


# ---------------------------------------------------------------- faults


def fault(path: Path, **size: int) -> str:
    wanted: dict[str, Any] = {"num_frames": 2, "height": 48, "width": 64, "fps": 30.0, **size}
    with pytest.raises(ClipFault) as caught:
        decode_clip(path, **wanted)
    return caught.value.reason


def test_sound_alone_has_no_video_stream(tmp_path: Path) -> None:
    assert fault(write_sound(tmp_path / "a.mp4")) == "no_video_stream"


def test_enormous_frames_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    image = np.zeros((16, 20000, 3), np.uint8)
    path = write_video(tmp_path / "a.mkv", [image], Encoding(codec="ffv1"))
    assert fault(path) == "too_large"
    with pytest.raises(ClipFault, match="20000x16"):
        probe(path)


def test_a_ribbon_that_would_be_scaled_to_something_enormous_is_refused(tmp_path: Path) -> None:
    image = np.zeros((16, 8000, 3), np.uint8)
    path = write_video(tmp_path / "a.mkv", [image], Encoding(codec="ffv1"))
    assert fault(path, num_frames=1) == "too_large"


def test_a_lying_header_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.gif", 5, Encoding(codec="gif", pixels="rgb8"))
    data = bytearray(path.read_bytes())
    data[6:10] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert fault(path) in ("corrupt", "too_large")


def test_times_that_go_backwards_are_a_fault(tmp_path: Path) -> None:
    encoding = Encoding(times=range(300, 330), codec_options={"bf": "0"})
    late = write_numbered(tmp_path / "late.ts", 30, encoding)
    early = write_numbered(tmp_path / "early.ts", 30, Encoding(codec_options={"bf": "0"}))
    (tmp_path / "both.ts").write_bytes(late.read_bytes() + early.read_bytes())
    assert fault(tmp_path / "both.ts", num_frames=50) in ("bad_timestamps", "corrupt")


def moving_texture(index: int) -> Image:
    y, x = np.mgrid[0:240, 0:320]
    planes = [(x + 4 * index) % 256, (y + 2 * index) % 256, (x + y + 3 * index) % 256]
    grain = np.random.default_rng(0).integers(0, 40, (240, 320, 3))
    image: Image = (np.stack(planes, -1) * 0.8 + np.roll(grain, index, 1)).astype(np.uint8)
    return image


def test_a_damaged_h264_picture_is_never_concealed(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", map(moving_texture, range(40)))
    whole = path.read_bytes()
    for seed in range(12):
        data, rng = bytearray(whole), np.random.default_rng(seed)
        for place in rng.integers(len(data) // 10, len(data) * 9 // 10, 3):
            data[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        assert fault(path, num_frames=40) == "corrupt"


def test_a_missing_file_is_no_fault_of_the_clip(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "a.mp4")
    with pytest.raises(IsADirectoryError):
        decode_clip(tmp_path, num_frames=1, height=16, width=16, fps=1)


class DyingDisk(io.FileIO):
    """A file on a disk that fails past some place."""

    good_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= self.good_bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


@pytest.mark.parametrize("good", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
def test_a_failing_disk_is_no_fault_of_the_clip(
    name: str, good: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    images: list[Image] = [rng.integers(0, 255, (120, 160, 3), dtype=np.uint8) for _ in range(20)]
    path = write_video(tmp_path / name, images)

    def open_dying(path: Path, mode: str, buffering: int) -> DyingDisk:
        disk = DyingDisk(path, mode)
        disk.good_bytes = int(path.stat().st_size * good)
        return disk

    # No disk can be made to fail here, so the file object stands in for it.
    monkeypatch.setattr(container, "open", open_dying, raising=False)
    for action in (probe, lambda p: decode_clip(p, num_frames=20, height=48, width=64, fps=30)):
        with pytest.raises(OSError) as caught:
            action(path)
        assert caught.value.errno == errno.EIO


def test_a_fault_travels_between_processes() -> None:
    found = pickle.loads(pickle.dumps(ClipFault("corrupt", "why")))
    assert (found.reason, found.detail) == ("corrupt", "why")


def test_workers_die_with_a_killed_parent() -> None:
    code = (
        "import concurrent.futures, multiprocessing, os, time\n"
        "from fastvideo.data.decode import die_with_parent\n"
        "if __name__ == '__main__':\n"
        "    pool = concurrent.futures.ProcessPoolExecutor(1, initializer=die_with_parent,\n"
        "        mp_context=multiprocessing.get_context('spawn'))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code]
    pipes: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as parent:  # type: ignore[call-overload]
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s and alive(worker):
        time.sleep(0.05)
    assert not alive(worker)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
