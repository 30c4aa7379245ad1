"""Training against opponents, on a small adversarial pair, against the same training written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from fsae.data.order import Cut, DataOrder, derived_generator
from fsae.errors import UserError
from fsae.training import checkpointing
from fsae.training.checkpointing import checkpoints, load_tensors
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import Task, train


class Points(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    return generator, nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def opponent_terms(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, step: int) -> dict[str, Tensor]:
    """Non-saturating loss with a gradient penalty (so a second derivative) in every second step."""
    terms = {"real": softplus(-critic(real)).mean(), "fake": softplus(critic(fake)).mean()}
    terms["loss"] = terms["real"] + terms["fake"]
    if step % 2 == 0:
        inputs = real.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(inputs).sum(), inputs, create_graph=True)
        terms["loss"] = terms["loss"] + gradient.square().sum(1).mean()
    return terms


class Adversarial(Task):
    """Reconstruct points from noisy ones so that a critic takes them for real."""

    recompute = False

    def __init__(self) -> None:
        self.net, self.critic = pair()
        self.modules = {"net": self.net}
        self.opponents = {"critic": self.critic}
        self.opponent_optimizer = OptimizerConfig(learning_rate=0.03, betas=(0.0, 0.9), weight_decay=0.1)
        self.seen: list[tuple[str, int, bool, bool]] = []

    def watch(self, where: str) -> None:
        modules = (self.net, self.critic)
        self.seen.append((where, self.step, *(m[0].weight.requires_grad for m in modules)))

    def judge(self, x: Tensor) -> Tensor:
        return checkpoint(self.critic, x, use_reentrant=False) if self.recompute else self.critic(x)

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        self.watch("loss")
        fake = self.net(batch + 0.1 * torch.randn(batch.shape, generator=generator))
        loss = (fake - batch).square().mean() + softplus(-self.judge(fake)).mean()
        return {"loss": loss, "keep_fake": fake}

    def opponent_loss(
        self, batch: Any, outputs: Mapping[str, Tensor], generator: torch.Generator, step: int
    ) -> dict[str, Tensor]:
        self.watch("opponent_loss")
        assert set(outputs) == {"keep_fake"} and not outputs["keep_fake"].requires_grad
        fake = outputs["keep_fake"] + 0.1 * torch.randn(batch.shape, generator=generator)
        return opponent_terms(self.critic, batch, fake, step)


def config(folder: Path, **changes: Any) -> LoopConfig:
    base = LoopConfig(
        str(folder),
        max_steps=6,
        batch_size=3,
        gradient_accumulation_steps=2,
        optimizer=OptimizerConfig(learning_rate=0.01),
        schedule=ScheduleConfig("constant"),
        ema_decay=0.9,
        tensorboard=False,
    )
    return replace(base, **changes)


def weights(task: Adversarial) -> Tensor:
    return torch.cat([p.detach().flatten() for m in (task.net, task.critic) for p in m.parameters()])


def trained(folder: Path, task: Adversarial | None = None, **changes: Any) -> Tensor:
    task = task or Adversarial()
    train(task, Points(), config(folder, **changes))
    return weights(task)


def test_equals_the_training_written_out_by_hand(tmp_path: Path) -> None:
    task = Adversarial()
    schedule = ScheduleConfig("cosine", warmup_steps=2)
    found = trained(tmp_path, task, schedule=schedule, max_grad_norm=0.5)

    net, critic = pair()
    order, data = DataOrder(10, Cut(0, 3, accumulation=2)), Points()
    own = [p for p in critic.parameters() if p.ndim > 1], [p for p in critic.parameters() if p.ndim == 1]
    optimizers = [
        torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), weight_decay=0.0),
        torch.optim.AdamW(
            [{"params": own[0], "weight_decay": 0.1}, {"params": own[1], "weight_decay": 0.0}], betas=(0.0, 0.9)
        ),
    ]
    for step in range(6):
        factor = (step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 4)) / 2
        gradients = [[torch.zeros_like(p) for p in m.parameters()] for m in (net, critic)]
        for micro in range(2):
            x = torch.stack([data[index] for index, _ in order.micro_batch(step, micro)])
            noise = [torch.randn(x.shape, generator=derived_generator(0, step, micro, 0, n)) for n in (1, 2)]
            fake = net(x + 0.1 * noise[0])
            losses = [(fake - x).square().mean() + softplus(-critic(fake)).mean()]
            losses.append(opponent_terms(critic, x, fake.detach() + 0.1 * noise[1], step)["loss"])
            for total, loss, module in zip(gradients, losses, (net, critic), strict=True):
                for g, new in zip(total, torch.autograd.grad(loss / 2, list(module.parameters())), strict=True):
                    g += new
        for module, total, optimizer, rate in zip((net, critic), gradients, optimizers, (0.01, 0.03), strict=True):
            norm = torch.sqrt(sum((g.square().sum() for g in total), torch.zeros(())))
            for parameter, g in zip(module.parameters(), total, strict=True):
                parameter.grad = g * min(1.0, 0.5 / (norm.item() + 1e-6))
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
    expected = torch.cat([p.detach().flatten() for m in (net, critic) for p in m.parameters()])
    torch.testing.assert_close(found, expected)
    assert task.seen == [
        (where, step, where == "loss", where != "loss")
        for step in range(6)
        for _ in range(2)
        for where in ("loss", "opponent_loss")
    ]
    assert all(p.requires_grad and p.grad is None for m in (task.net, task.critic) for p in m.parameters())


def test_blocks_that_run_again_in_the_backward_pass_change_nothing(tmp_path: Path) -> None:
    task = Adversarial()
    task.recompute = True
    assert torch.equal(trained(tmp_path / "a", task), trained(tmp_path / "b"))


def test_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(tmp_path / "a")
    newest = checkpoints(tmp_path / "a")[-1]
    names = {"net", "critic", "ema", "optimizer", "opponent-optimizer", "random-00000"}
    assert {path.stem for path in newest.glob("*.safetensors")} == names
    assert all(key.startswith("net.") for key in load_file(newest / "ema.safetensors"))

    trained(tmp_path / "b", max_steps=3)
    assert torch.equal(trained(tmp_path / "b"), expected)
    for path in newest.glob("*.safetensors"):
        again = load_tensors(checkpoints(tmp_path / "b")[-1] / path.name)
        assert all(torch.equal(tensor, again[key]) for key, tensor in load_tensors(path).items())

    # The control forgets the moments of both, which the comparison must notice.
    trained(tmp_path / "c", max_steps=3)
    monkeypatch.setattr("fsae.training.engines.replicated.Replicated.load_moments", lambda *arguments: None)
    assert not torch.equal(trained(tmp_path / "c"), expected)


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 0.02}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.5}, {"eps": 0.1}],
    ids=str,
)
def test_the_opponents_optimizer_is_theirs(tmp_path: Path, changes: dict[str, Any]) -> None:
    def changed() -> Adversarial:
        task = Adversarial()
        task.opponent_optimizer = replace(task.opponent_optimizer, **changes)
        return task

    assert not torch.equal(trained(tmp_path / "a", changed()), trained(tmp_path / "b"))
    with pytest.raises(UserError, match=f"opponent_optimizer.{next(iter(changes))} was"):
        trained(tmp_path / "b", changed())


def test_without_opponents_their_optimizer_decides_nothing(tmp_path: Path) -> None:
    class Alone(Adversarial):
        def __init__(self) -> None:
            super().__init__()
            self.opponents = {}

    expected = trained(tmp_path / "a", Alone(), max_steps=4)
    trained(tmp_path / "b", Alone(), max_steps=2)
    other = Alone()
    other.opponent_optimizer = OptimizerConfig()
    assert torch.equal(trained(tmp_path / "b", other, max_steps=4), expected)
    assert not list(checkpoints(tmp_path / "a")[-1].glob("*opponent*"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run(tmp_path: Path, what: str) -> None:
    class Broken(Adversarial):
        def opponent_loss(self, *arguments: Any) -> dict[str, Tensor]:
            terms = super().opponent_loss(*arguments)
            if self.step == 3:
                bias = self.critic[2].bias
                terms["loss"] = terms["loss"] * (float("nan") if what == "loss" else 1)
                terms["loss"] = terms["loss"] + (bias - bias.detach()).abs().sqrt().sum()  # 0, of infinite slope
            return terms

    task = Broken()
    with pytest.raises(UserError, match=f"the opponents' {what} of step 3 is not finite, so no update was made"):
        trained(tmp_path, task, save_every=3)
    assert torch.equal(task.net[0].weight, load_tensors(checkpoints(tmp_path)[-1] / "net.safetensors")["0.weight"])
    assert (tmp_path / "nonfinite-00000003-00000.safetensors").is_file()


def test_what_they_report_is_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path, tensorboard=True, log_every=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    own = {"loss", "gradient_norm", "learning_rate", "steps_per_second"}
    theirs = {"loss", "real", "fake", "gradient_norm", "learning_rate"}
    assert set(events.Tags()["scalars"]) == {f"train/{n}" for n in own} | {f"train/opponent_{n}" for n in theirs}
    rates = [event.value for event in events.Scalars("train/opponent_learning_rate")]
    assert rates == pytest.approx([0.03] * 3)


def test_opponents_may_rest(tmp_path: Path) -> None:
    class Late(Adversarial):
        def opponent_loss(self, *arguments: Any) -> dict[str, Tensor]:
            return super().opponent_loss(*arguments) if self.step >= 4 else {}

    def moved(folder: Path, steps: int) -> bool:
        task = Late()
        trained(folder, task, max_steps=steps)
        return not torch.equal(task.critic[0].weight, pair()[1][0].weight)

    assert not moved(tmp_path / "a", 4)
    assert moved(tmp_path / "b", 5)


@pytest.mark.parametrize("name", ["net", "ema", "optimizer", "opponent-optimizer"])
def test_names_that_would_share_a_file_are_refused(tmp_path: Path, name: str) -> None:
    task = Adversarial()
    task.opponents = {name: task.critic}
    with pytest.raises(UserError, match=f"called net, {name}"):
        trained(tmp_path, task)


def test_opponents_are_evaluated_with_the_model(tmp_path: Path) -> None:
    modes: list[bool] = []

    class Validated(Adversarial):
        def validate(self, step: int) -> dict[str, Tensor]:
            modes.extend(m.training for m in (self.net, self.critic))
            return {}

        def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
            assert self.net.training and self.critic.training
            return super().loss(batch, generator)

    plain = trained(tmp_path / "a")
    assert torch.equal(trained(tmp_path / "b", Validated(), validate_every=2), plain)
    assert modes == [False] * 6


def test_a_checkpoint_without_the_opponents_is_named(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=2)
    (checkpoints(tmp_path)[-1] / "critic.safetensors").unlink()
    with pytest.raises(checkpointing.CheckpointError, match=r"critic\.safetensors"):
        trained(tmp_path)
