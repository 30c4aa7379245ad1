"""Measures a nano model on held-out photographs and held-out wordings, and holds the figures to goals.

    python tools/nano/evaluate.py                                       # the packaged model, every part
    python tools/nano/evaluate.py --model FOLDER --cases 16 --sheets build/nano/sheets --json build/nano/figures.json
    python tools/nano/evaluate.py --autoencoder FOLDER --cases 7        # an autoencoder that is still in training
    python tools/nano/evaluate.py --card                                # and write the table into the model's card

It prints one table and ends with exit code 1 where a goal is missed, 2 where the request cannot be met. The parts:

    autoencoder   moving clips of held-out photographs, encoded and decoded, against decoding a still clip
    generation    a photograph and a prompt become 256x256 pixels: every figure of a finished video
    sizes         half as many cases at each larger size: does the camera still do what the prompt says?
    command       `fsvideo generate` as a user runs it, timed

A case is a held-out photograph and one of the eight motions, each in its turn, asked for in words that training never
saw: half of the cases in English, the others in each other language in turn. The camera is measured in the finished
frames; the control hands the prompts out at random.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent))

from captions import caption
from clips import NanoClips, load_photographs
from figures import (
    along_asked,
    colour_shift,
    differences_by_position,
    moved,
    psnr_db,
    sharpness_ratio,
    stripes,
    true_clip,
    unevenness,
    vertical_nyquist,
)
from goals import LARGER_SIZES, SIZE, Measured, written
from measure_motion import (
    MeasuredMotion,
    agreement,
    estimate_path,
    name_motion,
    refine,
    shuffled_agreement,
)
from motion import MOTIONS, MOVING, usual_motion
from PIL import Image
from sheets import Shown, case_sheet, overview, write_png
from tqdm import tqdm
from wordings import LANGUAGES

from fsae import FSAE
from fsae.data.video import to_frames
from fsae.errors import UserError
from fsae.storage.files import atomic_path
from fsvideo_pipeline.pipeline import FSVideoPipeline
from fsvideo_pipeline.settings import packaged_model

PARTS = ("autoencoder", "generation", "sizes", "command")
CLIP_FRAMES = (17, 33)  # of the autoencoder's clips, in turn
COMPARED = slice(5, 17)  # frames 5 to 16: the first latent's own are too near frame 0 to tell
SEED_PAIRS = 2  # cases that are made a second time, with another seed
PHOTO = Path(__file__).resolve().parents[2] / "docs" / "photo.jpg"
COMMAND_PROMPT = "the camera slowly zooms in"
Reconstruct = Callable[[torch.Tensor], NDArray[np.uint8]]
"""A clip `3 T H W` in [-1, 1] as an autoencoder gives it back, uint8 `T H W 3`."""

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


# --- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A photograph, cropped to the video's size, `H W 3`, and what is asked of it."""

    index: int
    photograph: int
    photo: NDArray[np.uint8]
    asked: str
    language: str
    prompt: str

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.photo.shape[1], self.photo.shape[0]


def cropped(photograph: torch.Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle of a photograph `3 H W` at (width, height), so that the pipeline neither crops nor pads it."""
    rows, columns = photograph.shape[1:]
    scale = min(columns / size[0], rows / size[1])
    width, height = scale * size[0], scale * size[1]
    left, top = (columns - width) / 2, (rows - height) / 2
    picture = Image.fromarray(photograph.permute(1, 2, 0).numpy())
    return np.array(picture.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height)))


def language_of(index: int) -> str:
    """English for half of the motions in one round and for the others in the next; other languages in turn between."""
    english, *others = LANGUAGES
    return english if (index + index // len(MOTIONS)) % 2 == 0 else others[index // 2 % len(others)]


def make_cases(photographs: Sequence[torch.Tensor], count: int, size: tuple[int, int], world: int) -> list[Case]:
    """`count` cases: the motions in turn, photographs from all over the bank; another world has other wordings."""
    cases = []
    for index in range(count):
        rng = np.random.default_rng((7, world, index))
        asked = MOTIONS[index % len(MOTIONS)]
        language = language_of(index)
        prompt = caption(rng, usual_motion(asked, 1 if rng.random() < 0.5 else -1), held_out=True, language=language)
        # Neighbours in the bank are of one package; a stride without a common factor visits them all.
        chosen = (7 * index + 11 * world) % len(photographs)
        cases.append(Case(index, chosen, cropped(photographs[chosen], size), asked, language, prompt))
    return cases


@dataclass(frozen=True)
class Finished:
    """A case and its video `T H W 3`."""

    case: Case
    frames: NDArray[np.uint8]
    seconds: float

    @cached_property
    def path(self) -> torch.Tensor:
        """The camera's path, measured in the frames."""
        return estimate_path(self.frames)

    @property
    def measured(self) -> MeasuredMotion:
        """The motion that the camera made."""
        return name_motion(self.path[-1], (self.case.size[1], self.case.size[0]))

    @property
    def pair(self) -> tuple[str, str]:
        """(asked, measured)."""
        return self.case.asked, self.measured.kind

    @property
    def shown(self) -> Shown:
        """The case on the overview."""
        return Shown(self.case.asked, self.case.prompt, self.case.photo, self.frames[-1].copy())

    def alignment(self, place: int) -> torch.Tensor:
        """Of the frame at a place of the path to the photograph, to a fraction of a pixel."""
        frame = self.frames[round(place / (len(self.path) - 1) * (len(self.frames) - 1))]
        return refine(self.path[place], np.stack([self.case.photo, frame]))

    @cached_property
    def truth(self) -> NDArray[np.uint8]:
        """The photograph moved to where the video ends, at constant speed: `T H W 3`."""
        return true_clip(self.case.photo, self.alignment(len(self.path) - 1), len(self.frames))

    @cached_property
    def figures(self) -> dict[str, float]:
        """Every figure of this one video."""
        photo, frames, asked = self.case.photo, self.frames, self.case.asked
        middle = len(self.path) // 2
        last = self.alignment(len(self.path) - 1)
        return {
            "frame_0_psnr": psnr_db(frames[0], photo),
            "colour_shift": colour_shift(frames[0], photo),
            "sharpness": sharpness_ratio(frames[len(frames) // 2], *moved(photo, self.alignment(middle))),
            "rows": vertical_nyquist(frames) / vertical_nyquist(photo),
            "stripes": stripes(frames) / stripes(self.truth),
            "last_frame_psnr": psnr_db(frames[-1], *moved(photo, last)),
            "last_frame_psnr_asked": psnr_db(frames[-1], *moved(photo, along_asked(last, asked))),
        }

    @cached_property
    def differences(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Frame differences by place in the group, `4`: the video's, and those of the photograph truly moved."""
        return differences_by_position(self.frames), differences_by_position(self.truth)

    def record(self) -> dict[str, Any]:
        """The case in JSON."""
        case = self.case
        named = {"size": written(case.size), "photograph": case.photograph, "asked": case.asked}
        said = {"language": case.language, "prompt": case.prompt}
        return {**named, **said, "measured": vars(self.measured), "seconds": self.seconds}


def generate(pipeline: FSVideoPipeline, case: Case, seed: int) -> Finished:
    """Make the case's video."""
    start = time.perf_counter()
    frames = pipeline(case.photo, case.prompt, size=case.size, generator=seed).frames
    assert frames is not None
    return Finished(case, frames, time.perf_counter() - start)


def generated(pipeline: FSVideoPipeline, cases: Sequence[Case], sheets: Path | None) -> Iterator[Finished]:
    """The cases' videos one after another, each with its sheet."""
    for case in tqdm(cases, desc=written(cases[0].size), unit="video"):
        video = generate(pipeline, case, case.index)
        if sheets is not None:
            name = f"{written(case.size)}-{case.index:03d}-{case.asked.replace(' ', '-')}.png"
            asked = f"photograph {case.photograph}, asked {case.asked}, measured {video.measured.kind}"
            text = f"{asked}, {case.language}: {case.prompt}"
            write_png(case_sheet(case.photo, video.frames, text), sheets / name)
        yield video


# --- parts -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_autoencoder(reconstruct: Reconstruct, photographs: Sequence[torch.Tensor], count: int) -> Measured:
    """Moving clips of held-out photographs encoded and decoded, beside clips in which frame 0 stands still."""
    rows: dict[str, list[float]] = {}
    differences: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    plain = partial(NanoClips, texture_probability=0, sprite_probability=0, photographs=photographs, seed=5)
    worlds = [plain("held-out", frames, SIZE[::-1]) for frames in CLIP_FRAMES]
    for index in tqdm(range(count), desc="autoencoder", unit="clip"):
        clips = worlds[index % len(worlds)]
        video = clips.render(clips.plan(index, kind=MOVING[index % len(MOVING)]))
        truth = to_frames(video).numpy()
        made, still = (reconstruct(clip) for clip in (video, video[:, :1].expand_as(video).contiguous()))
        middle = len(truth) // 2
        psnr = psnr_db(made[COMPARED], truth[COMPARED])
        found = {
            "psnr": psnr,
            "gain": psnr - psnr_db(still[COMPARED], truth[COMPARED]),
            "frame_0": psnr_db(made[0], truth[0]),
            "sharpness": sharpness_ratio(made[middle], truth[middle]),
            "rows": vertical_nyquist(made) / vertical_nyquist(truth),
            "stripes": stripes(made) / stripes(truth),
        }
        for name, value in found.items():
            rows.setdefault(f"autoencoder_{name}", []).append(value)
        differences.append((differences_by_position(made), differences_by_position(truth)))
    medians = ("autoencoder_sharpness", "autoencoder_rows", "autoencoder_stripes")
    figures = {name: float((np.median if name in medians else np.mean)(values)) for name, values in rows.items()}
    return Measured({**figures, "autoencoder_unevenness": relative_unevenness(differences)})


def through(model: FSAE, video: torch.Tensor) -> NDArray[np.uint8]:
    """A clip `3 T H W` encoded and decoded, its first frame given: uint8 `T H W 3`."""
    batch = video.unsqueeze(0)
    return to_frames(model.decode(model.encode(batch), batch[:, :, :1])[0]).numpy()


def relative_unevenness(differences: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> float:
    """Unevenness of videos over that of true clips, of pairs of frame differences."""
    made, truth = (np.stack(values) for values in zip(*differences, strict=True))
    return unevenness(made) / unevenness(truth)


def measure_generation(
    pipeline: FSVideoPipeline, photographs: Sequence[torch.Tensor], count: int, sheets: Path | None
) -> Measured:
    """Every figure of finished videos of 256x256 pixels."""
    videos = list(generated(pipeline, make_cases(photographs, count, SIZE, 0), sheets))
    found = agreement_of(videos)
    for video, record in zip(tqdm(videos, desc="figures", unit="video"), found.cases, strict=True):
        record |= {**video.figures, "differences": video.differences[0].tolist()}
    found.figures |= summary(videos)
    found.figures["seeds_differ"] = float(np.mean([seeds_difference(pipeline, video) for video in videos[:SEED_PAIRS]]))
    found.notes = {
        "cases: held-out photograph x motion x wording": f"{count} on "
        f"{len({video.case.photograph for video in videos})} photographs",
        "agreement by motion": shares([video.case.asked for video in videos], videos),
        "agreement by language": shares([video.case.language for video in videos], videos),
        "median travel by motion, as measured": travels(videos),
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}",
    }
    return found


def summary(videos: Sequence[Finished]) -> dict[str, float]:
    """The figures of the videos together. What is about motion counts the videos that were asked to move."""
    moving = [video for video in videos if video.case.asked != "still"]

    def values(key: str, of: Iterable[Finished]) -> list[float]:
        return [video.figures[key] for video in of]

    quality, rows = values("frame_0_psnr", videos), values("rows", videos)
    return {
        "frame_0_psnr_mean": float(np.mean(quality)),
        "frame_0_psnr_worst": min(quality),
        "colour_shift": float(np.mean(values("colour_shift", videos))),
        "sharpness": float(np.median(values("sharpness", moving))),
        "rows_median": float(np.median(rows)),
        "rows_worst": max(rows),
        "stripes_median": float(np.median(values("stripes", videos))),
        "stripes_worst": max(values("stripes", videos)),
        "unevenness": relative_unevenness([video.differences for video in moving]),
        "last_frame_psnr": float(np.mean(values("last_frame_psnr", moving))),
        "last_frame_psnr_asked": float(np.mean(values("last_frame_psnr_asked", moving))),
        "seconds_median": float(np.median([video.seconds for video in videos])),
    }


def seeds_difference(pipeline: FSVideoPipeline, video: Finished) -> float:
    """Mean absolute difference, in levels, of the last frames of a video and of one from another seed."""
    other = generate(pipeline, video.case, 1000 + video.case.index)
    return float(np.abs(other.frames[-1].astype(np.float32) - video.frames[-1]).mean())


def measure_sizes(
    pipeline: FSVideoPipeline, photographs: Sequence[torch.Tensor], count: int, sheets: Path | None
) -> Measured:
    """The camera against the prompt at the larger sizes, `count` cases each."""
    found = Measured()
    for world, size in enumerate(LARGER_SIZES, start=1):
        cases = make_cases(photographs, count, size, world)
        found.add(agreement_of(generated(pipeline, cases, sheets)))
    return found


def agreement_of(videos: Iterable[Finished]) -> Measured:
    """The camera against the prompt, and the control, of videos of one size; none is held on to."""
    found, pairs, size = Measured(), [], ""
    for video in videos:
        size = written(video.case.size)
        pairs.append(video.pair)
        found.cases.append(video.record())
        found.shown.append(video.shown)
    found.figures = {f"agreement_{size}": agreement(pairs), f"shuffled_{size}": shuffled_agreement(pairs)}
    return found


def shares(names: Sequence[str], videos: Sequence[Finished]) -> str:
    """Agreement of the videos of each name."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for name, video in zip(names, videos, strict=True):
        pairs.setdefault(name, []).append(video.pair)
    return ", ".join(f"{name} {agreement(of_name):.0%}" for name, of_name in pairs.items())


def travels(videos: Sequence[Finished]) -> str:
    """The median travel of each motion, along what was asked, whichever motion the measure named."""
    found: dict[str, list[float]] = {}
    for video in videos:
        motion, asked = video.measured, video.case.asked
        amounts = {"pan left": -motion.pan_x, "pan right": motion.pan_x, "pan up": -motion.pan_y}
        amounts |= {"pan down": motion.pan_y, "zoom in": motion.zoom, "zoom out": 1 / motion.zoom}
        amounts |= {"roll": abs(motion.roll)}
        if asked in amounts:
            found.setdefault(asked, []).append(amounts[asked])
    units = {"zoom in": "{:.2f}x", "zoom out": "{:.2f}x", "roll": "{:.1f} degrees"}
    return ", ".join(f"{kind} {units.get(kind, '{:.1%}').format(np.median(of))}" for kind, of in found.items())


def measure_command(model: Path | None) -> Measured:
    """Seconds of `fsvideo generate` in a process of its own.

    Raises:
        UserError: the command failed, and what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fsvideo_pipeline", "generate", str(PHOTO), COMMAND_PROMPT]
        command += ["-o", str(Path(folder) / "out.mp4"), *(["--model", str(model)] if model else [])]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"fsvideo generate ended with exit code {done.returncode} ({said}); make it run first")
    return Measured({"command_seconds": seconds})


# --- the command -----------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> Measured:
    """The parts that were asked for; what each has found is kept before the next begins."""
    found, folder, count = Measured(), arguments.model or packaged_model(), arguments.cases
    photographs = load_photographs("held-out") if set(arguments.parts) != {"command"} else []

    def keep(part: Measured) -> None:
        found.add(part)
        if arguments.json is not None:
            write_json(found, arguments.json)

    if "autoencoder" in arguments.parts:
        source = arguments.autoencoder or folder / "autoencoder"
        model = FSAE.from_pretrained(source, torch_dtype=torch.float32).eval()
        model.to(memory_format=torch.channels_last_3d)
        keep(measure_autoencoder(partial(through, model), photographs, count))
    if {"generation", "sizes"} & set(arguments.parts):
        pipeline = FSVideoPipeline.from_pretrained(folder)
        if "generation" in arguments.parts:
            keep(measure_generation(pipeline, photographs, count, arguments.sheets))
        if "sizes" in arguments.parts:
            keep(measure_sizes(pipeline, photographs, (count + 1) // 2, arguments.sheets))
    if "command" in arguments.parts:
        keep(measure_command(arguments.model))
    return found


def write_json(found: Measured, path: Path) -> None:
    """Figures, notes and cases."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"figures": found.figures, "notes": found.notes, "cases": found.cases}, indent=1)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def around_the_table(card: Path) -> tuple[str, str]:
    """What stands before and after the table of a card, its marks included.

    Raises:
        UserError: there is no such card, or it has no marks.
    """
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if BEGIN not in text or END not in text:
        raise UserError(f"{card} is no card with the lines {BEGIN} and {END}; write them where the table belongs")
    return text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]


def update_card(card: Path, table: str) -> None:
    """Put the table between the card's two marks."""
    before, after = around_the_table(card)
    with atomic_path(card) as temporary:
        temporary.write_text(f"{before}\n{table}\n{after}", encoding="utf-8")


def card_of(arguments: argparse.Namespace) -> Path:
    """The model's card."""
    return (arguments.model or packaged_model()) / "README.md"


def report(found: Measured, arguments: argparse.Namespace) -> None:
    """Print what was found; write the overview and the card."""
    print(found.table())
    for case in found.cases:
        if case["asked"] != case["measured"]["kind"]:
            measured, words = case["measured"]["kind"], f"{case['prompt']!r} ({case['language']})"
            print(f"{case['size']}, asked {case['asked']}, measured {measured}: {words}")
    if arguments.sheets is not None and found.shown:
        write_png(overview(found.shown), arguments.sheets / "overview.png")
    if arguments.card:
        update_card(card_of(arguments), found.table())


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: options that do not go together.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a pipeline's folder; the packaged nano model if left out")
    parser.add_argument("--autoencoder", type=Path, help="an autoencoder's folder: measure that part alone, of it")
    parser.add_argument("--cases", type=int, default=64, help="cases of each part; 8 are every motion once")
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), help=f"some of {','.join(PARTS)}; all if left out"
    )
    parser.add_argument("--sheets", type=Path, help="a folder for a picture of each video, and overview.png")
    parser.add_argument("--json", type=Path, help="a file for the figures and all cases")
    parser.add_argument("--card", action="store_true", help="write the table into the model's card")
    arguments = parser.parse_args(argv)
    arguments.parts = arguments.parts or list(PARTS if arguments.autoencoder is None else PARTS[:1])
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        raise UserError(f"--parts names {unknown[0]!r}; accepted are {', '.join(PARTS)}")
    if arguments.cases < 1:
        raise UserError(f"--cases is {arguments.cases}; give at least 1, and 8 for every motion once")
    if arguments.autoencoder is not None and arguments.parts != ["autoencoder"]:
        raise UserError("--autoencoder gives one part of a pipeline; measure the others with --model")
    if arguments.card and set(arguments.parts) != set(PARTS):
        raise UserError("--card writes every figure; leave --parts and --autoencoder out")
    if arguments.card:
        around_the_table(card_of(arguments))  # a card without room is told of before an hour's work
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    try:
        arguments = read_arguments(argv)
        found = measure(arguments)
        report(found, arguments)
    except (UserError, FileNotFoundError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    for goal in found.missed:
        print(f"missed: {goal.name}: {goal.text(found.figures[goal.key])}, goal {goal.bound}", file=sys.stderr)
    return 1 if found.missed else 0


if __name__ == "__main__":
    sys.exit(main())
