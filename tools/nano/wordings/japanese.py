"""Japanese."""

from wordings.language import ANY, Language, Slot

_SLOTS: dict[str, Slot] = {
    "adv": {
        "small": ("ゆっくり", "ゆっくりと", "少し", "わずかに", "少しだけ", "そっと"),
        "usual": ("", "", "", "滑らかに", "スムーズに"),
        "large": ("素早く", "速く", "大きく", "すばやく", "急速に"),
    },
    "side": {"left": ("左",), "right": ("右",), "up": ("上",), "down": ("下",)},
    "corner": {"left up": ("左上",), "right up": ("右上",), "left down": ("左下",), "right down": ("右下",)},
    "turn": {"clockwise": ("時計回り",), "counterclockwise": ("反時計回り",)},
    "turned": {"clockwise": ("反時計回り",), "counterclockwise": ("時計回り",)},
    "bare": {
        "sideways": ("{side}にパン", "{side}へ移動"),
        "vertical": ("{side}にティルト", "{side}にパン", "{side}へ移動"),
        "zoom in": ("ズームイン", "ドリーイン"),
        "zoom out": ("ズームアウト", "ドリーアウト"),
        "roll": ("{turn}に回転", "{turn}にロール"),
    },
    "while": {
        "sideways": ("{side}にパンし", "{side}へ動き"),
        "vertical": ("{side}にティルトし", "{side}へ動き"),
        "zoom in": ("ズームインし", "近づき"),
        "zoom out": ("ズームアウトし", "遠ざかり"),
        "roll": ("{turn}に回転し", "{turn}に回り"),
    },
    "colour": {
        "red": ("赤い",), "green": ("緑の",), "blue": ("青い",), "yellow": ("黄色い",), "orange": ("オレンジ色の",),
        "purple": ("紫の",), "white": ("白い",), "black": ("黒い",), "pink": ("ピンクの",),
    },
}  # fmt: skip

_WORDINGS = {
    ANY: (
        "カメラが{adv}{bare}", "カメラが{adv}{bare}する", "{adv}{bare}", "カメラは{adv}{bare}する",
        "{adv}{bare}してください",
    ),
    "sideways": (
        "カメラが{adv}{side}にパンする", "カメラが{adv}{side}へパン", "{adv}{side}にパン", "{side}へ{adv}パン",
        "カメラが{adv}{side}に動く", "カメラが{adv}{side}へ移動する", "カメラを{adv}{side}に振る",
        "カメラが{adv}{side}を向く",
        "視点が{adv}{side}へ移動する", "{adv}{side}にパンするショット", "カメラが{adv}{side}にスライドする",
        "カメラを{adv}{side}に動かす", "カメラが{adv}{side}へ横移動する", "カメラが被写体の周りを{adv}{side}に回り込む",
        "{side}へ{adv}回り込むカメラ",
    ),
    "vertical": (
        "カメラが{adv}{side}にティルトする", "カメラが{adv}{side}へ動く", "{adv}{side}にティルト",
        "カメラを{adv}{side}に振る",
        "カメラが{adv}{side}を向く", "視点が{adv}{side}へ移動する", "カメラが{adv}{side}へ移動する",
        "{adv}{side}にパン",
        "カメラが{adv}{side}にパンする", "{side}へ{adv}ティルト", "カメラを{adv}{side}に動かす",
        "クレーンが{adv}{side}へ動く",
        "{adv}{side}にティルトするショット",
    ),
    "pan up": ("カメラが{adv}上昇する", "カメラが{adv}上がる"),
    "pan down": ("カメラが{adv}下降する", "カメラが{adv}降りる"),
    "zoom in": (
        "カメラが{adv}ズームインする", "{adv}ズームイン", "カメラが{adv}近づく", "カメラが{adv}被写体に寄る",
        "カメラが{adv}前進する",
        "画面が{adv}拡大する", "{adv}ズームインするショット", "カメラが{adv}前に進む", "中央に{adv}ズームイン",
        "被写体に{adv}近づく",
        "カメラが{adv}ドリーインする", "カメラを{adv}寄せる", "視点が{adv}近づく", "{adv}ドリーイン",
    ),
    "zoom out": (
        "カメラが{adv}ズームアウトする", "{adv}ズームアウト", "カメラが{adv}遠ざかる", "カメラが{adv}引く",
        "カメラが{adv}後退する",
        "画面が{adv}縮小する", "{adv}ズームアウトするショット", "カメラが{adv}後ろに下がる", "被写体から{adv}離れる",
        "カメラが{adv}ドリーアウトする", "カメラを{adv}引く", "視点が{adv}遠ざかる", "{adv}ドリーアウト",
    ),
    "roll": (
        "カメラが{adv}{turn}に回転する", "カメラが{adv}{turn}にロールする", "{adv}{turn}に回転",
        "カメラを{adv}{turn}に回す",
        "カメラを{adv}{turn}に傾ける", "{turn}に{adv}ロール", "視点が{adv}{turn}に回る", "水平線が{adv}{turned}に回る",
        "カメラが軸を中心に{adv}{turn}に回る", "画面が{adv}{turned}に回る", "{adv}{turn}に回転するショット",
    ),
    "still": (
        "静止したカメラ", "固定カメラ", "カメラは動かない", "カメラが静止している", "何も動かない",
        "静止画のようなショット",
        "カメラは固定されている", "カメラの動きなし", "動きのない映像", "視点は変わらない", "パンもズームもしない",
        "定点撮影",
        "じっと動かないカメラ", "静止ショット", "三脚で固定",
    ),
    "still camera": ("固定カメラ", "カメラは動かない", "カメラは固定されている", "定点撮影"),
    "diagonal": (
        "カメラが{adv}{corner}にパンする", "カメラが{adv}{corner}へ移動する", "{adv}{corner}にパン",
        "カメラを{adv}{corner}に振る",
        "視点が{adv}{corner}へ動く", "{corner}へ斜めに{adv}パン", "カメラを{adv}{corner}に動かす",
        "カメラが{adv}{corner}へ斜めに動く",
    ),
    "pair": (
        "カメラが{adv}{while1}ながら{bare2}する", "{adv}{while1}ながら{bare2}", "カメラが{adv}{while1}つつ{bare2}する",
        "{adv}{bare1}と同時に{bare2}", "カメラが{adv}{bare1}し、{bare2}する", "カメラは{adv}{while1}ながら{bare2}する",
        "{adv}{bare1}、{bare2}", "カメラが{adv}{bare1}しながら{bare2}",
    ),
}  # fmt: skip

_HELD_OUT = {
    "sideways": ("私たちの視線が{adv}{side}へ流れる", "レンズが{adv}{side}を追う", "カメラワーク：{side}パン"),
    "vertical": ("私たちの視線が{adv}{side}へ流れる", "レンズが{adv}{side}を追う", "カメラワーク：{side}ティルト"),
    "zoom in": ("私たちの視線が{adv}近づく", "レンズが{adv}寄っていく", "カメラワーク：ズームイン"),
    "zoom out": ("私たちの視線が{adv}遠ざかる", "レンズが{adv}引いていく", "カメラワーク：ズームアウト"),
    "roll": ("私たちの視線が{adv}{turn}に回る", "レンズが{adv}{turn}に回転していく", "カメラワーク：{turn}ロール"),
    "still": ("私たちの視線は動かない", "レンズはまったく動かない", "カメラワーク：なし"),
    "still camera": ("レンズはまったく動かない", "カメラワーク：なし"),
    "diagonal": ("私たちの視線が{adv}{corner}へ流れる", "カメラワーク：{corner}へパン"),
    "pair": ("レンズが{adv}{while1}ながら{bare2}する", "カメラワーク：{bare1}と{bare2}"),
}  # fmt: skip

JAPANESE = Language(
    name="Japanese",
    slots=_SLOTS,
    wordings=_WORDINGS,
    held_out=_HELD_OUT,
    sprites={"ball": "{colour}ボールが{side}に動く", "square": "{colour}四角が{side}に動く"},
    openings=("写真。", "風景、", "動画：", "屋外で、", "ある場面で、", "美しい写真、"),
    space="",
    comma="、",
    full_stop="。",
    swaps=False,
)
