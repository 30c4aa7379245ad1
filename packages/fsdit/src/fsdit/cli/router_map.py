"""`fsdit router-map`: a picture of what Layer Memory's routers choose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from fsae.bounds import Bound, Checked, Count
from fsae.commandline import read_settings
from fsae.data.config import Frames, Sampling, Side
from fsae.errors import UserError
from fsae.storage.files import check_writable

Picture = Annotated[str, Bound("a name that ends in .png", lambda name: Path(name).suffix == ".png")]


@dataclass(frozen=True)
class RouterMapConfig(Checked):
    """Which model is looked at, on what, and where the map goes.

    Attributes:
        model: Folder of a saved FSDiT.
        output: The picture, NAME.png; all figures go to NAME.csv beside it.
        data: Folder of videos and images, or a .jsonl or .csv list with the columns path and caption.
        autoencoder: Folder of the saved FSAE that encodes data.
        encoders: Folder with text_encoder, tokenizer and image_encoder, for data.
        cache: Folder that "fsdit cache" made, in place of data.
        frames: Frames of a clip of data, 1 + 4k; a cache has its own, as all that follows down to stride.
        height: Clips of data are resized and cropped to this height, a multiple of 64.
        width: The clips' width, a multiple of 64.
        stride: Take every stride-th frame of a file of data.
        samples: How many clips at most, spread over the data or cache.
        batch_size: Clips of one size that the model sees together.
        levels: How many noise levels each clip is seen at, those of a sampling with as many steps.
        shift: Of the noise levels towards 1.
        precision: What the model computes in, "fp32" or "bf16".
        device: Such as cpu or cuda; null takes the accelerator if there is one.
        seed: Decides the noise, and where in a file of data a clip starts.
    """

    model: str
    output: Picture
    data: str = ""
    autoencoder: str = ""
    encoders: str = ""
    cache: str = ""
    frames: Frames = 17
    height: Side = 256
    width: Side = 256
    stride: Count = 1
    samples: Count = 16
    batch_size: Count = 4
    levels: Count = 10
    shift: float = 5.0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.data) == bool(self.cache):
            given = "both data and cache are" if self.data else "neither data nor cache is"
            raise UserError(f"{given} given; give the clips to look at as one of the two")
        for name in ("autoencoder", "encoders"):
            if self.data and not getattr(self, name):
                raise UserError(f"data is given without {name}; give the folder of what encodes its clips")
        unset = {field.name: field.default for field in fields(self)}
        for name in ("autoencoder", "encoders", "frames", "height", "width", "stride"):
            if self.cache and getattr(self, name) != unset[name]:
                raise UserError(f"{name} is given with cache, whose clips are cut and encoded already; leave it out")


def main(argv: list[str]) -> int:
    """`fsdit router-map`: every field of RouterMapConfig is a flag and a key of the YAML file."""
    description = (
        "Run a transformer on noised clips and draw, for each layer, the largest weight that any token gives each "
        "earlier layer's output (paper, Fig. 6); the table beside the picture has the means as well."
    )
    config = read_settings("fsdit router-map", description, RouterMapConfig, argv)
    table = str(Path(config.output).with_suffix(".csv"))
    for path in (config.output, table):
        check_writable(path)

    import torch

    from fsae.devices import choose_device
    from fsdit.flow.path import FlowSchedule
    from fsdit.model import FSDiT
    from fsdit.router_map import map_routers

    device = choose_device(config.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    model = FSDiT.from_pretrained(config.model, torch_dtype=dtype).to(device).eval()
    generator = torch.Generator().manual_seed(config.seed)
    found = map_routers(model, _clips(config, model), FlowSchedule(config.shift), config.levels, generator)
    found.save(config.output, table, f"largest router weight of {found.tokens:,} tokens")
    print(f"saved {config.output} and {table}")
    return 0


def _clips(config: RouterMapConfig, model: Any) -> Iterator[Any]:
    """Batches of latents and embeddings; UserError where they are not what the model takes."""
    from fsae import FSAE
    from fsae.data.datasets import VideoFolder
    from fsdit.conditioning.encoders import Encoders
    from fsdit.conditioning.folders import load_encoders
    from fsdit.router_map import cached_clips, encoded_clips
    from fsdit.training.data import CachedLatents
    from fsdit.training.task import check_widths

    if config.cache:
        cache = CachedLatents(config.cache)
        cache.check_fits(model.config)
        return cached_clips(cache, config.samples, config.batch_size, model.device)
    sampling = Sampling(config.frames, None, config.stride, (config.height, config.width))
    clips = VideoFolder(config.data, sampling, config.seed)
    autoencoder = FSAE.from_pretrained(config.autoencoder).to(model.device).eval()
    autoencoder.latent_shape(config.frames, config.height, config.width)
    encoders = load_encoders(config.encoders, model.config.text_len)
    check_widths(model, encoders, autoencoder)
    encoders = Encoders(encoders.text.to(model.device).eval(), encoders.image.to(model.device).eval())
    return encoded_clips(clips, config.samples, config.batch_size, autoencoder, encoders)
