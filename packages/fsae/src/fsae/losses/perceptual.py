"""LPIPS, the learned perceptual distance (the paper weighs it by 0.1), from weights given as files.

With f_l the activations of a classifier's layer l, scaled to unit length over channels at each position, and w_l the
learned weights of its channels,

    d(x, y) = sum_l mean_hw sum_c w_lc (f_lc(x) - f_lc(y))^2.

The trunk is AlexNet's or VGG16's feature stack in torchvision's layout; neither torchvision nor a download is needed.

On long clips the trunk's activations are what fills the memory. `temporal_slices` takes a few frames at a time, forward
and back to the reconstruction (paper §2.2.1, the tactics of stage 3), and holds one slice's activations at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fsae.errors import CheckpointError, UserError


class _Conv(NamedTuple):
    """A convolution followed by ReLU."""

    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


class _Trunk(NamedTuple):
    """Stages of convolutions, tapped at their ends; a pooled one starts with a max pool of stride 2."""

    name: str
    stages: tuple[tuple[_Conv, ...], ...]
    pooled: tuple[bool, ...]
    pool: int


_ALEXNET = _Trunk(
    "AlexNet",
    ((_Conv(64, 11, 4, 2),), (_Conv(192, 5, 1, 2),), (_Conv(384),), (_Conv(256),), (_Conv(256),)),
    (False, True, True, False, False),
    3,
)
_VGG16 = _Trunk(
    "VGG16",
    ((_Conv(64),) * 2, (_Conv(128),) * 2, (_Conv(256),) * 3, (_Conv(512),) * 3, (_Conv(512),) * 3),
    (False, True, True, True, True),
    2,
)

# Names in torchvision's files and in those of the LPIPS family. The layers' numbers differ between variants,
# their order does not.
_TRUNK_NAME = re.compile(r"(?:features|net\.slice\d+)\.(\d+)\.(weight|bias)")
_BLUR_NAME = re.compile(r"(?:features|net\.slice\d+)\.\d+\.filt")
_HEAD_NAME = re.compile(r"lin(\d)\.(?:model\.)?1\.weight")


class PerceptualLoss(nn.Module):
    """LPIPS of images or videos.

    The shift-tolerant variant of LPIPS, whose trunk blurs before it subsamples, is recognised by the blur filters among
    its tensors: convolutions and pools then have stride 1, and a binomial 3 x 3 blur of stride 2 follows each that had
    more.

    Args:
        state: trunk weights ("features.0.weight", ...) and heads ("lin0.model.1.weight", ..., each 1 C 1 1) together.

    Raises:
        CheckpointError: the trunk is neither AlexNet nor VGG16, or a tensor is missing or misshapen.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        layers, heads = _split(state)
        self.trunk = _recognise(layers)
        self.blurred = any(_BLUR_NAME.fullmatch(key) for key in state)
        self.convs = nn.ModuleList()
        channels = 3
        specs = [conv for stage in self.trunk.stages for conv in stage]
        for conv, tensors in zip(specs, layers, strict=True):
            stride = 1 if self.blurred else conv.stride
            layer = nn.Conv2d(channels, conv.channels, conv.kernel, stride, conv.padding)
            for name, parameter in layer.named_parameters():
                _copy(parameter, tensors, name, f"convolution {len(self.convs)}'s ")
            self.convs.append(layer)
            channels = conv.channels
        self.heads = nn.ParameterList()
        for number, stage in enumerate(self.trunk.stages):
            head = nn.Parameter(torch.empty(1, stage[-1].channels, 1, 1))
            _copy(head, heads, f"lin{number}", "head ")
            self.heads.append(head)
        # ImageNet's mean and deviation, for images in [-1, 1] instead of [0, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)

    @classmethod
    def from_files(cls, *paths: str | Path) -> PerceptualLoss:
        """Read trunk and heads from one or more files, .safetensors or .pth (read as plain tensors only)."""
        state: dict[str, Tensor] = {}
        for path in paths:
            state.update(_read(Path(path)))
        return cls(state)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images `B 3 H W` in [-1, 1] -> five activations, each of unit length over its channels."""
        x = (images - self.shift) / self.scale
        taps = []
        convs = iter(self.convs)
        for stage, pooled in zip(self.trunk.stages, self.trunk.pooled, strict=True):
            if pooled:
                x = F.max_pool2d(x, self.trunk.pool, 1 if self.blurred else 2)
                x = _blur_and_halve(x) if self.blurred else x
            for conv in stage:
                x = next(convs)(x)
                x = F.relu(_blur_and_halve(x) if self.blurred and conv.stride > 1 else x)
            taps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return taps

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Mean distance of images `B 3 H W` or of videos' frames `B 3 T H W` in [-1, 1], a scalar."""
        if reconstruction.ndim == 5:
            reconstruction, target = (v.transpose(1, 2).flatten(0, 1) for v in (reconstruction, target))
        with torch.no_grad():
            references = self.features(target)
        distance = reconstruction.new_zeros(())
        for x, y, weight in zip(self.features(reconstruction), references, self.heads, strict=True):
            distance = distance + ((x - y).square() * weight).sum(1).mean()
        return distance


def temporal_slices(
    distance: Callable[[Tensor, Tensor], Tensor], reconstruction: Tensor, target: Tensor, frames: int
) -> Tensor:
    """`distance(reconstruction, target)` of videos `B C T H W`, taken over `frames` frames at a time.

    The value and the gradient are those of the whole, for a distance that is a mean over frames; the gradient reaches
    the reconstruction, once differentiable, and nothing else. With 0 frames the clip is not sliced.
    """
    if not 0 < frames < reconstruction.shape[2]:
        return distance(reconstruction, target)
    value: Tensor = _SlicedDistance.apply(reconstruction, target, distance, frames)
    return value


class _SlicedDistance(torch.autograd.Function):
    """Each slice goes forward and back while the whole goes forward; its backward hands on what was gathered."""

    @staticmethod
    def forward(
        ctx: Any, reconstruction: Tensor, target: Tensor, distance: Callable[[Tensor, Tensor], Tensor], frames: int
    ) -> Tensor:
        slope = torch.empty_like(reconstruction) if ctx.needs_input_grad[0] else None
        parts = []
        for start in range(0, reconstruction.shape[2], frames):
            x, y = (video.detach()[:, :, start : start + frames] for video in (reconstruction, target))
            share = x.shape[2] / reconstruction.shape[2]
            with torch.set_grad_enabled(slope is not None):
                x = x.requires_grad_(slope is not None)
                part = share * distance(x, y)
            if slope is not None:
                slope[:, :, start : start + frames] = torch.autograd.grad(part, x)[0]
            parts.append(part.detach())
        ctx.save_for_backward(slope)
        return torch.stack(parts).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (None if slope is None else gradient * slope), None, None, None


def _split(state: Mapping[str, Tensor]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The trunk's convolutions in order and the heads by name; a classifier's other tensors are left out."""
    layers: dict[int, dict[str, Tensor]] = {}
    heads = {}
    for key, tensor in state.items():
        if match := _TRUNK_NAME.fullmatch(key):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        elif match := _HEAD_NAME.fullmatch(key):
            heads[f"lin{match[1]}"] = tensor
    return [layers[number] for number in sorted(layers)], heads


def _recognise(layers: Sequence[Mapping[str, Tensor]]) -> _Trunk:
    for trunk in (_ALEXNET, _VGG16):
        specs = [conv for stage in trunk.stages for conv in stage]
        if len(layers) == len(specs) and "weight" in layers[0] and layers[0]["weight"].shape[-1] == specs[0].kernel:
            return trunk
    raise CheckpointError(
        f"the perceptual network has {len(layers)} convolutions under features.*; "
        "AlexNet's 5, starting with 11 x 11, or VGG16's 13 are wanted; give the whole trunk"
    )


def _blur_and_halve(x: Tensor) -> Tensor:
    """Binomial 3 x 3 blur of stride 2, over a border of two reflected pixels."""
    taps = x.new_tensor([1.0, 2.0, 1.0])
    kernel = (torch.outer(taps, taps) / 16).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


@torch.no_grad()
def _copy(parameter: Tensor, state: Mapping[str, Tensor], name: str, prefix: str) -> None:
    if name not in state:
        raise CheckpointError(f"{prefix}{name} is missing from the perceptual weights; give the trunk and the heads")
    if state[name].shape != parameter.shape:
        expected, found = tuple(parameter.shape), tuple(state[name].shape)
        raise CheckpointError(f"{prefix}{name} of the perceptual weights has shape {found}; it must be {expected}")
    parameter.copy_(state[name])


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; what else a .pth may hold is left out."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the files with the perceptual network's trunk and heads")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Bytes that are no pickle make the unpickler follow instructions that nobody wrote: it raises nearly anything.
        raise CheckpointError(
            f"{path} cannot be read as plain tensors; give a .safetensors or a state-dict .pth"
        ) from error
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    named = state.items() if isinstance(state, Mapping) else ()
    tensors = {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors by name; give a .safetensors or a state-dict .pth")
    return tensors
