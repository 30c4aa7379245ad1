"""Chinese (simplified)."""

from wordings.language import ANY, Language, Slot

_CAMERAS = ("镜头", "镜头", "相机", "摄像机", "摄影机")

_SLOTS: dict[str, Slot] = {
    "camera": {ANY: _CAMERAS},
    "adv": {
        "small": ("缓慢", "慢慢", "缓缓", "轻轻", "稍微", "略微", "缓慢地", "慢慢地"),
        "usual": ("", "", "", "平稳地", "匀速"),
        "large": ("快速", "迅速", "大幅", "快速地", "迅速地", "飞快地"),
    },
    "side": {"left": ("左",), "right": ("右",), "up": ("上",), "down": ("下",)},
    "corner": {"left up": ("左上",), "right up": ("右上",), "left down": ("左下",), "right down": ("右下",)},
    "turn": {"clockwise": ("顺时针",), "counterclockwise": ("逆时针",)},
    "turned": {"clockwise": ("逆时针",), "counterclockwise": ("顺时针",)},
    "act": {
        "sideways": ("向{side}摇", "向{side}移动", "向{side}平移"),
        "vertical": ("向{side}摇", "向{side}移动"),
        "zoom in": ("推近", "向前推", "推进"),
        "zoom out": ("拉远", "向后拉", "后退"),
        "roll": ("{turn}旋转", "{turn}转动"),
    },
    "colour": {
        "red": ("红色",), "green": ("绿色",), "blue": ("蓝色",), "yellow": ("黄色",), "orange": ("橙色",),
        "purple": ("紫色",), "white": ("白色",), "black": ("黑色",), "pink": ("粉色",),
    },
}  # fmt: skip

_WORDINGS = {
    ANY: ("{camera}{adv}{act}", "{adv}{act}", "让{camera}{adv}{act}"),
    "sideways": (
        "镜头{adv}向{side}摇", "镜头{adv}向{side}移动", "镜头{adv}向{side}平移", "{adv}向{side}摇镜头",
        "视角{adv}向{side}移动", "视角{adv}向{side}转", "镜头{adv}往{side}移", "把镜头{adv}移向{side}边",
        "{camera}{adv}转向{side}边", "{camera}{adv}横移到{side}边", "{camera}{adv}向{side}转动",
        "{camera}向{side}{adv}横摇",
        "镜头围绕主体{adv}向{side}环绕", "{adv}向{side}环绕拍摄", "{camera}{adv}{side}移",
    ),
    "vertical": (
        "镜头{adv}向{side}摇", "镜头{adv}向{side}移动", "{adv}向{side}摇镜头", "视角{adv}向{side}移动",
        "镜头{adv}往{side}移", "{camera}{adv}{side}移", "{camera}{adv}{side}摇", "把镜头{adv}移向{side}方",
        "{camera}{adv}转向{side}方", "{camera}{adv}向{side}倾斜", "摇臂{adv}向{side}移动",
    ),
    "pan up": ("{camera}{adv}上升", "{camera}{adv}抬高", "{camera}{adv}上仰", "镜头{adv}升高"),
    "pan down": ("{camera}{adv}下降", "{camera}{adv}降低", "{camera}{adv}下俯", "镜头{adv}降下"),
    "zoom in": (
        "镜头{adv}推近", "镜头{adv}拉近", "{adv}推近", "{adv}推镜头", "镜头{adv}放大", "画面{adv}放大",
        "镜头{adv}向前推", "镜头{adv}靠近主体", "{camera}{adv}向前移动", "{camera}{adv}推进", "{adv}拉近镜头",
        "变焦{adv}推近", "视角{adv}靠近", "镜头{adv}前移", "{camera}{adv}靠近",
    ),
    "zoom out": (
        "镜头{adv}拉远", "{adv}拉远", "{adv}拉远镜头", "镜头{adv}缩小", "画面{adv}缩小", "镜头{adv}向后拉",
        "镜头{adv}远离主体", "{camera}{adv}后退", "{camera}{adv}向后移动", "变焦{adv}拉远", "视野{adv}变宽",
        "镜头{adv}后移", "镜头{adv}退后", "{camera}{adv}远离",
    ),
    "roll": (
        "镜头{adv}{turn}旋转", "镜头{adv}{turn}转动", "{camera}{adv}{turn}旋转", "{camera}{adv}{turn}滚转",
        "{adv}{turn}旋转镜头", "{adv}{turn}旋转", "镜头绕光轴{adv}{turn}旋转", "把镜头{adv}{turn}转",
        "地平线{adv}{turned}转动", "视角{adv}{turn}旋转", "画面{adv}{turned}转动",
    ),
    "still": (
        "静止镜头", "固定镜头", "镜头不动", "镜头保持静止", "相机不动", "画面静止", "没有任何运动", "镜头固定不动",
        "摄像机静止", "镜头没有移动", "一切静止", "无镜头运动", "定格画面", "视角保持不变", "不摇镜头也不变焦",
    ),
    "still camera": ("固定镜头", "镜头不动", "镜头固定不动", "相机不动"),
    "diagonal": (
        "镜头{adv}向{corner}方摇", "镜头{adv}向{corner}方移动", "{camera}{adv}向{corner}移动", "{adv}向{corner}方平移",
        "视角{adv}移向{corner}角", "{camera}{adv}斜着向{corner}摇", "{adv}向{corner}摇镜头",
        "把镜头{adv}移向{corner}方",
    ),
    "pair": (
        "{camera}{adv}{act1}的同时{act2}", "{camera}{adv}{act1}并{act2}", "{camera}一边{adv}{act1}一边{act2}",
        "{adv}{act1}，同时{act2}", "{camera}{adv}{act1}，并且{act2}", "{camera}{adv}{act1}，{act2}",
        "{adv}{act1}并{act2}", "视角{adv}{act1}，同时{act2}",
    ),
}  # fmt: skip

_HELD_OUT = {
    "sideways": ("我们的视线{adv}向{side}移", "拍摄时{adv}朝{side}侧摇", "运镜：{side}摇"),
    "vertical": ("我们的视线{adv}向{side}移", "拍摄时{adv}朝{side}摇", "运镜：{side}摇"),
    "zoom in": ("我们的视线{adv}推近", "拍摄时{adv}朝主体推进", "运镜：推"),
    "zoom out": ("我们的视线{adv}拉远", "拍摄时{adv}从主体退开", "运镜：拉"),
    "roll": ("我们的视线{adv}{turn}旋转", "拍摄时{adv}{turn}转", "运镜：{turn}转"),
    "still": ("我们的视线完全不动", "拍摄时纹丝不动", "运镜：无"),
    "still camera": ("拍摄镜头纹丝不动", "运镜：无"),
    "diagonal": ("我们的视线{adv}向{corner}移", "运镜：向{corner}摇"),
    "pair": ("我们的视线{adv}{act1}且{act2}", "运镜：{act1}加{act2}"),
}  # fmt: skip

CHINESE = Language(
    name="Chinese",
    slots=_SLOTS,
    wordings=_WORDINGS,
    held_out=_HELD_OUT,
    sprites={"ball": "一个{colour}小球向{side}移动", "square": "一个{colour}方块向{side}移动"},
    openings=("一张照片，", "风景，", "视频：", "画面中，", "户外，", "一个场景，", "写实照片，"),
    space="",
    comma="，",
    full_stop="。",
    swaps=False,
)
