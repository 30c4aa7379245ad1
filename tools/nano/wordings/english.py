"""English."""

from wordings.language import ANY, Language, Slot

_SUBJECTS = (
    "the camera", "camera", "the view", "the shot", "the frame", "the lens", "the viewpoint", "the whole view",
)  # fmt: skip

_SLOTS: dict[str, Slot] = {
    "adv": {
        "small": ("slowly", "gently", "slightly", "softly", "gradually"),
        "usual": ("", "", "", "smoothly", "steadily"),
        "large": ("quickly", "rapidly", "swiftly", "strongly"),
    },
    "end": {  # what may close a sentence
        "small": (
            "slowly", "gently", "slightly", "a little", "a bit", "just a little", "by a small amount", "very slowly",
        ),
        "usual": ("", "", "", "smoothly", "steadily"),
        "large": ("quickly", "fast", "rapidly", "a lot", "by a lot", "strongly", "very fast", "a long way"),
    },
    "adj": {
        "small": ("slow", "gentle", "slight", "small", "soft", "very slow"),
        "usual": ("", "", "", "smooth", "steady"),
        "large": ("fast", "quick", "rapid", "big", "strong", "very fast"),
    },
    "far": {"large": ("far",)},
    "whip": {"large": ("whip", "swish")},
    "bit": {"small": ("slightly", "a little", "a bit")},
    "side": {"left": ("left",), "right": ("right",), "up": ("up",), "down": ("down",)},
    "opposite": {"left": ("right",), "right": ("left",), "up": ("down",), "down": ("up",)},
    "corner": {
        "left up": ("up and to the left", "to the upper left", "up left", "toward the top left", "left and up"),
        "right up": ("up and to the right", "to the upper right", "up right", "toward the top right", "right and up"),
        "left down": (
            "down and to the left", "to the lower left", "down left", "toward the bottom left", "left and down",
        ),
        "right down": (
            "down and to the right", "to the lower right", "down right", "toward the bottom right", "right and down",
        ),
    },
    "turn": {"clockwise": ("clockwise",), "counterclockwise": ("counterclockwise", "anticlockwise")},
    "turned": {"clockwise": ("counterclockwise",), "counterclockwise": ("clockwise",)},
    # Sentences put together from parts: a model that has read "the shot tilts up" and "the view gently moves up" has a
    # reason to read words and not sentences.
    "subject": {ANY: _SUBJECTS},
    "do": {
        "sideways": ("pan", "move", "slide", "shift", "travel", "drift", "turn", "swing"),
        "vertical": ("tilt", "pan", "move", "look"),
        "zoom in": ("zoom", "push", "move", "dolly", "close", "go"),
        "zoom out": ("zoom", "pull", "move", "dolly", "draw", "go"),
        "roll": ("roll", "rotate", "turn", "spin", "twist"),
    },
    "thing": {
        "sideways": ("pan", "move", "slide", "shift", "drift", "turn", "swing"),
        "vertical": ("tilt", "pan", "move", "look"),
        "zoom in": ("zoom", "push", "move", "dolly"),
        "zoom out": ("zoom", "pull", "move", "dolly"),
        "roll": ("roll", "rotation", "turn", "spin", "twist"),
    },
    "does": {
        "sideways": ("pans", "moves", "slides", "shifts", "travels", "drifts", "turns", "swings"),
        "vertical": ("tilts", "pans", "moves", "looks"),
        "zoom in": ("zooms", "pushes", "moves", "dollies", "closes", "goes"),
        "zoom out": ("zooms", "pulls", "moves", "dollies", "draws", "goes"),
        "roll": ("rolls", "rotates", "turns", "spins", "twists"),
    },
    "doing": {
        "sideways": ("panning", "moving", "sliding", "shifting", "traveling", "drifting", "turning", "swinging"),
        "vertical": ("tilting", "panning", "moving", "looking"),
        "zoom in": ("zooming", "pushing", "moving", "dollying", "closing", "going"),
        "zoom out": ("zooming", "pulling", "moving", "dollying", "drawing", "going"),
        "roll": ("rolling", "rotating", "turning", "spinning", "twisting"),
    },
    "course": {
        "sideways": ("{side}", "{side}", "to the {side}", "toward the {side}", "over to the {side}", "{side}ward"),
        "vertical": ("{side}", "{side}", "{side}ward", "further {side}", "straight {side}"),
        "zoom in": ("in", "in", "in on the scene", "inward", "in closer", "in on the middle"),
        "zoom out": ("out", "out", "out of the scene", "outward", "out wider", "out and further off"),
        "roll": ("{turn}", "{turn}", "in a {turn} direction", "around {turn}"),
    },
    "rests": {ANY: ("stays", "holds", "rests", "sits", "stands")},
    "act": {
        "sideways": ("pans {side}", "moves {side}", "pans to the {side}"),
        "vertical": ("tilts {side}", "pans {side}", "moves {side}"),
        "zoom in": ("zooms in", "pushes in", "moves closer"),
        "zoom out": ("zooms out", "pulls back", "moves away"),
        "roll": ("rolls {turn}", "rotates {turn}"),
    },
    "acting": {
        "sideways": ("panning {side}", "moving {side}", "panning to the {side}"),
        "vertical": ("tilting {side}", "panning {side}", "moving {side}"),
        "zoom in": ("zooming in", "pushing in", "moving closer"),
        "zoom out": ("zooming out", "pulling back", "moving away"),
        "roll": ("rolling {turn}", "rotating {turn}"),
    },
    "order": {
        "sideways": ("pan {side}", "move {side}"),
        "vertical": ("tilt {side}", "pan {side}"),
        "zoom in": ("zoom in", "push in"),
        "zoom out": ("zoom out", "pull back"),
        "roll": ("roll {turn}", "rotate {turn}"),
    },
    "noun": {
        "sideways": ("pan {side}", "pan to the {side}"),
        "vertical": ("tilt {side}", "pan {side}"),
        "zoom in": ("zoom in", "push in"),
        "zoom out": ("zoom out", "pull back"),
        "roll": ("{turn} roll", "roll {turn}"),
    },
    "a_colour": {
        "red": ("a red",), "green": ("a green",), "blue": ("a blue",), "yellow": ("a yellow",),
        "orange": ("an orange",), "purple": ("a purple",), "white": ("a white",), "black": ("a black",),
        "pink": ("a pink",),
    },
}  # fmt: skip

_WORDINGS = {
    ANY: (
        "{subject} {adv} {does} {course}", "{subject} {does} {course} {end}", "{adv} {doing} {course}",
        "{do} the camera {course} {end}", "a {adj} {thing} {course}",
    ),
    "sideways": (
        "the camera pans {side} {end}", "the camera {adv} pans to the {side}", "camera pans {side} {end}",
        "pan {side} {end}", "panning {side} {end}", "{adv} panning to the {side}", "a {adj} pan to the {side}",
        "the camera moves {side} {end}", "the camera {adv} moves to the {side} across the scene",
        "camera moves {side} {end}", "the camera slides {adv} to the {side}", "the camera turns {side} {end}",
        "the view shifts {adv} to the {side}", "the view moves {side} {end}", "a {adj} camera pan toward the {side}",
        "the shot pans {side} {end}", "the camera travels {side} {end}", "a {adj} {side}ward pan",
        "move the camera {side} {end}", "camera panning to the {side} {end}", "a {adj} pan {side}",
        "the scene slides to the {opposite} as the camera {adv} pans {side}", "the camera {adv} drifts {side}",
        "pan the camera {adv} to the {side}", "tracking {side} {end}", "a {adj} pan from {opposite} to {side}",
        "the camera pans {far} to the {side}", "the camera moves {far} to the {side}", "{whip} pan to the {side}",
        "the camera pans {bit} to the {side}", "pan {bit} {side}",
        "truck {side} {end}", "the camera trucks {side} {end}", "a {adj} truck to the {side}", "trucking {side} {end}",
        "the camera tracks {side} {end}", "a {adj} tracking shot to the {side}",
        "orbit {side} {end}", "the camera orbits {side} {end}", "a {adj} orbit to the {side}", "orbiting {side} {end}",
        "the camera {adv} orbits to the {side} around the subject", "the camera arcs {side} {end}",
        "a {adj} arc shot to the {side}", "arc {side} around the subject {end}",
        "the camera {adv} circles {side} around the subject", "circle around the subject to the {side} {end}",
    ),
    "vertical": (
        "the camera pans {side} {end}", "camera pans {side} {end}", "pan {side} {end}", "panning {side} {end}",
        "a {adj} pan {side}", "the camera moves {side} {end}", "the camera {adv} tilts {side}", "tilt {side} {end}",
        "camera tilts {side} {end}", "a {adj} tilt {side}", "the view moves {side} {end}",
        "the camera {adv} looks {side}", "the camera slides {side} over the scene {end}", "camera moves {side} {end}",
        "the shot tilts {side} {end}", "a {adj} {side}ward pan", "the camera travels {side} {end}",
        "move the camera {side} {end}", "the view shifts {side} {end}", "the camera drifts {side} {end}",
        "the scene slides {opposite} as the camera {adv} tilts {side}", "tilting {side} {end}",
        "pan the camera {side} {end}", "the camera tilts {far} {side}", "the camera tilts {side} {bit}",
        "pedestal {side} {end}", "the camera pedestals {side} {end}", "a {adj} pedestal move {side}",
        "crane {side} {end}", "the camera cranes {side} {end}", "a {adj} crane shot {side}", "boom {side} {end}",
        "the camera booms {side} {end}", "a {adj} boom {side}", "jib {side} {end}", "a {adj} jib shot {side}",
    ),
    "pan up": (
        "the camera rises {end}", "the camera {adv} lifts toward the top", "the camera {adv} ascends", "rising {end}",
        "raise the camera {end}",
    ),
    "pan down": (
        "the camera sinks {end}", "the camera {adv} lowers toward the bottom", "the camera {adv} descends",
        "sinking {end}", "lower the camera {end}",
    ),
    "zoom in": (
        "the camera zooms in {end}", "camera zooms in {end}", "zoom in {end}", "zooming in {end}", "{adj} zoom in",
        "a {adj} zoom in", "the camera {adv} zooms in", "the camera moves closer {end}", "the camera {adv} pushes in",
        "push in {end}", "the view {adv} gets closer", "the camera moves forward {end}",
        "a {adj} zoom in on the center", "the picture {adv} grows larger", "the shot zooms in {end}",
        "{adv} zoom in on the scene", "the camera moves in {end}", "the camera {adv} approaches",
        "{adv} moving closer to the subject", "a {adj} zoom toward the middle", "the scene comes closer {end}",
        "the camera zooms {far} in", "zoom in {bit}", "zoom {bit} closer", "move closer {end}", "get closer {end}",
        "dolly in {end}", "the camera dollies in {end}", "a {adj} dolly in", "dolly forward {end}",
        "dollying in {end}", "a {adj} dolly shot toward the subject", "a {adj} push in",
    ),
    "zoom out": (
        "the camera zooms out {end}", "camera zooms out {end}", "zoom out {end}", "zooming out {end}",
        "{adj} zoom out", "a {adj} zoom out", "the camera {adv} zooms out", "the camera moves away {end}",
        "the camera {adv} pulls back", "pull back {end}", "the view {adv} gets wider",
        "the camera moves backward {end}",
        "a {adj} zoom out from the center", "the picture {adv} gets smaller", "the shot zooms out {end}",
        "{adv} zoom out of the scene", "the camera moves back {end}", "the camera {adv} backs away",
        "{adv} moving away from the subject", "a {adj} zoom out to a wider view", "the scene moves farther away {end}",
        "the camera zooms {far} out", "zoom out {bit}", "back off {bit}", "move back {end}", "pull out {end}",
        "dolly out {end}", "the camera dollies out {end}", "a {adj} dolly out", "dolly back {end}",
        "dollying out {end}", "a {adj} dolly shot away from the subject", "a {adj} pull back",
    ),
    "roll": (
        "the camera rolls {turn} {end}", "camera rolls {turn} {end}", "roll {turn} {end}", "rolling {turn} {end}",
        "a {adj} {turn} roll", "the camera rotates {turn} {end}", "{adj} camera rotation, {turn}",
        "the camera {adv} rolls {turn}", "the picture turns {turned} as the camera {adv} rolls {turn}",
        "a {adj} {turn} camera roll", "the camera turns {turn} about its axis {end}", "the camera {adv} twists {turn}",
        "rotate the camera {turn} {end}", "the shot rolls {turn} {end}", "a {adj} roll, {turn}",
        "the horizon {adv} turns {turned}", "roll the camera {turn} {end}", "spin {turn} {end}",
        "the camera banks {turn} {end}", "a {adj} dutch roll {turn}", "tilt the horizon {turned} {end}",
    ),
    "still": (
        "a static shot, nothing moves", "static shot", "a still shot", "the camera is still",
        "the camera does not move", "nothing moves", "the camera stays still", "a fixed camera",
        "a static camera", "no camera movement", "the camera holds still", "the view stays the same", "still",
        "locked-off shot", "a motionless view", "the scene is still", "the camera stays in place",
        "a frozen moment", "no motion", "a steady shot, no movement", "tripod shot", "camera locked on a tripod",
        "{subject} does not move", "{subject} is not moving", "{subject} never moves", "no movement of {subject}",
        "{subject} is static", "{subject} is fixed", "{subject} is motionless", "nothing happens to {subject}",
        "{subject} keeps its place", "{subject} without any motion", "there is no motion",
        "there is no camera motion", "no pan, no zoom, no roll", "{subject} does not pan or zoom", "without movement",
        "an entirely static view", "{subject} {rests} still", "{subject} {rests} in place", "{subject} {rests} fixed",
        "{subject} {rests} quite still", "{subject} {rests} motionless", "keep the camera still",
    ),
    "still camera": (
        "the camera is still", "static camera", "a fixed camera", "the camera does not move", "the camera stays still",
        "tripod shot", "no camera movement",
    ),
    "diagonal": (
        "the camera pans {corner} {end}", "the camera {adv} moves {corner}", "pan {corner} {end}",
        "panning {corner} {end}", "a {adj} diagonal pan {corner}", "camera moves {corner} {end}",
        "the view {adv} shifts {corner}", "the camera {adv} drifts {corner}", "move the camera {corner} {end}",
        "the camera pans diagonally {corner} {end}", "{adv} moving {corner}", "a {adj} pan {corner}",
        "the shot slides {corner} {end}",
    ),
    "pair": (
        "the camera {adv} {act1} while {acting2}", "the camera {act1} and {act2} {end}",
        "the camera {act1} while it {act2} {end}", "{order1} and {order2} {end}", "{order1} while {acting2} {end}",
        "{adv} {acting1} and {acting2}", "a {adj} {noun1} with a {noun2}", "the shot {act1} as it {act2} {end}",
        "camera {act1} and {act2} {end}", "{acting1} while {acting2} {end}", "{noun1} + {noun2}",
        "the view {adv} {act1} and {act2}", "{order1}, {order2} {end}", "{noun1} and {noun2} at the same time",
        "the camera {act1} and {act2} at the same time {end}",
    ),
}  # fmt: skip

_HELD_OUT = {
    "sideways": (
        "the camera sweeps {side} {end}", "the camera glides {adv} to the {side}",
        "our view {adv} pans over to the {side}", "{adv} panning the shot toward the {side}",
        "camera motion: pan {side} {end}",
    ),
    "vertical": (
        "the camera sweeps {side} {end}", "the camera glides {adv} {side}", "our view {adv} tilts {side}",
        "{adv} tilting the shot {side}", "camera motion: pan {side} {end}",
    ),
    "zoom in": (
        "the shot {adv} zooms in on the subject", "the camera creeps closer", "our view {adv} zooms in",
        "a {adj} push in toward the center", "camera motion: zoom in {end}",
    ),
    "zoom out": (
        "the shot {adv} zooms out from the subject", "the camera eases back and away", "our view {adv} zooms out",
        "a {adj} pull back to reveal more", "camera motion: zoom out {end}",
    ),
    "roll": (
        "the shot swivels {turn} {end}", "the camera wheels {adv} {turn}", "our view {adv} rolls {turn}",
        "a {adj} roll of the camera, {turn}", "camera motion: roll {turn} {end}",
    ),
    "still": (
        "the shot stays static", "the camera remains completely still", "our view does not move at all",
        "a steady, unmoving picture", "camera motion: none",
    ),
    "still camera": ("the camera remains completely still", "our view does not move at all", "camera motion: none"),
    "diagonal": (
        "the camera sweeps {corner} {end}", "our view {adv} pans {corner}", "camera motion: pan {corner} {end}",
    ),
    "pair": (
        "our view {adv} {act1} and also {act2}", "camera motion: {noun1} together with {noun2} {end}",
        "the lens {act1}, {acting2} as it goes {end}",
    ),
}  # fmt: skip

ENGLISH = Language(
    name="English",
    slots=_SLOTS,
    wordings=_WORDINGS,
    held_out=_HELD_OUT,
    sprites={"ball": "{a_colour} ball moves {side}", "square": "{a_colour} square moves {side}"},
    openings=(
        "a photo.", "a photograph,", "a picture of a scene,", "a landscape,", "in this video", "in this shot,",
        "a view,", "a nature scene,", "outdoors,", "a real photo;", "video:", "a close look,",
        "an image of something,", "a scene where", "cinematic,", "a beautiful picture,", "a detailed photo,",
    ),
)  # fmt: skip
