"""What is done to the draft in training: shuffled, replaced, dropped; never the first frame."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Generator, Tensor

from fsae.errors import UserError
from fsdit.conditioning import Condition, first_frame_condition
from fsupsampler.regularization import (
    drop_condition,
    frame_order,
    regularize,
    replace_frames,
    shuffle_frames,
)
from fsupsampler.training.config import RegularizationConfig

T = 7


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def numbered(batch: int, t: int = T) -> Tensor:
    """Latents that say which sample and frame they are: 100·sample + frame."""
    sample, frame = torch.arange(batch).view(-1, 1, 1, 1, 1), torch.arange(t).view(1, 1, -1, 1, 1)
    return (100.0 * sample + frame).expand(batch, 3, t, 2, 2).clone()


def condition(batch: int, t: int = T) -> Condition:
    mask = torch.full((batch, 4, t, 2, 2), 0.5)
    mask[:, :, 0] = 1
    return Condition(numbered(batch, t), mask)


def orders(latents: Tensor) -> list[tuple[int, ...]]:
    return [tuple(int(v) % 100 for v in sample[0, :, 0, 0]) for sample in latents]


# --- shuffle ----


@pytest.mark.parametrize("t", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_an_order_is_a_permutation_that_keeps_frame_0(t: int, kind: int) -> None:
    config = RegularizationConfig(shuffle_ratios=tuple(float(i == kind) for i in range(3)))
    seen = set()
    for seed in range(50):
        order = frame_order(t, config, generator(seed)).tolist()
        assert sorted(order) == list(range(t)) and order[0] == 0
        seen.add(tuple(order))
    assert (len(seen) == 1) == (t < 3 or (t == 4 and kind == 1))  # 1 and 3 are the only distant two of four


def test_neighbours_stay_within_their_window() -> None:
    config = RegularizationConfig(shuffle_ratios=(1, 0, 0), shuffle_window=3)
    starts = set()
    for seed in range(200):
        order = frame_order(T, config, generator(seed))
        moved = (order != torch.arange(T)).nonzero().flatten().tolist()
        if moved:
            assert moved[-1] - moved[0] <= 2
            starts.add(moved[0])
    assert starts >= {1, 2, 3, 4}


def test_the_window_reaches_the_order() -> None:
    spans = []
    for window in (2, 6):
        config = RegularizationConfig(shuffle_ratios=(1, 0, 0), shuffle_window=window)
        moved = [(frame_order(T, config, generator(s)) != torch.arange(T)).nonzero().flatten() for s in range(50)]
        spans.append(max(int(m[-1] - m[0]) for m in moved if len(m)))
    assert spans == [1, 5]


def test_a_distant_swap_moves_two_frames_that_are_not_neighbours() -> None:
    config = RegularizationConfig(shuffle_ratios=(0, 1, 0))
    for seed in range(100):
        order = frame_order(T, config, generator(seed))
        first, second = (order != torch.arange(T)).nonzero().flatten().tolist()
        assert second - first > 1 and order[first] == second and order[second] == first


def test_kinds_come_in_their_ratios() -> None:
    """All three kinds are told by how many frames move at most: 3 in a row, 2 apart, or more."""
    counts: Counter[str] = Counter()
    config = RegularizationConfig()
    draws = 1000
    for seed in range(draws):
        order = frame_order(40, config, generator(seed))
        moved = (order != torch.arange(40)).nonzero().flatten()
        if len(moved) == 2 and moved[1] - moved[0] > 2:
            counts["distant"] += 1
        elif len(moved) > 3:
            counts["all"] += 1
        else:
            counts["neighbours"] += 1
    assert counts["neighbours"] / draws == pytest.approx(0.6, abs=0.06)
    assert counts["distant"] / draws == pytest.approx(0.3, abs=0.06)
    assert counts["all"] / draws == pytest.approx(0.1, abs=0.03)


def test_shuffle_permutes_frames_within_their_sample_in_half_of_the_samples() -> None:
    before = numbered(400)
    after = shuffle_frames(before, RegularizationConfig(), generator())
    assert torch.equal(after[:, :, 0], before[:, :, 0])
    assert torch.equal(after.sort(dim=2).values, before)
    changed = sum(order != tuple(range(T)) for order in orders(after)) / 400
    identity_permutations = 0.6 / 6  # of a window of three
    assert changed == pytest.approx(0.5 * (1 - identity_permutations), abs=0.07)
    assert torch.equal(shuffle_frames(before, RegularizationConfig(shuffle=0.0), generator()), before)


# --- replacement ----


def test_replaced_frames_are_the_true_ones_with_mask_1_and_no_others_change() -> None:
    draft = condition(500)
    clean = numbered(500) + 0.5
    out = replace_frames(draft, clean, RegularizationConfig(), generator())
    replaced = out.latents[:, 0, :, 0, 0] != draft.latents[:, 0, :, 0, 0]
    assert not replaced[:, 0].any()
    where = replaced.view(500, 1, T, 1, 1)
    assert torch.equal(out.latents, torch.where(where, clean, draft.latents))
    assert torch.equal(out.mask, torch.where(where, torch.ones(()), draft.mask))
    # Half of the samples, and in these frames with probability U(0, 0.3): 0.5 · 0.15.
    assert replaced[:, 1:].float().mean().item() == pytest.approx(0.075, abs=0.015)


def test_replacement_options_reach_the_draw() -> None:
    clean = numbered(300) + 0.5

    def share(**options: float) -> float:
        out = replace_frames(condition(300), clean, RegularizationConfig(**options), generator())
        return float((out.mask[:, 0, 1:, 0, 0] == 1).float().mean())

    assert share(replacement=0.0) == 0
    assert share(replacement_fraction=0.0) == 0
    assert share(replacement=1.0, replacement_fraction=1.0) == pytest.approx(0.5, abs=0.05)


# --- dropout ----


def test_a_dropped_condition_is_plain_image_to_video() -> None:
    draft = condition(3)
    dropped = drop_condition(draft, 1.0, generator())
    plain = first_frame_condition(draft.latents[:, :, :1], T)
    assert torch.equal(dropped.latents, plain.latents) and torch.equal(dropped.mask, plain.mask)
    kept = drop_condition(draft, 0.0, generator())
    assert torch.equal(kept.latents, draft.latents) and torch.equal(kept.mask, draft.mask)


def test_samples_are_dropped_whole_and_one_in_ten() -> None:
    out = drop_condition(condition(1000), RegularizationConfig().dropout, generator())
    gone = (out.mask[:, :, 1:] == 0).flatten(1)
    assert torch.equal(gone.all(1), gone.any(1))
    assert torch.equal(gone.all(1), (out.latents[:, :, 1:] == 0).flatten(1).all(1))
    assert gone.all(1).float().mean().item() == pytest.approx(0.1, abs=0.03)


# --- together ----


def test_regularize_follows_its_generator_and_leaves_frame_0() -> None:
    draft, clean = condition(64), numbered(64) + 0.5
    config = RegularizationConfig()
    one, same, other = (regularize(draft, clean, config, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.latents, same.latents) and torch.equal(one.mask, same.mask)
    assert not torch.equal(one.latents, other.latents)
    assert torch.equal(one.latents[:, :, 0], draft.latents[:, :, 0]) and one.mask[:, :, 0].eq(1).all()


def test_a_replaced_frame_keeps_its_place_when_the_draft_is_shuffled() -> None:
    clean = numbered(200) + 0.5
    config = RegularizationConfig(dropout=0.0, replacement=1.0, replacement_fraction=1.0, shuffle=1.0)
    out = regularize(condition(200), clean, config, generator())
    where = (out.mask == 1)[:, :1].expand_as(clean).clone()
    where[:, :, 0] = False
    assert where.any() and torch.equal(out.latents[where], clean[where])


def test_each_can_be_switched_off() -> None:
    off = RegularizationConfig(dropout=0.0, replacement=0.0, shuffle=0.0)
    draft = condition(8)
    out = regularize(draft, numbered(8) + 0.5, off, generator())
    assert torch.equal(out.latents, draft.latents) and torch.equal(out.mask, draft.mask)


@pytest.mark.parametrize(
    "options",
    [{"dropout": 1.5}, {"replacement_fraction": -0.1}, {"shuffle_ratios": (0, 0, 0)}, {"shuffle_window": 1}],
)
def test_impossible_options_are_sentences(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="regularization"):
        RegularizationConfig(**options)  # type: ignore[arg-type]
