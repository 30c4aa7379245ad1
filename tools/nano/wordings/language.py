"""How a language's wordings are written down.

A wording is a sentence with slots, "the camera {adv} pans to the {side}". A slot holds words for each fact that a
motion may have: its kind, its speed, the side of a pan, the corner of a diagonal one, the turn of a roll; the words may
have slots of their own. `ANY` words fit every motion. In a wording for two motions at once, {act1} and {act2} are what
the slot `act` holds for the first and for the second.

A wording fits a motion if each of its slots has words for it. So {far}, which only holds words for "large", makes a
wording that is for large travels alone, and what has a slot for speeds always says that a motion is slow or fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ANY = "any"

Slot = Mapping[str, tuple[str, ...]]
"""Words by fact: ANY; "sideways", "vertical", "diagonal" or a motion's kind; "small", "usual", "large"; "left",
"right", "up", "down"; "left up", "right up", "left down", "right down"; "clockwise", "counterclockwise"; a sprite's
colour."""


@dataclass(frozen=True)
class Language:
    """The wordings of one language.

    Args:
        name: in English.
        slots: see above.
        wordings: by "sideways" and "vertical" (pans; "pan up" and "pan down" hold more), "zoom in", "zoom out", "roll",
            "still", "still camera" (where other things may move), "diagonal" and "pair" (two motions at once), and
            `ANY` for sentences put together from parts, whatever moves.
        held_out: the same, for evaluation alone.
        sprites: by shape, what is said of a thing that moves on its own.
        openings: what may come before a sentence.
        space: what stands between an opening and the sentence.
        comma, full_stop: its marks.
        accents_dropped: whether people often leave its accents out.
        swaps: whether two letters of a word may be swapped, as fast typing does.
    """

    name: str
    slots: Mapping[str, Slot]
    wordings: Mapping[str, tuple[str, ...]]
    held_out: Mapping[str, tuple[str, ...]]
    sprites: Mapping[str, str]
    openings: tuple[str, ...]
    space: str = " "
    comma: str = ", "
    full_stop: str = "."
    accents_dropped: bool = False
    swaps: bool = True
