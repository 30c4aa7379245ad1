"""Two processes that share one transformer (FSDP2, ZeRO-3) train what one process with twice the batch trains.

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
from torch import Tensor
from torch.distributed.tensor import DTensor

from fsae.storage.files import read_json
from fsae.storage.pieces import whole_tensors
from fsae.training.checkpointing import checkpoints
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import TrainingResult, train
from fsdit import FSDiT
from fsdit.training.config import TransformerConfig
from fsdit.training.task import FlowMatchingTask

KINDS = ("ddp", "fsdp2", "zero3")
EPS = 0.01  # With a large eps an update follows its gradient; with a small one, the sign of a rounding error.


class Noised(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples that bring their noise along, so that it does not depend on the process they come to."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        shapes = {"inputs": (12, 3, 2, 2), "target": (4, 3, 2, 2), "text": (7, 24), "image": (5, 16)}
        sample = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return sample | {"timestep": 1000 * torch.rand((), generator=generator)}


class Velocities(FlowMatchingTask):
    """The transformer under gradient checkpointing, with its routers' own rate."""

    def __init__(self, settings: TransformerConfig) -> None:
        torch.manual_seed(0)
        transformer = FSDiT.from_preset("tiny", num_layers=4, text_dim=24, latent_channels=4, memory_gate=True)
        torch.nn.init.normal_(transformer.head.head.weight, std=0.05)  # at zero nothing below it has a gradient
        for block in transformer.blocks[1:]:
            torch.nn.init.ones_(block.router.gate)
        transformer.enable_gradient_checkpointing()
        super().__init__(transformer, None, settings)
        self.validated: list[float] = []

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        prediction = self.transformer(batch["inputs"], batch["timestep"], batch["text"], batch["image"])
        return {"loss": (prediction.float() - batch["target"]).square().mean()}

    def validate(self, step: int) -> dict[str, Tensor]:
        sample = Noised()[0]
        outputs = self.transformer(*(sample[name][None] for name in ("inputs", "timestep", "text", "image")))
        self.validated.append(outputs.square().mean().item())
        return {}


def config(folder: Path, batch_size: int, context_parallel: int = 1, **changes: Any) -> TransformerConfig:
    loop = LoopConfig(
        str(folder),
        batch_size=batch_size,
        optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=0.1, eps=EPS),
        schedule=ScheduleConfig("constant"),
        ema_decay=0.9,
        tensorboard=False,
        **({"max_steps": 3, "validate_every": 2} | changes),
    )
    return TransformerConfig(data="", autoencoder="", context_parallel=context_parallel, loop=loop)


def trained(folder: Path, batch_size: int, **changes: Any) -> tuple[Velocities, TrainingResult]:
    settings = config(folder, batch_size, **changes)
    task = Velocities(settings)
    return task, train(task, Noised(), settings.loop)


def held(tensor: Any) -> int:
    """Bytes of a parameter in this process, whole or in part."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().untyped_storage().nbytes()
    part = getattr(tensor, "ds_tensor", None)
    return tensor.untyped_storage().nbytes() + (0 if part is None else part.numel() * part.element_size())


def process(folder: Path) -> None:
    """What each of the two processes does."""
    for kind in KINDS:
        task, result = trained(folder / kind, 2, sharding=kind)
        facts = {"bytes": sum(map(held, task.transformer.parameters())), "validated": task.validated}
        exported = result.export("transformer")
        facts["exported"] = sum(p.double().sum().item() for p in exported.parameters())
        if result.is_main_process:  # it alone, without the others
            (saved := folder / f"{kind}-saved").mkdir()
            result.save("transformer", saved)
            again = FSDiT.from_pretrained(saved)
            assert again.public_config == exported.public_config
            assert all(map(torch.equal, again.state_dict().values(), exported.state_dict().values()))
        (folder / f"{kind}-{result.is_main_process}.json").write_text(json.dumps(facts))
    trained(folder / "zero3", 2, sharding="fsdp2", max_steps=5)  # the same run goes on under another sharding
    trained(folder / "tokens", 4, sharding="zero3", context_parallel=2)  # half of the weights, half of the tokens


def assert_equal(one: Path, two: Path) -> None:
    for name in ("transformer", "ema", "optimizer"):
        expected, found = (dict(whole_tensors(checkpoints(folder)[-1], name)) for folder in (one, two))
        assert expected.keys() == found.keys()
        scales: dict[str, float] = {}  # of each weight, and of a moment of all weights
        for key, tensor in expected.items():
            kind = key.split("/")[0]
            scales[kind] = max(scales.get(kind, 0.0), tensor.abs().max().item())
        for key, tensor in expected.items():
            close = {"rtol": 1e-5, "atol": 1e-5 * scales[key.split("/")[0]]}
            torch.testing.assert_close(found[key], tensor, **close, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
def test_two_processes_with_half_a_transformer_each_equal_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*launcher, str(tmp_path)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]

    task, result = trained(tmp_path / "one", 4)
    start = dict(Velocities(config(tmp_path / "one", 4)).transformer.named_parameters())
    for name, parameter in task.transformer.named_parameters():
        assert not torch.equal(parameter, start[name]), name  # all of it learns, routers and gates too
    whole = sum(p.numel() * p.element_size() for p in task.transformer.parameters())
    exported = sum(p.double().sum().item() for p in result.export("transformer").parameters())
    for kind in KINDS:
        if kind != "zero3":
            assert_equal(tmp_path / "one", tmp_path / kind)
        for main in (True, False):
            facts = read_json(tmp_path / f"{kind}-{main}.json")
            share = facts["bytes"] / whole
            assert share == 1 if kind == "ddp" else 0.49 < share < 0.55
            assert facts["exported"] == pytest.approx(exported, rel=1e-5)
            if facts["validated"]:
                assert facts["validated"] == pytest.approx(task.validated, rel=1e-5)
    assert_equal(tmp_path / "one", tmp_path / "tokens")
    trained(tmp_path / "one", 4, max_steps=5)
    assert_equal(tmp_path / "one", tmp_path / "zero3")  # 3 steps under ZeRO-3 and 2 under FSDP2


if __name__ == "__main__":
    torch.set_num_threads(1)
    process(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
