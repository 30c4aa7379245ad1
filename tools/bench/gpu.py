"""What the transformer costs at full size on one GPU: seconds, TFLOP/s, memory, and the share of Layer Memory.

    python tools/bench/gpu.py                                        # all parts, into build/bench/gpu.json
    python tools/bench/gpu.py --parts base-eager,refiner-graph       # some; --list names them
    python tools/bench/gpu.py --table                                # what has been measured
    python tools/bench/gpu.py --tiny --output build/bench/tiny.json  # all of the code, on a CPU, for no figures

A part is a job run in one way. The jobs are those of a 121-frame clip of 720p (paper §3.2): `base`, 31x6x10 = 1,860
tokens, 30 steps of UniPC with guidance in one batch of two, 60 evaluations; `refiner`, 31x12x20 = 7,440 tokens, 8 steps
of Euler. The ways are `eager`, `compiled` (the blocks, by torch.compile), `graph` (eager, in a CUDA graph) and
`compiled-graph` (both). Each part measures the model without Layer Memory, with it in plain torch, and fused; the
three take turns, so that a card that slows down slows all of them, and their outputs are compared. Nothing is
downloaded and no checkpoint is needed: weights are random bfloat16 made on the device, routers and modulation float32,
as they are loaded for sampling.

Every call first measures the `ceilings`, what the card gives at best in matrix products and copies; the parts that
follow are held against them. A part that takes longer than 8 minutes is stopped. The output is written after each
part, so that an interrupted call loses only what it was at.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from roofline import FULL, TINY, Job, Size, ceilings, forward_flops, in_turns, memory_bytes, synchronize

from fsae.devices import choose_device
from fsae.storage.files import atomic_path
from fsdit.conditioning import Condition, Context, first_frame_condition
from fsdit.flow.capture import CapturedDenoise
from fsdit.flow.path import FlowSchedule
from fsdit.flow.sampling import GuidedVelocity, denoise
from fsdit.model import FSDiT

PAPER_SECONDS = 27.4  # both transformers on one H100 (paper, page 1)
GOAL_SECONDS, GOAL_SHARE = 10.0, 0.05
MEMORIES = ("off", "plain", "fused")
WAYS = ("eager", "compiled", "graph", "compiled-graph")
COLUMNS = "part | memory | s a forward | TFLOP/s | of matmul | Layer Memory | from plain | job s | start s | peak GB"


# --- the model ---------------------------------------------------------------------------------------------------


class Unavailable(Exception):
    """This machine cannot run it."""


def random_model(config: dict[str, Any], device: torch.device) -> FSDiT:
    """A model of random weights that never were on the CPU, in the dtypes that a loaded one has."""
    with torch.device("meta"):
        model = FSDiT(**config)
    wide = set(FSDiT._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if not wide & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:  # norms and biases
            parameter.data.fill_(float(name.endswith(("weight", "gate"))))
    return model.eval().requires_grad_(False)


def sharing(model: FSDiT, config: dict[str, Any], memory: str) -> FSDiT:
    """Another model over the same weights, with Layer Memory off, plain or fused."""
    with torch.device("meta"):
        other = FSDiT(**{**config, "layer_memory": memory != "off"})
    state = model.state_dict()
    other.load_state_dict({name: state[name] for name in other.state_dict()}, strict=True, assign=True)
    if memory != "off":
        other.set_memory_kernel(memory)
    return other.eval().requires_grad_(False)


# --- one part ----------------------------------------------------------------------------------------------------


def random_inputs(size: Size, job: Job, config: Any, device: torch.device) -> tuple[Tensor, Condition, Context]:
    """Noise, a first latent, and embeddings of the widths that the model takes."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    noise = normal(1, config.latent_channels, *job.grid)
    text = normal(2, config.text_len, config.text_dim).bfloat16()
    image = normal(1, size.image_tokens, config.image_dim).bfloat16()
    context = Context(text[:1], image, text[1:] if job.batch == 2 else None)
    return noise, first_frame_condition(noise[:, :, :1], job.grid[0], config.mask_channels), context


class Bench:
    """Measures parts on one device; the weights are made once."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.weights: FSDiT | None = None

    def measure(self, job: Job, way: str) -> list[dict[str, Any]]:
        """A row for each kind of Layer Memory.

        Raises:
            Unavailable: the whole part cannot run here.
        """
        graph, compiled = "graph" in way, "compiled" in way
        if graph and self.device.type != "cuda":
            raise Unavailable("CUDA graphs need an NVIDIA GPU")
        torch.compiler.reset()
        rows: dict[str, dict[str, Any]] = {}
        models: dict[str, FSDiT] = {}
        for memory in MEMORIES:
            try:
                models[memory] = self._model(memory, compiled)
            except Unavailable as reason:
                rows[memory] = {"memory": memory, "unavailable": str(reason)}
                continue
            rows[memory] = {"memory": memory, **self._measure_job(models[memory], job, graph)}
        free_memory(self.device)
        forwards = {memory: self._forward(model, job, graph) for memory, model in models.items()}
        taken = in_turns(forwards, self.size.rounds, self.device)
        plain = forwards["plain"]()
        flops = forward_flops(self.size.model, job.tokens, self.size.image_tokens)
        for memory, seconds in taken.items():
            counted = sum(flops.values()) - (flops["layer_memory"] if memory == "off" else 0)
            rows[memory] |= {
                "forward_seconds": seconds,
                "tflops": job.batch * counted / seconds / 1e12,
                "memory_share": (seconds - taken["off"]) / seconds,
                "from_plain": float((forwards[memory]() - plain).norm() / plain.norm()),
            }
        return list(rows.values())

    def _model(self, memory: str, compiled: bool) -> FSDiT:
        if memory == "fused" and self.device.type != "cuda":
            raise Unavailable("the fused kernels are Triton's, which need a GPU")
        if self.weights is None:
            self.weights = random_model(self.size.model, self.device)
        model = sharing(self.weights, self.size.model, memory)
        if compiled:
            model.compile_repeated_blocks(backend=self.size.backend, fullgraph=True)
        return model

    def _measure_job(self, model: FSDiT, job: Job, graph: bool) -> dict[str, Any]:
        """Seconds of a whole sampling, of the start before it (a first sampling, or the capture), and peak memory."""
        free_memory(self.device)
        inputs = random_inputs(self.size, job, model.config, self.device)
        options: dict[str, Any] = {
            "schedule": FlowSchedule(job.shift),
            "steps": job.steps,
            "solver": job.solver,
            "guidance": job.guidance,
        }
        run: Callable[..., Tensor] = partial(denoise, model, **options)
        start = time.perf_counter()
        if graph:
            run = CapturedDenoise(model, *inputs, **options)
        latents = run(*inputs)
        synchronize(self.device)
        ready = time.perf_counter()
        run(*inputs)
        synchronize(self.device)
        return {
            "job_seconds": time.perf_counter() - ready,
            "start_seconds": ready - start,
            "peak_bytes": peak_bytes(self.device),
            "finite": bool(latents.isfinite().all()),
        }

    def _forward(self, model: FSDiT, job: Job, graph: bool) -> Callable[[], Tensor]:
        """One evaluation, with guidance if the job has it, its text and image already taken in."""
        noise, condition, context = random_inputs(self.size, job, model.config, self.device)
        velocity = GuidedVelocity(model, condition, context, job.guidance)

        @torch.no_grad()
        def evaluate() -> Tensor:
            return velocity(noise, 500.0)

        if not graph:
            return evaluate
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            evaluate()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            result = evaluate()

        def replay(_read: Callable[[], Tensor] = evaluate) -> Tensor:  # holds on to what the graph reads
            captured.replay()
            return result

        return replay


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to, and count the peak from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most that tensors took on the device since `free_memory`; on a CPU the most the process ever had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def at_most(minutes: float) -> Iterator[None]:
    """TimeoutError in what takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {minutes:g} minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- what is kept and shown --------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, str]:
    """What the figures depend on."""
    found = {"card": platform.processor() or platform.machine(), "driver": "none"}
    if device.type == "cuda":
        found = {"card": torch.cuda.get_device_name(device), "driver": "unknown"}
        with suppress(OSError, subprocess.CalledProcessError):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()[0]
    for package in ("torch", "triton", "diffusers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"python": platform.python_version(), "cuda": str(torch.version.cuda)}


def newest_parts(runs: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Of each part the newest measurement on the last call's machine at its size, with the ceilings of its own call."""
    last = runs[-1]
    alike = [run for run in runs if all(run[key] == last[key] for key in ("machine", "tiny"))]
    return {name: (part, run["ceilings"]) for run in alike for name, part in run["parts"].items()}


def table(runs: list[dict[str, Any]], size: Size) -> str:
    """All that is known, as Markdown."""
    parts = newest_parts(runs)
    lines = [f"| {COLUMNS} |", "|---" * (COLUMNS.count("|") + 1) + "|"]
    for name in part_names(size):
        if name not in parts:
            continue
        part, best = parts[name]
        if "rows" not in part:
            lines.append(f"| {name} | {part.get('unavailable') or part.get('failed')} |" + " |" * 8)
        for row in part.get("rows", []):
            if "unavailable" in row:
                lines.append(f"| {name} | {row['memory']}: {row['unavailable']} |" + " |" * 8)
                continue
            share = "" if row["memory"] == "off" else f"{row['memory_share']:.1%}"
            apart = f"{row['from_plain']:.1e}" if row["finite"] else "not finite"
            lines.append(
                f"| {name} | {row['memory']} | {row['forward_seconds']:.4f} | {row['tflops']:.4g} "
                f"| {row['tflops'] / best['matmul_tflops']:.0%} | {share} | {apart} | {row['job_seconds']:.3f} "
                f"| {row['start_seconds']:.1f} | {row['peak_bytes'] / 1e9:.2f} |"
            )
    return "\n".join([*lines, "", *conclusions(parts, runs[-1]["ceilings"], size)])


def conclusions(parts: dict[str, Any], best: dict[str, Any], size: Size) -> list[str]:
    """The ceilings, the least that Layer Memory can cost, and the goals."""
    rates = ", ".join(f"{name} {rate:.4g}" for name, rate in best["tflops"].items())
    lines = [f"Ceilings: {rates} TFLOP/s; copy {best['copy_gbs']:.4g} GB/s, bytes read and written."]
    for name, job in size.jobs.items():
        read = job.batch * memory_bytes(size.model, job.tokens)
        lines.append(
            f"Layer Memory reads at least {read / 1e9:.3g} GB in a {name} forward: "
            f"{1e3 * read / best['copy_gbs'] / 1e9:.3g} ms at the copy's speed."
        )
    for way in WAYS:
        for memory in MEMORIES[1:]:
            rows = [
                row
                for job in size.jobs
                for row in parts.get(f"{job}-{way}", ({}, {}))[0].get("rows", [])
                if row["memory"] == memory and "job_seconds" in row
            ]
            if len(rows) == len(size.jobs):
                total, share = sum(row["job_seconds"] for row in rows), max(row["memory_share"] for row in rows)
                lines.append(
                    f"{way}, {memory}: both transformers {total:.3f} s (goal at most {GOAL_SECONDS:g}, paper "
                    f"{PAPER_SECONDS:g} on one H100); Layer Memory {share:.1%} of the forward (goal at most "
                    f"{GOAL_SHARE:.0%})."
                )
    return lines


def keep(output: Path, runs: list[dict[str, Any]]) -> None:
    """Write all calls, whole or not at all."""
    with atomic_path(output) as path:
        path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


# --- the command -------------------------------------------------------------------------------------------------


def part_names(size: Size) -> list[str]:
    """All parts but the ceilings, in their order."""
    return [f"{job}-{way}" for way in WAYS for job in size.jobs]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help="names, with commas between them; without it, all")
    parser.add_argument("--list", action="store_true", help="name the parts")
    parser.add_argument("--table", action="store_true", help="measure nothing, show what has been")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU runs in seconds")
    parser.add_argument("--device", help="without it, the GPU if there is one")
    parser.add_argument("--minutes", type=float, default=8.0, help="that a part may take (default: %(default)g)")
    parser.add_argument("--output", type=Path, default=Path("build/bench/gpu.json"), help="(default: %(default)s)")
    given = parser.parse_args(argv)
    names = ["ceilings", *part_names(TINY if given.tiny else FULL)]
    given.parts = names if given.parts is None else given.parts.split(",")
    for name in given.parts:
        if name not in names:
            parser.error(f"there is no part {name!r}; the parts are {', '.join(names)}")
    if given.table and not given.output.is_file():
        parser.error(f"there is no {given.output}; measure first")
    return given


def run_part(bench: Bench, name: str, minutes: float) -> dict[str, Any]:
    """Measure a part; what goes wrong in it is told and does not keep others from running."""
    job, _, way = name.partition("-")
    start = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        with at_most(minutes):
            found["rows"] = bench.measure(bench.size.jobs[job], way)
    except Unavailable as reason:
        found["unavailable"] = str(reason)
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        traceback.print_exc()
    free_memory(bench.device)
    return found | {"seconds": time.perf_counter() - start}


def main(argv: list[str] | None = None) -> int:
    """Measure, write the figures and print them."""
    given = parse(argv)
    size = TINY if given.tiny else FULL
    if given.list:
        print("ceilings", *part_names(size), sep="\n")
        return 0
    given.output.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(given.output.read_text())["runs"] if given.output.is_file() else []
    if not given.table:
        device = choose_device(given.device)
        command = shlex.join(["python", "tools/bench/gpu.py", *(sys.argv[1:] if argv is None else argv)])
        run: dict[str, Any] = {"command": command, "tiny": given.tiny, "machine": machine(device)}
        print(json.dumps(run), f"torch.compile by {size.backend}", sep="\n", flush=True)
        bench = Bench(size, device)
        runs.append(run | {"ceilings": ceilings(size, device), "parts": {}})
        keep(given.output, runs)
        for name in (name for name in given.parts if name != "ceilings"):
            runs[-1]["parts"][name] = run_part(bench, name, given.minutes)
            keep(given.output, runs)
            print(f"{name}: {runs[-1]['parts'][name]['seconds']:.1f} s", file=sys.stderr, flush=True)
    print(table(runs, TINY if runs[-1]["tiny"] else FULL))
    print(f"figures: {given.output}")
    return int(any("failed" in part for part in runs[-1]["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
