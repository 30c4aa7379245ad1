"""From one decoder to the next (paper §2.2.3): causal -> Standard -> Lite, each the start of a fine-tuning.

The encoder stays what it is, so that all three decode the same latents.

**Standard** sees the future: causal taps over t-2, t-1, t become (w0 + w1, w2, 0) over t-1, t, t+1, and first-frame
injection is added with a zero output. An image and a static clip decode exactly as before.

**Lite** keeps the Standard decoder's kernels, cuts time into groups, and makes the outermost stages narrower by keeping
the channels that carry most (`fsae.weights.slicing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from fsae.errors import UserError
from fsae.layers.attention import FirstFrameAttention
from fsae.layers.conv import VideoConv3d
from fsae.model import FSAE
from fsae.storage.checkpoint import nearest
from fsae.weights.inflation import center_kernel
from fsae.weights.slicing import Moments, kept_channels, narrowed

INJECTION_SIZES = ("injection_head_dim", "injection_window", "injection_reach", "injection_sampling")


@torch.no_grad()
def to_standard(
    model: FSAE, noise: float = 0.05, first_frame_injection: bool = True, seed: int = 0, **injection: Any
) -> FSAE:
    """A causal FSAE -> a new one with the Standard decoder, equal to it, but for noise, on an image and a static clip.

    Args:
        model: an FSAE of decoder_kind "causal"; it is left as it is.
        noise: weight of the noise in the decoder's residual blocks.
        first_frame_injection: whether the injection is built; it starts as the identity, unless `model` has one.
        seed: of the injection's weights.
        injection: injection_head_dim, _window, _reach and _sampling where they are not `model`'s own.

    Raises:
        UserError: the model's decoder is of another kind, or an option does not fit.
    """
    _require(model, ("causal",), "Standard")
    for key in injection:
        if key not in INJECTION_SIZES:
            raise UserError(f"the injection has no option {key!r}{nearest(key, INJECTION_SIZES)}; leave it out")
    result = _like(
        model,
        seed,
        decoder_kind="standard",
        noise=noise,
        first_frame_injection=first_frame_injection,
        **injection,
    )
    state = result.state_dict() | {
        name: tensor
        for name, tensor in model.state_dict().items()
        if first_frame_injection or not {"injection", "motion"} & set(name.split("."))
    }
    for name, layer in model.decoder.named_modules():
        if isinstance(layer, VideoConv3d) and layer.kernel_size[0] == 3:
            state[f"decoder.{name}.weight"] = center_kernel(layer.weight)
    return _filled(result, state, model)


@torch.no_grad()
def to_lite(model: FSAE, decoder_widths: Sequence[int] | None = None, latents: Tensor | None = None) -> FSAE:
    """A Standard FSAE -> a new one with the Lite decoder; with unchanged widths it is equal to it on an image.

    Args:
        model: an FSAE of decoder_kind "standard", or "causal", which goes through `to_standard`; it is left as it is.
        decoder_widths: channels of the decoder's stages, fine to coarse; None halves the two outermost. Only stages of
            residual convolutions that do not attend can be narrower than the model's, and none can be wider.
        latents: normalised latents `B c t h w` that the decoder is run on to see which channels carry most; a few of
            one's own data are best. None is normal noise, which is what latents are channel by channel.

    Raises:
        UserError: the model's decoder is of another kind, or the widths do not fit.
    """
    _require(model, ("causal", "standard"), "Lite")
    if model.config.decoder_kind == "causal":
        model = to_standard(model)
    old = tuple(model.config.decoder_widths or model.config.widths)
    new = tuple(decoder_widths) if decoder_widths is not None else (*(width // 2 for width in old[:2]), *old[2:])
    _check_widths(model, old, new)
    with init_empty_weights():
        result = _like(model, 0, decoder_kind="lite", decoder_widths=new)
    if latents is None:
        latents = torch.randn(4, model.config.latent_channels, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    moments, stages = Moments(), model.config.residual_stages
    with moments.watching(model.decoder, stages):
        model.decode(latents.to(model.device, model.dtype))
    kept = kept_channels(model.decoder, old, new, moments)
    changed = narrowed(model.decoder, stages, kept, moments)
    state = model.state_dict() | {f"decoder.{name}": tensor for name, tensor in changed.items()}
    return _filled(result, state, model)


def _check_widths(model: FSAE, old: Sequence[int], new: Sequence[int]) -> None:
    if len(new) != len(old):
        raise UserError(f"{len(new)} decoder widths are given for {len(old)} stages; give one for each, fine to coarse")
    for s, (wide, narrow) in enumerate(zip(old, new, strict=True)):
        attends = isinstance(model.decoder.stages[s].injection, FirstFrameAttention)
        fixed = s >= model.config.residual_stages or attends
        if not 0 < narrow <= wide or (fixed and narrow != wide):
            reason = "has attention and keeps its width" if fixed else "can only become narrower"
            raise UserError(f"stage {s} of the decoder has {wide} channels, {narrow} are asked for; it {reason}")
        if s > 0 and 4 * new[s - 1] % narrow:
            raise UserError(
                f"{narrow} channels of decoder stage {s} do not divide 4 x {new[s - 1]} of stage {s - 1}, which the "
                "shortcut between them needs; give other decoder widths"
            )


def _require(model: FSAE, kinds: Sequence[str], result: str) -> None:
    kind = model.config.decoder_kind
    if kind not in kinds:
        accepted = " or ".join(kinds)
        raise UserError(
            f"the model's decoder is {kind}; a {result} decoder is made of a {accepted} one, give such a model"
        )


def _like(model: FSAE, seed: int, **changes: Any) -> FSAE:
    """A new model of `model`'s configuration but for `changes`, with weights of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            built: FSAE = FSAE.from_config(dict(model.config), **changes)
        except ValueError as error:
            raise UserError(f"the new model cannot be built: {error}; give other sizes") from None
    return built


def _filled(result: FSAE, state: Mapping[str, Tensor], model: FSAE) -> FSAE:
    """`result` with copies of these tensors, which must be all that it has, in `model`'s dtype, place and mode."""
    own = {name: tensor.to(model.device, model.dtype, copy=True) for name, tensor in state.items()}
    result.load_state_dict(own, strict=True, assign=True)
    return result.train(model.training)
