"""The jobs of the full-size transformer in numbers: what they cost, counted from shapes, and what a card gives at best.

FLOPs are counted two for a multiply-add, without the text's and image's keys and values, which are computed once for
each prompt. `gpu.py` holds what it measures against this.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fsdit.flow.solvers import SolverName
from fsdit.presets import PRESETS


@dataclass(frozen=True)
class Job:
    """One of the two samplings of a clip.

    Attributes:
        grid: latent frames, height and width.
        batch: samples in one evaluation: 2 with guidance.
        steps: of the solver.
        solver: its name.
        shift: of the noise levels.
    """

    grid: tuple[int, int, int]
    batch: int
    steps: int
    solver: SolverName
    shift: float

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def guidance(self) -> float:
        return 5.0 if self.batch == 2 else 1.0


@dataclass(frozen=True)
class Size:
    """What is measured, and how often.

    Attributes:
        model: configuration of FSDiT.
        jobs: by name.
        image_tokens: rows of the image embedding.
        square: side of the largest matrix product.
        copied: bytes of the tensor that is copied.
        rounds: timings of each forward, of which the median counts.
        backend: of torch.compile.
    """

    model: dict[str, Any]
    jobs: dict[str, Job]
    image_tokens: int
    square: int
    copied: int
    rounds: int
    backend: str


FULL = Size(
    model=PRESETS["14b"],
    jobs={"base": Job((31, 6, 10), 2, 30, "unipc", 5.0), "refiner": Job((31, 12, 20), 1, 8, "euler", 8.0)},
    image_tokens=257,
    square=8192,
    copied=2 * 2**30,
    rounds=9,
    backend="inductor",
)
TINY = Size(
    model={
        "dim": 64,
        "ffn_dim": 128,
        "num_heads": 2,
        "num_layers": 3,
        "text_dim": 32,
        "text_len": 16,
        "image_dim": 16,
        "latent_channels": 8,
    },
    jobs={"base": Job((3, 2, 2), 2, 3, "unipc", 5.0), "refiner": Job((3, 4, 4), 1, 2, "euler", 8.0)},
    image_tokens=5,
    square=128,
    copied=2**20,
    rounds=1,
    backend="eager",  # torch.compile's tracing without its code generator, which needs half a minute
)


# --- counted from shapes -----------------------------------------------------------------------------------------


def forward_flops(config: dict[str, Any], tokens: int, image_tokens: int) -> dict[str, float]:
    """FLOPs of one sample's evaluation with cached text and image: blocks' linears, both attentions, Layer Memory.

    Embeddings and head are left out: a thousandth.
    """
    dim, layers = config["dim"], config["num_layers"]
    linear = 6 * dim**2 + 2 * dim * config["ffn_dim"]  # q, k, v, out, cross q and out; feed-forward
    seen = config["text_len"] + image_tokens
    states = sum(range(2, layers + 1))
    return {
        "linear": 2.0 * linear * tokens * layers,
        "self_attention": 4.0 * tokens * dim * tokens * layers,
        "cross_attention": 4.0 * seen * dim * tokens * layers,
        "layer_memory": 4.0 * states * dim * tokens,  # logits, and the weighted sum
    }


def memory_bytes(config: dict[str, Any], tokens: int) -> float:
    """The least that Layer Memory reads for one sample's evaluation: every bfloat16 state once in each later layer."""
    return 2.0 * sum(range(2, config["num_layers"] + 1)) * config["dim"] * tokens


# --- what the card gives at best ---------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(actions: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each action, called three times in a row and in turns with the others, after a warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(3):
                action()
            synchronize(device)
            if number:
                taken[name].append((time.perf_counter() - start) / 3)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def matrix_product(rows: int, inner: int, columns: int, device: torch.device) -> tuple[Callable[[], Any], float]:
    """A bfloat16 product of random matrices, and its FLOPs."""
    left = torch.randn(rows, inner, dtype=torch.bfloat16, device=device)
    right = torch.randn(columns, inner, dtype=torch.bfloat16, device=device)
    return lambda: F.linear(left, right), 2.0 * rows * inner * columns


def self_attention(job: Job, heads: int, dim: int, device: torch.device) -> tuple[Callable[[], Any], float]:
    """A job's attention among its own tokens, of random bfloat16 numbers, and its FLOPs."""
    shape = (3, job.batch, heads, job.tokens, dim // heads)
    query, key, value = torch.randn(shape, dtype=torch.bfloat16, device=device)
    return lambda: F.scaled_dot_product_attention(query, key, value), job.batch * 4.0 * job.tokens**2 * dim


def ceilings(size: Size, device: torch.device) -> dict[str, Any]:
    """TFLOP/s of products (a large square one, and the jobs' own), of attention alone, and GB/s of a copy."""
    dim, ffn, heads = (size.model[name] for name in ("dim", "ffn_dim", "num_heads"))

    def rate(measured: tuple[Callable[[], Any], float]) -> float:
        action, work = measured
        return work / in_turns({"": action}, size.rounds, device)[""]

    shapes = {"square": (size.square, size.square, size.square)}
    for name, job in size.jobs.items():
        rows = job.batch * job.tokens
        shapes |= {f"{name} projection": (rows, dim, dim), f"{name} feed-forward": (rows, dim, ffn)}
    tflops = {
        f"{name} {'x'.join(map(str, shape))}": rate(matrix_product(*shape, device)) / 1e12
        for name, shape in shapes.items()
    }
    best = max(tflops.values())
    for name, job in size.jobs.items():
        tflops[f"{name} attention"] = rate(self_attention(job, heads, dim, device)) / 1e12
    source = torch.zeros(size.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = rate((lambda: target.copy_(source), 2.0 * size.copied))
    return {"tflops": tflops, "matmul_tflops": best, "copy_gbs": copied / 1e9}
