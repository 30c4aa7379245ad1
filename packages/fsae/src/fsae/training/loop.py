"""The one training loop of every package, on accelerate.

A task says what is trained and what the loss is; the loop owns everything else: data order, devices,
precision, gradient accumulation and clipping, the learning rate, the moving average, logs, validation,
checkpoints and stopping.

The run is a function of its settings: data order and noise follow from the seed and the step alone, and a run
that is killed and resumed gives, in fp32, bit for bit the weights of one that was not. In another number of processes
it may go on if an update sees as many samples as before. It then sees the same ones, but for buckets, whose order is
another; noise is the same as long as the batch_size is.
"""

from __future__ import annotations

import importlib.util
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from fsae.data.order import (
    Cut,
    DataOrder,
    EpochItems,
    MicroBatches,
    data_place,
    derived_generator,
    derived_seed,
    order_of,
)
from fsae.devices import avoid_faulty_kernels
from fsae.errors import CheckpointError, UserError
from fsae.storage.checkpoint import StrictModelMixin, save_state
from fsae.storage.files import partial_folder, read_json, write_json
from fsae.storage.pieces import Piece, load_pieces, save_pieces, stored_tensors
from fsae.training import checkpointing
from fsae.training.config import LoopConfig
from fsae.training.ema import MovingAverage
from fsae.training.engines.fsdp2 import Fsdp2
from fsae.training.engines.protocol import Engine, ModuleSet
from fsae.training.engines.replicated import Replicated
from fsae.training.engines.zero3 import Zero3
from fsae.training.logs import Logs
from fsae.training.saving import config_file, save_model, trained_tensors
from fsae.training.stopping import StopRequests, WorkerSignals
from fsae.training.task import KEEP, Task, decay_groups

__all__ = ["Task", "TrainingResult", "train"]

StopReason = Literal["signal", "time"]

_ENGINES: dict[str, Callable[[Accelerator, ModuleSet, LoopConfig], Engine]] = {
    "ddp": Replicated,
    "fsdp2": Fsdp2,
    "zero3": Zero3,
}

# Streams of noise of one micro-batch: the model's loss draws from one, its opponents' from the other.
_NOISE_STREAMS = (1, 2)

# For how long a process waits for the others, one of which may write a large checkpoint.
_PATIENCE = timedelta(hours=2)

# In a checkpoint, what belongs to the model and what to its opponents.
_OPTIMIZERS = ("optimizer", "opponent-optimizer")
_SCALERS = ("scaler", "opponent_scaler")
_OTHER_FILES = ("ema", *_OPTIMIZERS)


@dataclass
class TrainingResult:
    """How a run ended.

    Attributes:
        step: Updates done.
        stopped: Why it ended before max_steps: "signal" (SIGTERM, Ctrl-C), "time" (max_minutes) or None.
        output_dir: Where its checkpoints are.
        is_main_process: Whether this process is the one that should write the exported model.
        engine: What trained the modules; it holds the trained weights.
        average: The moving average, or None with ema_decay 0.
    """

    step: int
    stopped: StopReason | None
    output_dir: Path
    is_main_process: bool
    engine: Engine = field(repr=False)
    average: MovingAverage | None = field(repr=False)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The trained modules by name; under sharding they hold but a part of the weights."""
        return self.engine.modules

    @property
    def checkpoint(self) -> Path:
        """The folder of what the run has come to."""
        return checkpointing.checkpoint_folder(self.output_dir, self.step)

    def save(self, name: str, folder: Path) -> None:
        """Write what `export` gives into a folder, in diffusers' layout, without assembling it; one process does."""
        if (config := config_file(self.checkpoint, name)).is_file():
            save_model(config, trained_tensors(self.checkpoint, name), folder)
        else:
            self.export(name).save_pretrained(folder)  # type: ignore[operator]

    def export(self, name: str) -> nn.Module:
        """The module `name`, whole and in eval mode, with the averaged weights if there is an average."""
        if name not in self.modules:
            raise UserError(f"{name!r} was not trained; trained were {', '.join(self.modules)}")
        if (plain := self.engine.template(name)) is None:
            if self.average is not None:
                self.average.copy_to_weights()
            return self.modules[name].eval()
        stored = trained_tensors(self.checkpoint, name)
        plain.load_state_dict({key: tensor.whole() for key, tensor in stored.items()}, assign=True)
        return plain.to(self.engine.device).eval()


def train(
    task: Task, dataset: Any, config: LoopConfig, collate: Callable[[list[Any]], Any] | None = None
) -> TrainingResult:
    """Train until max_steps, a signal, or max_minutes.

    Args:
        task: What to train.
        dataset: Map-style. Items are pure functions of their index, or of (index, epoch) if it has a method
            `sample(index, epoch)`. If it has `settings`, JSON values, they are kept and compared as the task's.
        config: The run.
        collate: Makes a batch of a list of items; torch's default_collate if None.

    Raises:
        UserError: settings that cannot be; a checkpoint made under others, or that cannot be written; a loss or
            gradient that is not finite (the batch is saved, no update is made).
    """
    if len(dataset) == 0:
        raise UserError("the dataset is empty; give at least one sample")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("TensorBoard is not installed; pip install 'fsae[train]', or set tensorboard to false")
    names = [*task.modules, *task.opponents]
    if len({*names, *_OTHER_FILES}) < len(names) + len(_OTHER_FILES):
        raise UserError(
            f"modules and opponents are called {', '.join(names)}; each is a file of the checkpoint, so give them "
            f"different names, other than {', '.join(_OTHER_FILES)}"
        )
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise UserError("mixed_precision fp16 needs a GPU; set it to no or bf16")
    return _Run(task, dataset, config, collate or default_collate).go()


def _widen(module: nn.Module) -> None:
    """Half-precision weights, such as those of a model saved small, become fp32, in place: updates are smaller than
    their steps."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.data.float()


def _samples(settings: Mapping[str, Any]) -> int:
    """How many samples an update sees, of a run's settings."""
    loop = settings["loop"]
    return math.prod([loop["batch_size"], loop["gradient_accumulation_steps"], settings["processes"]])


class _Run:
    """One call of `train`."""

    def __init__(self, task: Task, dataset: Any, config: LoopConfig, collate: Callable[[list[Any]], Any]) -> None:
        if config.mixed_precision == "bf16" and not torch.accelerator.is_available():
            avoid_faulty_kernels()
        AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
        self.task, self.config = task, config
        self.output_dir = Path(config.output_dir)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            cpu=not torch.accelerator.is_available(),  # without it, accelerate forms no group of CPU processes
            kwargs_handlers=[
                # Autocast would keep a half of every weight, gathered or not, for as long as the loss takes.
                AutocastKwargs(cache_enabled=config.sharding == "ddp"),
                InitProcessGroupKwargs(timeout=_PATIENCE),
            ],
        )
        self.rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        sharding = config.sharding if processes > 1 else "ddp"
        if sharding != "ddp" and config.optimizer.kind == "muon":
            raise UserError(
                f"optimizer.kind is 'muon', whose updates need whole matrices, but sharding {sharding} leaves each of "
                f"{processes} processes a part of them; set sharding to ddp, or optimizer.kind to adamw"
            )
        self.data_rank, data_processes = data_place(self.rank, processes, task.ranks_per_sample)
        accumulation = config.gradient_accumulation_steps
        self.order = order_of(
            dataset, Cut(config.seed, config.batch_size, accumulation, data_processes, self.data_rank)
        )
        self.dataset, self.collate, self.worker_signals = EpochItems(dataset), collate, WorkerSignals()
        self.settings: dict[str, Any] = {
            "loop": config.result_settings(),
            "task": dict(task.settings),
            "data": {"samples": len(dataset), **getattr(dataset, "settings", {})},
            "processes": data_processes,
            **({"opponent_optimizer": asdict(task.opponent_optimizer)} if task.opponents else {}),
        }
        for module in [*task.modules.values(), *task.opponents.values()]:
            _widen(module)
        for module in task.frozen.values():
            module.to(self.accelerator.device).eval()
        self._make_engines(sharding)
        self.saved_at = -1

    def _make_engines(self, sharding: str) -> None:
        task, config = self.task, self.config
        trained = ModuleSet(task.modules, task.parameter_groups, config.optimizer)
        self.model = _ENGINES[sharding](self.accelerator, trained, config)
        self.engines = [self.model]
        self.opponents: Engine | None = None
        if task.opponents:
            # Never sharded: they are small, and the model's loss calls them outside of their own forward.
            groups = partial(decay_groups, task.opponents.values())
            opponents = ModuleSet(task.opponents, groups, task.opponent_optimizer)
            self.opponents = Replicated(self.accelerator, opponents, config)
            self.engines.append(self.opponents)
        self.average = MovingAverage(self.model.weights, config.ema_decay) if config.ema_decay > 0 else None

    # --- the course of a run

    def go(self) -> TrainingResult:
        """Resume if there is something to resume, then train."""
        seed = derived_seed(self.config.seed, self.data_rank)
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
            with StopRequests(self.config.max_minutes) as requests, self._samples_shared():
                step, stopped = self._steps(start, logs, progress, requests)
        finally:
            self.worker_signals.run_has_ended()
            progress.close()
            if logs is not None:
                logs.close()
        return TrainingResult(step, stopped, self.output_dir, self.main, self.model, self.average)

    @contextmanager
    def _samples_shared(self) -> Iterator[None]:
        """The task knows the processes that share its samples, if there are any."""
        if self.task.ranks_per_sample == 1:
            yield
            return
        group, _ = torch.distributed.new_subgroups(self.task.ranks_per_sample)
        self.task.share_samples(group)
        try:
            yield
        finally:
            self.task.share_samples(None)

    def _steps(
        self, start: int, logs: Logs | None, progress: Any, requests: StopRequests
    ) -> tuple[int, StopReason | None]:
        config = self.config
        batches = self._batches(start)
        stopped: StopReason | None = None
        step, since, began = start, start, time.monotonic()
        for engine in self.engines:
            engine.forward.train()
        while step < config.max_steps and stopped is None:
            scalars, stopped = self._update(step, batches, requests)
            step += 1
            progress.update()
            shown = {name: f"{scalars[name]:.4g}" for name in ("loss", "opponent_loss") if name in scalars}
            progress.set_postfix(shown, refresh=False)
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
        self.task.step = step
        factor = self.config.schedule.factor(step, self.config.max_steps)
        rates = [engine.set_rate(factor) for engine in self.engines]
        seen, outputs = [], []
        for micro in range(self.config.gradient_accumulation_steps):
            seen.append(send_to_device(next(batches), self.accelerator.device, non_blocking=True))
            with self.accelerator.accumulate(*(engine.forward for engine in self.engines)):
                outputs.append(self._differentiate(seen[-1], step, micro))
        means = {name: torch.stack([output[name] for output in outputs]).mean() for name in outputs[0]}
        norms = [engine.clip(self.config.max_grad_norm) for engine in self.engines]
        losses = torch.stack([o[name] for o in outputs for name in ("loss", "opponent_loss") if name in o])
        finite = losses.isfinite().all()
        if self.config.mixed_precision != "fp16":  # there the loss scalers skip an overflow by themselves
            finite = finite & torch.stack(norms).isfinite().all()
        bad, wanted = self._agree(~finite, requests.pending())
        if bad:
            self._stop_on_non_finite(step, seen, outputs, norms)
        for engine in self.engines:
            engine.step()
        if self.average is not None:
            self.average.update(step)
        means |= dict(zip(("gradient_norm", "opponent_gradient_norm"), norms, strict=False))
        scalars = dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
        scalars |= dict(zip(("learning_rate", "opponent_learning_rate"), rates, strict=False))
        return scalars, wanted

    def _differentiate(self, batch: Any, step: int, micro: int) -> dict[str, Tensor]:
        """Add one micro-batch's gradients, the model's and then its opponents'; returns the scalars."""
        task, model, opponents = self.task, self.model, self.opponents
        # Counted over all processes, so that however many share the work, a micro-batch has the same noise.
        place = self.config.seed, step, micro * self.settings["processes"] + self.data_rank, 0
        generators = [derived_generator(*place, stream) for stream in _NOISE_STREAMS]
        with nullcontext() if opponents is None else opponents.without_gradients():
            output = model.forward(task.loss, batch, generators[0])
            model.backward(output["loss"])  # in here, since checkpointed blocks run once more
        kept = {name: output.pop(name).detach() for name in list(output) if name.startswith(KEEP)}
        if opponents is not None:
            with model.without_gradients():
                answer = opponents.forward(task.opponent_loss, batch, kept, generators[1], step)
                if "loss" in answer:
                    opponents.backward(answer["loss"])
            output |= {f"opponent_{name}": value for name, value in answer.items()}
        return {name: value.detach().float() for name, value in output.items()}

    def _agree(self, bad: Tensor, wanted: StopReason | None = None) -> tuple[bool, StopReason | None]:
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
        config = self.config
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=MicroBatches(self.order, config.gradient_accumulation_steps, start, config.max_steps),
            num_workers=config.num_workers,
            collate_fn=self.collate,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=self.worker_signals,
            generator=torch.Generator(),  # keeps the loader from drawing on the global generator
        )
        return iter(loader)

    # --- the rare events

    def _stop_on_non_finite(
        self, step: int, batches: list[Any], outputs: list[dict[str, Tensor]], norms: list[Tensor]
    ) -> None:
        path = self.output_dir / f"nonfinite-{step:08d}-{self.rank:05d}.safetensors"
        report: dict[str, Any] = {"step": step, "rank": self.rank, "seed": self.config.seed}
        culprit = ""
        for prefix, norm in zip(("", "opponent_"), norms, strict=False):
            losses = [output[f"{prefix}loss"].item() for output in outputs if f"{prefix}loss" in output]
            report |= {f"{prefix}losses": [str(v) for v in losses], f"{prefix}gradient_norm": str(norm.item())}
            if not culprit and not math.isfinite(sum(losses) + norm.item()):
                what = "gradient" if math.isfinite(sum(losses)) else "loss"
                culprit = f"the opponents' {what}" if prefix else f"the {what}"
        attempt = checkpointing.Attempt()
        attempt(checkpointing.save_batch, path, batches, report)
        where = f"is in {path}; look at it" if attempt.error is None else f"could not be kept ({attempt.error})"
        raise UserError(
            f"{culprit or 'a loss in another process'} of step {step} is not finite, so no update was made; "
            f"the batch {where}; lower the learning rate, and run again to go on from the last checkpoint"
        )

    def _validate(self, step: int, logs: Logs | None) -> None:
        """Validate; the run's random state is the same afterwards."""
        if self.data_rank == 0 or self.model.sharded:
            state = checkpointing.random_state()
            with ExitStack() as stack:
                for engine in self.engines:
                    stack.enter_context(engine.evaluating())
                stack.enter_context(torch.no_grad())
                stack.enter_context(self.accelerator.autocast())
                if self.average is not None:
                    stack.enter_context(self.average.swapped_in())
                sharded = self.model.sharded
                results = self.model.forward(self.task.validate, step) if sharded else self.task.validate(step)
            if logs is not None:
                logs.validation(results, step)
            checkpointing.restore_random_state(*state)
        self.accelerator.wait_for_everyone()

    def _save(self, step: int) -> None:
        """Write the checkpoint of `step` and make it the newest."""
        final = checkpointing.checkpoint_folder(self.output_dir, step)
        temporary = partial_folder(final)
        attempt = checkpointing.Attempt()
        if self.main:
            attempt(checkpointing.remove_partial, self.output_dir)
            attempt(temporary.mkdir)
            attempt(self._write_values, temporary, step)
        self._end_if_failed(attempt, step)
        attempt(self._write, temporary)
        if self.rank % self.task.ranks_per_sample == 0:  # those that share samples draw the same
            attempt(checkpointing.save_random_state, temporary, self.data_rank)
        self._end_if_failed(attempt, step)
        if self.main:
            attempt(checkpointing.publish, temporary, final, self.config.keep_checkpoints)
        self._end_if_failed(attempt, step)
        self.saved_at = step

    def _end_if_failed(self, attempt: checkpointing.Attempt, step: int) -> None:
        """Wait for everyone; if writing failed in one process, all of them end."""
        failed, _ = self._agree(torch.tensor(attempt.error is not None, device=self.accelerator.device))
        if not failed:
            return
        if self.main:
            checkpointing.remove_partial(self.output_dir)
        raise UserError(
            f"the checkpoint of step {step} could not be written to {self.output_dir} "
            f"({attempt.error or 'another process failed'}); earlier checkpoints are as they were: make room and "
            "run again to go on from the newest"
        ) from attempt.error

    def _files(self) -> Iterator[tuple[Engine, str, dict[str, Piece]]]:
        """The tensors of a checkpoint, by file, and the engine that holds them."""
        for engine, optimizer in zip(self.engines, _OPTIMIZERS, strict=False):
            for name in engine.modules:
                yield engine, name, engine.state(name)
            yield engine, optimizer, engine.moments()
        if self.average is not None:
            yield self.model, "ema", self.model.average(self.average.shadow)

    def _write(self, folder: Path) -> None:
        """Write what this process holds; of what is whole in each, only the main process does."""
        for engine, name, pieces in self._files():
            if engine.sharded:
                save_pieces(pieces, folder, name, self.rank)
            elif self.main:
                save_state({key: piece.values for key, piece in pieces.items()}, folder / f"{name}.safetensors")

    def _write_values(self, folder: Path, step: int) -> None:
        write_json(folder / "state.json", self._values(step), sort_keys=True)
        for name, module in self.model.modules.items():
            plain = self.model.template(name) or module
            if isinstance(plain, StrictModelMixin):
                config_file(folder, name).write_text(plain.to_json_string(), encoding="utf-8")

    def _values(self, step: int) -> dict[str, Any]:
        epoch, offset = self.order.position(step)
        scalers = {key: engine.scaler_state() for key, engine in zip(_SCALERS, self.engines, strict=False)}
        return {"step": step, "epoch": epoch, "offset": offset, "settings": self.settings, **scalers}

    def _check_length_and_settings(self, folder: Path, state: dict[str, Any]) -> None:
        """Refuse other settings, but not another length that the checkpoint has not passed.

        A constant rate does not know it; a cosine that was meant to end elsewhere goes on along the new one, and a
        line says so.
        """
        step, wanted = int(state["step"]), self.config.max_steps
        if step > wanted:
            raise UserError(
                f"{folder} is of step {step}, past max_steps {wanted}; set max_steps to {step} or more to go on from "
                "it, or choose another output_dir to start anew"
            )
        stored = state["settings"]
        before = stored.get("loop", {}).get("max_steps", wanted)
        if before != wanted:
            stored = {**stored, "loop": {**stored["loop"], "max_steps": wanted}}
        if "loop" in stored and "processes" in stored:
            stored = self._same_samples(stored)
        added = {f"task.{name}": value for name, value in self.task.added_settings.items()}
        checkpointing.check_settings(folder, stored, self.settings, added)
        if before != wanted and self.main:
            line = f"max_steps was {before}, is now {wanted}: from step {step} on, the cosine ends at step {wanted}"
            tqdm.write(line, file=sys.stderr)

    def _same_samples(self, stored: dict[str, Any]) -> dict[str, Any]:
        """Stored settings, with the run's own division of an update's samples if there are as many of them."""
        divided = {name: self.settings["loop"][name] for name in ("batch_size", "gradient_accumulation_steps")}
        mine = {**stored, "loop": {**stored["loop"], **divided}, "processes": self.settings["processes"]}
        if mine == stored or _samples(mine) != _samples(stored):
            return stored
        if self.main and not isinstance(self.order, DataOrder):
            tqdm.write("other processes than before: buckets are drawn in another order from here on", file=sys.stderr)
        return mine

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
        state = read_json(folder / "state.json", checkpointing.GO_ON_FROM_OLDER)
        if missing := {"step", "settings"} - set(state):
            raise CheckpointError(
                f"{folder / 'state.json'} lacks {' and '.join(sorted(missing))}; remove {folder} to go on from the "
                "checkpoint before it"
            )
        self._check_length_and_settings(folder, state)
        for engine, optimizer, scaler in zip(self.engines, _OPTIMIZERS, _SCALERS, strict=False):
            engine.load_modules(folder)
            engine.load_moments(stored_tensors(folder, optimizer))
            engine.load_scaler_state(state.get(scaler, {}))
        if self.average is not None:
            pieces = self.model.average(self.average.shadow)
            load_pieces(pieces, stored_tensors(folder, "ema"), "the average", folder / "ema.safetensors")
        if self.data_rank < state["settings"].get("processes", 1):  # others draw for the first time
            checkpointing.load_random_state(folder, self.data_rank)
        self.saved_at = int(state["step"])
        if self.main:
            tqdm.write(f"going on from {folder}", file=sys.stderr)
        return self.saved_at
