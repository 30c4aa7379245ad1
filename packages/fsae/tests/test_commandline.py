"""The light front: help without torch, sentences instead of tracebacks."""

from __future__ import annotations

import errno
import subprocess
import sys
import types
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from fsae.commandline import Command, read_settings, run
from fsae.errors import CheckpointError, UserError

COMMANDS = (
    Command("greet", "say hello", "fake_target:greet"),
    Command("fail", "fail as told", "fake_target:fail"),
    Command("absent", "its module does not exist", "no_such_module_anywhere:main"),
)


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("fake_target")
    monkeypatch.setitem(sys.modules, "fake_target", module)
    return module


def front(*argv: str) -> int:
    return run("demo", "A demonstration.", "1.2.3", COMMANDS, argv)


def test_help_lists_every_command_without_importing_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert front("--help") == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert command.name in text
        assert command.help in text
    assert "A demonstration." in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert front("--version") == 0
    assert capsys.readouterr().out == "demo 1.2.3\n"


@pytest.mark.parametrize("argv", [(), ("greeet",), ("--unknown",)])
def test_no_or_an_unknown_command_exits_with_2(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert front(*argv) == 2
    assert "usage: demo" in capsys.readouterr().err


def test_the_target_receives_the_remaining_arguments_untouched(target: types.ModuleType) -> None:
    received: list[list[str]] = []
    target.greet = lambda argv: received.append(argv)  # type: ignore[attr-defined]
    assert front("greet", "--help", "greet", "-o", "x") == 0
    assert received == [["--help", "greet", "-o", "x"]]


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (UserError("a is given; b is accepted; give b"), 2, "demo: a is given; b is accepted; give b\n"),
        (CheckpointError("it is cut short"), 2, "demo: it is cut short\n"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "demo: a file cannot be written (No space left on device); make room and run again\n",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded", "map.png"),
            2,
            "demo: map.png cannot be written (Disk quota exceeded); make room and run again\n",
        ),
        (KeyboardInterrupt(), 130, "demo: interrupted\n"),
        (SystemExit(2), 2, ""),
        (SystemExit(None), 0, ""),
        (SystemExit("text"), 1, "text\n"),
    ],
)
def test_failures_become_a_sentence_and_an_exit_code(
    failure: BaseException,
    code: int,
    words: str,
    target: types.ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(argv: list[str]) -> int:
        raise failure

    target.fail = fail  # type: ignore[attr-defined]
    assert front("fail") == code
    assert capsys.readouterr().err == words


def test_a_warning_is_a_line_and_other_peoples_stay_as_they_are(
    target: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(argv: list[str]) -> int:
        warnings.warn("the clip is short", stacklevel=1)
        warnings.warn("old", FutureWarning, stacklevel=1)
        return 0

    target.fail = warn  # type: ignore[attr-defined]
    with pytest.warns(FutureWarning, match="old"):
        usual = warnings.showwarning
        assert front("fail") == 0
        assert warnings.showwarning is usual
    assert capsys.readouterr().err == "demo: the clip is short\n"


@dataclass(frozen=True)
class Numbers:
    """Numbers.

    Attributes:
        count: How many.
        scale: How large.
        names: What they are called.
        kind: Of what kind.
    """

    count: int
    scale: float = 1.0
    names: list[str] = field(default_factory=list)
    kind: Literal["small", "large"] = "small"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--cuont", "3"], "unrecognized arguments: --cuont 3"),
        ([], "required: count"),
        (["--count", "many"], "Expected a value of type int. Got value: many"),
        (["--count", "3", "--names", "one"], "Expected a list, such as '[this, that]'. Got value: one"),
        (["--count", "3", "--kind", "big"], "Expected one of 'small', 'large'. Got value: big"),
        (["--config", "none.yaml"], "File does not exist"),
        (["--config", "broken.yaml"], "Problems parsing config"),
        (["--config", "unknown.yaml"], "Option 'sacle' is not accepted"),
        (["--count", "3", "--scale", "2"], "unrecognized arguments: --scale 2"),
    ],
)
def test_settings_that_are_not_understood_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("count: [1\n")
    Path("unknown.yaml").write_text("count: 1\nsacle: 2\n")
    with pytest.raises(UserError) as refusal:
        read_settings("demo train", "Trains.", Numbers, argv, without=["scale"])
    assert sentence in str(refusal.value)
    assert str(refusal.value).endswith("; 'demo train --help' shows the options and what they take")
    assert "\n" not in str(refusal.value)


def test_a_targets_own_code_is_returned_and_a_fault_of_the_program_passes(target: types.ModuleType) -> None:
    target.fail = lambda argv: 3  # type: ignore[attr-defined]
    assert front("fail") == 3
    target.fail = lambda argv: 1 // 0  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        front("fail")


def test_the_front_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fsae.commandline import run; run('p', 'd', '1', [], ['--help']);"
        "print(sorted({'torch', 'numpy', 'diffusers', 'jsonargparse'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
