"""The one training loop of every package, on accelerate.

A task says what is trained and what the loss is; the loop owns everything else: data order, devices,
precision, gradient accumulation and clipping, the learning rate, the moving average, logs, validation,
checkpoints and stopping.

The run is a function of its settings: data order and noise follow from the seed and the step alone, and a run
that is killed and resumed gives, in fp32, bit for bit the weights of one that was not.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from fsae.checkpoint import save_state
from fsae.errors import UserError
from fsae.training import checkpointing
from fsae.training.config import LoopConfig, OptimizerConfig
from fsae.training.ema import MovingAverage
from fsae.training.logs import Logs
from fsae.training.order import DataOrder, EpochItems, MicroBatches, derived_generator, derived_seed
from fsae.training.stopping import StopRequests, leave_signals_to_the_main_process

StopReason = Literal["signal", "time"]


class Task:
    """What is trained. Subclass it, set ``modules`` and write ``loss``.

    Attributes:
        modules: What is trained, saved and averaged, by name. Parameters with ``requires_grad=False`` keep
            their value.
        frozen: Modules that the loss only reads (a perceptual network, a frozen encoder). The loop puts them
            on the device in eval mode; they are not saved.
        settings: JSON values that decide the weights beside the loop's own (a model's config, loss weights).
            They are stored in each checkpoint, and a run with other values is not resumed.
    """

    modules: Mapping[str, nn.Module]
    frozen: Mapping[str, nn.Module] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss of one micro-batch, already on the device.

        Args:
            batch: What ``collate`` made of the dataset's items.
            generator: CPU generator that follows from (seed, step, micro-batch, process). Draw all noise from
                it.

        Returns:
            "loss", a scalar with a gradient, and any further scalars to log.
        """
        raise NotImplementedError

    def validate(self, step: int) -> dict[str, Tensor]:
        """Images (3 H W in [0, 1]) and scalars (0-d) to log.

        Called in the main process only, in eval mode, without grad, with the averaged weights in place.
        """
        return {}

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
        """AdamW's groups: by default matrices and kernels with weight decay, vectors without."""
        parameters = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        return [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optimizer.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]


@dataclass
class TrainingResult:
    """How a run ended.

    Attributes:
        step: Updates done.
        stopped: Why it ended before max_steps: "signal" (SIGTERM, Ctrl-C), "time" (max_minutes) or None.
        output_dir: Where its checkpoints are.
        is_main_process: Whether this process is the one that should write the exported model.
        modules: The trained modules, holding the trained weights until they are exported.
        average: The moving average, or None with ema_decay 0.
    """

    step: int
    stopped: StopReason | None
    output_dir: Path
    is_main_process: bool
    modules: Mapping[str, nn.Module]
    average: MovingAverage | None = field(repr=False)

    def export(self, name: str) -> nn.Module:
        """The module ``name`` in eval mode, with the averaged weights if there is an average."""
        if name not in self.modules:
            raise UserError(f"{name!r} was not trained; trained were {', '.join(self.modules)}")
        if self.average is not None:
            self.average.copy_to_weights()
        return self.modules[name].eval()


def train(
    task: Task, dataset: Any, config: LoopConfig, collate: Callable[[list[Any]], Any] | None = None
) -> TrainingResult:
    """Train until max_steps, a signal, or max_minutes.

    Args:
        task: What to train.
        dataset: Map-style. Items are pure functions of their index, or of (index, epoch) if it has a method
            ``sample(index, epoch)``. If it has ``settings``, JSON values, they are kept and compared as the
            task's.
        config: The run.
        collate: Makes a batch of a list of items; torch's default_collate if None.

    Raises:
        UserError: an empty dataset; a checkpoint made under other settings; a loss or gradient that is not
            finite (the batch is saved, no update is made); TensorBoard wanted but not installed; a checkpoint
            that cannot be written.
    """
    if len(dataset) == 0:
        raise UserError("the dataset is empty; give at least one sample")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("TensorBoard is not installed; pip install 'fsae[train]', or set tensorboard to false")
    return _Run(task, dataset, config, collate or default_collate).go()


class _Step(nn.Module):
    """Every trained module under one forward, so that DDP and autocast see the whole loss."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.trained = nn.ModuleDict(dict(task.modules))
        self._loss = task.loss

    def forward(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return self._loss(batch, generator)


class _Run:
    """One call of ``train``."""

    def __init__(self, task: Task, dataset: Any, config: LoopConfig, collate: Callable[[list[Any]], Any]) -> None:
        AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
        self.task, self.config = task, config
        self.output_dir = Path(config.output_dir)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            cpu=not torch.accelerator.is_available(),  # without it, accelerate forms no group of CPU processes
        )
        self.rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.order = DataOrder(
            len(dataset),
            config.seed,
            config.batch_size,
            config.gradient_accumulation_steps,
            processes,
            self.rank,
        )
        self.dataset, self.collate = EpochItems(dataset), collate
        self.settings = {
            "loop": config.result_settings(),
            "task": dict(task.settings),
            "data": {"samples": len(dataset), **getattr(dataset, "settings", {})},
            "processes": processes,
        }
        for module in task.frozen.values():
            module.to(self.accelerator.device).eval()
        self.model = self.accelerator.prepare(_Step(task).to(self.accelerator.device))
        self.names = {
            p: f"{name}.{key}" for name, m in task.modules.items() for key, p in m.named_parameters() if p.requires_grad
        }
        self.optimizer = self.accelerator.prepare(self._make_optimizer())
        weights = {name: p for p, name in self.names.items()}
        self.average = MovingAverage(weights, config.ema_decay) if config.ema_decay > 0 else None
        self.saved_at = -1

    def _make_optimizer(self) -> torch.optim.AdamW:
        settings = self.config.optimizer
        groups = [g for g in self.task.parameter_groups(settings) if g["params"]]
        if not groups:
            raise UserError("nothing to train: no parameter of the given modules requires a gradient")
        optimizer = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
        return optimizer

    # --- the course of a run
    # -------------------------------------------------------------------------------------

    def go(self) -> TrainingResult:
        """Resume if there is something to resume, then train."""
        seed = derived_seed(self.config.seed, self.rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        start = self._resume()
        logs = Logs(self.output_dir, start, self.config.tensorboard) if self.main else None
        progress = tqdm(
            total=self.config.max_steps, initial=start, unit="step", disable=not self.main, dynamic_ncols=True
        )
        stopped: StopReason | None = None
        try:
            with StopRequests(self.config.max_minutes) as requests:
                step, stopped = self._steps(start, logs, progress, requests)
        finally:
            progress.close()
            if logs is not None:
                logs.close()
        return TrainingResult(step, stopped, self.output_dir, self.main, self.task.modules, self.average)

    def _steps(
        self, start: int, logs: Logs | None, progress: Any, requests: StopRequests
    ) -> tuple[int, StopReason | None]:
        config = self.config
        batches = self._batches(start)
        stopped: StopReason | None = None
        step, since, began = start, start, time.monotonic()
        self.model.train()
        while step < config.max_steps and stopped is None:
            scalars, stopped = self._update(step, batches, requests)
            step += 1
            progress.update()
            progress.set_postfix(loss=f"{scalars['loss']:.4g}", refresh=False)
            if step % config.log_every == 0:
                seconds = max(time.monotonic() - began, 1e-9)
                scalars |= self._mean_over_processes(scalars) | {"steps_per_second": (step - since) / seconds}
                since, began = step, time.monotonic()
                if logs is not None:
                    logs.scalars(scalars, step)
            if config.validate_every and step % config.validate_every == 0:
                self._validate(step, logs)
            if config.save_every and step % config.save_every == 0:
                self._save(step)
        if step > start and self.saved_at != step:
            self._save(step)
        return step, stopped

    def _update(
        self, step: int, batches: Iterator[Any], requests: StopRequests
    ) -> tuple[dict[str, float], StopReason | None]:
        """One optimiser step. Everything that needs the device's answer is read back in one go."""
        factor = self.config.schedule.factor(step, self.config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        seen, outputs = [], []
        for micro in range(self.config.gradient_accumulation_steps):
            batch = send_to_device(next(batches), self.accelerator.device, non_blocking=True)
            generator = derived_generator(self.config.seed, step, micro, self.rank, 1)
            with self.accelerator.accumulate(self.model):
                output = self.model(batch, generator)
                self.accelerator.backward(output["loss"])
            seen.append(batch)
            outputs.append({name: value.detach().float() for name, value in output.items()})
        norm = self.accelerator.clip_grad_norm_(list(self.names), self.config.max_grad_norm or float("inf"))
        losses = torch.stack([output["loss"] for output in outputs])
        means = {name: torch.stack([o[name] for o in outputs]).mean() for name in outputs[0]}
        finite = losses.isfinite().all()
        if self.config.mixed_precision != "fp16":  # there the loss scaler skips an overflow by itself
            finite = finite & norm.isfinite()
        bad, wanted = self._agree(~finite, requests.pending())
        if bad:
            self._stop_on_non_finite(step, seen, losses, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(step)
        values = torch.stack([*means.values(), norm.float()]).tolist()
        scalars = dict(zip([*means, "gradient_norm"], values, strict=True))
        scalars["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        return scalars, wanted

    def _agree(self, bad: Tensor, wanted: StopReason | None) -> tuple[bool, StopReason | None]:
        """All processes stop at the same step: one's trouble or request is everyone's."""
        reasons: list[StopReason | None] = [None, "time", "signal"]
        if self.accelerator.num_processes == 1:
            return bool(bad), wanted
        flags = torch.stack([bad.long(), torch.tensor(reasons.index(wanted), device=bad.device)])
        flags = self.accelerator.gather(flags[None]).amax(0)
        return bool(flags[0]), reasons[int(flags[1])]

    def _mean_over_processes(self, scalars: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return scalars
        values = torch.tensor(list(scalars.values()), device=self.accelerator.device)
        return dict(zip(scalars, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def _batches(self, start: int) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=MicroBatches(self.order, start, self.config.max_steps),
            num_workers=self.config.num_workers,
            collate_fn=self.collate,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=leave_signals_to_the_main_process,
            generator=torch.Generator(),  # keeps the loader from drawing on the global generator
        )
        return iter(loader)

    # --- the rare events
    # -----------------------------------------------------------------------------------------

    def _stop_on_non_finite(self, step: int, batches: list[Any], losses: Tensor, norm: Tensor) -> None:
        path = self.output_dir / f"nonfinite-{step:08d}-{self.rank:05d}.safetensors"
        report = {
            "step": step,
            "rank": self.rank,
            "seed": self.config.seed,
            "losses": [str(v) for v in losses.tolist()],
            "gradient_norm": str(norm.item()),
        }
        checkpointing.save_batch(path, batches, report)
        what = "the gradient" if losses.isfinite().all() else "the loss"
        raise UserError(
            f"{what} of step {step} is not finite, so no update was made; the batch is in {path}; look at "
            "it, or lower the learning rate, and run again to go on from the last checkpoint"
        )

    def _validate(self, step: int, logs: Logs | None) -> None:
        """Validate in the main process; the run's random state is the same afterwards."""
        if logs is not None:
            state = checkpointing.random_state()
            training = {m: m.training for module in self.task.modules.values() for m in module.modules()}
            for module in self.task.modules.values():
                module.eval()
            with torch.no_grad(), self.accelerator.autocast():
                if self.average is None:
                    results = self.task.validate(step)
                else:
                    with self.average.swapped_in():
                        results = self.task.validate(step)
            logs.validation(results, step)
            for module, mode in training.items():
                module.training = mode
            checkpointing.restore_random_state(*state)
        self.accelerator.wait_for_everyone()

    def _save(self, step: int) -> None:
        """Write the checkpoint of ``step`` and make it the newest."""
        temporary = checkpointing.temporary_folder(self.output_dir, step)
        final = checkpointing.checkpoint_folder(self.output_dir, step)
        try:
            if self.main:
                checkpointing.remove_partial(self.output_dir)
                temporary.mkdir()
                self._write_shared_state(temporary, step)
            self.accelerator.wait_for_everyone()
            checkpointing.save_random_state(temporary, self.rank)
            self.accelerator.wait_for_everyone()
            if self.main:
                checkpointing.publish(temporary, final, self.config.keep_checkpoints)
        except OSError as error:
            checkpointing.remove_partial(self.output_dir)
            raise UserError(f"the checkpoint of step {step} could not be written to {final} ({error})") from error
        self.accelerator.wait_for_everyone()
        self.saved_at = step

    def _write_shared_state(self, folder: Path, step: int) -> None:
        checkpointing.save_modules(folder, self.task.modules)
        if self.average is not None:
            save_state(self.average.shadow, folder / "ema.safetensors")
        moments = checkpointing.optimizer_tensors(self.optimizer.optimizer, self.names)
        save_state(moments, folder / "optimizer.safetensors")
        epoch, offset = self.order.position(step)
        scaler = self.accelerator.scaler
        state = {
            "step": step,
            "epoch": epoch,
            "offset": offset,
            "settings": self.settings,
            "scaler": scaler.state_dict() if scaler is not None else {},
        }
        checkpointing.write_json(folder / "state.json", state)

    def _resume(self) -> int:
        """Load the newest complete checkpoint, if there is one; returns the step to go on from."""
        if self.main:
            checkpointing.remove_partial(self.output_dir)
        self.accelerator.wait_for_everyone()
        found = checkpointing.checkpoints(self.output_dir)
        if not found:
            return 0
        folder = found[-1]
        if not self.config.resume:
            raise UserError(
                f"{self.output_dir} already holds checkpoints of a run (newest {folder.name}); "
                "set resume to true to go on with it, or choose another output_dir"
            )
        state = checkpointing.read_json(folder / "state.json")
        checkpointing.check_settings(folder, state["settings"], self.settings)
        checkpointing.load_modules(folder, self.task.modules)
        if self.average is not None:
            self.average.load(checkpointing.load_tensors(folder / "ema.safetensors"))
        moments = checkpointing.load_tensors(folder / "optimizer.safetensors")
        checkpointing.load_optimizer(self.optimizer.optimizer, moments, self.names)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        checkpointing.load_random_state(folder, self.rank)
        self.saved_at = int(state["step"])
        if self.main:
            tqdm.write(f"going on from {folder}", file=sys.stderr)
        return self.saved_at
