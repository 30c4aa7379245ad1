"""Any photograph a user may bring, as plain 8-bit RGB. Without torch: bad input is refused at once."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fsae.errors import UserError


def load_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read an image file.

    The EXIF orientation is applied, transparency is composited on white, greyscale, palette, CMYK and 16-bit
    greyscale become RGB; of an animation the first frame is taken.

    Returns:
        uint8 array `H W 3`, RGB, of any size from 1 x 1.

    Raises:
        UserError: the file is missing, a folder, no image, cut short, larger than Pillow's limit against
            decompression bombs (about 89 million pixels), or of a pixel type without a defined 8-bit form.
    """
    if not os.path.exists(path):
        raise UserError(f"there is no image file {path}; check its name")
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file; give one image, such as a JPEG or PNG")
    image = _decode(Path(path))
    return _to_rgb8(image, path)


def _decode(path: Path) -> Image.Image:
    """Open, decode wholly and turn upright; each way that fails is a sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(
            f"{path} has more than {Image.MAX_IMAGE_PIXELS} pixels, the limit; scale the image down first"
        ) from None
    except UnidentifiedImageError:
        raise UserError(
            f"{path} is not an image in a known format; give a JPEG, PNG, WebP, TIFF, BMP or GIF file"
        ) from None
    # Pillow's decoders meet broken files with OSError, SyntaxError, ValueError, EOFError, struct.error and
    # more.
    except Exception as error:
        raise UserError(f"the image {path} is damaged or cut short ({error}); save it again") from None


def _to_rgb8(image: Image.Image, path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):
        image = Image.fromarray(_grey16_to_grey8(np.asarray(image), path))
    elif image.mode == "F":
        raise UserError(f"{path} holds floating-point pixels; save it with 8 or 16 bits a channel")
    try:
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise UserError(f"{path} has pixels of type {image.mode}, which have no RGB form ({error})") from None


def _grey16_to_grey8(pixels: NDArray[Any], path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Scale 16-bit greyscale (0..65535) to 8 bits; Pillow's own conversion would clip at 255."""
    if pixels.min() < 0 or pixels.max() > 65535:
        raise UserError(f"{path} holds 32-bit integer pixels; save it with 8 or 16 bits a channel")
    return np.round(pixels / 257).astype(np.uint8)
