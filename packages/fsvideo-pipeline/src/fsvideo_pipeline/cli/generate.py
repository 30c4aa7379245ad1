"""`fsvideo generate`: everything that can be wrong with a request is found before torch is imported."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fsae.data.image import load_image
from fsvideo_pipeline.cli.options import GenerateOptions
from fsvideo_pipeline.cli.progress import StageBars
from fsvideo_pipeline.output import check_output, describe, latents_path, save_sample, save_video
from fsvideo_pipeline.plan import parse_size
from fsvideo_pipeline.request import Job, VideoRequest, resolve
from fsvideo_pipeline.settings import packaged_model, read_compression, read_settings

if TYPE_CHECKING:
    from fsvideo_pipeline.pipeline import FSVideoPipeline, Sample


def main(argv: list[str]) -> int:
    """Run `fsvideo generate` on its arguments."""
    start = time.perf_counter()
    options = parse(argv)
    model = packaged_model() if options.model is None else Path(options.model)
    job = make_job(options, model)
    for note in job.plan.notes:
        print(f"note: {note}", file=sys.stderr)
    timings = generate(job, model, options)
    geometry = job.plan.geometry
    print(f"{options.output}: {geometry.frames} frames of {geometry.size} at {job.settings.fps:g} fps, seed {job.seed}")
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in timings.items())
    print(f"{time.perf_counter() - start:.1f} s in all: {stages}")
    return 0


def parse(argv: list[str]) -> GenerateOptions:
    """The options of the command line."""
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
    by_hand = {"image", "prompt", "output", "keep_latents", "no_metadata"}
    parser.add_class_arguments(GenerateOptions, skip=by_hand)
    return GenerateOptions(**parser.parse_args(argv).as_dict())


def make_job(options: GenerateOptions, model: Path) -> Job:
    """What is to be made by the model in this folder, of which no weight is read; UserError if something in the options
    cannot be used, or the video could not be written."""
    size = None if options.size is None else parse_size(options.size)
    check_output(options.output)
    request = VideoRequest(
        load_image(options.image),
        options.prompt,
        size=size,
        frames=options.frames,
        fps=options.fps,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
    )
    return resolve(request, read_settings(model), read_compression(model))


def generate(job: Job, model: Path, options: GenerateOptions) -> dict[str, float]:
    """Load the models, make the video and write it; seconds that each stage took."""
    start = time.perf_counter()
    pipeline = load(model)
    loaded = time.perf_counter()
    # Without a path: videos are passed on, and folders' names are private.
    metadata = None if options.no_metadata else describe({**job.facts(), "model": model.resolve().name})
    with StageBars() as bars:
        sample = pipeline.sample(job, bars)
    with latents_on_disk(sample, options), StageBars() as bars:
        video = pipeline.decode(sample, bars)
        assert video.frames is not None
        decoded = time.perf_counter()
        save_video(options.output, video.frames, job.settings.fps, metadata)
    return {"load": loaded - start, **video.timings, "write": time.perf_counter() - decoded}


def load(model: Path) -> FSVideoPipeline:
    """The pipeline on the best device there is."""
    # Before torch is imported, which takes seconds, so that the user sees that work has begun.
    print(f"loading {model}", file=sys.stderr)
    import torch

    from fsvideo_pipeline.pipeline import FSVideoPipeline

    if torch.cuda.is_available():
        return FSVideoPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to("cuda")
    return FSVideoPipeline.from_pretrained(model)


@contextmanager
def latents_on_disk(sample: Sample, options: GenerateOptions) -> Iterator[None]:
    """The latents lie beside the video until it is written, so that a failure or an interrupt costs no sampling."""
    path = latents_path(options.output)
    save_sample(path, sample)
    try:
        yield
    except BaseException:
        print(f"the latents are saved in {path}", file=sys.stderr)
        raise
    if options.keep_latents:
        print(path)
    else:
        path.unlink()
