"""Heat maps: what is drawn where, in which colour, and that it fits."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fsae.evaluation.charts import heat_map


def drawn(values: list[list[float]], **options: tuple[float, float]) -> Image.Image:
    rows, columns = len(values), len(values[0])
    labels = [str(number) for number in range(max(rows, columns))]
    return heat_map(np.array(values), "title", ("row", labels[:rows]), ("column", labels[:columns]), **options)


def darkness(picture: Image.Image, values: list[list[float]]) -> list[list[int]]:
    """How dark each cell's corner is; the cells are found by the first one's place, the margin's end."""
    grey = 255 - np.array(picture.convert("L")).astype(int)
    # The top row of cells starts below the title, where a whole row of 20 pixels has one colour other than white.
    top, left = next(
        (y, x)
        for y in range(20, grey.shape[0] - 20)
        for x in range(grey.shape[1] - 20)
        if grey[y, x] and (grey[y : y + 12, x : x + 20] == grey[y, x]).all()
    )
    return [[int(grey[top + 64 * y + 3, left + 64 * x + 3]) for x in range(len(values[0]))] for y in range(len(values))]


def test_higher_is_darker_and_what_is_missing_is_blank() -> None:
    values = [[0.0, 0.25, 0.5], [0.75, 1.0, float("nan")]]
    cells = darkness(drawn(values), values)
    assert 0 < cells[0][0] < cells[0][1] < cells[0][2] < cells[1][0] < cells[1][1]
    assert cells[1][2] == 0


def test_limits_hold_what_lies_outside() -> None:
    values = [[-5.0, 2.0, 4.0, 90.0]]
    cells = darkness(drawn(values, limits=(2.0, 4.0)), values)[0]
    assert cells[0] == cells[1] < cells[2] == cells[3]


@pytest.mark.parametrize("count", [1, 7, 40, 100])
def test_a_map_of_any_size_fits_a_screen_and_its_scale(count: int) -> None:
    picture = drawn([[0.5] * count] * count)
    assert 200 < picture.height < 1600 and 100 < picture.width < 1600
    pixels = np.array(picture)
    assert (pixels[:, -1] == 255).all() and (pixels[-1] == 255).all()  # nothing is cut off


def test_labels_are_one_for_each_row_and_column() -> None:
    with pytest.raises(ValueError, match="1 x 2 labels for values of shape"):
        heat_map(np.zeros((2, 2)), "", ("row", ["a"]), ("column", ["a", "b"]))
