"""Two processes that share one copy of the model (FSDP2, ZeRO-3) train what one with twice the batch trains.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import softplus

from fsae.errors import UserError
from fsae.model import FSAE
from fsae.stages.config import AutoencoderConfig
from fsae.stages.task import AutoencoderTask
from fsae.storage.files import read_json
from fsae.storage.pieces import whole_tensors
from fsae.training.checkpointing import checkpoints
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.engines import fsdp2 as sharding
from fsae.training.engines.replicated import Replicated
from fsae.training.loop import Task, TrainingResult, train


class Points(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(5, generator=torch.Generator().manual_seed(index))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    """Odd widths, which do not divide by two; a frozen parameter; a buffer that no file holds."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(5, 7)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(7, 5)
        self.scale = nn.Parameter(torch.tensor([2.0]), requires_grad=False)
        self.register_buffer("offset", torch.tensor([0.5]), persistent=False)

    def features(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.out(self.features(x)) + self.offset


class Adversarial(Task):
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net, self.critic = Net(), nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
        self.modules, self.opponents = {"net": self.net}, {"critic": self.critic}
        self.validated: list[float] = []

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        fake = self.net(batch)
        small = self.net.features(batch).square().mean()  # a method that is not the module's forward
        loss = (fake - batch).square().mean() + softplus(-self.critic(fake)).mean() + 0.01 * small
        return {"loss": loss, "keep_fake": fake}

    def opponent_loss(
        self, batch: Any, outputs: Mapping[str, Tensor], generator: torch.Generator, step: int
    ) -> dict[str, Tensor]:
        return {"loss": softplus(-self.critic(batch)).mean() + softplus(self.critic(outputs["keep_fake"])).mean()}

    def validate(self, step: int) -> dict[str, Tensor]:
        self.validated.append(self.net(torch.linspace(-1, 1, 10).view(2, 5)).sum().item())
        return {}


# Bytes for which the clips below are cut.
IN_PARTS = 20_000_000


class Clips(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"video": torch.rand(3, 5, 64, 128, generator=generator) * 2 - 1}


def tiny_fsae() -> FSAE:
    torch.manual_seed(0)
    return FSAE.from_preset("tiny").to(memory_format=torch.channels_last_3d)


def config(folder: Path, batch_size: int, steps: int, **changes: Any) -> LoopConfig:
    return LoopConfig(
        str(folder),
        max_steps=steps,
        batch_size=batch_size,
        # With a large eps an update follows its gradient; with a small one, the sign of a rounding error.
        optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=0.1, eps=0.01),
        schedule=ScheduleConfig("constant"),
        ema_decay=0.9,
        tensorboard=False,
        **changes,
    )


def adversarial(folder: Path, batch_size: int, steps: int, **changes: Any) -> tuple[Adversarial, TrainingResult]:
    task = Adversarial()
    changes = {"gradient_accumulation_steps": 2, "validate_every": 2, "max_grad_norm": 0.5} | changes
    return task, train(task, Points(), config(folder, batch_size, steps, **changes))


def autoencoder(settings: LoopConfig, **changes: Any) -> None:
    train(AutoencoderTask(AutoencoderConfig("none", settings, **changes), tiny_fsae()), Clips(), settings)


def process(folder: Path, kind: Any) -> None:
    """What each of the two processes does."""
    adversarial(folder / "net", 2, 3, sharding=kind)
    task, result = adversarial(folder / "net", 2, 6, sharding=kind)
    parameters = dict(task.net.named_parameters())
    exported = result.export("net")
    facts = {
        "split": all(isinstance(p, DTensor) if kind == "fsdp2" else p.numel() == 0 for p in parameters.values()),
        "part": held(parameters["into.weight"]),
        "validated": task.validated,
        "exported": [p.detach().flatten().tolist() for p in exported.parameters()],
        "training": task.net.training,
        "output": exported(torch.ones(1, 5)).tolist(),
    }
    (folder / f"facts-{result.is_main_process}.json").write_text(json.dumps(facts))
    adversarial(folder / "net", 2, 8)  # the same run goes on with the whole model in each process
    autoencoder(config(folder / "fsae", 1, 3, sharding=kind))
    # In tiles, and the encoder in chunks, which are computed anew in the backward pass.
    autoencoder(config(folder / "parts", 1, 3, sharding=kind), gradient_checkpointing=True, memory=IN_PARTS)


def held(parameter: Any) -> int:
    """How many numbers of it are in this process."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter.ds_tensor).numel()


def assert_equal_checkpoints(one: Path, two: Path) -> None:
    files = [path.stem for path in checkpoints(one)[-1].glob("*.safetensors") if not path.name.startswith("random")]
    assert len(files) >= 3
    for name in files:
        expected, found = (dict(whole_tensors(checkpoints(folder)[-1], name)) for folder in (one, two))
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "parts"), [("fsdp2", (20, 15)), ("zero3", (18, 18))])  # of 7 rows of 5
def test_two_processes_with_half_a_model_each_equal_one(tmp_path: Path, kind: str, parts: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*launcher, str(tmp_path / "two"), kind], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    task, _ = adversarial(tmp_path / "one", 4, 8)
    assert_equal_checkpoints(tmp_path / "one", tmp_path / "two" / "net")  # 3 and 3 steps split, 2 steps whole
    autoencoder(config(tmp_path / "fsae", 2, 3))
    assert_equal_checkpoints(tmp_path / "fsae", tmp_path / "two" / "fsae")
    assert_equal_checkpoints(tmp_path / "fsae", tmp_path / "two" / "parts")

    _, at_six = adversarial(tmp_path / "six", 4, 6)
    average = [p.detach().flatten() for p in at_six.export("net").parameters()]
    for main in (True, False):
        facts = json.loads((tmp_path / "two" / f"facts-{main}.json").read_text())
        assert facts["split"] and facts["training"]
        assert facts["part"] == parts[0 if main else 1]
        assert facts["validated"] == pytest.approx(task.validated[1:3], abs=1e-4)  # the process resumed at step 3
        for found, expected in zip(facts["exported"], average, strict=True):
            torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-5)
        output = at_six.modules["net"](torch.ones(1, 5))
        torch.testing.assert_close(torch.tensor(facts["output"]), output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_one_process_has_nothing_to_split(tmp_path: Path, kind: str) -> None:
    task, result = adversarial(tmp_path / "a", 2, 3, sharding=kind)
    other, _ = adversarial(tmp_path / "b", 2, 3)
    assert isinstance(result.engine, Replicated) and not result.engine.sharded
    assert all(torch.equal(p, q) for p, q in zip(task.net.parameters(), other.net.parameters(), strict=True))
    # Where the weights lie is no setting that decides them.
    assert read_json(checkpoints(tmp_path / "a")[-1] / "state.json")["settings"]["loop"].get("sharding") is None


def test_blocks_are_what_a_model_names_or_its_lists_hold() -> None:
    kinds = {type(block).__name__ for block in sharding.blocks(tiny_fsae())}
    assert kinds == {"ResBlock", "EViTBlock"}
    assert len(list(sharding.blocks(nn.ModuleDict({"net": Net()})))) == 3
    assert not list(sharding.blocks(nn.Sequential(nn.Linear(2, 2))))


def test_a_template_takes_no_memory_and_becomes_the_module() -> None:
    net = Net()
    copy = sharding.template(net)
    assert all(p.is_meta for p in copy.parameters())
    copy.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(copy(torch.ones(2, 5)), net(torch.ones(2, 5)))
    assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in net.parameters()]


@pytest.mark.parametrize(
    "changes",
    [{"sharding": "zero"}, *({"sharding": kind, "mixed_precision": "fp16"} for kind in ("fsdp2", "zero3"))],
    ids=str,
)
def test_what_cannot_be_sharded_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"sharding|mixed_precision is 'fp16'; it must be no or bf16"):
        config(tmp_path, 1, 1, **changes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    process(Path(sys.argv[1]), sys.argv[2])
    torch.distributed.destroy_process_group()
