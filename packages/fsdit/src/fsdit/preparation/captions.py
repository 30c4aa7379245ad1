"""`fsdit caption`: what a vision-language model says about videos and images, as a list that trainings read.

Paper §2.3.2 trains on captioned clips; for material without captions this writes them with Qwen2.5-VL. Each
answer is written to OUTPUT.partial as a line as soon as it comes, and the whole becomes OUTPUT in the end. A job that
was stopped goes on with the files that have no answer in either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from fsae.data.config import Sampling
from fsae.data.image import load_image
from fsae.data.media import Entry, Media
from fsae.data.readers import DamagedVideo, ShortVideo, read_clip
from fsae.data.sources import read_source
from fsae.data.video import probe
from fsae.devices import choose_device
from fsae.errors import CheckpointError, UserError
from fsae.storage.files import atomic_path, check_writable
from fsdit.conditioning.folders import loaded
from fsdit.conditioning.pretrained import load_encoder, load_tokenizer
from fsdit.preparation.config import CaptionConfig

Picture = NDArray[np.uint8]
Key = tuple[str, float, float | None]

_SMALLEST = 56 * 56  # pixels of a picture, below which it is enlarged


class Captioner(Protocol):
    """Says what is seen in the frames of a video, uint8 `H W 3` each, or in one image."""

    def __call__(self, frames: Sequence[Picture], /) -> str: ...


@dataclass(frozen=True)
class CaptionReport:
    """The list at `path`: captions that the model wrote now, those kept from before, and files that could not be read,
    or that nothing was said about, with the reason."""

    path: Path
    asked: int
    kept: int
    skipped: dict[str, str]


def write_captions(config: CaptionConfig, captioner: Captioner | None = None) -> CaptionReport:
    """Caption what the source holds and write the list; `captioner` answers in the model's place.

    Raises:
        UserError: a source that cannot be used, a list that cannot be written, or no file that can be read.
    """
    target = check_writable(config.output)
    unfinished = _unfinished(target)
    entries = read_source(config.data)
    for entry in entries:
        if entry.media.member:
            raise UserError(f"{entry.media} lies in a tar, which a list cannot name; unpack it, and give the folder")
    known = _read_answers(target) | _read_answers(unfinished)
    if config.keep:
        known |= {_key(entry, target): entry.caption for entry in entries if entry.caption}
    todo = [entry for entry in entries if _key(entry, target) not in known]
    kept, skipped = len(entries) - len(todo), dict[str, str]()
    if todo and captioner is None:
        load = partial(QwenCaptioner.load, config)
        with loaded(load, choose_device(config.device)) as model:
            known |= _ask(todo, model, config.frames, target, skipped)
    elif captioner is not None:
        known |= _ask(todo, captioner, config.frames, target, skipped)
    rows = {key: known[key] for entry in entries if (key := _key(entry, target)) in known}
    if not rows:
        unfinished.unlink(missing_ok=True)
        path, reason = next(iter(skipped.items()))
        raise UserError(f"no file of {config.data} could be captioned, {path} for one: {reason}; look at the files")
    with atomic_path(target) as temporary:
        temporary.write_text("".join(map(_line, rows.items())), encoding="utf-8")
    unfinished.unlink(missing_ok=True)
    return CaptionReport(target, len(todo) - len(skipped), kept, skipped)


def _ask(
    entries: list[Entry],
    captioner: Captioner | QwenCaptioner,
    count: int,
    target: Path,
    skipped: dict[str, str],
) -> dict[Key, str]:
    """The answers, each written to OUTPUT.partial as it comes; what cannot be read goes to `skipped`."""
    answers: dict[Key, str] = {}
    unfinished = _unfinished(target)
    _end_last_line(unfinished)
    with unfinished.open("a", encoding="utf-8") as file:
        for entry in tqdm(entries, desc="captioning", unit="file"):
            try:
                caption = " ".join(captioner(sample_frames(entry.media, count)).split())
            except UserError as error:
                skipped[str(entry.media)] = str(error)
                continue
            if not caption:
                skipped[str(entry.media)] = "the model said nothing"
                continue
            answers[_key(entry, target)] = caption
            file.write(_line((_key(entry, target), caption)))
            file.flush()
    return answers


def sample_frames(media: Media, count: int) -> list[Picture]:
    """Frames spread evenly over a video or its span, as far as it can be read (UserError if nothing can); an image is
    one."""
    if media.is_image:
        return [load_image(media)]
    info = probe(media.file, count=False)
    end = info.duration if media.end is None else min(media.end, info.duration)
    count = max(1, min(count, int((end - media.start) * info.fps)))
    frames: list[Picture] = []
    trouble: UserError | None = None
    for number in range(count):
        try:
            start = media.start + (end - media.start) * (number + 0.5) / count
            frames.append(read_clip(media, Sampling(1), start)[0][0])
        except (DamagedVideo, ShortVideo) as error:
            trouble = error
    if not frames:
        assert trouble is not None
        raise trouble
    return frames


# --- the list


def _unfinished(target: Path) -> Path:
    """Where answers are kept until all are there."""
    return target.with_name(target.name + ".partial")


def _key(entry: Entry, target: Path) -> Key:
    """What stands in the list: the path from the list's folder, and the span."""
    media = entry.media
    return os.path.relpath(os.path.abspath(media.path), target.parent), media.start, media.end


def _line(row: tuple[Key, str]) -> str:
    (path, start, end), caption = row
    span = {name: value for name, value in (("start", start), ("end", end)) if value}
    return json.dumps({"path": path, "caption": caption, **span}, ensure_ascii=False) + "\n"


def _read_answers(path: Path) -> dict[Key, str]:
    """The captions in a list; a last line that was cut short is left out."""
    answers: dict[Key, str] = {}
    if not path.exists():
        return answers
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            answers[row["path"], float(row.get("start") or 0), row.get("end")] = str(row["caption"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return answers


def _end_last_line(path: Path) -> None:
    """End a line that was cut short, so that the next answer begins a line of its own."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


# --- the model


class QwenCaptioner(nn.Module):
    """Qwen2.5-VL by transformers; the frames of a video are shown as pictures one after another.

    `model` is a `Qwen2_5_VLForConditionalGeneration`; frames of more than `max_pixels` are scaled down.
    """

    model: Any

    def __init__(self, model: nn.Module, tokenizer: Any, prompt: str, max_pixels: int, max_tokens: int) -> None:
        super().__init__()
        from transformers import Qwen2VLImageProcessorPil

        self.model, self.tokenizer = model, tokenizer
        self.prompt, self.max_tokens = prompt, max_tokens
        vision = self.model.config.vision_config
        self.pictures: Callable[..., Any] = Qwen2VLImageProcessorPil(
            size={"shortest_edge": _SMALLEST, "longest_edge": max_pixels},
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
        )

    @classmethod
    def load(cls, config: CaptionConfig) -> QwenCaptioner:
        """The model of a folder; UserError if there is none, CheckpointError if it holds another model, or an
        incomplete one."""
        from transformers import Qwen2_5_VLForConditionalGeneration

        folder = Path(config.model)
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; give one with a Qwen2.5-VL as transformers saves it")
        model = load_encoder(Qwen2_5_VLForConditionalGeneration, folder)
        return cls(model, load_tokenizer(folder), config.prompt, config.max_pixels, config.max_tokens)

    def inputs(self, frames: Sequence[Picture]) -> dict[str, Tensor]:
        """What the model takes: the question in its chat format, with a place for each 2 x 2 patches of each frame."""
        shown = self.pictures(images=list(frames), return_tensors="pt")
        grid = shown["image_grid_thw"]
        places = grid.prod(dim=1) // self.model.config.vision_config.spatial_merge_size**2
        pictures = "".join("<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>" for n in places.tolist())
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{pictures}{self.prompt}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = torch.tensor([self.tokenizer(text, verbose=False)["input_ids"]])
        of_pictures = ids == self.model.config.image_token_id
        if int(of_pictures.sum()) != int(places.sum()):
            raise CheckpointError(
                f"the tokenizer reads {int(of_pictures.sum())} of {int(places.sum())} picture tokens; "
                "give the one that belongs to the model"
            )
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": of_pictures.int(),
            "pixel_values": shown["pixel_values"],
            "image_grid_thw": grid,
        }
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    @torch.inference_mode()
    def forward(self, frames: Sequence[Picture]) -> str:
        """The likeliest answer, word by word."""
        inputs = self.inputs(frames)
        plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_tokens, **plain)
        answer: str = self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer
