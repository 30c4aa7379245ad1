"""Training of the transformer: flow matching with pseudo-Huber loss, image-to-video (paper §2.3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fsae import FSAE
from fsae.errors import UserError
from fsae.training.config import OptimizerConfig
from fsae.training.logs import frame_grid
from fsae.training.loop import Task
from fsae.training.runs import is_main_process
from fsdit.conditioning.encoders import Encoders
from fsdit.conditioning.inputs import Condition, Context, FlowBatch, model_input, training_condition, training_context
from fsdit.flow.path import TIMESTEPS, interpolate, pseudo_huber, velocity
from fsdit.flow.sampling import denoise
from fsdit.model import FSDiT
from fsdit.training.config import FlowMatchingConfig
from fsdit.training.data import Samples, to_device_of
from fsdit.training.samples import write_samples


class Draws(NamedTuple):
    """The random numbers of a batch: noise `B C t h w`, levels sigma `B`, and numbers `B` in [0, 1); where these are
    below the dropout, the caption is dropped."""

    noise: Tensor
    sigma: Tensor
    chance: Tensor


class FlowMatchingTask(Task):
    """Predict the velocity of noised latents from the first latent, the first frame and the caption.

    A clip of one frame is learned from its caption alone, as text-to-image: its first latent and its first frame are
    the target.

    Batches hold `latents` `B C t h w` or `video` `B 3 T H W`; `caption`, B strings; and of these either the
    embeddings `text` `B L D` and `image_embedding` `B M D'`, or what the encoders make them from: the captions,
    and `image` `B 3 S S`, without which the video's first frame is taken.

    Args:
        transformer: Trained.
        encoders: Trained with it if `config.trains_encoders`, else only read; None where batches hold embeddings.
        config: Loss, noise levels, dropout, rates, validation sampling.
        autoencoder: Frozen; needed for batches of videos, and to show validation samples.
        clips: Have the batch to validate on and, where batches hold embeddings, that of the empty prompt.
    """

    added_settings = MappingProxyType({"stills_see_image": False})

    def __init__(
        self,
        transformer: FSDiT,
        encoders: Encoders | None,
        config: FlowMatchingConfig,
        autoencoder: FSAE | None = None,
        clips: Samples = Samples(),  # noqa: B008, frozen
    ) -> None:
        check_widths(transformer, encoders, autoencoder)
        self.transformer, self.encoders, self.config, self.autoencoder = transformer, encoders, config, autoencoder
        self.validation, self.empty_text, self.ranks_per_sample = clips.batch, clips.empty_text, config.context_parallel
        self.trains_encoders = config.trains_encoders and encoders is not None
        trained: dict[str, nn.Module] = {"transformer": transformer}
        frozen: dict[str, nn.Module] = {} if autoencoder is None else {"autoencoder": autoencoder}
        if encoders is not None:
            models = {"text_encoder": encoders.text.model, "image_encoder": encoders.image.model}
            (trained if self.trains_encoders else frozen).update(models)
            for parameter in encoders.image.unused_parameters():
                parameter.requires_grad_(False)  # or several processes would wait for their gradients
        self.modules, self.frozen = trained, frozen
        self.settings = {
            "transformer": transformer.public_config,
            "flow": asdict(config.flow),
            "huber_delta": config.huber_delta,
            "huber_elements": config.huber_elements,
            "stills_see_image": config.stills_see_image,
            "caption_dropout": config.caption_dropout,
            "router_rate": config.router_rate,
            "trains_encoders": self.trains_encoders,
        }

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Pseudo-Huber loss of the velocity, some captions dropped; the mean square error beside it."""
        latents, condition = self.conditioned_latents(batch, generator)
        draws = self.draw(latents, generator)
        # Dropped before they are encoded, so that no encoder works on a caption that is not used.
        dropped = (draws.chance < self.config.caption_dropout).tolist()
        captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"], strict=True)]
        context = self.context(batch, captions, latents.shape[2])
        return self.velocity_loss(FlowBatch(latents, condition, context), draws.noise, draws.sigma)

    def prepare(self, batch: Any, generator: torch.Generator) -> FlowBatch:
        """A batch with its condition and its whole context: no caption dropped, and the empty prompt as the negative.

        For all that does not train on dropped captions; validation takes its loss and its samples from one such batch.
        """
        latents, condition = self.conditioned_latents(batch, generator)
        context = self.context(batch, list(batch["caption"]), latents.shape[2], negative=True)
        return FlowBatch(latents, condition, context)

    def conditioned_latents(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, Condition]:
        """Clean latents `B C t h w` and what is known of them: the first, and nothing of a single frame."""
        latents = self._latents(batch)
        return latents, training_condition(latents, self.transformer.config.mask_channels)

    def draw(self, latents: Tensor, generator: torch.Generator) -> Draws:
        """Noise, noise levels, and which captions are dropped."""
        return Draws(
            noise=torch.randn(latents.shape, generator=generator).to(latents),
            sigma=self.config.flow.sample(len(latents), generator).to(latents),
            chance=torch.rand(len(latents), generator=generator),
        )

    def velocity_loss(self, clean: FlowBatch, noise: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """The loss of a batch under noise `B C t h w` at the levels sigma `B`: a mean over the samples."""
        noisy = model_input(interpolate(clean.latents, noise, sigma), clean.condition)
        prediction = self.transformer(noisy, TIMESTEPS * sigma, clean.context.text, clean.context.image).float()
        target = velocity(clean.latents, noise)
        loss = pseudo_huber(prediction, target, self.config.huber_delta, self.config.huber_elements).mean()
        return {"loss": loss, "mse": (prediction.detach() - target).square().mean()}

    def _latents(self, batch: Any) -> Tensor:
        """The batch's latents, encoded now if it holds videos."""
        if "latents" in batch:
            return batch["latents"].float()
        if self.autoencoder is None:
            raise UserError("the batch holds videos and no latents; give the autoencoder that encodes them")
        with torch.no_grad():
            return self.autoencoder.encode(batch["video"]).float()

    def context(self, batch: Any, captions: Sequence[str], t: int, negative: bool = False) -> Context:
        """Embeddings of captions and first frames, with gradients only if the encoders are trained.

        Args:
            batch: B clips of `t` latent frames. The image features of single frames are zeros, unless
                `config.stills_see_image` says otherwise.
            captions: B of them; where the batch holds embeddings, each is the clip's own or empty.
            negative: Give the empty prompt's embedding as well.
        """
        embed = self._kept_context if "text" in batch else self._encoded_context
        context = embed(batch, captions, negative)
        return context if self.config.stills_see_image else training_context(context, t)

    def _encoded_context(self, batch: Any, captions: Sequence[str], negative: bool) -> Context:
        assert self.encoders is not None
        images = batch["image"] if "image" in batch else batch["video"][:, :, 0]
        with nullcontext() if self.trains_encoders else torch.no_grad():
            text = self.encoders.text(captions).embeddings
            empty = self.encoders.text([""] * len(captions)).embeddings if negative else None
            return Context(text, self.encoders.image(images), empty)

    def _kept_context(self, batch: Any, captions: Sequence[str], negative: bool) -> Context:
        text: Tensor = batch["text"]
        assert self.empty_text is not None
        empty = self.empty_text.to(text).expand_as(text)
        own = torch.tensor([given == kept for given, kept in zip(captions, batch["caption"], strict=True)])
        chosen = torch.where(own.to(text.device).view(-1, 1, 1), text, empty)
        return Context(chosen, batch["image_embedding"], empty if negative else None)

    def validate(self, step: int) -> dict[str, Tensor]:
        """The loss on the validation batch with noise that never changes; samples of it, if they can be decoded.

        The samples are also written whole, as videos with their captions: OUTPUT_DIR/samples/step-STEP.
        """
        if self.validation is None:
            return {}
        batch = to_device_of(self.transformer, self.validation)
        generator = torch.Generator().manual_seed(0)
        clean = self.prepare(batch, generator)
        draws = self.draw(clean.latents, generator)
        results = {"loss": self.velocity_loss(clean, draws.noise, draws.sigma)["loss"]}
        if self.autoencoder is not None:
            truth, video = self._sample(batch, clean, generator)
            results["samples"] = frame_grid([truth, video])
            folder = Path(self.config.loop.output_dir, "samples", f"step-{step:08d}")
            if is_main_process():
                write_samples(folder, video, list(batch["caption"]), self.config.validation_fps)
        return results

    def _sample(self, batch: Any, clean: FlowBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The validation clips, and videos made from their first frames and captions; `B 3 T H W` in [-1, 1]."""
        sampled = denoise(
            self.transformer,
            torch.randn(clean.latents.shape, generator=generator).to(clean.latents),
            clean.condition,
            clean.context,
            schedule=self.config.flow,
            steps=self.config.validation_steps,
            guidance=self.config.validation_guidance,
        )
        if "video" in batch:
            first_frames = batch["video"][:, :, :1] if batch["video"].shape[2] > 1 else None
            return batch["video"].cpu(), self._decode(sampled, first_frames)
        return self._decode(clean.latents), self._decode(sampled)

    def _decode(self, latents: Tensor, first_frames: Tensor | None = None) -> Tensor:
        """`B 3 T H W` on the CPU, one clip at a time: a validation must not need more memory than training does."""
        assert self.autoencoder is not None
        firsts = [None] * len(latents) if first_frames is None else first_frames.split(1)
        clips = [self.autoencoder.decode(*pair) for pair in zip(latents.split(1), firsts, strict=True)]
        return torch.cat([clip.float().clamp(-1, 1).cpu() for clip in clips])

    def share_samples(self, group: dist.ProcessGroup | None) -> None:
        """Split the transformer's tokens over the processes of `group`."""
        if group is None:
            self.transformer.disable_context_parallel()
        else:
            self.transformer.enable_context_parallel(group)

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
        """The default groups, but the routers apart: `router_rate` times the learning rate and no decay."""
        routers = self.transformer.router_parameters()
        apart = {id(p) for p in routers}
        groups = super().parameter_groups(optimizer)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in apart]
        rate = self.config.router_rate * optimizer.learning_rate
        return [*groups, {"params": routers, "weight_decay": 0.0, "lr": rate}]


def check_widths(transformer: FSDiT, encoders: Encoders | None, autoencoder: FSAE | None) -> None:
    """UserError where a part's width is not the transformer's; parts may be missing."""
    config = transformer.config
    pairs = []
    if encoders is not None:
        pairs.append(("text encoder", encoders.text.model.config.d_model, config.text_dim))
        pairs.append(("image encoder", encoders.image.model.config.hidden_size, config.image_dim))
    if autoencoder is not None:
        pairs.append(("autoencoder", autoencoder.config.latent_channels, config.latent_channels))
    for part, gives, takes in pairs:
        if gives != takes:
            raise UserError(
                f"the {part} gives {gives} channels, the transformer takes {takes or 'none'}; "
                "give parts that belong together"
            )
