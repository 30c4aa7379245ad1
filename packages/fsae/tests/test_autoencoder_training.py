"""Training the autoencoder: its loss, its statistics, and that it learns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from fsae.data.config import ClipsConfig
from fsae.data.video import write_video
from fsae.errors import UserError
from fsae.evaluation.metrics import psnr
from fsae.layers.resample import Upsample
from fsae.losses.perceptual import PerceptualLoss
from fsae.model import FSAE
from fsae.stages import task as autoencoder
from fsae.stages.config import AutoencoderConfig
from fsae.stages.objective import Lpips, Objective
from fsae.stages.task import (
    AutoencoderTask,
    measure_latent_statistics,
    train_autoencoder,
)
from fsae.training.config import LoopConfig, OptimizerConfig
from fsae.training.logs import frame_grid
from fsae.training.runs import report_end, report_saved, save_parts


def tiny() -> FSAE:
    torch.manual_seed(0)
    return FSAE.from_preset("tiny")


class Colours(torch.utils.data.Dataset[dict[str, Any]]):
    """Four flat pictures: what a tiny network can learn to tell apart in some seconds."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        colour = torch.tensor([[0.8, -0.8, -0.8], [-0.8, 0.8, -0.8], [-0.8, -0.8, 0.8], [0.8, 0.8, 0.8]])[index]
        return {"video": colour.view(3, 1, 1, 1).repeat(1, 1, 64, 64), "caption": ""}


def configuration(folder: Path, data: Path, **changes: Any) -> AutoencoderConfig:
    loop = LoopConfig(
        str(folder),
        max_steps=2,
        batch_size=2,
        optimizer=OptimizerConfig(learning_rate=3e-3),
        tensorboard=False,
    )
    loop_fields = {k: changes.pop(k) for k in list(changes) if k in vars(loop)}
    loop = LoopConfig(**{**vars(loop), **loop_fields})
    clips = {k: changes.pop(k) for k in list(changes) if k in vars(ClipsConfig())}
    return AutoencoderConfig(
        str(data), loop, ClipsConfig(**{"frames": 1, "height": 64, "width": 64, **clips}), **changes
    )


def test_the_loss_is_l1_plus_weighted_lpips(tmp_path: Path, lpips_state: dict[str, Tensor]) -> None:
    model, perceptual = tiny(), PerceptualLoss(lpips_state)
    video = torch.stack([Colours()[i]["video"] for i in range(2)])

    def loss(*arguments: Any) -> dict[str, Tensor]:
        objective = Objective(Lpips(*arguments)) if arguments else Objective()
        task = AutoencoderTask(configuration(tmp_path, tmp_path), model, objective)
        return task.loss({"video": video}, torch.Generator().manual_seed(1))

    result = model(video, torch.Generator().manual_seed(1))
    l1 = (result - video).abs().mean()
    plain, weighted = loss(), loss(perceptual, 0.3)
    torch.testing.assert_close(plain["loss"], l1)
    torch.testing.assert_close(weighted["loss"], l1 + 0.3 * perceptual(result, video))
    torch.testing.assert_close(weighted["perceptual"], perceptual(result, video))
    torch.testing.assert_close(plain["psnr"], psnr(result.detach().clamp(-1, 1), video).mean())
    assert "perceptual" not in plain


def test_it_learns(tmp_path: Path) -> None:
    """L1 of the saved model; the best answer without a look at the picture has 0.8. The control stays at its start."""
    video = torch.stack([Colours()[i]["video"] for i in range(4)])

    def error(name: str, rate: float, steps: int) -> float:
        optimizer = OptimizerConfig(learning_rate=rate)
        settings = configuration(
            tmp_path / name, tmp_path, model="tiny", max_steps=steps, optimizer=optimizer, batch_size=4, seed=1
        )
        folder = train_autoencoder(settings, Colours())
        assert folder == tmp_path / name / "autoencoder"
        with torch.no_grad():
            return (FSAE.from_pretrained(folder)(video) - video).abs().mean().item()

    assert error("trained", 1e-3, 30) < 0.25
    assert error("control", 1e-9, 2) > 0.5


@pytest.mark.parametrize("batches", [1, 2, 9])
def test_latent_statistics(batches: int) -> None:
    model = tiny()
    model.register_to_config(latents_mean=[0.5] * 8, latents_std=[3.0] * 8)  # those of before must not count
    mean, std = measure_latent_statistics(model, Colours(), batches, batch_size=2)
    chosen = [0, 3] if batches == 1 else range(4)
    with torch.no_grad():
        latents = torch.cat([model.encoder(Colours()[i]["video"][None]) for i in chosen]).double().numpy()
    np.testing.assert_allclose(mean, latents.mean((0, 2, 3, 4)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(std, latents.std((0, 2, 3, 4)), rtol=1e-3, atol=1e-5)


def test_what_is_saved_encodes_to_normalised_latents(tmp_path: Path) -> None:
    folder = train_autoencoder(configuration(tmp_path, tmp_path, model="tiny"), Colours())
    assert folder is not None
    model = FSAE.from_pretrained(folder)
    with torch.no_grad():
        latents = torch.cat([model.encode(Colours()[i]["video"][None]) for i in range(4)])
    flat = latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(8), rtol=0, atol=1e-3)
    torch.testing.assert_close(flat.std(1, correction=0), torch.ones(8), rtol=1e-2, atol=0)


def test_options_reach_their_consumers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lpips_state: dict[str, Tensor]
) -> None:
    for name in ("data", "held_out"):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "clip.mp4", np.zeros((12, 80, 64, 3), np.uint8), 8)
    save_file(lpips_state, tmp_path / "lpips.safetensors")
    settings = configuration(
        tmp_path / "run",
        tmp_path / "data",
        model="tiny",
        frames=5,
        height=64,
        width=128,
        stride=2,
        perceptual_weights=[str(tmp_path / "lpips.safetensors")],
        perceptual_weight=0.7,
        validation_data=str(tmp_path / "held_out"),
        validation_samples=3,
        validate_every=1,
        seed=5,
    )
    seen: list[Any] = []

    def stop_here(*arguments: Any) -> None:
        seen.extend(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(autoencoder, "train", stop_here)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(settings)
    task, clips, loop = seen
    assert loop is settings.loop
    assert clips.settings == {"frames": 5, "size": [64, 128], "stride": 2, "seed": 5}
    assert clips.source == tmp_path / "data"
    assert task.objective.perceptual.weight == 0.7
    assert task.validation.shape == (1, 3, 5, 64, 128)  # three are wanted, there is one
    assert not any(m.conv.weight.any() for m in task.model.modules() if isinstance(m, Upsample))  # it starts small
    kernels = [p for p in task.model.parameters() if p.ndim == 5 and min(p.shape[:2]) > 1 and p.shape[-1] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in kernels)


def test_validation_and_statistics_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    measure = autoencoder.measure_latent_statistics
    monkeypatch.setattr(
        autoencoder,
        "measure_latent_statistics",
        lambda *given, **shown: asked.extend(given[2:]) or measure(*given, **shown),
    )
    options = {"validate_every": 2, "validation_samples": 3, "statistics_batches": 1, "channels_last": False}
    train_autoencoder(configuration(tmp_path, tmp_path, model="tiny", **options), Colours())
    assert asked == [1, 2]
    picture = Image.open(tmp_path / "validation" / "00000002-reconstruction.png")
    assert picture.size == (64 * 3, 64 * 2)


def test_a_saved_model_is_trained_further(tmp_path: Path) -> None:
    folder = train_autoencoder(configuration(tmp_path / "a", tmp_path, model="tiny"), Colours())
    start = FSAE.from_pretrained(folder).state_dict()
    tiny_steps = {"optimizer": OptimizerConfig(learning_rate=1e-9), "channels_last": False}
    again = train_autoencoder(configuration(tmp_path / "b", tmp_path, model=str(folder), **tiny_steps), Colours())
    state = FSAE.from_pretrained(again).state_dict()
    assert all(torch.allclose(state[name], tensor, atol=1e-6) for name, tensor in start.items())
    assert not torch.allclose(next(iter(tiny().state_dict().values())), next(iter(state.values())), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "nanno"}, "neither a preset"),
        ({"frames": 18}, "clips.frames is 18; it must be 1 \\+ 4k"),
        ({"height": 100}, "clips.height is 100; it must be a multiple of 64"),
        ({"perceptual_weights": ["none.pth"]}, "none.pth does not exist"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        train_autoencoder(configuration(tmp_path / "run", tmp_path, **{"model": "tiny", **changes}), Colours())
    assert not (tmp_path / "run").exists()


def test_frame_grid_shows_first_middle_and_last_frames() -> None:
    clips = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(2, 3, 5, 4, 6) / 2 - 1
    grid = frame_grid([clips, -clips])
    assert grid.shape == (3, 8, 36)
    assert grid[0, 0, ::6].tolist() == [0, 0.5, 1, 0, 0.5, 1] and grid[0, 4, ::6].tolist() == [
        1,
        0.5,
        0,
        1,
        0.5,
        0,
    ]
    assert frame_grid([clips[:, :, :1]]).shape == (3, 4, 12)


def test_a_model_that_finds_no_room_is_a_sentence_and_leaves_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: FSAE, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    part = tiny()
    result = SimpleNamespace(output_dir=tmp_path, is_main_process=True)
    save_parts(result, {"autoencoder": part})  # type: ignore[arg-type]
    before = (tmp_path / "autoencoder" / "config.json").read_bytes()
    monkeypatch.setattr(FSAE, "save_pretrained", full)
    with pytest.raises(UserError, match=r"cannot write .*autoencoder .*No space left.*make room, and run again"):
        save_parts(result, {"autoencoder": part})  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["autoencoder"]
    assert (tmp_path / "autoencoder" / "config.json").read_bytes() == before


def test_of_several_processes_one_says_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "autoencoder"
    for rank, saved, stopped in (
        ("0", f"saved {folder}\n", "stopped at step 3 of 9; run again to go on\n"),
        ("1", "", ""),
    ):
        monkeypatch.setenv("RANK", rank)
        assert report_saved([folder]) == 0 and capsys.readouterr() == (saved, "")
        assert report_saved([]) == 130 and capsys.readouterr() == ("", "")
        result = SimpleNamespace(step=3, stopped="signal", is_main_process=rank == "0")
        assert not report_end(result, 9) and capsys.readouterr() == ("", stopped)  # type: ignore[arg-type]
