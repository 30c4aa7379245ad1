"""What a decoder learns from another one (paper §2.2.3: FSAE-Lite starts as a part of FSAE-Standard).

Lite has the Standard decoder's kernels in narrower outer stages and another view of time, so a frozen Standard can show
it, stage by stage, what its features should be, and in the end the pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fsae.decoder import Decoder


def shared_stages(student_widths: Sequence[int], teacher_widths: Sequence[int]) -> list[int]:
    """The decoder stages of equal width, fine to coarse: those whose features can be compared."""
    return [s for s, (mine, its) in enumerate(zip(student_widths, teacher_widths, strict=True)) if mine == its]


@contextmanager
def recorded(decoder: Decoder, stages: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While it is open, the dictionary is filled with what these stages of a running decoder give."""
    features: dict[int, Tensor] = {}

    def keep(stage: int, output: Tensor) -> None:
        features[stage] = output

    handles = [
        decoder.stages[s].register_forward_hook(lambda _module, _inputs, output, s=s: keep(s, output)) for s in stages
    ]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def feature_distance(student: Mapping[int, Tensor], teacher: Mapping[int, Tensor]) -> Tensor:
    """mean over stages of ||student - teacher||² / ||teacher||²: each stage counts alike, whatever its scale."""
    if student.keys() != teacher.keys() or not student:
        raise ValueError(f"features of the stages {sorted(student)} and {sorted(teacher)} cannot be compared")
    terms = []
    for stage, target in teacher.items():
        target = target.detach().float()
        terms.append((student[stage].float() - target).square().sum() / target.square().sum().clamp(min=1e-12))
    return torch.stack(terms).mean()
