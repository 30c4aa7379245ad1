"""The refiner's condition: the dynamic mask against its formula, the first frame, the deviation estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fsae.errors import UserError
from fsdit import FSDiT
from fsdit.conditioning import Context, FlowBatch, first_frame_condition
from fsdit.flow.path import FlowSchedule, interpolate
from fsupsampler import LatentUpsampler
from fsupsampler.refiner import (
    DynamicMask,
    RunningMask,
    deviation_estimate,
    deviation_latents,
    error_map,
    refiner_condition,
)


def latents(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def formula(z: np.ndarray, u: np.ndarray, mask: DynamicMask) -> np.ndarray:
    """m(h, w) of one sample, cell by cell; z is C h w and u is C t h w."""
    low, high, e5, e95 = (mask.config[name] for name in ("low", "high", "error_5", "error_95"))
    out = np.empty(z.shape[1:])
    for i in range(z.shape[1]):
        for j in range(z.shape[2]):
            error = sum(abs(z[c, i, j] - u[c, 0, i, j]) for c in range(len(z))) / len(z)
            out[i, j] = high - (high - low) * min(max((error - e5) / (e95 - e5), 0.0), 1.0)
    return out


def test_the_condition_is_the_formula() -> None:
    first, upsampled = latents(2, 5, 1, 3, 4), latents(2, 5, 4, 3, 4, seed=1)
    mask = DynamicMask(low=0.2, high=0.8, error_5=0.7, error_95=1.4)
    condition = refiner_condition(first, upsampled, mask)
    assert condition.latents.shape == upsampled.shape and condition.mask.shape == (2, 4, 4, 3, 4)
    assert torch.equal(condition.latents[:, :, :1], first)
    assert torch.equal(condition.latents[:, :, 1:], upsampled[:, :, 1:])
    assert condition.mask[:, :, 0].eq(1).all()
    for sample in range(2):
        expected = formula(first[sample, :, 0].numpy(), upsampled[sample].numpy(), mask)
        for channel in range(4):
            for frame in range(1, 4):
                found = condition.mask[sample, channel, frame].numpy()
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert {0.2, 0.8} <= {round(v, 9) for v in condition.mask.unique().tolist()}  # both ends are reached


def test_the_mask_stays_in_its_range_and_falls_with_the_error() -> None:
    mask = DynamicMask(error_5=0.5, error_95=2.0)
    error = torch.linspace(0, 4, 41, dtype=torch.float64).view(1, 1, 1, 1, -1)
    values = mask(error).flatten()
    assert values[0] == 0.9 and values[-1] == pytest.approx(0.1)
    assert (values.diff() <= 0).all() and values.min() >= 0.1 - 1e-12 and values.max() <= 0.9


def test_a_perfect_draft_is_trusted_most_and_never_as_much_as_the_truth() -> None:
    upsampled = latents(1, 5, 3, 2, 2)
    mask = refiner_condition(upsampled[:, :, :1], upsampled, DynamicMask(error_5=0.1)).mask
    assert torch.equal(mask[:, :, 1:], torch.full_like(mask[:, :, 1:], 0.9)) and mask[:, :, 0].eq(1).all()


def test_scalar_gives_the_frame_one_value_and_inverted_turns_it_over() -> None:
    error = latents(2, 1, 1, 3, 3).abs()
    plain, scalar, inverted = (
        DynamicMask(error_5=0.2, error_95=1.5, **switch) for switch in ({}, {"scalar": True}, {"inverted": True})
    )
    per_frame = error.mean((-2, -1), keepdim=True)
    assert torch.equal(scalar(error), plain(per_frame).expand_as(error))
    assert plain(error).std() > 0 and scalar(error)[0].std() < 1e-12
    assert torch.allclose(inverted(error) + plain(error), torch.tensor(1.0, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("mask_channels", [1, 4])
def test_an_image_has_only_its_certain_frame(mask_channels: int) -> None:
    condition = refiner_condition(latents(1, 5, 1, 2, 2), latents(1, 5, 1, 2, 2), DynamicMask(), mask_channels)
    assert condition.mask.shape == (1, mask_channels, 1, 2, 2) and condition.mask.eq(1).all()


def test_a_half_precision_draft_gives_a_half_precision_condition() -> None:
    first, upsampled = latents(1, 5, 1, 2, 2).half(), latents(1, 5, 2, 2, 2).half()
    condition = refiner_condition(first, upsampled, DynamicMask())
    assert condition.latents.dtype == condition.mask.dtype == torch.float16
    assert error_map(first, upsampled).dtype == torch.float32


def test_latents_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        error_map(latents(1, 5, 1, 2, 2), latents(1, 5, 3, 4, 4))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"low": 0.9, "high": 0.1}, "mask range"), ({"error_5": 1.0, "error_95": 1.0}, "error bounds")],
)
def test_an_impossible_mask_is_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DynamicMask(**options)


# --- percentiles from training ----


def test_running_percentiles_are_those_of_the_errors() -> None:
    errors = latents(20, 1, 1, 8, 8).abs()
    running = RunningMask(DynamicMask(), decay=0.99).double()
    for error in errors.split(2):
        running(error)
    frozen = running.frozen()
    for found, q in ((frozen.config.error_5, 5), (frozen.config.error_95, 95)):
        expected = np.mean([np.percentile(part.numpy(), q) for part in errors.split(2)])
        assert found == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(frozen(errors), running.eval()(errors), atol=1e-7)


def test_running_percentiles_follow_a_change_and_rest_in_eval_mode() -> None:
    running = RunningMask(DynamicMask(), decay=0.5)
    error = latents(1, 1, 1, 8, 8, dtype=torch.float32).abs()
    for _ in range(20):
        running(error)
    before = running.error_95.item()
    running.eval()(10 * error)
    assert running.error_95.item() == before
    running.train()
    for _ in range(20):
        running(10 * error)
    assert running.error_95.item() == pytest.approx(10 * before, rel=1e-3)


def test_running_mask_keeps_range_switches_and_state() -> None:
    running = RunningMask(DynamicMask(0.2, 0.7, scalar=True, inverted=True))
    running(latents(1, 1, 1, 4, 4, dtype=torch.float32).abs())
    frozen = running.frozen().config
    assert (frozen.low, frozen.high, frozen.scalar, frozen.inverted) == (0.2, 0.7, True, True)
    other = RunningMask(DynamicMask())
    other.load_state_dict(running.state_dict())
    assert torch.equal(other.error_5, running.error_5) and other.updates == 1


def test_equal_errors_everywhere_give_a_finite_mask() -> None:
    running = RunningMask(DynamicMask())
    error = torch.ones(1, 1, 1, 2, 2)
    assert running(error).isfinite().all() and running.frozen()(error).isfinite().all()


def one_rank(rank: int, folder: Path) -> None:
    """Two batches of each process; the first of rank 1 is of pictures, which have no error map."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    running = RunningMask(DynamicMask(), decay=0.9)
    for step in range(2):
        if (rank, step) == (1, 0):
            running.pass_by()
        else:
            running(errors_of(rank, step))
    torch.save(running.state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def errors_of(rank: int, step: int) -> Tensor:
    return (1 + rank + 3 * step) * latents(1, 1, 1, 8, 8, dtype=torch.float32).abs()


def test_processes_hold_the_same_percentiles(tmp_path: Path) -> None:
    """Those of both: the first batch's of rank 0 alone, the second's the mean of two."""
    torch.multiprocessing.spawn(one_rank, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second and first["updates"] == 2
    at = {key: [np.percentile(errors_of(*key).numpy(), q) for q in (5, 95)] for key in ((0, 0), (0, 1), (1, 1))}
    for place, name in enumerate(("error_5", "error_95")):
        expected = (at[0, 0][place] + (at[0, 1][place] + at[1, 1][place]) / 2) / 2
        assert first[name].item() == pytest.approx(expected, rel=1e-5)


# --- saving ----


class ToyPipeline(DiffusionPipeline):
    """A pipeline with nothing but the upsampling's parts."""

    def __init__(self, upsampler: LatentUpsampler, dynamic_mask: DynamicMask) -> None:
        super().__init__()
        self.register_modules(upsampler=upsampler, dynamic_mask=dynamic_mask)


def test_a_pipeline_saves_and_loads_upsampler_and_mask(tmp_path: Path) -> None:
    mask = DynamicMask(0.2, 0.8, error_5=0.123456789, error_95=0.987654321, inverted=True)
    upsampler = LatentUpsampler.from_preset("tiny")
    ToyPipeline(upsampler, mask).save_pretrained(tmp_path)
    assert (tmp_path / "dynamic_mask" / "mask_config.json").is_file()
    loaded = ToyPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert isinstance(loaded.dynamic_mask, DynamicMask) and loaded.upsampler.dtype == torch.float16
    for name in ("low", "high", "error_5", "error_95", "scalar", "inverted"):
        assert loaded.dynamic_mask.config[name] == mask.config[name]


def test_a_mask_is_saved_and_loaded_alone(tmp_path: Path) -> None:
    DynamicMask(error_5=0.25, error_95=0.5).save_pretrained(tmp_path)
    loaded = DynamicMask.from_pretrained(tmp_path)
    assert (loaded.config.error_5, loaded.config.error_95) == (0.25, 0.5)


# --- deviation-based estimate ----


@pytest.mark.parametrize("level", [0.001, 0.3, 0.7, 1.0])
def test_the_deviation_estimate_is_the_truth_off_by_the_velocitys_error(level: float) -> None:
    clean, noise, predicted = (latents(2, 5, 3, 2, 2, seed=seed) for seed in range(3))
    true_velocity = noise - clean
    sigma = torch.full((2,), level, dtype=torch.float64)
    noisy = interpolate(clean, noise, sigma)
    estimate = deviation_estimate(noise, predicted)
    assert torch.allclose(estimate, clean + (true_velocity - predicted), rtol=0, atol=1e-12)
    assert torch.allclose(deviation_estimate(noise, true_velocity), clean, rtol=0, atol=1e-12)
    # The usual estimate ẑ_0 = z_σ - σ·v̂ is off by σ times as much.
    predicted_clean = noisy - level * predicted
    assert torch.allclose(predicted_clean - clean, level * (estimate - clean), rtol=0, atol=1e-12)


def test_deviation_latents_ask_the_base_model_once_at_sigma() -> None:
    torch.manual_seed(0)
    base = FSDiT.from_preset("tiny", text_dim=8, text_len=4, image_dim=8, latent_channels=5).double().eval()
    torch.nn.init.normal_(base.head.head.weight, std=0.2)
    clean, noise = latents(2, 5, 3, 2, 2), latents(2, 5, 3, 2, 2, seed=1)
    sigma = FlowSchedule().sample(2, torch.Generator().manual_seed(0)).double()
    known = first_frame_condition(clean[:, :, :1], 3)
    context = Context(latents(2, 4, 8), latents(2, 3, 8))
    found = deviation_latents(base, FlowBatch(clean, known, context), noise, sigma)
    s = sigma.view(-1, 1, 1, 1, 1)
    mask = torch.zeros(2, 4, 3, 2, 2, dtype=torch.float64)
    mask[:, :, 0] = 1
    condition = torch.zeros_like(clean)
    condition[:, :, 0] = clean[:, :, 0]
    inputs = torch.cat(((1 - s) * clean + s * noise, mask, condition), dim=1)
    expected = noise - base(inputs, 1000 * sigma, context.text, context.image)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12) and not found.requires_grad
