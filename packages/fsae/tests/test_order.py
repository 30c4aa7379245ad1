"""The order of the data: a function of seed and step alone."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from fsae.data.order import Cut, DataOrder, EpochItems, MicroBatches, derived_generator, derived_seed, order_of


def stream(order: DataOrder, steps: int) -> list[tuple[int, int]]:
    return [pair for s in range(steps) for m in range(order.cut.accumulation) for pair in order.micro_batch(s, m)]


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    pairs = stream(DataOrder(7, Cut(3, 2)), 14)  # 28 samples: four epochs
    epochs = [[i for i, e in pairs if e == epoch] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert stream(DataOrder(7, Cut(4, 2)), 14) != pairs


def test_any_cut_into_micro_batches_and_processes_sees_the_same_samples_in_a_step() -> None:
    whole = DataOrder(11, Cut(0, 12))
    for step in range(5):
        seen = []
        for rank in range(2):
            order = DataOrder(11, Cut(0, 2, accumulation=3, processes=2, rank=rank))
            seen += [pair for micro in range(3) for pair in order.micro_batch(step, micro)]
        assert sorted(seen) == sorted(whole.micro_batch(step, 0))


def test_a_late_start_continues_the_same_stream() -> None:
    def order() -> DataOrder:
        return DataOrder(5, Cut(1, 3, accumulation=2))

    everything = list(MicroBatches(order(), 2, 0, 9))
    assert list(MicroBatches(order(), 2, 4, 9)) == everything[8:]
    assert len(MicroBatches(order(), 2, 4, 9)) == 10
    assert order().position(4) == (4, 4)  # 24 samples: four epochs of five and four


def test_seeds_depend_on_every_part() -> None:
    parts = [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1), (0, 1, 3)]
    assert len({derived_seed(*p) for p in parts}) == len(parts)
    assert derived_generator(1, 2).initial_seed() == derived_seed(1, 2)


@pytest.mark.parametrize("epoch", [0, 3])
def test_datasets_that_know_epochs_are_told(epoch: int) -> None:
    class Fresh:
        def __len__(self) -> int:
            return 4

        def sample(self, index: int, epoch: int) -> tuple[int, int]:
            return index, epoch

    assert EpochItems(Fresh())[2, epoch] == (2, epoch)
    assert EpochItems([5, 6, 7])[2, epoch] == 7


class Shelves:
    """Samples of two kinds, never mixed in a batch; the kind is part of a sample's key."""

    def __len__(self) -> int:
        return 12

    def sample(self, index: int, epoch: int, kind: str) -> str:
        return f"{kind}{index}.{epoch}"

    def order(self, cut: Cut) -> ShelfOrder:
        return ShelfOrder(cut)


class ShelfOrder:
    def __init__(self, cut: Cut) -> None:
        self.cut = cut

    def position(self, step: int) -> tuple[int, int]:
        return step // 4, step % 4

    def micro_batch(self, step: int, micro: int) -> list[tuple[int, int, str]]:
        kind = "ab"[(step + micro) % 2]
        return [(index, step // 4, kind) for index in range(2 if kind == "a" else 3)]


def test_a_dataset_may_bring_its_own_order() -> None:
    order = order_of(Shelves(), Cut(5, 2, 3, 4, 1))
    assert isinstance(order, ShelfOrder) and order.cut == Cut(5, 2, 3, 4, 1)
    assert order_of([0] * 7, Cut(5, 2, 3, 4, 1)) == DataOrder(7, Cut(5, 2, 3, 4, 1))
    loader = DataLoader(EpochItems(Shelves()), batch_sampler=MicroBatches(order, 3, 3, 5), collate_fn=list)
    a, b = [["a0", "a1"], ["b0", "b1", "b2"]]
    expected = [
        [f"{name}.{epoch}" for name in names] for epoch, row in ((0, [b, a, b]), (1, [a, b, a])) for names in row
    ]
    assert list(loader) == expected
