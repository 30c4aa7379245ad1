"""Layer Memory's Triton kernels: their cases in a process that interprets them, and how a model chooses them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fsae.errors import UserError
from fsdit import FSDiT


def test_interpreted_they_equal_the_plain_form() -> None:
    cases = Path(__file__).with_name("kernel_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", str(cases)]
    run = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert "24 passed" in run.stdout


def test_unknown_kernel() -> None:
    model = FSDiT.from_preset("nano", num_layers=2)
    with pytest.raises(UserError, match="auto, plain, fused"):
        model.set_memory_kernel("cuda")


def test_without_a_gpu_the_fused_kernel_is_refused() -> None:
    model = FSDiT.from_preset("nano", num_layers=2, latent_channels=4).eval()
    inputs = torch.zeros(1, 12, 1, 2, 2), torch.zeros(1), torch.zeros(1, 3, 128), torch.zeros(1, 17, 128)
    model.set_memory_kernel("fused")
    for training in (False, True):
        with torch.set_grad_enabled(training), pytest.raises(UserError, match="needs a GPU"):
            model(*inputs)
    model.set_memory_kernel("auto")
    with torch.no_grad():
        model(*inputs)
