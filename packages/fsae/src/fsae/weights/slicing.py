"""A decoder with fewer channels in its outermost stages (paper §2.2.3, FSAE-Lite): which stay, and what they take on.

Three kinds of channels are chosen:

* those between the two convolutions of a residual block: each block for itself;
* those of a stage's residual stream: one choice for all that writes to it and reads from it;
* the streams of neighbouring stages together, where the shortcut between them demands it.

For the step up from a stage of C' channels to one of C has a shortcut without weights: with r = 4C/C', channel c of its
output is made of the inputs (4c + k) // r, k = 0..3, one for each of the four pixels. If both widths shrink by the same
factor, r stays, and the shortcut of the kept channels is exactly what it was if the coarser stage keeps just the inputs
of those that the finer one keeps, in their order. So it is between stages 1 and 0 of the paper's sizes: 128 -> 64 and
256 -> 128, channel c of stage 0 with channels 2c and 2c + 1 of stage 1.

If only the finer stage shrinks, r does not stay: from stage 2 (512, untouched) to stage 1 a channel was made of two
inputs and is now made of four, and of others. No choice of channels mends that, and this is what is approximated: the
mean over a cell's four pixels is put right through the centre of the up-convolution, which is linear in the same
inputs; what the four pixels differ by within a cell stays wrong, for the fine-tuning.

Channels are ranked by their magnitude as the decoder runs, a channel's root mean square times the norm of the kernels
that read it. (The weights alone do not tell: ranked by them the trained nano decoder lost more than by chance.) And
what a dropped channel gave is not only missing: a kernel that read all channels x now reads the kept ones x_K, and is
the one that is nearest to it in the mean square, W' = W · E[x x_Kᵀ] E[x_K x_Kᵀ]⁻¹. Norms are scaled by the level of the
kept channels against that of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.decoder import Decoder, DecoderStage
from fsae.layers.blocks import ResBlock
from fsae.layers.motion import FirstFrameSampling
from fsae.layers.norm import PixelNorm
from fsae.layers.resample import Upsample

RIDGE = 1e-3
"""How far W' is drawn to the plain slice of W, against the mean energy of a kept channel."""


class Moments:
    """Second moments E[x xᵀ] `C C` over all positions, fp64, of what enters a decoder's layers while it runs."""

    def __init__(self) -> None:
        self._sums: dict[nn.Module, Tensor] = {}
        self._counts: dict[nn.Module, int] = {}

    def __getitem__(self, layer: nn.Module) -> Tensor:
        return self._sums[layer] / self._counts[layer]

    @contextmanager
    def watching(self, decoder: Decoder, stages: int) -> Iterator[None]:
        """Take the moments of the layers of the `stages` finest stages for as long as the context lasts."""
        handles = [layer.register_forward_pre_hook(self._add) for layer in _layers(decoder, stages)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().double().transpose(0, 1).flatten(1)
        self._sums[layer] = self._sums.get(layer, x.new_zeros(())) + x @ x.T
        self._counts[layer] = self._counts.get(layer, 0) + x.shape[1]


def _layers(decoder: Decoder, stages: int) -> Iterator[nn.Module]:
    for s in range(stages):
        step, blocks = _stage(decoder, s)
        if step is not None:
            yield step
        for block in blocks:
            yield from (block.conv1, block.conv2, block.norm)
    yield from (decoder.norm_out, decoder.conv_out)


def _stage(decoder: Decoder, s: int) -> tuple[Upsample | None, list[ResBlock]]:
    """The step up to a stage of residual blocks, and the blocks."""
    stage = decoder.stages[s]
    assert isinstance(stage, DecoderStage)
    return stage.up, [block for block in stage.blocks if isinstance(block, ResBlock)]


def kept_channels(decoder: Decoder, old: Sequence[int], new: Sequence[int], moments: Moments) -> list[Tensor]:
    """The channels of each stage's residual stream that a decoder of widths `new` keeps of one of widths `old`.

    Stages are gone through from fine to coarse; those whose shortcuts pass unchanged between them are chosen as one, by
    the finest one's channels with all that feeds them.

    Returns:
        For each stage the indices, ascending: the order in which they are kept.
    """
    kept: list[Tensor] = []
    scores = [_magnitude(decoder, s, moments) if new[s] < old[s] else torch.ones(old[s]) for s in range(len(old))]
    while len(kept) < len(old):
        s = len(kept)
        # A unit is a channel of stage s; in each coarser stage of its chain it stands for all that it is made of.
        units = [torch.arange(old[s]).unsqueeze(1)]
        while (last := s + len(units) - 1) + 1 < len(old) and _passes(old, new, last):
            units.append(_feeders(old[last], old[last + 1])[units[-1]].flatten(1))
        score = sum(scores[s + i][unit].sum(1) for i, unit in enumerate(units))
        assert isinstance(score, Tensor)
        best = score.topk(new[s]).indices.sort().values
        kept.extend(unit[best].flatten() for unit in units)
    return kept


def _passes(old: Sequence[int], new: Sequence[int], s: int) -> bool:
    """Whether the shortcut from stage s + 1 to s can stay what it is: r stays, and no two channels share an input."""
    return old[s + 1] % old[s] == 0 and new[s] * old[s + 1] == old[s] * new[s + 1]


def _feeders(channels: int, inputs: int) -> Tensor:
    """The inputs that each channel of a step up copies, `channels m`: m = inputs / channels consecutive ones."""
    return torch.arange(inputs).view(channels, inputs // channels)


def _magnitude(decoder: Decoder, s: int, moments: Moments) -> Tensor:
    """How much each channel of a stage's stream carries to what reads it, against the stage's mean, `C`."""
    readers: list[tuple[nn.Module, Tensor]] = []
    for block in _stage(decoder, s)[1]:
        readers.append((block.conv1, _energy(block.conv1.weight, 1)))
    step = _stage(decoder, s - 1)[0] if s > 0 else None
    if step is not None:
        readers.append((step, _energy(step.conv.weight, 1)))
    else:
        energy = _energy(decoder.conv_out.weight, 1)
        if decoder.norm_out.weight is not None:
            energy = energy * decoder.norm_out.weight.detach().double().square()
        readers.append((decoder.norm_out, energy))
    score = torch.stack([moments[reader].diagonal() * weight for reader, weight in readers]).sum(0).sqrt()
    return (score / score.mean()).cpu()


def _energy(weight: Tensor, axis: int) -> Tensor:
    """The sum of squares of each output channel (axis 0) or input channel (1) of a kernel, fp64."""
    return weight.detach().double().square().transpose(0, axis).flatten(1).sum(1)


def narrowed(decoder: Decoder, stages: int, kept: Sequence[Tensor], moments: Moments) -> dict[str, Tensor]:
    """The tensors of the `stages` finest stages and of the end, kept channels alone, by their names in the decoder."""
    state: dict[str, Tensor] = {}
    for s in range(stages):
        stream, place = kept[s], f"stages.{s}"
        step, blocks = _stage(decoder, s)
        if step is not None:
            conv = step.conv
            assert conv.bias is not None
            kernel = _fold_in(conv.weight[stream], kept[s + 1], moments[step])
            lacking = _shortcut_mean(conv.out_channels, conv.in_channels)[stream][:, kept[s + 1]]
            lacking = lacking - _shortcut_mean(len(stream), len(kept[s + 1]))
            kernel[:, :, conv.current_tap, 1, 1] += lacking.to(kernel)
            state |= {f"{place}.up.conv.weight": kernel, f"{place}.up.conv.bias": conv.bias[stream]}
        injection = decoder.stages[s].injection
        if isinstance(injection, FirstFrameSampling):  # its values are of the stream's channels
            state |= {f"{place}.injection.{name}": p[stream] for name, p in injection.named_parameters()}
            reads = torch.cat([stream, injection.to_value.out_features + stream])
            state[f"{place}.injection.to_gate.weight"] = injection.to_gate.weight[stream][:, reads]
        for b, block in enumerate(blocks):
            tensors = _narrow_block(block, stream, moments)
            state |= {f"{place}.blocks.{b}.{name}": tensor for name, tensor in tensors.items()}
    state |= _narrow_norm(decoder.norm_out, kept[0], moments, "norm_out")
    state["conv_out.weight"] = _fold_in(decoder.conv_out.weight, kept[0], moments[decoder.conv_out])
    return state


def _narrow_block(block: ResBlock, stream: Tensor, moments: Moments) -> dict[str, Tensor]:
    """A residual block with the kept channels of its stream, and as many of those between its convolutions."""
    carried = moments[block.conv2].diagonal() * _energy(block.conv2.weight, 1)
    hidden = carried.topk(len(stream)).indices.sort().values.cpu()
    assert block.conv1.bias is not None
    return {
        "conv1.weight": _fold_in(block.conv1.weight[hidden], stream, moments[block.conv1]),
        "conv1.bias": block.conv1.bias[hidden],
        "conv2.weight": _fold_in(block.conv2.weight[stream], hidden, moments[block.conv2]),
        **_narrow_norm(block.norm, stream, moments, "norm"),
    }


def _fold_in(kernel: Tensor, kept: Tensor, moment: Tensor) -> Tensor:
    """A kernel `O I ...` -> one that reads the kept inputs, `O K ...`, and predicts from them what the others gave."""
    if len(kept) == kernel.shape[1]:
        return kernel.clone()
    among = moment[kept][:, kept]
    ridge = RIDGE * among.diagonal().mean() + torch.finfo(among.dtype).tiny
    # With a row a kept channel: the ridge draws towards the selection, with which the kernel is simply sliced.
    selection = F.one_hot(kept, kernel.shape[1]).to(moment)
    predicted = torch.linalg.solve(among + ridge * torch.eye(len(kept)).to(among), moment[kept] + ridge * selection)
    return torch.einsum("oi...,ki->ok...", kernel.double(), predicted).to(kernel)


def _narrow_norm(norm: PixelNorm, kept: Tensor, moments: Moments, name: str) -> dict[str, Tensor]:
    """A pixel norm over the kept channels, which gives each of them what the norm over all gave it, on average."""
    if norm.weight is None or norm.bias is None:
        return {}
    if len(kept) == len(norm.weight):
        return {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    energy = moments[norm].diagonal()
    ratio = (energy[kept].mean() / energy.mean()).nan_to_num(1.0).sqrt().to(norm.weight)
    return {f"{name}.weight": norm.weight[kept] * ratio, f"{name}.bias": norm.bias[kept]}


def _shortcut_mean(channels: int, inputs: int) -> Tensor:
    """The shortcut of a step up as a matrix `channels inputs`, averaged over the four pixels that a cell becomes."""
    copies = 4 * channels // inputs
    source = torch.arange(4 * channels) // copies
    return F.one_hot(source, inputs).float().view(channels, 4, inputs).mean(1)
