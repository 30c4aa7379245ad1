"""FSDP2: every process holds a part of each weight, gradient and moment; blocks are gathered while they compute.

By torch's own ``fully_shard`` and not by accelerate's plugin for it, which takes no CPU processes and only one
model. What is written to disk is always whole, so nothing outside a running training knows of the parts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, device: torch.device) -> None:
    """Split ``module`` over all processes and move it to ``device``; its blocks are gathered one at a time.

    A module's own methods still work inside ``module``'s forward, but a block must be entered by its forward.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no channels-last weights
    for block in blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The submodules to gather one at a time: those a model names in ``_no_split_modules``, else its lists' members."""

    def visit(part: nn.Module, names: frozenset[str]) -> Iterator[nn.Module]:
        names |= set(getattr(part, "_no_split_modules", None) or ())
        for child in part.children():
            if type(child).__name__ in names or (not names and isinstance(part, nn.ModuleList)):
                yield child
            else:
                yield from visit(child, names)

    return visit(module, frozenset())


def release(module: nn.Module) -> None:
    """Drop the gathered weights that a forward without a backward leaves in place."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered by all processes together if it is split."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors, in the processes that ``keep`` them; split ones come to the CPU, one after the other."""
    kept = {}
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if keep:
            kept[name] = complete.cpu() if isinstance(tensor, DTensor) else complete
    return kept


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """The same tensor, split as ``like`` is; every process has the whole and takes its part."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def template(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose parameters take no memory, to be made whole again by ``assembled``."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, empty)


def assembled(plain: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """``plain``, a ``template`` of a split module, with that module's whole state."""
    plain.load_state_dict(state, assign=True)
    return plain
