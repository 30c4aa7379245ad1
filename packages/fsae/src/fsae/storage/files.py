"""Files appear whole or not at all: written under a temporary name beside their place, then renamed.

And a JSON file of a model's folder is read whole, or named in the error.
"""

from __future__ import annotations

import json
import os
import secrets
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
    """Check, before any work is done, that a folder is there and takes files, or can be made; nothing is left behind.

    Raises:
        UserError: it cannot.
    """
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


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; rename it to `path` on success, remove it on failure.

    The temporary name is hidden and keeps the file's suffix, since some writers choose their format by it.

    Raises:
        UserError: as `check_writable`, before anything is written.
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


def usual_mode(folder: str | os.PathLike[str]) -> int:
    """The permissions that a new file gets in `folder`. Some writers leave their files for the owner alone."""
    probe = _temporary_sibling(Path(folder) / "mode")
    try:
        probe.touch(exist_ok=False)
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model's folder.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no {path}; the model is incomplete, or the folder is none; copy it again"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; copy it again")
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
