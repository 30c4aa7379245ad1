"""Files of any length: encoded and decoded as a whole would be, and going on after a stop."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from fsae.data.video import probe, read_video, to_frames, to_video_tensor, write_video
from fsae.errors import UserError
from fsae.model import FSAE
from fsae.tiling import foresee
from fsae.transcoding import transcode as transcoding
from fsae.transcoding.fingerprints import encoder_fingerprint, model_fingerprint
from fsae.transcoding.latents import SavedLatents, load_latents
from fsae.transcoding.segments import join_videos
from fsae.transcoding.transcode import decode_file, encode_file, stream_reach

# Few convolutions over time, so that a reach is a few latents and a clip of a hundred frames is many of it.
FEW_STAGES: dict[str, Any] = {
    "widths": (8,) * 3,
    "frame_matching": False,
    "encoder_depths": (1,) * 3,
    "decoder_depths": (1,) * 3,
    "residual_stages": 2,
    "noise": 0.05,
}
FRAMES = 110  # 28 latents


def tiny(kind: str, **options: Any) -> FSAE:
    torch.manual_seed(0)
    model = FSAE.from_preset("tiny", **(FEW_STAGES | {"decoder_kind": kind} | options)).eval()
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if ".injection." in name:  # which starts as nothing
                parameter += 0.3 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "in.mp4"
    rng = np.random.default_rng(0)
    frames = np.clip(rng.normal(128, 40, (FRAMES, 18, 26, 3)).cumsum(0) % 256, 0, 255).astype(np.uint8)
    write_video(path, frames, 12)
    return path


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two latents a chunk, and two a segment."""
    monkeypatch.setattr(transcoding, "_CHUNK_PIXELS", 16 * 24 * 4 * 2)
    monkeypatch.setattr(transcoding, "SEGMENT", 2)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class StopAfter:
    """Lets an iterator's first items through, then raises."""

    def __init__(self, items: int, error: BaseException) -> None:
        self.items, self.error = items, error

    def __call__(self, inner: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def stopped(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for number, item in enumerate(inner(*args, **kwargs)):
                if number == self.items:
                    raise self.error
                yield item

        return stopped


@pytest.mark.usefixtures("small_chunks")
def test_latents_are_those_of_the_whole_clip(tmp_path: Path, video: Path) -> None:
    model = tiny("lite")
    saved = encode_file(model, video, tmp_path / "z.safetensors")
    frames, _ = read_video(video, frames=109, size=(16, 24))
    with torch.no_grad():
        whole = model.encode(to_video_tensor(frames)[None])[0]
    torch.testing.assert_close(saved.latents, whole, atol=1e-5, rtol=1e-5)
    read = load_latents(tmp_path / "z.safetensors")
    assert torch.equal(read.latents, saved.latents) and read.fps == 12
    assert read.first_frame is not None and torch.equal(read.first_frame, frames[0])
    assert read.encoder == encoder_fingerprint(model)
    assert left_in(tmp_path) == ["z.safetensors"]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("chunks", [1, 2, 13])
def test_encoding_goes_on_where_it_was_stopped(
    tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    model = tiny("lite")
    expected = encode_file(model, video, tmp_path / "whole.safetensors").latents
    monkeypatch.setattr(transcoding, "PART_SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(model, "encode_stream", StopAfter(chunks, RuntimeError("power cut"))(model.encode_stream))
        with pytest.raises(RuntimeError, match="power cut"):
            encode_file(model, video, tmp_path / "z.safetensors")
    parts = sorted((tmp_path / "z.safetensors.partial").glob("part-*")) if chunks > 1 else []
    kept = sum(load_file(part)["latents"].shape[1] for part in parts)
    assert kept == (0 if chunks == 1 else 1 + 2 * (chunks - 2)) and not (tmp_path / "z.safetensors").exists()

    read: list[int] = []
    stream = transcoding.stream_video
    monkeypatch.setattr(
        transcoding,
        "stream_video",
        lambda path, size, start=0, frames=None: read.append(start) or stream(path, size, start, frames),
    )
    resumed = encode_file(model, video, tmp_path / "z.safetensors")
    assert torch.equal(resumed.latents, expected)
    # The stream was taken up in the middle, no farther back than the convolutions look.
    restart = max(kept - 1 - stream_reach(model.encoder), 0) // 2 * 2
    assert read[-1] == 4 * restart and (restart > 0) == (chunks == 13)
    assert left_in(tmp_path) == ["whole.safetensors", "z.safetensors"]
    assert torch.equal(load_latents(tmp_path / "z.safetensors").latents, expected)


def test_the_reach_is_long_enough_and_no_more_than_some_times_too_long() -> None:
    """A change of all frames before a latent's reach leaves the latent as it is; one within it does not."""
    model = tiny("lite")
    frames = 4 * (stream_reach(model.encoder) + 2) + 1
    video = torch.rand(1, 3, frames, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        whole = model.encode(video)
        late = model.encode(video[:, :, 4:])
        torch.testing.assert_close(late[:, :, -1], whole[:, :, -1], atol=1e-6, rtol=1e-5)
        assert (late[:, :, 1] - whole[:, :, 2]).abs().max() > 1e-3
        decoder = stream_reach(model.decoder)
        assert 1 < decoder < stream_reach(model.encoder)
        latents = torch.randn(1, 8, decoder + 3, 2, 2, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.decode(latents[:, :, 1:])[:, :, -4:], model.decode(latents)[:, :, -4:])
        assert (model.decode(latents[:, :, 1:])[:, :, 1:5] - model.decode(latents)[:, :, 5:9]).abs().max() > 1e-3


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The frames that are handed to the writer of each segment: H.264 itself is not the same twice to the last bit."""
    segments: dict[str, list[Any]] = {}

    def write(path: Path, frames: Iterator[Any], fps: float) -> None:
        kept: list[Any] = []
        write_video(path, (kept.append(frame) or frame for frame in frames), fps)
        segments[path.name] = kept

    monkeypatch.setattr(transcoding, "write_video", write)
    return segments


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["lite", "causal"])
def test_decoding_goes_on_where_it_was_stopped(
    tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = tiny(kind)
    saved = encode_file(model, video, tmp_path / "z.safetensors")
    assert saved.first_frame is not None
    first = to_video_tensor(saved.first_frame[None])[None]
    out = tmp_path / "out.mp4"
    segments = recorded(monkeypatch)
    assert decode_file(model, saved, out, first) == 109
    whole = dict(segments)
    assert [len(frames) for frames in whole.values()] == [5, *[8] * 13]
    segments.clear()

    with monkeypatch.context() as patch:
        patch.setattr(model, "decode_stream", StopAfter(25, RuntimeError("power cut"))(model.decode_stream))
        with pytest.raises(RuntimeError, match="power cut"):
            decode_file(model, saved, tmp_path / "again.mp4", first)
    partial = tmp_path / "again.mp4.partial"
    assert left_in(partial) == [f"part-{n:06}.mp4" for n in range(12)] + ["settings.json"]
    assert not (tmp_path / "again.mp4").exists()
    with pytest.raises(UserError, match="with another first frame;"):
        decode_file(model, saved, tmp_path / "again.mp4", None)

    begun: list[int] = []
    stream = model.decode_stream

    def noted(latents: torch.Tensor, *rest: Any, **named: Any) -> Iterator[torch.Tensor]:
        begun.append(latents.shape[2])
        return stream(latents, *rest, **named)

    monkeypatch.setattr(model, "decode_stream", noted)
    assert decode_file(model, saved, tmp_path / "again.mp4", first) == 109
    # Taken up in the middle, no farther back than the convolutions look.
    assert begun == [28 - (24 - stream_reach(model.decoder)) // 2 * 2] and begun[0] < 28
    assert list(segments) == list(whole)
    assert all(np.array_equal(segments[name], whole[name]) for name in whole)
    assert left_in(tmp_path) == ["again.mp4", "out.mp4", "z.safetensors"]
    assert read_video(tmp_path / "again.mp4")[0].shape == (109, 16, 24, 3)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["lite", "standard"])
def test_the_decoded_frames_are_the_models(tmp_path: Path, video: Path, kind: str) -> None:
    """In segments or at once, by way of H.264, which keeps frames within a few levels; injection and memory matter."""
    model = tiny(kind)
    saved = encode_file(model, video, tmp_path / "z.safetensors", frames=61)
    assert saved.latents.shape[1] == 16
    first = to_video_tensor(saved.first_frame[None])[None]  # type: ignore[index]
    with torch.no_grad():
        expected = to_frames(model.decode(saved.latents[None], first)[0])
    assert decode_file(model, saved, tmp_path / "out.mp4", first, memory=10**9) == 61
    assert not (tmp_path / "out.mp4.partial").exists()
    info = probe(tmp_path / "out.mp4")
    assert (info.frames, info.height, info.width, info.fps) == (61, 16, 24, 12)
    write_video(tmp_path / "expected.mp4", expected.numpy(), 12)
    found, _ = read_video(tmp_path / "out.mp4")
    coded, _ = read_video(tmp_path / "expected.mp4")
    assert (found.float() - expected.float()).abs().mean() < 1.3 * (coded.float() - expected.float()).abs().mean() + 0.5
    with pytest.raises(UserError, match="memory is 1000 bytes"):
        decode_file(model, saved, tmp_path / "other.mp4", first, memory=1000)
    with pytest.raises(UserError, match="memory is 1000 bytes"):
        encode_file(model, video, tmp_path / "other.safetensors", memory=1000)
    assert not (tmp_path / "other.mp4").exists()


@pytest.mark.parametrize("tiles", [1, 4])
def test_a_decoder_of_whole_clips_shows_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiles: int
) -> None:
    shown_at_once = {"delay": 0, "mininterval": 0}
    monkeypatch.setattr(
        "fsae.transcoding.transcode.tqdm", lambda *given, **named: tqdm(*given, **(named | shown_at_once))
    )
    monkeypatch.setattr("fsae.planned.plan_tiles", lambda *given: foresee(*given[:2], given[4], (1, tiles)))
    model = tiny("standard")
    saved = SavedLatents(torch.randn(8, 2, 4, 4), 12.0)
    assert decode_file(model, saved, tmp_path / "out.mp4") == 5
    inner, outer = 1, 4  # blocks, and the two steps up
    shown = re.findall(r"decoding, layers: (\d+)layer", capsys.readouterr().err)
    assert int(shown[-1]) == inner + outer * tiles
    assert not any(module._forward_hooks for module in model.modules())


def cut_short(path: Path, target: Path) -> Path:
    whole = path.read_bytes()
    target.write_bytes(whole[: len(whole) // 2])
    return target


def test_a_video_that_is_cut_short_is_not_taken_for_a_whole_one(tmp_path: Path, video: Path) -> None:
    """Its index says how many frames there were; what is there is kept, and made a file of when asked for."""
    model, part = tiny("causal"), cut_short(video, tmp_path / "part.mp4")
    with pytest.raises(
        UserError, match=rf"ends after \d+ of the {FRAMES} frames.*'--frames \d+' makes a file"
    ) as error:
        encode_file(model, part, tmp_path / "z.safetensors")
    assert not (tmp_path / "z.safetensors").exists()
    there = int(re.findall(r"--frames (\d+)", str(error.value))[0])
    assert encode_file(model, part, tmp_path / "z.safetensors", there).latents.shape[1] == 1 + (there - 1) // 4


def test_a_stream_without_a_count_is_only_doubted(tmp_path: Path, video: Path) -> None:
    frames, fps = read_video(video)
    write_video(tmp_path / "whole.mkv", frames.numpy(), fps)
    part = cut_short(tmp_path / "whole.mkv", tmp_path / "part.mkv")
    assert not probe(part, count=False).counted and probe(part).counted and probe(video, count=False).counted
    with pytest.warns(UserWarning, match=r"ends after \d+ of about \d+ frames, by its duration"):
        encode_file(tiny("causal"), part, tmp_path / "z.safetensors")


def test_fewer_frames_than_asked_for_are_told(tmp_path: Path, video: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = tiny("causal")
    encode_file(model, video, tmp_path / "z.safetensors", FRAMES - 1)
    assert not recwarn
    with pytest.warns(UserWarning, match=f"has {FRAMES} frames, not the {FRAMES + 7} asked for"):
        encode_file(model, video, tmp_path / "z.safetensors", FRAMES + 7)


def test_a_short_clip_does_not_overwrite_the_name_of_an_unfinished_long_one(tmp_path: Path) -> None:
    model = tiny("lite")
    (tmp_path / "out.mp4.partial").mkdir()
    for name in ("part-000000.mp4", "settings.json"):
        (tmp_path / "out.mp4.partial" / name).write_text('{"latents": "others"}')
    with pytest.raises(UserError, match=r"out.mp4.partial holds the beginning of .*out.mp4"):
        decode_file(model, SavedLatents(torch.randn(8, 2, 2, 2), 12.0), tmp_path / "out.mp4")


def test_segments_are_joined_picture_by_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = []
    for number, length in enumerate((13, 12, 12, 5)):
        parts.append(tmp_path / f"{number}.mp4")
        write_video(parts[-1], rng.integers(0, 255, (length, 32, 48, 3), np.uint8), 30000 / 1001)
    pictures = torch.cat([read_video(part)[0] for part in parts])
    for name in ("all.mp4", "all.mkv"):
        join_videos(parts, tmp_path / name)
        joined, fps = read_video(tmp_path / name)
        assert torch.equal(joined, pictures) and fps == pytest.approx(30000 / 1001, rel=1e-4)
        with av.open(str(tmp_path / name)) as file:
            times = [float(frame.time) for frame in file.decode(video=0) if frame.time is not None]
        np.testing.assert_allclose(np.array(times) - times[0], np.arange(42) * 1001 / 30000, atol=2e-3)
    with pytest.raises(UserError, match="ends in"):
        join_videos(parts, tmp_path / "all.txt")


def test_parts_of_another_job_are_not_used(tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("lite")
    out = tmp_path / "z.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(model, "encode_stream", StopAfter(3, KeyboardInterrupt())(model.encode_stream))
        with pytest.raises(KeyboardInterrupt):
            encode_file(model, video, out)
    kept = left_in(tmp_path / "z.safetensors.partial")
    assert kept == ["part-000000.safetensors", "settings.json"]  # an interrupt loses nothing
    other = tiny("lite")
    with torch.no_grad():
        other.encoder.conv_in.weight[0, 0, 0, 0, 0] += 1
    with pytest.raises(UserError, match="made with another encoder; go on as it was begun, or remove that folder"):
        encode_file(other, video, out)
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(video.read_bytes())
    with pytest.raises(UserError, match="another video;"):
        encode_file(model, copy, out)
    (tmp_path / "z.safetensors.partial" / "settings.json").unlink()
    with pytest.raises(UserError, match=r"no settings.json"):
        encode_file(model, video, out)
    assert not out.exists()


@pytest.mark.usefixtures("small_chunks")
def test_a_corrupt_middle_keeps_what_comes_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video: Path) -> None:
    """The error names how much there is, and --frames makes a file of it."""
    model = tiny("lite")
    stream = transcoding.stream_video

    def broken(path: Path, size: tuple[int, int], start: int = 0, frames: int | None = None) -> Iterator[Any]:
        stop = 71 if frames is None else min(71, start + frames)
        yield from stream(path, size, start, max(stop - start, 1))
        if frames is None or start + frames > 71:
            raise UserError("the video cannot be decoded; it is damaged")

    monkeypatch.setattr(transcoding, "stream_video", broken)
    out = tmp_path / "z.safetensors"
    for _ in range(2):  # a second try finds the same
        with pytest.raises(
            UserError, match="it is damaged; the latents of the first 65 frames are kept in .*'--frames 65'"
        ):
            encode_file(model, video, out)
    assert encode_file(model, video, out, frames=65).latents.shape[1] == 17
    assert left_in(tmp_path) == ["z.safetensors"]
    monkeypatch.setattr(transcoding, "stream_video", stream)
    expected = encode_file(model, video, tmp_path / "whole.safetensors").latents
    assert torch.equal(load_latents(out).latents, expected[:, :17])


def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video: Path) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fsae.transcoding.latents.save_file", full)
    with pytest.raises(UserError, match="No space left on device.*make room"):
        encode_file(tiny("lite"), video, tmp_path / "z.safetensors", frames=5)
    assert not (tmp_path / "z.safetensors").exists()


def test_fingerprints_tell_encoders_apart_and_not_decoders() -> None:
    lite, causal = tiny("lite"), tiny("causal")
    assert encoder_fingerprint(lite) != encoder_fingerprint(tiny("lite", latents_std=[2.0] * 8))
    with torch.no_grad():
        for name, parameter in causal.encoder.named_parameters():
            parameter.copy_(lite.encoder.get_parameter(name))
    assert encoder_fingerprint(lite) == encoder_fingerprint(causal)
    assert model_fingerprint(lite) != model_fingerprint(causal)
    before = model_fingerprint(lite)
    with torch.no_grad():
        lite.decoder.conv_out.weight += 1e-3
    assert model_fingerprint(lite) != before and encoder_fingerprint(lite) == encoder_fingerprint(causal)


KILLED = """
import sys, time
from fsae.transcoding import transcode as transcoding
from fsae.model import FSAE

transcoding._CHUNK_PIXELS = 16 * 24 * 4 * 2
model = FSAE.from_pretrained(sys.argv[1]).eval()
inner = model.encode_stream

def stalled(chunks, memory=None):
    for number, latents in enumerate(inner(chunks, memory)):
        if number == 11:
            print("eleven", flush=True)
            time.sleep(600)
        yield latents

model.encode_stream = stalled
transcoding.PART_SECONDS = 0
transcoding.encode_file(model, sys.argv[2], sys.argv[3])
"""


@pytest.mark.usefixtures("small_chunks")
def test_killed_and_continued_equals_uninterrupted(tmp_path: Path, video: Path) -> None:
    """SIGKILL in the middle of a process of its own; this one goes on."""
    model, out = tiny("lite"), tmp_path / "z.safetensors"
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "model"), str(video), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "eleven\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "z.safetensors.partial").glob("part-*"))) == 10 and not out.exists()
    found = encode_file(model, video, out)
    expected = encode_file(model, video, tmp_path / "whole.safetensors")
    assert torch.equal(found.latents, expected.latents) and found.latents.shape[1] == 28
    assert left_in(tmp_path) == ["model", "whole.safetensors", "z.safetensors"]


def test_a_short_clip_and_an_image_have_no_parts(tmp_path: Path, video: Path) -> None:
    model = tiny("lite", first_frame_injection=False)
    saved = encode_file(model, video, tmp_path / "z.safetensors", frames=3)
    assert saved.latents.shape == (8, 1, 4, 6) and saved.first_frame is None
    assert isinstance(load_latents(tmp_path / "z.safetensors"), SavedLatents)
    assert decode_file(model, saved, tmp_path / "out.mp4") == 1
    assert left_in(tmp_path) == ["out.mp4", "z.safetensors"]
