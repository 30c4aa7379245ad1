"""What a stack of stages is built of, as values: its blocks' style, its stages, and its look at the first frame."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fsae.layers.conv import TimeKind
from fsae.layers.shortcuts import ShortcutKind
from fsae.shapes import Compression


@dataclass(frozen=True)
class BlockStyle:
    """What the blocks and steps of a stage share.

    Attributes:
        time, group: how frames are padded, see `fsae.layers.conv`.
        head_dim: channels a head of the linear attention.
        eps, norm_affine: of the pixel norms.
        noise: weight of the noise of the decoder's residual blocks.
        shortcut: of the steps between stages, see `fsae.layers.shortcuts`.
    """

    time: TimeKind = "causal"
    group: int = 1
    head_dim: int = 32
    eps: float = 1e-5
    norm_affine: bool = True
    noise: float = 0.0
    shortcut: ShortcutKind = "dc-ae"


@dataclass(frozen=True)
class StackConfig:
    """The stages of an encoder or of a decoder, counted from the finest.

    Attributes:
        widths: channels of each stage.
        depths: blocks of each stage.
        latent_channels: channels of a latent; they divide the last width.
        residual_stages: how many of the finest stages are residual convolutions; the others are EfficientViT blocks.
        temporal_stages: how many of the finest stages change the frame rate, by two each, on the way to the next.
        style: what all blocks share.
        matching: whether an encoder compares each latent's frame with the one before (`fsae.layers.matching`).

    Raises:
        ValueError: numbers of stages or of channels that do not fit together.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    latent_channels: int
    residual_stages: int
    temporal_stages: int
    style: BlockStyle
    matching: bool = False

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.depths):
            raise ValueError("widths and depths name different numbers of stages; each needs one value a stage")
        if self.widths[-1] % self.latent_channels:
            raise ValueError(
                f"{self.latent_channels} latent channels do not divide the innermost width {self.widths[-1]}"
            )
        if self.temporal_stages > min(self.residual_stages, len(self.widths) - 1):
            raise ValueError(
                f"{self.temporal_stages} stages change the frame rate, which only residual stages can that have a "
                f"coarser one beside them; give {min(self.residual_stages, len(self.widths) - 1)} or fewer"
            )

    @property
    def compression(self) -> Compression:
        """Pixels and frames that a latent stands for."""
        return Compression.of_stages(len(self.widths), self.temporal_stages)

    def style_of(self, stage: int) -> BlockStyle:
        """The style of one stage, whose group is the frames that stand there for one latent: 4, 2, 1, 1, ..."""
        return replace(self.style, group=self.compression.rate(stage))


@dataclass(frozen=True)
class Injection:
    """How a decoder's stages look at the encoder's features of frame 0 (paper §2.2.3).

    Attributes:
        widths: channels of the features, stage by stage.
        head_dim: channels a head of the attention; a multiple of 4.
        window: side of the attention's aligned windows, in cells of a stage.
        reach: pixels that the offset stands for which a query's feature of 1 asks for; 0 for none.
        sampling: the convolutional stages sample the features along the motion (`fsae.layers.motion`) instead of
            attending to them, those at higher frame rates too.
    """

    widths: tuple[int, ...]
    head_dim: int = 64
    window: int = 128
    reach: float = 0.0
    sampling: bool = False
