"""Millions of rows as columns: flat arrays, and strings in one block of bytes. Without torch.

A table on disk is a folder with a .npy file a column. Opened, it is mapped and not read: processes of a machine share
its pages, and only the rows that are asked for become Python objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Schema = Mapping[str, Any]  # of each column, `str` or a type of NumPy


class Texts:
    """Strings in UTF-8.

    Args:
        data: Their bytes, one string after the other.
        ends: Where each begins, and where the last ends; one number more than there are strings.
    """

    def __init__(self, data: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """From Python's strings, names of files with bytes that are no UTF-8 included."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __getitem__(self, row: int) -> str:
        return self.data[self.ends[row] : self.ends[row + 1]].tobytes().decode("utf-8", "surrogatepass")

    def equals(self, other: Texts) -> bool:
        """Whether both hold the same strings."""
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.data, other.data)


class Table:
    """Rows as columns.

    Args:
        numbers: Arrays of one length.
        texts: As many strings each.
        folder: Where it lies, if it was opened; it is opened there again, not copied, in another process.
    """

    def __init__(
        self, numbers: Mapping[str, NDArray[Any]], texts: Mapping[str, Texts], folder: Path | None = None
    ) -> None:
        self.numbers, self.texts, self.folder = dict(numbers), dict(texts), folder

    @classmethod
    def of(cls, rows: Sequence[Sequence[Any]], schema: Schema) -> Table:
        """From rows with one value for each column of the schema."""
        values = zip(*rows, strict=True) if rows else [()] * len(schema)
        columns: dict[str, Sequence[Any]] = dict(zip(schema, values, strict=True))
        numbers = {name: np.array(columns[name], kind) for name, kind in schema.items() if kind is not str}
        return cls(numbers, {name: Texts.of(columns[name]) for name, kind in schema.items() if kind is str})

    def __len__(self) -> int:
        return len(next(iter(self.numbers.values())))

    def __reduce__(self) -> Any:
        return (Table.open, (self.folder,)) if self.folder else (Table, (self.numbers, self.texts))

    def value(self, name: str, row: int) -> Any:
        """One value, as Python's own."""
        return self.texts[name][row] if name in self.texts else self.numbers[name][row].tolist()

    def slice(self, start: int, stop: int) -> Table:
        """The rows `start .. stop`."""
        return Table(
            {name: column[start:stop] for name, column in self.numbers.items()},
            {name: Texts(column.data, column.ends[start : stop + 1]) for name, column in self.texts.items()},
        )

    @staticmethod
    def join(tables: Sequence[Table]) -> Table:
        """The rows of one or more tables with the same columns, one table after the other."""
        numbers = {name: np.concatenate([table.numbers[name] for table in tables]) for name in tables[0].numbers}
        texts = {}
        for name in tables[0].texts:
            parts = [table.texts[name] for table in tables]
            starts = np.cumsum([0, *(part.ends[-1] - part.ends[0] for part in parts)])
            ends = [part.ends[1:] - part.ends[0] + start for part, start in zip(parts, starts, strict=False)]
            data = np.concatenate([part.data[part.ends[0] : part.ends[-1]] for part in parts])
            texts[name] = Texts(data, np.concatenate([[0], *ends]))
        return Table(numbers, texts)

    def save(self, folder: Path) -> None:
        """Write it into a new folder."""
        folder.mkdir()
        arrays: dict[str, ArrayLike] = dict(self.numbers)
        for name, column in self.texts.items():
            arrays |= {f"{name}.data": column.data, f"{name}.ends": column.ends}
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def open(cls, folder: Path) -> Table:
        """Map the table of a folder.

        Raises:
            OSError: there is none.
            ValueError: a file of it is cut short.
        """
        paths = {path.stem: path for path in sorted(folder.iterdir())}
        arrays = {name: np.asarray(np.load(path, mmap_mode="r")) for name, path in paths.items()}
        texts = {
            name.removesuffix(".data"): Texts(array, arrays[name.removesuffix("data") + "ends"])
            for name, array in arrays.items()
            if name.endswith(".data")
        }
        return cls({name: array for name, array in arrays.items() if "." not in name}, texts, folder)
