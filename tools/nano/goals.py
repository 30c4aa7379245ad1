"""The figures of a nano model: what each is called, the goal it is held to, and the table that says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sheets import Shown

SIZE = (256, 256)  # (width, height), as fsvideo's --size has it
LARGER_SIZES = ((640, 384), (512, 512))


@dataclass(frozen=True)
class Goal:
    """A figure of the table: its key in JSON, its name, its unit, and the bound it is held to, if any.

    The unit "%" belongs to a share; a ratio has none.
    """

    key: str
    name: str
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    def held(self, value: float) -> bool:
        """Whether the value is within the bounds; what is not a number never is."""
        above = self.at_least is None or value >= self.at_least
        below = self.at_most is None or value <= self.at_most
        return above and below

    @property
    def bound(self) -> str:
        """The goal in the table; empty for a figure that is only reported."""
        if self.at_least is not None:
            return f"at least {self.text(self.at_least)}"
        return f"at most {self.text(self.at_most)}" if self.at_most is not None else ""

    def text(self, value: float) -> str:
        """A value with its unit."""
        if self.unit == "%":
            return f"{value:.1%}"
        digits = 3 if abs(value) < 0.1 else 2
        return f"{value:.{digits}f} {self.unit}".strip()


def written(size: tuple[int, int]) -> str:
    """The size as fsvideo's --size has it."""
    return f"{size[0]}x{size[1]}"


GOALS = (
    Goal("autoencoder_gain", "autoencoder: moving clips, frames 5-16, PSNR over a still clip's", "dB", at_least=4),
    Goal("autoencoder_psnr", "autoencoder: moving clips, frames 5-16, PSNR", "dB"),
    Goal("autoencoder_frame_0", "autoencoder: frame 0 against the clip's, PSNR", "dB"),
    Goal("autoencoder_sharpness", "autoencoder: sharpness of the middle frame over the clip's, median"),
    Goal("autoencoder_rows", "autoencoder: energy of alternating rows over the clip's, median"),
    Goal("autoencoder_stripes", "autoencoder: energy of alternating rows over columns, over the clip's, median"),
    Goal("autoencoder_unevenness", "autoencoder: unevenness within a group of four frames over the clip's"),
    Goal("frame_0_psnr_mean", "frame 0 against the photograph, PSNR, mean", "dB", at_least=29),
    Goal("frame_0_psnr_worst", "the same, worst case", "dB", at_least=24),
    Goal("colour_shift", "colour shift of frame 0, cells of 8x8 pixels, CIEDE2000, mean", "dE", at_most=2),
    Goal("sharpness", "sharpness of the middle frame over the truly moved photograph's, median", at_least=0.4),
    Goal("rows_median", "energy of alternating rows over the photograph's, median", at_most=2),
    Goal("rows_worst", "the same, worst case"),
    Goal("stripes_median", "energy of alternating rows over columns, over a true clip's, median", at_most=2),
    Goal("stripes_worst", "the same, worst case"),
    Goal("unevenness", "largest over smallest frame difference in a group of four, over a true clip's", at_most=2),
    Goal("last_frame_psnr", "last frame against the truly moved photograph, where it covers, PSNR", "dB", at_least=21),
    Goal("last_frame_psnr_asked", "the same, moved by the asked motion alone", "dB"),
    *(
        goal
        for size in map(written, (SIZE, *LARGER_SIZES))
        for goal in (
            Goal(f"agreement_{size}", f"the camera's motion agrees with the prompt, {size}", "%", at_least=0.92),
            Goal(f"shuffled_{size}", "the same with prompts shuffled (control)", "%", at_most=0.2),
        )
    ),
    Goal("seeds_differ", "last frames of two seeds, mean absolute difference of levels of 255"),
    Goal("seconds_median", "seconds a video of 256x256, the model loaded, median", "s"),
    Goal("command_seconds", "`fsvideo generate`, default size, the whole command", "s", at_most=12),
)


@dataclass
class Measured:
    """What parts have found: figures by the goals' keys, notes in words, and a record of each case."""

    figures: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    def add(self, other: Measured) -> None:
        """Take over what another part has found."""
        self.figures |= other.figures
        self.notes |= other.notes
        self.cases += other.cases
        self.shown += other.shown

    @property
    def missed(self) -> list[Goal]:
        """The goals of measured figures that fall short."""
        return [goal for goal in GOALS if goal.key in self.figures and not goal.held(self.figures[goal.key])]

    def table(self) -> str:
        """The figures that were measured, as Markdown."""
        rows = ["| figure | measured | goal | |", "|---|---|---|---|"]
        for goal in GOALS:
            if goal.key in self.figures:
                value = self.figures[goal.key]
                verdict = ("held" if goal.held(value) else "**missed**") if goal.bound else ""
                rows.append(f"| {goal.name} | {goal.text(value)} | {goal.bound} | {verdict} |")
        return "\n".join([*rows, *(f"| {name} | {text} | | |" for name, text in self.notes.items())])
