"""Peak memory of a full-size training step, counted on tensors without data: no accelerator is needed.

    python tools/bench/memory.py packages/fsae/configs/stage2.yaml --size 61 512 512

One clip goes through the losses, forward and back, then through the discriminator's, in bf16 under the file's settings.
Storages that are alive are added up: weights, their gradients and activations, at their most. The optimiser and the
average of the weights are not counted: they are three numbers more for each weight. Nor is what a library uses inside
one operation. Flags of `fsae train` may follow, such as --memory null.
"""

from __future__ import annotations

import argparse
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fsae.commandline import read_settings
from fsae.losses.perceptual import _VGG16, PerceptualLoss
from fsae.model import FSAE
from fsae.stages.config import AutoencoderConfig
from fsae.stages.objective import Adversary, Distillation, Lpips, Objective
from fsae.stages.patches import Patch, Span, exact_core
from fsae.stages.task import AutoencoderTask
from fsae.tiling import Window


class Storages(TorchDispatchMode):
    """Bytes of the storages that are made inside and alive, at their most, and the largest tensor's elements."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.now = self.peak = self.largest = 0

    def _gone(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.now -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out


def perceptual() -> PerceptualLoss:
    """LPIPS on VGG16, its weights without data."""
    state, channels, number = {}, 3, 0
    for index, stage in enumerate(_VGG16.stages):
        for conv in stage:
            state[f"features.{number}.weight"] = torch.empty(conv.channels, channels, 3, 3)
            state[f"features.{number}.bias"] = torch.empty(conv.channels)
            channels, number = conv.channels, number + 1
        state[f"lin{index}.model.1.weight"] = torch.empty(1, channels, 1, 1)
    return PerceptualLoss(state)


def built(config: AutoencoderConfig) -> AutoencoderTask:
    """The task of a configuration; models that it names by a folder are of the paper's sizes."""
    kind = config.convert if config.convert in ("standard", "lite") else "causal"
    injected = {"first_frame_injection": kind != "causal", "noise": 0.05 if kind != "causal" else 0.0}
    model = FSAE.from_preset("lite" if kind == "lite" else "standard", decoder_kind=kind, **injected)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    lpips = Lpips(perceptual(), config.perceptual_weight, config.perceptual_slice)
    adversary = Adversary.from_config(replace(config.adversarial, weights=None))
    distillation = None
    if config.distillation.teacher is not None:
        teacher = FSAE.from_preset("standard").requires_grad_(False)
        distillation = Distillation.__new__(Distillation)  # without comparing weights, which have no data
        distillation.config, distillation.teacher = config.distillation, teacher
        distillation.stages, distillation.frozen = list(range(2, 7)), {"distilled": teacher}
    return AutoencoderTask(config, model, Objective(lpips, adversary, None, distillation))


def count(config: AutoencoderConfig, size: tuple[int, int, int], batch: int) -> dict[str, Any]:
    """The peak of one step on `batch` clips of so many frames, rows and columns."""
    device, generator = "cpu", torch.Generator().manual_seed(0)
    with FakeTensorMode(allow_non_fake_inputs=True), Storages() as memory:
        task = built(config)
        for module in task.frozen.values():
            module.eval()
        every = config.adversarial.r1_every
        task.step = -(-config.adversarial.start // every) * every  # of those that take R1
        weights = memory.now
        # Drawn where there are numbers: at a corner, where a patch's core is largest.
        patch = corner(task, size)
        task._draw_patch = lambda *_: patch  # type: ignore[method-assign]
        video = torch.empty(batch, 3, *size)
        with torch.autocast(device, torch.bfloat16):
            terms = task.loss({"video": video}, generator)
        forward = memory.peak
        terms["loss"].backward()
        if task.opponents:
            kept = {name: value.detach() for name, value in terms.items() if name.startswith("keep_")}
            del terms
            with torch.autocast(device, torch.bfloat16):
                loss = task.opponent_loss({"video": video}, kept, generator, task.step)["loss"]
            loss.backward()
        trained = sum(p.nbytes for m in task.modules.values() for p in m.parameters() if p.requires_grad)
    return {
        "size": "x".join(map(str, size)),
        "batch": batch,
        "patch": None if patch is None else str(patch),
        "weights_gb": weights / 1e9,
        "forward_gb": forward / 1e9,
        "peak_gb": memory.peak / 1e9,
        "optimiser_and_average_gb": 3 * trained / 1e9,
        "largest_tensor": memory.largest / 2**31,
    }


def corner(task: AutoencoderTask, size: tuple[int, int, int]) -> Patch | None:
    """The patch at the first corner, of the configuration's size."""
    config, outer = task.config.patch, task.model.decoder.outer_stages
    latents, height, width = outer.compression.latents(size[0]), size[1] // outer.cell, size[2] // outer.cell
    length = config.latents or latents
    if size[1] * size[2] <= config.above or (not config.cells and length >= latents):
        return None
    side = config.cells or max(height, width)
    window = Window(0, 0, min(side, height), min(side, width))
    core = exact_core(window, outer.halo, height, width)
    if length >= latents:
        return Patch(window, core)
    return Patch(window, core, Span(0, length), Span(0, length - task.reach[1]))


def settings(file: Path | str, *flags: str) -> AutoencoderConfig:
    """A training's file, with flags."""
    return read_settings("memory", "", AutoencoderConfig, ["--config", str(file), *flags])


def main(arguments: list[str] | None = None) -> None:
    """Count the step that the command line names and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--size", type=int, nargs=3, required=True, metavar=("T", "H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    options, flags = parser.parse_known_args(arguments)
    print(json.dumps(count(settings(options.config, *flags), tuple(options.size), options.batch)))


if __name__ == "__main__":
    main()
