"""Any photograph a user may bring, as plain 8-bit RGB. Without torch: bad input is refused at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fsae.data.media import Media, Readable, as_media, check_file
from fsae.errors import UserError


def load_image(path: Readable) -> NDArray[np.uint8]:
    """Read an image file.

    The EXIF orientation is applied, transparency is composited on white, greyscale, palette, CMYK and 16-bit
    greyscale become RGB; of an animation the first frame is taken.

    Returns:
        uint8 array `H W 3`, RGB, of any size from 1 x 1.

    Raises:
        UserError: the file is missing, a folder, no image, cut short, larger than Pillow's limit against
            decompression bombs (about 89 million pixels), or of a pixel type without a defined 8-bit form.
    """
    with _opened(as_media(path)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    return _to_rgb8(upright, path)


def image_size(path: Readable) -> tuple[int, int]:
    """(H, W) of an image as shown, from its header alone; errors as `load_image`, as far as the header tells."""
    with _opened(as_media(path)) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(_ORIENTATION) in _LYING else (height, width)


def cover(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize `H W 3` until it covers `size` (antialiased), then crop the centre."""
    height, width = size
    scale = max(height / image.shape[0], width / image.shape[1])
    # The longer side is rounded, so it may fall a pixel short of the target.
    resized = (max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale)))
    picture = Image.fromarray(image).resize(resized, Image.Resampling.LANCZOS)
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    return np.asarray(picture.crop((left, top, left + width, top + height))).copy()


# EXIF orientations that swap height and width.
_LYING = frozenset({5, 6, 7, 8})
_ORIENTATION = 0x0112


@contextmanager
def _opened(path: Media) -> Iterator[Image.Image]:
    """Open an image; each way in which that or what is done with it fails becomes a sentence."""
    check_file(path, "image", "one image, such as a JPEG or PNG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with path.open() as file, Image.open(file) as image:
                yield image
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


def _to_rgb8(image: Image.Image, path: Readable) -> NDArray[np.uint8]:
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


def _grey16_to_grey8(pixels: NDArray[Any], path: Readable) -> NDArray[np.uint8]:
    """Scale 16-bit greyscale (0..65535) to 8 bits; Pillow's own conversion would clip at 255."""
    if pixels.min() < 0 or pixels.max() > 65535:
        raise UserError(f"{path} holds 32-bit integer pixels; save it with 8 or 16 bits a channel")
    return np.round(pixels / 257).astype(np.uint8)
