# SPDX-License-Identifier: Apache-2.0
"""First images of image-to-video: from an image file or a video, brought to size as clips are."""

from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo.config.prompts import Prompt
from fastvideo.config.recipe import Recipe
from fastvideo.errors import UserError
from fastvideo.log import logger

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

READERS = ("numpy", "av", "PIL")
"""Packages that read pictures."""


@dataclass(frozen=True)
class PromptToEncode:
    """A prompt with the size of its video, in pixels; ``image`` is a file or None."""

    caption: str
    image: Path | None
    num_frames: int
    height: int
    width: int

    @property
    def values(self) -> dict[str, Any]:
        """Everything but the file, by name."""
        return {name: value for name, value in vars(self).items() if name != "image"}


def prompt_to_encode(recipe: Recipe, prompt: Prompt, *, origin: str) -> PromptToEncode:
    """Fill in the recipe's clip size and check that the model can make such a video.

    Raises:
        UserError: ``origin`` names the prompt: a size that does not fit the model, a first image
            for text-to-video, or for image-to-video none or one that cannot be read.
    """
    size = {
        "num_frames": prompt.num_frames or recipe.clip.num_frames,
        "height": prompt.height or recipe.clip.height,
        "width": prompt.width or recipe.clip.width,
    }
    problems = recipe.architecture.misfits(**size)
    if problems:
        raise UserError(f"{origin}: {'; '.join(problems)}")
    image = prompt.first_image
    if image is not None and recipe.model.task == "t2v":
        raise UserError(
            f"{origin}: gives a first image, which a text-to-video model does not take; remove "
            "image_path and video_path"
        )
    if image is None and recipe.model.task == "i2v":
        raise UserError(f"{origin}: has no first image; add image_path or video_path")
    if image is not None:
        _check_picture(image, origin=origin, height=size["height"], width=size["width"])
    return PromptToEncode(prompt.caption, image, **size)


def _check_picture(path: Path, *, origin: str, height: int, width: int) -> None:
    """Read it once: a broken file is to come up before models are loaded, or trained for days.

    Where jobs are submitted nothing may be installed that can read it: the job will.
    """
    if any(find_spec(name) is None for name in READERS):
        if not path.is_file():
            raise UserError(f"{origin}: {path}: is no file; correct image_path or video_path")
        return
    try:
        first_image(path, height=height, width=width)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def first_image(path: Path, *, height: int, width: int) -> "npt.NDArray[np.uint8]":
    """Read an image, or the first frame of a video, as RGB (H, W, 3).

    It is scaled until it covers ``height`` and ``width`` and cropped in the centre, as the clips of
    training are, so that the picture is never squeezed.

    Raises:
        UserError: The file cannot be read as a picture.
    """
    from av.video.frame import VideoFrame

    from fastvideo.data.decode import ClipFault, decode_clip
    from fastvideo.data.picture import Fit

    try:
        picture = _picture(path)
        if picture is None:
            frames_FHWC = decode_clip(path, num_frames=1, height=height, width=width, fps=1.0)
            return frames_FHWC.reshape(height, width, 3)
        frame = VideoFrame.from_ndarray(picture, format="rgb24")
        return Fit(height=height, width=width, aspect=Fraction(1))(frame)
    except ClipFault as fault:
        raise UserError(f"{path}: gives no image ({fault.detail}); give another file") from None


def _picture(path: Path) -> "npt.NDArray[np.uint8] | None":
    """An image file as RGB (H, W, 3), upright; None if it is none that Pillow knows."""
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(
                    f"{path}: has pixels of mode {image.mode}, whose range is not known; save it "
                    "with 8 bits a channel"
                )
            return np.ascontiguousarray(_rgb(ImageOps.exif_transpose(image), path))
    except UnidentifiedImageError:
        return None
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); save it anew") from None


def _rgb(image: Any, path: Path) -> Any:
    """RGB, transparent parts over white: what lies hidden under them is nobody's intent."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    opaque = image.convert("RGBA")
    if opaque.getchannel("A").getextrema()[0] < 255:
        logger.warning("%s: its transparent parts are taken as white", path)
    white = Image.new("RGBA", opaque.size, "white")
    return Image.alpha_composite(white, opaque).convert("RGB")
