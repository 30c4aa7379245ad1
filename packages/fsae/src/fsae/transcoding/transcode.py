"""Files of any length to latents and back, in the memory of a few frames; a stopped job goes on where it ended.

What is done lies in parts beside the result (`fsae.storage.parts`). A stream of convolutions can be taken up in the
middle without its state, because each convolution looks back at a few frames only. The stream is restarted at least
`stream_reach` latents before the first new one, and what it gives before that is thrown away. The rest is exactly what
the uninterrupted stream gives, and the state, gigabytes at full size, need not be kept.

The Standard decoder looks at the whole clip at once; it has no stream, and its decoding starts anew.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from fsae.data.image import cover, load_image
from fsae.data.media import as_media
from fsae.data.readers import DamagedVideo
from fsae.data.video import probe, stream_video, to_frames, to_video_tensor, write_video
from fsae.decoder import Decoder
from fsae.errors import UserError
from fsae.layers.blocks import EViTBlock, ResBlock
from fsae.layers.conv import VideoConv3d
from fsae.layers.resample import Upsample
from fsae.model import FSAE
from fsae.storage.checkpoint import save_state
from fsae.storage.fingerprint import file_fingerprint, tensor_fingerprint
from fsae.storage.parts import Unfinished
from fsae.transcoding.fingerprints import encoder_fingerprint, model_fingerprint
from fsae.transcoding.latents import SavedLatents, save_latents
from fsae.transcoding.segments import join_videos

PART_SECONDS = 20.0  # of encoding that are lost at most
SEGMENT = 64  # latents whose frames make one segment of a decoded video: 256, as far apart as H.264's key frames

_WHOLE = 0.9  # of the frames that a video states: with fewer, it is cut short
_CHUNK_PIXELS = 2**22  # of the frames that are encoded at once

Picture = NDArray[np.uint8]


def stream_reach(stack: nn.Module) -> int:
    """How many latents back a causal or group-causal stack looks: an upper bound.

    Every convolution over time looks back at two frames, a group-causal one at one. The bound counts each of these
    frames as a whole latent, which no frame of any stage is longer than.
    """
    convolutions = (layer for layer in stack.modules() if isinstance(layer, VideoConv3d) and layer.kernel_size[0] == 3)
    return sum(1 if layer.time == "group_causal" else 2 for layer in convolutions)


def encode_file(
    model: FSAE,
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    frames: int | None = None,
    memory: int | None = None,
) -> SavedLatents:
    """Encode a video of any length or an image and write its latents, .safetensors.

    Frames are scaled and cropped to multiples of the model's spatial compression, and the clip is cut to whole latents.
    The parts in OUTPUT.partial hold the latents so far; they are used if file, encoder and size are the same.

    Args:
        model: the autoencoder, on its device.
        path: the video or image.
        output: the latents' file.
        frames: how many of the video's first frames; None for all.
        memory: bytes that the activations may take; None for no bound.

    Raises:
        UserError: the file cannot be read, or only in part, or parts of another job are in the way.
    """
    with torch.no_grad():
        if as_media(path).is_image:
            image = load_image(path)
            first = cover(image, _snapped(path, image.shape[:2], model.compression.space))
            latents = model.encode(_tensor([first], model), memory)[0].float().cpu()
            fps = 1.0
        else:
            job = _Encoding(model, path, output, frames, memory)
            latents, first, fps = job.run(), job.first, job.fps
    kept = torch.from_numpy(first.copy()) if model.config.first_frame_injection else None
    saved = SavedLatents(latents, fps, kept, encoder_fingerprint(model))
    save_latents(output, saved.latents, saved.fps, saved.first_frame, saved.encoder)
    if not as_media(path).is_image:
        job.unfinished.remove()
    return saved


class _Encoding:
    """One video on its way to latents."""

    def __init__(
        self,
        model: FSAE,
        path: str | os.PathLike[str],
        output: str | os.PathLike[str],
        frames: int | None,
        memory: int | None,
    ) -> None:
        info = probe(path, count=False)
        self.model, self.path, self.frames, self.memory, self.fps = model, path, frames, memory, info.fps
        self.info = info
        self.expected = min(info.frames, frames or info.frames)
        self.size = _snapped(path, (info.height, info.width), model.compression.space)
        self.first = next(stream_video(path, self.size, frames=1))
        # Latents a chunk: fixed by the size alone, so that a restarted stream computes the very same sums.
        pixels = self.size[0] * self.size[1] * model.compression.time
        self.chunk = min(max(_CHUNK_PIXELS // pixels, 1), 8)
        self.unfinished = Unfinished(
            output,
            {
                "video": file_fingerprint(path),
                "encoder": encoder_fingerprint(model),
                "size": "x".join(map(str, self.size)),
                "chunk": str(self.chunk),
            },
        )

    def run(self) -> Tensor:
        """All latents, `c t h w`: those of the parts, and those that are still to be made."""
        done = [load_file(part)["latents"] for part in self.unfinished.parts(".safetensors")]
        count = sum(part.shape[1] for part in done)
        wanted = None if self.frames is None else self.model.compression.latents(self.frames)
        if wanted is not None and count >= wanted:
            return torch.cat(done, 1)[:, :wanted]
        pending: list[Tensor] = []
        written = time.monotonic()
        try:
            for latents in self._latents_from(count):
                # Written when the next ones are there: the clip's last chunk may be a short one, and is no part.
                if pending and time.monotonic() - written >= PART_SECONDS:
                    done.append(self._write(pending))
                    pending, written = [], time.monotonic()
                pending.append(latents)
        except (UserError, KeyboardInterrupt) as error:
            if pending:
                done.append(self._write(pending))
            if isinstance(error, UserError):
                raise self._ended_early(error, sum(part.shape[1] for part in done)) from error
            raise
        return torch.cat([*done, *pending], 1)

    def _write(self, pending: list[Tensor]) -> Tensor:
        part = torch.cat(pending, 1)
        save_state({"latents": part}, self.unfinished.next_part(".safetensors"))
        return part

    def _latents_from(self, count: int) -> Iterator[Tensor]:
        """The latents after the first `count`, a chunk at a time, each `c t h w`."""
        rate = self.model.compression.time
        # After the first frame, chunks begin at multiples of their length; so do those of a restarted stream.
        restart = max(count - 1 - stream_reach(self.model.encoder), 0) // self.chunk * self.chunk
        passed = count - restart
        left = None if self.frames is None else self.frames - restart * rate
        frames = stream_video(self.path, self.size, restart * rate, left)
        bar = tqdm(frames, "encoding", total=self.expected, initial=restart * rate, unit="frame", delay=2)
        groups = _groups(self._whole(iter(bar), restart * rate), rate, self.chunk * rate)
        for latents in self.model.encode_stream((_tensor(group, self.model) for group in groups), self.memory):
            new = latents[0, :, passed:]
            passed = max(passed - latents.shape[2], 0)
            if new.shape[1]:
                yield new.float().cpu()

    def _whole(self, frames: Iterator[Picture], before: int) -> Iterator[Picture]:
        """The frames; it is an error if, with the `before` that were left out, the video has far fewer than it states.

        A decoder's frames may be some fewer than a container's: it counts those, too, that an edit list hides.
        """
        count = before
        for frame in frames:
            yield frame
            count += 1
        if self.frames is not None and count >= self.frames:
            return
        if count < _WHOLE * self.info.frames:
            short = f"{self.path} ends after {count} of"
            if self.info.counted:
                raise DamagedVideo(f"{short} the {self.info.frames} frames that it states: it is cut short")
            warnings.warn(f"{short} about {self.info.frames} frames, by its duration: is it whole?", stacklevel=2)
        elif self.frames is not None:
            warnings.warn(f"{self.path} has {count} frames, not the {self.frames} asked for", stacklevel=2)

    def _ended_early(self, error: UserError, latents: int) -> UserError:
        if not latents:
            return error
        frames = self.model.compression.frames(latents)
        return UserError(
            f"{error}; the latents of the first {frames} frames are kept in {self.unfinished.folder}: "
            f"'--frames {frames}' makes a file of them"
        )


def decode_file(
    model: FSAE,
    saved: SavedLatents,
    output: str | os.PathLike[str],
    first_frame: Tensor | None = None,
    memory: int | None = None,
) -> int:
    """Decode latents and write the video, .mp4, .m4v, .mov or .mkv; returns how many frames it has.

    A causal or Lite decoder works through the clip in order; its frames are written as segments of H.264 in
    OUTPUT.partial, which together take the room of the result, and are joined at the end.

    Args:
        model: the autoencoder, on its device.
        saved: the latents and their frames per second.
        output: the video's file.
        first_frame: `1 3 1 H W` in [-1, 1], which decoders with injection draw detail from.
        memory: bytes that decoding may take; None for no bound.

    Raises:
        UserError: the video cannot be written, the memory does not suffice, or parts of another job are in the way.
    """
    compression, count = model.compression, saved.latents.shape[1]
    total = compression.frames(count)

    def frames(start: int) -> Iterator[Picture]:
        """The frames of the stream that begins with latent `start`, which itself gives one frame."""
        latents = saved.latents[:, start:].unsqueeze(0).to(model.device, model.dtype)
        with _layers_shown(model.decoder):
            pieces = model.decode_stream(latents, first_frame, memory=memory)
        for piece in pieces:
            yield from to_frames(piece[0]).numpy()

    with torch.no_grad():
        if model.config.decoder_kind == "standard" or count <= SEGMENT:
            Unfinished(output, {})  # refuses where the beginning of another clip is kept
            write_video(output, tqdm(frames(0), "decoding", total=total, unit="frame", delay=2), saved.fps)
            return total
        unfinished = Unfinished(output, _decoding_settings(model, saved, first_frame))
        done = len(unfinished.parts(".mp4"))
        start = done * SEGMENT
        restart = max(start - stream_reach(model.decoder), 0) // SEGMENT * SEGMENT
        before = compression.frames(start - restart) if start else 0
        pictures = tqdm(
            islice(frames(restart), before, None),
            "decoding",
            total=total,
            initial=compression.frames(start) if start else 0,
            unit="frame",
            delay=2,
        )
        line = iter(pictures)
        for number in range(done, -(-count // SEGMENT)):
            length = SEGMENT * compression.time if number else compression.frames(SEGMENT)
            write_video(unfinished.next_part(".mp4"), islice(line, length), saved.fps)
        join_videos(unfinished.parts(".mp4"), output)
        unfinished.remove()
    return total


@contextmanager
def _layers_shown(decoder: Decoder) -> Iterator[None]:
    """Progress by layers, each tile's anew, where a whole clip is decoded before its first frame is there."""
    layers = [layer for layer in decoder.modules() if isinstance(layer, Upsample | ResBlock | EViTBlock)]
    with tqdm(desc="decoding, layers", unit="layer", delay=2) as bar:

        def show(*_: object) -> None:
            bar.update()

        hooks = [layer.register_forward_hook(show) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _decoding_settings(model: FSAE, saved: SavedLatents, first_frame: Tensor | None) -> dict[str, str]:
    return {
        "latents": tensor_fingerprint(saved.latents),
        "frame rate": repr(saved.fps),
        "model": model_fingerprint(model),
        "first frame": "none" if first_frame is None else tensor_fingerprint(first_frame),
        "segment": str(SEGMENT),
    }


def _groups(frames: Iterator[Picture], rate: int, length: int) -> Iterator[list[Picture]]:
    """The first frame alone, then `length` frames at a time; of the last ones whole groups of `rate`."""
    yield from ([frame] for frame in islice(frames, 1))
    while group := list(islice(frames, length)):
        group = group[: len(group) // rate * rate]
        if group:
            yield group


def _tensor(pictures: list[Picture], model: FSAE) -> Tensor:
    """Frames `H W 3` -> `1 3 T H W` where the model is."""
    video = to_video_tensor(torch.from_numpy(np.stack(pictures))).unsqueeze(0)
    return video.to(model.device, model.dtype)


def _snapped(path: str | os.PathLike[str], size: tuple[int, ...], space: int) -> tuple[int, int]:
    height, width = size
    if min(height, width) < space:
        raise UserError(f"{path} has {width}x{height} pixels; at least {space}x{space} are needed, scale it up first")
    return height // space * space, width // space * space
