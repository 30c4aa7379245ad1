"""Two processes train what one does with twice the batch, also when they are interrupted in between.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsae.storage.files import read_json
from fsae.training.checkpointing import checkpoints, load_tensors
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import Task, train


class Points(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


class Reconstruct(Task):
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.modules = {"net": self.net}

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": (self.net(batch) - batch).square().mean()}

    def validate(self, step: int) -> dict[str, Tensor]:
        return {"weight": self.net[0].weight.sum()}


def run(folder: Path, batch_size: int, steps: int) -> None:
    settings = LoopConfig(
        str(folder),
        max_steps=steps,
        batch_size=batch_size,
        gradient_accumulation_steps=2,
        optimizer=OptimizerConfig(learning_rate=0.01),
        schedule=ScheduleConfig("constant"),
        validate_every=2,
        log_every=1,
        tensorboard=False,
    )
    train(Reconstruct(), Points(), settings)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    for steps in ("3", "6"):
        done = subprocess.run([*launcher, str(tmp_path / "two"), steps], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    run(tmp_path / "one", 4, 6)
    one, two = (checkpoints(tmp_path / name)[-1] for name in ("one", "two"))
    assert read_json(two / "state.json")["settings"]["processes"] == 2
    assert (two / "random-00001.safetensors").is_file() and not (one / "random-00001.safetensors").is_file()
    for name in ("net", "ema"):
        expected, found = load_tensors(one / f"{name}.safetensors"), load_tensors(two / f"{name}.safetensors")
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    run(Path(sys.argv[1]), 2, int(sys.argv[2]))
    torch.distributed.destroy_process_group()
