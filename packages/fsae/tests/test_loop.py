"""The training loop on a small network, against the same training written out by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from fsae.data.order import Cut, DataOrder, derived_generator
from fsae.errors import CheckpointError, UserError
from fsae.training.checkpointing import check_settings, checkpoints
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import Task, train


class Points(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.length:
            raise IndexError(index)
        return {
            "x": torch.randn(4, generator=torch.Generator().manual_seed(index)),
            "caption": f"point {index}",
        }


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


class Denoise(Task):
    """Reconstruct points from noisy ones; ``hook(step, batch)`` is called with each loss."""

    def __init__(self, noise: float = 0.1, hook: Callable[[int, Any], Any] | None = None) -> None:
        self.net = network()
        self.modules = {"net": self.net}
        self.noise = noise
        self.settings = {"noise": noise}
        self.hook = hook
        self.calls = 0

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        x = batch["x"]
        error = (self.net(x + self.noise * torch.randn(x.shape, generator=generator)) - x).square().mean()
        factor = self.hook(self.calls, batch) if self.hook else None
        self.calls += 1
        return {"loss": error if factor is None else error * factor, "error": error.detach()}


def config(folder: Path, **changes: Any) -> LoopConfig:
    base = LoopConfig(
        str(folder),
        max_steps=6,
        batch_size=3,
        optimizer=OptimizerConfig(learning_rate=0.01),
        schedule=ScheduleConfig("constant"),
        ema_decay=0.9,
        tensorboard=False,
    )
    return replace(base, **changes)


def weights(task: Denoise) -> Tensor:
    return torch.cat([p.detach().flatten() for p in task.net.parameters()])


def trained(folder: Path, noise: float = 0.1, **changes: Any) -> Tensor:
    task = Denoise(noise)
    train(task, Points(), config(folder, **changes))
    return weights(task)


def test_weights_saved_in_half_precision_are_trained_in_full(tmp_path: Path) -> None:
    """As if the rounded weights had been given in fp32."""
    rounded, half = Denoise(), Denoise()
    for module in rounded.modules.values():
        module.half().float()
    for module in half.modules.values():
        module.half()
    for task, name in ((rounded, "rounded"), (half, "half")):
        train(task, Points(), config(tmp_path / name, max_steps=3))
    assert weights(half).dtype == torch.float32
    assert torch.equal(weights(half), weights(rounded))


def test_equals_the_training_written_out_by_hand(tmp_path: Path) -> None:
    optimizer = OptimizerConfig(learning_rate=0.02, betas=(0.8, 0.9), weight_decay=0.1, eps=1e-6)
    schedule = ScheduleConfig("cosine", warmup_steps=3, min_ratio=0.1)
    settings = config(
        tmp_path,
        max_steps=8,
        gradient_accumulation_steps=2,
        optimizer=optimizer,
        schedule=schedule,
        max_grad_norm=0.5,
    )
    task = Denoise()
    result = train(task, Points(), settings)

    net, data = network(), Points()
    order = DataOrder(10, Cut(0, 3, accumulation=2))
    matrices, vectors = ([p for p in net.parameters() if (p.ndim > 1) == want] for want in (True, False))
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    average = [p.detach().double() for p in net.parameters()]
    for step in range(8):
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 3) / 5)) / 2
        for group in reference.param_groups:
            group["lr"] = 0.02 * ((step + 1) / 3 if step < 3 else cosine)
        reference.zero_grad()
        for micro in range(2):
            x = torch.stack([data[index]["x"] for index, _ in order.micro_batch(step, micro)])
            noise = torch.randn(x.shape, generator=derived_generator(0, step, micro, 0, 1))
            ((net(x + 0.1 * noise) - x).square().mean() / 2).backward()
        norm = torch.sqrt(sum((p.grad.square().sum() for p in net.parameters()), torch.zeros(())))
        for p in net.parameters():
            p.grad.mul_(min(1.0, 0.5 / (norm.item() + 1e-6)))
        reference.step()
        decay = min(0.9, (1 + step) / (10 + step))
        average = [
            decay * a + (1 - decay) * p.detach().double() for a, p in zip(average, net.parameters(), strict=True)
        ]
    torch.testing.assert_close(weights(task), torch.cat([p.detach().flatten() for p in net.parameters()]))
    exported = result.export("net")
    assert not exported.training
    torch.testing.assert_close(weights(task).double(), torch.cat([a.flatten() for a in average]), rtol=1e-5, atol=1e-6)


def test_schedules() -> None:
    cosine = ScheduleConfig("cosine", warmup_steps=10, min_ratio=0.2)
    assert [cosine.factor(s, 110) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [cosine.factor(s, 110) for s in (10, 60, 110, 200)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    constant = ScheduleConfig("constant", warmup_steps=4)
    assert [constant.factor(s, 10) for s in (0, 3, 4, 9)] == pytest.approx([0.25, 1, 1, 1])


def test_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    whole = trained(tmp_path / "a", noise=0.0, batch_size=6)
    parts = trained(tmp_path / "b", noise=0.0, batch_size=2, gradient_accumulation_steps=3)
    other = trained(tmp_path / "c", noise=0.0, batch_size=2)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert (other - whole).abs().max() > 1e-3


def test_workers_logs_and_validation_leave_the_weights_alone(tmp_path: Path) -> None:
    class Greedy(Denoise):
        def validate(self, step: int) -> dict[str, Tensor]:
            return {"random": torch.rand(3, 2, 2), "norm": torch.randn(())}

    plain = trained(tmp_path / "a")
    task = Greedy()
    busy = config(tmp_path / "b", num_workers=2, validate_every=2, log_every=1, save_every=1, tensorboard=True)
    train(task, Points(), busy)
    assert torch.equal(weights(task), plain)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"max_grad_norm": 0.01},
        {"max_grad_norm": 0.0},
        {"optimizer": OptimizerConfig(learning_rate=0.02)},
        {"optimizer": OptimizerConfig(learning_rate=0.01, betas=(0.5, 0.95))},
        {"optimizer": OptimizerConfig(learning_rate=0.01, weight_decay=1.0)},
        {"optimizer": OptimizerConfig(learning_rate=0.01, eps=0.1)},
        {"schedule": ScheduleConfig("constant", warmup_steps=3)},
        {"mixed_precision": "bf16"},
    ],
    ids=str,
)
def test_options_change_the_result(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert not torch.equal(trained(tmp_path / "a", **changes), trained(tmp_path / "b"))


def test_validation_sees_averaged_weights_in_eval_mode_and_is_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen: list[tuple[int, bool, bool, Tensor]] = []

    class Watching(Denoise):
        def validate(self, step: int) -> dict[str, Tensor]:
            seen.append((step, self.net.training, torch.is_grad_enabled(), weights(self)))
            return {
                "picture": torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1).expand(3, 4, 5),
                "score": torch.tensor(7.0),
            }

    task = Watching()
    result = train(task, Points(), config(tmp_path, validate_every=3, log_every=2, tensorboard=True))
    assert [entry[:3] for entry in seen] == [(3, False, False), (6, False, False)]
    assert task.net.training
    assert not torch.equal(seen[-1][3], weights(task))
    result.export("net")
    assert torch.equal(seen[-1][3], weights(task))
    picture = np.asarray(Image.open(tmp_path / "validation" / "00000006-picture.png"))
    assert picture.shape == (4, 5, 3) and picture[0, 0].tolist() == [0, 128, 255]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/error", "train/learning_rate", "train/gradient_norm"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4, 6]
    assert events.Scalars("validation/score")[-1].value == 7.0
    assert events.Tags()["images"] == ["validation/picture"]


def test_without_an_average_the_trained_weights_are_exported(tmp_path: Path) -> None:
    task = Denoise()
    result = train(task, Points(), config(tmp_path, ema_decay=0.0))
    before = weights(task)
    result.export("net")
    assert torch.equal(before, weights(task))
    with pytest.raises(UserError, match="was not trained"):
        result.export("nett")


def test_frozen_modules_are_eval_and_neither_trained_nor_saved(tmp_path: Path) -> None:
    class Guided(Denoise):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = {"teacher": nn.Linear(4, 4)}
            self.net[0].weight.requires_grad_(False)

    task = Guided()
    teacher, first = task.frozen["teacher"].weight.clone(), task.net[0].weight.clone()
    train(task, Points(), config(tmp_path))
    assert not task.frozen["teacher"].training
    assert torch.equal(task.frozen["teacher"].weight, teacher) and torch.equal(task.net[0].weight, first)
    names = {path.name for path in checkpoints(tmp_path)[-1].iterdir()}
    files = {"net.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}
    assert names == files | {"random-00000.safetensors", "random-00000.json"}


def test_mixed_precision_reaches_the_forward_pass(tmp_path: Path) -> None:
    seen = set()
    for precision in ("bf16", "no"):
        hook = lambda call, batch: seen.add(torch.is_autocast_enabled("cpu"))  # noqa: E731
        task = Denoise(hook=hook)
        train(task, Points(), config(tmp_path / precision, mixed_precision=precision, max_steps=1))
        assert all(p.dtype == torch.float32 for p in task.net.parameters())
    assert seen == {True, False}


@pytest.mark.parametrize("poison", ["nan", "inf", "gradient"])
def test_stops_on_what_is_not_finite(tmp_path: Path, poison: str) -> None:
    task = Denoise()

    def factor(call: int, batch: Any) -> Any:
        if call != 4:
            return None
        if poison == "gradient":  # one plus the root of zero: finite, with a slope that is not
            return 1 + (task.net[0].weight.sum() * 0).sqrt()
        return torch.tensor(float(poison))

    task.hook = factor
    culprit = "the gradient" if poison == "gradient" else "the loss"
    with pytest.raises(UserError, match=f"{culprit} of step 4 is not finite"):
        train(task, Points(), config(tmp_path, save_every=2))
    stored = load_file(checkpoints(tmp_path)[-1] / "net.safetensors")
    assert checkpoints(tmp_path)[-1].name == "checkpoint-00000004"
    assert all(torch.equal(stored[k], v) for k, v in task.net.state_dict().items())  # no update was made
    batch = load_file(tmp_path / "nonfinite-00000004-00000.safetensors")
    order = DataOrder(10, Cut(0, 3)).micro_batch(4, 0)
    assert torch.equal(batch["micro0.x"], torch.stack([Points()[i]["x"] for i, _ in order]))
    report = json.loads((tmp_path / "nonfinite-00000004-00000.json").read_text())
    assert report["micro0.caption"] == [f"point {i}" for i, _ in order] and report["step"] == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_in_order(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    task = Denoise(hook=lambda call, batch: os.kill(os.getpid(), number) if call == 2 else None)
    result = train(task, Points(), config(tmp_path / "a"))
    assert (result.step, result.stopped) == (3, "signal")
    assert [c.name for c in checkpoints(tmp_path / "a")] == ["checkpoint-00000003"]
    assert signal.getsignal(number) is before
    assert torch.equal(trained(tmp_path / "a"), trained(tmp_path / "b"))


def test_a_signal_to_the_whole_group_does_not_break_the_workers(tmp_path: Path) -> None:
    def signal_everyone(call: int, batch: Any) -> None:
        for process in [*multiprocessing.active_children(), None] if call == 2 else []:
            for number in (signal.SIGTERM,) if process is None else (signal.SIGTERM, signal.SIGINT):
                os.kill(process.pid if process else os.getpid(), number)

    task = Denoise(hook=signal_everyone)
    result = train(task, Points(), config(tmp_path / "a", num_workers=2))
    assert (result.step, result.stopped) == (3, "signal")
    assert torch.equal(trained(tmp_path / "a"), trained(tmp_path / "b"))


def test_the_clock_ends_the_run(tmp_path: Path) -> None:
    result = train(Denoise(), Points(), config(tmp_path, max_minutes=1e-9))
    assert (result.step, result.stopped) == (1, "time")
    assert train(Denoise(), Points(), config(tmp_path)).stopped is None


def test_checkpoints_are_pruned_and_end_with_the_last_step(tmp_path: Path) -> None:
    trained(tmp_path, save_every=2, max_steps=7, keep_checkpoints=3)
    assert [int(c.name[-8:]) for c in checkpoints(tmp_path)] == [4, 6, 7]


def test_other_settings_do_not_resume(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=3)
    with pytest.raises(UserError, match=r"loop.batch_size was 3, is now 4.*output_dir"):
        trained(tmp_path, batch_size=4)
    with pytest.raises(UserError, match=r"task.noise was 0.1, is now 0.2"):
        trained(tmp_path, noise=0.2)
    with pytest.raises(UserError, match=r"data.samples was 10, is now 9"):
        train(Denoise(), Points(9), config(tmp_path))
    with pytest.raises(UserError, match="already holds checkpoints"):
        trained(tmp_path, resume=False)
    assert torch.equal(trained(tmp_path, log_every=1, num_workers=1), trained(tmp_path / "b"))


def test_other_data_by_its_hash_is_said_in_words(tmp_path: Path) -> None:
    one, other = {"data": {"cache": "0a" * 32}}, {"data": {"cache": "1b" * 32}}
    check_settings(tmp_path, one, one)
    for stored, current, words in (
        (one, other, "another cache"),
        ({}, one, "data.cache was absent, is now given"),
        (one, {}, "data.cache was given, is now absent"),
    ):
        with pytest.raises(UserError, match=f"was made under other settings: {words}; give the old settings back"):
            check_settings(tmp_path, stored, current)


def test_a_checkpoint_that_does_not_say_what_it_is_of_is_named(tmp_path: Path) -> None:
    trained(tmp_path)
    state = checkpoints(tmp_path)[-1] / "state.json"
    state.write_text("{}")
    with pytest.raises(CheckpointError, match=f"{state} lacks settings and step; remove {state.parent}"):
        trained(tmp_path)


@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_a_finished_run_may_be_made_longer(
    tmp_path: Path, kind: Literal["constant", "cosine"], capsys: pytest.CaptureFixture[str]
) -> None:
    """By a constant rate it is then the run that was longer from the start; by a cosine, it says, another one."""
    schedule = ScheduleConfig(kind)
    whole = trained(tmp_path / "whole", schedule=schedule)
    short = trained(tmp_path / "parts", max_steps=3, schedule=schedule)
    capsys.readouterr()
    longer = trained(tmp_path / "parts", schedule=schedule)
    told = capsys.readouterr().err
    assert checkpoints(tmp_path / "parts")[-1].name == "checkpoint-00000006" and not longer.equal(short)
    assert longer.equal(whole) == (kind == "constant")
    assert ("max_steps was 3, is now 6: from step 3 on, the cosine ends at step 6" in told) == (kind == "cosine")
    assert trained(tmp_path / "parts", schedule=schedule).equal(longer)  # nothing is left to do, or to say
    assert "max_steps" not in capsys.readouterr().err
    with pytest.raises(UserError, match="is of step 6, past max_steps 5; set max_steps to 6 or more"):
        trained(tmp_path / "parts", max_steps=5, schedule=schedule)
    with pytest.raises(UserError, match="loop.schedule.min_ratio was 0.0, is now 0.5"):
        trained(tmp_path / "parts", max_steps=9, schedule=replace(schedule, min_ratio=0.5))


def test_what_cannot_be_trained_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="empty"):
        train(Denoise(), Points(0), config(tmp_path))
    task = Denoise()
    task.net.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        train(task, Points(), config(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"fsae\[train\]"):
        train(Denoise(), Points(), config(tmp_path, tensorboard=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 0},
        {"batch_size": 0},
        {"ema_decay": 1.0},
        {"mixed_precision": "fp8"},
        {"max_grad_norm": -1.0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        config(tmp_path, **changes)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsae.training import checkpointing

    trained(tmp_path, max_steps=2)

    def no_space(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointing, "save_random_state", no_space)
    with pytest.raises(UserError, match=r"checkpoint of step 6 could not be written.*No space left"):
        trained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000002"]
