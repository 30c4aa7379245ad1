"""FSDP2: every process holds a part of each weight, gradient and moment; blocks are gathered while they compute.

By torch's own `fully_shard` and not by accelerate's plugin for it, which takes no CPU processes and only one
model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fsae.errors import require
from fsae.storage.pieces import Piece, StoredTensor, load_pieces
from fsae.training.config import LoopConfig
from fsae.training.engines.protocol import Engine, ModuleSet, OneForward, eval_mode


class Fsdp2(Engine):
    """Modules of which every process holds a part, in a run of several; precision is "no" or "bf16". UserError if they
    do not divide into groups of `config.shard_group`."""

    sharded = True

    def __init__(self, accelerator: Accelerator, trained: ModuleSet, config: LoopConfig) -> None:
        self.modules, self.device = trained.modules, accelerator.device
        self.accumulation = config.gradient_accumulation_steps
        self.templates = {name: template(module) for name, module in self.modules.items()}
        together = OneForward(self.modules)
        named = {name: getattr(module, "weights_source", None) for name, module in self.modules.items()}
        sources = {name: source for name, source in named.items() if source is not None}
        drawn = {name: _taken(self.modules[name]) for name in sources}
        shard(together, mesh_of(self.device, config.shard_group), halves=config.mixed_precision == "bf16")
        for name, source in sources.items():
            self._fill(name, source, drawn[name])
        self.forward = accelerator.prepare_model(together, evaluation_mode=True)  # else it would be wrapped in DDP
        self.names = trained.names()
        self.optimizer = trained.make_optimizer()

    @torch.no_grad()
    def _fill(self, name: str, source: Mapping[str, StoredTensor] | str, drawn: dict[str, Tensor]) -> None:
        """Give each process its part of a module's weights: of files, or of what the main process has drawn."""
        module = self.modules[name].to_empty(device=self.device)
        if not isinstance(source, str):
            load_pieces(self.state(name), source, type(module).__name__, "the saved model")
        elif source == "main":
            for key, weight in module.named_parameters():
                assert isinstance(weight, DTensor)
                whole = drawn.pop(key) if drawn else torch.empty(weight.shape)
                whole = whole.to(self.device).contiguous()
                weight.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements))

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def clip(self, max_norm: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(list(self.names), max_norm or float("inf"))
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with eval_mode(self.modules):
            try:
                yield
            finally:
                release(self.forward)

    def piece(self, tensor: Tensor) -> Piece:
        shape = tuple(tensor.shape)
        if not isinstance(tensor, DTensor):
            return Piece(tensor.detach(), 0, shape, torch.distributed.get_rank() == 0)
        mesh = tensor.device_mesh
        *copy, part = mesh.get_coordinate() or ()
        rows = -(-shape[0] // mesh.shape[-1])
        start = min(part * rows, shape[0]) * math.prod(shape[1:])
        return Piece(tensor.to_local().detach(), start, shape, not any(copy))

    def template(self, name: str) -> nn.Module:
        return self.templates[name]


def mesh_of(device: torch.device, group: int) -> DeviceMesh:
    """All processes in a row, or, by HSDP, rows of `group` neighbours with one copy of the model each."""
    world = torch.distributed.get_world_size()
    fits = not group or world % group == 0
    require(fits, "shard_group", group, f"0, or a number that divides the {world} processes")
    if group in (0, world):
        return init_device_mesh(device.type, (world,))
    return init_device_mesh(device.type, (world // group, group), mesh_dim_names=("copies", "parts"))


def _taken(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights, taken out of it; none where it had none."""
    weights = {key: p.detach() for key, p in module.named_parameters() if not p.is_meta}
    module.to_empty(device="meta")
    return weights


def shard(module: nn.Module, mesh: DeviceMesh, halves: bool) -> None:
    """Split `module` over the mesh's processes and move it there; its blocks are gathered one at a time.

    A module's own methods still work inside `module`'s forward, but a block must be entered by its forward.

    Args:
        module: What is split.
        mesh: As `mesh_of`.
        halves: Gather the weights of blocks' linear layers in the bf16 that autocast would make of them.
    """
    wide = {name for m in module.modules() for name in getattr(m, "_keep_in_fp32_modules", None) or ()}
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no channels-last weights
    for block in blocks(module):
        layers = [m for name, m in block.named_modules() if type(m) is nn.Linear and not wide & {*name.split(".")}]
        _shard_block(block, mesh, [layer for layer in layers if halves and layer is not block])
    fully_shard(module, mesh=mesh)


def _shard_block(block: nn.Module, mesh: DeviceMesh, halves: list[nn.Linear]) -> None:
    """Split a block, with its layers `halves` in groups of their own; what else it holds is gathered in fp32.

    Layers stay gathered until the block has run, and if it runs again in the backward pass, until they are
    differentiated. Which one comes next there is said here: FSDP2's own guess goes by the order of those second runs.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in halves:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(block, mesh=mesh)
    for before, after in pairwise([block, *halves]):
        after.set_modules_to_backward_prefetch([before])  # type: ignore[operator]

    def drop(*_: object) -> None:
        for layer in halves:
            layer.reshard()  # type: ignore[operator]

    block.register_forward_hook(drop)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The submodules to gather one at a time: those a model names in `_no_split_modules`, else its lists' members."""

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


def template(module: nn.Module) -> nn.Module:
    """A copy of `module` whose parameters take no memory."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, empty)
