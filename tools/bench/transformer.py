"""How fast FSDiT is on the machine at hand, against itself without Layer Memory and against diffusers' Wan.

    python tools/bench/transformer.py forward --output build/bench/forward.json
    python tools/bench/transformer.py sampling --output build/bench/sampling.json

All contestants hold the same random weights, converted from diffusers' model, and take turns, so that a busy machine
slows them alike; figures are medians. `forward` is one evaluation, and one with its gradients. `sampling` is a whole
guided run of UniPC: `denoise` against a loop as diffusers' pipeline has it, one forward a branch and its scheduler.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor, nn

from fsae.storage.files import atomic_path
from fsdit import FSDiT
from fsdit.conditioning import Condition, Context, first_frame_condition, model_input
from fsdit.flow.path import TIMESTEPS, FlowSchedule
from fsdit.flow.sampling import denoise
from fsdit.wan.convert import WanImport, from_wan

TEXT, IMAGE = 512, 257  # tokens
SHIFT, GUIDANCE = 5.0, 5.0


def build_wan(dim: int, layers: int) -> WanTransformer3DModel:
    """diffusers' I2V model with heads of 64 channels and Wan's proportions; every weight random, none zero."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=dim // 64,
        attention_head_dim=64,
        in_channels=36,
        out_channels=16,
        text_dim=dim,
        ffn_dim=27 * dim // 10 // 8 * 8,
        num_layers=layers,
        image_dim=dim,
        added_kv_proj_dim=dim,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def contestants(dim: int, layers: int) -> tuple[WanTransformer3DModel, FSDiT, FSDiT]:
    """diffusers' model, and ours of the same weights without and with Layer Memory."""
    wan = build_wan(dim, layers)
    state = dict(wan.state_dict())
    plain, _ = from_wan(state, WanImport(latents="wan", layer_memory=False, num_heads=dim // 64))
    memory, _ = from_wan(state, WanImport(latents="wan", memory_bias=1.0, num_heads=dim // 64))
    return wan, plain.eval(), memory.eval()


def draw(dim: int, grid: tuple[int, int, int]) -> tuple[Tensor, Condition, Context]:
    """Noise ``1 16 t h w`` with condition and context."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    noise, first = normal(1, 16, *grid), normal(1, 16, 1, *grid[1:])
    context = Context(normal(1, TEXT, dim), normal(1, IMAGE, dim), normal(1, TEXT, dim))
    return noise, first_frame_condition(first, grid[0]), context


def in_turns(runs: dict[str, Callable[[], Tensor]], rounds: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median seconds of each and its last result, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Tensor] = {}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            results[name] = run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def measure_forward(dim: int, layers: int, grid: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """One evaluation, and one with gradients: seconds, and ratios to the control."""
    wan, plain, memory = contestants(dim, layers)
    noise, condition, context = draw(dim, grid)
    inputs, times = model_input(noise, condition), torch.tensor([500.0])

    def evaluate(model: nn.Module) -> Callable[[], Tensor]:
        @torch.no_grad()
        def run() -> Tensor:
            out = model(inputs, times, context.text, context.image)
            return out[0] if isinstance(out, tuple) else getattr(out, "sample", out)

        return run

    def differentiate(model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            out = model(inputs, times, context.text, context.image)
            loss: Tensor = getattr(out, "sample", out).square().mean()
            loss.backward()
            model.zero_grad()
            return loss.detach()

        return run

    models = {"diffusers": wan, "without memory": plain, "with memory": memory}
    forward, outputs = in_turns({name: evaluate(model) for name, model in models.items()}, rounds)
    training, _ = in_turns({name: differentiate(model) for name, model in models.items()}, max(1, rounds // 2))
    return {
        "forward_seconds": forward,
        "training_seconds": training,
        "largest_difference": float((outputs["without memory"] - outputs["diffusers"]).abs().max()),
        "memory_to_none": forward["with memory"] / forward["without memory"],
        "none_to_diffusers": forward["without memory"] / forward["diffusers"],
        "memory_to_diffusers": forward["with memory"] / forward["diffusers"],
        "training_memory_to_none": training["with memory"] / training["without memory"],
        "training_none_to_diffusers": training["without memory"] / training["diffusers"],
    }


@torch.no_grad()
def diffusers_loop(wan: nn.Module, noise: Tensor, condition: Condition, context: Context, steps: int) -> Tensor:
    """As diffusers' image-to-video pipeline samples, but with the unrounded timesteps that training sees."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    scheduler.set_timesteps(steps)
    latents, known = noise, torch.cat((condition.mask, condition.latents), dim=1)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1].tolist(), strict=True):
        inputs, times = torch.cat((latents, known), dim=1), torch.tensor([TIMESTEPS * sigma])
        conditional = wan(inputs, times, context.text, context.image, return_dict=False)[0]
        unconditional = wan(inputs, times, context.negative, context.image, return_dict=False)[0]
        velocity = unconditional + GUIDANCE * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def measure_sampling(dim: int, layers: int, grid: tuple[int, int, int], rounds: int, steps: int) -> dict[str, Any]:
    """A whole guided run: seconds, ratios to diffusers' loop, and how far the two results are apart."""
    wan, plain, memory = contestants(dim, layers)
    drawn = draw(dim, grid)

    def ours(model: FSDiT) -> Callable[[], Tensor]:
        return lambda: denoise(model, *drawn, schedule=FlowSchedule(SHIFT), steps=steps, guidance=GUIDANCE)

    runs = {
        "diffusers": lambda: diffusers_loop(wan, *drawn, steps),
        "without memory": ours(plain),
        "with memory": ours(memory),
    }
    seconds, results = in_turns(runs, rounds)
    apart = (results["without memory"] - results["diffusers"]).norm() / results["diffusers"].norm()
    return {
        "seconds": seconds,
        "relative_difference": float(apart),
        "none_to_diffusers": seconds["without memory"] / seconds["diffusers"],
        "memory_to_diffusers": seconds["with memory"] / seconds["diffusers"],
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, rounds, text in (("forward", 9, "one evaluation"), ("sampling", 3, "a whole guided run")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--dim", type=int, default=512, help="channels, a multiple of 64")
        command.add_argument("--layers", type=int, default=12)
        command.add_argument("--grid", nargs=3, type=int, default=[9, 12, 16], help="latent t h w; 4 make a token")
        command.add_argument("--rounds", type=int, default=rounds)
        command.add_argument("--output", type=Path, required=True, help="where the figures go, as JSON")
        if name == "sampling":
            command.add_argument("--steps", type=int, default=30)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the figures."""
    given = parse(argv)
    size = given.dim, given.layers, tuple(given.grid), given.rounds
    measured = measure_forward(*size) if given.command == "forward" else measure_sampling(*size, given.steps)
    t, h, w = given.grid
    report = {
        "command": given.command,
        "dim": given.dim,
        "layers": given.layers,
        "tokens": t * (h // 2) * (w // 2),
        "rounds": given.rounds,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        **measured,
    }
    print(json.dumps(report, indent=1))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(given.output) as path:
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"saved {given.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
