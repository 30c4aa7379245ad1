"""The light front of every command line: all commands and their help without importing torch.

Each command names its target as "package.module:function"; the module is imported only when that command is
run, and the function receives the remaining arguments. Targets build their own parser and import torch after
parsing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from fsae.errors import UserError

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count


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

    0 is success, 2 a user's error (its sentence on stderr, no traceback), 130 an interrupt. Any other
    exception is a fault of the program and passes through.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command = _choose(prog, description, version, commands, arguments[:1])
        return command(arguments[1:])
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        return _exit_code(stop)


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
