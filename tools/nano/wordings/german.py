"""German."""

from wordings.language import ANY, Language, Slot

_COLOURS = {
    "red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb", "orange": "orangefarben", "purple": "violett",
    "white": "weiß", "black": "schwarz", "pink": "rosafarben",
}  # fmt: skip

_SLOTS: dict[str, Slot] = {
    "adv": {
        "small": ("langsam", "sanft", "behutsam", "ganz langsam", "gemächlich"),
        "usual": ("", "", "", "gleichmäßig"),
        "large": ("schnell", "rasch", "zügig", "sehr schnell"),
    },
    "deg": {  # how far
        "small": ("ein wenig", "etwas", "leicht", "ein bisschen"),
        "usual": ("",),
        "large": ("weit",),
    },
    "strong": {"small": ("leicht", "ein wenig"), "usual": ("",), "large": ("stark", "kräftig")},
    "er": {  # with a masculine noun
        "small": ("langsamer", "sanfter", "leichter", "kleiner"),
        "usual": ("", "", "gleichmäßiger"),
        "large": ("schneller", "rascher", "großer", "kräftiger"),
    },
    "e": {  # with a feminine one
        "small": ("langsame", "sanfte", "leichte", "kleine"),
        "usual": ("", "", "gleichmäßige"),
        "large": ("schnelle", "rasche", "große", "kräftige"),
    },
    "es": {  # with a neuter one
        "small": ("langsames", "sanftes", "leichtes"),
        "usual": ("", "", "gleichmäßiges"),
        "large": ("schnelles", "rasches", "kräftiges"),
    },
    "side": {"left": ("nach links",), "right": ("nach rechts",), "up": ("nach oben",), "down": ("nach unten",)},
    "from": {
        "left": ("von rechts nach links",), "right": ("von links nach rechts",),
        "up": ("von unten nach oben",), "down": ("von oben nach unten",),
    },
    "corner": {
        "left up": ("nach links oben", "nach oben links", "schräg nach links oben"),
        "right up": ("nach rechts oben", "nach oben rechts", "schräg nach rechts oben"),
        "left down": ("nach links unten", "nach unten links", "schräg nach links unten"),
        "right down": ("nach rechts unten", "nach unten rechts", "schräg nach rechts unten"),
    },
    "turn": {"clockwise": ("im Uhrzeigersinn",), "counterclockwise": ("gegen den Uhrzeigersinn",)},
    "turned": {"clockwise": ("gegen den Uhrzeigersinn",), "counterclockwise": ("im Uhrzeigersinn",)},
    "act": {
        "sideways": ("schwenkt {adv} {side}", "bewegt sich {adv} {side}"),
        "vertical": ("schwenkt {adv} {side}", "neigt sich {adv} {side}"),
        "zoom in": ("zoomt {adv} heran", "zoomt {adv} hinein", "fährt {adv} heran"),
        "zoom out": ("zoomt {adv} heraus", "fährt {adv} zurück"),
        "roll": ("rollt {adv} {turn}", "dreht sich {adv} {turn}"),
    },
    "also": {
        "sideways": ("schwenkt {side}",),
        "vertical": ("schwenkt {side}", "neigt sich {side}"),
        "zoom in": ("zoomt heran", "zoomt hinein"),
        "zoom out": ("zoomt heraus",),
        "roll": ("rollt {turn}", "dreht sich {turn}"),
    },
    "verb": {  # at the end of a clause
        "sideways": ("{side} schwenkt",),
        "vertical": ("{side} schwenkt",),
        "zoom in": ("heranzoomt", "hineinzoomt"),
        "zoom out": ("herauszoomt",),
        "roll": ("{turn} rollt", "sich {turn} dreht"),
    },
    "todo": {
        "sideways": ("{side} schwenken",),
        "vertical": ("{side} schwenken",),
        "zoom in": ("heranzoomen", "hineinzoomen"),
        "zoom out": ("herauszoomen",),
        "roll": ("{turn} rollen",),
    },
    "noun": {
        "sideways": ("Schwenk {side}",),
        "vertical": ("Schwenk {side}",),
        "zoom in": ("Heranzoomen",),
        "zoom out": ("Herauszoomen",),
        "roll": ("Drehung {turn}",),
    },
    "colour_er": {colour: (f"{word}er",) for colour, word in _COLOURS.items()},
    "colour_es": {colour: (f"{word}es",) for colour, word in _COLOURS.items()},
}  # fmt: skip

_WORDINGS = {
    ANY: ("die Kamera {act}", "Kamera {act}", "{adv} {todo}", "die Kamera soll {adv} {todo}"),
    "sideways": (
        "die Kamera schwenkt {adv} {side}", "die Kamera schwenkt {deg} {side}", "ein {er} Schwenk {side}",
        "Kameraschwenk {side}", "ein {er} Kameraschwenk {side}", "die Kamera bewegt sich {adv} {side}",
        "die Kamera dreht sich {adv} {side}", "eine {e} Kamerafahrt {side}", "die Kamera fährt {adv} {side}",
        "der Blick wandert {adv} {side}", "die Kamera gleitet {adv} {side}", "schwenke die Kamera {adv} {side}",
        "bewege die Kamera {deg} {side}", "der Bildausschnitt wandert {adv} {side}", "ein {er} Schwenk {from}",
        "die Kamera kreist {adv} {side} um das Motiv", "eine {e} Kreisfahrt {side}", "Kamera {adv} {side}",
        "seitliche Kamerafahrt {side}",
    ),
    "vertical": (
        "die Kamera schwenkt {adv} {side}", "die Kamera schwenkt {deg} {side}", "ein {er} Schwenk {side}",
        "die Kamera neigt sich {adv} {side}", "die Kamera bewegt sich {adv} {side}", "die Kamera kippt {adv} {side}",
        "der Blick wandert {adv} {side}", "eine {e} Kranfahrt {side}", "die Kamera fährt {adv} {side}",
        "neige die Kamera {deg} {side}", "schwenke die Kamera {adv} {side}", "ein {er} Kameraschwenk {side}",
        "der Bildausschnitt wandert {adv} {side}", "ein {er} Schwenk {from}", "Kamera {adv} {side}",
    ),
    "pan up": ("die Kamera steigt {adv}", "die Kamera hebt sich {adv}"),
    "pan down": ("die Kamera sinkt {adv}", "die Kamera senkt sich {adv}"),
    "zoom in": (
        "die Kamera zoomt {adv} hinein", "die Kamera zoomt {adv} heran", "die Kamera zoomt {deg} hinein",
        "ein {es} Heranzoomen", "ein {es} Hineinzoomen", "ein {er} Zoom auf die Mitte", "die Kamera fährt {adv} heran",
        "die Kamera bewegt sich {adv} nach vorn", "die Kamera nähert sich {adv} dem Motiv",
        "die Kamera kommt {adv} näher", "das Bild wird {adv} größer", "zoome {adv} hinein", "zoome {deg} heran",
        "eine {e} Kamerafahrt nach vorn", "die Kamera geht {adv} näher heran", "{adv} näher heran",
        "in die Szene hineinzoomen", "Dolly-Fahrt nach vorn",
    ),
    "zoom out": (
        "die Kamera zoomt {adv} heraus", "die Kamera zoomt {deg} heraus", "ein {es} Herauszoomen",
        "die Kamera fährt {adv} zurück", "die Kamera bewegt sich {adv} rückwärts",
        "die Kamera entfernt sich {adv} vom Motiv", "der Bildausschnitt wird {adv} größer",
        "das Bild wird {adv} kleiner", "zoome {adv} heraus", "zoome {deg} heraus", "eine {e} Kamerafahrt nach hinten",
        "die Kamera zieht sich {adv} zurück", "die Kamera geht {adv} auf Abstand", "aus der Szene herauszoomen",
        "Dolly-Fahrt zurück",
    ),
    "roll": (
        "die Kamera rollt {adv} {turn}", "die Kamera dreht sich {adv} {turn}", "die Kamera rollt {strong} {turn}",
        "eine {e} Drehung der Kamera {turn}", "eine {e} Kameradrehung {turn}", "drehe die Kamera {adv} {turn}",
        "die Kamera rotiert {adv} {turn}", "Kameradrehung {turn}", "der Horizont dreht sich {adv} {turned}",
        "die Kamera dreht sich {strong} {turn} um ihre Achse", "drehe die Kamera {strong} {turn}",
        "das Bild kippt {adv} {turned}",
    ),
    "still": (
        "die Kamera steht still", "statische Aufnahme", "die Kamera bewegt sich nicht", "nichts bewegt sich",
        "feste Kamera", "eine ruhige, unbewegte Einstellung", "keine Kamerabewegung",
        "die Kamera bleibt an ihrem Platz", "unbewegtes Bild", "Standbild", "die Ansicht bleibt gleich",
        "kein Schwenk, kein Zoom", "starre Kamera", "ohne Bewegung", "Aufnahme vom Stativ",
    ),
    "still camera": ("die Kamera steht still", "statische Kamera", "feste Kamera", "die Kamera bewegt sich nicht"),
    "diagonal": (
        "die Kamera schwenkt {adv} {corner}", "die Kamera bewegt sich {adv} {corner}", "ein {er} Schwenk {corner}",
        "{adv} {corner} schwenken", "die Kamera schwenkt {deg} {corner}", "der Blick wandert {adv} {corner}",
        "schwenke die Kamera {adv} {corner}", "eine {e} Kamerafahrt {corner}",
    ),
    "pair": (
        "die Kamera {act1} und {also2}", "die Kamera {act1}, während sie {verb2}", "{adv} {todo1} und {todo2}",
        "{adv} {todo1} und dabei {todo2}", "{noun1} und {noun2}", "Kamera {act1} und {also2}",
        "gleichzeitig {todo1} und {todo2}", "die Kamera soll {adv} {todo1} und {todo2}", "der Blick {act1} und {also2}",
    ),
}  # fmt: skip

_HELD_OUT = {
    "sideways": (
        "unsere Sicht schwenkt {adv} {side}", "die Aufnahme zieht {adv} {side}", "Kamerabewegung: Schwenk {side}",
    ),
    "vertical": (
        "unsere Sicht schwenkt {adv} {side}", "die Aufnahme zieht {adv} {side}", "Kamerabewegung: Schwenk {side}",
    ),
    "zoom in": (
        "unsere Sicht zoomt {adv} hinein", "es wird {adv} auf das Motiv gezoomt", "Kamerabewegung: hineinzoomen",
    ),
    "zoom out": ("unsere Sicht zoomt {adv} heraus", "wir weichen {adv} zurück", "Kamerabewegung: herauszoomen"),
    "roll": (
        "unsere Sicht rollt {adv} {turn}", "die Aufnahme dreht sich {adv} {turn}", "Kamerabewegung: Rollen {turn}",
    ),
    "still": ("unsere Sicht bleibt unverändert", "die Aufnahme steht völlig still", "Kamerabewegung: keine"),
    "still camera": ("die Kamera ist völlig unbewegt", "Kamerabewegung: keine"),
    "diagonal": ("unsere Sicht schwenkt {adv} {corner}", "Kamerabewegung: Schwenk {corner}"),
    "pair": ("unsere Sicht {act1} und {also2}", "Kamerabewegung: {noun1}, dazu {noun2}", "{adv} {todo1} & {todo2}"),
}  # fmt: skip

GERMAN = Language(
    name="German",
    slots=_SLOTS,
    wordings=_WORDINGS,
    held_out=_HELD_OUT,
    sprites={"ball": "ein {colour_er} Ball bewegt sich {side}", "square": "ein {colour_es} Quadrat bewegt sich {side}"},
    openings=(
        "ein Foto,",
        "eine Landschaft,",
        "Video:",
        "in diesem Video:",
        "draußen,",
        "eine Szene:",
        "ein schönes Bild,",
    ),
)
