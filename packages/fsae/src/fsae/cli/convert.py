"""`fsae convert`: a DC-AE into an FSAE, and a causal FSAE into a Standard and a Lite one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fsae.cli.output import save_to
from fsae.errors import UserError
from fsae.storage.files import check_new_folder, read_json

if TYPE_CHECKING:
    from fsae.model import FSAE

KINDS = ("causal", "standard", "lite")


def main(argv: list[str]) -> int:
    """`fsae convert`: weights into weights, and a table of what became of them."""
    parser = argparse.ArgumentParser(
        prog="fsae convert",
        description="Convert the image autoencoder dc-ae-f32c32-sana-1.0 or 1.1 into an FSAE, or an FSAE's decoder "
        "into the next kind: causal -> standard -> lite. Each result is the start of a training.",
    )
    parser.add_argument("source", help="DC-AE: folder, .safetensors file or name on the Hub; or folder of a saved FSAE")
    parser.add_argument("-o", "--output", required=True, help="folder to make, or an empty one")
    parser.add_argument("--to", choices=KINDS, default="causal", help="kind of decoder (default: causal)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights that are new (default: 0)")
    parser.add_argument("--noise", type=float, help="weight of the standard decoder's noise (default: 0.05)")
    parser.add_argument(
        "--decoder-widths",
        type=int,
        nargs="+",
        metavar="CHANNELS",
        help="channels of the lite decoder's stages, fine to coarse (default: the two outermost halved)",
    )
    options = parser.parse_args(argv)
    _check_options(options)
    check_new_folder(options.output)
    kind = _kind_of(options.source)
    if kind is not None and KINDS.index(options.to) <= KINDS.index(kind):
        raise UserError(
            f"{options.source} has a {kind} decoder already; kinds follow one another as {' -> '.join(KINDS)}, "
            "so give an earlier one's folder or a later --to"
        )
    save_to(options.output, _convert(options, kind).save_pretrained)
    return 0


def _check_options(options: argparse.Namespace) -> None:
    if options.noise is not None and (options.to == "causal" or not options.noise >= 0):
        raise UserError("--noise is the standard decoder's, 0 or more; give it with --to standard or --to lite")
    if options.decoder_widths is not None and options.to != "lite":
        raise UserError("--decoder-widths are the lite decoder's; give them with --to lite, or leave them out")


def _kind_of(source: str) -> str | None:
    """The decoder of a saved FSAE; None for all else, which is to be a DC-AE."""
    config = Path(source) / "config.json"
    values = read_json(config) if config.is_file() else {}
    return values.get("decoder_kind", "standard") if values.get("_class_name") == "FSAE" else None


def _convert(options: argparse.Namespace, kind: str | None) -> FSAE:
    """Go from kind to kind, from what the source is to what is asked for; print a table a step."""
    from fsae.model import FSAE
    from fsae.storage.foreign import Report
    from fsae.weights.convert import from_dc_ae
    from fsae.weights.variants import to_lite, to_standard

    print(f"reading {options.source}", file=sys.stderr)
    if kind is None:
        model, report = from_dc_ae(options.source, seed=options.seed, progress=sys.stderr.isatty())
        print(f"DC-AE -> causal FSAE\n{report}")
        kind = "causal"
    else:
        model = FSAE.from_pretrained(options.source)
    while kind != options.to:
        given = model
        print(f"{kind} -> {KINDS[KINDS.index(kind) + 1]}", file=sys.stderr)
        if kind == "causal":
            kind = "standard"
            model = to_standard(given, noise=0.05 if options.noise is None else options.noise, seed=options.seed)
        else:
            kind = "lite"
            model = to_lite(given, options.decoder_widths)
        print(f"-> {kind} FSAE\n{Report.compare(given, model)}")
    return model
