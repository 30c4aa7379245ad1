"""DC-AE's checkpoints: whose names they go by, which tensor is which layer of FSAE, and what sizes they have.

The image autoencoder `dc-ae-f32c32-sana` is published twice, by mit-han-lab's own names and as diffusers'
`AutoencoderDC`. Its stages are numbered as FSAE's are, fine to coarse, in both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor

from fsae.errors import CheckpointError
from fsae.storage.foreign import Source, open_source

RESIDUAL_BLOCK = ("conv1", "conv2", "norm")
ATTENTION_BLOCK = (
    *("attention.qkv", "attention.aggregate.0", "attention.aggregate.1", "attention.proj", "attention.norm"),
    *("local.inverted", "local.depth", "local.point", "local.norm"),
)


@dataclass(frozen=True)
class Layout:
    """One naming of DC-AE's layers.

    Attributes:
        name: whose it is.
        stage: the encoder's and the decoder's layers, `{s}` the stage and `{i}` the place in it.
        down, up: what follows the place of a step down, and of a step up.
        block: what follows the place of a block, by FSAE's name of the layer; several where it is stored in parts.
        encoder_in, norm_out, decoder_out: the layers outside the stages that FSAE has as well.
        encoder_out, decoder_in: the latent convolutions.
        matrices: ends of the names of 1x1 kernels that are stored as matrices.
    """

    name: str
    stage: Mapping[str, str]
    down: str
    up: str
    block: Mapping[str, tuple[str, ...]]
    encoder_in: str
    encoder_out: str
    decoder_in: str
    norm_out: str
    decoder_out: str
    matrices: tuple[str, ...] = ()

    def modules(
        self, encoder_depths: Sequence[int], decoder_depths: Sequence[int], residual_stages: int
    ) -> dict[str, tuple[str, ...]]:
        """FSAE's layers -> this layout's, for all stages that DC-AE has.

        A stage of the encoder ends with its step down, one of the decoder begins with its step up; the coarsest has
        neither.
        """
        names: dict[str, tuple[str, ...]] = {
            "encoder.conv_in": (self.encoder_in,),
            "decoder.norm_out": (self.norm_out,),
            "decoder.conv_out": (self.decoder_out,),
        }
        for stack, depths in (("encoder", encoder_depths), ("decoder", decoder_depths)):
            for s, depth in enumerate(depths):
                coarsest = s + 1 == len(depths)
                first = 1 if stack == "decoder" and not coarsest else 0
                for b in range(depth):
                    place = self.stage[stack].format(s=s, i=b + first)
                    for layer in RESIDUAL_BLOCK if s < residual_stages else ATTENTION_BLOCK:
                        theirs = tuple(f"{place}.{part}" for part in self.block[layer])
                        names[f"{stack}.stages.{s}.blocks.{b}.{layer}"] = theirs
                if coarsest:
                    continue
                step, part, i = ("down", self.down, depth) if stack == "encoder" else ("up", self.up, 0)
                place = self.stage[stack].format(s=s, i=i)
                names[f"{stack}.stages.{s}.{step}.conv"] = (f"{place}.{part}",)
        return names


ORIGINAL = Layout(
    name="its original",
    stage={"encoder": "encoder.stages.{s}.op_list.{i}", "decoder": "decoder.stages.{s}.op_list.{i}"},
    down="main.conv",
    up="main.conv.conv",
    block={
        "conv1": ("main.conv1.conv",),
        "conv2": ("main.conv2.conv",),
        "norm": ("main.conv2.norm",),
        "attention.qkv": ("context_module.main.qkv.conv",),
        "attention.aggregate.0": ("context_module.main.aggreg.0.0",),
        "attention.aggregate.1": ("context_module.main.aggreg.0.1",),
        "attention.proj": ("context_module.main.proj.conv",),
        "attention.norm": ("context_module.main.proj.norm",),
        "local.inverted": ("local_module.main.inverted_conv.conv",),
        "local.depth": ("local_module.main.depth_conv.conv",),
        "local.point": ("local_module.main.point_conv.conv",),
        "local.norm": ("local_module.main.point_conv.norm",),
    },
    encoder_in="encoder.project_in.conv",
    encoder_out="encoder.project_out.main.op_list.0.conv",
    decoder_in="decoder.project_in.main.conv",
    norm_out="decoder.project_out.op_list.0",
    decoder_out="decoder.project_out.op_list.2.conv",
)

DIFFUSERS = Layout(
    name="diffusers'",
    stage={"encoder": "encoder.down_blocks.{s}.{i}", "decoder": "decoder.up_blocks.{s}.{i}"},
    down="conv",
    up="conv",
    block={
        "conv1": ("conv1",),
        "conv2": ("conv2",),
        "norm": ("norm",),
        # Thirds of the one kernel, whatever they are called: its heads are query, key and value of 32 channels each.
        "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attention.aggregate.0": ("attn.to_qkv_multiscale.0.proj_in",),
        "attention.aggregate.1": ("attn.to_qkv_multiscale.0.proj_out",),
        "attention.proj": ("attn.to_out",),
        "attention.norm": ("attn.norm_out",),
        "local.inverted": ("conv_out.conv_inverted",),
        "local.depth": ("conv_out.conv_depth",),
        "local.point": ("conv_out.conv_point",),
        "local.norm": ("conv_out.norm",),
    },
    encoder_in="encoder.conv_in",
    encoder_out="encoder.conv_out",
    decoder_in="decoder.conv_in",
    norm_out="decoder.norm_out",
    decoder_out="decoder.conv_out",
    matrices=("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight", "attn.to_out.weight"),
)

LAYOUTS = (ORIGINAL, DIFFUSERS)


def open_dc_ae(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Source:
    """Open a folder, a .safetensors file, a name on the Hub or a state dict; errors as `open_source`."""
    components = ("vae", "autoencoder")
    return open_source(source, model="its autoencoder", components=components, single="model.safetensors")


def sizes(source: Source) -> dict[str, Any]:
    """Widths, depths and the kinds of stages for FSAE, new innermost stage included, as config.json has them;
    CheckpointError if it is another kind of model, or a DC-AE of another architecture."""
    if "_class_name" not in source.config:
        _check_original_name(source)
        return {}
    if source.config["_class_name"] != "AutoencoderDC":
        raise CheckpointError(
            f"{source.label} is a saved {source.config['_class_name']}, where a DC-AE is converted (AutoencoderDC); "
            "give the folder of dc-ae-f32c32-sana-1.0 or 1.1"
        )
    return _diffusers_sizes(source.config, source.label)


def _check_original_name(source: Source) -> None:
    """The original's config.json holds the model's name and nothing else."""
    name = source.config.get("model_name")
    if name is not None and not str(name).startswith("dc-ae-f32c32-sana-1."):
        raise CheckpointError(
            f"{source.label} is {name!r}, whose layers are not FSAE's; give the folder of dc-ae-f32c32-sana-1.0 or 1.1"
        )


def _diffusers_sizes(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """FSAE's sizes from an `AutoencoderDC`'s configuration, once it is known to be of sana's architecture."""
    # A configuration saved by an older diffusers lacks the options that came later, which then have their defaults.
    from diffusers import AutoencoderDC

    defaults = {name: option.default for name, option in signature(AutoencoderDC.__init__).parameters.items()}
    config = {**defaults, **config}
    if str(config["downsample_block_type"]).lower() == "conv":
        config["downsample_block_type"] = "Conv"  # both spellings are about, for the same layer
    encoder, decoder = (list(config[f"{stack}_block_out_channels"]) for stack in ("encoder", "decoder"))
    depths = {stack: list(config[f"{stack}_layers_per_block"]) for stack in ("encoder", "decoder")}
    residual = _each(config["encoder_block_types"], len(encoder)).count("ResBlock")
    for key, accepted in _architecture(residual, len(encoder) - residual).items():
        given = _each(config[key], len(encoder)) if isinstance(accepted, list) else config[key]
        if given != accepted:
            raise _other_architecture(label, key, config[key], accepted)
    for stack, widths in (("encoder", encoder), ("decoder", decoder)):
        if len(widths) != len(encoder) or len(depths[stack]) != len(encoder) or 0 in depths[stack]:
            key = f"{stack}_layers_per_block"
            raise _other_architecture(label, key, depths[stack], f"blocks in each of {len(encoder)} stages")
    sizes = {
        "widths": (*encoder, 2 * encoder[-1]),
        "encoder_depths": (*depths["encoder"], depths["encoder"][-1]),
        "decoder_depths": (*depths["decoder"], depths["decoder"][-1]),
        "residual_stages": residual,
        "attention_head_dim": config["attention_head_dim"],
    }
    return sizes if encoder == decoder else sizes | {"decoder_widths": (*decoder, 2 * decoder[-1])}


def _architecture(residual: int, attention: int) -> dict[str, Any]:
    """What `AutoencoderDC`'s options are for the layers that FSAE has, a list where there is a value a stage."""
    stages = residual + attention
    blocks = ["ResBlock"] * residual + ["EfficientViTBlock"] * attention
    scales: list[list[int]] = [[]] * residual + [[5]] * attention
    return {
        "in_channels": 3,
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "decoder_norm_types": ["rms_norm"] * stages,
        "decoder_act_fns": ["silu"] * stages,
        "decoder_conv_act_fn": "relu",
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
        "encoder_out_shortcut": True,
        "decoder_in_shortcut": True,
    }


def _each(value: Any, stages: int) -> list[Any]:
    """A value a stage, of one for all or of a sequence."""
    if isinstance(value, str):
        return [value] * stages
    return [list(item) if isinstance(item, (list, tuple)) else item for item in value]


def _other_architecture(label: str, key: str, given: Any, accepted: Any) -> CheckpointError:
    return CheckpointError(
        f"{label} is a DC-AE of another architecture: its {key} is {given}, where FSAE's layers have {accepted}; "
        "give dc-ae-f32c32-sana-1.0 or 1.1"
    )
