"""Context parallelism: the processes of a group share each sample by its tokens (Ulysses, arXiv 2309.14509).

Shapes: N tokens in the whole sequence, n = ceil(N / size) of them in each process, in the order of the ranks; what is
missing behind the last token is padded with zeros. Inside attention, heads are `B N heads head_dim`.

All of a block but self-attention treats every token by itself, Layer Memory and its states included, and so runs on
the n tokens of its process alone. In self-attention all tokens meet: there the processes share the heads instead. One
all-to-all brings each of them all tokens of its heads / size heads, a second one takes the results back to the tokens.
Heads that do not divide are filled up with heads of zeros; padding tokens never reach the attention, which therefore
needs no mask.

Gradients: the backward of every exchange here is its adjoint, and nothing is scaled. What the processes compute
together is therefore differentiated as one function, the sum of their losses, and a parameter's gradient in one
process is the share that passes through its tokens. Each process computes the same loss from the gathered output, so
the shares add up to size times the gradient of that loss: their mean over all processes, which DDP and FSDP2 take
anyway, is exactly the gradient that one process would have. This holds for parameters before, in and behind the split
region, and where one forward's output is another one's input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fsae.errors import UserError

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""softmax(QKᵀ/√head_dim)V for query, key and value `B N heads head_dim`, and of that shape."""


class ContextParallel:
    """The processes that share a sample, and this process's place among them.

    All of them call the model alike, with the same inputs, and all receive the whole output.

    Raises:
        UserError: the processes do not know of each other yet, or this one is not of the group (None is all of them).
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise UserError(
                "context parallelism needs a torch process group and there is none; start the processes with torchrun "
                "and call torch.distributed.init_process_group first"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise UserError(f"process {dist.get_rank()} is not of the given group; enable it in the group's own only")

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextParallel:
        return self  # a copy of a model works in the same group; groups themselves cannot be copied

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's n of the N tokens on axis `dim`, padded with zeros; a copy, so that the whole can go."""
        length = x.shape[dim]
        count = self._tokens(length)
        start = min(self.rank * count, length)
        own = x.narrow(dim, start, min(count, length - start))
        behind = (0, 0) * (x.ndim - 1 - dim % x.ndim)
        return F.pad(own, (*behind, 0, count - own.shape[dim]))

    def gather(self, x: Tensor, length: int, dim: int = 1) -> Tensor:
        """The inverse of `split`, in every process: n tokens on axis `dim` -> all N = `length` of them."""
        dim %= x.ndim
        parts: Tensor = _Gather.apply(x, self.group, self.size)
        return parts.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, length)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention: Attention, length: int) -> Tensor:
        """Self-attention of the whole sequence, N = `length` tokens, with the heads shared out; zero for padding
        tokens.

        Query, key and value are this process's tokens, `B n heads head_dim`, as is the result; they are sent in the
        dtype of `value`. `attention` is called once, with all tokens of this process's heads: `B N ceil(heads / size)
        head_dim`.
        """
        heads = query.shape[2]
        mine = self._to_heads([query.to(value.dtype), key.to(value.dtype), value], length)
        return self._to_tokens(attention(*mine), heads)

    def _tokens(self, length: int) -> int:
        """n, the tokens of one process."""
        return -(-length // self.size)

    def _to_heads(self, tensors: list[Tensor], length: int) -> tuple[Tensor, ...]:
        """Each `B n heads head_dim` -> `B N heads/size head_dim`; all of them in one exchange."""
        filled = [F.pad(x, (0, 0, 0, -x.shape[2] % self.size)) for x in tensors]
        by_owner = [x.unflatten(2, (self.size, -1)).movedim(2, 0) for x in filled]  # size B n heads/size head_dim
        received = self._exchange(torch.stack(by_owner, dim=1))  # size 3 B n heads/size head_dim
        whole = received.movedim(0, 2).flatten(2, 3)  # 3 B (size n) heads/size head_dim
        return whole.narrow(2, 0, length).unbind(0)

    def _to_tokens(self, x: Tensor, heads: int) -> Tensor:
        """`B N heads/size head_dim` -> `B n heads head_dim`."""
        count = self._tokens(x.shape[1])
        filled = F.pad(x, (0, 0, 0, 0, 0, self.size * count - x.shape[1]))
        by_owner = filled.unflatten(1, (self.size, count)).movedim(1, 0)  # size B n heads/size head_dim
        return self._exchange(by_owner).movedim(0, 2).flatten(2, 3).narrow(2, 0, heads)

    def _exchange(self, x: Tensor) -> Tensor:
        exchanged: Tensor = _AllToAll.apply(x, self.group)
        return exchanged


class _AllToAll(torch.autograd.Function):
    """x `size ...` whose entry j is for process j -> `size ...` whose entry j came from process j.

    As a matrix over all processes' tensors this swaps sender and receiver: it is symmetric, and its own adjoint.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(gradient, ctx.group), None


class _Gather(torch.autograd.Function):
    """x `...` -> `size ...`, every process's x in every process; adjoint: each one's gradients, summed by owner."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None, size: int) -> Tensor:
        ctx.group = group
        parts = x.new_empty(size, *x.shape)
        dist.all_gather(list(parts.unbind(0)), x.contiguous(), group=group)
        return parts

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # A reduce-scatter; by an all-to-all, so that the sum has the same order and width on every back end.
        return _all_to_all(gradient, ctx.group).sum(0), None, None


def _all_to_all(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.contiguous(), group=group)
    return received
