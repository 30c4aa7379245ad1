"""Files and folders appear whole or not at all: written under a temporary name beside their place, then renamed.

Also the one pair of functions that reads and writes JSON.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsae.errors import CheckpointError, UserError


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Check, before any work is done, that a file can be written at `path`; return where it will lie.

    The folder must exist and take a new file, which is tried, because permission bits alone do not tell
    (read-only mounts, quotas). An existing regular file may be replaced; a link is followed.

    Raises:
        UserError: `path` is a folder or a device, or its folder is missing or takes no files.
    """
    target = Path(os.path.realpath(path))
    if not os.path.isdir(target.parent):
        raise UserError(f"cannot write {path}: there is no folder {target.parent}; create it first")
    if os.path.isdir(target):
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file in it")
    try:
        if not stat.S_ISREG(os.stat(target).st_mode):
            raise UserError(f"cannot write {path}: it is not a regular file; give another name")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another name") from None
    probe = _temporary_sibling(target)
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write {path}: the folder {target.parent} takes no new file ({error.strerror}); "
            "give a place you may write to"
        ) from None
    return target


def check_folder(path: str | os.PathLike[str]) -> None:
    """UserError, before any work, if a folder neither is there and takes files, nor can be made; nothing is left
    behind."""
    folder = Path(path)
    there = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not there.is_dir():
        raise UserError(f"cannot use {path} as a folder: {there} is a file; give another name")
    probe = _temporary_sibling(there / "folder")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(
            f"cannot write to {path}: {there} takes no new files ({error.strerror}); give a place you may write to"
        ) from None


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """UserError, before any work, if a place is a file or a folder with something in it, or takes no new folder."""
    if os.path.isdir(path):
        if os.listdir(path):
            raise UserError(f"{path} is not empty; give a new folder")
        check_writable(Path(path) / "file")
    elif os.path.exists(path):
        raise UserError(f"{path} is a file; give a new folder")
    else:
        check_writable(path)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; rename it to `path` on success, remove it on failure.

    The temporary name is hidden and keeps the file's suffix, since some writers choose their format by it. Errors as
    `check_writable`, before anything is written.
    """
    target = check_writable(path)
    temporary = _temporary_sibling(target)
    try:
        yield temporary
        os.chmod(temporary, usual_mode(target.parent))
        _flush_to_disk(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling folder of `path` to fill; it takes `path`'s place on success, and goes on failure.

    Its name is the same in every process and every run, so that several processes can fill it together and what a
    killed run left goes when the next one begins.
    """
    target = Path(os.path.realpath(path))
    temporary = partial_folder(target)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        publish_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def partial_folder(target: Path) -> Path:
    """The hidden name beside `target` under which that folder is filled."""
    return target.with_name(f".{target.name[:64]}.partial")


def publish_folder(temporary: Path, target: Path) -> None:
    """Give a finished folder its name, in place of an older one."""
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)


def usual_mode(folder: str | os.PathLike[str]) -> int:
    """The permissions that a new file gets in `folder`. Some writers leave their files for the owner alone."""
    probe = _temporary_sibling(Path(folder) / "mode")
    try:
        probe.touch(exist_ok=False)
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], values: Any, **options: Any) -> None:
    """Write JSON, atomically; floats survive exactly. `options` are those of `json.dumps`."""
    text = json.dumps(values, **{"indent": 2, "ensure_ascii": False, **options})
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, advice: str = "copy it again") -> dict[str, Any]:
    """The object in a JSON file; CheckpointError, which ends in `advice`, if it is missing, damaged, or holds something
    else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no {path}; its folder is incomplete, or not the one that was meant; {advice}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); {advice}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; {advice}")
    return content


def _temporary_sibling(target: Path) -> Path:
    # Bounded, so that a name that is itself allowed stays so under its temporary form.
    return target.with_name(f".{target.stem[:64]}.tmp-{os.getpid()}-{secrets.token_hex(4)}{target.suffix}")


def _flush_to_disk(path: Path) -> None:
    # Without this a crash soon after the rename can leave the final name on an empty file.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
