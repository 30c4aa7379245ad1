"""A checkpoint becomes a model's folder, as `save_pretrained` would write it, without the model being held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from fsae.cli import main
from fsae.storage.checkpoint import StrictModelMixin
from fsae.storage.files import read_json
from fsae.training import saving
from fsae.training.config import LoopConfig, ScheduleConfig
from fsae.training.loop import Task, TrainingResult, train
from fsae.training.saving import config_file, save_model, trained_tensors


class Toy(StrictModelMixin):
    """A frozen parameter, a buffer, and layers of several sizes."""

    count: Tensor

    @register_to_config
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 4))
        self.scale = nn.Parameter(torch.tensor([2.0]), requires_grad=False)
        self.register_buffer("count", torch.tensor([7]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale


class Copy(Task):
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.modules = {"toy": Toy()}

    def loss(self, batch: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": (self.modules["toy"](batch) - batch).square().mean()}


def run(folder: Path, **changes: Any) -> TrainingResult:
    config = LoopConfig(
        str(folder),
        schedule=ScheduleConfig("constant"),
        tensorboard=False,
        **({"max_steps": 3, "save_every": 1} | changes),
    )
    return train(Copy(), [torch.ones(4)] * 4, config)


def files(folder: Path) -> dict[str, Any]:
    """Names; the JSON of those that hold it."""
    return {path.name: read_json(path) if path.suffix == ".json" else None for path in folder.iterdir()}


def assert_same_state(one: nn.Module, two: nn.Module) -> None:
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


@pytest.mark.parametrize("shard", [10**9, 700])
def test_it_is_what_save_pretrained_writes(tmp_path: Path, shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path / "run")
    held: list[int] = []

    def save_state(state: dict[str, Tensor], path: Path) -> None:
        held.append(sum(tensor.nbytes for tensor in state.values()))
        plain(state, path)

    plain = saving.save_state
    monkeypatch.setattr(saving, "save_state", save_state)
    (written := tmp_path / "written").mkdir()
    save_model(config_file(result.checkpoint, "toy"), trained_tensors(result.checkpoint, "toy"), written, shard)
    exported = result.export("toy")
    assert isinstance(exported, Toy)
    exported.save_pretrained(tmp_path / "expected", max_shard_size=shard)
    assert files(written).keys() == files(tmp_path / "expected").keys()
    assert files(written)["config.json"] == files(tmp_path / "expected")["config.json"]
    assert_same_state(Toy.from_pretrained(written), exported)
    assert max(held) <= max(shard, 16 * 16 * 4) and len(held) == (1 if shard > 700 else 2)


def test_the_command_takes_a_run_or_any_of_its_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path / "run", keep_checkpoints=3)
    weights = Toy.from_config({"width": 16})
    weights.load_state_dict(result.modules["toy"].state_dict())
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "plain"), "--average", "false"]) == 0
    assert_same_state(Toy.from_pretrained(tmp_path / "plain"), weights)
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "average")]) == 0
    averaged = result.export("toy")
    assert not torch.equal(weights.layers[0].weight, averaged.layers[0].weight)  # type: ignore[index]
    assert_same_state(Toy.from_pretrained(tmp_path / "average"), averaged)

    first = tmp_path / "run" / "checkpoint-00000001"
    config = config_file(first, "toy").rename(tmp_path / "config.json")  # as of an earlier version
    capsys.readouterr()
    assert main(["export", str(first), "-o", str(tmp_path / "first")]) == 2
    assert "does not say which models it holds; give one as --module" in capsys.readouterr().err
    options = ["--module", "toy", "--config", str(config)]
    assert main(["export", str(first), "-o", str(tmp_path / "first"), *options]) == 0
    assert_same_state(Toy.from_pretrained(tmp_path / "first"), run(tmp_path / "one", max_steps=1).export("toy"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere is no checkpoint and holds none; give a run's output_dir"),
        (["run", "--module", "tory"], "config-tory.json; give a trained module's name"),
    ],
)
def test_what_cannot_be_exported_is_a_sentence(
    tmp_path: Path,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path("run"), max_steps=1)
    assert main(["export", *arguments, "-o", "model"]) == 2
    assert sentence in capsys.readouterr().err and not Path("model").exists()
