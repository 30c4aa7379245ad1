"""`fsdit cache`: clips and captions into files of latents and embeddings, encoded once."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from fsae.commandline import read_settings


def main(argv: list[str]) -> int:
    """`fsdit cache`: every field of CacheConfig is a flag and a key of the YAML file."""
    from fsdit.preparation.config import CacheConfig

    description = (
        "Encode clips and captions once, for trainings with --cache. What is finished stays; the same command goes on "
        "with the rest. Several processes, each with its --rank of --ranks, fill one cache together."
    )
    config = read_settings("fsdit cache", description, CacheConfig, argv)

    from fsdit.preparation.cache import make_cache

    report = make_cache(config)
    report_skipped(report.skipped)
    print(f"saved {report.folder}: {report.samples} samples, {report.made} shards made, {report.kept} there before")
    if report.missing:
        print(f"{report.missing} shards are still to be made by the other processes")
    return 0


def report_skipped(skipped: Mapping[str, str]) -> None:
    """Say on stderr how many files were left out, and the reasons of the first ten."""
    if skipped:
        named = "; ".join(f"{path}: {reason}" for path, reason in list(skipped.items())[:10])
        more = f"; and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        print(f"{len(skipped)} file(s) skipped: {named}{more}", file=sys.stderr)
