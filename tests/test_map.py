"""docs/map.md says truly where each part of the paper is: its files, its tests, and every section are there."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAP = ROOT / "docs" / "map.md"

SECTIONS = ["1", "2", "2.1", "2.2", "2.2.1", "2.2.2", "2.2.3", "2.3", "2.3.1", "2.3.2"]
SECTIONS += ["2.4", "2.4.1", "2.4.2", "2.4.3", "3", "3.1", "3.2", "4"]
PAPER = (
    {f"§{section}" for section in SECTIONS}
    | {f"eq. {number}" for number in range(1, 14)}
    | {f"Fig. {number}" for number in range(1, 11)}
    | {f"Table {number}" for number in range(1, 5)}
)
EMPTY = {"not built yet", "nothing to build"}

LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")


@dataclass(frozen=True)
class Row:
    """A row of the page: what part of the paper, what it is, and the cells that name files and tests."""

    paper: str
    what: str
    files: str
    tests: str


def rows(page: str) -> list[Row]:
    """The rows of all tables whose head begins with "paper"."""
    tables = re.findall(r"^\| paper .*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for t in tables for line in t.splitlines()]


def linked(cell: str) -> list[Path]:
    """The paths that a cell's links lead to."""
    return [(MAP.parent / target).resolve() for _, target in LINK.findall(cell)]


def functions(path: Path) -> set[str]:
    """The functions at a file's top level."""
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def faults_of_tests(cell: str) -> list[str]:
    """What is wrong with a cell of tests: links to their files, each followed by the names of tests in it."""
    faults = []
    for part in cell.split(";"):
        names = re.findall(r"`(\w+)`", part)
        paths = linked(part)
        if len(paths) != 1 or not names:
            faults.append(f"no file with its tests: {part.strip()!r}")
        elif paths[0].is_file():
            faults += [f"no {name} in {paths[0].name}" for name in names if name not in functions(paths[0])]
    return faults


def faults_of(row: Row) -> list[str]:
    """What is wrong with a row."""
    if row.files in EMPTY:
        return [f"{row.paper} is {row.files} and has tests"] if row.tests or linked(row.what) else []
    if not linked(row.files):
        return [f"{row.paper} names no file: {row.files!r}"]
    paths = linked(row.files) + linked(row.tests)
    return [f"no file {path}" for path in paths if not path.exists()] + faults_of_tests(row.tests)


def faults(page: str) -> list[str]:
    """All that is not true on a page."""
    found = rows(page)
    named = {row.paper for row in found}
    missing = [f"{part} is missing" for part in sorted(PAPER - named)]
    strange = [f"{part} is not in the paper" for part in sorted(named - PAPER)]
    return missing + strange + [fault for row in found for fault in faults_of(row)]


def modules_of_the_paper() -> set[Path]:
    """Modules that open with a section of the paper, but for the packages' `__init__`."""
    files = [path for path in ROOT.glob("packages/*/src/**/*.py") if path.name != "__init__.py"]
    heads = {p: ast.get_docstring(ast.parse(p.read_text(encoding="utf-8"))) or "" for p in files}
    return {path for path, head in heads.items() if "§" in head.split("\n\n")[0]}


def test_the_map_is_true() -> None:
    page = MAP.read_text(encoding="utf-8")
    assert len(rows(page)) >= len(PAPER)
    found = faults(page)
    assert not found, "\n".join(found)


def test_every_module_that_names_a_section_is_on_the_map() -> None:
    modules = modules_of_the_paper()
    assert ROOT / "packages/fsae/src/fsae/model.py" in modules
    on_the_map = {path for row in rows(MAP.read_text(encoding="utf-8")) for path in linked(row.files)}
    found = sorted(str(path.relative_to(ROOT)) for path in modules - on_the_map)
    assert not found, "\n".join(found)


# A page of one true row: this file is its own witness.
TRUE = """
| paper | what | files | tests |
|---|---|---|---|
| eq. 7 | a mixture | [map.md](map.md) | [test_map](../tests/test_map.py) `test_the_map_is_true` |
"""


def faults_but_for_missing(page: str) -> list[str]:
    """Faults of a page that is not meant to be complete."""
    return [fault for fault in faults(page) if not fault.endswith(" is missing")]


def test_a_true_row_has_no_fault_and_the_others_are_missed() -> None:
    assert faults_but_for_missing(TRUE) == []
    assert set(faults(TRUE)) == {f"{part} is missing" for part in PAPER - {"eq. 7"}}


@pytest.mark.parametrize(
    ("true", "false", "fault"),
    [
        ("(map.md)", "(maps.md)", "no file .*/docs/maps.md"),
        ("[map.md](map.md)", "later", "eq. 7 names no file: 'later'"),
        ("[map.md](map.md)", "not built yet", "eq. 7 is not built yet and has tests"),
        ("tests/test_map.py", "tests/test_maps.py", "no file .*/tests/test_maps.py"),
        ("`test_the_map_is_true`", "`test_the_map`", "no test_the_map in test_map.py"),
        ("`test_the_map_is_true`", "", "no file with its tests: .*"),
        ("| eq. 7 |", "| eq. 17 |", "eq. 17 is not in the paper"),
    ],
)
def test_what_is_untrue_is_found(true: str, false: str, fault: str) -> None:
    assert true in TRUE
    (found,) = faults_but_for_missing(TRUE.replace(true, false))
    assert re.fullmatch(fault, found)
