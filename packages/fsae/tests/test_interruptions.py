"""Runs of 50 steps that are killed, or whose disk is full, and go on as if nothing had been.

The run draws on every random state there is, trains against an opponent, and its dataset brings an order of its
own. As a script, this file is the run to be interrupted, in one process or in each of several.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fsae.data.order import Cut, derived_generator
from fsae.errors import UserError
from fsae.storage.files import read_json
from fsae.training.checkpointing import checkpoint_step, checkpoints, load_tensors
from fsae.training.config import LoopConfig, OptimizerConfig
from fsae.training.loop import Task, train

STEPS, KILLED_AT, SAVE_EVERY = 50, 30, 8


class Pictures(torch.utils.data.Dataset[Tensor]):
    """Pictures of two shapes; one micro-batch has one shape, and not always as many pictures."""

    def __len__(self) -> int:
        return 20

    def sample(self, index: int, epoch: int, width: int) -> Tensor:
        return torch.randn(3, 6, width, generator=derived_generator(index, epoch))

    def order(self, cut: Cut) -> Order:
        return Order(len(self), cut)


class Order:
    def __init__(self, length: int, cut: Cut) -> None:
        self.length, self.cut = length, cut

    def position(self, step: int) -> tuple[int, int]:
        return step // 10, step % 10

    def micro_batch(self, step: int, micro: int) -> list[tuple[int, int, int]]:
        draw = np.random.default_rng((self.cut.seed, step, micro, self.cut.rank))
        width, count = (6, 10)[draw.integers(2)], draw.integers(1, self.cut.batch + 1)
        return [(int(draw.integers(self.length)), step // 10, width) for _ in range(count)]


class Restless(Task):
    """Draws on every random state, and does ``interrupt`` in a micro-batch of step ``KILLED_AT``."""

    def __init__(self, interrupt: Any = None) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Dropout(0.1), nn.Conv2d(8, 3, 1))
        self.critic = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 1, 1))
        self.modules, self.opponents = {"net": self.net}, {"critic": self.critic}
        self.opponent_optimizer = OptimizerConfig(learning_rate=1e-2, betas=(0.0, 0.99))
        self.interrupt = interrupt

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        jitter = torch.rand(()).item() + np.random.rand() + np.random.randn() + random.gauss(0, 1)
        fake = self.net(batch + 0.1 * jitter + 0.1 * torch.randn(batch.shape, generator=generator))
        return {"loss": (fake - batch).abs().mean() + 0.1 * softplus(-self.critic(fake)).mean(), "keep_fake": fake}

    def opponent_loss(
        self, batch: Any, outputs: Mapping[str, Tensor], generator: torch.Generator, step: int
    ) -> dict[str, Tensor]:
        real, fake = (x + 0.1 * torch.randn(x.shape, generator=generator) for x in (batch, outputs["keep_fake"]))
        loss = softplus(-self.critic(real)).mean() + softplus(self.critic(fake)).mean()
        if step % 4 == 0:
            real.requires_grad_()
            (gradient,) = torch.autograd.grad(self.critic(real).sum(), real, create_graph=True)
            loss = loss + gradient.square().mean()
        if step == KILLED_AT and self.interrupt is not None:
            self.interrupt()
        return {"loss": loss}


def run(folder: Path, interrupt: Any = None, task: Task | None = None, validate_every: int = 0) -> None:
    torch.set_num_threads(1)
    settings = LoopConfig(
        str(folder),
        max_steps=STEPS,
        batch_size=3,
        gradient_accumulation_steps=2,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        ema_decay=0.9,
        save_every=SAVE_EVERY,
        num_workers=1,
        validate_every=validate_every,
        tensorboard=False,
    )
    train(task or Restless(interrupt), Pictures(), settings)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def limit_files(size: int = 4096) -> None:
    """From now on no file can grow beyond 4 KiB: room for the weights, not for the moments of the optimiser."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def restored_limit() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def everything(folder: Path, processes: int) -> dict[str, Tensor]:
    newest = checkpoints(folder)[-1]
    assert read_json(newest / "state.json")["step"] == STEPS
    files = sorted(newest.glob("*.safetensors"))
    assert len(files) == 5 + processes  # two networks, the average, two optimisers, random states
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_tensors(file).items()}


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name.split("/")[0] for name, tensor in a.items() if not torch.equal(tensor, b[name])}


def steps(folder: Path) -> list[int]:
    return [checkpoint_step(c) for c in checkpoints(folder)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder)
    return everything(folder, processes=1)


@pytest.mark.slow
def test_killed_at_30_of_50_steps(
    tmp_path: Path, uninterrupted: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "killed"
    child = subprocess.run([sys.executable, __file__, str(folder), "kill"], capture_output=True, text=True, timeout=300)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert steps(folder) == [16, 24]
    run(folder)
    assert not differences(everything(folder, processes=1), uninterrupted)

    # The control goes on without the opponents' moments, which the comparison must notice.
    with pytest.raises(InterruptedError):
        run(tmp_path / "control", interrupt=_stop)
    monkeypatch.setattr("fsae.training.loop.Replicated.load_moments", lambda self, moments: None)
    run(tmp_path / "control")
    assert {"net", "critic", "ema"} <= {
        name.removesuffix(".safetensors") for name in differences(everything(tmp_path / "control", 1), uninterrupted)
    }


def _stop() -> None:
    raise InterruptedError


def test_a_full_disk_loses_nothing(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    with restored_limit(), pytest.raises(UserError, match="checkpoint of step 32 could not be written") as caught:
        run(tmp_path, interrupt=limit_files)
    assert "File too large" in str(caught.value) and "make room and run again" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000016", "checkpoint-00000024"]
    assert load_tensors(tmp_path / "checkpoint-00000024" / "optimizer.safetensors")
    run(tmp_path)
    assert not differences(everything(tmp_path, processes=1), uninterrupted)


def test_a_picture_that_finds_no_room_does_not_end_the_run(
    tmp_path: Path, uninterrupted: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    class Showing(Restless):
        def validate(self, step: int) -> dict[str, Tensor]:
            return {"noise": torch.rand(3, 128, 128)}

    with restored_limit():
        limit_files(2**15)
        run(tmp_path, task=Showing(), validate_every=25)
    assert not differences(everything(tmp_path, processes=1), uninterrupted)
    assert "logs could not be written" in capsys.readouterr().err
    assert not list((tmp_path / "validation").iterdir())


def test_an_error_ends_the_process_although_it_keeps_hold_of_the_loader(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, __file__, str(tmp_path), "error"], capture_output=True, timeout=120)
    assert child.returncode == 1 and b"InterruptedError" in child.stderr


def launch(folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    return subprocess.run([*launcher, str(folder), what], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_killed_at_30_of_50_steps(tmp_path: Path) -> None:
    assert launch(tmp_path / "killed", "kill").returncode != 0
    assert steps(tmp_path / "killed") == [16, 24]
    done = launch(tmp_path / "killed", "go on, and another from the start")
    assert done.returncode == 0, done.stderr[-3000:]
    two = everything(tmp_path / "killed", processes=2)
    assert not differences(two, everything(tmp_path / "killed" / "another", processes=2))


@pytest.mark.slow
def test_a_full_disk_ends_two_processes_together(tmp_path: Path) -> None:
    done = launch(tmp_path, "full disk")
    assert done.returncode != 0
    assert done.stderr.count("step 32 could not be written") == 2
    assert "File too large" in done.stderr and "another process failed" in done.stderr
    assert steps(tmp_path) == [16, 24] and not list(tmp_path.glob(".*"))


def main(folder: Path, what: str) -> None:
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    first = int(os.environ.get("RANK", "0")) == 0
    if what == "kill":
        run(folder, interrupt=kill if last else None)
    elif what == "error":
        run(folder, interrupt=_stop)
    elif what == "full disk":
        try:
            run(folder, interrupt=limit_files if first else None)
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
    else:
        run(folder)
        run(folder / "another")
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
