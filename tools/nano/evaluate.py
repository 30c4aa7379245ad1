"""Measures a nano model on held-out photographs and held-out wordings, and writes the figures into its model card.

    python tools/nano/evaluate.py                       # the packaged model; prints, and updates its card
    python tools/nano/evaluate.py --model FOLDER --cases 32 --frames-to build/nano/frames

A case is a held-out photograph and one of the eight motions, asked for in words that training never saw. Measured are
frame 0 of the video against the photograph that went in (PSNR), and the camera's motion against the prompt; as a
control, the same motions against prompts handed out at random.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent))

from captions import caption
from clips import load_photographs
from measure_motion import agreement, measure_motion, shuffled_agreement
from motion import MOTIONS
from PIL import Image
from tqdm import tqdm

from fsae.data.video import to_video_tensor
from fsae.files import atomic_path
from fsae.metrics import psnr
from fsvideo_pipeline.pipeline import FSVideoPipeline
from fsvideo_pipeline.settings import packaged_model

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True)
class Case:
    """What came of one photograph and one prompt."""

    photograph: int
    prompt: str
    asked: str
    measured: str
    psnr: float
    seconds: float


def square(photograph: torch.Tensor, side: int) -> NDArray[np.uint8]:
    """The middle of a photograph `3 H W` as `side side 3`, so that nothing is padded or cropped later."""
    rows, columns = photograph.shape[1:]
    short = min(rows, columns)
    top, left = (rows - short) // 2, (columns - short) // 2
    middle = photograph[:, top : top + short, left : left + short].permute(1, 2, 0).numpy()
    return np.asarray(Image.fromarray(middle).resize((side, side), Image.Resampling.LANCZOS))


def contact_sheet(frames: NDArray[np.uint8], path: Path) -> None:
    """First, middle and last frames side by side."""
    shown = [frames[0], frames[len(frames) // 3], frames[2 * len(frames) // 3], frames[-1]]
    with atomic_path(path) as temporary:
        Image.fromarray(np.concatenate(shown, axis=1)).save(temporary)


def run_case(
    pipeline: FSVideoPipeline, photographs: list[torch.Tensor], index: int, side: int, keep: Path | None
) -> Case:
    """Case `index`: motions in turn, and the next photograph for each."""
    asked = MOTIONS[index % len(MOTIONS)]
    rng = np.random.default_rng((7, index))
    prompt = caption(rng, asked, 1 if rng.random() < 0.5 else -1, held_out=True)
    photograph = index % len(photographs)
    given = square(photographs[photograph], side)
    start = time.perf_counter()
    frames = pipeline(given, prompt, size=(side, side), generator=index).frames
    seconds = time.perf_counter() - start
    assert frames is not None
    quality = psnr(*(to_video_tensor(torch.from_numpy(f[None])).unsqueeze(0) for f in (frames[0], given)))
    if keep is not None:
        contact_sheet(frames, keep / f"{index:03d}-{asked.replace(' ', '-')}.png")
    return Case(photograph, prompt, asked, measure_motion(frames).kind, float(quality), seconds)


def summary(cases: list[Case]) -> dict[str, Any]:
    """The figures of the card."""
    pairs = [(case.asked, case.measured) for case in cases]
    quality = [case.psnr for case in cases]
    return {
        "cases": len(cases),
        "photographs": len({case.photograph for case in cases}),
        "frame_0_psnr_mean": sum(quality) / len(quality),
        "frame_0_psnr_worst": min(quality),
        "motion_agreement": agreement(pairs),
        "motion_agreement_shuffled": shuffled_agreement(pairs),
        "agreement_by_motion": {
            kind: agreement([p for p in pairs if p[0] == kind]) for kind in MOTIONS if any(p[0] == kind for p in pairs)
        },
        "seconds_median": float(np.median([case.seconds for case in cases])),
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}",
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as the card shows them."""
    by_motion = ", ".join(f"{kind} {share:.0%}" for kind, share in figures["agreement_by_motion"].items())
    rows = [
        (
            "cases: held-out photograph x motion x wording",
            f"{figures['cases']} on {figures['photographs']} photographs",
        ),
        ("frame 0 against the photograph, PSNR, mean", f"{figures['frame_0_psnr_mean']:.2f} dB"),
        ("the same, worst case", f"{figures['frame_0_psnr_worst']:.2f} dB"),
        ("measured camera motion agrees with the prompt", f"{figures['motion_agreement']:.1%}"),
        ("the same with prompts shuffled (control)", f"{figures['motion_agreement_shuffled']:.1%}"),
        ("agreement by motion", by_motion),
        ("seconds a video, median", f"{figures['seconds_median']:.1f} ({figures['machine']})"),
    ]
    return "\n".join(["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def update_card(card: Path, figures: dict[str, Any]) -> None:
    """Put the table between the card's two marks."""
    text = card.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    with atomic_path(card) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{table(figures)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a pipeline's folder; the packaged nano model if left out")
    parser.add_argument("--cases", type=int, default=64, help="how many photograph x motion cases")
    parser.add_argument("--side", type=int, default=256, help="pixels of the square videos")
    parser.add_argument("--frames-to", type=Path, help="a folder for a picture of each video's frames")
    parser.add_argument("--json", type=Path, help="a file for the figures and all cases")
    arguments = parser.parse_args()
    folder = arguments.model or packaged_model()
    pipeline = FSVideoPipeline.from_pretrained(folder)
    photographs = load_photographs("held-out")
    if arguments.frames_to is not None:
        arguments.frames_to.mkdir(parents=True, exist_ok=True)
    cases = [
        run_case(pipeline, photographs, index, arguments.side, arguments.frames_to)
        for index in tqdm(range(arguments.cases), unit="video")
    ]
    figures = summary(cases)
    print(table(figures))
    for case in cases:
        if case.asked != case.measured:
            print(f"asked {case.asked}, measured {case.measured}: {case.prompt!r}")
    if arguments.json is not None:
        with atomic_path(arguments.json) as temporary:
            temporary.write_text(json.dumps({**figures, "all": [vars(case) for case in cases]}, indent=1))
    card = Path(folder) / "README.md"
    if card.is_file() and BEGIN in card.read_text(encoding="utf-8"):
        update_card(card, figures)
        print(f"updated {card}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
