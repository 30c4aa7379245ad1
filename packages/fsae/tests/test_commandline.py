"""The light front: help without torch, sentences instead of tracebacks."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from fsae.commandline import Command, run
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
