"""The stages in order, on a tiny model of the real classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fsae.data.video import to_frames, to_video_tensor
from fsae.errors import UserError
from fsdit.conditioning import Context, ImageEncoder, TextEncoder, first_frame_condition
from fsdit.flow.path import FlowSchedule
from fsdit.flow.sampling import denoise
from fsupsampler.refiner import refiner_condition
from fsvideo_pipeline.output import load_sample, save_sample
from fsvideo_pipeline.pipeline import FSVideoPipeline, Progress
from fsvideo_pipeline.request import VideoRequest

PROMPT = "the camera pans left"


def latents(pipeline: FSVideoPipeline, photo: np.ndarray, prompt: str = PROMPT, **options: Any) -> torch.Tensor:
    return pipeline(photo, prompt, **{"generator": 0, "output": "latents", **options}).sample.latents


@pytest.fixture(scope="module")
def reference(pipeline: FSVideoPipeline, photo: np.ndarray) -> torch.Tensor:
    return latents(pipeline, photo)


def test_shapes_and_defaults_come_from_the_settings(pipeline: FSVideoPipeline, photo: np.ndarray) -> None:
    seen: list[Progress] = []
    video = pipeline(photo, PROMPT, generator=3, callback=seen.append)
    geometry = video.sample.geometry
    assert (geometry.size, geometry.canvas, geometry.latents) == ((128, 96), (128, 128), (2, 2, 2))
    assert video.frames is not None
    assert video.frames.dtype == np.uint8
    assert video.frames.shape == (5, 96, 128, 3)
    assert video.sample.latents.shape == (1, 8, 2, 2, 2)
    assert list(video.timings) == ["encode", "base", "upsample", "refine", "decode"]
    assert all(seconds >= 0 for seconds in video.timings.values())
    assert [(event.stage, event.step, event.total) for event in seen] == [
        *[("encode", step, 1) for step in range(2)],
        *[("base", step, 2) for step in range(3)],
        *[("upsample", step, 1) for step in range(2)],
        *[("refine", step, 3) for step in range(4)],
        *[("decode", step, 1) for step in range(2)],
    ]


@torch.no_grad()
def test_the_stages_are_the_packages_functions_in_the_papers_order(
    pipeline: FSVideoPipeline, photo: np.ndarray
) -> None:
    """The same from public parts, with the noise drawn in the promised order: base, refiner, decoder."""
    settings = pipeline.settings
    video = pipeline(photo, PROMPT, size=(128, 128), generator=7)

    image = Image.fromarray(photo).resize((128, 128), Image.Resampling.BICUBIC, box=(20, 0, 140, 120))
    half = image.resize((64, 64), Image.Resampling.BICUBIC)
    high, low = (to_video_tensor(torch.from_numpy(np.array(x)[None]))[None] for x in (image, half))
    z_high, z_low = pipeline.autoencoder.encode(high), pipeline.autoencoder.encode(low)
    text = TextEncoder(pipeline.text_encoder, pipeline.tokenizer, 24)([PROMPT, ""]).embeddings
    context = Context(text[:1], ImageEncoder(pipeline.image_encoder)(high[:, :, 0]), text[1:])
    noise = torch.Generator().manual_seed(7)
    base = denoise(
        pipeline.transformer,
        torch.randn(1, 8, 2, 1, 1, generator=noise),
        first_frame_condition(z_low, 2),
        context,
        schedule=FlowSchedule(settings.shift),
        steps=settings.steps,
        guidance=settings.guidance,
    )
    refined = denoise(
        pipeline.refiner,
        torch.randn(1, 8, 2, 2, 2, generator=noise),
        refiner_condition(z_high, pipeline.upsampler(base), pipeline.mask),
        replace(context, negative=None),
        schedule=FlowSchedule(settings.refiner_shift),
        steps=settings.refiner_steps,
    )
    refined[:, :, :1] = z_high
    # Pillow rounds the half-size photo to 8 bits; all else is the same.
    torch.testing.assert_close(video.sample.latents, refined, atol=0.03, rtol=0.03)
    torch.testing.assert_close(video.sample.latents[:, :, :1], z_high, atol=1e-5, rtol=1e-5)
    decoded = pipeline.autoencoder.decode(video.sample.latents, high, noise)
    assert video.frames is not None
    difference = video.frames.astype(int) - to_frames(decoded[0]).numpy()
    assert abs(difference).max() <= 1


def test_the_low_resolution_image_is_pillows_antialiased_half(pipeline: FSVideoPipeline) -> None:
    canvas = np.random.default_rng(0).integers(0, 256, (128, 256, 3), dtype=np.uint8)
    seen: list[torch.Tensor] = []
    encode = pipeline.autoencoder.encode
    pipeline.autoencoder.encode = lambda video: (seen.append(video), encode(video))[1]
    try:
        pipeline.encode_canvas(canvas)
    finally:
        del pipeline.autoencoder.encode
    expected = np.asarray(Image.fromarray(canvas).resize((128, 64), Image.Resampling.BICUBIC)).astype(int)
    assert seen[1].shape == (1, 3, 1, 64, 128)
    difference = abs(to_frames(seen[1][0])[0].numpy() - expected)
    # Pillow also rounds between its two passes.
    assert difference.max() <= 2
    assert difference.mean() < 0.3


def test_the_same_seed_makes_the_same_video_and_another_seed_another(
    pipeline: FSVideoPipeline, photo: np.ndarray
) -> None:
    first, again, other = (pipeline(photo, PROMPT, generator=seed).frames for seed in (5, 5, 6))
    assert first is not None
    assert other is not None
    np.testing.assert_array_equal(first, again)
    assert (first[1:] != other[1:]).any()


def test_a_seed_is_a_generator_and_none_is_another_each_time(
    pipeline: FSVideoPipeline, photo: np.ndarray, reference: torch.Tensor
) -> None:
    assert torch.equal(latents(pipeline, photo, generator=torch.Generator().manual_seed(0)), reference)
    assert (latents(pipeline, photo, generator=None) != latents(pipeline, photo, generator=None)).any()


@pytest.mark.parametrize(
    "change",
    [{"steps": 3}, {"guidance": 1.0}, {"guidance": 4.0}, {"refiner_steps": 2}, {"prompt": "it rolls"}],
    ids=str,
)
def test_every_argument_reaches_the_latents(
    change: dict[str, Any], pipeline: FSVideoPipeline, photo: np.ndarray, reference: torch.Tensor
) -> None:
    assert (latents(pipeline, photo, **change) != reference).any()


def test_what_equals_the_settings_changes_nothing(
    pipeline: FSVideoPipeline, photo: np.ndarray, reference: torch.Tensor
) -> None:
    same = latents(pipeline, photo, steps=2, guidance=3.0, refiner_steps=3, frames=5, size=(128, 96))
    assert torch.equal(same, reference)


def test_size_and_frames_reach_the_latents(pipeline: FSVideoPipeline, photo: np.ndarray) -> None:
    assert latents(pipeline, photo, frames=9, size=(256, 100)).shape == (1, 8, 3, 2, 4)
    still = pipeline(photo, PROMPT, frames=1, generator=0)
    assert still.frames is not None
    assert still.frames.shape == (1, 96, 128, 3)


def test_a_pil_image_and_a_tensor_are_photos_too(
    pipeline: FSVideoPipeline, photo: np.ndarray, reference: torch.Tensor
) -> None:
    for image in (Image.fromarray(photo), torch.from_numpy(photo)):
        assert torch.equal(latents(pipeline, image), reference)


def test_frame_0_is_the_photo_through_the_autoencoder(pipeline: FSVideoPipeline, photo: np.ndarray) -> None:
    """Whatever was sampled; with a single frame the rest of the clip has no say either."""
    frames = [pipeline(photo, prompt, frames=1, generator=1).frames for prompt in ("a", "b")]
    np.testing.assert_array_equal(frames[0], frames[1])


def test_a_saved_sample_decodes_to_the_same_frames(
    pipeline: FSVideoPipeline, photo: np.ndarray, tmp_path: Path
) -> None:
    video = pipeline(photo, PROMPT, size=(100, 60), generator=9)
    save_sample(tmp_path / "a.latents.safetensors", video.sample)
    loaded = load_sample(tmp_path / "a.latents.safetensors")
    assert loaded.geometry == video.sample.geometry
    np.testing.assert_array_equal(pipeline.decode(loaded).frames, video.frames)


def test_the_saved_samples_of_earlier_versions_load(
    pipeline: FSVideoPipeline, photo: np.ndarray, tmp_path: Path
) -> None:
    """The file's form is fixed: latents are kept for long."""
    video = pipeline(photo, PROMPT, size=(100, 60), generator=9)
    sample = video.sample
    tensors = {
        "latents": sample.latents,
        "canvas": torch.from_numpy(sample.canvas.copy()),
        "noise_state": sample.noise_state,
    }
    path = tmp_path / "old.latents.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "plan": '{"width": 100, "height": 60, "frames": 5}'})
    np.testing.assert_array_equal(pipeline.decode(load_sample(path)).frames, video.frames)


def test_a_foreign_file_is_no_saved_sample(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no saved sample"):
        load_sample(saved / "text_encoder" / "model.safetensors")
    with pytest.raises(UserError, match="there is no weights file"):
        load_sample(tmp_path / "none.latents.safetensors")


def test_a_long_prompt_is_cut_and_that_is_said(
    pipeline: FSVideoPipeline, photo: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    cut = latents(pipeline, photo, "x" * 10_000)
    assert "10001 tokens" in caplog.text
    assert "first 24" in caplog.text
    caplog.clear()
    assert torch.equal(cut, latents(pipeline, photo, "x" * 23))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"steps": 0}, "0 steps given"),
        ({"refiner_steps": 1001}, "1001 refiner steps given"),
        ({"guidance": float("nan")}, "guidance nan given"),
        ({"guidance": 0.5}, "guidance 0.5 given"),
        ({"frames": 0}, "0 frames given"),
        ({"size": (8, 8)}, "size 8x8 given"),
        ({"generator": -1}, "seed -1 given"),
        ({"output": "pil"}, "output 'pil' given"),
        ({"image": np.zeros((4, 4), np.uint8)}, "an image of uint8 .4, 4. given"),
        ({"image": np.zeros((4, 4, 3), np.float32)}, "an image of float32"),
        ({"image": Image.new("RGBA", (4, 4))}, "a PIL image of mode RGBA given"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_used_is_a_sentence_before_any_work(
    wrong: dict[str, Any], words: str, pipeline: FSVideoPipeline, photo: np.ndarray
) -> None:
    seen: list[Progress] = []
    with pytest.raises(UserError, match=words):
        pipeline(**{"image": photo, "prompt": PROMPT, "callback": seen.append, **wrong})
    assert seen == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_weights_dtype_runs_from_end_to_end(dtype: torch.dtype, saved: Path, photo: np.ndarray) -> None:
    video = FSVideoPipeline.from_pretrained(saved, torch_dtype=dtype)(photo, PROMPT, generator=0)
    assert video.frames is not None
    assert video.sample.latents.dtype == torch.float32
    assert video.sample.latents.isfinite().all()
    assert len(np.unique(video.frames)) > 50


def test_a_call_is_the_job_of_a_request(pipeline: FSVideoPipeline, photo: np.ndarray) -> None:
    job = pipeline.job(VideoRequest(photo, PROMPT, size=(100, 60), steps=3, seed=9))
    video, called = pipeline.run(job), pipeline(photo, PROMPT, size=(100, 60), steps=3, generator=9)
    assert video.frames is not None
    np.testing.assert_array_equal(video.frames, called.frames)
    other = pipeline.run(pipeline.job(VideoRequest(photo, PROMPT, size=(100, 60), steps=3, seed=8)))
    assert (other.frames != video.frames).any()
