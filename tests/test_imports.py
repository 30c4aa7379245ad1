"""Which package may import which, and what importing a package costs."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {path.name: path for path in ROOT.glob("packages/*/src/*") if path.is_dir()}

#   fsae  <-  fsdit  <-  fsupsampler  <-  fsrl,   and fsvideo_pipeline above the first three
ALLOWED: dict[str, set[str]] = {
    "fsae": set(),
    "fsdit": {"fsae"},
    "fsupsampler": {"fsae", "fsdit"},
    "fsrl": {"fsae", "fsdit", "fsupsampler"},
    "fsvideo_pipeline": {"fsae", "fsdit", "fsupsampler"},
}

# What all packages share lies in wings of fsae that never import the model. Each with the wings that it may import:
WINGS: dict[str, set[str]] = {
    "errors": set(),
    "exports": set(),
    "bounds": {"errors"},
    "shapes": {"errors"},
    "commandline": {"errors"},
    "devices": {"errors"},
    "storage": {"errors"},
    "data": {"errors", "bounds", "shapes", "storage"},
    "training": {"errors", "bounds", "commandline", "devices", "storage", "data"},
}


def mentioned_modules(source: str) -> set[str]:
    """Modules of ours that a file names: in imports at any depth, and in strings that name a module.

    `from a import b` is a.b, whether b is a module or not.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # "fsae.model" or "fsae.cli:main", as lazy imports and command tables write it; prose has blanks.
            head = node.value.split(":")[0]
            names = [head] if all(part.isidentifier() for part in head.split(".")) and "." in head else []
        found |= {name for name in names if name.split(".")[0] in ALLOWED}
    return found


def mentioned_packages(source: str) -> set[str]:
    """Our packages that a file names."""
    return {name.split(".")[0] for name in mentioned_modules(source)}


def mentioned_rooms(source: str) -> set[str]:
    """Modules and folders at the top of fsae that a file names; fsae itself hands out the model and counts as one."""
    names = [name for name in mentioned_modules(source) if name.split(".")[0] == "fsae"]
    return {name.split(".")[1] if "." in name else name for name in names}


def test_the_packages_are_the_five() -> None:
    assert set(SOURCES) == set(ALLOWED)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_arrows(package: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): against
        for path in SOURCES[package].rglob("*.py")
        if (against := mentioned_packages(path.read_text(encoding="utf-8")) - ALLOWED[package] - {package})
    }
    assert wrong == {}


def files_of(wing: str) -> list[Path]:
    place = SOURCES["fsae"] / wing
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


@pytest.mark.parametrize("wing", WINGS)
def test_shared_wings_import_neither_the_model_nor_a_wing_above(wing: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): against
        for path in files_of(wing)
        if (against := mentioned_rooms(path.read_text(encoding="utf-8")) - WINGS[wing] - {wing})
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("sample", "rooms"),
    [
        ("import fsae", {"fsae"}),
        ("from fsae import FSAE", {"FSAE"}),
        ("from fsae import model", {"model"}),
        ("from fsae.model import FSAE", {"model"}),
        ("def later():\n    import fsae.layers.conv", {"layers"}),
        ("if TYPE_CHECKING:\n    from fsae.training.loop import Task", {"training"}),
        ("import_module('fsae.model')", {"model"}),
        ("import torch\n'the model of fsae.'", set()),
    ],
)
def test_what_a_wing_imports_is_found(sample: str, rooms: set[str]) -> None:
    assert mentioned_rooms(sample) == rooms


@pytest.mark.parametrize(
    "sample",
    [
        "import fsvideo_pipeline",
        "import os, fsvideo_pipeline.plan as plan",
        "from fsvideo_pipeline import plan",
        "from fsvideo_pipeline.plan import snap",
        "def later():\n    from fsvideo_pipeline.plan import snap",
        "if TYPE_CHECKING:\n    import fsvideo_pipeline.plan",
        "importlib.import_module('fsvideo_pipeline.plan')",
        "Command('x', 'y', 'fsvideo_pipeline.cli:main')",
    ],
)
def test_a_forbidden_import_would_be_found(sample: str) -> None:
    assert mentioned_packages(sample) == {"fsvideo_pipeline"}


@pytest.mark.parametrize("sample", ["'see fsvideo_pipeline. It is above'", "from . import fsdit", "x = fsae"])
def test_other_text_is_no_import(sample: str) -> None:
    assert mentioned_packages(sample) == set()


def imported_modules(source: str) -> set[str]:
    """Top-level names of all modules that a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def declared_distributions(package: str, extras: bool) -> set[str]:
    requirements = importlib.metadata.requires(package.replace("_", "-")) or []
    chosen = [line for line in requirements if extras or "extra ==" not in line]
    return {re.split(r"[^\w.-]", line)[0] for line in chosen}


@pytest.mark.parametrize("package", ALLOWED)
def test_dependencies_are_what_is_imported(package: str) -> None:
    """Whatever is imported is declared, so that the package installs alone; what is declared is imported."""
    distributions = importlib.metadata.packages_distributions()
    imported: set[str] = set()
    for path in SOURCES[package].rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for module in imported_modules(source) | mentioned_packages(source):
            name = distributions[module][0] if module in distributions else module
            imported.add(name.lower().replace("_", "-"))
    imported.discard(package.replace("_", "-"))
    assert imported <= declared_distributions(package, extras=True)
    assert declared_distributions(package, extras=False) <= imported


@pytest.mark.parametrize("package", ALLOWED)
def test_importing_a_package_imports_nothing_heavy(package: str) -> None:
    code = f"import sys, {package}; print(*{{'torch', 'diffusers', 'transformers', 'av'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
