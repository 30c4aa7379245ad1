"""From Wan2.1-I2V-14B to FSDiT: the layers carried over, Layer Memory added with the function (nearly) unchanged.

What happens to each tensor of Wan's transformer:

    key and value, in two        D D, twice -> 2D D; so do their biases, and those of the image
    patch embedding, last map    carried for Wan's latents; dropped for FSAE's, which have other channels and patches
    all else                     unchanged

New are the routers of Layer Memory (`LayerRouter`): their bias c leaves X_{l-1} the weight e^c / (e^c + 1), 0.9991 for
the c = 7 that suits a pretrained model; with a gate they change nothing at all until they are trained. And new for
FSAE's latents are the patch embedding (Xavier-uniform) and the last map (zero), as in a model from scratch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from fsae.errors import CheckpointError, UserError
from fsae.storage.checkpoint import Shapes, check_fit
from fsae.storage.foreign import FLOATS, Report, Source
from fsdit.layers.layer_memory import LayerRouter
from fsdit.model import FSDiT
from fsdit.wan.transformer import Layout, layout_of, open_wan, wan_options

Latents = Literal["fsae", "wan"]
"""Whose latents the result takes: FSAE's (128 channels, patches of one) or those of Wan's own autoencoder."""

_ENDS = ("patch_embedding.", "head.head.")
"""The layers whose shapes follow from the latents."""


@dataclass(frozen=True)
class WanImport:
    """What is made of a Wan model.

    Attributes:
        latents: "fsae" for FSAE's latents, with a new patch embedding and last map; "wan" for those of Wan's
            autoencoder, with which the model runs as the Wan model it was.
        layer_memory: give blocks 2 ... L a router (paper §2.3.1).
        memory_bias: c of the routers' start: 7 to adapt the pretrained model, 1 as from scratch.
        memory_gate: give each router a gate that starts closed: the result computes exactly what Wan computes.
        dtype: of the weights; that of most of the source's if None. Routers, modulation, time embedding and norms stay
            in at least float32, as FSDiT keeps them.
        num_heads: of a source without config.json; heads of 128 channels, as all Wan models have, if None.
        seed: of the new weights.

    Raises:
        UserError: an option that does not fit.
    """

    latents: Latents = "fsae"
    layer_memory: bool = True
    memory_bias: float = 7.0
    memory_gate: bool = False
    dtype: torch.dtype | None = None
    num_heads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.latents not in get_args(Latents):
            raise UserError(f"latents {self.latents!r} given; one of {', '.join(get_args(Latents))} is accepted")
        if not math.isfinite(self.memory_bias):
            raise UserError(f"memory_bias is {self.memory_bias}; it must be a finite number, such as 7")
        if self.memory_gate and not self.layer_memory:
            raise UserError(
                "memory_gate is a gate of Layer Memory's routers, which layer_memory leaves out; choose one"
            )
        if self.dtype is not None and self.dtype not in FLOATS.values():
            raise UserError(f"weights cannot be {self.dtype}; choose bfloat16, float16, float32 or float64")

    @property
    def memory(self) -> dict[str, Any]:
        """FSDiT's options of Layer Memory."""
        return {name: getattr(self, name) for name in ("layer_memory", "memory_bias", "memory_gate")}


def from_wan(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    options: WanImport = WanImport(),
    progress: bool = False,
) -> tuple[FSDiT, Report]:
    """Build an FSDiT from a checkpoint of Wan2.1-I2V-14B's transformer, tensor by tensor.

    Only the tensors that are joined or change their type take memory; the others stay in their file until they are
    used, which therefore must not be written to while the model lives.

    Args:
        source: the transformer's folder or that of a pipeline with it, a .safetensors file, a name on the Hub, or a
            state dict; by Wan's own names or by those of diffusers' `WanTransformer3DModel`.
        options: what is made of it.
        progress: whether tensors are counted on stderr.

    Returns:
        The model on the CPU, and what was carried over, dropped and new.

    Raises:
        CheckpointError: the source is no such checkpoint, it is quantised, or a key is missing, unknown or misshapen:
            the first is named.
    """
    opened = open_wan(source)
    layout = layout_of(opened)
    own = wan_options(opened, layout, options.num_heads)
    model = _on_meta(target_options(own, options.latents) | options.memory, opened.label)
    plan = plan_conversion(opened, shapes_of(model), own, layout, options.latents)
    most = opened.float_dtype()
    dtype = options.dtype or most
    new = _new_tensors(model, plan, options.seed)
    state = {name: tensor.to(_dtype_of(name, dtype)) for name, tensor in new.items()}
    for name in tqdm(plan.carried, desc="converting", unit="tensor", disable=not progress):
        parts = [opened.read(part) for part in plan.carried[name]]
        state[name] = _joined(parts, _dtype_of(name, dtype), copy=isinstance(source, Mapping))
    model.load_state_dict(state, strict=True, assign=True)
    return model, plan.report(opened.shapes, shapes_of(model))


@dataclass(frozen=True)
class Conversion:
    """Which tensors of Wan make which of FSDiT: those carried, a tensor of FSDiT -> those of Wan that it is made of,
    one after the other on its rows; those dropped, Wan's own; those new, FSDiT's own."""

    carried: Mapping[str, tuple[str, ...]]
    dropped: tuple[str, ...]
    new: tuple[str, ...]

    def report(self, source: Shapes, target: Shapes) -> Report:
        """The plan in numbers, for tensors of these shapes."""
        carried = (part for parts in self.carried.values() for part in parts)
        return Report(
            carried={part: math.prod(source[part]) for part in carried},
            dropped={name: math.prod(source[name]) for name in self.dropped},
            new={name: math.prod(target[name]) for name in self.new},
            parts=(),
        )


def plan_conversion(
    source: Source, target: Shapes, own: Mapping[str, Any], layout: Layout, latents: Latents
) -> Conversion:
    """Fit Wan's tensors to those of an FSDiT, by names and shapes alone.

    Args:
        source: Wan's checkpoint.
        target: names and shapes of the FSDiT that is made.
        own: FSDiT's configuration of the Wan model itself (`fsdit.wan.transformer.wan_options`).
        layout: Wan's names.
        latents: whose latents the FSDiT takes.

    Raises:
        CheckpointError: a key is missing, unknown or misshapen.
    """
    expected: dict[str, tuple[int, ...]] = {}
    dropped: list[str] = []
    carried: dict[str, tuple[str, ...]] = {}
    for name, (rows, *rest) in shapes_of(_on_meta(own, source.label)).items():
        parts = layout.parts(name)
        expected |= dict.fromkeys(parts, (rows // len(parts), *rest))
        if latents == "fsae" and name.startswith(_ENDS):
            dropped += parts
        else:
            carried[name] = parts
    check_fit(expected, source.shapes, f"Wan2.1-I2V by {layout.name} names", source.label)
    return Conversion(carried, tuple(dropped), tuple(name for name in target if name not in carried))


def target_options(own: Mapping[str, Any], latents: Latents) -> dict[str, Any]:
    """FSDiT's configuration for these latents: the Wan model's own, or that with FSDiT's defaults for FSAE's."""
    if latents == "wan":
        return dict(own)
    of_latents = ("latent_channels", "mask_channels", "in_channels", "out_channels", "patch_size")
    return {key: value for key, value in own.items() if key not in of_latents}


def shapes_of(model: FSDiT) -> dict[str, tuple[int, ...]]:
    """Names and shapes of its tensors."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _on_meta(options: Mapping[str, Any], label: str) -> FSDiT:
    try:
        with torch.device("meta"):
            return FSDiT(**options)
    except ValueError as error:
        raise CheckpointError(f"{label} has sizes that do not fit each other ({error}); copy it again") from None


def _new_tensors(model: FSDiT, plan: Conversion, seed: int) -> dict[str, Tensor]:
    """The tensors that Wan does not have, started as those of a model from scratch; the others stay on "meta"."""
    for module in {name.rpartition(".")[0] for name in plan.new}:
        model.get_submodule(module).to_empty(device="cpu", recurse=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_parameters()
    for module in model.modules():
        if isinstance(module, LayerRouter):
            module.reset_parameters()
    state = model.state_dict()
    return {name: state[name] for name in plan.new}


@torch.no_grad()
def _joined(parts: Sequence[Tensor], dtype: torch.dtype, copy: bool) -> Tensor:
    """One tensor on the rows of its parts; `copy` keeps those of a caller's state dict the caller's."""
    if len(parts) == 1:
        return parts[0].to(dtype, copy=copy)
    return torch.cat([part.to(dtype) for part in parts])


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """What FSDiT keeps a tensor in, when the others are `dtype`."""
    wide = any(part in FSDiT._keep_in_fp32_modules for part in name.split("."))
    return torch.promote_types(dtype, torch.float32) if wide else dtype
