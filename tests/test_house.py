"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {path.name: path for path in ROOT.glob("packages/*/src/*") if path.is_dir()}
TEXT_SUFFIXES = {".py", ".toml", ".txt", ".md", ".yml", ".yaml", ".json", ".sh", ".cfg", ""}
SKIPPED = {".git", ".venv", "build", "dist", "runs", "__pycache__"}

# A path below a person's or a machine's own folders; the text is pieced together to keep this file clean.
MACHINE_PATH = re.compile(r"(?<![\w./:])/(?:" + "|".join(["home", "root", "Users", "work", "mnt"]) + r")/[\w.]")


def project_texts() -> list[Path]:
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and path.suffix in TEXT_SUFFIXES
        and path.stat().st_size < 1_000_000
        and not any(part in SKIPPED or part.endswith("_cache") for part in path.relative_to(ROOT).parts)
    ]


def source_files() -> list[Path]:
    return [path for folder in PACKAGES.values() for path in folder.rglob("*.py")]


def unsafe_loads(source: str) -> list[int]:
    """Lines that unpickle: pickle itself, or torch.load without a literal weights_only=True."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = getattr(node.func.value, "id", "")
            if owner == "torch" and node.func.attr == "load":
                keywords = {word.arg: word.value for word in node.keywords}
                value = keywords.get("weights_only")
                if not (isinstance(value, ast.Constant) and value.value is True):
                    lines.append(node.lineno)
            elif owner in {"pickle", "cloudpickle", "dill", "joblib"} and node.func.attr in {"load", "loads"}:
                lines.append(node.lineno)
    return lines


def test_no_file_names_a_machines_paths() -> None:
    texts = project_texts()
    assert ROOT / "pyproject.toml" in texts
    found = {
        str(path.relative_to(ROOT)): match.group()
        for path in texts
        if (match := MACHINE_PATH.search(path.read_text(encoding="utf-8", errors="replace")))
    }
    assert found == {}


@pytest.mark.parametrize("name", ["home/someone", "root/.cache", "work/x"])
def test_a_machines_path_would_be_found(name: str) -> None:
    assert MACHINE_PATH.search(f'open("/{name}")')
    assert not MACHINE_PATH.search(f"packages/{name} or https://example.org/{name}")


def test_no_module_is_a_room_without_a_name() -> None:
    nameless = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert [path for path in source_files() if path.name in nameless] == []


def test_nothing_unpickles() -> None:
    found = {str(path): lines for path in source_files() if (lines := unsafe_loads(path.read_text(encoding="utf-8")))}
    assert found == {}


def test_an_unpickling_would_be_found() -> None:
    assert unsafe_loads("torch.load(p)\npickle.load(f)\ntorch.load(p, weights_only=False)") == [1, 2, 3]
    assert unsafe_loads("torch.load(p, weights_only=True)\njson.load(f)\nsafetensors.torch.load(b)") == []


def test_one_version_everywhere() -> None:
    versions = {name: importlib.import_module(name).__version__ for name in PACKAGES}
    assert len(set(versions.values())) == 1, versions
    for name, version in versions.items():
        assert importlib.metadata.version(name.replace("_", "-")) == version


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_there(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        module.nothing_of_this_name  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_carries_its_papers(package: str) -> None:
    folder = PACKAGES[package].parents[1]
    assert (PACKAGES[package] / "py.typed").is_file()
    assert (folder / "README.md").is_file()
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_uv_is_held_to_the_tested_torch() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert set(settings["tool"]["uv"]["constraint-dependencies"]) <= set(constraints)


def test_no_pyav_that_reads_other_colours_is_accepted() -> None:
    """Before 17, PyAV reads BT.709 by BT.601's matrix: orange of 224 48 16 comes back as 208 29 17."""
    bounds = [
        requirement
        for folder in ROOT.glob("packages/*/pyproject.toml")
        for requirement in tomllib.loads(folder.read_text(encoding="utf-8"))["project"]["dependencies"]
        if re.match(r"av\b", requirement)
    ]
    assert bounds and all(Version("16.99") not in Requirement(bound).specifier for bound in bounds)
    assert all(Version("17.0.0") in Requirement(bound).specifier for bound in bounds)
