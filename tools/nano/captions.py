"""What a nano clip's caption says: many wordings of each motion, and other wordings kept for evaluation.

    caption(rng, motion)                        # "a slow pan to the left"
    caption(rng, motion, language="de")         # "die Kamera schwenkt langsam nach links"
    caption(rng, "zoom in + roll")              # a kind by name: its usual speed

The wordings themselves are in `wordings`, one file a language. A slow or fast motion is always called so; no word of
speed means the usual one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from motion import COMBINATIONS, MOTIONS, PANS, SPEEDS, TRAVELS, Combined, Motion, usual_motion
from wordings import ANY, LANGUAGES, Language

LONGEST = 119
"""Bytes of UTF-8 in a caption: with its end mark it stays within the 128 tokens of the nano text encoder."""

LANGUAGE_SHARES = {"en": 0.75, "de": 0.05, "fr": 0.05, "es": 0.05, "zh": 0.05, "ja": 0.05}

Facts = frozenset[str]
Said = tuple[Facts, ...]
"""What is true of a motion as a whole, and then of each of its two parts if it has two."""

_SLOT = re.compile(r"\{([a-z_]+)([12]?)\}")


def said_of(motion: Motion | Combined) -> Said:
    """The facts that choose the words for a motion, as `wordings.language` lists them."""
    parts = tuple(_facts(part) for part in motion.parts)
    if len(parts) == 1:
        return parts
    whole = {ANY, "pair", motion.speed}
    if all(part.kind in PANS for part in motion.parts):
        whole |= {"diagonal", " ".join(part.kind.split()[1] for part in motion.parts)}
    return (frozenset(whole), *parts)


def _facts(motion: Motion) -> Facts:
    facts = {ANY, motion.kind, motion.speed}
    if motion.kind in PANS:
        side = motion.kind.split()[1]
        facts |= {side, "sideways" if side in ("left", "right") else "vertical"}
    if motion.kind == "roll":
        facts.add("clockwise" if motion.direction > 0 else "counterclockwise")
    return frozenset(facts)


def _words(slot: re.Match[str], said: Said, language: Language) -> tuple[tuple[str, ...], Said]:
    """What may stand in a slot, and the facts for the slots in that."""
    name, part = slot.groups()
    facts = said[int(part)] if part and int(part) < len(said) else said[0]
    return next((words for fact, words in language.slots[name].items() if fact in facts), ()), (facts,)


def _fits(wording: str, said: Said, language: Language) -> bool:
    return all(
        words and all(_fits(word, facts, language) for word in words)
        for words, facts in (_words(slot, said, language) for slot in _SLOT.finditer(wording))
    )


def _tells_speed(wording: str, language: Language) -> bool:
    slots = [language.slots[slot[1]] for slot in _SLOT.finditer(wording)]
    return any(
        bool(slot.keys() & set(SPEEDS))
        or all(_tells_speed(word, language) for words in slot.values() for word in words)
        for slot in slots
    )


@cache
def templates(said: Said, language: str = "en", held_out: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The wordings that fit a motion: its own, and those put together from parts.

    The held-out ones share no sentence with the others.
    """
    spoken = LANGUAGES[language]
    source = spoken.held_out if held_out else spoken.wordings
    own = [w for key, wordings in source.items() if key in said[0] and key != ANY for w in wordings]
    made = source.get(ANY, ()) if len(said) == 1 else ()

    def usable(wordings: Iterator[str]) -> tuple[str, ...]:
        fitting = tuple(w for w in wordings if _fits(w, said, spoken))
        if said[0] & {"small", "large"}:
            fitting = tuple(w for w in fitting if _tells_speed(w, spoken))
        return tuple(dict.fromkeys(fitting))

    return usable(iter(own)), usable(iter(made))


def fill(wording: str, said: Said, language: str = "en", rng: np.random.Generator | None = None) -> str:
    """A wording with words in its slots: random ones, or the first of each without `rng`."""

    def put(slot: re.Match[str]) -> str:
        words, facts = _words(slot, said, LANGUAGES[language])
        word = words[0 if rng is None else int(rng.integers(len(words)))]
        return fill(word, facts, language, rng) if "{" in word else word

    return _tidy(_SLOT.sub(put, wording))


def sentences(wording: str, said: Said, language: str = "en") -> Iterator[str]:
    """Every sentence that `fill` can make of a wording."""
    slots = list(_SLOT.finditer(wording))
    choices = []
    for slot in slots:
        words, facts = _words(slot, said, LANGUAGES[language])
        choices.append([sentence for word in words for sentence in sentences(word, facts, language)])
    pieces = _SLOT.split(wording)[::3]
    for chosen in product(*choices):
        yield _tidy("".join(a + b for a, b in zip(pieces, (*chosen, ""), strict=True)))


def _tidy(sentence: str) -> str:
    return " ".join(sentence.split()).replace(" ,", ",")


def caption(
    rng: np.random.Generator,
    motion: Motion | Combined | str,
    *,
    held_out: bool = False,
    sprite: str | None = None,
    language: str | None = None,
) -> str:
    """A random sentence, at most `LONGEST` bytes, that says what the camera does.

    Args:
        rng: where the words are drawn from.
        motion: what it does; or a kind, at its usual speed.
        held_out: use the wordings that training never sees; of either sort of wordings a quarter is not English.
        sprite: what else moves, in English ("a red ball moves left"); it is said in the caption's language.
        language: a key of `LANGUAGES`; None draws one.

    One in three has a neutral opening, and case, final full stop and small slips vary, as people's prompts do.
    """
    if isinstance(motion, str):
        motion = usual_motion(motion)
    if language is None:
        language = str(rng.choice(list(LANGUAGE_SHARES), p=list(LANGUAGE_SHARES.values())))
    spoken = LANGUAGES[language]
    while True:
        text = _sentence(rng, motion, language, held_out)
        if sprite:
            if motion.kind == "still":  # "nothing moves" would be untrue beside a moving sprite
                wordings = (spoken.held_out if held_out else spoken.wordings)["still camera"]
                text = wordings[int(rng.integers(len(wordings)))]
            clauses = [text, sprite_clause(sprite, language)]
            text = spoken.comma.join(clauses if rng.random() < 0.5 else clauses[::-1])
        if _length(text) <= LONGEST:
            return _as_typed(rng, text, spoken)


def _length(text: str) -> int:
    return len(text.encode())


def _sentence(rng: np.random.Generator, motion: Motion | Combined, language: str, held_out: bool) -> str:
    said = said_of(motion)
    if len(said) == 3 and rng.random() < 0.5:
        said = (said[0], said[2], said[1])
    own, made = templates(said, language, held_out)
    wordings = made if made and rng.random() < 0.5 else own
    return fill(wordings[int(rng.integers(len(wordings)))], said, language, rng)


def sprite_clause(sprite: str, language: str = "en") -> str:
    """What is said of a sprite: "a red ball moves left" in another language."""
    _, colour, shape, _, way = sprite.split()
    return fill(LANGUAGES[language].sprites[shape], (frozenset({colour, way}),), language)


def _as_typed(rng: np.random.Generator, text: str, language: Language) -> str:
    """A sentence with an opening or none, as somebody might type it."""
    if rng.random() < 0.06:
        text = _slipped(rng, text, language)
    if rng.random() < 1 / 3:
        opened = language.openings[int(rng.integers(len(language.openings)))] + language.space + text
        text = opened if _length(opened) <= LONGEST else text
    style = rng.random()
    if style < 0.35:
        text = text[0].upper() + text[1:]
    elif style < 0.38:
        text = text.upper() if _length(text.upper()) <= LONGEST else text
    elif style < 0.48:
        text = text.lower()
    if rng.random() < 0.35 and _length(text + language.full_stop) <= LONGEST:
        text += language.full_stop
    return text


def _slipped(rng: np.random.Generator, text: str, language: Language) -> str:
    """Two inner letters of a word swapped, "the" left out, or accents left out."""
    slip = rng.random()
    if slip < 0.4 and "the " in text:
        return _tidy(re.sub(r"\bthe ", "", text))
    if slip < 0.7 and language.accents_dropped:
        return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
    words = list(re.finditer(r"\w{5,}", text)) if language.swaps else []
    if not words:
        return text
    start, end = words[int(rng.integers(len(words)))].span()
    at = int(rng.integers(start + 1, end - 2))
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


SYNONYMS = {
    "tilt up, crane, boom, jib or pedestal up": "pan up",
    "tilt down, crane, boom, jib or pedestal down": "pan down",
    "truck, track, orbit, arc or circle left": "pan left",
    "truck, track, orbit, arc or circle right": "pan right",
    "dolly in, push in": "zoom in",
    "dolly out, pull back": "zoom out",
}
"""The photograph is a plane to the nano camera: what would differ by parallax looks the same."""

NOT_TAUGHT = (
    "people, animals, vehicles, water or anything else in the photograph moving by itself",
    "new objects or scenes, cuts, changes of light, weather, colour or style",
    "depth: what is near and what is far move alike, so that an orbit, a truck or a dolly is a pan or a zoom",
    "three or more motions at once, or one after another",
    "what the picture shows: captions name no content except the coloured ball or square",
    "numbers (degrees, percent, seconds): a motion is slow, usual or fast",
    "other languages than those listed",
)


def knows() -> dict[str, Any]:
    """What a model trained on these captions has been taught, and what it has not: for a model card; plain values."""
    return {
        "motions": list(MOTIONS),
        "also called": dict(SYNONYMS),
        "combinations": list(COMBINATIONS),
        "travel": {
            family: {speed: list(bounds[i : i + 2]) for i, speed in enumerate(SPEEDS)}
            for family, bounds in TRAVELS.items()
        },
        "travel units": {"pan": "of the frame's width or height", "zoom": "times larger or smaller", "roll": "degrees"},
        "languages": {LANGUAGES[code].name: share for code, share in LANGUAGE_SHARES.items()},
        "things that move": "one ball or square in one of nine colours, left, right, up or down",
        "not taught": list(NOT_TAUGHT),
    }
