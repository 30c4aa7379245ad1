"""Wan2.1-I2V's checkpoints: whose names they go by, which tensor is which of FSDiT's, and what sizes they have.

The transformer is published twice, by Wan's own names (`WanModel`) and as diffusers' `WanTransformer3DModel`. Both keep
keys and values apart, which FSDiT projects in one; all else has a tensor of the same shape here and there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor

from fsae.errors import CheckpointError, UserError
from fsae.storage.checkpoint import nearest
from fsae.storage.foreign import Source, open_source

HEAD_DIM = 128
"""Channels of a head in every Wan model, for checkpoints that come without a configuration."""

_GIVE = "give Wan2.1-I2V-14B, by its original or by diffusers' names"
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class Layout:
    """One naming of Wan's tensors.

    Attributes:
        name: whose it is.
        image: how the names of the image branch's own layers begin.
        outer: FSDiT's layers and parameters outside the blocks -> this layout's; several where FSDiT's is made of
            several, one after the other on its rows.
        block: the same within a block.
    """

    name: str
    image: str
    outer: Mapping[str, tuple[str, ...]]
    block: Mapping[str, tuple[str, ...]]

    def parts(self, name: str) -> tuple[str, ...]:
        """The tensors that FSDiT's tensor `name` is made of; none for a router's."""
        prefix, table, inner = "", self.outer, name
        if found := _BLOCK.match(name):
            prefix, table, inner = found.group(), self.block, name[found.end() :]
        if inner in table:
            return tuple(prefix + part for part in table[inner])
        module, _, parameter = inner.rpartition(".")
        return tuple(f"{prefix}{part}.{parameter}" for part in table.get(module, ()))


_EMBEDDINGS = ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")

ORIGINAL = Layout(
    name="its original",
    image="img_emb.",
    outer={
        "patch_embedding": ("patch_embedding",),
        **{name: (name,) for name in _EMBEDDINGS},
        "time_projection": ("time_projection.1",),
        **{f"image_embedding.{i}": (f"img_emb.proj.{i}",) for i in (0, 1, 3, 4)},
        "head.head": ("head.head",),
        "head.modulation": ("head.modulation",),
    },
    block={
        **{
            f"{attention}.{ours}": tuple(f"{attention}.{part}" for part in theirs)
            for attention in ("self_attn", "cross_attn")
            for ours, theirs in {
                "to_q": ("q",),
                "to_kv": ("k", "v"),
                "to_out": ("o",),
                "norm_q": ("norm_q",),
                "norm_k": ("norm_k",),
            }.items()
        },
        "cross_attn.to_kv_image": ("cross_attn.k_img", "cross_attn.v_img"),
        "cross_attn.norm_k_image": ("cross_attn.norm_k_img",),
        "norm3": ("norm3",),
        "ffn.0": ("ffn.0",),
        "ffn.2": ("ffn.2",),
        "modulation": ("modulation",),
    },
)

DIFFUSERS = Layout(
    name="diffusers'",
    image="condition_embedder.image_embedder.",
    outer={
        "patch_embedding": ("patch_embedding",),
        "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
        "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
        "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
        "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
        "time_projection": ("condition_embedder.time_proj",),
        "image_embedding.0": ("condition_embedder.image_embedder.norm1",),
        "image_embedding.1": ("condition_embedder.image_embedder.ff.net.0.proj",),
        "image_embedding.3": ("condition_embedder.image_embedder.ff.net.2",),
        "image_embedding.4": ("condition_embedder.image_embedder.norm2",),
        "head.head": ("proj_out",),
        "head.modulation": ("scale_shift_table",),
    },
    block={
        **{
            f"{ours}.{layer}": tuple(f"{theirs}.{part}" for part in parts)
            for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
            for layer, parts in {
                "to_q": ("to_q",),
                "to_kv": ("to_k", "to_v"),
                "to_out": ("to_out.0",),
                "norm_q": ("norm_q",),
                "norm_k": ("norm_k",),
            }.items()
        },
        "cross_attn.to_kv_image": ("attn2.add_k_proj", "attn2.add_v_proj"),
        "cross_attn.norm_k_image": ("attn2.norm_added_k",),
        "norm3": ("norm2",),
        "ffn.0": ("ffn.net.0.proj",),
        "ffn.2": ("ffn.net.2",),
        "modulation": ("scale_shift_table",),
    },
)

LAYOUTS = (ORIGINAL, DIFFUSERS)


def open_wan(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Source:
    """Open the transformer's folder or that of a pipeline with it, a .safetensors file, a name on the Hub or a state
    dict; errors as `open_source`."""
    subfolder = None
    if not isinstance(source, Mapping):
        folder = Path(source)
        if folder.is_dir():
            inside = not (folder / "config.json").is_file() and (folder / "transformer" / "config.json").is_file()
        else:  # Wan's repositories of pipelines are called so, and hold two encoders that are not wanted here
            inside = not folder.exists() and folder.name.endswith("-Diffusers")
        subfolder = "transformer" if inside else None
    return open_source(source, subfolder=subfolder)


def layout_of(source: Source) -> Layout:
    """Whose names a Wan2.1-I2V transformer goes by; CheckpointError if it is none, has no image branch, or is
    quantised."""
    config, shapes = source.config, source.shapes
    kind = config.get("_class_name", "WanModel")
    if kind not in ("WanModel", "WanTransformer3DModel"):
        raise CheckpointError(f"{source.label} is a saved {kind}, where Wan's transformer is converted; {_GIVE}")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{source.label} was saved quantised; give the checkpoint with float weights")
    typical = {layout.name: _typical_names(layout) for layout in LAYOUTS}
    layout = max(LAYOUTS, key=lambda layout: len(typical[layout.name] & set(shapes)))
    image = any(name.startswith(layout.image) for name in shapes)
    missing = typical[layout.name] - set(shapes)
    if len(missing) * 2 > len(typical[layout.name]) or (missing and not image):
        example = next(iter(shapes), None)
        raise CheckpointError(
            f"{source.label} holds no transformer of Wan2.1-I2V's architecture: "
            + (f"its first of {len(shapes)} keys is {example!r}" if shapes else "it is empty")
            + f"; {_GIVE}"
        )
    if not image:
        lacking = layout.parts("image_embedding.0.weight")[0]
        raise CheckpointError(
            f"{source.label} is a Wan model without an image branch, as the text-to-video models and Wan2.2 are: "
            f"it lacks {lacking!r}{nearest(lacking, shapes)}; {_GIVE}"
        )
    return layout


def _typical_names(layout: Layout) -> set[str]:
    """The weights outside the image branch, and those of the first block."""
    names = [*layout.outer, *(f"blocks.0.{name}" for name in layout.block)]
    tensors = [name if name.endswith("modulation") else f"{name}.weight" for name in names]
    return {part for name in tensors if "image" not in name for part in layout.parts(name)}


def wan_options(source: Source, layout: Layout, num_heads: int | None = None) -> dict[str, Any]:
    """FSDiT's configuration of the Wan model itself: its own latents, patches and channels, without Layer Memory.

    Raises:
        CheckpointError: it is another model, or another kind of Wan model.
        UserError: `num_heads`, of a checkpoint without a configuration, is needed, or is not what that says.
    """
    options = _sizes_in_tensors(source, layout) | _sizes_in_config(source)
    known = options.setdefault("num_heads", num_heads)
    if known is None:
        if options["dim"] % HEAD_DIM:
            raise UserError(
                f"{source.label} has no configuration, and {options['dim']} channels are no heads of {HEAD_DIM}; "
                "give the folder with its config.json, or num_heads in Python"
            )
        options["num_heads"] = options["dim"] // HEAD_DIM
    elif num_heads not in (None, known):
        raise UserError(f"num_heads is {num_heads}, but {source.label} says {known}; leave it out")
    latents, mask = options["out_channels"], options["in_channels"] - 2 * options["out_channels"]
    if mask < 1:
        raise CheckpointError(
            f"{source.label} takes {options['in_channels']} channels, where an image-to-video model takes noise and "
            f"condition of {latents} each and a mask; {_GIVE}"
        )
    return options | {"latent_channels": latents, "mask_channels": mask, "layer_memory": False}


def _sizes_in_tensors(source: Source, layout: Layout) -> dict[str, Any]:
    """What the shapes tell, which is all but the number of heads."""

    def shape(name: str, axes: int = 2) -> tuple[int, ...]:
        part = layout.parts(name)[0]
        where = f"{source.label} does not fit Wan2.1-I2V by {layout.name} names: it"
        if part not in source.shapes:
            raise CheckpointError(f"{where} lacks {part!r}{nearest(part, source.shapes)}; {_GIVE}")
        if len(source.shapes[part]) != axes:
            raise CheckpointError(f"{where} holds {part!r} as {list(source.shapes[part])}, not {axes} axes; {_GIVE}")
        return source.shapes[part]

    dim, in_channels, *patch = shape("patch_embedding.weight", axes=5)
    patch_volume = patch[0] * patch[1] * patch[2]
    blocks = {int(found.group(1)) for name in source.shapes if (found := _BLOCK.match(name))}
    return {
        "dim": dim,
        "ffn_dim": shape("blocks.0.ffn.0.weight")[0],
        "num_layers": 1 + max(blocks, default=0),
        "freq_dim": shape("time_embedding.0.weight")[1],
        "text_dim": shape("text_embedding.0.weight")[1],
        "image_dim": shape("image_embedding.1.weight")[1],
        "in_channels": in_channels,
        "out_channels": shape("head.head.weight")[0] // patch_volume,
        "patch_size": tuple(patch),
    }


def _sizes_in_config(source: Source) -> dict[str, Any]:
    """What config.json tells, once it is known to be of this architecture; nothing where there is none."""
    sizes = {"WanModel": _original_sizes, "WanTransformer3DModel": _diffusers_sizes}
    kind = source.config.get("_class_name")
    return {} if kind is None else sizes[kind](source.config, source.label)


def _original_sizes(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    accepted = {"model_type": "i2v", "qk_norm": True, "cross_attn_norm": True}
    _check_architecture(config, accepted, label)
    renamed = {"in_dim": "in_channels", "out_dim": "out_channels"}
    kept = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "text_len", "text_dim", "eps", *renamed)
    return {renamed.get(key, key): config[key] for key in kept if key in config}


def _diffusers_sizes(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    # A configuration saved by an older diffusers lacks the options that came later, which then have their defaults.
    from diffusers import WanTransformer3DModel

    defaults = {name: option.default for name, option in signature(WanTransformer3DModel.__init__).parameters.items()}
    config = {**defaults, **config}
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    accepted = {
        "qk_norm": "rms_norm_across_heads",
        "cross_attn_norm": True,
        "pos_embed_seq_len": None,
        "added_kv_proj_dim": dim,
    }
    _check_architecture(config, accepted, label)
    kept = ("ffn_dim", "freq_dim", "num_layers", "text_dim", "image_dim", "in_channels", "out_channels", "eps")
    sizes = {key: config[key] for key in kept}
    return sizes | {"dim": dim, "num_heads": config["num_attention_heads"], "patch_size": tuple(config["patch_size"])}


def _check_architecture(config: Mapping[str, Any], accepted: Mapping[str, Any], label: str) -> None:
    for key, value in accepted.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"{label} is a Wan model of another kind: its {key} is {config[key]!r}, where FSDiT's layers have "
                f"{value!r}; {_GIVE}"
            )
