"""Context parallelism: processes that share a sample compute what one process computes alone.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fsae.errors import UserError
from fsae.storage.files import read_json
from fsae.storage.pieces import whole_tensors
from fsae.training.checkpointing import checkpoints
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import train
from fsdit import FSDiT
from fsdit.conditioning import Context, Encoders, ImageEncoder, TextEncoder, first_frame_condition, nano_tokenizer
from fsdit.conditioning.nano import new_image_encoder, new_text_encoder
from fsdit.flow.path import FlowSchedule
from fsdit.flow.sampling import denoise
from fsdit.parallel import ContextParallel
from fsdit.training.config import TransformerConfig
from fsdit.training.data import Samples
from fsdit.training.task import FlowMatchingTask

SIZES = (1, 2, 3, 4)
# (latent grid, heads, patch): 15 tokens and 2 heads; 5 tokens, so that of 4 processes one has none, and 3 heads;
# 12 tokens of 2 patches each and 4 heads.
CASES: dict[str, tuple[tuple[int, int, int], int, tuple[int, int, int]]] = {
    "15 tokens, 2 heads": ((3, 5, 1), 2, (1, 1, 1)),
    "5 tokens, 3 heads": ((1, 5, 1), 3, (1, 1, 1)),
    "12 tokens, 4 heads": ((2, 3, 4), 4, (1, 1, 2)),
}
QUANTITIES = ("loss", "output", "parameters", "inputs", "text", "chained", "sampled")


def tiny(heads: int = 2, **changes: Any) -> FSDiT:
    """A model in which every weight has a say: no zero head, no router that favours one state."""
    torch.manual_seed(0)
    model = FSDiT.from_preset("tiny", dim=24, num_heads=heads, latent_channels=4, **changes)
    for parameter in (model.head.head.weight, *model.router_parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs_of(grid: tuple[int, int, int]) -> dict[str, Tensor]:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    return {
        "hidden_states": draw(2, 12, *grid).requires_grad_(),
        "timestep": torch.tensor([900.0, 250.0]),
        "encoder_hidden_states": draw(2, 6, 32).requires_grad_(),
        "encoder_hidden_states_image": draw(2, 5, 16),
    }


def loss_of(output: Tensor) -> Tensor:
    target = torch.linspace(-1, 1, output.numel()).view_as(output)
    return (output - target).square().mean()


def results(model: FSDiT, grid: tuple[int, int, int]) -> dict[str, list[Tensor]]:
    """What must not depend on the number of processes; gradients are this process's own."""
    given = inputs_of(grid)
    output = model(**given)
    loss = loss_of(output)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    model.zero_grad()

    again = model(**given | {"hidden_states": torch.cat((output.detach(), given["hidden_states"][:, 4:].detach()), 1)})
    twice = model(**given | {"hidden_states": torch.cat((again, given["hidden_states"][:, 4:].detach()), dim=1)})
    loss_of(twice).backward()  # through one forward's output into another
    chained = [p.grad for p in model.parameters()]
    model.zero_grad()
    return {
        "loss": [loss.detach()],
        "output": [output.detach()],
        "parameters": gradients,
        "inputs": [given["hidden_states"].grad],
        "text": [given["encoder_hidden_states"].grad],
        "chained": chained,
        "sampled": [sample(model, grid)],
    }


def sample(model: FSDiT, grid: tuple[int, int, int]) -> Tensor:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(2))
    condition = first_frame_condition(draw(1, 4, 1, *grid[1:]), grid[0])
    context = Context(draw(1, 6, 32), draw(1, 5, 16), draw(1, 6, 32))
    return denoise(model, draw(1, 4, *grid), condition, context, schedule=FlowSchedule(), steps=3, guidance=3.0)


# --- what one of four processes does -----------------------------------------------------------------------------


def mean_over(group: dist.ProcessGroup, tensors: list[Tensor]) -> list[Tensor]:
    total = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(total, group=group)
    parts = (total / dist.get_world_size(group)).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def deviation(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value."""
    largest = max(e.abs().max().item() for e in expected)
    return max((f - e).abs().max().item() for f, e in zip(found, expected, strict=True)) / largest


def model_of(name: str) -> FSDiT:
    _, heads, patch = CASES[name]
    return tiny(heads, patch_size=patch)


@cache
def expected_of(name: str) -> dict[str, list[Tensor]]:
    return results(model_of(name), CASES[name][0])


def deviations(group: dist.ProcessGroup, name: str, checkpointing: bool) -> dict[str, Any]:
    """How far the group's results are from what this process computes alone, and the tokens each block saw."""
    model, expected = model_of(name), expected_of(name)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.enable_context_parallel(group)
    tokens: set[int] = set()
    handles = [b.register_forward_hook(lambda m, a, out: tokens.add(out.shape[1])) for b in model.blocks]
    found = results(model, CASES[name][0])
    for handle in handles:
        handle.remove()
    alone = deviation(found["parameters"], expected["parameters"])
    for key in ("parameters", "chained", "inputs", "text"):
        found[key] = mean_over(group, found[key])
    return {
        **{key: deviation(found[key], expected[key]) for key in QUANTITIES},
        "tokens": sorted(tokens),
        "unaveraged": alone,
    }


def exchanges(group: dist.ProcessGroup) -> dict[str, bool]:
    """split, gather and attend against their definition, in the two precisions that are used."""
    parallel, facts = ContextParallel(group), {}
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value, out = torch.randn(4, 2, 7, 5, 4, generator=torch.Generator().manual_seed(3)).to(dtype)
        own = [parallel.split(x) for x in (query, key, value, out)]
        n = math.ceil(7 / parallel.size)
        padded = F.pad(query, (0, 0, 0, 0, 0, n * parallel.size - 7))
        facts[f"split {dtype}"] = torch.equal(own[0], padded[:, parallel.rank * n : (parallel.rank + 1) * n])
        facts[f"gather {dtype}"] = torch.equal(parallel.gather(own[0], 7), query)
        facts[f"axis {dtype}"] = torch.equal(parallel.gather(parallel.split(query, dim=-2), 5, dim=-2), query)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        leaf = own[2].clone().requires_grad_()
        attended = parallel.attend(own[0].float(), own[1], leaf, attention, length=7)  # sent as value's dtype
        attended.backward(own[3])
        whole = value.clone().requires_grad_()
        expected = attention(query, key, whole)
        expected.backward(out)
        assert attended.dtype == dtype and whole.grad is not None
        atol = 2e-2 if dtype == torch.bfloat16 else 1e-6
        facts[f"attend {dtype}"] = torch.allclose(attended, parallel.split(expected), atol=atol)
        facts[f"backward {dtype}"] = torch.allclose(leaf.grad, parallel.split(whole.grad), atol=atol)
    facts["copy"] = deepcopy(parallel) is parallel
    return facts


def one_of_four(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    facts: dict[str, Any] = {}
    for size in SIZES:
        group = dist.new_group(list(range(size)))
        if rank < size:
            cases = [(name, again) for name in CASES for again in (False, True)]
            facts[str(size)] = {f"{name} {again}": deviations(group, name, again) for name, again in cases}
            facts[f"exchanges {size}"] = exchanges(group)
        else:
            try:
                ContextParallel(group)
            except UserError as error:
                facts["outside"] = str(error)
        dist.barrier()
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts))
    for sharding in ("ddp", "fsdp2"):
        training(folder / f"two-by-two-{sharding}", 3, context_parallel=2, sharding=sharding)


# --- training ----------------------------------------------------------------------------------------------------


class Recorded(FlowMatchingTask):
    validated: list[float]

    def validate(self, step: int) -> dict[str, Tensor]:
        results = super().validate(step)
        self.validated = [*getattr(self, "validated", []), results["loss"].item()]
        return results


def clips() -> list[dict[str, Any]]:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(4))
    return [{"latents": draw(4, 3, 5, 1), "image": draw(3, 16, 16), "caption": f"clip {i}"} for i in range(10)]


def training(folder: Path, steps: int, sharding: Any = "ddp", **changes: Any) -> dict[str, Any]:
    """15 tokens, text and image encoders trained with the transformer, with dropout."""
    torch.manual_seed(0)
    text, image = new_text_encoder("tiny", dropout_rate=0.2), new_image_encoder("tiny")
    loop = LoopConfig(
        str(folder),
        max_steps=steps,
        gradient_accumulation_steps=2,
        # With a large eps an update follows its gradient; with a small one, the sign of a rounding error.
        optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=0.1, eps=0.01),
        schedule=ScheduleConfig("constant"),
        ema_decay=0.9,
        validate_every=2,
        sharding=sharding,
        tensorboard=False,
    )
    settings = TransformerConfig(data="", autoencoder="", loop=loop, caption_dropout=0.3, **changes)
    model = tiny()
    model.enable_gradient_checkpointing()
    held_out = torch.utils.data.default_collate(clips()[:2])
    encoders = Encoders(TextEncoder(text, nano_tokenizer(), 16), ImageEncoder(image))
    task = Recorded(model, encoders, settings, clips=Samples(batch=held_out))
    result = train(task, clips(), loop)
    assert model.context_parallel is None  # the run over, the model is one process's again
    exported = result.export("transformer")
    return {
        "validated": getattr(task, "validated", []),
        "main": result.is_main_process,
        "alone": exported(**inputs_of((1, 2, 1))).sum().item() if result.is_main_process else None,
    }


def one_of_two(folder: Path) -> None:
    facts = training(folder / "shared", 3, context_parallel=2)
    (folder / f"training-{facts['main']}.json").write_text(json.dumps(facts))
    training(folder / "data", 3)  # two processes, each with samples of its own
    try:
        training(folder / "odd", 3, context_parallel=3)
    except UserError as error:
        (folder / f"refused-{facts['main']}").write_text(str(error))


# --- the tests ---------------------------------------------------------------------------------------------------


def launch(processes: int, folder: Path) -> Path:
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*launcher, __file__, str(folder)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(4, tmp_path_factory.mktemp("parallel") / "four")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(2, tmp_path_factory.mktemp("parallel") / "two")


def facts_of(folder: Path, size: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_processes_together_equal_one(four: Path, name: str, checkpointing: bool, size: int) -> None:
    count = math.prod(CASES[name][0]) // math.prod(CASES[name][2])
    for facts in facts_of(four, size):
        found = facts[str(size)][f"{name} {checkpointing}"]
        assert {key: found[key] for key in QUANTITIES} == {key: pytest.approx(0, abs=1e-5) for key in QUANTITIES}
        assert found["tokens"] == [math.ceil(count / size)]  # each has its part of the tokens and no more
        assert (found["unaveraged"] < 1e-5) == (size == 1)  # and of the gradient


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_split_gather_and_attend_are_their_definitions(four: Path, size: int) -> None:
    for facts in facts_of(four, size):
        assert all(facts[f"exchanges {size}"].values()), facts[f"exchanges {size}"]


@pytest.mark.slow
def test_a_process_outside_of_the_group_is_told(four: Path) -> None:
    assert "process 3 is not of the given group" in facts_of(four, 4)[3]["outside"]


def assert_same_weights(one: Path, other: Path) -> None:
    for name in ("transformer", "text_encoder", "image_encoder", "ema", "optimizer"):
        expected, found = (dict(whole_tensors(checkpoints(folder)[-1], name)) for folder in (one, other))
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
def test_training_on_shared_samples_equals_one_process(two: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    alone = training(tmp_path / "one", 3)
    assert_same_weights(tmp_path / "one", two / "shared")
    for main in (True, False):  # both validated, together
        facts = json.loads((two / f"training-{main}.json").read_text())
        assert facts["validated"] == pytest.approx(alone["validated"], abs=1e-5) and len(alone["validated"]) == 1
        assert facts["alone"] == pytest.approx(alone["alone"], abs=1e-4) if main else facts["alone"] is None
    training(tmp_path / "one", 5)
    training(two / "shared", 5)  # a shared run may go on in one process: it is the same run
    assert read_json(checkpoints(two / "shared")[-1] / "state.json")["settings"]["processes"] == 1
    assert_same_weights(tmp_path / "one", two / "shared")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_pairs_equal_two_processes(two: Path, four: Path, sharding: str) -> None:
    assert_same_weights(two / "data", four / f"two-by-two-{sharding}")
    folder = checkpoints(four / f"two-by-two-{sharding}")[-1]
    assert read_json(folder / "state.json")["settings"]["processes"] == 2
    assert sorted(path.name for path in folder.glob("random-*.json")) == ["random-00000.json", "random-00001.json"]


@pytest.mark.slow
def test_a_number_of_processes_that_cannot_work_is_refused(two: Path) -> None:
    for main in (True, False):
        said = (two / f"refused-{main}").read_text()
        assert "2 processes cannot be divided into groups of 3" in said and "multiple of 3" in said


def test_one_process_cannot_share(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 process cannot be divided into groups of 2"):
        training(tmp_path, 1, context_parallel=2)
    with pytest.raises(UserError, match="start the processes with torchrun"):
        ContextParallel()
    with pytest.raises(UserError, match="context_parallel"):
        TransformerConfig(data="", autoencoder="", loop=LoopConfig(str(tmp_path)), context_parallel=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    (one_of_four if os.environ["WORLD_SIZE"] == "4" else one_of_two)(where)
    dist.destroy_process_group()
