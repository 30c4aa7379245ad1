"""Sharded runs in their parts: what is gathered in which precision, and groups of processes with a copy each.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.utils.checkpoint import checkpoint

from fsae.errors import UserError
from fsae.storage.checkpoint import StrictModelMixin, save_state
from fsae.storage.files import read_json, write_json
from fsae.storage.pieces import save_pieces, whole_tensors
from fsae.training import loop
from fsae.training.checkpointing import checkpoints
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import Task, TrainingResult, train
from fsae.training.runs import model_to_train


class Points(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(5, generator=torch.Generator().manual_seed(index))


class Router(nn.Module):
    """A layer that must compute in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.linear(x.float())


class Block(nn.Module):
    """A linear layer, a parameter of the block's own that is added to activations, a norm, and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.router = nn.Linear(7, 7), nn.LayerNorm(7), Router()
        self.modulation = nn.Parameter(torch.randn(7))
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, x: Tensor) -> Tensor:
        inner, routed = self.linear(self.norm(x) + self.modulation), self.router(x)
        parts = {"weight": self.linear.weight, "norm": self.norm.weight, "modulation": self.modulation}
        parts |= {"router": self.router.linear.weight, "linear out": inner, "router out": routed}
        self.seen = {name: tensor.dtype for name, tensor in parts.items()}
        return x + torch.tanh(inner) * routed


class Net(nn.Module):
    _keep_in_fp32_modules = ["router"]

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, 7), nn.Linear(7, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.out(x)


class Model(StrictModelMixin):
    """A network that is saved and built from a preset."""

    presets = {"small": {"depth": 2}}
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, 7), nn.Linear(7, 5)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(self.into(x)))


class Denoise(Task):
    def __init__(self, net: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.net = net or Net()
        self.modules = {"net": self.net}

    def loss(self, batch: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        noisy = batch + 0.1 * torch.randn(batch.shape, generator=generator)
        return {"loss": (self.net(noisy).float() - batch).square().mean()}


def configured(folder: Path, **changes: Any) -> LoopConfig:
    settings: dict[str, Any] = {"max_steps": 4, "ema_decay": 0.9, "tensorboard": False} | changes
    optimizer = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, eps=0.01)  # updates follow the gradient
    return LoopConfig(str(folder), optimizer=optimizer, schedule=ScheduleConfig("constant"), **settings)


def run(folder: Path, task: Task | None = None, **changes: Any) -> TrainingResult:
    return train(task or Denoise(), Points(), configured(folder, **changes))


def halve(path: Path) -> None:
    """Save a model's weights in bf16; training goes on with them in fp32."""
    save_state({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)


def begun(folder: Path, **changes: Any) -> list[bool]:
    """Train a drawn model, a saved one, and the first one further; whether each had no weights before it was split."""
    bare = []
    for name, model, steps in (("drawn", "small", 2), ("again", str(folder / "saved"), 2), ("drawn", "small", 4)):
        config = configured(folder / name, max_steps=steps, **changes)
        torch.manual_seed(1)
        net = model_to_train(Model, model, config)
        bare.append(all(parameter.is_meta for parameter in net.parameters()))
        result = train(Denoise(net), Points(), config)
        if model == "small" and steps == 2:
            if result.is_main_process:
                (folder / "saved").mkdir()
                result.save("net", folder / "saved")
                halve(folder / "saved" / "diffusion_pytorch_model.safetensors")
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
    return bare


def start(folder: Path) -> None:
    bare = begun(folder, sharding="fsdp2", gradient_accumulation_steps=3)
    write_json(folder / f"facts-{torch.distributed.get_rank()}.json", {"bare": bare})


def precision(folder: Path) -> None:
    """Train in bf16, whole and split, and note what was gathered and what blocks saw."""
    gathered: list[str] = []
    plain = _fsdp_param_group.foreach_all_gather

    def counting(parameters: Any, *arguments: Any) -> Any:
        result = plain(parameters, *arguments)
        gathered.append(str(result.all_gather_output.dtype))
        return result

    _fsdp_param_group.foreach_all_gather = counting  # type: ignore[assignment]
    run(folder / "ddp", mixed_precision="bf16")
    task = Denoise()
    run(folder / "fsdp2", task, mixed_precision="bf16", sharding="fsdp2")
    seen = [{name: str(dtype) for name, dtype in block.seen.items()} for block in task.net.blocks]  # type: ignore
    write_json(folder / f"facts-{torch.distributed.get_rank()}.json", {"gathered": gathered, "seen": seen})


def groups(folder: Path) -> None:
    """Train with all processes holding one model, and with two pairs holding one each."""
    run(folder / "all", sharding="fsdp2")
    task = Denoise()
    run(folder / "pairs", task, sharding="fsdp2", shard_group=2)
    weight: Any = task.net.into.weight
    facts = {"rows": weight.to_local().shape[0], "placed": str(weight.placements)}
    write_json(folder / f"facts-{torch.distributed.get_rank()}.json", facts)


def divided(folder: Path) -> None:
    """Go on with the run of twelve samples an update in as many processes as there are."""
    processes = int(os.environ["WORLD_SIZE"])  # as the launcher says; they have not met yet
    run(folder, max_steps=6, sharding="fsdp2", gradient_accumulation_steps=12 // processes)


def killed(folder: Path) -> None:
    """Begin the run, and be killed while its second checkpoint is written."""

    def dying(pieces: Any, into: Path, name: str, rank: int) -> None:
        if "6" in into.name and name == "optimizer" and rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        save_pieces(pieces, into, name, rank)

    loop.save_pieces = dying  # type: ignore[attr-defined]
    run(folder, max_steps=6, save_every=3, sharding="fsdp2", gradient_accumulation_steps=3)


def launch(folder: Path, what: str, processes: int, fails: bool = False) -> list[dict[str, Any]]:
    """What each of the processes has noted."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*launcher, __file__, what, str(folder)], capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return [read_json(path) for path in sorted(folder.glob("facts-*.json"))]


def assert_close(one: Path, two: Path, tolerance: float) -> None:
    for name in ("net", "ema", "optimizer"):
        expected, found = (dict(whole_tensors(checkpoints(folder)[-1], name)) for folder in (one, two))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_under_bf16_linear_layers_are_gathered_in_bf16_and_the_rest_stays_fp32(tmp_path: Path) -> None:
    for facts in launch(tmp_path, "precision", 2):
        for block in facts["seen"]:
            assert block.pop("weight") == block.pop("linear out") == "torch.bfloat16"
            assert set(block.values()) == {"torch.float32"}
        # A step: in the forward and in the backward pass, each block's layer and the rest of it; once the root.
        assert facts["gathered"].count("torch.bfloat16") == 4 * 3 * 2
        assert facts["gathered"].count("torch.float32") == 4 * (3 * 2 + 1)
    assert_close(tmp_path / "ddp", tmp_path / "fsdp2", 2e-3)
    weights = dict(whole_tensors(checkpoints(tmp_path / "fsdp2")[-1], "net"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_copies_held_by_groups_of_processes_train_as_one_copy_held_by_all(tmp_path: Path) -> None:
    facts = launch(tmp_path, "groups", 4)
    assert [fact["rows"] for fact in facts] == [4, 3, 4, 3]
    assert all("Replicate" in fact["placed"] and "Shard" in fact["placed"] for fact in facts)
    assert_close(tmp_path / "all", tmp_path / "pairs", 1e-6)


@pytest.mark.slow
def test_weights_are_built_once_or_read_in_parts(tmp_path: Path) -> None:
    facts = launch(tmp_path / "two", "start", 2)
    assert [fact["bare"] for fact in facts] == [[False, True, True], [True, True, True]]
    assert begun(tmp_path / "one", gradient_accumulation_steps=6) == [False] * 3
    for name in ("drawn", "again"):
        assert_close(tmp_path / "one" / name, tmp_path / "two" / name, 1e-6)
        weights = dict(whole_tensors(checkpoints(tmp_path / "two" / name)[-1], "net"))
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_a_run_killed_in_four_processes_goes_on_in_two_or_three_as_if_it_were_not(tmp_path: Path) -> None:
    launch(tmp_path / "two", "killed", 4, fails=True)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "checkpoint-00000003",
        ".checkpoint-00000006.partial",
    }
    names = {path.name for path in (tmp_path / "two" / "checkpoint-00000003").glob("*.safetensors")}
    assert names == {f"{name}.0000{rank}.safetensors" for name in ("net", "ema", "optimizer") for rank in range(4)} | {
        f"random-0000{rank}.safetensors" for rank in range(4)
    }
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    run(tmp_path / "one", max_steps=6, gradient_accumulation_steps=12)
    for processes, name in ((2, "two"), (3, "three")):
        launch(tmp_path / name, "divided", processes)
        assert_close(tmp_path / "one", tmp_path / name, 1e-6)
        state = read_json(checkpoints(tmp_path / name)[-1] / "state.json")
        assert state["settings"]["processes"] == processes and not list((tmp_path / name).glob(".*"))
    with pytest.raises(UserError, match="processes was 2, is now 1"):
        run(tmp_path / "two", max_steps=7, gradient_accumulation_steps=6)


def test_a_group_needs_fsdp2(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shard_group is 2; it must be 0 with sharding zero3, or fsdp2 the sharding"):
        LoopConfig(str(tmp_path), sharding="zero3", shard_group=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kinds = {"precision": precision, "groups": groups, "divided": divided, "killed": killed, "start": start}
    kinds[sys.argv[1]](Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
