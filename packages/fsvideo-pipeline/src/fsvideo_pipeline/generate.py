"""`fsvideo generate`: everything that can be wrong with a request is found before torch is imported."""

from __future__ import annotations

import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fsae.data.image import load_image
from fsae.errors import UserError
from fsvideo_pipeline.options import GenerateOptions
from fsvideo_pipeline.output import check_output, describe, latents_path, save_sample, save_video
from fsvideo_pipeline.plan import VideoPlan, parse_size, plan_video
from fsvideo_pipeline.settings import Settings, packaged_model, read_settings

if TYPE_CHECKING:
    from tqdm import tqdm

    from fsvideo_pipeline.pipeline import FSVideoPipeline, Progress, Sample

STAGE_NAMES = {
    "encode": "encode photo and prompt",
    "base": "base model",
    "upsample": "upsample",
    "refine": "refine",
    "decode": "decode",
}


@dataclass(frozen=True)
class Request:
    """A request that has been checked, with the model's settings filled in."""

    photo: NDArray[np.uint8]
    prompt: str
    output: Path
    options: GenerateOptions
    model: Path
    settings: Settings
    plan: VideoPlan
    seed: int


def main(argv: list[str]) -> int:
    """Run `fsvideo generate` on its arguments."""
    start = time.perf_counter()
    request = check(*parse(argv))
    for note in request.plan.notes:
        print(f"note: {note}", file=sys.stderr)
    timings = generate(request)
    plan = request.plan
    print(
        f"{request.output}: {plan.frames} frames of {plan.width}x{plan.height} at "
        f"{request.settings.fps:g} fps, seed {request.seed}"
    )
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in timings.items())
    print(f"{time.perf_counter() - start:.1f} s in all: {stages}")
    return 0


def parse(argv: list[str]) -> tuple[str, str, Path, GenerateOptions]:
    """Image, prompt, output and options from the command line."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="fsvideo generate", description="Make a video from a photo and a prompt.")
    parser.add_argument("image", type=str, help="Photo that the video starts with: JPEG, PNG, WebP, TIFF, BMP or GIF.")
    parser.add_argument("prompt", type=str, help="What happens in the video.")
    parser.add_argument("-o", "--output", type=str, required=True, help="Video to write, such as out.mp4.")
    switches = {
        "--keep-latents": "Keep the latents that the video was made from, as NAME.latents.safetensors.",
        "--no-metadata": "Leave prompt, seed, sizes and versions out of the video file.",
    }
    for name, text in switches.items():
        parser.add_argument(name, action="store_true", help=text)
    parser.add_class_arguments(GenerateOptions, skip={"keep_latents", "no_metadata"})
    values: dict[str, Any] = parser.parse_args(argv).as_dict()
    image, prompt, output = (values.pop(name) for name in ("image", "prompt", "output"))
    return image, prompt, Path(output), GenerateOptions(**values)


def check(image: str, prompt: str, output: Path, options: GenerateOptions) -> Request:
    """The request with everything settled that needs no model.

    Raises:
        UserError: something in it cannot be used.
    """
    if not prompt.strip():
        raise UserError('the prompt is empty; say what happens in the video, such as "the camera pans left"')
    if not _is_text(prompt):
        raise UserError(f"the prompt {prompt!a} is no UTF-8; give it from a terminal or a file that is")
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} given; accepted is a whole number from 0 to 2^63 - 1")
    size = None if options.size is None else parse_size(options.size)
    check_output(output)
    photo = load_image(image)
    model = packaged_model() if options.model is None else Path(options.model)
    settings = read_settings(model).override(
        frames=options.frames, fps=options.fps, steps=options.steps, guidance=options.guidance
    )
    plan = plan_video((photo.shape[1], photo.shape[0]), settings.area, settings.frames, size)
    return Request(photo, prompt, output, options, model, settings, plan, seed)


def _is_text(argument: str) -> bool:
    """Whether all bytes of an argument were UTF-8: Python keeps others as halves of surrogate pairs."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def generate(request: Request) -> dict[str, float]:
    """Load the models, make the video and write it; seconds that each stage took.

    The latents are on disk before decoding begins, so that neither a failure nor an interrupt there loses the
    sampling.
    """
    clock = time.perf_counter()
    pipeline = load(request.model)
    timings = {"load": time.perf_counter() - clock}
    saved = latents_path(request.output)
    with StageBars() as bars:
        sample = pipeline.sample(
            request.photo,
            request.prompt,
            size=(request.plan.width, request.plan.height),
            frames=request.plan.frames,
            steps=request.settings.steps,
            guidance=request.settings.guidance,
            generator=request.seed,
            callback=bars,
        )
        save_sample(saved, sample)
        try:
            timings |= decode(pipeline, request, sample, bars)
        except BaseException:
            bars.close()
            print(f"the latents are saved in {saved}", file=sys.stderr)
            raise
    if request.options.keep_latents:
        print(saved)
    else:
        saved.unlink()
    return timings


def load(model: Path) -> FSVideoPipeline:
    """The pipeline on the best device there is."""
    # Before torch is imported, which takes seconds, so that the user sees that work has begun.
    print(f"loading {model}", file=sys.stderr)
    import torch

    from fsvideo_pipeline.pipeline import FSVideoPipeline

    if torch.cuda.is_available():
        return FSVideoPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to("cuda")
    return FSVideoPipeline.from_pretrained(model)


def decode(pipeline: FSVideoPipeline, request: Request, sample: Sample, bars: StageBars) -> dict[str, float]:
    """Decode a sample and write the video; seconds of all stages."""
    video = pipeline.decode(sample, bars)
    assert video.frames is not None
    clock = time.perf_counter()
    metadata = None if request.options.no_metadata else describe(_facts(request))
    save_video(request.output, video.frames, request.settings.fps, metadata)
    return {**video.timings, "write": time.perf_counter() - clock}


def _facts(request: Request) -> dict[str, Any]:
    """What made the video, without a path: videos are passed on, and folders' names are private."""
    plan, settings = request.plan, request.settings
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "size": f"{plan.width}x{plan.height}",
        "canvas": f"{plan.canvas_width}x{plan.canvas_height}",
        "frames": plan.frames,
        "fps": request.settings.fps,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "refiner_steps": settings.refiner_steps,
        "model": request.model.resolve().name,
    }


class StageBars:
    """One progress bar a stage, on stderr."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> StageBars:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, progress: Progress) -> None:
        """Show a stage's progress."""
        from tqdm import tqdm

        if progress.step == 0 or self.bar is None:
            self.close()
            self.bar = tqdm(total=progress.total, desc=STAGE_NAMES[progress.stage], unit="step")
        self.bar.update(progress.step - self.bar.n)

    def close(self) -> None:
        """End the bar that is shown."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
