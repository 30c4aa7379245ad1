"""Captions: a tiny Qwen2.5-VL with random weights; and what is written and resumed, with one that answers by rule."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from fsae.data.media import Media
from fsae.data.sources import read_source
from fsae.data.video import write_video
from fsae.errors import CheckpointError, UserError
from fsdit.cli import main
from fsdit.preparation import captions
from fsdit.preparation.captions import QwenCaptioner, sample_frames, write_captions
from fsdit.preparation.config import PROMPT, CaptionConfig

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    whole = PreTrainedTokenizerFast(tokenizer_object=bytewise, **special)
    whole.add_special_tokens({"additional_special_tokens": [t for t in SPECIAL if t not in special.values()]})
    return whole


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    own = tokenizer()
    ids = {token: own.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(own),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos whose frames get brighter, a picture, and a file that is none."""
    folder = tmp_path_factory.mktemp("media")
    for k in range(3):
        write_video(folder / f"{k}.mp4", [np.full((32, 48, 3), 10 + 10 * i + k, np.uint8) for i in range(16)], 8)
    Image.new("RGB", (48, 32), (200, 200, 200)).save(folder / "picture.png")
    (folder / "broken.mp4").write_bytes(b"nothing")
    return folder


class Rule:
    """Answers with how many frames there are, and the brightness of the first and last."""

    def __init__(self, stop_after: int = 1000) -> None:
        self.asked, self.stop_after = 0, stop_after

    def __call__(self, frames: Sequence[captions.Picture]) -> str:
        if self.asked == self.stop_after:
            raise KeyboardInterrupt
        self.asked += 1
        return f"{len(frames)} frames,\n from {frames[0].mean():.0f} to {frames[-1].mean():.0f}"


def config(media: Path, output: Path, **changes: Any) -> CaptionConfig:
    return CaptionConfig(**{"data": str(media), "output": str(output), "model": "none", "frames": 4, **changes})


# --- the frames


def test_frames_are_spread_over_the_video(media: Path) -> None:
    def means(count: int, **span: Any) -> list[float]:
        return [frame.mean() for frame in sample_frames(Media(media / "0.mp4", **span), count)]

    assert means(4) == pytest.approx([30, 70, 110, 150], abs=3)  # frames 2, 6, 10 and 14 of 16
    assert len(means(100)) == 16  # no more than there are
    assert means(2, start=1.0, end=1.5) == pytest.approx([100, 120], abs=3)  # frames 9 and 11
    (picture,) = sample_frames(Media(media / "picture.png"), 4)
    assert picture.shape == (32, 48, 3) and picture.mean() == 200
    with pytest.raises(UserError):
        sample_frames(Media(media / "broken.mp4"), 4)


def test_a_damaged_video_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "v.mp4", list(noise), 8)
    content = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "v.mp4").write_bytes(content[: len(content) * 3 // 4])
    assert 0 < len(sample_frames(Media(tmp_path / "v.mp4"), 6)) < 6


# --- the list


def test_writes_a_list_that_trainings_read(media: Path, tmp_path: Path) -> None:
    report = write_captions(config(media, tmp_path / "list.jsonl"), Rule())
    assert (report.asked, report.kept) == (4, 0)
    assert [Path(path).name for path in report.skipped] == ["broken.mp4"]
    entries = read_source(tmp_path / "list.jsonl")
    assert [entry.media.name for entry in entries] == ["0.mp4", "1.mp4", "2.mp4", "picture.png"]
    assert all(entry.media.path.is_file() for entry in entries)
    assert entries[0].caption == "4 frames, from 30 to 150" and entries[3].caption == "1 frames, from 200 to 200"
    assert not (tmp_path / "list.jsonl.partial").exists()
    assert not Path(json.loads((tmp_path / "list.jsonl").read_text().splitlines()[0])["path"]).is_absolute()


def test_resumes_and_asks_nothing_twice(media: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    write_captions(config(media, whole), Rule())
    output = tmp_path / "list.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_captions(config(media, output), Rule(stop_after=2))
    assert not output.exists()
    partial = tmp_path / "list.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-9])  # killed while it wrote
    rest = Rule()
    report = write_captions(config(media, output), rest)
    assert (report.asked, report.kept, rest.asked) == (3, 1, 3)
    assert output.read_bytes() == whole.read_bytes()

    write_video(media / "3.mp4", [np.zeros((32, 48, 3), np.uint8)] * 8, 8)
    try:
        more = Rule()
        assert write_captions(config(media, output), more).kept == 4 and more.asked == 1
    finally:
        (media / "3.mp4").unlink()


def test_captions_and_spans_of_a_list_are_kept(media: Path, tmp_path: Path) -> None:
    rows = [{"path": "0.mp4", "caption": "mine"}, {"path": "1.mp4", "start": 1.0, "end": 1.5}, {"path": "1.mp4"}]
    (media / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = str(media / "given.jsonl")
    rule = Rule()
    write_captions(config(media, tmp_path / "kept.jsonl", data=given), rule)
    entries = read_source(tmp_path / "kept.jsonl")
    assert rule.asked == 2 and entries[0].caption == "mine"
    assert (entries[1].media.start, entries[1].media.end) == (1.0, 1.5)
    assert entries[1].caption != entries[2].caption
    write_captions(config(media, tmp_path / "new.jsonl", data=given, keep=False), rule)
    assert rule.asked == 5 and read_source(tmp_path / "new.jsonl")[0].caption != "mine"


def test_what_cannot_be_captioned_is_said(media: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file of .* could be captioned, .*broken.mp4 for one: the video .*; look"):
        write_captions(config(media, tmp_path / "l.jsonl", data=str(media / "broken.mp4")), Rule())
    assert list(tmp_path.iterdir()) == []
    report = write_captions(config(media, tmp_path / "l.jsonl"), lambda frames: "" if len(frames) == 1 else "something")
    assert report.skipped[str(media / "picture.png")] == "the model said nothing"
    for bad, message in (
        ({"output": "captions.txt"}, "ends in .jsonl"),
        ({"frames": 0}, "frames is 0"),
        ({"max_pixels": 100}, "max_pixels is 100"),
        ({"prompt": " "}, "prompt is"),
    ):
        with pytest.raises(UserError, match=message):
            CaptionConfig(**{"data": "d", "output": "l.jsonl", "model": "m", **bad})
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(media / "0.mp4", "0.mp4")
    with pytest.raises(UserError, match="lies in a tar"):
        write_captions(config(media, tmp_path / "l.jsonl", data=str(tmp_path / "a.tar")), Rule())


# --- the model


def test_inputs_are_those_of_the_processor(qwen: Path) -> None:
    """Against transformers' own image processor, its own scatter of features, and a prompt put together by hand."""
    asked = CaptionConfig("d", "l.jsonl", str(qwen), prompt="What?", max_pixels=56 * 112, max_tokens=3)
    captioner = QwenCaptioner.load(asked).eval()
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, size, dtype=np.uint8) for size in ((60, 60, 3), (200, 300, 3))]
    inputs = captioner.inputs(frames)
    reference = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 112})
    want = reference(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], want["pixel_values"])
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 6]]  # of 14 pixels, within 56 x 112
    text = captioner.tokenizer.decode(inputs["input_ids"][0])
    pads = [f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (4, 6)]
    assert text.endswith(f"<|im_start|>user\n{''.join(pads)}What?<|im_end|>\n<|im_start|>assistant\n")
    assert int(inputs["mm_token_type_ids"].sum()) == 10


def test_answers_are_the_likeliest_tokens(qwen: Path) -> None:
    captioner = QwenCaptioner.load(CaptionConfig("d", "l.jsonl", str(qwen), max_tokens=5)).eval()
    frames = [np.random.default_rng(k).integers(0, 255, (64, 64, 3), dtype=np.uint8) for k in range(2)]
    answer = captioner(frames)
    inputs = captioner.inputs(frames)
    with torch.no_grad():  # without a cache of keys and values, the whole sequence each time
        for _ in range(5):
            token = captioner.model(**inputs, use_cache=False).logits[:, -1:].argmax(-1)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
            for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
                inputs[name] = torch.cat([inputs[name], torch.full_like(inputs[name][:, :1], value)], 1)
            if token.item() == captioner.tokenizer.eos_token_id:
                break
    start = captioner.inputs(frames)["input_ids"].shape[1]
    assert answer == captioner.tokenizer.decode(inputs["input_ids"][0, start:], skip_special_tokens=True)


def test_from_videos_to_a_list_by_the_command(
    qwen: Path, media: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str, int, str]] = []
    forward = QwenCaptioner.forward

    def spy(self: QwenCaptioner, frames: Sequence[captions.Picture]) -> str:
        asked.append((len(frames), self.prompt, self.max_tokens, str(self.model.device)))
        return "a " + forward(self, frames)

    monkeypatch.setattr(QwenCaptioner, "forward", spy)
    output = tmp_path / "list.jsonl"
    flags = ["--frames=2", "--max_tokens=3", "--max_pixels=6272", "--device=cpu"]
    argv = ["caption", f"--data={media}", f"--output={output}", f"--model={qwen}", *flags]
    assert main(argv) == 0
    told = capsys.readouterr()
    assert f"saved {output}: 4 captions written, 0 there before" in told.out
    assert "1 file(s) skipped" in told.err and "broken.mp4" in told.err
    assert asked == [(2, PROMPT, 3, "cpu")] * 3 + [(1, PROMPT, 3, "cpu")]
    assert len(read_source(output)) == 4
    assert main(["caption", f"--data={media}", f"--output={output}", "--model=absent"]) == 2
    assert "there is no folder absent" in capsys.readouterr().err


def test_another_model_is_refused(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        QwenCaptioner.load(CaptionConfig("d", "l.jsonl", str(tmp_path / "absent")))
    with pytest.raises(CheckpointError, match="there is no .*config.json"):
        QwenCaptioner.load(CaptionConfig("d", "l.jsonl", str(tmp_path)))
    captioner = QwenCaptioner.load(CaptionConfig("d", "l.jsonl", str(qwen)))
    captioner.model.config.image_token_id += 1
    with pytest.raises(CheckpointError, match="the tokenizer reads 0 of 4 picture tokens"):
        captioner.inputs([np.zeros((56, 56, 3), np.uint8)])
