# SPDX-License-Identifier: Apache-2.0
"""Opens video files so that every failure is either the clip's fault or the disk's, told apart."""

import contextlib
import errno
import io
from collections.abc import Iterator

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from fastvideo.data.footage import Content

MAX_SIDE = 16384
MAX_PIXELS = 1 << 27

# Containers that hold their own video. Playlists and image patterns, which name other files, are
# none; and no protocol is allowed by which a demuxer could open one.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf,gif,mxf,nut,ivf"
_OPTIONS = {
    "format_whitelist": _FORMATS,
    "protocol_whitelist": "none",
    "max_pixels": str(MAX_PIXELS),
}
_DECODER_OPTIONS = {
    # Without it a damaged frame is concealed: it comes out wrong and nothing is said. In H.264 this
    # finds nearly every flipped bit; HEVC and VP9 streams without checksums show only a few.
    "err_detect": "crccheck+explode",
    "max_pixels": str(MAX_PIXELS),
}
_MAGIC = ((0, b"\x1a\x45\xdf\xa3"), (0, b"RIFF"), (0, b"OggS"), (0, b"FLV"), (0, b"GIF8"))
_MP4_MAGIC = tuple((4, name) for name in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"))


class ClipFault(Exception):
    """The clip itself cannot be used, today and on any other machine."""

    def __init__(self, reason: str, detail: str) -> None:
        """Take a reason to count by, in snake_case, and a text for people."""
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class _Reader:
    """A file that FFmpeg reads through Python, so that an I/O error is not taken for an end."""

    def __init__(self, file: io.RawIOBase | io.BytesIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size) or b""
        except OSError as error:
            self.error = error
            return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except OSError as error:
            if error.errno != errno.EINVAL:  # that is a damaged file's wish for an impossible place
                self.error = error
            return -1

    def tell(self) -> int:
        return self._file.tell()


@contextlib.contextmanager
def open_video(video: Content) -> Iterator[tuple[InputContainer, VideoStream, int]]:
    """Open a video for decoding on one thread; what FFmpeg complains of becomes a `ClipFault`.

    Yields:
        The container, its stream, and the size of the file in bytes.
    """
    with _readable(video) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if size == 0:
            raise ClipFault("empty_file", "has 0 bytes")
        reader = _Reader(file)
        try:
            with _open(reader) as container:
                yield container, _stream(container), size
        except MemoryError:
            raise
        except (av.error.FFmpegError, ClipFault) as error:
            # All reading is ours: other errors of FFmpeg, whatever number they carry, come from
            # what it read.
            if reader.error is not None:
                raise reader.error from error
            if isinstance(error, ClipFault):
                raise
            raise ClipFault("corrupt", f"cannot be decoded: {error.strerror}") from None
        if reader.error is not None:
            raise reader.error


def _readable(video: Content) -> io.RawIOBase | io.BytesIO:
    return io.BytesIO(video) if isinstance(video, bytes) else open(video, "rb", buffering=0)


def _open(reader: _Reader) -> InputContainer:
    head = reader.read(16)
    reader.seek(0)
    try:
        return av.open(reader, "r", options=_OPTIONS, metadata_errors="replace")
    except MemoryError:
        raise
    except av.error.FFmpegError as error:
        if any(head[at:].startswith(magic) for at, magic in _MAGIC + _MP4_MAGIC):
            detail = f"the container cannot be read, it may be cut off: {error.strerror}"
            raise ClipFault("corrupt", detail) from None
        raise ClipFault("not_a_video", f"begins with {head!r}, as no known container") from None


def _stream(container: InputContainer) -> VideoStream:
    """First video stream that is not the cover of an album, ready to decode."""
    streams = container.streams.video
    moving = [s for s in streams if not s.disposition & Disposition.attached_pic]
    if not moving:
        raise ClipFault("no_video_stream", f"{container.format.name} without a video stream")
    stream = moving[0]
    context = stream.codec_context
    if context is None:
        raise ClipFault("unsupported_codec", "FFmpeg has no decoder for the video stream")
    check_size(context.width, context.height)
    context.thread_count = 1
    context.thread_type = "NONE"
    context.options = dict(_DECODER_OPTIONS)
    return stream


def check_size(width: int, height: int) -> None:
    """Raise ``too_large`` for pictures that no camera makes and that would fill the memory."""
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        limits = f"at most {MAX_SIDE} a side and {MAX_PIXELS} pixels are decoded"
        raise ClipFault("too_large", f"frames of {width}x{height}; {limits}")


def check_complete(container: InputContainer, stream: VideoStream, *, size: int) -> None:
    """Raise ``corrupt`` if an MP4 is cut off: with its index in front it still opens then."""
    if "mp4" in container.format.name.split(","):
        end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        if end > size:
            raise ClipFault("corrupt", f"is cut off: {size} of at least {end} bytes are there")
