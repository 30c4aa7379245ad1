"""Any photograph in, plain RGB out, and a sentence for everything that is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsae.data.image import load_image
from fsae.errors import UserError

ORIENTATION = 0x0112


def gradient(height: int, width: int) -> np.ndarray:
    """A picture that no flip or turn maps to itself."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 9, columns * 7, rows * 3 + columns * 5], axis=-1).astype(np.uint8)


def test_rgb_comes_back_exactly(tmp_path: Path) -> None:
    pixels = gradient(20, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, pixels)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000)])
def test_extreme_sizes_are_accepted(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "a.png")
    loaded = load_image(str(tmp_path / "a.png"))
    assert loaded.shape == (size[1], size[0], 3)
    assert (loaded == (1, 2, 3)).all()


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [  # how a camera stores an upright picture `u` under each EXIF orientation
        (1, lambda u: u),
        (2, lambda u: u[:, ::-1]),
        (3, lambda u: u[::-1, ::-1]),
        (4, lambda u: u[::-1]),
        (5, lambda u: u.transpose(1, 0, 2)),
        (6, lambda u: np.rot90(u, 1)),
        (7, lambda u: u[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda u: np.rot90(u, -1)),
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_every_exif_orientation_comes_out_upright(
    tmp_path: Path, orientation: int, stored: object, suffix: str
) -> None:
    upright = gradient(16, 24)
    image = Image.fromarray(np.ascontiguousarray(stored(upright)))  # type: ignore[operator]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"a{suffix}"
    image.save(path, exif=exif, quality=100, subsampling=0)
    loaded = load_image(path)
    assert loaded.shape == upright.shape
    assert np.abs(loaded.astype(int) - upright).max() <= (0 if suffix == ".png" else 6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparency_is_composited_on_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    if mode in ("RGB", "L"):  # one colour declared transparent
        image = Image.new(mode, (2, 1), 0)
        image.putpixel((1, 0), 100 if mode == "L" else (100, 100, 100))
        image.save(path, transparency=0 if mode == "L" else (0, 0, 0))
    elif mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([0, 0, 0, 100, 100, 100])
        image.putpixel((1, 0), 1)
        image.save(path, transparency=0)
    else:
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
        image.putpixel((1, 0), (100, 100, 100, 255))
        image.convert(mode).save(path)
    np.testing.assert_array_equal(load_image(path)[0], [[255] * 3, [100] * 3])


def test_half_transparency_mixes(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (0, 0, 0, 128)).save(tmp_path / "a.png")
    np.testing.assert_allclose(load_image(tmp_path / "a.png")[0, 0], 127, atol=1)


def test_greyscale_bilevel_and_palette(tmp_path: Path) -> None:
    grey = gradient(4, 5)[..., 0]
    Image.fromarray(grey).save(tmp_path / "l.png")
    np.testing.assert_array_equal(load_image(tmp_path / "l.png"), np.repeat(grey[..., None], 3, axis=2))
    Image.fromarray(grey > 5).save(tmp_path / "1.png")
    np.testing.assert_array_equal(load_image(tmp_path / "1.png")[..., 0], np.where(grey > 5, 255, 0))
    Image.new("P", (3, 2), 0).save(tmp_path / "p.gif")
    assert load_image(tmp_path / "p.gif").shape == (2, 3, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_greyscale_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 32_896, 65_535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(load_image(tmp_path / f"a{suffix}")[0, :, 0], [0, 1, 128, 255])


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = load_image(tmp_path / "a.jpg")[4, 4].astype(int)
    assert red > 240
    assert green < 15
    assert blue < 15


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    np.testing.assert_array_equal(load_image(tmp_path / "a.gif")[0, 0], [255, 0, 0])


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 100_000), ("I", -1)], ids=["float", "wide", "negative"])
def test_pixels_without_an_eight_bit_form_are_refused(tmp_path: Path, mode: str, value: float) -> None:
    Image.new(mode, (2, 2), value).save(tmp_path / "a.tif")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="save it with 8 or 16 bits"):
        load_image(tmp_path / "a.tif")


def test_missing_folder_and_text(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("this is not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for path, words in [
        (tmp_path / "none.png", "there is no image file"),
        (tmp_path, "is not a file"),
        (tmp_path / "text.jpg", "not an image in a known format"),
        (tmp_path / "empty.png", "not an image in a known format"),
    ]:
        with pytest.raises(UserError, match=words):
            load_image(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_a_file_cut_short_is_refused(tmp_path: Path, suffix: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(noise).save(path)
    load_image(path)  # the whole file is fine
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(UserError, match=r"damaged or cut short|not an image"):
        load_image(path)


@pytest.mark.parametrize("factor", [1.5, 3])
def test_decompression_bombs_are_refused(tmp_path: Path, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pillow warns above its limit and raises above twice the limit: both must end in the same sentence.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (100, int(10 * factor))).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="more than 1000 pixels"):
        load_image(tmp_path / "a.png")
