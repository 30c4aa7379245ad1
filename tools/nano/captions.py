"""What a nano clip's caption says: many wordings of each motion, and other wordings kept for evaluation."""

from __future__ import annotations

import numpy as np

LONGEST = 110

# {side} and {opposite} are filled for pans (left/right/up/down), {turn} and {turned} for rolls.
_PAN = (
    "the camera pans {side}", "the camera pans to the {side}", "camera pans {side}", "pan {side}",
    "panning {side}", "a slow pan to the {side}", "the camera moves {side}",
    "the camera moves to the {side} across the scene", "camera moves {side}",
    "the camera slides to the {side}", "the camera turns {side}", "the view shifts to the {side}",
    "the view moves {side}", "a smooth camera pan toward the {side}", "the shot pans {side} slowly",
    "the camera travels {side}", "a {side}ward pan", "move the camera {side}", "camera panning to the {side}",
    "a gentle pan {side}", "the scene slides to the {opposite} as the camera pans {side}",
    "the camera drifts {side}", "pan the camera to the {side}", "tracking {side}",
    "a steady pan from {opposite} to {side}",
)  # fmt: skip
_TILT = (
    "the camera pans {side}", "camera pans {side}", "pan {side}", "panning {side}", "a slow pan {side}",
    "the camera moves {side}", "the camera tilts {side}", "tilt {side}", "camera tilts {side}",
    "a slow tilt {side}", "the view moves {side}", "the camera looks {side}",
    "the camera slides {side} over the scene", "camera moves {side}", "the shot tilts {side} slowly",
    "a smooth {side}ward pan", "the camera travels {side}", "move the camera {side}",
    "the view shifts {side}", "a gentle tilt {side}",
    "the scene slides {opposite} as the camera tilts {side}", "the camera drifts {side}", "tilting {side}",
    "pan the camera {side}",
)  # fmt: skip
_TEMPLATES: dict[str, tuple[str, ...]] = {
    "pan left": _PAN,
    "pan right": _PAN,
    "pan up": (*_TILT, "the camera rises", "the camera lifts toward the top"),
    "pan down": (*_TILT, "the camera sinks", "the camera lowers toward the bottom"),
    "zoom in": (
        "the camera zooms in", "camera zooms in", "zoom in", "zooming in", "slow zoom in", "a slow zoom in",
        "the camera slowly zooms in", "the camera moves closer", "the camera pushes in", "push in",
        "the view gets closer", "the camera moves forward", "a gentle zoom in on the center",
        "the picture grows larger", "the shot zooms in smoothly", "zoom in on the scene",
        "the camera moves in", "dolly in", "the camera approaches", "moving closer to the subject",
        "a smooth zoom toward the middle", "the scene comes closer",
    ),
    "zoom out": (
        "the camera zooms out", "camera zooms out", "zoom out", "zooming out", "slow zoom out",
        "a slow zoom out", "the camera slowly zooms out", "the camera moves away", "the camera pulls back",
        "pull back", "the view gets wider", "the camera moves backward", "a gentle zoom out from the center",
        "the picture gets smaller", "the shot zooms out smoothly", "zoom out of the scene",
        "the camera moves back", "dolly out", "the camera backs away", "moving away from the subject",
        "a smooth zoom out to a wider view", "the scene moves farther away",
    ),
    "roll": (
        "the camera rolls {turn}", "camera rolls {turn}", "roll {turn}", "rolling {turn}",
        "a slow {turn} roll", "the camera rotates {turn}", "camera rotation, {turn}",
        "the camera slowly rolls {turn}", "the picture turns {turned} as the camera rolls {turn}",
        "a smooth {turn} camera roll", "the camera turns {turn} about its axis", "the camera twists {turn}",
        "rotate the camera {turn}", "the shot rolls {turn}", "a gentle roll, {turn}",
        "the horizon turns {turned}",
    ),
    "still": (
        "a static shot, nothing moves", "static shot", "a still shot", "the camera is still",
        "the camera does not move", "nothing moves", "the camera stays still", "a fixed camera",
        "a static camera", "no camera movement", "the camera holds still", "the view stays the same", "still",
        "locked-off shot", "a motionless view", "the scene is still", "the camera stays in place",
        "a frozen moment", "no motion", "a steady shot, no movement",
    ),
}  # fmt: skip

# Beside whole sentences, sentences put together from parts: a model that has read "the shot tilts up" and "the view
# gently moves up" has a reason to read words and not sentences.
_SUBJECTS = (
    "the camera", "camera", "the view", "the shot", "the frame", "the lens", "the viewpoint", "the whole view",
    "the picture's frame", "the footage", "the image",
)  # fmt: skip
_ADVERBS = ("", "", "slowly", "gently", "smoothly", "steadily", "gradually", "calmly", "quietly", "softly")
_ADJECTIVES = ("", "slow", "gentle", "smooth", "steady", "gradual", "calm", "soft", "quiet", "long")
_SIDEWAYS = ("{side}", "{side}", "to the {side}", "toward the {side}", "over to the {side}", "{side}ward")
_VERTICALLY = ("{side}", "{side}", "{side}ward", "further {side}", "straight {side}")
_PANS, _TILTS = ("pan", "move", "slide", "shift", "travel", "drift", "turn", "swing"), ("tilt", "pan", "move", "look")
_VERBS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # what is done, and how it goes on
    "pan left": (_PANS, _SIDEWAYS),
    "pan right": (_PANS, _SIDEWAYS),
    "pan up": (_TILTS, _VERTICALLY),
    "pan down": (_TILTS, _VERTICALLY),
    "zoom in": (
        ("zoom", "push", "move", "dolly", "close", "go"),
        ("in", "in", "in on the scene", "inward", "in closer", "in on the middle"),
    ),
    "zoom out": (
        ("zoom", "pull", "move", "dolly", "draw", "go"),
        ("out", "out", "out of the scene", "outward", "out wider", "out and further off"),
    ),
    "roll": (
        ("roll", "rotate", "turn", "spin", "twist"),
        ("{turn}", "{turn}", "in a {turn} direction", "around {turn}"),
    ),
    "still": (
        ("stay", "hold", "rest", "sit", "stand"),
        ("still", "in place", "fixed", "quite still", "put", "motionless"),
    ),
}  # fmt: skip
_RESTS = (
    "{subject} does not move", "{subject} is not moving", "{subject} never moves", "no movement of {subject}",
    "{subject} is static", "{subject} is fixed", "{subject} is motionless", "nothing happens to {subject}",
    "{subject} keeps its place", "{subject} without any motion", "there is no motion", "there is no camera motion",
    "no pan, no zoom, no roll", "{subject} does not pan or zoom", "without movement", "an entirely static view",
)  # fmt: skip


def _composed(rng: np.random.Generator, kind: str) -> str:
    """A sentence of parts, unfilled; never one that is held out."""
    while True:
        sentence = _sentence(rng, kind)
        if not any(held_out in sentence for held_out in _HELD_OUT[kind]):
            return sentence


def _sentence(rng: np.random.Generator, kind: str) -> str:

    def one(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    verbs, courses = _VERBS[kind]
    subject, adverb, adjective, verb, course = one(_SUBJECTS), one(_ADVERBS), one(_ADJECTIVES), one(verbs), one(courses)
    form = int(rng.integers(5))
    if kind == "still" and rng.random() < 0.5:
        sentence = one(_RESTS).replace("{subject}", subject)
    elif form == 0:
        sentence = f"{subject} {adverb} {_third_person(verb)} {course}"
    elif form == 1:
        sentence = f"{subject} {_third_person(verb)} {course} {adverb}"
    elif form == 2:
        sentence = f"{adverb} {_gerund(verb)} {course}"
    elif form == 3:
        sentence = f"{verb} {subject if subject != 'camera' else 'the camera'} {course}"
    else:
        sentence = f"a {adjective} {verb} {course}"
    return " ".join(sentence.split())


def _third_person(verb: str) -> str:
    if verb.endswith("ly"):
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("sh", "o")) else "s")


def _gerund(verb: str) -> str:
    if verb in ("pan", "spin", "sit"):
        verb += verb[-1]
    return (verb[:-1] if verb.endswith("e") else verb) + "ing"


_HELD_OUT_PAN = (
    "the camera sweeps {side}", "the camera glides gently to the {side}", "our view pans over to the {side}",
    "slowly panning the shot toward the {side}", "camera motion: pan {side}",
)  # fmt: skip
_HELD_OUT_TILT = (
    "the camera sweeps {side}", "the camera glides gently {side}", "our view tilts {side}",
    "slowly tilting the shot {side}", "camera motion: pan {side}",
)  # fmt: skip
_HELD_OUT: dict[str, tuple[str, ...]] = {
    "pan left": _HELD_OUT_PAN,
    "pan right": _HELD_OUT_PAN,
    "pan up": _HELD_OUT_TILT,
    "pan down": _HELD_OUT_TILT,
    "zoom in": (
        "the shot slowly zooms in on the subject", "the camera creeps closer", "our view zooms in",
        "a steady push in toward the center", "camera motion: zoom in",
    ),
    "zoom out": (
        "the shot slowly zooms out from the subject", "the camera eases back and away", "our view zooms out",
        "a steady pull back to reveal more", "camera motion: zoom out",
    ),
    "roll": (
        "the shot slowly rotates {turn}", "the camera gently rolls {turn}", "our view rolls {turn}",
        "a steady roll of the camera, {turn}", "camera motion: roll {turn}",
    ),
    "still": (
        "the shot stays static", "the camera remains completely still", "our view does not move at all",
        "a steady, unmoving picture", "camera motion: none",
    ),
}  # fmt: skip

PREFIXES = (
    "a photo.", "a photograph,", "a picture of a scene,", "a landscape,", "in this video", "in this shot,",
    "a view,",
    "a nature scene,", "outdoors,", "a real photo;", "video:", "a close look,", "an image of something,",
    "a scene where",
    "cinematic,", "a beautiful picture,", "a detailed photo,",
)  # fmt: skip
_OPPOSITES = {"left": "right", "right": "left", "up": "down", "down": "up"}


def templates(kind: str, held_out: bool = False) -> tuple[str, ...]:
    """The wordings of a motion, unfilled; the held-out ones share none with the others."""
    return (_HELD_OUT if held_out else _TEMPLATES)[kind]


def fill(template: str, kind: str, direction: int = 1) -> str:
    """The wording with its side or turn named; `direction` is +1 for a clockwise roll, -1 for the other."""
    side = kind.split()[-1] if kind.startswith("pan ") else ""
    turns = ("clockwise", "counterclockwise")
    turn, turned = turns if direction > 0 else turns[::-1]
    return template.format(side=side, opposite=_OPPOSITES.get(side, ""), turn=turn, turned=turned)


def caption(
    rng: np.random.Generator,
    kind: str,
    direction: int = 1,
    *,
    held_out: bool = False,
    sprite: str | None = None,
) -> str:
    """A random sentence, at most 110 characters, that says what the camera does.

    `sprite` is a clause about what else moves ("a red ball moves left"). One in three has a neutral opening,
    and case and final full stop vary, as people's prompts do.
    """
    wordings = templates(kind, held_out)
    template = wordings[int(rng.integers(len(wordings)))]
    if not held_out and rng.random() < 0.6:
        template = _composed(rng, kind)
    text = fill(template, kind, direction)
    if sprite and kind == "still":
        # "nothing moves" would be untrue beside a moving sprite.
        text = ("the camera is still", "static camera", "a fixed camera")[int(rng.integers(3))]
    if sprite:
        text = f"{text}, {sprite}" if rng.random() < 0.5 else f"{sprite}, {text}"
    if rng.random() < 1 / 3:
        opening = PREFIXES[int(rng.integers(len(PREFIXES)))]
        if len(opening) + 1 + len(text) < LONGEST:
            text = f"{opening} {text}"
    style = rng.random()
    if style < 0.35:
        text = text[0].upper() + text[1:]
    elif style < 0.38:
        text = text.upper()
    if rng.random() < 0.35 and len(text) < LONGEST:
        text += "."
    return text
