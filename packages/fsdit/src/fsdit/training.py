"""Training of the transformer: flow matching with pseudo-Huber loss, image-to-video (paper §2.3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fsae import FSAE
from fsae.errors import UserError
from fsae.training.autoencoder import frame_grid
from fsae.training.config import OptimizerConfig
from fsae.training.loop import Task, TrainingResult, train
from fsae.training.runs import finished, read_samples, save_parts
from fsdit.conditioning import (
    Context,
    ImageEncoder,
    TextEncoder,
    first_frame_condition,
    load_encoders,
    model_input,
)
from fsdit.config import TransformerConfig
from fsdit.flow import TIMESTEPS, interpolate, pseudo_huber, velocity
from fsdit.model import FSDiT
from fsdit.sampling import denoise


class FlowMatchingTask(Task):
    """Predict the velocity of noised latents from the first latent, the first frame and the caption.

    Batches hold either ``latents`` ``B C t h w`` and ``image`` ``B 3 S S``, or ``video`` ``B 3 T H W``; and
    ``caption``, B strings.

    Args:
        transformer: Trained.
        text_encoder: Trained with it if ``config.trains_encoders``, else only read.
        image_encoder: Likewise.
        config: Loss, noise levels, dropout, rates, validation sampling.
        autoencoder: Frozen; needed for batches of videos, and to show validation samples as images.
        validation: A batch to validate on.
    """

    def __init__(
        self,
        transformer: FSDiT,
        text_encoder: TextEncoder,
        image_encoder: ImageEncoder,
        config: TransformerConfig,
        autoencoder: FSAE | None = None,
        validation: Mapping[str, Any] | None = None,
    ) -> None:
        _check_widths(transformer, text_encoder, image_encoder, autoencoder)
        self.transformer, self.text_encoder, self.image_encoder = transformer, text_encoder, image_encoder
        self.config, self.autoencoder, self.validation = config, autoencoder, validation
        encoders = {"text_encoder": text_encoder.model, "image_encoder": image_encoder.model}
        trained: dict[str, nn.Module] = {"transformer": transformer}
        frozen: dict[str, nn.Module] = {} if autoencoder is None else {"autoencoder": autoencoder}
        (trained if config.trains_encoders else frozen).update(encoders)
        for parameter in image_encoder.unused_parameters():
            parameter.requires_grad_(False)  # or several processes would wait for their gradients
        self.modules, self.frozen = trained, frozen
        self.settings = {
            "transformer": {k: v for k, v in transformer.config.items() if not k.startswith("_")},
            "flow": asdict(config.flow),
            "huber_delta": config.huber_delta,
            "caption_dropout": config.caption_dropout,
            "router_rate": config.router_rate,
            "trains_encoders": config.trains_encoders,
        }

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Pseudo-Huber loss of the velocity; the mean square error beside it."""
        return self._flow_matching(batch, generator, self.config.caption_dropout)

    def _flow_matching(self, batch: Any, generator: torch.Generator, dropout: float) -> dict[str, Tensor]:
        latents = self.latents(batch)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        sigma = self.config.flow.sample(len(latents), generator).to(latents)
        dropped = torch.rand(len(latents), generator=generator) < dropout
        captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), batch["caption"], strict=True)]
        context = self.context(batch, captions)
        condition = self.condition(latents)
        noisy = model_input(interpolate(latents, noise, sigma), condition)
        prediction = self.transformer(noisy, TIMESTEPS * sigma, context.text, context.image).float()
        target = velocity(latents, noise)
        loss = pseudo_huber(prediction, target, self.config.huber_delta).mean()
        return {"loss": loss, "mse": (prediction.detach() - target).square().mean()}

    def latents(self, batch: Any) -> Tensor:
        """The batch's latents ``B C t h w``, encoded now if it holds videos."""
        if "latents" in batch:
            return batch["latents"]
        if self.autoencoder is None:
            raise UserError("the batch holds videos and no latents; give the autoencoder that encodes them")
        with torch.no_grad():
            return self.autoencoder.encode(batch["video"]).float()

    def condition(self, latents: Tensor) -> Any:
        """The image-to-video condition: the first latent of each clip."""
        return first_frame_condition(latents[:, :, :1], latents.shape[2], self.transformer.config.mask_channels)

    def context(self, batch: Any, captions: list[str], negative: str | None = None) -> Context:
        """Embeddings of captions and first frames, with gradients only if the encoders are trained."""
        images = batch["image"] if "image" in batch else batch["video"][:, :, 0]
        with nullcontext() if self.config.trains_encoders else torch.no_grad():
            text = self.text_encoder(captions).embeddings
            unwanted = None if negative is None else self.text_encoder([negative] * len(captions)).embeddings
            return Context(text, self.image_encoder(images), unwanted)

    def validate(self, step: int) -> dict[str, Tensor]:
        """The loss on the validation batch with noise that never changes; samples of it, if they can be decoded."""
        if self.validation is None:
            return {}
        device = next(self.transformer.parameters()).device
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.validation.items()}
        generator = torch.Generator().manual_seed(0)
        results = {"loss": self._flow_matching(batch, generator, 0.0)["loss"]}
        if self.autoencoder is not None:
            video = self._sample(batch, generator)
            rows = [batch["video"], video] if "video" in batch else [video]
            results["samples"] = frame_grid([row.float().clamp(-1, 1) for row in rows])
        return results

    def _sample(self, batch: Any, generator: torch.Generator) -> Tensor:
        """Videos ``B 3 T H W`` made from the validation batch's first frames and captions."""
        assert self.autoencoder is not None
        latents = self.latents(batch)
        sampled = denoise(
            self.transformer,
            torch.randn(latents.shape, generator=generator).to(latents),
            self.condition(latents),
            self.context(batch, list(batch["caption"]), negative=""),
            schedule=self.config.flow,
            steps=self.config.validation_steps,
            guidance=self.config.validation_guidance,
        )
        first = batch["video"][:, :, :1] if "video" in batch else None
        return self.autoencoder.decode(sampled, first_frame=first)

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
        """The default groups, but the routers apart: ``router_rate`` times the learning rate and no decay."""
        routers = self.transformer.router_parameters()
        apart = {id(p) for p in routers}
        groups = super().parameter_groups(optimizer)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in apart]
        rate = self.config.router_rate * optimizer.learning_rate
        return [*groups, {"params": routers, "weight_decay": 0.0, "lr": rate}]


def train_transformer(config: TransformerConfig, dataset: Any = None, validation: Any = None) -> list[Path]:
    """Train an FSDiT and save it in ``output_dir/transformer``, with the encoders beside it if they were trained.

    Args:
        config: The training.
        dataset: Samples to train on (`fsdit.data`); the ``VideoFolder`` that ``config`` describes if None.
        validation: Likewise the held-out samples.

    Returns:
        The saved folders; none if a signal stopped the run, which then can be resumed.
    """
    loop = config.loop
    torch.manual_seed(loop.seed)
    transformer = _transformer(config)
    text_encoder, image_encoder = load_encoders(config.encoders, transformer.config.text_len)
    autoencoder = FSAE.from_pretrained(config.autoencoder).requires_grad_(False)
    autoencoder.latent_shape(config.frames, config.height, config.width)
    clips, validation, held_out = read_samples(config, dataset, validation)
    task = FlowMatchingTask(transformer, text_encoder, image_encoder, config, autoencoder, held_out)
    result = train(task, clips, loop)
    if not finished(result, loop.max_steps, clips, validation):
        return []
    return _save(result, text_encoder)


def _save(result: TrainingResult, text_encoder: TextEncoder) -> list[Path]:
    """Write the trained modules (averaged, if there is an average) as folders in diffusers' layout."""
    parts: dict[str, Any] = {name: result.export(name) for name in result.modules}
    if "text_encoder" in parts:
        parts["tokenizer"] = text_encoder.tokenizer
    return save_parts(result, parts)


def _transformer(config: TransformerConfig) -> FSDiT:
    transformer = FSDiT.from_preset_or_folder(config.model)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer


def _check_widths(
    transformer: FSDiT, text_encoder: TextEncoder, image_encoder: ImageEncoder, autoencoder: FSAE | None
) -> None:
    """UserError where a part gives what the transformer does not take."""
    config = transformer.config
    pairs = [
        ("text encoder", text_encoder.model.config.d_model, config.text_dim),
        ("image encoder", image_encoder.model.config.hidden_size, config.image_dim),
    ]
    if autoencoder is not None:
        pairs.append(("autoencoder", autoencoder.config.latent_channels, config.latent_channels))
    for part, gives, takes in pairs:
        if gives != takes:
            raise UserError(
                f"the {part} gives {gives} channels, the transformer takes {takes}; give parts that belong together"
            )
