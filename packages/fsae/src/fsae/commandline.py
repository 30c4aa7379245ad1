"""The light front of every command line: all commands and their help without importing torch.

Each command names its target as "package.module:function"; the module is imported only when that command is
run, and the function receives the remaining arguments. Targets build their own parser and import torch after
parsing.
"""

from __future__ import annotations

import argparse
import errno
import inspect
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from fsae.errors import UserError

Settings = TypeVar("Settings")

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Command:
    """One command: its name, its line in the help, and its target `"package.module:function"`."""

    name: str
    help: str
    target: str

    def __call__(self, argv: list[str]) -> int:
        """Import the target and run it on `argv`; nothing returned counts as success."""
        module, function = self.target.split(":")
        return getattr(import_module(module), function)(argv) or 0


def run(
    prog: str, description: str, version: str, commands: Sequence[Command], argv: Sequence[str] | None = None
) -> int:
    """Run the command that `argv` (default: the process's arguments) names; return the process's exit code.

    0 is success, 2 a user's error or a full disk (a sentence on stderr, no traceback), 130 an interrupt. Any
    other exception is a fault of the program and passes through.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command = _choose(prog, description, version, commands, arguments[:1])
        with _warnings_as_lines(prog):
            return command(arguments[1:])
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        place = f"{error.filename} cannot be written" if error.filename else "a file cannot be written"
        print(f"{prog}: {place} ({error.strerror}); make room and run again", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        return _exit_code(stop)


def read_settings(
    prog: str, description: str, settings: type[Settings], argv: list[str], without: Sequence[str] = ()
) -> Settings:
    """A training's settings: every field of the dataclass is a flag, and a key of the YAML file that `--config` names.

    `without` names fields that have no say in this command. UserError for an option that there is none of, one that is
    missing, or a value that it does not take.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(settings, as_group=True, skip=set(without))
    try:
        flat = "clips" in inspect.signature(settings).parameters
        found = parser.instantiate(parser.parse_args(_nested(argv) if flat else argv))
    except ArgumentError as error:
        reason = _in_words(" ".join(str(error).replace("Parser key", "option").split()))
        raise UserError(f"{reason}; '{prog} --help' shows the options and what they take") from None
    return settings(**{key: value for key, value in vars(found).items() if key != "config"})


_FLAT = "frames|height|width|buckets|more_data|fps|stride|reader"
"""What earlier versions had at the top of a training's settings, and is in their part `clips` now."""


def _nested(argv: list[str]) -> list[str]:
    """What was typed, with flat options, and files of flat keys, as they are written now."""
    words = [re.sub(rf"^--({_FLAT})(?=$|[=+.])", r"--clips.\1", word) for word in argv]
    for place, word in enumerate(words):
        option, equals, file = word.partition("=")
        if option == "--config" and equals:
            words[place] = f"--config={_nested_file(file)}"
        elif words[place - 1] == "--config" and place:
            words[place] = _nested_file(word)
    return words


def _nested_file(path: str) -> str:
    """The YAML of a file of flat keys; of any other its path."""
    if not os.path.isfile(path):
        return path
    text, count = re.subn(rf"^({_FLAT})(?=\s*:)", r"clips.\1", Path(path).read_text("utf-8"), flags=re.MULTILINE)
    if count and re.search(r"^clips\s*:", text, re.MULTILINE):
        raise UserError(f"{path} has {_FLAT.replace('|', ', ')} in part beside clips; write all of them under clips")
    return text if count else path


def _in_words(reason: str) -> str:
    """jsonargparse's sentence about a value, without the names of Python's types."""
    reason = reason.replace("Expected a <class 'list'>.", "Expected a list, such as '[this, that]'.")
    reason = re.sub(r"Expected a <class '(\w+)'>", r"Expected a value of type \1", reason)
    return re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1", reason)


@contextmanager
def _warnings_as_lines(prog: str) -> Iterator[None]:
    """What the package warns of is told as a line, like an error: not with a place in the source."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **named: Any) -> None:
        if category is UserWarning:
            print(f"{prog}: {message}", file=sys.stderr)
        else:
            usual(message, category, *place, **named)

    with warnings.catch_warnings():
        usual, warnings.showwarning = warnings.showwarning, show
        yield


def _choose(prog: str, description: str, version: str, commands: Sequence[Command], first: list[str]) -> Command:
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--version", action="version", version=f"{prog} {version}")
    table = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True, prog=prog)
    for command in commands:
        table.add_parser(command.name, help=command.help, add_help=False)
    parser.epilog = f"'{prog} COMMAND --help' shows a command's options."
    chosen = parser.parse_args(first).command
    return next(command for command in commands if command.name == chosen)


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1
