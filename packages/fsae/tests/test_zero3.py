"""DeepSpeed's ZeRO-3 under the loop: memory, resuming, what a network may do, and what is refused.

That two processes train what one does is in test_sharding.py. Run as a script, this file is one of two processes.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsae.errors import CheckpointError, UserError
from fsae.storage.checkpoint import save_state
from fsae.storage.files import read_json
from fsae.storage.pieces import stored_tensors, whole_tensors
from fsae.training.checkpointing import checkpoints
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.engines import zero3
from fsae.training.engines.protocol import ModuleSet
from fsae.training.loop import Task, TrainingResult, train


class Points(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(9, generator=torch.Generator().manual_seed(index))


class Net(nn.Module):
    """A branch that only every other step uses, and a scale that only validation reads, past any forward."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.branch, self.out = nn.Linear(9, 120), nn.Linear(120, 120), nn.Linear(120, 9)
        self.scale = nn.Parameter(torch.full((7, 3), 2.0), requires_grad=False)

    def forward(self, x: Tensor, branched: bool) -> Tensor:
        x = torch.tanh(self.into(x))
        return self.out(x + self.branch(x) if branched else x)


class Branching(Task):
    """Args: unused: what a step without the branch adds to the loss, 0 times the branch's weights or nothing."""

    def __init__(self, unused: bool = True) -> None:
        torch.manual_seed(0)
        self.net, self.unused = Net(), unused
        self.modules = {"net": self.net}
        self.dtypes: set[str] = set()
        self.validated: list[float] = []

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        branched = self.step % 2 == 0
        output = self.net(batch, branched)
        self.dtypes.add(str(output.dtype))
        loss = (output.float() - batch).square().mean()
        if not branched and not self.unused:
            loss = loss + 0.0 * sum(p.sum() for p in self.net.branch.parameters())
        return {"loss": loss}

    def validate(self, step: int) -> dict[str, Tensor]:
        self.validated.append((self.net(torch.ones(2, 9), True).sum() * self.net.scale.mean()).item())
        return {}


def run(folder: Path, batch_size: int = 2, task: Branching | None = None, **changes: Any) -> TrainingResult:
    settings = LoopConfig(
        str(folder),
        max_steps=6,
        batch_size=batch_size,
        gradient_accumulation_steps=2,
        optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=0.1, eps=0.01),
        schedule=ScheduleConfig("constant"),
        ema_decay=0.9,
        validate_every=2,
        tensorboard=False,
    )
    return train(task or Branching(), Points(), replace(settings, **changes))


def held(result: TrainingResult) -> dict[str, int]:
    """Bytes of the weights, the moments and the average in this process."""
    weights = 0
    for parameter in result.modules["net"].parameters():
        part = getattr(parameter, "ds_tensor", None)
        weights += parameter.untyped_storage().nbytes() + (0 if part is None else part.numel() * part.element_size())
    moments = [t for state in result.engine.optimizer.state.values() for t in state.values()]
    assert result.average is not None
    sizes = {"moments": moments, "average": result.average.shadow.values()}
    return {"weights": weights} | {name: sum(t.numel() * t.element_size() for t in ts) for name, ts in sizes.items()}


def process(folder: Path) -> None:
    """What each of the two processes does."""
    facts: dict[str, Any] = {}
    for kind in ("ddp", "zero3"):
        task = Branching(unused=kind == "zero3")
        facts[kind] = held(run(folder / kind, task=task, sharding=kind))
        facts[kind]["validated"] = task.validated
    for steps in (2, 4, 6):
        result = run(folder / "resumed", sharding="zero3", max_steps=steps)
    moments = stored_tensors(checkpoints(folder / "resumed")[-1], "optimizer")
    other = checkpoints(folder / "ddp")[-1]
    save_state({"steps": torch.tensor(5.0)}, other / f"steps-{result.is_main_process}.safetensors")
    steps = stored_tensors(other, f"steps-{result.is_main_process}")["steps"]
    facts["refused"] = []
    for name in ("step/net.into.weight", "step/net.in.weight"):
        try:
            result.engine.load_moments(moments | {name: steps})
        except CheckpointError as error:
            facts["refused"].append(str(error))
    for steps, kind in ((1, "ddp"), (3, "zero3"), (4, "fsdp2"), (5, "zero3"), (6, "ddp")):
        run(folder / "mixed", task=Branching(unused=kind == "zero3"), sharding=kind, max_steps=steps)
    for kind in ("ddp", "zero3"):
        task = Branching(unused=kind == "zero3")
        run(folder / f"bf16-{kind}", task=task, sharding=kind, mixed_precision="bf16")
        facts[f"bf16-{kind}"] = sorted(task.dtypes)
    (folder / f"facts-{result.is_main_process}.json").write_text(json.dumps(facts))


def assert_close(one: Path, two: Path, tolerance: float) -> None:
    for name in ("net", "ema", "optimizer"):
        expected, found = (dict(whole_tensors(checkpoints(folder)[-1], name)) for folder in (one, two))
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            close = {"rtol": tolerance, "atol": tolerance}
            torch.testing.assert_close(found[key], tensor, **close, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*launcher, str(tmp_path)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]

    # Without a gradient a parameter is updated as with a gradient of zero, not with an earlier step's.
    task = Branching(unused=False)
    run(tmp_path / "one", 4, task)
    assert_close(tmp_path / "one", tmp_path / "zero3", 1e-5)
    assert_close(tmp_path / "zero3", tmp_path / "resumed", 0.0)
    assert_close(tmp_path / "one", tmp_path / "mixed", 1e-5)

    for main in (True, False):
        facts = read_json(tmp_path / f"facts-{main}.json")
        assert facts["zero3"]["validated"] == pytest.approx(task.validated, rel=1e-4)
        for what in ("weights", "moments", "average"):
            assert 0.5 <= facts["zero3"][what] / facts["ddp"][what] < 0.51
        uneven, unknown = facts["refused"]
        assert "sharding zero3 cannot go on with" in uneven and "names net.in.weight" in unknown

        # Under autocast the network computes in bf16, alike under both shardings; the weights stay fp32.
        assert facts["bf16-ddp"] == facts["bf16-zero3"] == ["torch.bfloat16"]
    assert_close(tmp_path / "bf16-ddp", tmp_path / "bf16-zero3", 1e-4)
    weights = dict(whole_tensors(checkpoints(tmp_path / "bf16-zero3")[-1], "net"))
    assert {t.dtype for t in weights.values()} == {torch.float32}


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"DeepSpeed is not installed; pip install 'fsae\[deepspeed\]', or set shard"):
        zero3.Zero3(None, ModuleSet({}, lambda optimizer: [], OptimizerConfig()), LoopConfig("run"))  # type: ignore[arg-type]


if __name__ == "__main__":
    torch.set_num_threads(1)
    process(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
