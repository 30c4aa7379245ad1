"""A tiny model of the real classes with random weights, in a folder as users have it, and a photo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from fsae.model import FSAE
from fsdit.conditioning import nano_tokenizer
from fsdit.model import FSDiT
from fsupsampler.refiner import DynamicMask
from fsupsampler.upsampler import LatentUpsampler
from fsvideo_pipeline.pipeline import FSVideoPipeline
from fsvideo_pipeline.settings import Settings

SETTINGS = Settings(
    area=128 * 128, frames=5, fps=8.0, steps=2, guidance=3.0, shift=4.0, refiner_steps=3, refiner_shift=6.0
)


def tiny_dit() -> FSDiT:
    return FSDiT(
        dim=32,
        ffn_dim=48,
        num_heads=2,
        num_layers=2,
        text_dim=16,
        text_len=24,
        image_dim=16,
        latent_channels=8,
    )


def tiny_components() -> dict[str, object]:
    autoencoder = FSAE(
        widths=(8,) * 7,
        encoder_depths=(1,) * 7,
        decoder_depths=(1,) * 7,
        latent_channels=8,
        injection_head_dim=8,
        attention_head_dim=8,
        noise=0.05,
        latents_mean=[0.1] * 8,
        latents_std=[0.5] * 8,
    )
    text = UMT5Config(
        vocab_size=384, d_model=16, d_kv=8, num_heads=2, num_layers=1, d_ff=24, feed_forward_proj="gated-gelu"
    )
    clip = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    return {
        "autoencoder": autoencoder,
        "text_encoder": UMT5EncoderModel(text),
        "tokenizer": nano_tokenizer(),
        "image_encoder": CLIPVisionModel(clip),
        "transformer": tiny_dit(),
        "upsampler": LatentUpsampler(
            latent_channels=8, mid_channels=8, num_blocks=1, norm_groups=4, latents_std=[0.5] * 8
        ),
        "refiner": tiny_dit(),
        "mask": DynamicMask(error_95=2.0),
    }


def build() -> FSVideoPipeline:
    torch.manual_seed(0)
    components = tiny_components()
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
            for parameter in component.parameters():  # no zero start: everything must matter to the output
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.15)
    return FSVideoPipeline(**components, settings=SETTINGS)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; tests that damage one copy it first."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(saved: Path) -> FSVideoPipeline:
    return FSVideoPipeline.from_pretrained(saved)


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """uint8 `120 160 3`, different everywhere."""
    rows, columns = np.mgrid[:120, :160]
    return np.stack([rows * 2, columns, (rows * 3 + columns * 5) % 256], axis=-1).astype(np.uint8)


@pytest.fixture
def photo_file(photo: np.ndarray, tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    return path
