"""From DC-AE to FSAE (paper §2.2.1): the image autoencoder `dc-ae-f32c32-sana` becomes a causal video autoencoder.

What happens to each tensor of the image model:

    3x3 kernel, full or depthwise    O I 3 3 -> O I 3 3 3, all of it at the tap of the output's own frame
    1x1 and 5x5 kernel               O I h w -> O I 1 h w
    query, key, value in three       O I, three times -> 3O I 1 1 1, in this order
    norm, bias                       unchanged
    encoder out, decoder in          dropped: FSAE's latents lie one stage deeper and have other channels

FSAE's innermost stage, the steps to and from it and its latent convolutions are new. They start such that the model is
the image autoencoder around a bottleneck of shortcuts: the stage is the identity, the steps are their shortcuts, and
only the two latent convolutions are random, beside their own shortcuts.

sana-1.0 and sana-1.1 have the same architecture; 1.1 has the better decoder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from tqdm import tqdm

from fsae.errors import CheckpointError, UserError
from fsae.model import FSAE
from fsae.presets import STANDARD
from fsae.storage.checkpoint import Shapes, check_fit, nearest
from fsae.storage.foreign import Report, Source
from fsae.weights.dc_ae import LAYOUTS, Layout, open_dc_ae, sizes
from fsae.weights.inflation import inflate_kernel
from fsae.weights.initialization import start_innermost_as_shortcuts

SIZES = (
    "widths",
    "encoder_depths",
    "decoder_depths",
    "decoder_widths",
    "latent_channels",
    "residual_stages",
    "temporal_stages",
    "attention_head_dim",
    "injection_head_dim",
    "injection_window",
    "injection_reach",
    "injection_sampling",
    "frame_matching",
)
"""The options of FSAE that a conversion may set; the others follow from what DC-AE and a causal decoder are."""


def from_dc_ae(
    source: str | os.PathLike[str] | Mapping[str, Tensor], *, seed: int = 0, progress: bool = False, **config: Any
) -> tuple[FSAE, Report]:
    """Build an FSAE with a causal decoder from a DC-AE checkpoint, `dc-ae-f32c32-sana-1.0` or `-1.1`.

    On an image and on a static clip its stages compute what those of the image autoencoder do, exactly.

    Args:
        source: a folder, a .safetensors file or a name on the Hub, or a state dict; by mit-han-lab's names or by those
            of diffusers' `AutoencoderDC`.
        seed: of the new weights.
        progress: whether tensors are counted on stderr.
        config: sizes (`SIZES`) where they are not the checkpoint's own, which stand in its config.json if it is
            diffusers' and are the full model's elsewhere. `widths` and the depths include the new innermost stage:
            without them it is twice as wide as the one before it and as deep; `latent_channels` is 128.

    Returns:
        The model, fp32 on the CPU, and what was carried over, dropped and new.

    Raises:
        CheckpointError: the source is no such checkpoint, or a key is missing, unknown or misshapen: the first is
            named.
        UserError: an option that is unknown or does not belong to a conversion, or sizes that do not fit each other.
    """
    opened = open_dc_ae(source)
    options = _options(opened, config)
    shapes = _shapes(options)
    conversion = plan_conversion(opened.shapes, shapes, options, opened.label)
    opened.float_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FSAE(**options)
    start_innermost_as_shortcuts(model)
    state = model.state_dict()
    for name in tqdm(conversion.carried, desc="converting", unit="tensor", disable=not progress):
        _carry([opened.read(part) for part in conversion.carried[name]], state[name])
    return model, conversion.report(opened.shapes, shapes)


@dataclass(frozen=True)
class Conversion:
    """Which tensors of DC-AE make which of FSAE.

    Attributes:
        layout: whose names the source has.
        carried: a tensor of FSAE -> those of DC-AE that it is made of, one after the other on its output channels.
        dropped: the tensors of DC-AE's latent convolutions, for which FSAE has no place.
    """

    layout: Layout
    carried: Mapping[str, tuple[str, ...]]
    dropped: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """All names that the source is to have."""
        return {part for parts in self.carried.values() for part in parts} | set(self.dropped)

    def report(self, source: Shapes, target: Shapes) -> Report:
        """The conversion in numbers, for tensors of these shapes."""
        return Report(
            carried={part: math.prod(source[part]) for parts in self.carried.values() for part in parts},
            dropped={name: math.prod(source[name]) for name in self.dropped},
            new={name: math.prod(shape) for name, shape in target.items() if name not in self.carried},
        )


def plan_conversion(
    source: Shapes, target: Shapes, options: Mapping[str, Any], label: str = "the source"
) -> Conversion:
    """Fit DC-AE's tensors to those of `FSAE(**options)`, by names and shapes alone; `label` is what errors call the
    source.

    Raises:
        CheckpointError: a key is missing, unknown or misshapen.
    """
    conversions = [_conversion(layout, target, options) for layout in LAYOUTS]
    best = max(conversions, key=lambda conversion: len(conversion.names & set(source)))
    if len(best.names & set(source)) * 2 < len(best.names):
        example = next(iter(source), None)
        raise CheckpointError(
            f"{label} holds no DC-AE of f32c32-sana's architecture: "
            + (f"its first of {len(source)} keys is {example!r}" if source else "it is empty")
            + "; give dc-ae-f32c32-sana-1.0 or 1.1, by its original or by diffusers' names"
        )
    check_fit(_expected(best, source, target, options), source, f"DC-AE by {best.layout.name} names", label)
    return best


def _conversion(layout: Layout, target: Shapes, options: Mapping[str, Any]) -> Conversion:
    depths = options["encoder_depths"][:-1], options["decoder_depths"][:-1]
    modules = layout.modules(*depths, options["residual_stages"])
    carried = {}
    for name in target:
        module, _, parameter = name.rpartition(".")
        if module in modules:
            carried[name] = tuple(f"{part}.{parameter}" for part in modules[module])
    latent = (layout.encoder_out, layout.decoder_in)
    return Conversion(layout, carried, tuple(f"{module}.{kind}" for module in latent for kind in ("weight", "bias")))


def _expected(
    conversion: Conversion, source: Shapes, target: Shapes, options: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """The shapes that DC-AE's tensors are to have, if FSAE's are `target`."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, parts in conversion.carried.items():
        out, *rest = target[name]
        kernel = rest[:1] + rest[2:] if rest else []
        for part in parts:
            # diffusers keeps the 1x1 kernels at both ends of the attention as matrices.
            matrix = part.endswith(conversion.layout.matrices)
            expected[part] = (out // len(parts), *(kernel[:1] if matrix else kernel))
    coarsest = len(options["encoder_depths"]) - 2
    encoded = target[f"encoder.stages.{coarsest}.down.conv.weight"][1]
    decoded = target[f"decoder.stages.{coarsest}.up.conv.weight"][0]
    encoder_out, decoder_in = conversion.layout.encoder_out, conversion.layout.decoder_in
    # Nothing of FSAE tells how many channels the latents of the source have, so their bias does.
    latent = (source.get(f"{encoder_out}.bias") or (32,))[0]
    expected |= {f"{encoder_out}.weight": (latent, encoded, 3, 3), f"{encoder_out}.bias": (latent,)}
    return expected | {f"{decoder_in}.weight": (decoded, latent, 3, 3), f"{decoder_in}.bias": (decoded,)}


@torch.no_grad()
def _carry(parts: Sequence[Tensor], target: Tensor) -> None:
    """Fill a tensor of FSAE from those of DC-AE that it is made of."""
    whole = torch.cat(list(parts)).to(target.dtype)
    if target.ndim == 5:
        out, inputs, taps, height, width = target.shape
        whole = inflate_kernel(whole.reshape(out, inputs, height, width), taps, taps - 1)
    target.copy_(whole)


def _options(source: Source, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """FSAE's configuration: the standard sizes, over them the source's own, over them the caller's."""
    for key in overrides:
        if key not in SIZES:
            raise UserError(
                f"a conversion has no option {key!r}{nearest(key, SIZES)}; it takes sizes: {', '.join(SIZES)}"
            )
    causal = {"decoder_kind": "causal", "first_frame_injection": False, "noise": 0.0}
    options = STANDARD | sizes(source) | dict(overrides) | causal
    lengths = {key: len(options[key]) for key in ("widths", "encoder_depths", "decoder_depths")}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 2:
        given = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise UserError(f"sizes do not fit: {given}; give each a value a stage, the new innermost one included")
    if options["widths"][-1] % options["latent_channels"]:
        raise UserError(
            f"{options['latent_channels']} latent channels do not divide the {options['widths'][-1]} of the innermost "
            "stage; give other latent_channels or widths"
        )
    return options


def _shapes(options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of `FSAE(**options)`, without building them."""
    try:
        with init_empty_weights():
            return {name: tuple(tensor.shape) for name, tensor in FSAE(**options).state_dict().items()}
    except ValueError as error:
        raise UserError(f"sizes do not fit: {error}; give others") from None
