"""DeepSpeed's ZeRO-3 as the engine of a training: every process holds a part of each weight, gradient and moment.

Called by DeepSpeed's own interface, since accelerate's forms no group of CPU processes. A weight is cut as a flat
vector, p into [p_0 ... p_{n-1}] of equal length, the last ones filled up. DeepSpeed gathers it for the forward and the
backward of the module that owns it, or where anything else in the loss reads it as that module's attribute, and drops
it behind them; what `parameters()` lists is empty in between.
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
from fsae.storage.pieces import Piece, StoredTensor
from fsae.training.config import LoopConfig
from fsae.training.engines.fsdp2 import template
from fsae.training.engines.protocol import Engine, ModuleSet, OneForward, eval_mode, untrained


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

    def piece(self, tensor: Tensor) -> Piece:
        """A parameter's part, or a buffer."""
        if isinstance(tensor, nn.Parameter):
            return _piece(_part(tensor), tensor)
        return Piece(tensor.detach(), 0, tuple(tensor.shape), torch.distributed.get_rank() == 0)

    def state(self, name: str) -> dict[str, Piece]:
        return {key: self.piece(t) for key, t in self.modules[name].state_dict(keep_vars=True).items()}

    def average(self, shadow: Mapping[str, Tensor]) -> dict[str, Piece]:
        return {name: _piece(shadow[name], parameter) for parameter, name in self.names.items()}

    def load_modules(self, folder: Path) -> None:
        super().load_modules(folder)
        self.engine.empty_partition_cache()  # what was gathered is outdated

    def moments(self) -> dict[str, Piece]:
        return {
            f"{moment}/{self.names[place.parameter]}": self.piece(value)
            if value.ndim == 0
            else _piece(place.of(value), place.parameter)
            for place in self._places()
            for moment, value in self.optimizer.state.get(place.vector, {}).items()
        }

    @torch.no_grad()
    def load_moments(self, stored: Mapping[str, StoredTensor]) -> None:
        """The inverse of `moments`.

        Raises:
            CheckpointError: it names what is not trained, or parameters of one group that saw a different number of
                updates, which DeepSpeed counts once for all.
        """
        for key in stored:
            if key.split("/", 1)[1] not in self.names.values():
                raise untrained(key.split("/", 1)[1])
        self.optimizer.state.clear()
        kinds = sorted({key.split("/", 1)[0] for key in stored})
        for place in self._places():
            name, state = self.names[place.parameter], self.optimizer.state[place.vector]
            for moment in kinds:
                tensor = stored.get(f"{moment}/{name}")
                if moment != "step":
                    if moment not in state:
                        state[moment] = torch.zeros_like(place.vector, requires_grad=False)
                    if tensor is not None:
                        piece = _piece(place.of(state[moment]), place.parameter)
                        piece.values.copy_(tensor.read(piece.start, piece.values.numel()))
                elif tensor is None or not torch.equal(state.setdefault(moment, tensor.whole()), tensor.whole()):
                    raise CheckpointError(
                        f"{name} saw other updates than the parameters beside it, which sharding zero3 cannot go on "
                        "with; go on with ddp or fsdp2"
                    )

    def template(self, name: str) -> nn.Module:
        return self.templates[name]

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


def _piece(part: Tensor, parameter: Tensor) -> Piece:
    """A part, of `parameter` or of what is split as it is, without what fills it up."""
    total: int = parameter.ds_numel  # type: ignore[attr-defined]
    start = min(torch.distributed.get_rank() * part.numel(), total)
    return Piece(part.detach()[: total - start], start, tuple(parameter.ds_shape))  # type: ignore[attr-defined]


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
