"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fsae.errors import CheckpointError, UserError
from fsae.storage.files import (
    atomic_folder,
    atomic_path,
    check_folder,
    check_writable,
    partial_folder,
    read_json,
    write_json,
)


def test_a_written_file_appears_under_its_name_alone(tmp_path: Path) -> None:
    target = tmp_path / "result.txt"
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".txt"
        assert temporary.name.startswith(".")
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert os.listdir(tmp_path) == ["result.txt"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "result.txt"
    target.write_text("old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.txt"]


def test_an_existing_file_is_replaced_and_a_link_is_followed(tmp_path: Path) -> None:
    real = tmp_path / "real.txt"
    real.write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to(real)
    with atomic_path(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_long_names_are_written_too(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 250 + ".txt")
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
    assert target.read_text() == "whole"


def test_places_that_take_no_file_are_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target, reason in [
        (tmp_path, "it is a folder"),
        (tmp_path / "nowhere" / "a.mp4", "no folder"),
        (tmp_path / "file" / "a.mp4", "no folder"),
        (Path(os.devnull), "not a regular file"),
        (tmp_path / ("x" * 300), "File name too long"),
    ]:
        with pytest.raises(UserError, match=reason):
            check_writable(target)
    assert os.listdir(tmp_path) == ["file"]


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permission bits do not bind a superuser, so the refusal itself is staged.
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match="takes no new file .Permission denied."):
        check_writable(tmp_path / "a.mp4")


def test_a_folder_that_cannot_be_made_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("")
    for name in ("text", "text/run", "text/a/b"):
        with pytest.raises(UserError, match=r"cannot use .* as a folder: .*text is a file"):
            check_folder(tmp_path / name)
    check_folder(tmp_path)
    check_folder(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(UserError, match=r"takes no new files \(No space left on device\)"):
        check_folder(tmp_path / "a")


def test_checking_leaves_nothing_and_returns_the_place(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "a.mp4") == (tmp_path / "a.mp4").resolve()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_a_file_gets_the_permissions_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "result.txt") as temporary:
            temporary.touch(mode=0o600)
        (tmp_path / "other.txt").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "result.txt").stat().st_mode == (tmp_path / "other.txt").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["other.txt", "result.txt"]


def test_a_folder_appears_whole_in_place_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with atomic_folder(target) as temporary:
        assert temporary.parent == tmp_path and temporary.name.startswith(".")
        (temporary / "new").touch()
        assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["model"] and os.listdir(target) == ["new"]


def test_a_failed_folder_leaves_the_old_one_and_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    partial_folder(target).mkdir()
    (partial_folder(target) / "of the killed run").touch()
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as temporary:
        assert os.listdir(temporary) == []
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["model"] and os.listdir(target) == ["old"]


def test_json_survives_exactly(tmp_path: Path) -> None:
    values = {"ü": [0.1 + 0.2, 1e-310, None], "a": {"b": -0.0}}
    write_json(tmp_path / "x.json", values)
    assert repr(read_json(tmp_path / "x.json")) == repr(values)
    assert "ü" in (tmp_path / "x.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_json_that_cannot_be_used_is_a_sentence_with_the_callers_advice(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"x\.json.*; bake a new one$"):
        read_json(tmp_path / "x.json", "bake a new one")
