"""`fsdit caption`: a list of what a vision-language model says about videos and images."""

from __future__ import annotations

from fsae.commandline import read_settings
from fsdit.cli.cache import report_skipped


def main(argv: list[str]) -> int:
    """`fsdit caption`: every field of CaptionConfig is a flag and a key of the YAML file."""
    from fsdit.preparation.config import CaptionConfig

    description = "Write captions with Qwen2.5-VL. What is written stays; the same command goes on with the rest."
    config = read_settings("fsdit caption", description, CaptionConfig, argv)

    from fsdit.preparation.captions import write_captions

    report = write_captions(config)
    report_skipped(report.skipped)
    print(f"saved {report.path}: {report.asked} captions written, {report.kept} there before")
    return 0
