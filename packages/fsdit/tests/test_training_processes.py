"""Trainings that are killed and go on, and trainings of several processes.

Run as a script, this file is one of their processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fsae.data.config import ClipsConfig
from fsae.training.checkpointing import checkpoints, load_tensors
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsdit.training import run as training
from fsdit.training.config import TransformerConfig
from fsdit.training.run import train_transformer
from fsdit.training.task import FlowMatchingTask

STEPS, KILLED_AT = 5, 3


def configuration(films: Path, parts: Path, cache: Path | None, loop: LoopConfig, **changes: Any) -> TransformerConfig:
    """From a cache, or of single frames from files, which are other ones in each epoch."""
    source: dict[str, Any] = {"data": str(films / "clips.jsonl"), "encoders": str(parts / "encoders")}
    if cache is not None:
        source = {"cache": [str(cache)]}
    return TransformerConfig(
        autoencoder=str(parts / "autoencoder"),
        model=str(parts / "transformer"),
        clips=ClipsConfig(1 if cache is None else 5, 64, 64),
        validation_steps=2,
        validation_samples=2,
        loop=loop,
        **source,
        **changes,
    )


def long_run(films: Path, parts: Path, output: Path, cache: Path | None) -> TransformerConfig:
    loop = LoopConfig(
        output_dir=str(output),
        max_steps=STEPS,
        batch_size=2,
        gradient_accumulation_steps=2,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        ema_decay=0.9,
        save_every=2,
        validate_every=2,
        num_workers=1,
        tensorboard=False,
    )
    return configuration(films, parts, cache, loop)


def everything(folder: Path) -> dict[str, Tensor]:
    newest = checkpoints(folder)[-1]
    assert newest.name.endswith(f"{STEPS}")
    files = sorted(newest.glob("*.safetensors"))
    assert [file.name.partition("-")[0] for file in files] == [
        "ema.safetensors",
        "optimizer.safetensors",
        "random",
        "transformer.safetensors",
    ]
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_tensors(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["files", "cache"])
def test_a_killed_run_ends_as_an_uninterrupted_one(
    films: Path, parts: Path, cache: Path, tmp_path: Path, source: str
) -> None:
    def in_a_process(what: str, output: Path) -> int:
        arguments = [films, parts, output, *([cache] if source == "cache" else [])]
        return subprocess.run([sys.executable, __file__, what, *arguments], capture_output=True).returncode

    assert in_a_process("killed", tmp_path / "killed") == -signal.SIGKILL
    assert [folder.name for folder in checkpoints(tmp_path / "killed")] == ["checkpoint-00000002"]
    chosen = cache if source == "cache" else None
    shown = tmp_path / "killed" / "samples" / "step-00000002" / ("00.mp4" if chosen else "00.png")
    before = shown.read_bytes()
    assert in_a_process("whole", tmp_path / "killed") == 0
    assert shown.read_bytes() == before
    assert in_a_process("whole", tmp_path / "whole") == 0
    found, expected = everything(tmp_path / "killed"), everything(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    moved = load_file(tmp_path / "whole" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert moved["head.head.weight"].abs().sum() > 0


def killed(films: Path, parts: Path, output: Path, cache: Path | None) -> None:
    calls = 0
    loss = FlowMatchingTask.loss

    def deadly(self: FlowMatchingTask, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls > 2 * KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(self, batch, generator)

    FlowMatchingTask.loss = deadly  # type: ignore[method-assign]
    train_transformer(long_run(films, parts, output, cache))


class OwnNoise(FlowMatchingTask):
    """Noise that follows from the sample, so that it does not matter which process sees it."""

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        draws = [torch.Generator().manual_seed(int(1e4 * latents.abs().sum())) for latents in batch["latents"]]
        noise = torch.stack([torch.randn(batch["latents"].shape[1:], generator=draw) for draw in draws])
        sigma = torch.cat([self.config.flow.sample(1, draw) for draw in draws])
        return self.velocity_loss(self.prepare(batch, generator), noise, sigma)


def three_steps(films: Path, parts: Path, output: Path, cache: Path, sharding: Any) -> None:
    """Of four samples each, by two processes, or under ddp by this one."""
    loop = LoopConfig(
        output_dir=str(output),
        max_steps=3,
        batch_size=4 if sharding == "ddp" else 2,
        # With a large eps an update follows its gradient; with a small one, the sign of a rounding error.
        optimizer=OptimizerConfig(learning_rate=0.02, weight_decay=0.1, eps=0.01),
        schedule=ScheduleConfig("constant"),
        ema_decay=0.9,
        sharding=sharding,
        validate_every=3,
        tensorboard=False,
    )
    config = configuration(films, parts, cache, loop, gradient_checkpointing=True)
    training.FlowMatchingTask = OwnNoise  # type: ignore[misc]
    train_transformer(config)


@pytest.mark.slow
def test_two_processes_with_half_the_weights_each_equal_one(
    films: Path, parts: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "FlowMatchingTask", FlowMatchingTask)  # to be put back after three_steps
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*launcher, "fsdp2", films, parts, tmp_path / "two", cache], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    three_steps(films, parts, tmp_path / "one", cache, "ddp")
    one, two = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors") for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for shown in ("00.mp4", "01.mp4", "captions.json"):
        assert (tmp_path / "two" / "samples" / "step-00000003" / shown).is_file()
    pictures = [
        np.asarray(Image.open(tmp_path / name / "validation" / "00000003-samples.png"), int) for name in ("one", "two")
    ]
    assert abs(pictures[0] - pictures[1]).max() <= 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    films_, parts_, output_, *cache_ = map(Path, sys.argv[2:])
    if sys.argv[1] == "killed":
        killed(films_, parts_, output_, cache_[0] if cache_ else None)
    elif sys.argv[1] == "whole":
        train_transformer(long_run(films_, parts_, output_, cache_[0] if cache_ else None))
    else:
        three_steps(films_, parts_, output_, cache_[0], sys.argv[1])
