"""The order of the data: a function of seed and step alone."""

from __future__ import annotations

import pytest

from fsae.training.order import DataOrder, EpochItems, MicroBatches, derived_generator, derived_seed


def stream(order: DataOrder, steps: int) -> list[tuple[int, int]]:
    return [pair for s in range(steps) for m in range(order.accumulation) for pair in order.micro_batch(s, m)]


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    pairs = stream(DataOrder(length=7, seed=3, batch_size=2), 14)  # 28 samples: four epochs
    epochs = [[i for i, e in pairs if e == epoch] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert stream(DataOrder(length=7, seed=4, batch_size=2), 14) != pairs


def test_any_cut_into_micro_batches_and_processes_sees_the_same_samples_in_a_step() -> None:
    whole = DataOrder(length=11, seed=0, batch_size=12)
    for step in range(5):
        seen = []
        for rank in range(2):
            order = DataOrder(length=11, seed=0, batch_size=2, accumulation=3, processes=2, rank=rank)
            seen += [pair for micro in range(3) for pair in order.micro_batch(step, micro)]
        assert sorted(seen) == sorted(whole.micro_batch(step, 0))


def test_a_late_start_continues_the_same_stream() -> None:
    def order() -> DataOrder:
        return DataOrder(length=5, seed=1, batch_size=3, accumulation=2)

    everything = list(MicroBatches(order(), 0, 9))
    assert list(MicroBatches(order(), 4, 9)) == everything[8:]
    assert len(MicroBatches(order(), 4, 9)) == 10
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
