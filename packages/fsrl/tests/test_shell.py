"""The package's shell: it imports and declares its version."""

from __future__ import annotations

import importlib.metadata

import fsrl


def test_it_imports_and_declares_its_version() -> None:
    assert fsrl.__version__ == importlib.metadata.version("fsrl")
