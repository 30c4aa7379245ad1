"""Spanish."""

from wordings.language import ANY, Language, Slot

_SLOTS: dict[str, Slot] = {
    "adv": {
        "small": ("lentamente", "suavemente", "despacio", "ligeramente", "un poco", "muy despacio"),
        "usual": ("", "", "", "con fluidez"),
        "large": ("rápidamente", "rápido", "muy rápido", "mucho"),
    },
    "m": {  # after a masculine noun
        "small": ("lento", "suave", "ligero", "muy lento"),
        "usual": ("", "", "fluido", "continuo"),
        "large": ("rápido", "amplio", "muy rápido"),
    },
    "f": {  # after a feminine one
        "small": ("lenta", "suave", "ligera", "muy lenta"),
        "usual": ("", "", "fluida", "continua"),
        "large": ("rápida", "amplia", "muy rápida"),
    },
    "side": {
        "left": ("hacia la izquierda", "a la izquierda"), "right": ("hacia la derecha", "a la derecha"),
        "up": ("hacia arriba",), "down": ("hacia abajo",),
    },
    "from": {
        "left": ("de derecha a izquierda",), "right": ("de izquierda a derecha",),
        "up": ("de abajo arriba",), "down": ("de arriba abajo",),
    },
    "corner": {
        "left up": (
            "hacia arriba a la izquierda", "hacia arriba y a la izquierda", "en diagonal arriba a la izquierda",
        ),
        "right up": ("hacia arriba a la derecha", "hacia arriba y a la derecha", "en diagonal arriba a la derecha"),
        "left down": ("hacia abajo a la izquierda", "hacia abajo y a la izquierda", "en diagonal abajo a la izquierda"),
        "right down": ("hacia abajo a la derecha", "hacia abajo y a la derecha", "en diagonal abajo a la derecha"),
    },
    "turn": {
        "clockwise": ("en sentido horario", "en el sentido de las agujas del reloj"),
        "counterclockwise": ("en sentido antihorario", "en sentido contrario a las agujas del reloj"),
    },
    "turned": {"clockwise": ("en sentido antihorario",), "counterclockwise": ("en sentido horario",)},
    "act": {
        "sideways": ("se desplaza {adv} {side}", "panea {adv} {side}"),
        "vertical": ("se inclina {adv} {side}", "se mueve {adv} {side}"),
        "zoom in": ("se acerca {adv}", "avanza {adv}"),
        "zoom out": ("se aleja {adv}", "retrocede {adv}"),
        "roll": ("rota {adv} {turn}", "gira {adv} {turn}"),
    },
    "also": {
        "sideways": ("se desplaza {side}", "panea {side}"),
        "vertical": ("se inclina {side}",),
        "zoom in": ("se acerca",),
        "zoom out": ("se aleja",),
        "roll": ("rota {turn}", "gira {turn}"),
    },
    "noun": {
        "sideways": ("paneo {m} {side}",),
        "vertical": ("paneo {m} {side}",),
        "zoom in": ("acercamiento {m}",),
        "zoom out": ("alejamiento {m}",),
        "roll": ("giro {m} {turn}",),
    },
    "name": {
        "sideways": ("paneo {side}",),
        "vertical": ("paneo {side}",),
        "zoom in": ("acercamiento",),
        "zoom out": ("alejamiento",),
        "roll": ("giro {turn}",),
    },
    "colour_m": {
        "red": ("rojo",), "green": ("verde",), "blue": ("azul",), "yellow": ("amarillo",), "orange": ("naranja",),
        "purple": ("morado",), "white": ("blanco",), "black": ("negro",), "pink": ("rosa",),
    },
    "colour_f": {
        "red": ("roja",), "green": ("verde",), "blue": ("azul",), "yellow": ("amarilla",), "orange": ("naranja",),
        "purple": ("morada",), "white": ("blanca",), "black": ("negra",), "pink": ("rosa",),
    },
}  # fmt: skip

_WORDINGS = {
    ANY: ("la cámara {act}", "cámara: {noun}", "{noun}", "que la cámara haga un {noun}"),
    "sideways": (
        "la cámara se desplaza {adv} {side}", "la cámara gira {adv} {side}", "paneo {m} {side}",
        "un paneo {m} {side}", "panorámica {f} {side}", "la cámara hace un paneo {m} {side}",
        "la cámara se mueve {adv} {side}", "mover la cámara {adv} {side}", "mueve la cámara {adv} {side}",
        "la cámara panea {adv} {side}", "la vista se desliza {adv} {side}", "travelling {m} {side}",
        "una panorámica {f} {from}", "la cámara viaja {adv} {side}", "el encuadre se mueve {adv} {side}",
        "la cámara orbita {adv} {side} alrededor del sujeto", "órbita {f} {side}",
    ),
    "vertical": (
        "la cámara se inclina {adv} {side}", "la cámara se mueve {adv} {side}", "paneo vertical {m} {side}",
        "un paneo {m} {side}", "panorámica vertical {f} {side}", "inclinar la cámara {adv} {side}",
        "inclina la cámara {adv} {side}", "la vista se desliza {adv} {side}", "movimiento de grúa {m} {side}",
        "una panorámica {f} {from}", "el encuadre se mueve {adv} {side}", "la cámara se desplaza {adv} {side}",
        "mueve la cámara {adv} {side}",
    ),
    "pan up": ("la cámara sube {adv}", "la cámara asciende {adv}"),
    "pan down": ("la cámara baja {adv}", "la cámara desciende {adv}"),
    "zoom in": (
        "la cámara se acerca {adv}", "acercamiento {m}", "un acercamiento {m}", "zoom de acercamiento {m}",
        "la cámara hace un zoom {m} hacia adentro", "la cámara avanza {adv}", "acercar la cámara {adv}",
        "la cámara se aproxima {adv} al sujeto", "la imagen se agranda {adv}", "travelling de avance {m}",
        "acercarse {adv} al sujeto", "la cámara entra {adv} en la escena", "un acercamiento {m} al centro",
        "acerca la cámara {adv}", "el plano se cierra {adv}", "haz zoom {adv}",
    ),
    "zoom out": (
        "la cámara se aleja {adv}", "alejamiento {m}", "un alejamiento {m}", "zoom de alejamiento {m}",
        "la cámara hace un zoom {m} hacia afuera", "la cámara retrocede {adv}", "alejar la cámara {adv}",
        "la cámara se aparta {adv} del sujeto", "la imagen se reduce {adv}", "travelling de retroceso {m}",
        "alejarse {adv} de la escena", "el plano se abre {adv}", "un alejamiento {m} desde el centro",
        "aleja la cámara {adv}", "la cámara va {adv} hacia atrás",
    ),
    "roll": (
        "la cámara gira {adv} {turn}", "la cámara rota {adv} {turn}", "rotación {f} de la cámara {turn}",
        "giro {m} de la cámara {turn}", "un giro {m} {turn}", "girar la cámara {adv} {turn}",
        "rota la cámara {adv} {turn}", "la cámara gira {adv} sobre su eje {turn}", "el horizonte gira {adv} {turned}",
        "alabeo {m} de la cámara {turn}", "una rotación {f} {turn}", "la imagen gira {adv} {turned}",
    ),
    "still": (
        "plano fijo", "cámara fija", "la cámara no se mueve", "la cámara permanece quieta", "nada se mueve",
        "toma estática", "sin movimiento de cámara", "la cámara está quieta", "imagen quieta", "sin movimiento",
        "la vista no cambia", "ni paneo ni zoom", "cámara estática", "plano estático", "cámara sobre trípode",
    ),
    "still camera": ("plano fijo", "cámara fija", "la cámara no se mueve", "la cámara permanece quieta"),
    "diagonal": (
        "la cámara se desplaza {adv} {corner}", "la cámara se mueve {adv} {corner}", "paneo {m} {corner}",
        "un paneo diagonal {m} {corner}", "mueve la cámara {adv} {corner}", "la vista se desliza {adv} {corner}",
        "la cámara panea {adv} {corner}", "una panorámica {f} {corner}",
    ),
    "pair": (
        "la cámara {act1} y {also2}", "la cámara {act1} mientras {also2}", "la cámara {act1} y a la vez {also2}",
        "{noun1} y {name2}", "{noun1} con {name2}", "cámara: {noun1}, {name2}", "la vista {act1} mientras {also2}",
        "la cámara {act1} y {also2} al mismo tiempo",
    ),
}  # fmt: skip

_HELD_OUT = {
    "sideways": (
        "nuestra vista gira {adv} {side}", "el objetivo recorre {adv} la escena {side}", "movimiento: paneo {side}",
    ),
    "vertical": (
        "nuestra vista se inclina {adv} {side}", "el objetivo recorre {adv} la escena {side}",
        "movimiento: paneo {side}",
    ),
    "zoom in": ("nuestra vista se acerca {adv}", "el objetivo cierra {adv} el plano", "movimiento: acercamiento"),
    "zoom out": ("nuestra vista se aleja {adv}", "el objetivo abre {adv} el plano", "movimiento: alejamiento"),
    "roll": ("nuestra vista rota {adv} {turn}", "el objetivo gira {adv} {turn}", "movimiento: giro {turn}"),
    "still": ("nuestra vista no se mueve nada", "la cámara sigue totalmente inmóvil", "movimiento: ninguno"),
    "still camera": ("la cámara sigue totalmente inmóvil", "movimiento de cámara: ninguno"),
    "diagonal": ("nuestra vista va {adv} {corner}", "movimiento: paneo {corner}"),
    "pair": ("nuestra vista {act1} y {also2}", "{noun1} más {name2}"),
}  # fmt: skip

SPANISH = Language(
    name="Spanish",
    slots=_SLOTS,
    wordings=_WORDINGS,
    held_out=_HELD_OUT,
    sprites={"ball": "una pelota {colour_f} se mueve {side}", "square": "un cuadrado {colour_m} se mueve {side}"},
    openings=(
        "una foto,",
        "un paisaje,",
        "vídeo:",
        "en este vídeo,",
        "al aire libre,",
        "una escena,",
        "una bella imagen,",
    ),
    accents_dropped=True,
)
