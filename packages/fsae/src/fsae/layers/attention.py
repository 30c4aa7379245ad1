"""Attention of FSAE: linear over a frame's pixels (paper §2.2.1), and on the first frame's features (paper §2.2.3)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.layers.config import BlockStyle, Injection
from fsae.layers.conv import POINT, Kernel, VideoConv3d
from fsae.layers.norm import PixelNorm
from fsae.layers.recomputed import Recomputed
from fsae.tiling import RECOMPUTED, Window, frames_at_once

# The starting value of the query and key biases of the first-frame attention.
LOCAL_BIAS = 4.0

# Base of its rotary wavelengths, which run from 2π to 2π·THETA cells.
THETA = 100.0


class LiteMLA(Recomputed):
    """DC-AE's multi-scale linear attention, over h and w of each frame; x -> norm(attention(x)), no residual.

    Queries, keys and values are taken at two scales, each pixel and its 5x5 neighbourhood, as 2·C/d heads of d; a
    head's channels are its query, key and value one after the other. With ReLU on queries and keys the softmax becomes
    a ratio of two sums,

        out = (V Kᵀ) Q / ((1 Kᵀ) Q + 1e-15),

    linear in the number of pixels. Sums and division are at least fp32.
    """

    def __init__(self, channels: int, head_dim: int, eps: float, norm_affine: bool) -> None:
        super().__init__()
        wide = 3 * channels
        self.head_dim = head_dim
        self.qkv = VideoConv3d(channels, wide, POINT)
        self.aggregate = nn.ModuleList(
            [
                VideoConv3d(wide, wide, Kernel(5, taps=1, groups=wide, bias=False)),
                VideoConv3d(wide, wide, replace(POINT, groups=wide // head_dim)),
            ]
        )
        self.proj = VideoConv3d(2 * channels, channels, POINT)
        self.norm = PixelNorm(channels, eps, norm_affine)

    def forward(self, x: Tensor) -> Tensor:
        """`B C T H W` -> the same shape. Many frames are taken some at a time, which changes nothing."""
        count = frames_at_once(x, 6) * (RECOMPUTED if self.recomputes else 1)
        if x.shape[2] <= count:
            return self._attend(x)
        return torch.cat([self.run(self, part, call=self._attend) for part in x.split(count, dim=2)], dim=2)

    def _attend(self, x: Tensor) -> Tensor:
        batch, _, frames, height, width = x.shape
        near = self.qkv(x)
        wide = near
        for conv in self.aggregate:
            wide = conv(wide)
        both = torch.cat([near, wide], dim=1).transpose(1, 2)
        both = both.reshape(batch, frames, -1, 3 * self.head_dim, height * width)
        out = self._linear_attention(both).to(x.dtype)
        out = out.reshape(batch, frames, -1, height, width).transpose(1, 2)
        return self.norm(self.proj(out), own=True)

    def _linear_attention(self, qkv: Tensor) -> Tensor:
        """Heads of query, key and value `... 3d N` -> `... d N`, in fp32 also where autocast would have halves."""
        with torch.autocast(qkv.device.type, enabled=False):
            qkv = qkv.float() if qkv.dtype in (torch.float16, torch.bfloat16) else qkv
            query, key, value = qkv.split(self.head_dim, dim=-2)
            query, key = F.relu(query), F.relu(key).transpose(-1, -2)
            numerator = (value @ key) @ query
            return numerator / (key.sum(-2).unsqueeze(-2) @ query + 1e-15)


class FirstFrameContext(NamedTuple):
    """What the queries of all frames meet: keys, turned to their places, and values, `B h w heads d` each."""

    key: Tensor
    value: Tensor


class FirstFrameAttention(nn.Module):
    """First-frame injection (paper §2.2.3): every frame of a decoder stage looks at the encoder's features of frame 0.

        x + W_o · Attn(PN(x) W_q, PN(f) W_k, PN(f) W_v)

    Rotary positions on h and w tell a query where it stands, so that copying from the same place is easy: query and key
    biases start equal and large and the weights small, which makes the attention local from the first step, and W_o
    starts at zero, which makes the layer the identity. With more than `window`² positions, queries and context are cut
    into aligned windows.

    With a `reach` each head of a query also says where to look from: its rotary position is its own cell plus an offset
    read off its features, at first zero; a feature of 1 stands for `reach` cells. What moved since frame 0 is then
    found by two numbers a head in place of a rotation of every pair of channels, which a small model learns from few
    clips.

    The number of the stage says how large its cells are and how many channels the first frame's features have.
    """

    def __init__(
        self,
        channels: int,
        stage: int,
        injection: Injection,
        style: BlockStyle = BlockStyle(),  # noqa: B008, frozen
    ) -> None:
        super().__init__()
        head_dim, context_channels = injection.head_dim, injection.widths[stage]
        if head_dim % 4 or channels % head_dim:
            raise ValueError(f"head_dim is {head_dim}; it must be a multiple of 4 that divides {channels} channels")
        self.head_dim, self.window, self.reach = head_dim, injection.window, injection.reach / 2**stage
        self.norm_query = PixelNorm(channels, style.eps, style.norm_affine)
        self.norm_context = PixelNorm(context_channels, style.eps, style.norm_affine)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(context_channels, channels)
        self.to_v = nn.Linear(context_channels, channels)
        self.to_out = nn.Linear(channels, channels)
        for near in (self.to_q, self.to_k):
            nn.init.normal_(near.weight, std=0.1 * near.in_features**-0.5)
            nn.init.constant_(near.bias, LOCAL_BIAS)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)
        self.to_offset = nn.Linear(channels, 2 * (channels // head_dim)) if injection.reach > 0 else None
        if self.to_offset is not None:
            nn.init.zeros_(self.to_offset.weight)
            nn.init.zeros_(self.to_offset.bias)

    def _rotate(self, x: Tensor, cells: Tensor) -> Tensor:
        """Rotary positions on `... N heads d`: the first half of d turns with the row, the second with the column.

        cells: rows and columns `... N heads 2`, fp32, of any shape that broadcasts.
        """
        quarter = self.head_dim // 4
        rates = THETA ** (-torch.arange(quarter, device=x.device, dtype=torch.float32) / quarter)
        angles = (cells[..., None] * rates).flatten(-2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    def context(self, first_frame: Tensor) -> FirstFrameContext:
        """The first frame's features `B C' h w` -> its keys and values, which serve every frame, tile and chunk."""
        height, width = first_frame.shape[2:]
        side = self._side(height, width)
        features = self.norm_context(first_frame).permute(0, 2, 3, 1)
        key = self.to_k(features).unflatten(-1, (-1, self.head_dim))
        cells = _cells(range(height), range(width), first_frame.device) % side
        key = self._rotate(key.flatten(1, 2), cells).unflatten(1, (height, width))
        return FirstFrameContext(key, self.to_v(features).unflatten(-1, (-1, self.head_dim)))

    def _side(self, height: int, width: int) -> int:
        """The side of the aligned windows of a whole frame."""
        return self.window if height * width > self.window**2 else max(height, width)

    def forward(self, x: Tensor, first_frame: Tensor | FirstFrameContext, window: Window | None = None) -> Tensor:
        """x `B C T h w`, first_frame `B C' h w` or what `context` made of it -> x's shape.

        window: the part of the frame that x is, in cells of this stage; None is all of it. first_frame is whole.
        """
        context = first_frame if isinstance(first_frame, FirstFrameContext) else self.context(first_frame)
        frame_height, frame_width = context.key.shape[1:3]
        part = Window(0, 0, frame_height, frame_width) if window is None else window
        side = self._side(frame_height, frame_width)
        query_map = self.norm_query(x).permute(0, 2, 3, 4, 1)
        bands = []
        for top in range(part.top // side * side, part.bottom, side):
            rows = range(max(top, part.top), min(top + side, part.bottom))
            row = []
            for left in range(part.left // side * side, part.right, side):
                columns = range(max(left, part.left), min(left + side, part.right))
                queries = Window(rows.start, columns.start, len(rows), len(columns)).inside(part)
                seen = FirstFrameContext(*(t[:, top : top + side, left : left + side] for t in context))
                cells = _cells(rows, columns, x.device) - torch.tensor([top, left], device=x.device)
                row.append(self._attend(query_map[:, :, *queries.slices], seen, cells))
            bands.append(torch.cat(row, dim=3))
        return x + self.to_out(torch.cat(bands, dim=2)).permute(0, 4, 1, 2, 3)

    def _attend(self, query_map: Tensor, context: FirstFrameContext, cells: Tensor) -> Tensor:
        """One window: queries `B T h w C` at `cells` of it on its keys and values -> `B T h w C`."""
        batch, frames, height, width, _ = query_map.shape
        query = self.to_q(query_map).reshape(batch * frames, height * width, -1, self.head_dim)
        looked_from = cells
        if self.to_offset is not None:
            offset = self.to_offset(query_map).float().reshape(batch * frames, height * width, -1, 2)
            looked_from = cells + self.reach * offset
        query = self._rotate(query, looked_from)
        # Keys and values are the same for every frame: the frames' queries stand in one row, so that nothing is copied.
        query = query.reshape(batch, frames * height * width, -1, self.head_dim).transpose(1, 2)
        key, value = (t.flatten(1, 2).transpose(1, 2) for t in context)
        out = F.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2).reshape(batch, frames, height, width, -1)


def _cells(rows: range, columns: range, device: torch.device) -> Tensor:
    """Row and column of every cell, `N 1 2`, fp32."""
    return torch.cartesian_prod(
        torch.arange(rows.start, rows.stop, device=device, dtype=torch.float32),
        torch.arange(columns.start, columns.stop, device=device, dtype=torch.float32),
    ).unsqueeze(1)
