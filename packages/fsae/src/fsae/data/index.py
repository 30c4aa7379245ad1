"""What is known of a source's videos and images, kept on disk, so that a start neither lists nor probes them again.

An index is made by one process; the others of a run, of a machine or not, wait for it, and all map the same files
(`fsae.storage.columns`). It lies in the user's cache folder (XDG_CACHE_HOME, or else ~/.cache), because folders of data
are often read-only, and runs, evaluations and caches of the same data then share it; where that takes no files, among
the temporary ones. It may be removed at any time.

It is current while the files that it was made of have their sizes and times: the files of a folder or pattern, or a
list itself, not what the list names. What has changed is looked at anew, and the rest kept. Files that could not be
read are tried again at every start. Probing that is interrupted goes on from what was saved last.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from fsae.data.image import image_size
from fsae.data.media import Entry, Media
from fsae.data.video import VideoInfo, probe
from fsae.errors import UserError
from fsae.storage.columns import Table, Texts
from fsae.storage.files import atomic_folder

_VERSION = 1
_KEPT = 3  # versions of an index: runs may still have mapped the ones before
_PATIENCE = 3600.0  # seconds without a sign of life of the process that makes an index
_SAVE_EVERY = 60.0  # seconds of probing
_ROWS = 65536  # that are Python objects at a time
_PROBED_TOGETHER = 1024
_PROBING_THREADS = 8  # more than processors: most of the time is waiting for the disk

# path is empty where it is the part's own. file stands for the bytes: path and place, and a part's own size and time.
# What was probed: frames, 0 if that failed for the reason why; width and height; fps; counted as in `VideoInfo`.
_PROBES = {"probed": bool, "frames": np.int64, "height": np.int32, "width": np.int32, "fps": float, "counted": bool}
_PLACE = {"path": str, "member": str, "offset": np.int64, "size": np.int64, "start": float, "end": float}
_SCHEMA = {**_PLACE, "caption": str, "image": bool, "file": np.uint64, **_PROBES, "why": str}
_UNPROBED = (False, 0, 0, 0, 1.0, False, "")

Read = Callable[[str], Iterable[Entry]]


class Index(Sequence[Entry]):
    """The entries of a source.

    Args:
        parts: Of each file that it was made of, its path, its stamp (size, and time in nanoseconds), and its
            first row.
        rows: Of each entry the columns `_SCHEMA`; an open end is NaN.
    """

    def __init__(self, parts: Table, rows: Table) -> None:
        self.parts, self.rows = parts, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Entry:  # type: ignore[override]
        row = range(len(self))[row]
        path, member, offset, size, start, end = (self.rows.value(name, row) for name in _PLACE)
        part = int(np.searchsorted(self.parts.numbers["first"], row, side="right")) - 1
        path = Path(path or self.parts.texts["path"][part])
        media = Media(path, member, offset, size, start, None if np.isnan(end) else end)
        return Entry(media, self.rows.texts["caption"][row])

    def info(self, row: int) -> VideoInfo | str:
        """Length and size of a probed file; of one that cannot be read, why."""
        frames, height, width, fps, counted = (self.rows.value(name, row) for name in list(_PROBES)[1:])
        return VideoInfo(frames, height, width, fps, counted) if frames else self.rows.value("why", row)


class Entries(Sequence[Entry]):
    """The entries of several sources, one source after the other."""

    def __init__(self, indices: Sequence[Index]) -> None:
        self.indices = indices
        self.firsts = np.cumsum([0, *map(len, indices)])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, number: int) -> Entry:  # type: ignore[override]
        index, row = self.place(range(len(self))[number])
        return index[row]

    def place(self, number: int) -> tuple[Index, int]:
        """The index of an entry, and its row there."""
        source = int(np.searchsorted(self.firsts, number, side="right")) - 1
        return self.indices[source], int(number - self.firsts[source])

    def without_caption(self) -> int:
        """How many entries have none."""
        missing = 0
        for captions in (index.rows.texts["caption"] for index in self.indices):
            empty = captions.ends[1:] == captions.ends[:-1]
            missing += int(empty.sum())
            if len(captions.data):
                first = captions.data[np.minimum(captions.ends[:-1], len(captions.data) - 1)]
                blank = np.flatnonzero(~empty & (first <= ord(" "))).tolist()
                missing += sum(not captions[row].strip() for row in blank)
        return missing


def open_index(source: str, list_parts: Callable[[], Sequence[str]], read: Read, probed: bool) -> Index | None:
    """The index of a source as it is now, made or brought up to date where it is not; None if nothing is in it.

    Args:
        source: Its name, for which there is one index.
        list_parts: Gives the files it is made of.
        read: The entries of one of them.
        probed: Whether each entry's file is to have been looked into.

    Raises:
        UserError: another process does not get on with it; or the errors of `list_parts` and `read`.
    """
    folder, asked = index_folder(source), time.time()
    with _alone(folder, source):
        version, index = _newest(folder)
        # Whoever had the index while this process waited has looked already.
        if version is None or version.stat().st_mtime < asked:
            old, index = index, _brought_up_to_date(index, list_parts(), read, source)
            if index is None:
                return None
            version = version if index is old else None
            numbers = index.rows.numbers
            numbers["probed"] = numbers["probed"] & (numbers["frames"] > 0)
        assert index is not None
        made: list[Path] = []

        def save() -> None:
            made.append(save_index(index, folder))
            for path in made[:-1]:
                shutil.rmtree(path, ignore_errors=True)

        looked = probed and not index.rows.numbers["probed"].all() and _probe(index, save)
        if version is None and not looked:
            save()
        version = made[-1] if made else version
        assert version is not None
        os.utime(version, (time.time(),) * 2)
        for path in _versions(folder)[_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)
        return _opened(version)


# --- on disk


def index_folder(source: str) -> Path:
    """Where the versions of a source's index lie."""
    name = hashlib.sha256(
        f"{_VERSION}\n{os.path.abspath(source)}\n{source}".encode("utf-8", "surrogatepass")
    ).hexdigest()
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for place in (Path(caches, "fsvideo"), Path(tempfile.gettempdir(), f"fsvideo-{getpass.getuser()}")):
        folder = place / "index" / name[:32]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "lock").touch()
        except OSError:
            continue
        return folder
    raise UserError(
        f"neither {caches} nor {tempfile.gettempdir()} takes files; set XDG_CACHE_HOME to a folder that does"
    )


@contextmanager
def _alone(folder: Path, source: str) -> Iterator[None]:
    """Hold the index's lock, which the system frees when a process ends in whatever way."""
    lock = FileLock(folder / "lock")
    try:
        while True:
            try:
                lock.acquire(timeout=0.1)
                break
            except Timeout:
                if time.time() - max(path.stat().st_mtime for path in (folder, folder / "lock")) > _PATIENCE:
                    raise UserError(
                        f"another process has the index of {source} and did nothing for {_PATIENCE:g} seconds; end "
                        f"it, or remove {folder}, and start again"
                    ) from None
            except (OSError, NotImplementedError):  # a file system without locks; versions appear whole even so
                break
        os.utime(folder / "lock")
        yield
    finally:
        lock.release()


def _newest(folder: Path) -> tuple[Path | None, Index | None]:
    """The version that was looked at last and is whole, and where it is."""
    for version in _versions(folder):
        try:
            return version, _opened(version)
        except (OSError, ValueError, KeyError):
            continue
    return None, None


def _opened(version: Path) -> Index:
    """A version as it lies on disk."""
    return Index(Table.open(version / "parts"), Table.open(version / "rows"))


def _versions(folder: Path) -> list[Path]:
    there = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(there, key=lambda path: path.stat().st_mtime, reverse=True)


def save_index(index: Index, folder: Path) -> Path:
    """Write a new version."""
    version = folder / secrets.token_hex(8)
    try:
        with atomic_folder(version) as temporary:
            index.parts.save(temporary / "parts")
            index.rows.save(temporary / "rows")
    except OSError as error:
        raise UserError(
            f"cannot write the index {folder} ({error}); make room, or set XDG_CACHE_HOME to another place"
        ) from error
    return version


# --- listing


def _brought_up_to_date(index: Index | None, paths: Sequence[str], read: Read, source: str) -> Index | None:
    """The index itself if no part has changed, one that is made anew where they have, or None if it would be empty."""
    stats = ((stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, paths))
    stamps, firsts = np.fromiter(stats, np.dtype((np.int64, 2)), len(paths)), np.zeros(len(paths), np.int64)
    parts = Table({"stamp": stamps, "first": firsts}, {"path": Texts.of(paths)})
    places: dict[str, int] = {}
    if index is not None:
        old, bounds = index.parts, [*index.parts.numbers["first"].tolist(), len(index)]
        if parts.texts["path"].equals(old.texts["path"]) and np.array_equal(stamps, old.numbers["stamp"]):
            return index
        places = {old.texts["path"][place]: place for place in range(len(old))}
    tables: list[Table] = []
    waiting: list[tuple[object, ...]] = []
    count = changed = 0
    with tqdm(desc=f"indexing {source}", unit=" files", delay=2) as bar:
        for part, path in enumerate(paths):
            firsts[part], stamp = count, stamps[part].tolist()
            place = places.get(path)
            if index is not None and place is not None and old.numbers["stamp"][place].tolist() == stamp:
                first, stop = bounds[place : place + 2]
                if stop - first > 1:  # of a single file there is nothing to read
                    tables += [*_taken(waiting), index.rows.slice(first, stop)]
                    count += stop - first
                    continue
            else:
                changed += 1
            for entry in read(path):
                waiting.append(_row(entry, path, stamp))
                count += 1
                bar.update()
                if len(waiting) == _ROWS:
                    tables += _taken(waiting)
        tables += _taken(waiting)
    if not tables:
        return None
    made = Index(parts, Table.join(tables))
    if index is not None:
        print(
            f"{source} has changed since it was indexed: of {len(paths)} files it is made of, {changed} are looked at "
            "anew",
            file=sys.stderr,
        )
        _carry_probes(index.rows, made.rows)
    return made


def _taken(waiting: list[tuple[object, ...]]) -> list[Table]:
    """The rows that wait, if any, as a table; they wait no more."""
    tables = [Table.of(waiting, _SCHEMA)] if waiting else []
    waiting.clear()
    return tables


def _row(entry: Entry, part: str, stamp: list[int]) -> tuple[object, ...]:
    """The values of `_SCHEMA`."""
    media, path = entry.media, str(entry.media.path)
    own = media.path == Path(part)
    said = f"{path}\n{media.member}\n{media.offset}\n{media.size}\n{stamp if own else ''}"
    digest = hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    end = np.nan if media.end is None else media.end
    place = ("" if own else path, media.member, media.offset, media.size, media.start, end, entry.caption)
    return (*place, media.is_image, int.from_bytes(digest), *_UNPROBED)


# --- probing


def _carry_probes(old: Table, rows: Table) -> None:
    """What was found in files that are in both, such as those of a list that has grown."""
    known = np.flatnonzero(old.numbers["frames"] > 0)
    if len(known):
        order = known[np.argsort(old.numbers["file"][known])]
        there, files = old.numbers["file"][order], rows.numbers["file"]
        found = np.minimum(np.searchsorted(there, files), len(there) - 1)
        takes = there[found] == files
        for name in _PROBES:
            rows.numbers[name][takes] = old.numbers[name][order[found[takes]]]


def _probe(index: Index, save: Callable[[], None]) -> bool:
    """Look into the files that were not, each once, and save what was found from time to time, whatever happens.

    Returns:
        Whether anything is known now that was not before.
    """
    old, rows = index.rows, Table(index.rows.numbers, index.rows.texts)
    rows.numbers |= {name: rows.numbers[name].copy() for name in _PROBES}
    texts = old.texts["why"]
    why = {row: texts[row] for row in np.flatnonzero(np.diff(texts.ends)).tolist()}
    todo = np.flatnonzero(~rows.numbers["probed"])
    _, first, which = np.unique(rows.numbers["file"][todo], return_index=True, return_inverse=True)
    firsts = np.sort(todo[first])
    new = False

    def keep() -> None:
        for name in _PROBES:
            rows.numbers[name][todo] = rows.numbers[name][todo[first][which]]
        why.update({row: why.get(of, "") for row, of in zip(todo.tolist(), todo[first][which].tolist(), strict=True)})
        rows.texts["why"] = _sparse(why, len(rows))
        index.rows = rows
        save()

    last, pause = time.monotonic(), _SAVE_EVERY
    try:
        with (
            ThreadPoolExecutor(_PROBING_THREADS) as pool,
            tqdm(total=len(firsts), desc="looking into files", unit=" files", delay=2) as bar,
        ):
            for some in np.split(firsts, range(_PROBED_TOGETHER, len(firsts), _PROBED_TOGETHER)):
                for row, found in zip(some.tolist(), pool.map(_look, (index[row].media for row in some)), strict=True):
                    new |= found != index.info(row)
                    why[row] = found if isinstance(found, str) else ""
                    values = (0, 0, 0, 1.0, False) if isinstance(found, str) else astuple(found)
                    for name, value in zip(_PROBES, (True, *values), strict=True):
                        rows.numbers[name][row] = value
                    bar.update()
                if time.monotonic() - last > pause:
                    last = time.monotonic()
                    keep()
                    pause = max(_SAVE_EVERY, 20 * (time.monotonic() - last))
    finally:
        if new:
            keep()
    return new


def _look(media: Media) -> VideoInfo | str:
    try:
        return VideoInfo(1, *image_size(media), fps=1.0) if media.is_image else probe(media.file, count=False)
    except UserError as error:
        return str(error)


def _sparse(texts: dict[int, str], length: int) -> Texts:
    """Strings of which most are empty, from those that may not be."""
    rows = sorted(row for row, text in texts.items() if text)
    some = Texts.of(texts[row] for row in rows)
    lengths = np.zeros(length + 1, np.int64)
    lengths[np.array(rows, np.int64) + 1] = np.diff(some.ends)
    return Texts(some.data, np.cumsum(lengths))
