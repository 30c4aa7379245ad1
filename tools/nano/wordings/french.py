"""French."""

from wordings.language import ANY, Language, Slot

_SLOTS: dict[str, Slot] = {
    "adv": {
        "small": ("lentement", "doucement", "légèrement", "très lentement", "un peu"),
        "usual": ("", "", "", "régulièrement"),
        "large": ("rapidement", "vite", "très vite", "fortement"),
    },
    "m": {  # after a masculine noun
        "small": ("lent", "doux", "léger", "très lent"),
        "usual": ("", "", "fluide", "régulier"),
        "large": ("rapide", "ample", "très rapide"),
    },
    "f": {  # after a feminine one
        "small": ("lente", "douce", "légère", "très lente"),
        "usual": ("", "", "fluide", "régulière"),
        "large": ("rapide", "ample", "très rapide"),
    },
    "side": {
        "left": ("vers la gauche", "à gauche"), "right": ("vers la droite", "à droite"),
        "up": ("vers le haut",), "down": ("vers le bas",),
    },
    "from": {
        "left": ("de droite à gauche",), "right": ("de gauche à droite",),
        "up": ("de bas en haut",), "down": ("de haut en bas",),
    },
    "corner": {
        "left up": ("vers le haut à gauche", "vers le coin supérieur gauche", "en diagonale vers le haut à gauche"),
        "right up": ("vers le haut à droite", "vers le coin supérieur droit", "en diagonale vers le haut à droite"),
        "left down": ("vers le bas à gauche", "vers le coin inférieur gauche", "en diagonale vers le bas à gauche"),
        "right down": ("vers le bas à droite", "vers le coin inférieur droit", "en diagonale vers le bas à droite"),
    },
    "turn": {
        "clockwise": ("dans le sens horaire", "dans le sens des aiguilles d'une montre"),
        "counterclockwise": ("dans le sens antihoraire", "dans le sens inverse des aiguilles d'une montre"),
    },
    "turned": {"clockwise": ("dans le sens antihoraire",), "counterclockwise": ("dans le sens horaire",)},
    "act": {
        "sideways": ("pivote {adv} {side}", "se déplace {adv} {side}"),
        "vertical": ("s'incline {adv} {side}", "se déplace {adv} {side}"),
        "zoom in": ("zoome {adv}", "avance {adv}"),
        "zoom out": ("dézoome {adv}", "recule {adv}"),
        "roll": ("roule {adv} {turn}", "tourne {adv} {turn}"),
    },
    "also": {
        "sideways": ("pivote {side}",),
        "vertical": ("s'incline {side}",),
        "zoom in": ("zoome",),
        "zoom out": ("dézoome",),
        "roll": ("tourne {turn}",),
    },
    "acting": {
        "sideways": ("en pivotant {side}",),
        "vertical": ("en s'inclinant {side}",),
        "zoom in": ("en zoomant", "en avançant"),
        "zoom out": ("en dézoomant", "en reculant"),
        "roll": ("en tournant {turn}",),
    },
    "todo": {
        "sideways": ("panoramiquer {side}", "pivoter {side}"),
        "vertical": ("panoramiquer {side}",),
        "zoom in": ("zoomer",),
        "zoom out": ("dézoomer",),
        "roll": ("tourner {turn}",),
    },
    "noun": {
        "sideways": ("panoramique {m} {side}",),
        "vertical": ("panoramique {m} {side}",),
        "zoom in": ("zoom avant {m}",),
        "zoom out": ("zoom arrière {m}",),
        "roll": ("rotation {f} {turn}",),
    },
    "name": {
        "sideways": ("panoramique {side}",),
        "vertical": ("panoramique {side}",),
        "zoom in": ("zoom avant",),
        "zoom out": ("zoom arrière",),
        "roll": ("rotation {turn}",),
    },
    "colour_m": {
        "red": ("rouge",), "green": ("vert",), "blue": ("bleu",), "yellow": ("jaune",), "orange": ("orange",),
        "purple": ("violet",), "white": ("blanc",), "black": ("noir",), "pink": ("rose",),
    },
    "colour_f": {
        "red": ("rouge",), "green": ("verte",), "blue": ("bleue",), "yellow": ("jaune",), "orange": ("orange",),
        "purple": ("violette",), "white": ("blanche",), "black": ("noire",), "pink": ("rose",),
    },
}  # fmt: skip

_WORDINGS = {
    ANY: ("la caméra {act}", "caméra : {noun}", "{noun}", "la caméra doit {todo}"),
    "sideways": (
        "la caméra panoramique {adv} {side}", "la caméra pivote {adv} {side}", "la caméra se déplace {adv} {side}",
        "la caméra tourne {adv} {side}", "panoramique {m} {side}", "un panoramique {m} {side}",
        "panoramique {m} {from}", "la caméra glisse {adv} {side}", "le cadre se déplace {adv} {side}",
        "déplacer la caméra {adv} {side}", "tourner la caméra {adv} {side}", "travelling {m} {side}",
        "un travelling latéral {m} {side}", "le regard se déplace {adv} {side}", "déplace la caméra {adv} {side}",
        "la caméra tourne {adv} autour du sujet {side}", "mouvement circulaire {m} {side}",
    ),
    "vertical": (
        "la caméra panoramique {adv} {side}", "la caméra s'incline {adv} {side}", "la caméra bascule {adv} {side}",
        "la caméra se déplace {adv} {side}", "panoramique vertical {m} {side}", "un panoramique {m} {side}",
        "panoramique {m} {from}", "le cadre se déplace {adv} {side}", "incliner la caméra {adv} {side}",
        "mouvement de grue {m} {side}", "le regard se déplace {adv} {side}", "incline la caméra {adv} {side}",
        "travelling vertical {m} {side}", "la caméra glisse {adv} {side}",
    ),
    "pan up": ("la caméra monte {adv}", "la caméra s'élève {adv}"),
    "pan down": ("la caméra descend {adv}", "la caméra s'abaisse {adv}"),
    "zoom in": (
        "la caméra zoome {adv}", "zoom avant {m}", "un zoom avant {m}", "la caméra zoome {adv} sur le sujet",
        "la caméra s'approche {adv}", "la caméra se rapproche {adv} du sujet", "la caméra avance {adv}",
        "travelling avant {m}", "zoomer {adv}", "un zoom {m} sur le centre", "l'image grandit {adv}",
        "la caméra avance {adv} dans la scène", "le plan se resserre {adv}", "zoome {adv} sur la scène",
        "fais un zoom avant {m}", "rapprocher la caméra {adv}",
    ),
    "zoom out": (
        "la caméra dézoome {adv}", "zoom arrière {m}", "un zoom arrière {m}", "la caméra dézoome {adv} de la scène",
        "la caméra recule {adv}", "la caméra s'éloigne {adv} du sujet", "travelling arrière {m}", "dézoomer {adv}",
        "l'image rapetisse {adv}", "le plan s'élargit {adv}", "la caméra va {adv} en arrière",
        "fais un zoom arrière {m}", "éloigner la caméra {adv}", "dézoome {adv}", "la caméra s'éloigne {adv}",
    ),
    "roll": (
        "la caméra roule {adv} {turn}", "la caméra tourne {adv} {turn}", "rotation {f} de la caméra {turn}",
        "la caméra pivote {adv} sur elle-même {turn}", "une rotation {f} {turn}", "tourner la caméra {adv} {turn}",
        "roulis {m} de la caméra {turn}", "l'horizon tourne {adv} {turned}", "fais tourner la caméra {adv} {turn}",
        "la caméra effectue une rotation {f} {turn}", "la caméra tourne {adv} sur son axe {turn}",
        "l'image tourne {adv} {turned}",
    ),
    "still": (
        "plan fixe", "caméra fixe", "la caméra ne bouge pas", "la caméra reste immobile", "rien ne bouge",
        "un plan statique", "aucun mouvement de caméra", "la caméra est immobile", "image immobile",
        "sans mouvement", "la vue reste la même", "la caméra reste en place", "ni panoramique ni zoom",
        "plan immobile", "caméra sur trépied",
    ),
    "still camera": ("plan fixe", "caméra fixe", "la caméra ne bouge pas", "la caméra reste immobile"),
    "diagonal": (
        "la caméra panoramique {adv} {corner}", "la caméra se déplace {adv} {corner}", "panoramique {m} {corner}",
        "la caméra pivote {adv} {corner}", "un panoramique {m} {corner}", "déplacer la caméra {adv} {corner}",
        "le cadre glisse {adv} {corner}", "travelling {m} {corner}",
    ),
    "pair": (
        "la caméra {act1} et {also2}", "la caméra {act1} {acting2}", "la caméra {act1} tout {acting2}",
        "{noun1} et {name2}", "{noun1} avec {name2}", "caméra : {noun1}, {name2}", "le plan {act1} et {also2}",
        "la caméra {act1} et {also2} en même temps",
    ),
}  # fmt: skip

_HELD_OUT = {
    "sideways": (
        "notre vue pivote {adv} {side}", "l'objectif balaie {adv} la scène {side}", "mouvement : panoramique {side}",
    ),
    "vertical": (
        "notre vue bascule {adv} {side}", "l'objectif balaie {adv} la scène {side}", "mouvement : panoramique {side}",
    ),
    "zoom in": ("notre vue s'approche {adv}", "l'objectif zoome {adv} vers le centre", "mouvement : zoom avant"),
    "zoom out": ("notre vue recule {adv}", "l'objectif dézoome {adv} depuis le centre", "mouvement : zoom arrière"),
    "roll": ("notre vue tourne {adv} {turn}", "l'objectif roule {adv} {turn}", "mouvement : rotation {turn}"),
    "still": ("notre vue ne change pas du tout", "la caméra demeure parfaitement fixe", "mouvement : aucun"),
    "still camera": ("la caméra demeure parfaitement fixe", "mouvement de caméra : aucun"),
    "diagonal": ("notre vue glisse {adv} {corner}", "mouvement : panoramique {corner}"),
    "pair": ("notre vue {act1} et {also2}", "{noun1} plus {name2}"),
}  # fmt: skip

FRENCH = Language(
    name="French",
    slots=_SLOTS,
    wordings=_WORDINGS,
    held_out=_HELD_OUT,
    sprites={"ball": "une balle {colour_f} se déplace {side}", "square": "un carré {colour_m} se déplace {side}"},
    openings=("une photo,", "un paysage,", "vidéo :", "dans cette vidéo,", "dehors,", "une scène,", "une belle image,"),
    accents_dropped=True,
)
