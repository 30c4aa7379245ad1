"""Two pairs of processes, each pair at work on one sample, train what one process does with twice the batch.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fsae.data.order import data_place
from fsae.errors import UserError
from fsae.storage.files import read_json
from fsae.training.checkpointing import checkpoints, load_tensors
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import Task, train


class Points(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


class Coordinates(Task):
    """Each process of a group takes its share of the coordinates; their mean loss is that of all coordinates."""

    def __init__(self, ranks_per_sample: int) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(1, 1)
        self.modules = {"net": self.net}
        self.ranks_per_sample = ranks_per_sample
        self.rank, self.size = 0, 1
        self.groups: list[list[int] | None] = []
        self.seen: list[Any] = []
        self.validations: list[int] = []

    def share_samples(self, group: ProcessGroup | None) -> None:
        self.groups.append(None if group is None else torch.distributed.get_process_group_ranks(group))
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        noise, dropout = torch.randn(2, generator=generator), torch.rand(2)
        self.seen.append([batch.tolist(), noise.tolist(), dropout.tolist()])
        own = batch.chunk(self.size, dim=1)[self.rank].unsqueeze(-1)
        return {"loss": (self.net(own) - own.square()).square().mean()}

    def validate(self, step: int) -> dict[str, Tensor]:
        self.validations.append(step)
        return {}


def run(folder: Path, batch_size: int, steps: int, ranks_per_sample: int) -> Coordinates:
    task = Coordinates(ranks_per_sample)
    settings = LoopConfig(
        str(folder),
        max_steps=steps,
        batch_size=batch_size,
        gradient_accumulation_steps=2,
        optimizer=OptimizerConfig(learning_rate=0.01),
        schedule=ScheduleConfig("constant"),
        validate_every=2,
        tensorboard=False,
    )
    train(task, Points(), settings)
    return task


@pytest.mark.slow
def test_two_pairs_equal_one_process(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", __file__]
    done = subprocess.run([*launcher, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = [json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in range(4)]
    for rank, fact in enumerate(facts):
        assert fact["groups"] == [[0, 1] if rank < 2 else [2, 3], None]
        assert fact["validations"] == ([4] if rank < 2 else [])  # with those that share the main process's samples
    assert facts[0]["seen"] == facts[1]["seen"] and facts[2]["seen"] == facts[3]["seen"]  # samples, noise and dropout
    for one, other in zip(facts[0]["seen"], facts[2]["seen"], strict=True):
        assert all(a != b for a, b in zip(one, other, strict=True))

    run(tmp_path / "one", 4, 5, 1)
    one, pairs = (checkpoints(tmp_path / name)[-1] for name in ("one", "pairs"))
    for name in ("net", "ema", "optimizer"):
        expected, found = load_tensors(one / f"{name}.safetensors"), load_tensors(pairs / f"{name}.safetensors")
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)
    assert read_json(pairs / "state.json")["settings"]["processes"] == 2
    assert sorted(path.name for path in pairs.glob("random-*.json")) == ["random-00000.json", "random-00001.json"]


def test_neighbours_that_share_count_as_one(tmp_path: Path) -> None:
    assert [data_place(rank, 6, 3) for rank in range(6)] == [(0, 2)] * 3 + [(1, 2)] * 3
    assert data_place(4, 6, 1) == (4, 6)
    with pytest.raises(UserError, match="4 processes cannot be divided into groups of 3 .* a multiple of 3"):
        data_place(0, 4, 3)
    with pytest.raises(UserError, match="1 process cannot be divided into groups of 2"):
        run(tmp_path, 1, 1, 2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    run(where / "pairs", 2, 3, 2)
    task = run(where / "pairs", 2, 5, 2)  # goes on from step 3
    rank = torch.distributed.get_rank()
    facts = {"groups": task.groups, "seen": task.seen, "validations": task.validations}
    (where / f"facts-{rank}.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()
