"""Wan2.1's encoders: from the original's files into the folders of transformers that FSDiT reads.

    models_t5_umt5-xxl-enc-bf16.pth                            text_encoder/   UMT5's encoder
    models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth    image_encoder/  the vision tower of CLIP ViT-H/14
    google/umt5-xxl/                                           tokenizer/      copied

The two files are pickles; of what a pickle can hold, only tensors are read.
"""

from __future__ import annotations

import math
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsae.errors import CheckpointError
from fsae.storage.checkpoint import Shapes, check_fit, nearest
from fsae.storage.foreign import Report, open_source

TEXT_FILE, IMAGE_FILE, TOKENIZER = "models_t5_*.pth", "models_clip_*.pth", "google/umt5-xxl"

_HEAD_DIM = 80  # of CLIP ViT-H; nothing in its file tells
_DROPPED = ("textual.", "log_scale", "visual.head")  # CLIP's other tower, and the maps to the space that both share


@dataclass(frozen=True)
class _Names:
    """transformers' names -> Wan's.

    Attributes:
        outer: tensors outside the blocks.
        block: layers within a block.
        ours: how a tensor of a block begins here, with the block's number as a group.
        theirs: how one begins there.
    """

    outer: Mapping[str, str]
    block: Mapping[str, str]
    ours: str
    theirs: str

    def original(self, name: str) -> str:
        """Wan's name of a tensor."""
        if name in self.outer:
            return self.outer[name]
        found = re.fullmatch(self.ours + r"(.+)\.(weight|bias)", name)
        if found is None:
            raise ValueError(f"transformers has a tensor {name!r} that Wan has not")
        number, layer, kind = found.groups()
        return f"{self.theirs}.{number}.{self.block[layer]}.{kind}"


_TEXT = _Names(
    outer={
        "shared.weight": "token_embedding.weight",
        "encoder.embed_tokens.weight": "token_embedding.weight",
        "encoder.final_layer_norm.weight": "norm.weight",
    },
    block={
        "0.layer_norm": "norm1",
        "0.SelfAttention.q": "attn.q",
        "0.SelfAttention.k": "attn.k",
        "0.SelfAttention.v": "attn.v",
        "0.SelfAttention.o": "attn.o",
        "0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "1.layer_norm": "norm2",
        "1.DenseReluDense.wi_0": "ffn.gate.0",
        "1.DenseReluDense.wi_1": "ffn.fc1",
        "1.DenseReluDense.wo": "ffn.fc2",
    },
    ours=r"encoder\.block\.(\d+)\.layer\.",
    theirs="blocks",
)
_IMAGE = _Names(
    outer={
        "embeddings.class_embedding": "visual.cls_embedding",
        "embeddings.patch_embedding.weight": "visual.patch_embedding.weight",
        "embeddings.position_embedding.weight": "visual.pos_embedding",
        **{f"pre_layrnorm.{kind}": f"visual.pre_norm.{kind}" for kind in ("weight", "bias")},
        **{f"post_layernorm.{kind}": f"visual.post_norm.{kind}" for kind in ("weight", "bias")},
    },
    block={
        "layer_norm1": "norm1",
        **{f"self_attn.{part}_proj": "attn.to_qkv" for part in "qkv"},
        "self_attn.out_proj": "attn.proj",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
    },
    ours=r"encoder\.layers\.(\d+)\.",
    theirs="visual.transformer",
)


@dataclass(frozen=True)
class Encoder:
    """An encoder that fits and can be written: the name of its folder, transformers' model, what was carried and
    dropped."""

    folder: str
    model: Any
    report: Report


def open_encoders(source: str | Path) -> tuple[Encoder, Encoder]:
    """The text and the image encoder in the original's folder; their weights stay in the files until they are used.
    CheckpointError if a file is missing, cut short or holds more than tensors, or as `text_encoder`."""
    folder = Path(source)
    if (folder / "text_encoder" / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is of diffusers' layout, whose encoders can be read; use its folders as they are"
        )
    if not (folder / TOKENIZER).is_dir():
        raise CheckpointError(f"there is no tokenizer {folder / TOKENIZER}; give the whole folder of Wan2.1-I2V-14B")
    text, image = (_file(folder, pattern) for pattern in (TEXT_FILE, IMAGE_FILE))
    return text_encoder(_read_pickle(text), str(text)), image_encoder(_read_pickle(image), str(image))


def save_encoders(encoders: Sequence[Encoder], source: str | Path, output: str | Path) -> None:
    """Write the encoders and the tokenizer of `source` into the folder `output`, as `load_encoders` reads them."""
    shutil.copytree(Path(source, TOKENIZER), Path(output, "tokenizer"))
    for encoder in encoders:
        encoder.model.save_pretrained(Path(output, encoder.folder), max_shard_size="5GB")


def text_encoder(state: Mapping[str, Tensor], label: str = "the state dict") -> Encoder:
    """UMT5's encoder from Wan's names; the sizes are what the shapes tell. CheckpointError if a key is missing, unknown
    or misshapen, or the weights are quantised."""
    from transformers import UMT5Config, UMT5EncoderModel

    shapes = _float_shapes(state, label)
    vocabulary, width = _shape(shapes, "token_embedding.weight", label)
    buckets, heads = _shape(shapes, "blocks.0.pos_embedding.embedding.weight", label)
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=_shape(shapes, "blocks.0.attn.q.weight", label)[0] // heads,
        d_ff=_shape(shapes, "blocks.0.ffn.fc1.weight", label)[0],
        num_layers=_blocks(shapes, _TEXT),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )
    return Encoder("text_encoder", *_fitted(UMT5EncoderModel, config, _TEXT, state, label))


def image_encoder(state: Mapping[str, Tensor], label: str = "the state dict") -> Encoder:
    """CLIP's vision tower from Wan's names, errors as `text_encoder`; the text tower beside it is dropped."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shapes = _float_shapes(state, label)
    width, _, _, patch = _shape(shapes, "visual.patch_embedding.weight", label, axes=4)
    if width % _HEAD_DIM:
        raise CheckpointError(f"{label} is no CLIP ViT-H: its {width} channels are no heads of {_HEAD_DIM}; give Wan's")
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=_shape(shapes, "visual.transformer.0.mlp.0.weight", label)[0],
        num_hidden_layers=_blocks(shapes, _IMAGE),
        num_attention_heads=width // _HEAD_DIM,
        image_size=math.isqrt(_shape(shapes, "visual.pos_embedding", label, axes=3)[1] - 1) * patch,
        patch_size=patch,
        hidden_act="gelu",
    )
    return Encoder("image_encoder", *_fitted(CLIPVisionModel, config, _IMAGE, state, label))


@torch.no_grad()
def _fitted(cls: Any, config: Any, names: _Names, state: Mapping[str, Tensor], label: str) -> tuple[Any, Report]:
    """The model with every tensor of it from `state`, and every tensor of that in it or known to be left out."""
    with torch.device("meta"):
        model = cls(config)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(_DROPPED)}
    sources: dict[str, str] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        # Some releases of transformers name the tower itself as well.
        sources[name] = source = names.original(name.removeprefix("vision_model."))
        rows, *rest = tensor.shape
        if ".to_qkv." in source:
            expected[source] = (3 * rows, *rest)
        elif source in ("visual.cls_embedding", "visual.pos_embedding"):  # as if for a batch
            expected[source] = (1,) * (2 - len(rest)) + (rows, *rest)
        else:
            expected[source] = (rows, *rest)
    check_fit(
        expected, {name: tuple(tensor.shape) for name, tensor in kept.items()}, f"{cls.__name__} by Wan's names", label
    )
    weights = {
        name: _part(name, state[source]).reshape(tensor.shape)
        for (name, source), tensor in zip(sources.items(), model.state_dict().values(), strict=True)
    }
    model.load_state_dict(weights, strict=True, assign=True)
    dropped = {name: tensor.numel() for name, tensor in state.items() if name not in kept}
    report = Report({name: tensor.numel() for name, tensor in kept.items()}, dropped, {}, parts=())
    return model, report


def _part(name: str, tensor: Tensor) -> Tensor:
    """Query, key and value are thirds of one tensor there; each becomes a tensor of its own."""
    found = re.search(r"self_attn\.([qkv])_proj", name)
    return tensor.chunk(3)["qkv".index(found.group(1))].clone() if found else tensor


def _file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        what = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(
            f"{folder} should hold one file {pattern} ({what} found); give the whole folder of Wan2.1-I2V-14B"
        )
    return found[0]


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by torch.save; they stay in it until they are used."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} holds other things than tensors, or is damaged; copy it again") from None
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is cut short or no file of torch.save ({reason}); copy it again") from None
    if not (isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise CheckpointError(f"{path} holds no dictionary of tensors; give Wan's own file")
    return dict(state)


def _float_shapes(state: Mapping[str, Tensor], label: str) -> Shapes:
    opened = replace(open_source(state), label=label)
    opened.float_dtype()
    return opened.shapes


def _shape(shapes: Shapes, name: str, label: str, axes: int = 2) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"{label} lacks {name!r}{nearest(name, shapes)}; give Wan2.1's own file")
    if len(shapes[name]) != axes:
        raise CheckpointError(
            f"{label} holds {name!r} as {list(shapes[name])}, not {axes} axes; give Wan2.1's own file"
        )
    return shapes[name]


def _blocks(shapes: Shapes, names: _Names) -> int:
    found = (re.match(re.escape(names.theirs) + r"\.(\d+)\.", name) for name in shapes)
    return 1 + max((int(match.group(1)) for match in found if match), default=0)
