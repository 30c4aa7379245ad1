"""Where clips come from: folders, lists, and tars as webdataset writes them. Without torch.

A tar is indexed once, by the headers of its members, and then read at random: a sample is a place in a file. That is
what a fixed order, its resume in mid-epoch and the sorting into buckets of sizes need, and what webdataset's own
reader, which streams shards through a shuffle buffer, cannot give; reading the headers takes the standard library.
"""

from __future__ import annotations

import csv
import glob
import json
import math
import os
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fsae.data.index import Index, open_index
from fsae.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Entry, Media
from fsae.errors import UserError

_KNOWN = VIDEO_SUFFIXES | IMAGE_SUFFIXES
_LISTS = (".jsonl", ".csv")
_ACCEPTED = "a folder, a .jsonl or .csv list, a .tar, or a pattern of these"


def read_source(source: str | Path, probed: bool = False) -> Index:
    """The entries of a source, in an order that depends on its content alone, by its index (`fsae.data.index`).

    Args:
        source: A folder (with its subfolders, in the order of the paths; tars in it are read too); a .jsonl or .csv
            list with the column `path` (relative to the list) and, if wanted, `caption`, `start` and `end`
            (seconds); a .tar; or a pattern such as `shards/*.tar`.
        probed: Whether each file is looked into for its length and size.

    Returns:
        Entries. A list's files are not looked for: what is missing shows when it is read, or probed. A tar that is
        damaged gives its members before the damage and one entry for itself, which no reader can read, so that it is
        named among what was skipped.

    Raises:
        UserError: there is no such source, it has no video or image, or a list that cannot be understood.
    """
    index = open_index(str(source), partial(_parts, source), _of_path, probed)
    if index is None:
        raise UserError(f"{source} holds no video or image; give {_ACCEPTED}")
    return index


def _parts(source: str | Path) -> list[str]:
    """The files that a source is made of: videos, images, tars and lists."""
    path = Path(source)
    matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(source), recursive=True)))
    if not matches:
        raise UserError(f"{source} is neither a folder nor a list, a tar or a pattern that matches any; check the path")
    return [part for match in matches for part in (_files(match) if match.is_dir() else [str(match)])]


def _files(folder: Path) -> list[str]:
    wanted = _KNOWN | {".tar"}
    found = []
    for place, _, names in tqdm(os.walk(folder), desc=f"looking for files in {folder}", unit=" folders", delay=2):
        paths = (os.path.join(place, name) for name in names if os.path.splitext(name)[1].lower() in wanted)
        # Sorted so, folders come in the order of their names, whatever signs these have.
        found += [path.replace(os.sep, "\0") for path in paths if os.path.isfile(path)]
    return [path.replace("\0", os.sep) for path in sorted(found)]


def _of_path(name: str) -> Iterable[Entry]:
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in _LISTS:
        return _of_list(path)
    if suffix == ".tar":
        return _of_tar(path)
    if suffix in _KNOWN:
        return [Entry(Media(path))]
    raise UserError(f"{path} is neither a folder nor a list nor a tar; give {_ACCEPTED}")


# --- lists


def _of_list(source: Path) -> Iterator[Entry]:
    for number, row in _rows(source):
        path, caption = row.get("path"), row.get("caption")
        if not isinstance(path, str) or not path:
            raise UserError(f"{source}, line {number}: there is no path; each entry needs path, and may have caption")
        try:
            start, end = _span(row)
        except (TypeError, ValueError) as error:
            raise UserError(f"{source}, line {number}: {error}; give seconds with start before end") from None
        yield Entry(Media(source.parent / path, start=start, end=end), str(caption or ""))


def _span(row: dict[str, Any]) -> tuple[float, float | None]:
    """Start and end in seconds; columns that are missing or empty mean the whole."""
    start, end = row.get("start"), row.get("end")
    first = 0.0 if start in (None, "") else float(start)
    last = None if end in (None, "") else float(end)
    if not (0 <= first < math.inf) or (last is not None and not first < last < math.inf):
        raise ValueError(f"the span is {first} to {last}")
    return first, last


def _rows(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, columns) of a list's entries."""
    of_format = _csv_rows if source.suffix.lower() == ".csv" else _jsonl_rows
    try:
        with source.open(encoding="utf-8-sig", newline="") as lines:
            yield from of_format(source, lines)
    except UnicodeDecodeError:
        raise UserError(
            f"{source}, line {_undecodable_line(source)} is not UTF-8; lists are read as UTF-8, so save it as that"
        ) from None


def _csv_rows(source: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    # Without strict, a quote that is not closed takes all rows after it for its field, and nothing is said.
    reader = csv.DictReader(lines, strict=True)
    begin = 1
    try:
        if reader.fieldnames is None:
            return
        begin = reader.line_num + 1
        for row in reader:
            yield reader.line_num, row
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{source} cannot be read as CSV from line {begin} on ({error}); close the quotes, double those within a "
            f"field, and keep fields to {csv.field_size_limit()} characters"
        ) from error


def _jsonl_rows(source: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{source}, line {number} is not JSON ({error}); give one object a line") from error
            if not isinstance(row, dict):
                raise UserError(f'{source}, line {number} is not an object; give {{"path": ..., "caption": ...}}')
            yield number, row


def _undecodable_line(source: Path) -> int:
    """Number of the first line that is not UTF-8; the decoder, which takes the file in blocks, cannot tell it."""
    number = 1
    with source.open("rb") as lines:
        for line in lines:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                break
            number += 1
    return number


# --- tars


def _of_tar(path: Path) -> Iterator[Entry]:
    """Samples of a tar: members that share their name up to its first dot.

    Of several videos or images the first video is taken, or else the first image; its caption is the member .txt, or
    else what .json says under "caption". "start" and "end" in .json are the span in seconds.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    damage: object = None
    try:
        with tarfile.open(path, "r:") as archive, path.open("rb") as file:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                key, dot, suffix = base.partition(".")
                if member.isreg() and dot and key:
                    samples.setdefault(f"{folder}/{key}", {})[f".{suffix.lower()}"] = member
            # tarfile takes a broken header for the end; the true end is a block of zeros.
            file.seek(archive.offset)
            if any(file.read(tarfile.BLOCKSIZE)):
                damage = "a member's header is broken"
    except (tarfile.TarError, OSError) as error:
        damage = error
    for members in samples.values():
        medium = _medium(members)
        if medium is not None:
            yield _sample(path, medium, members)
    if damage is not None:
        warnings.warn(f"the tar {path} is damaged or compressed ({damage}); what is before is used", stacklevel=2)
        yield Entry(Media(path))


def _medium(members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    for kind in (VIDEO_SUFFIXES, IMAGE_SUFFIXES):
        for suffix, member in members.items():
            if "." + suffix.rpartition(".")[2] in kind:
                return member
    return None


def _sample(path: Path, medium: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> Entry:
    said: dict[str, Any] = {}
    caption, start, end = "", 0.0, None
    try:
        if ".json" in members:
            content = json.loads(_text(path, members[".json"]))
            said = content if isinstance(content, dict) else {}
        caption = _text(path, members[".txt"]).strip() if ".txt" in members else str(said.get("caption") or "")
        start, end = _span(said)
    except (TypeError, ValueError) as error:
        warnings.warn(f"what {path} says about {medium.name} cannot be used ({error})", stacklevel=2)
    return Entry(Media(path, medium.name, medium.offset_data, medium.size, start, end), caption)


def _text(path: Path, member: tarfile.TarInfo) -> str:
    with Media(path, member.name, member.offset_data, member.size).open() as file:
        return file.read().decode("utf-8")
