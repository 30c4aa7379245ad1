"""The parts of the stages: patches in the loss, the adversary, the alignment, the frozen encoder, the distillation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsae import planned
from fsae.errors import UserError
from fsae.layers.attention import FirstFrameAttention
from fsae.layers.motion import FirstFrameSampling
from fsae.losses.alignment import TrunkTeacher, teacher_features
from fsae.losses.distillation import feature_distance, recorded, shared_stages
from fsae.losses.perceptual import PerceptualLoss
from fsae.model import FSAE
from fsae.stages.config import (
    AdversarialConfig,
    AlignmentConfig,
    AutoencoderConfig,
    DistillationConfig,
    PatchConfig,
)
from fsae.stages.objective import Adversary, Alignment, Distillation, Lpips, Objective
from fsae.stages.patches import draw_patch, draw_span
from fsae.stages.task import AutoencoderTask
from fsae.training.config import LoopConfig, OptimizerConfig
from fsae.training.loop import train
from fsae.weights.variants import to_lite, to_standard


def tiny(**options: Any) -> FSAE:
    """With every path open: injection, offsets, noise."""
    torch.manual_seed(0)
    model = FSAE.from_preset("tiny", **{"noise": 0.05, **options})
    for module in model.modules():
        if isinstance(module, FirstFrameAttention):
            torch.nn.init.normal_(module.to_out.weight, std=0.3)
        elif isinstance(module, FirstFrameSampling):
            torch.nn.init.ones_(module.strength)
    return model


def clip(frames: int = 5, height: int = 64, width: int = 64, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(**parts: Any) -> AutoencoderConfig:
    """A training of nothing, with these parts."""
    return AutoencoderConfig("none", LoopConfig("none"), **parts)


class Clips(torch.utils.data.Dataset[dict[str, Any]]):
    """A few clips of noise."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"video": clip(seed=index)[0]}


# An epsilon of 1 makes the first update a known function of the gradient: -lr g / (|g| + 1).
KNOWN = OptimizerConfig(learning_rate=0.1, eps=1.0)


def one_step(folder: Path, **changes: Any) -> LoopConfig:
    """The training of one known update."""
    settings = {"max_steps": 1, "max_grad_norm": 0.0, "ema_decay": 0.0, "tensorboard": False, **changes}
    return LoopConfig(str(folder), optimizer=KNOWN, **settings)


# --- the whole objective


def test_every_term_by_its_formula(lpips_state: dict[str, Tensor]) -> None:
    model, video = tiny(decoder_kind="causal", first_frame_injection=False, noise=0.0), clip(5)
    perceptual = PerceptualLoss(lpips_state)
    adversary = Adversary(AdversarialConfig(weight=0.1, width=2))
    alignment = Alignment(model, TrunkTeacher(perceptual), AlignmentConfig("lpips", weight=0.5, positions=10_000))
    objective = Objective(Lpips(perceptual, 0.1, slice_frames=2), adversary, alignment)
    task = AutoencoderTask(settings(), model, objective)
    terms = task.loss({"video": video}, seeded())
    with torch.no_grad():
        latents = model.encoder(video)
        made = model(video)
        expected = {
            "l1": (made - video).abs().mean(),
            "perceptual": torch.stack([perceptual(made[:, :, t], video[:, :, t]) for t in range(5)]).mean(),
            "adversarial": torch.stack([F.softplus(-s).mean() for s in adversary.discriminator(made)]).mean(),
        }
        parts = alignment.loss(latents, teacher_features(alignment.teacher, video, 4))
        expected |= {"alignment_cosine": parts.cosine, "alignment_distance": parts.distance}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-6)
    whole = expected["l1"] + 0.1 * expected["perceptual"] + 0.1 * expected["adversarial"] + 0.5 * parts.total
    torch.testing.assert_close(terms["loss"], whole, rtol=1e-4, atol=1e-6)
    assert torch.equal(terms["keep_target"], video) and terms["keep_reconstruction"].shape == video.shape
    assert set(task.modules) == {"autoencoder", "alignment"} and set(task.opponents) == {"discriminator"}
    assert set(task.frozen) == {"perceptual", "teacher"}
    terms["loss"].backward()
    assert alignment.loss.projection.weight.grad is not None and alignment.loss.projection.weight.grad.any()


def test_the_adaptive_alignment_balances_gradients(lpips_state: dict[str, Tensor]) -> None:
    model, video = tiny(noise=0.0), clip(5)
    teacher = TrunkTeacher(PerceptualLoss(lpips_state))
    config = AlignmentConfig("lpips", cosine_margin=0.0, distance_margin=0.0, adaptive=0.3)
    alignment = Alignment(model, teacher, config)
    terms = AutoencoderTask(settings(), model, Objective(alignment=alignment)).loss({"video": video}, seeded())
    weight = model.encoder.conv_out.weight
    total = terms["alignment_cosine"] + terms["alignment_distance"]
    sizes = [torch.autograd.grad(x, weight, retain_graph=True)[0].norm() for x in (terms["l1"], total)]
    torch.testing.assert_close(terms["alignment_weight"], 0.3 * sizes[0] / (sizes[1] + 1e-4))
    torch.testing.assert_close(terms["loss"], terms["l1"] + terms["alignment_weight"] * total)


def test_the_task_takes_its_loss_in_the_core(lpips_state: dict[str, Tensor]) -> None:
    model, video = tiny(), clip(5, 128, 128)
    perceptual = PerceptualLoss(lpips_state)
    task = AutoencoderTask(settings(patch=PatchConfig(13)), model, Objective(Lpips(perceptual, 0.1)))
    terms = task.loss({"video": video}, seeded())
    generator = seeded()
    whole = model(video, generator)  # draws the noise first
    patch = draw_patch(16, 16, 13, 4, generator)
    assert patch is not None
    made, target = (patch.core.scaled(8).crop(x) for x in (whole, video))
    torch.testing.assert_close(terms["l1"], (made - target).abs().mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["perceptual"], perceptual(made, target), rtol=1e-4, atol=1e-5)
    whole_frames = AutoencoderTask(settings(patch=PatchConfig(13, above=128 * 128)), model)
    unpatched = whole_frames.loss({"video": video}, seeded())
    torch.testing.assert_close(unpatched["l1"], (whole - video).abs().mean())


def test_the_task_takes_its_loss_in_a_part_of_the_clip() -> None:
    model, video = tiny(decoder_kind="causal"), clip(13, 64, 64)
    task = AutoencoderTask(settings(patch=PatchConfig(latents=2)), model)
    terms = task.loss({"video": video}, seeded())
    whole = model(video, seeded())
    torch.testing.assert_close(terms["l1"], (whole - video)[:, :, :5].abs().mean(), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"patch\.latents is 8.*more than 8"):
        AutoencoderTask(settings(patch=PatchConfig(latents=8)), tiny())
    teacher = Objective(distillation=Distillation(lite_of(standard := tiny()), standard, DistillationConfig("s")))
    imitating = AutoencoderTask(settings(patch=PatchConfig(latents=9), freeze_encoder=True), lite_of(standard), teacher)
    assert imitating.reach == standard.decoder.reach == (8, 8)


@pytest.mark.parametrize("parts", [{}, {"freeze_encoder": True}, {"patch": PatchConfig(13)}], ids=str)
def test_memory_changes_neither_loss_nor_gradients(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    video, plans, results = clip(9, 128, 128).double(), [], []
    plan = planned.plan_recomputed
    monkeypatch.setattr(planned, "plan_recomputed", lambda *a: plans.append(plan(*a)) or plans[-1])
    for memory in (None, 90_000_000):
        model = tiny(decoder_kind="lite").double()
        if memory:
            model.enable_gradient_checkpointing()
        task = AutoencoderTask(settings(gradient_checkpointing=memory is not None, memory=memory, **parts), model)
        loss = task.loss({"video": video}, seeded())["loss"]
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append([loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    half = len(plans) // 2
    assert all(len(p.windows) == 1 and p.latents == 3 for p in plans[:half])
    assert all(len(p.windows) > 1 or p.latents < 3 for p in plans[half:])


def test_memory_is_for_what_is_computed_anew() -> None:
    with pytest.raises(UserError, match="gradient_checkpointing to true"):
        settings(memory=1)


def test_a_patch_without_a_core_is_refused() -> None:
    with pytest.raises(UserError, match=r"patch\.cells is 8.*more than 8"):
        AutoencoderTask(settings(patch=PatchConfig(8)), tiny())


# --- the adversary


def test_discriminator_and_autoencoder_each_follow_their_own_loss(tmp_path: Path) -> None:
    model = tiny(noise=0.0)
    adversary = AdversarialConfig(0.1, width=2, r1_gamma=5.0, optimizer=KNOWN)
    task = AutoencoderTask(settings(adversarial=adversary), model)
    discriminator, video = task.opponents["discriminator"], clip()
    terms = task.loss({"video": video}, seeded())
    expected = {}
    for module, loss in ((model, terms["loss"]), (discriminator, None)):
        if loss is None:
            kept = {k: v.detach() for k, v in terms.items() if k.startswith("keep_")}
            loss = task.opponent_loss({"video": video}, kept, seeded(), 0)["loss"]
        slopes = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        for p, g in zip(module.parameters(), slopes, strict=True):
            expected[p] = p.detach().clone() if g is None else p.detach() - 0.1 * g / (g.abs() + 1)
    train(task, [{"video": video[0]}], one_step(tmp_path))
    for p, value in expected.items():
        torch.testing.assert_close(p.detach(), value, rtol=1e-4, atol=1e-5)


def test_r1_is_lazy_and_the_start_is_waited_for() -> None:
    config = AdversarialConfig(weight=0.1, start=3, width=2, r1_gamma=4.0, r1_every=2)
    task = AutoencoderTask(settings(adversarial=config), tiny())
    video = clip()
    for step, present, lazy in ((2, False, False), (3, True, False), (4, True, True)):
        task.step = step
        terms = task.loss({"video": video}, seeded())
        assert ("adversarial" in terms) == present == ("keep_target" in terms)
        against = task.opponent_loss({"video": video}, terms, seeded(), step)
        assert ("loss" in against) == present and ("r1" in against) == lazy
    torch.testing.assert_close(against["loss"], against["logistic"] + 2 * 4.0 / 2 * against["r1"])
    none = Adversary(replace(config, r1_gamma=0.0))
    assert "r1" not in none.loss(video, video, 4)


def test_before_its_start_the_discriminator_does_not_change(tmp_path: Path) -> None:
    task = AutoencoderTask(settings(adversarial=AdversarialConfig(weight=0.1, start=1, width=2)), tiny())
    before = {k: v.clone() for k, v in task.opponents["discriminator"].state_dict().items()}
    train(task, Clips(), one_step(tmp_path / "a"))
    assert all(torch.equal(v, before[k]) for k, v in task.opponents["discriminator"].state_dict().items())
    train(task, Clips(), one_step(tmp_path / "b", max_steps=2))
    assert not any(torch.equal(v, before[k]) for k, v in task.opponents["discriminator"].state_dict().items())


# --- the decoder's fine-tuning and distillation


def test_a_frozen_encoder_stays_what_it_is(tmp_path: Path) -> None:
    causal = tiny(decoder_kind="causal", first_frame_injection=False)
    model = to_standard(causal)
    task = AutoencoderTask(settings(freeze_encoder=True), model)
    task.loss({"video": clip()}, seeded())["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.encoder.parameters())
    assert all(stage.injection.strength.grad.any() for stage in model.decoder.stages[:3])
    assert all(stage.injection.to_out.weight.grad.any() for stage in model.decoder.stages[3:])
    model.zero_grad()
    train(task, Clips(), one_step(tmp_path, max_steps=2))
    assert all(torch.equal(v, causal.encoder.state_dict()[k]) for k, v in model.encoder.state_dict().items())
    before = to_standard(causal).decoder.state_dict()
    changed = [not torch.equal(v, before[k]) for k, v in model.decoder.state_dict().items()]
    assert sum(changed) > 0.8 * len(changed)


def lite_of(standard: FSAE) -> FSAE:
    return to_lite(standard, decoder_widths=(4, 4, *standard.config.widths[2:]))


def test_distillation_compares_what_can_be_compared() -> None:
    assert shared_stages((4, 8, 16), (8, 8, 16)) == [1, 2]
    a = {2: torch.tensor([1.0, 2.0]), 3: torch.tensor([3.0])}
    b = {2: torch.tensor([2.0, 2.0]), 3: torch.tensor([1.0])}
    assert feature_distance(a, b).item() == pytest.approx((1 / 8 + 4 / 1) / 2)
    with pytest.raises(ValueError, match="cannot be compared"):
        feature_distance(a, {2: b[2]})
    model = tiny()
    with recorded(model.decoder, [1, 4]) as features:
        model(clip())
    assert {s: f.shape[1:] for s, f in features.items()} == {1: (8, 3, 32, 32), 4: (8, 2, 4, 4)}
    features.clear()
    model(clip())
    assert not features


@pytest.mark.parametrize(("cells", "latents"), [(0, 0), (13, 0), (13, 9)])
def test_distillation_terms(cells: int, latents: int) -> None:
    standard = tiny()
    lite, video = lite_of(standard), clip(37 if latents else 5, 128, 128)
    config = DistillationConfig("standard", pixel_weight=0.7, feature_weight=0.3)
    objective = Objective(distillation=Distillation(lite, standard, config))
    task = AutoencoderTask(settings(patch=PatchConfig(cells, latents=latents), freeze_encoder=True), lite, objective)
    terms = task.loss({"video": video}, seeded())
    generator, outputs = seeded(), []
    for model in (lite, standard):
        with torch.no_grad(), recorded(model.decoder, range(2, 7)) as features:
            outputs.append((model(video, generator := seeded()), dict(features)))
    (mine, mine_features), (its, its_features) = outputs
    if cells:
        patch = draw_patch(16, 16, cells, 4, generator)
        assert patch is not None
        if latents:
            spans = draw_span(10, latents, (8, 8), generator)
            assert spans is not None
            patch = replace(patch, span=spans[0], core_span=spans[1])
        mine, its = (patch.target(x, 8, 4) for x in (mine, its))
        mine_features[2], its_features[2] = (patch.target(f[2], 2, 1) for f in (mine_features, its_features))
    relative = [
        (mine_features[s] - its_features[s]).square().sum() / its_features[s].square().sum() for s in range(2, 7)
    ]
    torch.testing.assert_close(terms["distillation_pixels"], (mine - its).abs().mean(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(terms["distillation_features"], torch.stack(relative).mean(), rtol=1e-3, atol=1e-6)
    whole = terms["l1"] + 0.7 * terms["distillation_pixels"] + 0.3 * terms["distillation_features"]
    torch.testing.assert_close(terms["loss"], whole)
    terms["loss"].backward()
    assert all(p.grad is None for p in standard.parameters())


def test_a_teacher_of_other_latents_is_refused() -> None:
    standard = tiny()
    lite = lite_of(standard)
    with torch.no_grad():
        next(lite.encoder.parameters()).add_(1)
    with pytest.raises(UserError, match="another encoder"):
        Distillation(lite, standard, DistillationConfig("standard"))


def test_lite_learns_from_its_teacher_and_not_to_be_like_another(tmp_path: Path) -> None:
    attending = {"noise": 0.0, "injection_sampling": False, "shortcut": "dc-ae"}
    standard = tiny(**attending)
    lite, video = lite_of(standard), clip(1)
    torch.manual_seed(5)
    other = FSAE.from_preset("tiny", **attending)
    objective = Objective(distillation=Distillation(lite, standard, DistillationConfig("standard", 1.0, 1.0)))
    task = AutoencoderTask(settings(freeze_encoder=True), lite, objective)

    def distances() -> list[float]:
        with torch.no_grad():
            kept, latents = standard.encoder.features(video)
            first = [feature[:, :, 0] for feature in kept]
            made, its, others = (m.decoder(latents, first, seeded()) for m in (lite.eval(), standard, other))
        return [(made - target).abs().mean().item() for target in (its, others)]

    before = distances()
    task.loss_of_all, task.loss = task.loss, lambda batch, generator: distilled_alone(task, batch, generator)
    loop = LoopConfig(str(tmp_path), max_steps=40, optimizer=OptimizerConfig(3e-3), ema_decay=0.0, tensorboard=False)
    train(task, [{"video": video[0]}], loop)
    after = distances()
    assert after[0] < 0.6 * before[0] and after[1] > 0.9 * before[1]


def distilled_alone(task: Any, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
    terms = task.loss_of_all(batch, generator)
    return {"loss": terms["distillation_pixels"] + terms["distillation_features"]}
