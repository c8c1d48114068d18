# SPDX-License-Identifier: Apache-2.0
"""First images as people have them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvideo.data.first_image import first_image
from fastvideo.errors import UserError
from tests.tiny_world import write_clip

RED, BLUE = (255, 0, 0), (0, 0, 255)


def corners(path: Path) -> list[tuple[int, ...]]:
    """Upper left and lower right of the picture at 32 x 32."""
    found = first_image(path, height=32, width=32)
    assert found.shape == (32, 32, 3) and found.dtype == np.uint8
    return [tuple(int(v) for v in found[y, x]) for y, x in ((2, 2), (-3, -3))]


def halves(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Red above, blue below."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (0, size[1] // 2, *size))
    return image


@pytest.mark.parametrize("name", ["a.png", "ü b.webp", "a.bmp", "a.gif", "a.tiff"])
def test_images_are_read_whatever_their_form(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    halves().save(path, lossless=True)  # other forms than webp ignore it
    assert corners(path) == [RED, BLUE]


def test_a_wide_image_is_cropped_in_the_centre_and_not_squeezed(tmp_path: Path) -> None:
    image = Image.new("RGB", (96, 32), RED)
    image.paste(BLUE, (32, 0, 64, 32))
    image.save(tmp_path / "a.png")
    assert corners(tmp_path / "a.png") == [BLUE, BLUE]


def test_a_photo_stands_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    halves().save(tmp_path / "a.png", exif=exif)
    assert corners(tmp_path / "a.png") == [BLUE, RED]


def test_transparent_parts_are_white_whatever_is_hidden_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = halves().convert("RGBA")
    image.paste((255, 0, 0, 0), (0, 0, 64, 32))
    image.save(tmp_path / "a.png")
    assert corners(tmp_path / "a.png") == [(255, 255, 255), BLUE]


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tiff"
    Image.new(mode, (64, 64)).save(path)
    with pytest.raises(UserError, match=r"a\.tiff: has pixels of mode .*8 bits a channel"):
        first_image(path, height=32, width=32)


@pytest.mark.parametrize("name", ["a.mp4", "a.3gp", "video"])
def test_videos_are_known_by_content(tmp_path: Path, name: str) -> None:
    write_clip(tmp_path / "clip.mp4", index=0)
    (tmp_path / "clip.mp4").rename(tmp_path / name)
    assert first_image(tmp_path / name, height=32, width=32).shape == (32, 32, 3)


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png: "):
        first_image(tmp_path / "a.png", height=32, width=32)
