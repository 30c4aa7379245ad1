"""What a training run is made of, as dataclasses that are at once the YAML file, the flags and their help.

Nothing here imports torch: a command line builds its parser from these classes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from fsae.bounds import Bound, Checked, Count, Decay, Folder, Index, Positive, Share, Weight
from fsae.data.config import ClipsConfig
from fsae.errors import require

Betas = Annotated[tuple[float, float], Bound("two numbers in [0, 1)", lambda betas: all(0 <= b < 1 for b in betas))]


@dataclass(frozen=True)
class OptimizerConfig(Checked, part="optimizer"):
    """AdamW (paper §3.1 trains with betas 0.9 and 0.95), or Muon for the matrices and AdamW for the rest.

    Attributes:
        learning_rate: AdamW's peak learning rate, reached after the warm-up.
        betas: Decay rates of AdamW's first and second moment.
        weight_decay: Decoupled decay of matrices and kernels; vectors (biases, norms) are never decayed.
        eps: Added to the root of AdamW's second moment.
        kind: "adamw", or "muon": the weights of linear layers and convolutions with at least 8 outputs and 8 inputs
            are updated by Muon, at matrix_learning_rate. It needs whole matrices: no sharding over processes.
        matrix_learning_rate: With muon, the peak rate of those weights, on AdamW's scale: an entry moves about 0.2
            of it in a step.
        momentum: With muon, the decay rate of its one moment.
    """

    learning_rate: Positive = 1e-4
    betas: Betas = (0.9, 0.95)
    weight_decay: Weight = 0.0
    eps: Positive = 1e-8
    kind: Literal["adamw", "muon"] = "adamw"
    matrix_learning_rate: Positive = 1e-3
    momentum: Decay = 0.95


@dataclass(frozen=True)
class ScheduleConfig(Checked, part="schedule"):
    """How the learning rate moves from step to step.

    Attributes:
        kind: "constant", or "cosine": half a cosine from the peak down to min_ratio at max_steps.
        warmup_steps: Steps over which the rate rises linearly from 0 to its peak.
        min_ratio: Where the cosine ends, as a share of the peak.
    """

    kind: Literal["cosine", "constant"] = "cosine"
    warmup_steps: Index = 0
    min_ratio: Share = 0.0

    def factor(self, step: int, max_steps: int) -> float:
        """Share of the peak learning rate for the update that follows `step` finished ones.

        A pure function of the step, so a resumed run has no schedule state to restore.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps))
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class LoopConfig(Checked):
    """One run of the training loop. A step is one optimiser update.

    Attributes:
        output_dir: Folder for checkpoints, TensorBoard events and validation images; made if missing. Processes on
            several machines must all see it.
        max_steps: Updates in the whole run.
        batch_size: Samples in one forward pass of one process.
        gradient_accumulation_steps: Forward passes in one update. An update sees batch_size times this
            times the number of processes samples; processes that share each sample count as one.
        optimizer: The optimiser's settings.
        schedule: The learning rate's course.
        max_grad_norm: Gradients are scaled down to this global L2 norm, the opponents' by themselves; 0 leaves
            them alone.
        ema_decay: Decay of the exponential moving average of the weights (it ramps up from 0.1 over the first
            updates); the average is what is validated and exported. 0 keeps none.
        seed: Decides data order, noise and every other draw of the run.
        mixed_precision: "no" (fp32), or autocast to "bf16" or "fp16". Weights and averages stay fp32.
        sharding: With several processes, "ddp" keeps the whole model in each of them, "fsdp2" a part of its weights,
            moments and average, by torch, and "zero3" the same, by DeepSpeed's ZeRO-3 (needs the extra
            fsae[deepspeed]). A run may go on under another, and in another number of processes if an update sees as
            many samples. One process has nothing to split and trains as under "ddp".
        shard_group: With fsdp2, how many processes hold one copy of the model together, those of a node for instance;
            0 for all. The copies' gradients are averaged.
        max_minutes: Save and stop after this much wall-clock time; 0 sets no limit.
        log_every: Steps between scalars.
        validate_every: Steps between validations; 0 for none.
        save_every: Steps between checkpoints; one is always written at the end. 0 for the end only.
        keep_checkpoints: How many of the newest checkpoints stay on disk.
        num_workers: Processes that load data. The result does not depend on it.
        resume: Go on from the newest complete checkpoint in output_dir, if there is one.
        tensorboard: Write TensorBoard events (needs the extra fsae[train]).
    """

    output_dir: Folder
    max_steps: Count = 100_000
    batch_size: Count = 1
    gradient_accumulation_steps: Count = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    max_grad_norm: Weight = 1.0
    ema_decay: Decay = 0.999
    seed: Index = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    sharding: Literal["ddp", "fsdp2", "zero3"] = "ddp"
    shard_group: Index = 0
    max_minutes: Weight = 0.0
    log_every: Count = 10
    validate_every: Index = 0
    save_every: Index = 1000
    keep_checkpoints: Count = 2
    num_workers: Index = 0
    resume: bool = True
    tensorboard: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.sharding == "ddp" or self.mixed_precision != "fp16"
        require(whole, "mixed_precision", self.mixed_precision, f"no or bf16 with sharding {self.sharding}")
        grouped = self.sharding == "fsdp2" or self.shard_group == 0
        require(grouped, "shard_group", self.shard_group, f"0 with sharding {self.sharding}, or fsdp2 the sharding")

    def result_settings(self) -> dict[str, Any]:
        """The settings that decide the weights: a checkpoint made under others cannot be continued.

        How often a run logs, validates or saves, where it does so, how many workers feed it, whether its weights
        are sharded and when it is stopped leave the weights alone. With a constant schedule so does `max_steps`:
        such a run may be made longer.
        """
        settings = asdict(self)
        for name in _HARMLESS:
            del settings[name]
        if self.schedule.kind == "constant":
            del settings["max_steps"]
        return settings


_HARMLESS = (
    "output_dir",
    "max_minutes",
    "log_every",
    "validate_every",
    "save_every",
    "keep_checkpoints",
    "num_workers",
    "resume",
    "tensorboard",
    "sharding",
    "shard_group",
)


@dataclass(frozen=True)
class ClipTrainingConfig(Checked):
    """What all trainings on clips have in common.

    Attributes:
        data: Folder of videos and images, or a .jsonl or .csv list with the columns path and caption.
        loop: The run.
        clips: What is taken of data, and of more.
        model: A preset's name, or the folder of a saved model to go on from.
        gradient_checkpointing: Recompute each block in the backward pass to save memory.
        validation_data: Folder or list of held-out clips to validate on; without it, the first training clips.
        validation_samples: Clips to validate on.
    """

    data: str
    loop: LoopConfig
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    model: str = "nano"
    gradient_checkpointing: bool = False
    validation_data: str | None = None
    validation_samples: Count = 4
