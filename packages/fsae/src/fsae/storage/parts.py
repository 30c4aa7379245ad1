"""A long job's finished parts, kept beside the file that they will become, so that a stopped job goes on.

The parts of NAME lie in the folder NAME.partial, each whole under its number or not there, with settings.json, which
says what they were made from and by. They go when NAME is written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from fsae.errors import CheckpointError, UserError
from fsae.storage.files import read_json, write_json

_SETTINGS = "settings.json"


class Unfinished:
    """The parts of a file that is being made.

    `settings` say what they depend on, as short strings; UserError if there are parts made with others.
    """

    def __init__(self, target: str | os.PathLike[str], settings: Mapping[str, str]) -> None:
        target = Path(target)
        self.folder = target.with_name(target.name + ".partial")
        self.settings = dict(settings)
        if any(self.folder.glob("part-*")):
            other = [name for name, value in self._kept().items() if self.settings.get(name) != value]
            if other:
                raise UserError(
                    f"{self.folder} holds the beginning of {target}, made with another {' and '.join(other)}; "
                    "go on as it was begun, or remove that folder to begin anew"
                )

    def parts(self, suffix: str) -> list[Path]:
        """The finished parts, in order."""
        found: list[Path] = []
        while (path := self._part(len(found), suffix)).is_file():
            found.append(path)
        return found

    def next_part(self, suffix: str) -> Path:
        """Where to write the next part, whole; makes the folder."""
        try:
            self.folder.mkdir(exist_ok=True)
            if not (self.folder / _SETTINGS).exists():
                write_json(self.folder / _SETTINGS, self.settings)
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder} ({error.strerror}); make room, or give another place"
            ) from error
        return self._part(len(self.parts(suffix)), suffix)

    def remove(self) -> None:
        """Remove all parts; the file they became is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _part(self, number: int, suffix: str) -> Path:
        return self.folder / f"part-{number:06}{suffix}"

    def _kept(self) -> dict[str, str]:
        """The settings of the parts that are there."""
        try:
            return {**dict.fromkeys(self.settings, ""), **read_json(self.folder / _SETTINGS)}
        except CheckpointError:
            raise UserError(
                f"{self.folder} holds parts but no {_SETTINGS} that says what they are of; remove it to begin anew"
            ) from None
