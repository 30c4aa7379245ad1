"""What several tests of the autoencoder's training need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fsae.devices import avoid_faulty_kernels

# Before the first test computes: some train in bfloat16, in a process that has computed before.
avoid_faulty_kernels()


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The indices of sources go where pytest's files do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache_home")))
        yield


@pytest.fixture(scope="session")
def lpips_state() -> dict[str, Tensor]:
    """LPIPS's AlexNet with drawn weights, named as in its file."""
    generator = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    state = {}
    for index, (out, into, k) in shapes.items():
        state[f"features.{index}.weight"] = torch.randn(out, into, k, k, generator=generator) / (into * k * k) ** 0.5
        state[f"features.{index}.bias"] = torch.zeros(out)
    for number, (out, _, _) in enumerate(shapes.values()):
        state[f"lin{number}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=generator)
    return state
