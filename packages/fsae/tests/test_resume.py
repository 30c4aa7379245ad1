"""A run that is killed and resumed gives, bit for bit, what an uninterrupted one gives.

Run as a script, this file is the run to be killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fsae.errors import UserError
from fsae.model import FSAE
from fsae.stages.config import AutoencoderConfig
from fsae.stages.task import AutoencoderTask
from fsae.storage.files import read_json
from fsae.training import checkpointing
from fsae.training.checkpointing import checkpoints, load_tensors
from fsae.training.config import LoopConfig, OptimizerConfig
from fsae.training.loop import train

STEPS, KILLED_AT = 6, 5


class Noise(torch.utils.data.Dataset[dict[str, Any]]):
    """Clips that follow from index and epoch."""

    def __len__(self) -> int:
        return 5

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(100 * epoch + index)
        return {"video": torch.rand(3, 1, 64, 64, generator=generator) * 2 - 1}


class Restless(AutoencoderTask):
    """Draws on every random state there is, and can kill its own process."""

    def __init__(self, model: FSAE, kill_at: int | None) -> None:
        super().__init__(AutoencoderConfig("none", LoopConfig("none")), model)
        self.kill_at = kill_at

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        video = batch["video"]
        jitter = torch.rand(()).item() + np.random.rand() + np.random.randn() + random.gauss(0, 1)
        shifted = video + 0.1 * jitter + 0.1 * torch.randn(video.shape, generator=generator)
        terms = super().loss({"video": shifted}, generator)
        if self.kill_at is not None:
            self.kill_at -= 1
            if self.kill_at < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return terms


def tiny_fsae() -> FSAE:
    torch.manual_seed(0)
    return FSAE.from_preset("tiny", noise=0.05).to(memory_format=torch.channels_last_3d)


def run(folder: Path, kill_at: int | None = None) -> None:
    torch.set_num_threads(1)
    settings = LoopConfig(
        str(folder),
        max_steps=STEPS,
        batch_size=1,
        gradient_accumulation_steps=2,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        ema_decay=0.9,
        save_every=2,
        num_workers=1,
        tensorboard=False,
    )
    train(Restless(tiny_fsae(), kill_at), Noise(), settings)


def kill_while_publishing(temporary: Path, final: Path, keep: int) -> None:
    if checkpointing.checkpoint_step(final) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    publish(temporary, final, keep)


publish = checkpointing.publish


def everything(folder: Path) -> dict[str, Tensor]:
    newest = checkpoints(folder)[-1]
    assert read_json(newest / "state.json")["step"] == STEPS
    files = sorted(newest.glob("*.safetensors"))
    assert len(files) == 4  # weights, average, optimiser, random state
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_tensors(file).items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder)
    return everything(folder)


def killed(folder: Path, when: str) -> Path:
    command = [sys.executable, __file__, str(folder), when]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert child.returncode == -signal.SIGKILL, child.stderr
    return folder


@pytest.mark.slow
def test_killed_in_a_step(tmp_path: Path, uninterrupted: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = killed(tmp_path / "killed", "in a step")
    assert [checkpointing.checkpoint_step(c) for c in checkpoints(folder)] == [2, 4]
    control = shutil.copytree(folder, tmp_path / "control")
    run(folder)
    assert not differences(everything(folder), uninterrupted)

    # The control resumes with another random state, which the comparison must notice.
    monkeypatch.setattr(checkpointing, "load_random_state", lambda folder, rank: None)
    run(control)
    names = differences(everything(control), uninterrupted)
    assert {"autoencoder.safetensors", "ema.safetensors", "optimizer.safetensors"} <= {n.split("/")[0] for n in names}


@pytest.mark.slow
def test_killed_in_a_checkpoint(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    folder = killed(tmp_path, "in a checkpoint")
    assert {path.name for path in folder.iterdir()} == {"checkpoint-00000002", ".checkpoint-00000004.partial"}
    run(folder)
    assert not differences(everything(folder), uninterrupted)
    assert not list(folder.glob(".*"))


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name, tensor in a.items() if not torch.equal(tensor, b[name])]


if __name__ == "__main__":
    if sys.argv[2] == "in a checkpoint":
        checkpointing.publish = kill_while_publishing
    run(Path(sys.argv[1]), kill_at=2 * KILLED_AT if sys.argv[2] == "in a step" else None)


def test_a_run_of_before_an_option_existed_goes_on_without_it_and_not_with_it(tmp_path: Path) -> None:
    """Its checkpoint does not name the options of the model that were added since."""

    def steps(count: int, **options: Any) -> None:
        model = FSAE.from_preset("tiny", injection_sampling=False, **options)
        loop = LoopConfig(str(tmp_path), max_steps=count, tensorboard=False, save_every=1)
        train(AutoencoderTask(AutoencoderConfig("none", loop), model), Noise(), loop)

    steps(1, shortcut="dc-ae")
    state = checkpoints(tmp_path)[-1] / "state.json"
    values = read_json(state)
    for name in ("injection_sampling", "shortcut"):
        del values["settings"]["task"]["model"][name]
    state.write_text(json.dumps(values))
    with pytest.raises(UserError, match="task.model.shortcut was dc-ae, is now even"):
        steps(2, shortcut="even")
    steps(2, shortcut="dc-ae")
    assert checkpoints(tmp_path)[-1].name.endswith("2")
