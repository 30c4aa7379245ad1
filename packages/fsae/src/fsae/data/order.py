"""Which sample comes when: a stateless order of the data, so that a run can go on from any step.

The run sees one endless stream of samples. Sample number g belongs to epoch g // n and is entry g % n of that
epoch's permutation, which follows from (seed, epoch) alone. Step s takes the next accumulation x processes x
batch samples; the data position of a run is therefore its step, and two ways to cut the same number of
samples into micro-batches see the same samples in the same update.

Processes that share each sample, by its tokens for instance, count here as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fsae.errors import UserError


def derived_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part and on their order, the same on every machine."""
    state = np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def derived_generator(*parts: int) -> torch.Generator:
    """A CPU generator seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*parts))


@dataclass(frozen=True)
class Cut:
    """How a run cuts the stream of samples into the micro-batches of one process.

    Attributes:
        seed: Decides every draw and permutation.
        batch: Samples in a micro-batch, where a bucket does not say.
        accumulation: Micro-batches of one process in a step.
        processes: Number of processes.
        rank: This process.
    """

    seed: int
    batch: int = 1
    accumulation: int = 1
    processes: int = 1
    rank: int = 0


def data_place(rank: int, processes: int, ranks_per_sample: int) -> tuple[int, int]:
    """(rank, processes) as an order counts them, where `ranks_per_sample` neighbouring processes count as one;
    UserError if they do not divide into such groups."""
    if processes % ranks_per_sample:
        raise UserError(
            f"{processes} process{'es' if processes > 1 else ''} cannot be divided into groups of {ranks_per_sample} "
            f"that share each sample; start a multiple of {ranks_per_sample} processes, or let fewer share a sample"
        )
    return rank // ranks_per_sample, processes // ranks_per_sample


Key = tuple[Any, ...]


class Order(Protocol):
    """Which samples one process sees when, as a pure function of the step; a dataset may bring its own."""

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, offset) of a step's first sample, for the record."""

    def micro_batch(self, step: int, micro: int) -> Sequence[Key]:
        """The keys of this process's micro-batch `micro` of `step`; any number, at least one."""


def order_of(dataset: Any, cut: Cut) -> Order:
    """What the dataset's method `order` returns for `cut`, or the `DataOrder` of a plain dataset."""
    return dataset.order(cut) if hasattr(dataset, "order") else DataOrder(len(dataset), cut)


@dataclass
class DataOrder:
    """The samples of every micro-batch of one process, of a dataset of `length`; `cut.seed` decides the
    permutations."""

    length: int
    cut: Cut
    _epoch: int = field(default=-1, init=False, repr=False)
    _permutation: Tensor = field(default_factory=lambda: torch.zeros(0), init=False, repr=False, compare=False)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, offset) of the first sample of a step."""
        first = step * self.cut.accumulation * self.cut.processes * self.cut.batch
        return first // self.length, first % self.length

    def entry(self, number: int) -> tuple[int, int]:
        """(index, epoch) of the stream's sample `number`."""
        epoch, offset = divmod(number, self.length)
        if epoch != self._epoch:
            generator = derived_generator(self.cut.seed, epoch)
            self._permutation = torch.randperm(self.length, generator=generator)
            self._epoch = epoch
        return int(self._permutation[offset]), epoch

    def micro_batch(self, step: int, micro: int) -> list[tuple[int, int]]:
        """The (index, epoch) pairs of this process's micro-batch `micro` of `step`."""
        cut = self.cut
        first = ((step * cut.accumulation + micro) * cut.processes + cut.rank) * cut.batch
        return [self.entry(number) for number in range(first, first + cut.batch)]


class MicroBatches(Sampler[list[Key]]):
    """Batch sampler: this process's micro-batches, `accumulation` a step, from `start` up to `stop` steps."""

    def __init__(self, order: Order, accumulation: int, start: int, stop: int) -> None:
        self.order = order
        self.accumulation = accumulation
        self.start = start
        self.stop = stop

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start, self.stop):
            for micro in range(self.accumulation):
                yield list(self.order.micro_batch(step, micro))

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation


class EpochItems(Dataset[Any]):
    """A dataset addressed by the keys of its order, (index, epoch) if it brings none.

    An item must be a pure function of its key, or a resumed run is not the run that was interrupted. A dataset that
    draws anew in each epoch (crops, frame positions) offers `sample(index, epoch)`, one with an order of its own
    `sample(*key)`; any other is asked by `dataset[index]`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Any:
        if hasattr(self.dataset, "sample"):
            return self.dataset.sample(*key)
        return self.dataset[key[0]]
