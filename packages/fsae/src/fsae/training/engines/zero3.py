"""DeepSpeed's ZeRO-3 as the engine of a training: every process holds a part of each weight, gradient and moment.

Called by DeepSpeed's own interface, since accelerate's forms no group of CPU processes. A weight is cut as a flat
vector, p into [p_0 ... p_{n-1}] of equal length, the last ones filled up. DeepSpeed gathers it for the forward and the
backward of the module that owns it, or where anything else in the loss reads it as that module's attribute, and drops
it behind them; what `parameters()` lists is empty in between.

What is written to disk is whole and the same as without it: a run may go on under another sharding.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from fsae.errors import CheckpointError, UserError
from fsae.storage.checkpoint import read_state
from fsae.training.config import LoopConfig
from fsae.training.engines.fsdp2 import assembled, template
from fsae.training.engines.protocol import Engine, ModuleSet, OneForward, eval_mode


class Zero3(Engine):
    """Modules of which every process holds a part, split by DeepSpeed (UserError if it is not installed).

    They are trained by AdamW; Muon's updates need whole matrices, which no process has. A parameter without a gradient
    in a step is updated with a gradient of zero, where torch leaves it alone.
    """

    sharded = True

    def __init__(self, accelerator: Accelerator, trained: ModuleSet, config: LoopConfig) -> None:
        deepspeed = _deepspeed()
        self.modules, self.device = trained.modules, accelerator.device
        self.accumulation, self._micro_batches = config.gradient_accumulation_steps, 0
        self.templates = {name: template(module) for name, module in self.modules.items()}
        together = _AutocastForward(self.modules, accelerator)
        settings = _settings(together, config)
        self.names = trained.names()
        self.optimizer = trained.make_optimizer()
        for parameter in together.parameters():
            parameter.data = parameter.data.reshape(-1).view(parameter.shape)  # ZeRO-3 takes no channels-last strides
        # Weight by weight, so that a device never holds all of them.
        deepspeed.zero.Init(module=together, config_dict_or_path=settings, dtype=torch.float32)
        for buffer in together.buffers():
            buffer.data = buffer.data.to(self.device)
        self.engine, *_ = deepspeed.initialize(model=together, optimizer=self.optimizer, config=settings)
        zero = self.engine.optimizer
        for vector, weights in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
            vector.data = weights.data  # fp32 both: DeepSpeed's second copy of the weights is not needed
        self.forward = _EngineForward(self.engine)

    # --- a step

    def backward(self, loss: Tensor) -> None:
        self._micro_batches += 1
        self.engine.set_gradient_accumulation_boundary(self._micro_batches % self.accumulation == 0)
        self.engine.backward(loss)

    def clip(self, max_norm: float) -> Tensor:
        from deepspeed.utils import safe_get_local_grad

        self.engine.optimizer.clip_grad = max_norm
        parts = [safe_get_local_grad(parameter) for parameter in self.names]
        square = torch.stack(torch._foreach_norm(parts)).square().sum()
        torch.distributed.all_reduce(square)
        return square.sqrt()

    def step(self) -> None:
        self.engine.step()
        # Else a parameter that the next step does not use would be updated with this step's gradient again.
        self.engine.optimizer.grad_partitions_flat_buffer.zero_()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode; what was gathered before is gathered anew, since the weights may be exchanged meanwhile."""
        with eval_mode(self.modules):
            self.engine.empty_partition_cache()
            try:
                yield
            finally:
                self.engine.empty_partition_cache()

    # --- what is kept of it

    @property
    def weights(self) -> dict[str, Tensor]:
        """This process's part of each trained weight, flat."""
        return {name: _part(parameter) for parameter, name in self.names.items()}

    def gathered(self, parts: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Whole tensors from parts of all trained weights, on the CPU."""
        whole = ((name, _whole(parts[name], parameter)) for parameter, name in self.names.items())
        return {name: tensor.cpu() for name, tensor in whole if keep}

    def parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _cut(tensors[name], parameter) for parameter, name in self.names.items()}

    def state(self, name: str, keep: bool) -> dict[str, Tensor]:
        own = self.modules[name].state_dict(keep_vars=True)
        whole = ((k, _whole(_part(t), t) if isinstance(t, nn.Parameter) else t) for k, t in own.items())
        return {key: tensor.detach().cpu() for key, tensor in whole if keep}

    @torch.no_grad()
    def load_modules(self, folder: Path) -> None:
        for name, module in self.modules.items():
            tensors = read_state(self.templates[name], folder / f"{name}.safetensors")
            for key, own in module.state_dict(keep_vars=True).items():
                if isinstance(own, nn.Parameter):
                    _part(own).copy_(_cut(tensors[key], own))
                else:
                    own.copy_(tensors[key])
        self.engine.empty_partition_cache()  # what was gathered is outdated

    def moments(self, keep: bool) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for place in self._places():
            for moment, value in sorted(self.optimizer.state.get(place.vector, {}).items()):  # all processes alike
                whole = value if value.ndim == 0 else _whole(place.of(value), place.parameter)
                if keep:
                    tensors[f"{moment}/{self.names[place.parameter]}"] = whole.cpu()
        return tensors

    @torch.no_grad()
    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """The inverse of `moments`.

        Raises:
            CheckpointError: it names what is not trained, or parameters of one group that saw a different number of
                updates, which DeepSpeed counts once for all.
        """
        unknown = sorted({key.split("/", 1)[1] for key in moments} - set(self.names.values()))
        if unknown:
            raise CheckpointError(f"the optimiser's state names {unknown[0]}, which is not trained in this run")
        self.optimizer.state.clear()
        kinds = sorted({key.split("/", 1)[0] for key in moments})
        for place in self._places():
            name, state = self.names[place.parameter], self.optimizer.state[place.vector]
            for moment in kinds:
                stored = moments.get(f"{moment}/{name}")
                if moment != "step":
                    if moment not in state:
                        state[moment] = torch.zeros_like(place.vector, requires_grad=False)
                    if stored is not None:
                        place.of(state[moment]).copy_(_cut(stored, place.parameter))
                elif stored is None or not torch.equal(state.setdefault(moment, stored.clone()), stored):
                    raise CheckpointError(
                        f"{name} saw other updates than the parameters beside it, which sharding zero3 cannot go on "
                        "with; go on with ddp or fsdp2"
                    )

    def export(self, name: str) -> nn.Module:
        return assembled(self.templates[name], self.state(name, keep=True)).to(self.device).eval()

    def _places(self) -> Iterator[_Place]:
        """Where each parameter's part lies in the vectors that the optimiser updates."""
        zero = self.engine.optimizer
        for parameters, vector in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            start = 0
            for parameter in parameters:
                yield _Place(parameter, vector, start)
                start += _part(parameter).numel()


class _Place(NamedTuple):
    """A parameter's part: `vector` from `start` on."""

    parameter: nn.Parameter
    vector: Tensor
    start: int

    def of(self, vector: Tensor) -> Tensor:
        """The same part of another vector."""
        return vector[self.start : self.start + _part(self.parameter).numel()]


def _part(parameter: Tensor) -> Tensor:
    """What this process holds of a split parameter, flat and filled up; the optimiser updates it in place."""
    part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return part


def _whole(part: Tensor, parameter: Tensor) -> Tensor:
    """The whole tensor of which each process has a part, as it has of `parameter`."""
    flat = part.new_empty(part.numel() * torch.distributed.get_world_size())
    torch.distributed.all_gather(list(flat.split(part.numel())), part.detach())
    whole: Tensor = flat[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]
    return whole


def _cut(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as `parameter` is."""
    like, rank = _part(parameter), torch.distributed.get_rank()
    mine = tensor.reshape(-1)[rank * like.numel() : (rank + 1) * like.numel()]
    part = torch.zeros_like(like)
    part[: mine.numel()] = mine.to(part)
    return part


class _AutocastForward(OneForward):
    """Modules whose forward autocasts by itself: DeepSpeed turns off any autocast around it."""

    def __init__(self, modules: Mapping[str, nn.Module], accelerator: Accelerator) -> None:
        super().__init__(modules)
        self._autocast = accelerator.autocast

    def forward(self, *arguments: Any) -> dict[str, Tensor]:
        with self._autocast():
            return super().forward(*arguments)


class _EngineForward(nn.Module):
    """DeepSpeed's engine without its `no_sync`, which it offers but refuses when it splits gradients."""

    def __init__(self, engine: nn.Module) -> None:
        super().__init__()
        self.engine = engine
        self.called = convert_outputs_to_fp32(engine.__call__)

    def forward(self, *arguments: Any) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.called(*arguments)
        return outputs


def _deepspeed() -> Any:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "sharding is zero3, but DeepSpeed is not installed; pip install 'fsae[deepspeed]', or set sharding to fsdp2"
        )
    import deepspeed

    # It calls torch's collectives by their older names, and torch says so at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Between CPU processes it would compile a transport of its own; gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _settings(module: nn.Module, config: LoopConfig) -> dict[str, Any]:
    """DeepSpeed's configuration. Weights, gradients and what is sent of them are fp32, as under the other shardings."""
    size = sum(parameter.numel() for parameter in module.parameters())
    return {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            # Tensors of less than a thousandth of the model stay gathered during a step, as far as they are small.
            "stage3_param_persistence_threshold": min(100_000, size // 1000),
            "reduce_bucket_size": min(50_000_000, size),
        },
    }
