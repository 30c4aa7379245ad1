"""`fsdit convert`: Wan2.1-I2V's transformer into an FSDiT, and its two encoders into folders that FSDiT reads."""

from __future__ import annotations

import argparse
import sys

from fsae.cli.output import save_to
from fsae.errors import UserError
from fsae.storage.files import check_new_folder

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# Of save_pretrained, so that no more than this is written at a time.
_SHARD = "5GB"


def main(argv: list[str]) -> int:
    """`fsdit convert`: weights into weights, and a table of what became of them."""
    parser = argparse.ArgumentParser(
        prog="fsdit convert",
        description="Convert Wan2.1-I2V-14B's transformer, by its original or by diffusers' names, into an FSDiT with "
        "Layer Memory: the start of a training. With --encoders, convert the text and image encoder that lie beside "
        "the original instead.",
    )
    parser.add_argument("source", help="Wan2.1-I2V: folder, .safetensors file or name on the Hub")
    parser.add_argument("-o", "--output", required=True, help="folder to make, or an empty one")
    parser.add_argument(
        "--latents",
        choices=("fsae", "wan"),
        help="whose latents the result takes: FSAE's, with a new first and last layer (default), or Wan's own, with "
        "which it runs as the Wan model it was",
    )
    parser.add_argument(
        "--memory-bias",
        type=float,
        metavar="C",
        help="the routers' start: 7 leaves the model nearly as it was (default), 1 is for training from scratch",
    )
    parser.add_argument("--memory-gate", action="store_true", help="routers with a gate, closed: exactly as it was")
    parser.add_argument("--no-layer-memory", action="store_true", help="no routers at all")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (default: the source's)")
    parser.add_argument("--seed", type=int, help="of the weights that are new (default: 0)")
    parser.add_argument(
        "--encoders",
        action="store_true",
        help="convert models_t5_*.pth and models_clip_*.pth of the original's folder, and copy its tokenizer",
    )
    options = parser.parse_args(argv)
    _check_options(options)
    check_new_folder(options.output)
    convert = _convert_encoders if options.encoders else _convert_transformer
    convert(options)
    return 0


def _check_options(options: argparse.Namespace) -> None:
    of_memory = options.memory_bias is not None or options.memory_gate
    if options.no_layer_memory and of_memory:
        raise UserError("--memory-bias and --memory-gate are Layer Memory's; leave them or --no-layer-memory out")
    given = (options.latents, options.dtype, options.seed)
    if options.encoders and (of_memory or options.no_layer_memory or any(value is not None for value in given)):
        raise UserError("--encoders converts the encoders as they are; of the other options it takes -o alone")


def _convert_transformer(options: argparse.Namespace) -> None:
    import torch

    from fsdit.wan.convert import WanImport, from_wan

    wanted = WanImport(
        latents=options.latents or "fsae",
        layer_memory=not options.no_layer_memory,
        memory_bias=7.0 if options.memory_bias is None else options.memory_bias,
        memory_gate=options.memory_gate,
        dtype=None if options.dtype is None else getattr(torch, DTYPES[options.dtype]),
        seed=options.seed or 0,
    )
    print(f"reading {options.source}", file=sys.stderr)
    model, report = from_wan(options.source, wanted, progress=sys.stderr.isatty())
    print(f"Wan2.1-I2V -> FSDiT\n{report}")
    save_to(options.output, lambda output: model.save_pretrained(output, max_shard_size=_SHARD))


def _convert_encoders(options: argparse.Namespace) -> None:
    from fsdit.wan.encoders import open_encoders, save_encoders

    print(f"reading {options.source}", file=sys.stderr)
    encoders = open_encoders(options.source)
    for encoder in encoders:
        print(f"Wan2.1-I2V -> {encoder.folder}\n{encoder.report}")
    save_to(options.output, lambda output: save_encoders(encoders, options.source, output))
