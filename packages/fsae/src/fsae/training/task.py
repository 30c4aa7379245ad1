"""What a training trains, and on which losses: the loop's only question to the models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fsae.training.config import OptimizerConfig
from fsae.training.optimizers import matrices

KEEP = "keep_"


class Task:
    """What is trained. Subclass it, set `modules` and write `loss`; for adversaries also `opponents`.

    Attributes:
        modules: What is trained, saved and averaged, by name. Parameters with `requires_grad=False` keep
            their value.
        opponents: Modules that are trained against `modules` (a discriminator), by name: on `opponent_loss`,
            with an optimiser of their own. They are saved and resumed, not averaged. While `loss` runs and is
            differentiated their parameters collect no gradients, nor do those of `modules` in
            `opponent_loss`.
        opponent_optimizer: Settings of that optimiser; its rate follows the same schedule.
        frozen: Modules that the loss only reads (a perceptual network, a frozen encoder). The loop puts them
            on the device in eval mode; they are not saved.
        settings: JSON values that decide the weights beside the loop's own (a model's config, loss weights).
            They are stored in each checkpoint, and a run with other values is not resumed.
        added_settings: Of settings that earlier versions did not store, what they did, by dotted name: a checkpoint
            without them is resumed under these values alone.
        ranks_per_sample: How many processes work on each sample together (context parallelism). They see the same
            batches and draw the same noise, and count as one in the order of the data.
        step: Updates done when the losses of the next one are computed; set by the loop.
    """

    modules: Mapping[str, nn.Module]
    opponents: Mapping[str, nn.Module] = MappingProxyType({})
    opponent_optimizer: OptimizerConfig = OptimizerConfig()
    frozen: Mapping[str, nn.Module] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})
    added_settings: Mapping[str, Any] = MappingProxyType({})
    ranks_per_sample: int = 1
    step: int = 0

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss of one micro-batch, already on the device, as `collate` made it of the dataset's items.

        `generator` is on the CPU and follows from (seed, step, micro-batch of all processes). Draw all noise from it.

        Returns:
            "loss", a scalar with a gradient, and any further scalars to log. Tensors of any shape under names
            that begin with "keep_" are not logged but handed to `opponent_loss`, detached.
        """
        raise NotImplementedError

    def opponent_loss(
        self, batch: Any, outputs: Mapping[str, Tensor], generator: torch.Generator, step: int
    ) -> dict[str, Tensor]:
        """The opponents' loss of the same micro-batch, after the model's gradients of it are computed.

        `outputs` is what `loss` returned under "keep_" names, `generator` another one than that of `loss`.

        Returns:
            "loss", a scalar with a gradient, and any further scalars; logged as "opponent_loss", "opponent_...".
            Without a "loss" the opponents rest; all processes must decide it alike.
        """
        raise NotImplementedError

    def validate(self, step: int) -> dict[str, Tensor]:
        """Images (3 H W in [0, 1]) and scalars (0-d) to log.

        Called in eval mode, without grad, with the averaged weights in place; in the main process only (and in
        those that share its samples), except under sharding "fsdp2" or "zero3", where each process holds but a
        part of the weights and all call it alike.
        """
        return {}

    def share_samples(self, group: ProcessGroup | None) -> None:
        """Work on each sample together with the processes of `group`; alone again with None.

        Called only with `ranks_per_sample` above 1, before the first step and when the run is over. The gradients
        of all processes are averaged, so the mean over those of a group must be the gradient of their samples.
        """
        raise NotImplementedError

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
        """The optimiser's groups: by default matrices and kernels with weight decay, vectors without.

        A group's own "lr" is its peak rate. With Muon, a group is AdamW's unless its "kind" is "muon".
        """
        return decay_groups(self.modules.values(), optimizer)


def decay_groups(modules: Iterable[nn.Module], optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Layers' matrices and kernels with weight decay; vectors, and what is added to activations (a transformer's
    `modulation`), without. With Muon, its matrices apart."""
    modules = list(modules)
    apart = {id(p) for p in matrices(modules)} if optimizer.kind == "muon" else set()
    trained = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    decayed = {id(p) for name, p in trained if p.ndim > 1 and name.endswith("weight")}
    parameters = [p for _, p in trained if id(p) not in apart]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    if apart:
        rate, decay = optimizer.matrix_learning_rate, optimizer.weight_decay
        ours = [p for _, p in trained if id(p) in apart]
        groups.append({"params": ours, "weight_decay": decay, "lr": rate, "kind": "muon"})
    return groups
