"""Gradients in bfloat16 on a CPU are those of fp32, whatever the processor."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import torch
import torch.nn.functional as F
from fsae.devices import avoid_faulty_kernels

avoid_faulty_kernels()
torch.manual_seed(0)
sizes = (1, 32, 7, 96, 64, 3), (1, 128, 1, 32, 32, 1), (2, 64, 5, 2, 1, 3)
for batch, channels, frames, height, width, taps in sizes:
    x = torch.randn(batch, channels, frames, height, width)
    kernel = torch.randn(channels, channels, taps, taps, taps) / 9
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        given, weight = (t.to(dtype, memory_format=torch.channels_last_3d).requires_grad_() for t in (x, kernel))
        F.conv3d(given, weight, padding=(0, taps // 2, taps // 2)).float().square().mean().backward()
        gradients.append(weight.grad.float())
    if not (gradients[1] - gradients[0]).abs().max() < 0.03 * gradients[0].abs().max():
        sys.exit(f"wrong for {batch}x{channels}x{frames}x{height}x{width}")
"""


def test_kernels_that_some_processors_get_wrong_are_avoided() -> None:
    """In a process of its own, as oneDNN asks once; without the setting this crashes on a processor with AMX."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
