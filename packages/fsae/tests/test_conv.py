"""Convolutions over time against brute force in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsae.layers.conv import Kernel, TimeKind, VideoConv3d


def seen_frames(time: str, group: int, frame: int, frames: int) -> tuple[int, int, int]:
    """The three frames that a kernel sees at `frame`, written out case by case."""
    if time == "causal":
        return max(frame - 2, 0), max(frame - 1, 0), frame
    before = max(frame - 1, 0)
    if time == "standard":
        return before, frame, min(frame + 1, frames - 1)
    last_of_group = 0 if frame == 0 else ((frame - 1) // group + 1) * group
    return before, frame, min(frame + 1, last_of_group)


def brute_force(conv: VideoConv3d, x: Tensor) -> Tensor:
    """Frame by frame, tap by tap, in 2-D."""
    frames = x.shape[2]
    outputs = []
    for frame in range(0, frames, conv.stride[0]):
        total = sum(
            F.conv2d(x[:, :, seen], conv.weight[:, :, tap], None, conv.stride[1:], conv.padding[1:], groups=conv.groups)
            for tap, seen in enumerate(seen_frames(conv.time, conv.group, frame, frames))
        )
        outputs.append(total if conv.bias is None else total + conv.bias.view(1, -1, 1, 1))
    return torch.stack(outputs, dim=2)


@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    ("time", "group"), [("causal", 1), ("standard", 1), ("group_causal", 1), ("group_causal", 2), ("group_causal", 4)]
)
def test_every_kind_of_time_equals_brute_force(time: TimeKind, group: int, groups: int, frames: int) -> None:
    torch.manual_seed(0)
    conv = VideoConv3d(4, 4, Kernel(groups=groups), time=time, group=group).double()
    x = torch.randn(2, 4, frames, 5, 6, dtype=torch.double)
    torch.testing.assert_close(conv(x), brute_force(conv, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_temporal_stride_sees_the_frames_of_its_pair_and_the_one_before(frames: int) -> None:
    torch.manual_seed(0)
    conv = VideoConv3d(3, 4, Kernel(stride=2, time_stride=2)).double()
    x = torch.randn(1, 3, frames, 6, 8, dtype=torch.double)
    out = conv(x)
    assert out.shape == (1, 4, (frames + 1) // 2, 3, 4)
    torch.testing.assert_close(out, brute_force(conv, x), rtol=0, atol=1e-12)


def test_gradients_of_the_depthwise_form_equal_the_library() -> None:
    torch.manual_seed(0)
    conv = VideoConv3d(6, 6, Kernel(groups=6), time="standard").double()
    x = torch.randn(2, 6, 5, 4, 4, dtype=torch.double, requires_grad=True)
    weight = torch.randn(2, 6, 5, 4, 4, dtype=torch.double)
    padded = torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)
    plain = F.conv3d(padded, conv.weight, conv.bias, padding=conv.padding, groups=6)
    want = torch.autograd.grad((plain * weight).sum(), [x, conv.weight, conv.bias])
    got = torch.autograd.grad((conv(x) * weight).sum(), [x, conv.weight, conv.bias])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="accepted are causal, standard, group_causal"):
        VideoConv3d(1, 1, time="sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="causal"):
        VideoConv3d(1, 1, Kernel(time_stride=2), time="standard")
    with pytest.raises(ValueError, match="groups of 4"):
        VideoConv3d(1, 1, time="group_causal", group=4)(torch.zeros(1, 1, 4, 2, 2))
