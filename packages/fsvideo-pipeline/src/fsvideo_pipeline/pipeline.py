"""FSVideoPipeline (paper §2.1): a photo and a prompt become frames.

    canvas       the photo at the video's size, continued by reflection to whole latents at half its size
    encode       canvas -> z_hr; canvas at half size -> z_lr; prompt -> text; canvas -> CLIP features
    base         noise, condition [z_lr, 0 ...] -> latents at half size                 guided, UniPC
    upsample     latents -> twice the height and width
    refine       noise, condition [z_hr, upsampled ...], dynamic mask -> latents        not guided, UniPC
    decode       latents, canvas -> frames, cropped to the video's size

Pixels are uint8 `T H W 3`, latents normalised `1 C t h w`. One CPU generator makes all noise, in the order base,
refiner, decoder: a seed means the same video on every device, up to rounding.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel

from fsae.data.video import to_frames, to_video_tensor
from fsae.errors import UserError
from fsae.model import FSAE
from fsae.shapes import Compression
from fsdit.conditioning import Context, ImageEncoder, TextEncoder, first_frame_condition
from fsdit.flow.path import FlowSchedule
from fsdit.flow.sampling import Step, StepCallback, denoise
from fsdit.model import FSDiT
from fsupsampler.refiner import DynamicMask, refiner_condition
from fsupsampler.upsampler import LatentUpsampler
from fsvideo_pipeline.canvas import crop_video, make_canvas
from fsvideo_pipeline.components import NAMES, check_component, load_component
from fsvideo_pipeline.plan import VideoGeometry
from fsvideo_pipeline.request import Job, Photo, VideoRequest, resolve
from fsvideo_pipeline.settings import Settings, read_index, read_settings

logger = logging.getLogger(__name__)

Stage = Literal["encode", "base", "upsample", "refine", "decode"]


@dataclass(frozen=True)
class Progress:
    """What a callback sees: `step` of `total` steps of a stage are done; 0 when it starts."""

    stage: Stage
    step: int
    total: int


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class Sample:
    """A video before it is decoded: all that `FSVideoPipeline.decode` needs.

    Attributes:
        latents: `1 C t h w`, normalised, float32, on the CPU.
        canvas: uint8 `H W 3`, the first frame with its margins.
        geometry: sizes and number of frames.
        noise_state: of the CPU generator, for the decoder's noise.
        timings: seconds of each stage so far.
    """

    latents: Tensor
    canvas: NDArray[np.uint8]
    geometry: VideoGeometry
    noise_state: Tensor
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class VideoOutput:
    """A finished video: uint8 `T H W 3` (None if latents were asked for), what it was decoded from, seconds of each
    stage."""

    frames: NDArray[np.uint8] | None
    sample: Sample
    timings: dict[str, float]


class FSVideoPipeline(DiffusionPipeline):
    """The models of FSVideo in a row; `from_pretrained(folder)` and `save_pretrained(folder)` in diffusers' layout.

    Args:
        autoencoder: both resolutions' encoder, and the decoder.
        text_encoder, tokenizer: UMT5, of the width that transformer and refiner expect.
        image_encoder: CLIP's vision tower.
        transformer: the base model.
        upsampler: of the base model's latents.
        refiner: the second model, at the video's resolution.
        mask: how far the refiner is told to trust the upsampled latents.
        settings: how the models are sampled by default; a dictionary is what a saved pipeline's index holds.
    """

    def __init__(
        self,
        autoencoder: FSAE,
        text_encoder: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        image_encoder: CLIPVisionModel,
        transformer: FSDiT,
        upsampler: LatentUpsampler,
        refiner: FSDiT,
        mask: DynamicMask,
        settings: Settings | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            autoencoder=autoencoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_encoder=image_encoder,
            transformer=transformer,
            upsampler=upsampler,
            refiner=refiner,
            mask=mask,
        )
        if not isinstance(settings, Settings):
            settings = Settings.from_dict(settings or {}, "the pipeline")
        self.register_to_config(settings=asdict(settings))
        # The convolutions are the cost of a video; they run fastest with the channels last.
        self.autoencoder.to(memory_format=torch.channels_last_3d)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        torch_dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        **components: Any,
    ) -> Self:
        """Load a folder that `save_pretrained` wrote, and only if all of it is there and fits.

        Args:
            pretrained_model_name_or_path: the folder.
            torch_dtype: of the weights once loaded, however they were saved. float32 suits a CPU, bfloat16 a GPU.
            variant: as in "fp16" for model.fp16.safetensors.
            **components: take the place of the folder's, which then need not be there.

        Raises:
            CheckpointError: a file is missing or cut short, or does not fit its model.
            UserError: a component is given that the pipeline does not have.
        """
        folder = Path(pretrained_model_name_or_path)
        for name in components:
            if name not in NAMES:
                raise UserError(f"from_pretrained was given {name!r}; the pipeline's components are {', '.join(NAMES)}")
        index, settings = read_index(folder), read_settings(folder)
        missing = [name for name in NAMES if name not in components]
        for name in missing:  # all of them before the first is read, which may take minutes
            check_component(name, folder, index)
        for name in missing:
            components[name] = load_component(name, folder, index, torch_dtype, variant)
        return cls(**components, settings=settings)

    @property
    def settings(self) -> Settings:
        """How the models are sampled by default."""
        return Settings(**self.config.settings)

    @property
    def components(self) -> dict[str, Any]:
        """All that another pipeline of the same models is made of, as `FSVideoPipeline(**components)`."""
        return {**super().components, "settings": self.settings}

    @property
    def parameters(self) -> dict[str, Any]:
        """Nothing: what diffusers' pipelines hold here beside their components is one of them."""
        return {}

    @property
    def compression(self) -> Compression:
        """How many pixels and frames a latent stands for."""
        return self.autoencoder.compression

    def job(self, request: VideoRequest) -> Job:
        """Settle a request for these models, without computing anything; UserError if something in it cannot be
        used."""
        return resolve(request, self.settings, self.compression)

    def run(self, job: Job, callback: ProgressCallback | None = None) -> VideoOutput:
        """Make the video of a job; `sample`, then `decode`."""
        return self.decode(self.sample(job, callback), callback)

    def __call__(
        self,
        image: Photo,
        prompt: str,
        *,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        refiner_steps: int | None = None,
        generator: torch.Generator | int | None = None,
        callback: ProgressCallback | None = None,
        output: Literal["frames", "latents"] = "frames",
    ) -> VideoOutput:
        """Make a video that starts with a photo: `job` and `run` in one call.

        Args:
            image: a photo, uint8 `H W 3` or an upright PIL image in RGB (`fsae.data.image.load_image`).
            prompt: what happens in the video.
            size: (width, height); None follows the photo's aspect ratio at the settings' area.
            frames: the nearest 1 + 4k is made.
            steps: of the base model.
            guidance: of the base model; 1 switches it off.
            refiner_steps: of the refiner.
            generator: a CPU generator or a seed; None draws a seed.
            callback: called before and after every stage and after every step; what it raises ends the work.
            output: "latents" leaves decoding out.

        Raises:
            UserError: one of these cannot be used; nothing has been computed then.
        """
        if output not in ("frames", "latents"):
            raise UserError(f'output {output!r} given; "frames" or "latents" is accepted')
        noise_source, seed = (generator, None) if isinstance(generator, torch.Generator) else (None, generator)
        request = VideoRequest(
            image,
            prompt,
            size=size,
            frames=frames,
            steps=steps,
            guidance=guidance,
            refiner_steps=refiner_steps,
            seed=seed,
        )
        sample = self.sample(self.job(request), callback, noise_source)
        return self.decode(sample, callback) if output == "frames" else VideoOutput(None, sample, sample.timings)

    @torch.inference_mode()
    def sample(
        self, job: Job, callback: ProgressCallback | None = None, generator: torch.Generator | None = None
    ) -> Sample:
        """A job's latents, for `decode`.

        `callback` is called before and after every stage and after every step; what it raises ends the work.
        `generator`, a CPU generator, goes on in place of one of the job's seed.

        Raises:
            UserError: the job was settled for another compression, or the generator is not the CPU's.
        """
        geometry, settings = job.plan.geometry, job.settings
        self._check_geometry(geometry)
        noise_source = torch.Generator().manual_seed(job.seed) if generator is None else generator
        _check_on_cpu(noise_source)
        canvas = make_canvas(job.photo, job.plan)
        self._warn_of_long(job.prompt)
        clock = _Clock(callback)

        with clock.stage("encode"):
            high, low = self.encode_canvas(canvas)
            context = self.encode_context(job.prompt, canvas, guided=settings.guidance != 1)
        with clock.stage("base", settings.steps) as after_step:
            condition = first_frame_condition(low, geometry.latents[0], self.transformer.config.mask_channels)
            base = denoise(
                self.transformer,
                self._noise(condition.latents.shape, noise_source),
                condition,
                context,
                schedule=FlowSchedule(settings.shift),
                steps=settings.steps,
                guidance=settings.guidance,
                callback=after_step,
            )
        with clock.stage("upsample"):
            drafted = self.upsampler(base.to(self.upsampler.dtype)).float()
        with clock.stage("refine", settings.refiner_steps) as after_step:
            condition = refiner_condition(high, drafted, self.mask, self.refiner.config.mask_channels)
            latents = denoise(
                self.refiner,
                self._noise(condition.latents.shape, noise_source),
                condition,
                replace(context, negative=None),
                schedule=FlowSchedule(settings.refiner_shift),
                steps=settings.refiner_steps,
                callback=after_step,
            )
        # The first latent is known: the refiner's copy of it can only be worse.
        latents[:, :, :1] = high
        return Sample(latents.cpu(), canvas, geometry, noise_source.get_state(), clock.timings)

    @torch.inference_mode()
    def decode(self, sample: Sample, callback: ProgressCallback | None = None) -> VideoOutput:
        """A sample's frames. The canvas is the decoder's first frame; its margins are cropped away."""
        clock = _Clock(callback)
        with clock.stage("decode"):
            generator = torch.Generator()
            generator.set_state(sample.noise_state)
            latents = sample.latents.to(self.device, self.autoencoder.dtype)
            video = self.autoencoder.decode(latents, self._video_of(sample.canvas), generator)
            frames = crop_video(to_frames(video[0]).numpy(), sample.geometry)
        return VideoOutput(frames, sample, {**sample.timings, **clock.timings})

    def encode_canvas(self, canvas: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """Canvas `H W 3` -> float32 latents `1 C 1 h w`, and those of its half size `1 C 1 h/2 w/2`."""
        video = self._video_of(canvas)
        half = F.interpolate(
            video[:, :, 0].float(), scale_factor=0.5, mode="bicubic", antialias=True, align_corners=False
        )
        low = half.clamp(-1, 1).unsqueeze(2).to(video.dtype)
        return self.autoencoder.encode(video).float(), self.autoencoder.encode(low).float()

    def encode_context(self, prompt: str, canvas: NDArray[np.uint8], guided: bool) -> Context:
        """What cross-attention sees: the prompt, the canvas `H W 3` and, if guided, the empty prompt."""
        text = self._text_encoder()([prompt, ""] if guided else [prompt])
        image = ImageEncoder(self.image_encoder)(self._video_of(canvas)[:, :, 0])
        return Context(text.embeddings[:1], image, text.embeddings[1:] if guided else None)

    def _text_encoder(self) -> TextEncoder:
        return TextEncoder(self.text_encoder, self.tokenizer, self.transformer.config.text_len)

    def _warn_of_long(self, prompt: str) -> None:
        tokens, dropped = self._text_encoder().tokenize(prompt)
        if dropped:
            logger.warning(
                "the prompt has %d tokens; the model reads the first %d of them, so the rest has no effect",
                len(tokens) + dropped,
                len(tokens),
            )

    def _check_geometry(self, geometry: VideoGeometry) -> None:
        """Refuse a job whose canvas or latents are another model's."""
        if geometry != VideoGeometry.of(geometry.frames, geometry.size, self.compression):
            space, time = self.compression.space, self.compression.time
            raise UserError(
                f"the job was settled for another model than this one, whose latents are {space} pixels wide and "
                f"{time} frames long; make it with this pipeline's job(request)"
            )

    def _noise(self, shape: torch.Size, noise_source: torch.Generator) -> Tensor:
        """Standard normal, float32, drawn on the CPU."""
        return torch.randn(shape, generator=noise_source).to(self.device)

    def _video_of(self, canvas: NDArray[np.uint8]) -> Tensor:
        """Canvas `H W 3` -> video of one frame `1 3 1 H W` as the autoencoder takes it."""
        return to_video_tensor(torch.from_numpy(canvas[None])).unsqueeze(0).to(self.device, self.autoencoder.dtype)


class _Clock:
    """Times the stages and tells the callback about them."""

    def __init__(self, callback: ProgressCallback | None) -> None:
        self.callback = callback
        self.timings: dict[str, float] = {}

    @contextmanager
    def stage(self, stage: Stage, total: int = 1) -> Iterator[StepCallback]:
        """Time what is inside; it gets a function to call after each step; the last is reported for it."""
        done = -1

        def report(step: int) -> None:
            nonlocal done
            if step != done and self.callback is not None:
                self.callback(Progress(stage, step, total))
            done = step

        def after_step(step: Step) -> None:
            report(step.index + 1)

        start = time.perf_counter()
        report(0)
        yield after_step
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        report(total)
        self.timings[stage] = time.perf_counter() - start


def _check_on_cpu(generator: torch.Generator) -> None:
    if generator.device.type != "cpu":
        raise UserError(
            f"a generator on {generator.device} given; the noise is made on the CPU, so give a CPU generator"
        )
