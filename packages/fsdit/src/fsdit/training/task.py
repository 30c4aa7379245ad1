"""Training of the transformer: flow matching with pseudo-Huber loss, image-to-video (paper §2.3.2)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from fsae import FSAE
from fsae.data.config import SIDE, STRIDE
from fsae.data.video import to_frames, write_video
from fsae.errors import UserError
from fsae.storage.files import atomic_path, check_folder, write_json
from fsae.training.config import OptimizerConfig
from fsae.training.logs import frame_grid
from fsae.training.loop import Task, TrainingResult, train
from fsae.training.runs import finished, is_main_process, read_samples, save_parts
from fsae.transcoding.fingerprints import encoder_fingerprint
from fsdit.conditioning.encoders import ImageEncoder, TextEncoder, pad_text
from fsdit.conditioning.folders import load_encoders
from fsdit.conditioning.inputs import Context, model_input, training_condition, training_context
from fsdit.flow.path import TIMESTEPS, interpolate, pseudo_huber, velocity
from fsdit.flow.sampling import denoise
from fsdit.model import FSDiT
from fsdit.training.config import FlowMatchingConfig, TransformerConfig
from fsdit.training.data import CachedLatents, tell_missing_captions


class FlowMatchingTask(Task):
    """Predict the velocity of noised latents from the first latent, the first frame and the caption.

    A clip of one frame is learned from its caption alone, as text-to-image: its first latent and its first frame are
    what is to be found.

    Batches hold ``latents`` ``B C t h w`` or ``video`` ``B 3 T H W``; ``caption``, B strings; and of these either the
    embeddings ``text`` ``B L D`` and ``image_embedding`` ``B M D'``, or what the encoders make them of: the captions,
    and ``image`` ``B 3 S S``, without which the video's first frame is taken.

    Args:
        transformer: Trained.
        text_encoder: Trained with it if ``config.trains_encoders``, else only read; None where batches hold embeddings.
        image_encoder: Likewise.
        config: Loss, noise levels, dropout, rates, validation sampling.
        autoencoder: Frozen; needed for batches of videos, and to show validation samples.
        validation: A batch to validate on.
        empty_text: ``L D``, the embedding of the empty prompt; needed where batches hold embeddings.
    """

    def __init__(
        self,
        transformer: FSDiT,
        text_encoder: TextEncoder | None,
        image_encoder: ImageEncoder | None,
        config: FlowMatchingConfig,
        autoencoder: FSAE | None = None,
        validation: Mapping[str, Any] | None = None,
        empty_text: Tensor | None = None,
    ) -> None:
        check_widths(transformer, text_encoder, image_encoder, autoencoder)
        self.transformer, self.text_encoder, self.image_encoder = transformer, text_encoder, image_encoder
        self.config, self.autoencoder, self.validation = config, autoencoder, validation
        self.empty_text, self.ranks_per_sample = empty_text, config.context_parallel
        trained: dict[str, nn.Module] = {"transformer": transformer}
        frozen: dict[str, nn.Module] = {} if autoencoder is None else {"autoencoder": autoencoder}
        for name, encoder in (("text_encoder", text_encoder), ("image_encoder", image_encoder)):
            if encoder is not None:
                (trained if config.trains_encoders else frozen)[name] = encoder.model
        if image_encoder is not None:
            for parameter in image_encoder.unused_parameters():
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
        return self.velocity_loss(latents, noise, sigma, self.context(batch, captions))

    def velocity_loss(self, latents: Tensor, noise: Tensor, sigma: Tensor, context: Context) -> dict[str, Tensor]:
        """The loss of latents ``B C t h w`` under this noise at the levels sigma ``B``: a mean over the samples."""
        noisy = model_input(interpolate(latents, noise, sigma), self.condition(latents))
        prediction = self.transformer(noisy, TIMESTEPS * sigma, context.text, context.image).float()
        target = velocity(latents, noise)
        loss = pseudo_huber(prediction, target, self.config.huber_delta, self.config.huber_elements).mean()
        return {"loss": loss, "mse": (prediction.detach() - target).square().mean()}

    def latents(self, batch: Any) -> Tensor:
        """The batch's latents ``B C t h w``, encoded now if it holds videos."""
        if "latents" in batch:
            return batch["latents"].float()
        if self.autoencoder is None:
            raise UserError("the batch holds videos and no latents; give the autoencoder that encodes them")
        with torch.no_grad():
            return self.autoencoder.encode(batch["video"]).float()

    def frames(self, batch: Any) -> int:
        """t, the latent frames of the batch's clips; of videos, 1 for those of one frame."""
        return int((batch["latents"] if "latents" in batch else batch["video"]).shape[2])

    def condition(self, latents: Tensor) -> Any:
        """The image-to-video condition: the first latent of each clip, and nothing of a single frame."""
        return training_condition(latents, self.transformer.config.mask_channels)

    def context(self, batch: Any, captions: list[str], negative: str | None = None) -> Context:
        """Embeddings of captions and first frames, with gradients only if the encoders are trained.

        Those of single frames are zeros, unless ``config.stills_see_image`` says otherwise. Where the batch holds
        embeddings, a caption is its own or the empty one, and so is the negative.
        """
        if "text" in batch:
            context = self._kept_context(batch, captions, negative)
        else:
            context = self._encoded_context(batch, captions, negative)
        return context if self.config.stills_see_image else training_context(context, self.frames(batch))

    def _encoded_context(self, batch: Any, captions: list[str], negative: str | None) -> Context:
        assert self.text_encoder is not None and self.image_encoder is not None
        images = batch["image"] if "image" in batch else batch["video"][:, :, 0]
        with nullcontext() if self.config.trains_encoders else torch.no_grad():
            text = self.text_encoder(captions).embeddings
            unwanted = None if negative is None else self.text_encoder([negative] * len(captions)).embeddings
            return Context(text, self.image_encoder(images), unwanted)

    def _kept_context(self, batch: Any, captions: list[str], negative: str | None) -> Context:
        text: Tensor = batch["text"]
        assert self.empty_text is not None and not negative
        empty = self.empty_text.to(text).expand_as(text)
        own = torch.tensor([given == kept for given, kept in zip(captions, batch["caption"], strict=True)])
        chosen = torch.where(own.to(text.device).view(-1, 1, 1), text, empty)
        return Context(chosen, batch["image_embedding"], None if negative is None else empty)

    def validate(self, step: int) -> dict[str, Tensor]:
        """The loss on the validation batch with noise that never changes; samples of it, if they can be decoded.

        The samples are also written whole, as videos with their captions: OUTPUT_DIR/samples/step-STEP.
        """
        if self.validation is None:
            return {}
        device = next(self.transformer.parameters()).device
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.validation.items()}
        generator = torch.Generator().manual_seed(0)
        results = {"loss": self._flow_matching(batch, generator, 0.0)["loss"]}
        if self.autoencoder is not None:
            truth, video = self._sample(batch, generator)
            results["samples"] = frame_grid([truth, video])
            folder = Path(self.config.loop.output_dir, "samples", f"step-{step:08d}")
            if is_main_process():
                _write_or_tell(folder, video, list(batch["caption"]), self.config.validation_fps)
        return results

    def _sample(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The validation clips, and videos made from their first frames and captions; ``B 3 T H W`` in [-1, 1]."""
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
        if "video" in batch:
            first_frames = batch["video"][:, :, :1] if batch["video"].shape[2] > 1 else None
            return batch["video"].cpu(), self._decode(sampled, first_frames)
        return self._decode(latents), self._decode(sampled)

    def _decode(self, latents: Tensor, first_frames: Tensor | None = None) -> Tensor:
        """``B 3 T H W`` on the CPU, one clip at a time: a validation must not need more memory than training does."""
        assert self.autoencoder is not None
        firsts = [None] * len(latents) if first_frames is None else first_frames.split(1)
        clips = [self.autoencoder.decode(*pair) for pair in zip(latents.split(1), firsts, strict=True)]
        return torch.cat([clip.float().clamp(-1, 1).cpu() for clip in clips])

    def share_samples(self, group: dist.ProcessGroup | None) -> None:
        """Split the transformer's tokens over the processes of ``group``."""
        if group is None:
            self.transformer.disable_context_parallel()
        else:
            self.transformer.enable_context_parallel(group)

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

    What does not fit is refused before the transformer is built.

    Args:
        config: The training.
        dataset: Samples to train on (`fsdit.training.data`); those that ``config`` describes if None.
        validation: Likewise the held-out samples.

    Returns:
        The saved folders; none if a signal stopped the run, which then can be resumed.
    """
    loop = config.loop
    check_folder(loop.output_dir)
    outline = _outline(config)
    autoencoder = _autoencoder(config)
    clips = _read_clips(config, outline, autoencoder, dataset, validation)
    torch.manual_seed(loop.seed)
    text_encoder, image_encoder = _encoders(config, outline, clips)
    check_widths(outline, text_encoder, image_encoder, autoencoder)
    transformer = FSDiT.from_preset_or_folder(config.model, **config.model_options)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    task = FlowMatchingTask(
        transformer, text_encoder, image_encoder, config, autoencoder, clips.batch, clips.empty_text
    )
    result = train(task, clips.samples, loop, clips.collate)
    if not finished(result, loop.max_steps, clips.samples, clips.held_out):
        return []
    return _save(result, text_encoder)


def write_samples(folder: Path, videos: Tensor, captions: Sequence[str], fps: float) -> None:
    """Write clips ``B 3 T H W`` in [-1, 1] as NUMBER.mp4, single frames as NUMBER.png, and captions.json of them."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "mp4" if videos.shape[2] > 1 else "png"
    names = [f"{number:02}.{suffix}" for number in range(len(videos))]
    for name, video in zip(names, videos, strict=True):
        frames = to_frames(video).numpy()
        if suffix == "mp4":
            write_video(folder / name, frames, fps)
            continue
        with atomic_path(folder / name) as temporary:
            Image.fromarray(frames[0]).save(temporary)
    write_json(folder / "captions.json", dict(zip(names, captions, strict=True)))


def _write_or_tell(folder: Path, videos: Tensor, captions: Sequence[str], fps: float) -> None:
    """A disk that has no room for samples ends no training."""
    try:
        write_samples(folder, videos, captions, fps)
    except (OSError, UserError) as error:
        tqdm.write(f"samples could not be written ({error}); training goes on", sys.stderr)


# --- what a run is made of


@dataclass(frozen=True)
class _Clips:
    """What to train on, what is held out, and of that the batch to validate on, None if the run never does.

    With an embedding of the empty prompt, ``L D``, samples hold embeddings, and no encoder is needed.
    """

    samples: Any
    held_out: Any
    batch: Mapping[str, Any] | None
    collate: Callable[[list[Any]], Any] | None = None
    empty_text: Tensor | None = None


def _read_clips(
    config: TransformerConfig, outline: FSDiT, autoencoder: FSAE | None, dataset: Any, validation: Any
) -> _Clips:
    """The clips that ``config`` describes, or those given."""
    if dataset is None and config.cache:
        dataset = CachedLatents(config.cache)
    if isinstance(dataset, CachedLatents):
        return _read_cache(config, outline, autoencoder, dataset, validation)
    if dataset is None:
        _check_clips(config, autoencoder)
    clips = _Clips(*read_samples(config, dataset, validation, config.clips))
    if dataset is None and is_main_process():
        tell_missing_captions(clips.samples.entries)
    return clips


def _check_clips(config: TransformerConfig, autoencoder: FSAE | None) -> None:
    """Whether clips can come from files, and the autoencoder can take them."""
    if not config.data:
        raise UserError("neither data nor cache is given; give a folder or list of clips, or caches of such")
    if autoencoder is None:
        raise UserError("autoencoder is not given, but the clips of data are encoded as they come; give its folder")
    sizes = [(bucket.frames, *size) for bucket in config.buckets for size in bucket.sizes()]
    for frames, height, width in [(config.frames, config.height, config.width), *sizes]:
        autoencoder.latent_shape(frames, height, width)


def _read_cache(
    config: TransformerConfig, outline: FSDiT, autoencoder: FSAE | None, cache: CachedLatents, held_out: Any
) -> _Clips:
    """What a cache holds, after a look whether it belongs to the model and the autoencoder."""
    if held_out is None:
        held_out = CachedLatents(config.validation_data) if config.validation_data else cache
    encoder = None if autoencoder is None else encoder_fingerprint(autoencoder)
    for part in (cache, held_out):
        part.check_fits(outline.config)
        if encoder is not None:
            part.check_autoencoder(encoder)
    empty = pad_text([cache.empty_text], cache.text_len)[0]
    batch = _first_of_size(config, held_out) if config.loop.validate_every else None
    return _Clips(cache, held_out, batch, cache.collate, empty)


def _first_of_size(config: TransformerConfig, cache: CachedLatents) -> dict[str, Any]:
    """A batch of the first cached clips of the length and size that are to be validated on."""
    wanted = 1 + config.frames // STRIDE, config.height // SIDE, config.width // SIDE
    indices = [index for index, shape in enumerate(cache.shapes) if shape[1:] == wanted]
    if not indices:
        there = sorted({f"{1 + STRIDE * (t - 1)} of {SIDE * w}x{SIDE * h}" for _, t, h, w in cache.shapes})
        raise UserError(
            f"no clip of the cache has {config.frames} frames of {config.width}x{config.height} pixels to validate on; "
            f"set frames, height and width to what it has ({', '.join(there)}), or loop.validate_every to 0"
        )
    return cache.collate([cache[index] for index in indices[: config.validation_samples]])


def _outline(config: TransformerConfig) -> FSDiT:
    """The transformer without its weights."""
    if config.model_options and config.model not in FSDiT.presets:
        names = ", ".join(config.model_options)
        raise UserError(f"model_options {names} cannot change the saved model {config.model}; they are for presets")
    return FSDiT.outline(config.model, **config.model_options)


def _encoders(
    config: TransformerConfig, outline: FSDiT, clips: _Clips
) -> tuple[TextEncoder | None, ImageEncoder | None]:
    """The encoders, if samples do not hold what they give."""
    return (None, None) if clips.empty_text is not None else load_encoders(config.encoders, outline.config.text_len)


def _autoencoder(config: TransformerConfig) -> FSAE | None:
    return FSAE.from_pretrained(config.autoencoder).requires_grad_(False) if config.autoencoder else None


def _save(result: TrainingResult, text_encoder: TextEncoder | None) -> list[Path]:
    """Write the trained modules (averaged, if there is an average) as folders in diffusers' layout."""
    parts: dict[str, Any] = {name: result.export(name) for name in result.modules}
    if "text_encoder" in parts:
        assert text_encoder is not None
        parts["tokenizer"] = text_encoder.tokenizer
    return save_parts(result, parts)


def check_widths(
    transformer: FSDiT,
    text_encoder: TextEncoder | None,
    image_encoder: ImageEncoder | None,
    autoencoder: FSAE | None,
) -> None:
    """UserError where a part, if there is one, gives what the transformer does not take."""
    config = transformer.config
    pairs = []
    if text_encoder is not None:
        pairs.append(("text encoder", text_encoder.model.config.d_model, config.text_dim))
    if image_encoder is not None:
        pairs.append(("image encoder", image_encoder.model.config.hidden_size, config.image_dim))
    if autoencoder is not None:
        pairs.append(("autoencoder", autoencoder.config.latent_channels, config.latent_channels))
    for part, gives, takes in pairs:
        if gives != takes:
            raise UserError(
                f"the {part} gives {gives} channels, the transformer takes {takes or 'none'}; "
                "give parts that belong together"
            )
