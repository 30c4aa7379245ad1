"""Muon beside AdamW, against the published formula in float64 and through the training loop.

Run as a script, this file is one of several processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsae.errors import UserError
from fsae.model import FSAE
from fsae.stages.config import AutoencoderConfig
from fsae.stages.task import AutoencoderTask
from fsae.storage.files import read_json, write_json
from fsae.training.checkpointing import check_settings, checkpoints, load_tensors
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import Task, train
from fsae.training.optimizers import make_optimizer, matrices
from fsae.training.task import decay_groups

MUON = OptimizerConfig(
    learning_rate=0.01, betas=(0.8, 0.9), weight_decay=0.1, kind="muon", matrix_learning_rate=0.02, momentum=0.9
)


class Net(nn.Module):
    """Every sort of layer there is, on clips `B 3 T H W`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.scale = nn.Parameter(torch.ones(8, 9))
        self.enter = nn.Conv3d(3, 16, 3, padding=1)
        self.depth = nn.Conv3d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv3d(16, 32, 1, groups=2)
        self.kernel = nn.Conv3d(32, 8, 3, padding=1)
        self.flat = nn.Conv2d(8, 9, (3, 1), padding=(1, 0))
        self.linear = nn.Linear(9, 12)
        self.narrow = nn.Linear(12, 4)
        self.leave = nn.Conv3d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.kernel(self.grouped(torch.relu(self.depth(self.enter(x))))))
        h = self.flat(h.flatten(2, 3)).unflatten(2, h.shape[2:4]).movedim(1, -1)
        h = h + self.embedding.weight.mean(0) @ self.scale
        return self.leave(self.narrow(torch.tanh(self.linear(h))).movedim(-1, 1))


OF_MUON = {"grouped.weight", "kernel.weight", "flat.weight", "linear.weight"}


def net(memory_format: torch.memory_format = torch.contiguous_format) -> Net:
    torch.manual_seed(0)
    made = Net()
    if memory_format == torch.channels_last_3d:
        for layer in made.modules():
            if isinstance(layer, nn.Conv3d):
                layer.to(memory_format=memory_format)
    return made


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))


def updated(model: nn.Module, settings: OptimizerConfig, steps: int = 3) -> dict[str, Tensor]:
    optimizer = make_optimizer(decay_groups([model], settings), settings)
    for step in range(steps):
        set_gradients(model, step)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# --- the optimiser by itself


def newton_schulz(matrix: Tensor) -> Tensor:
    """Muon's quintic iteration: x <- a x + b (x x') x + c (x x')^2 x, five times."""
    x = (matrix if len(matrix) <= len(matrix.T) else matrix.T) / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x if len(matrix) <= len(matrix.T) else x.T


def muon_by_hand(kernel: Tensor, settings: OptimizerConfig, gradients: list[Tensor]) -> Tensor:
    weight, moment = kernel.double().flatten(1), torch.zeros_like(kernel.flatten(1), dtype=torch.float64)
    rate, mu = settings.matrix_learning_rate, settings.momentum
    for gradient in (g.double().flatten(1) for g in gradients):
        moment = mu * moment + (1 - mu) * gradient
        direction = newton_schulz(mu * moment + (1 - mu) * gradient)
        weight = weight * (1 - rate * settings.weight_decay) - rate * 0.2 * max(weight.shape) ** 0.5 * direction
    return weight.view(kernel.shape)


def test_matrices_follow_the_formula_and_all_else_is_adamws() -> None:
    start = {name: parameter.detach().clone() for name, parameter in net().named_parameters()}
    found = updated(net(), MUON)
    adamw = updated(net(), replace(MUON, kind="adamw"))

    gradients: dict[str, list[Tensor]] = {name: [] for name in start}
    for step in range(3):
        model = net()
        set_gradients(model, step)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradients[name].append(parameter.grad)
    for name, weight in start.items():
        if name not in OF_MUON:
            assert torch.equal(found[name], adamw[name]), name
            continue
        truth = muon_by_hand(weight, MUON, gradients[name]) - weight.double()
        size = truth.square().mean().sqrt()
        error = (found[name].double() - weight.double() - truth).square().mean().sqrt()
        assert error < 0.02 * size, name  # torch iterates in bfloat16
        control = muon_by_hand(weight, replace(MUON, momentum=0.5), gradients[name]) - weight.double()
        assert (control - truth).square().mean().sqrt() > 0.1 * size, name
        assert (adamw[name] - found[name]).square().mean().sqrt() > 0.1 * size, name


def test_a_step_moves_an_entry_by_a_fifth_of_the_rate() -> None:
    start = dict(net().named_parameters())
    found = updated(net(), replace(MUON, weight_decay=0.0), steps=1)
    for name in OF_MUON:
        moved = (found[name] - start[name]).square().mean().sqrt().item() / MUON.matrix_learning_rate
        assert 0.14 < moved < 0.24, name


def test_the_memory_format_of_kernels_does_not_matter() -> None:
    last = net(torch.channels_last_3d)
    assert not last.kernel.weight.is_contiguous()
    found, expected = updated(last, MUON), updated(net(), MUON)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert last.kernel.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_what_is_a_matrix() -> None:
    model = net()
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in matrices([model])} == OF_MUON
    model.kernel.weight.requires_grad_(False)
    groups = decay_groups([model], MUON)
    assert [len(g["params"]) for g in groups] == [5, 9, 3]
    assert {names[id(p)] for p in groups[2]["params"]} == OF_MUON - {"kernel.weight"}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1]


def test_pixels_enter_and_leave_an_autoencoder_by_adamw() -> None:
    model = FSAE.from_preset("nano")
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in matrices([model])}
    assert not found & {"encoder.conv_in.weight", "decoder.conv_out.weight"}
    assert {"encoder.conv_out.weight", "decoder.conv_in.weight", "decoder.stages.0.up.conv.weight"} < found
    depthwise = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv3d) and layer.groups > 16]
    assert depthwise and not found & {names[id(weight)] for weight in depthwise}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes[name] for name in found) > 0.95 * sum(sizes.values())


def test_a_parameter_without_a_gradient_stays() -> None:
    model = net()
    optimizer = make_optimizer(decay_groups([model], MUON), MUON)
    set_gradients(model, 0)
    model.kernel.weight.grad = model.enter.weight.grad = None
    optimizer.step()
    assert torch.equal(model.kernel.weight, net().kernel.weight) and torch.equal(model.enter.weight, net().enter.weight)
    assert not torch.equal(model.linear.weight, net().linear.weight)
    assert model.kernel.weight not in optimizer.state


def test_a_tasks_own_group_is_adamws_at_its_own_rate_unless_it_says_otherwise() -> None:
    def after(kind: str | None) -> tuple[Tensor, float]:
        model = net()
        groups = decay_groups([model], MUON)
        own = model.linear.weight
        groups[2]["params"] = [p for p in groups[2]["params"] if p is not own]
        apart: dict[str, Any] = {"params": [own], "weight_decay": 0.0, "lr": 0.5}
        optimizer = make_optimizer([*groups, apart | ({"kind": kind} if kind else {})], MUON)
        set_gradients(model, 0)
        optimizer.step()
        return own.detach() - net().linear.weight.detach(), optimizer.param_groups[-1]["peak_lr"]

    moved, peak = after(None)
    assert peak == 0.5 and torch.allclose(moved.abs(), torch.tensor(0.5), rtol=1e-4)  # AdamW's first step
    orthogonal, _ = after("muon")
    lengths = torch.linalg.svdvals(orthogonal / (0.5 * 0.2 * 12**0.5))
    assert lengths.min() > 0.6 and lengths.max() < 1.3 and lengths.min() < 0.99 * lengths.max()
    assert torch.linalg.svdvals(moved).min() < 0.5 * torch.linalg.svdvals(moved).max()


def test_impossible_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes in ({"kind": "sgd"}, {"matrix_learning_rate": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}):
        with pytest.raises(UserError, match=rf"optimizer\.{next(iter(changes))} is"):
            OptimizerConfig(**changes)  # type: ignore[arg-type]
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"optimizer.kind is 'muon', which torch .* install torch 2\.9"):
        make_optimizer(decay_groups([net()], MUON), MUON)


# --- through the training loop


class Clips(torch.utils.data.Dataset[Tensor]):
    """Smooth clips `3 T H W`."""

    def __init__(self, frames: int = 3, side: int = 4) -> None:
        self.frames, self.side = frames, side

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        coarse = torch.randn(1, 3, 1, 2, 2, generator=torch.Generator().manual_seed(index))
        return nn.functional.interpolate(coarse, (self.frames, self.side, self.side), mode="trilinear")[0].tanh()


class Reconstruct(Task):
    """A network against itself shifted by noise; with a critic, that critic tells the two apart."""

    def __init__(self, critic: OptimizerConfig | None = None, noise: float = 0.1) -> None:
        self.noise = noise
        self.net = net(torch.channels_last_3d)
        self.modules = {"net": self.net}
        if critic is not None:
            self.critic = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1))
            self.opponents, self.opponent_optimizer = {"critic": self.critic}, critic

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        made = self.net(batch + self.noise * torch.randn(batch.shape, generator=generator))
        return {"loss": (made.float() - batch).square().mean(), "keep_made": made}

    def opponent_loss(self, batch: Any, outputs: Any, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        true, made = (self.critic(x.movedim(1, -1)).float() for x in (batch, outputs["keep_made"]))
        return {"loss": (true - 1).square().mean() + made.square().mean()}


def config(folder: Path, **changes: Any) -> LoopConfig:
    base = LoopConfig(
        str(folder),
        max_steps=6,
        batch_size=2,
        optimizer=MUON,
        schedule=ScheduleConfig("constant", warmup_steps=2),
        ema_decay=0.9,
        tensorboard=False,
    )
    return replace(base, **changes)


def run(folder: Path, task: Reconstruct | None = None, **changes: Any) -> dict[str, Tensor]:
    """Everything that the newest checkpoint holds."""
    train(task or Reconstruct(), Clips(), config(folder, **changes))
    files = sorted(checkpoints(folder)[-1].glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_tensors(file).items()}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_is_bit_for_bit_the_whole_one(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    whole = run(tmp_path / "whole", Reconstruct(MUON), mixed_precision=precision)
    assert {n for n in whole if "/momentum_buffer/" in n} == {
        *(f"optimizer/momentum_buffer/net.{name}" for name in OF_MUON),
        "opponent-optimizer/momentum_buffer/critic.1.weight",
    }
    for steps in (3, 6):
        parts = run(tmp_path / "parts", Reconstruct(MUON), mixed_precision=precision, max_steps=steps)
    assert not differences(parts, whole)

    # The control forgets the moments, which the comparison must notice.
    run(tmp_path / "control", Reconstruct(MUON), mixed_precision=precision, max_steps=3)
    monkeypatch.setattr("fsae.training.engines.replicated.Replicated.load_moments", lambda *arguments: None)
    control = run(tmp_path / "control", Reconstruct(MUON), mixed_precision=precision)
    assert {f"net/{name}" for name in OF_MUON} | {"net/enter.weight", "critic/1.weight"} <= differences(control, whole)


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"kind": "adamw"}, "matrices"),
        ({"matrix_learning_rate": 0.03}, "matrices"),
        ({"momentum": 0.5}, "matrices"),
        ({"weight_decay": 0.2}, "both"),
        ({"learning_rate": 0.02}, "rest"),
        ({"betas": (0.5, 0.9)}, "rest"),
        ({"eps": 0.1}, "rest"),
    ],
    ids=str,
)
def test_each_setting_reaches_what_it_is_for(changes: dict[str, Any], moved: str) -> None:
    different = differences(updated(net(), replace(MUON, **changes)), updated(net(), MUON))
    kernels = {name for name, p in net().named_parameters() if p.ndim > 1 and name.endswith("weight")}
    rest = {name for name, _ in net().named_parameters()} - OF_MUON
    assert different == {"matrices": OF_MUON, "rest": rest, "both": kernels}[moved]


def test_rates_follow_the_schedule_and_the_opponents_have_their_own_kind(tmp_path: Path) -> None:
    task = Reconstruct(replace(MUON, kind="adamw"))
    result = train(task, Clips(), config(tmp_path, max_steps=1))
    rates = [(group["lr"], group["peak_lr"]) for group in result.engine.optimizer.param_groups]
    assert rates == [(0.005, 0.01), (0.005, 0.01), (0.01, 0.02)]  # the first of two steps of the warm-up
    moments = load_tensors(checkpoints(tmp_path)[-1] / "opponent-optimizer.safetensors")
    assert {name.split("/")[0] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}


def test_checkpoints_from_before_there_was_a_choice_go_on_under_adamw(tmp_path: Path) -> None:
    adamw = replace(MUON, kind="adamw")
    whole = run(tmp_path / "whole", Reconstruct(adamw), optimizer=adamw)
    run(tmp_path / "old", Reconstruct(adamw), optimizer=adamw, max_steps=3)
    file = checkpoints(tmp_path / "old")[-1] / "state.json"
    state = read_json(file)
    for settings in (state["settings"]["loop"]["optimizer"], state["settings"]["opponent_optimizer"]):
        for name in ("kind", "matrix_learning_rate", "momentum"):
            del settings[name]
    write_json(file, state)
    with pytest.raises(UserError, match=r"loop\.optimizer\.kind was adamw, is now muon"):
        run(tmp_path / "old", Reconstruct(adamw))
    with pytest.raises(UserError, match=r"opponent_optimizer\.kind was adamw, is now muon"):
        run(tmp_path / "old", Reconstruct(MUON), optimizer=adamw)
    other = replace(adamw, momentum=0.5, matrix_learning_rate=1.0)  # which AdamW does not read
    assert not differences(run(tmp_path / "old", Reconstruct(other), optimizer=other), whole)


def test_another_rate_of_muon_does_not_resume(tmp_path: Path) -> None:
    run(tmp_path, max_steps=3)
    with pytest.raises(UserError, match=r"loop\.optimizer\.matrix_learning_rate was 0\.02, is now 0\.03"):
        run(tmp_path, optimizer=replace(MUON, matrix_learning_rate=0.03))
    nested = {"task": {"adversarial": {"optimizer": {"learning_rate": 1.0, "betas": [0, 1]}}}}
    with pytest.raises(UserError, match=r"adversarial\.optimizer\.momentum was absent, is now 0\.5"):
        muon = {"learning_rate": 1.0, "betas": [0, 1], "kind": "muon", "momentum": 0.5}
        check_settings(tmp_path, nested, {"task": {"adversarial": {"optimizer": muon}}})


class Images(Clips):
    def __getitem__(self, index: int) -> dict[str, Tensor]:  # type: ignore[override]
        return {"video": super().__getitem__(index)}


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", "zero3"])
def test_an_autoencoder_learns_by_it_on_one_process_under_any_sharding(tmp_path: Path, sharding: Any) -> None:
    torch.manual_seed(0)
    model = FSAE.from_preset("tiny").to(memory_format=torch.channels_last_3d)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = config(tmp_path, max_steps=2, batch_size=1, sharding=sharding)
    result = train(AutoencoderTask(AutoencoderConfig("none", settings), model), Images(1, 64), settings)
    held = result.engine.optimizer.state
    assert sum("momentum_buffer" in state for state in held.values()) == len(matrices([model]))
    stages = {name: p for name, p in model.named_parameters() if name.endswith("conv1.weight")}
    assert stages and all(not torch.equal(p, before[name]) for name, p in stages.items())


# --- several processes


def process(folder: Path) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    run(folder / "two", Reconstruct(noise=0.0), batch_size=1, max_steps=1)
    task = Reconstruct()
    run(folder / "longer", task, batch_size=1)
    facts: dict[str, Any] = {"weights": [p.flatten().tolist() for p in task.net.parameters()]}
    for sharding in ("fsdp2", "zero3"):
        with pytest.raises(UserError) as refused:
            run(folder / sharding, batch_size=1, sharding=sharding)
        facts[sharding] = str(refused.value)
    (folder / f"facts-{torch.distributed.get_rank()}.json").write_text(json.dumps(facts))


@pytest.mark.slow
def test_two_processes_train_whole_copies_alike_and_refuse_parts(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*launcher, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = [read_json(tmp_path / f"facts-{rank}.json") for rank in (0, 1)]
    assert facts[0] == facts[1]
    for sharding in ("fsdp2", "zero3"):
        sentence = (
            f"optimizer.kind is 'muon', whose updates need whole matrices, but sharding {sharding} leaves each of 2"
        )
        assert facts[0][sharding].startswith(sentence) and not (tmp_path / sharding).exists()

    # One update, since bfloat16 rounds a mean of halves otherwise and the iteration enlarges what is near zero.
    one, half = (run(tmp_path / str(n), Reconstruct(noise=0.0), batch_size=n, max_steps=1) for n in (2, 1))
    newest = checkpoints(tmp_path / "two")[-1]
    two, moments = (load_tensors(newest / f"{name}.safetensors") for name in ("net", "optimizer"))
    for name in OF_MUON:
        key = f"momentum_buffer/net.{name}"
        torch.testing.assert_close(moments[key], one[f"optimizer/{key}"], rtol=1e-4, atol=1e-8)
        moved = (one[f"net/{name}"] - net().get_parameter(name).detach()).norm()
        assert (one[f"net/{name}"] - two[name]).norm() < 0.05 * moved, name
        assert (one[f"net/{name}"] - half[f"net/{name}"]).norm() > 0.1 * moved, name


if __name__ == "__main__":
    process(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
