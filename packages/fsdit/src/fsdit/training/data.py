"""Training samples of the transformer.

A sample is one of three:

- a clip, `{"video": 3 T H W in [-1, 1], "caption": str}` (`fsae.data.datasets.VideoFolder`), encoded on the fly;
- a clip encoded by the autoencoder, `{"latents": C t h w, "caption": str, "image": 3 S S}`, with the first frame at the
  image encoder's size (`CachedClips`, in memory);
- a clip encoded by all encoders, `{"latents": C t h w, "text": L D, "image_embedding": M D', "caption": str}`
  (`CachedLatents`, on disk).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fsae import FSAE
from fsae.data.buckets import Bucket, BucketOrder
from fsae.data.order import Cut
from fsae.data.sources import Entry
from fsae.errors import CheckpointError, UserError
from fsdit.conditioning.encoders import pad_text, resize_for_clip
from fsdit.preparation import shards

PathLike = str | os.PathLike[str]

_OPEN_SHARDS = 64


def report_missing_captions(entries: Sequence[Entry]) -> None:
    """Say on stderr how many clips of the sources have no caption, if any has none."""
    missing, number = sum(not entry.caption.strip() for entry in entries), len(entries)
    if missing:
        clips, have = "clip" if number == 1 else "clips", "has" if missing == 1 else "have"
        some, none = f"{missing} of {number} {clips} {have} no caption", f"none of {number} {clips} has a caption"
        print(f"{some if missing < number else none}; 'fsdit caption' writes captions", file=sys.stderr)


def to_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its tensors where the model's weights are."""
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


class LatentClip(TypedDict):
    """An encoded sample."""

    latents: Tensor
    caption: str
    image: Tensor


class CachedClips(Dataset[LatentClip]):
    """Encoded clips of one size in memory.

    Args:
        latents: `M C t h w`, normalised.
        captions: M.
        images: `M 3 S S`, first frames as `resize_for_clip` leaves them.
    """

    def __init__(self, latents: Tensor, captions: Sequence[str], images: Tensor) -> None:
        if not len(latents) == len(captions) == len(images):
            raise ValueError(f"{len(latents)} latents, {len(captions)} captions and {len(images)} images given")
        self.latents = latents
        self.captions = list(captions)
        self.images = images

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> LatentClip:
        return {
            "latents": self.latents[index].float(),
            "caption": self.captions[index],
            "image": self.images[index].float(),
        }


@torch.no_grad()
def encode_clips(dataset: Any, autoencoder: FSAE, image_size: int, batch_size: int = 1) -> CachedClips:
    """Encode every clip of a map-style dataset once, on the autoencoder's device; images are kept in half precision.

    Args:
        dataset: items `{"video": 3 T H W, "caption": str}`, all of one size.
        autoencoder: gives the latents.
        image_size: S, the image encoder's `image_size`.
        batch_size: clips encoded together.
    """
    device = next(autoencoder.parameters()).device
    latents, captions, images = [], [], []
    for batch in tqdm(DataLoader(dataset, batch_size=batch_size), desc="encoding clips", unit="batch"):
        video = batch["video"].to(device)
        latents.append(autoencoder.encode(video).float().cpu())
        images.append(resize_for_clip(video[:, :, 0], image_size).half().cpu())
        captions.extend(batch["caption"])
    return CachedClips(torch.cat(latents), captions, torch.cat(images))


class CachedSample(TypedDict):
    """A sample of `CachedLatents`, all of float32: latents `C t h w`, text `L D` (the used rows), image embedding
    `M D'` of the first frame."""

    latents: Tensor
    text: Tensor
    image_embedding: Tensor
    caption: str


class CachedLatents(Dataset[CachedSample]):
    """Map-style dataset of what `fsdit cache` wrote; tensors are mapped from the files and read when asked for.

    It brings its own order, so that each micro-batch has one shape, and `collate` for it. A sample is the same in
    all epochs.

    Args:
        folders: The cache, or several that were made with the same autoencoder and encoders; each then has its share
            of the samples in proportion to its length.
        autoencoder: `fsae.transcoding.fingerprints.encoder_fingerprint` of the autoencoder that the latents must be of;
            None takes any.

    Attributes:
        empty_text: The embedding of the empty prompt, `L D`, for caption dropout (`pad_text` gives it its rows).
        text_len: Rows of a batch's text.
        settings: What decides the samples, as JSON, for a checkpoint to compare.
        samples: What is known of each sample: path, span, caption, shape.

    Raises:
        UserError: a folder is no cache or an unfinished one, a shard is missing or cut short, two caches do not belong
            together, or the autoencoder is another one.
    """

    def __init__(self, folders: PathLike | Sequence[PathLike], autoencoder: str | None = None) -> None:
        given: Sequence[PathLike] = [folders] if isinstance(folders, str | os.PathLike) else folders
        self.folders = [Path(folder) for folder in given]
        if not self.folders:
            raise UserError("no cache is given; give a folder that 'fsdit cache' made")
        self.headers = [shards.read_header(folder) for folder in self.folders]
        self._check_made_alike()
        if autoencoder is not None:
            self.check_autoencoder(autoencoder)
        self.text_len = self.headers[0].text_len
        self.empty_text = shards.read_empty(self.folders[0])
        self.samples: list[shards.SampleRecord] = []
        self.buckets: list[Bucket] = []
        self._places: list[tuple[int, int]] = []  # (folder, shard) of each sample
        content = hashlib.sha256()
        lengths = [self._add(number, content) for number in range(len(self.folders))]
        for number, length in enumerate(lengths):
            if not length:
                raise UserError(f"{self.folders[number]} holds no sample; give a cache in which something was readable")
        header = self.headers[0]
        self.settings = {
            "cache": content.hexdigest(),
            **{name: getattr(header, name) for name in ("autoencoder", "text_encoder", "image_encoder", "text_len")},
        }
        self._open: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> CachedSample:
        return self.sample(index, 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}  # open files stay with their process

    def sample(self, index: int, epoch: int) -> CachedSample:
        """A sample; the same in every epoch.

        Raises:
            CheckpointError: its shard can no longer be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        about, place = self.samples[index], self._places[index]
        try:
            file = self._file(place)
            names = (f"latents.{about.number}", f"text.{about.text}", f"image.{about.number}")
            latents, text, image = (file.get_tensor(name).float() for name in names)
        except (SafetensorError, OSError) as error:
            path = shards.shard_path(self.folders[place[0]], place[1])
            raise CheckpointError(
                f"{path} cannot be read ({error}); run its 'fsdit cache' again with verify, which makes it anew"
            ) from None
        return {"latents": latents, "text": text, "image_embedding": image, "caption": about.caption}

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """(C, t, h, w) of each sample's latents."""
        return [sample.shape for sample in self.samples]

    def order(self, cut: Cut) -> BucketOrder:
        """The order in which a training loop sees the items: each micro-batch is of one bucket, so of one shape."""
        return BucketOrder(self.buckets, cut)

    def collate(self, items: Sequence[CachedSample]) -> dict[str, Any]:
        """A batch of one shape: latents `B C t h w`, text `B text_len D`, image_embedding `B M D'`, caption B."""
        return {
            "latents": torch.stack([item["latents"] for item in items]),
            "text": pad_text([item["text"] for item in items], self.text_len),
            "image_embedding": torch.stack([item["image_embedding"] for item in items]),
            "caption": [item["caption"] for item in items],
        }

    def check_autoencoder(self, fingerprint: str) -> None:
        """Refuse latents of another autoencoder.

        Args:
            fingerprint: `fsae.transcoding.fingerprints.encoder_fingerprint`.
        """
        if self.headers[0].autoencoder != fingerprint:
            raise UserError(
                f"the cache {self.folders[0]} was made with another autoencoder than the one that is given; give the "
                "one it was made with, or make a cache with this one"
            )

    def check_fits(self, config: Any) -> None:
        """Refuse embeddings that a transformer does not take.

        Args:
            config: The transformer's, with latent_channels, text_dim, text_len and image_dim.
        """
        item = self[0]
        pairs = [
            ("latents have", item["latents"].shape[0], config.latent_channels, "channels"),
            ("text embeddings have", self.empty_text.shape[1], config.text_dim, "channels"),
            ("image embeddings have", item["image_embedding"].shape[1], config.image_dim, "channels"),
            ("text is cut at", self.text_len, config.text_len, "tokens"),
        ]
        for part, gives, takes, unit in pairs:
            if gives != takes:
                raise UserError(
                    f"the cache's {part} {gives} {unit}, the transformer takes {takes or 'none'}; give a cache made "
                    "with the encoders and text_len that belong to it"
                )

    def verify(self) -> None:
        """Read everything and compare it with its hashes.

        Raises:
            CheckpointError: a file has changed.
        """
        for folder, header in zip(self.folders, self.headers, strict=True):
            for path in shards.verify_shards(folder, [shards.read_shard(folder, n) for n in range(header.shards)]):
                raise CheckpointError(
                    f"{path} is damaged; run its 'fsdit cache' again with verify, which makes it anew"
                )

    def _check_made_alike(self) -> None:
        first = self.headers[0]
        for folder, header in zip(self.folders, self.headers, strict=True):
            for name in ("autoencoder", "text_encoder", "image_encoder", "text_len"):
                if getattr(header, name) != getattr(first, name):
                    raise UserError(
                        f"{folder} was cached with another {name.replace('_encoder', ' encoder')} than "
                        f"{self.folders[0]}; give caches that were made alike"
                    )

    def _add(self, folder: int, content: Any) -> int:
        """Take in one cache's samples and buckets; returns how many samples it has."""
        header, before = self.headers[folder], len(self.samples)
        for number in range(header.shards):
            shard = shards.read_shard(self.folders[folder], number)
            content.update(shard.sha256.encode())
            self.samples += shard.samples
            self._places += [(folder, number)] * len(shard.samples)
        content.update(json.dumps(header.buckets).encode())
        groups: dict[tuple[int, int], list[int]] = {}  # of (bucket, source), which come in this order
        for index, sample in enumerate(self.samples[before:]):
            groups.setdefault((sample.bucket, sample.source), []).append(index)
        added, first = len(self.samples) - before, before
        for number, bucket in enumerate(header.buckets):
            weights = enumerate(bucket["weights"])
            members = [(weight, groups[number, source]) for source, weight in weights if (number, source) in groups]
            if members:
                height, width = bucket["size"]
                share = bucket["share"] * added
                self.buckets.append(
                    Bucket(bucket["frames"], (height, width), bucket["batch_size"], share, first, members)
                )
                first += len(self.buckets[-1])
        return added

    def _file(self, place: tuple[int, int]) -> Any:
        """A shard's open file; those used last are kept."""
        if place not in self._open:
            self._open[place] = safe_open(shards.shard_path(self.folders[place[0]], place[1]), framework="pt")
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(place)
        return self._open[place]
