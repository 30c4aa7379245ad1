"""`fsupsampler train upsampler`: the latent upsampler on videos and their half-size copies."""

from __future__ import annotations

from fsae.commandline import read_settings


def main(argv: list[str]) -> int:
    """`fsupsampler train upsampler`: every field of UpsamplerConfig is a flag and a key of the YAML file."""
    from fsupsampler.training.config import UpsamplerConfig

    description = "Train LatentUpsampler; the result is OUTPUT_DIR/upsampler."
    config = read_settings("fsupsampler train upsampler", description, UpsamplerConfig, argv)

    from fsae.training.runs import report_saved
    from fsupsampler.training.upsampler import train_upsampler

    return report_saved(train_upsampler(config))
