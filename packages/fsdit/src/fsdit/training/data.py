"""Training samples of the transformer.

A sample is one of three:

- a clip, `{"video": 3 T H W in [-1, 1], "caption": str}` (`fsae.data.datasets.VideoFolder`), encoded on the fly;
- a clip encoded by the autoencoder, `{"latents": C t h w, "caption": str, "image": 3 S S}`, with the first frame at the
  image encoder's size;
- a clip encoded by all encoders, `{"latents": C t h w, "text": L D, "image_embedding": M D', "caption": str}`.

The last two are what `fsdit cache` wrote, without encoders and with them (`CachedLatents`). Its pairs have the latents
`low`, `C t h w`, and `high`, `C t 2h 2w`, in place of `latents`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset

from fsae import FSAE
from fsae.data.buckets import Bucket, BucketOrder
from fsae.data.config import ClipsConfig
from fsae.data.index import Entries
from fsae.data.media import Entry
from fsae.data.order import Cut
from fsae.errors import CheckpointError, UserError
from fsae.shapes import PAPER
from fsae.storage.files import check_folder
from fsae.training.config import ClipTrainingConfig
from fsae.transcoding.fingerprints import encoder_fingerprint
from fsdit.conditioning.encoders import pad_text
from fsdit.conditioning.folders import image_encoder_fingerprint, text_encoder_fingerprint
from fsdit.preparation import shards

PathLike = str | os.PathLike[str]

_OPEN_SHARDS = 64


def report_missing_captions(entries: Entries | Sequence[Entry]) -> None:
    """Say on stderr how many clips of the sources have no caption, if any has none."""
    number = len(entries)
    if isinstance(entries, Entries):
        missing = entries.without_caption()
    else:
        missing = sum(not entry.caption.strip() for entry in entries)
    if missing:
        clips, have = "clip" if number == 1 else "clips", "has" if missing == 1 else "have"
        some, none = f"{missing} of {number} {clips} {have} no caption", f"none of {number} {clips} has a caption"
        print(f"{some if missing < number else none}; 'fsdit caption' writes captions", file=sys.stderr)


def to_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its tensors where the model's weights are."""
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


class CachedLatents(Dataset[dict[str, Any]]):
    """Map-style dataset of what `fsdit cache` wrote; tensors are mapped from the files and read when asked for.

    Items are named in this file's head, all tensors in float32; of a text only the used rows are given.

    It brings its own order, so that each micro-batch has one shape, and `collate` for it. A sample is the same in
    all epochs.

    Args:
        folders: The cache, or several that were made with the same autoencoder and encoders; each then has its share
            of the samples in proportion to its length.

    Attributes:
        pairs: Whether the latents are `low` and `high`.
        empty_text: The embedding of the empty prompt, `L D`, for caption dropout (`pad_text` gives it its rows); None
            where there are no embeddings.
        text_len: Rows of a batch's text.
        settings: What decides the samples, as JSON, for a checkpoint to compare.
        samples: What is known of each sample: path, span, caption, shape.

    Raises:
        UserError: a folder is no cache or an unfinished one, a shard is missing or cut short, or two caches do not
            belong together.
    """

    def __init__(self, folders: PathLike | Sequence[PathLike]) -> None:
        given: Sequence[PathLike] = [folders] if isinstance(folders, str | os.PathLike) else folders
        self.folders = [Path(folder) for folder in given]
        if not self.folders:
            raise UserError("no cache is given; give a folder that 'fsdit cache' made")
        self.headers = [shards.read_header(folder) for folder in self.folders]
        self.check_made_alike(self)
        self.text_len, self.pairs = self.headers[0].text_len, self.headers[0].pairs
        self.empty_text = shards.read_empty(self.folders[0]) if self.headers[0].text_encoder else None
        content = hashlib.sha256()
        lengths: list[list[int]] = [[] for _ in self.folders]  # of the shards of each folder
        self.samples = shards.SampleRecords(self._read_shards(content, lengths))
        self._shards = np.cumsum([0, *(length for of_folder in lengths for length in of_folder)])
        self._folders = np.cumsum([0, *map(len, lengths)])
        self.buckets: list[Bucket] = []
        for number, of_folder in enumerate(lengths):
            if not sum(of_folder):
                raise UserError(f"{self.folders[number]} holds no sample; give a cache in which something was readable")
            self._add_buckets(number, sum(of_folder))
        header = self.headers[0]
        self.settings = {
            "cache": content.hexdigest(),
            **{name: getattr(header, name) for name in ("autoencoder", "text_encoder", "image_encoder", "text_len")},
        }
        self._open: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index, 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}  # open files stay with their process

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """A sample, the same in every epoch; CheckpointError if its shard can no longer be read."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        about, place = self.samples[index], self._place(index)
        try:
            file = self._file(place)
            names = self.headers[place[0]].names(about.number, about.text)
            tensors = {key: file.get_tensor(name).float() for key, name in names.items()}
        except (SafetensorError, OSError) as error:
            path = shards.shard_path(self.folders[place[0]], place[1])
            raise CheckpointError(
                f"{path} cannot be read ({error}); run its 'fsdit cache' again with verify, which makes it anew"
            ) from None
        return {**tensors, "caption": about.caption}

    @property
    def shapes(self) -> NDArray[np.int32]:
        """(C, t, h, w) of each sample's latents, of pairs the high ones; `N 4`."""
        return self.samples.columns.numbers["shape"]

    def order(self, cut: Cut) -> BucketOrder:
        """The order in which a training loop sees the items: each micro-batch is of one bucket, so of one shape."""
        return BucketOrder(self.buckets, cut)

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch of one shape: B captions, text `B text_len D`, and all else stacked."""
        batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
        for name in batch.keys() - {"text", "caption"}:
            batch[name] = torch.stack(batch[name])
        return {**batch, "text": pad_text(batch["text"], self.text_len)} if "text" in batch else batch

    def first_of_size(self, config: ClipTrainingConfig) -> dict[str, Any]:
        """A batch of the first clips of the length and size that are to be validated on; UserError if there is none."""
        frames, height, width = config.clips.shapes[0]
        wanted = PAPER.latent_size(frames, height, width)
        indices = np.flatnonzero((self.shapes[:, 1:] == wanted).all(1)).tolist()
        if not indices:
            videos = {PAPER.video_size(*shape[1:]) for shape in np.unique(self.shapes, axis=0).tolist()}
            there = [f"{length} of {w}x{h}" for length, h, w in sorted(videos)]
            raise UserError(
                f"no clip of the cache has {frames} frames of {width}x{height} pixels to validate on; "
                f"set clips.frames, height and width to what it has ({', '.join(there)}), or loop.validate_every to 0"
            )
        return self.collate([self[index] for index in indices[: config.validation_samples]])

    def check_autoencoder(self, autoencoder: FSAE) -> None:
        """Refuse latents of another autoencoder."""
        if self.headers[0].autoencoder != encoder_fingerprint(autoencoder):
            raise UserError(
                f"the cache {self.folders[0]} was made with another autoencoder than the one that is given; give the "
                "one it was made with, or make a cache with this one"
            )

    def check_fits(self, config: Any) -> None:
        """Refuse latents, and embeddings if there are any, that a transformer of this configuration does not take."""
        pairs = [("latents have", int(self.shapes[0, 0]), config.latent_channels, "channels")]
        if self.empty_text is not None:
            pairs += [
                ("text embeddings have", self.empty_text.shape[1], config.text_dim, "channels"),
                ("image embeddings have", self[0]["image_embedding"].shape[1], config.image_dim, "channels"),
                ("text is cut at", self.text_len, config.text_len, "tokens"),
            ]
        for part, gives, takes, unit in pairs:
            if gives != takes:
                raise UserError(
                    f"the cache's {part} {gives} {unit}, the transformer takes {takes or 'none'}; give a cache made "
                    "with the encoders and text_len that belong to it"
                )

    def check_encoders(self, folder: str) -> None:
        """Refuse embeddings, if there are any, by other encoders than those in a folder."""
        header = self.headers[0]
        if self.empty_text is not None and (header.text_encoder, header.image_encoder) != (
            text_encoder_fingerprint(folder),
            image_encoder_fingerprint(folder),
        ):
            raise UserError(
                f"the cache {self.folders[0]} was made with other encoders than {folder}; give the ones it was made "
                "with, or make a cache with these"
            )

    def check_pairs(self, wanted: bool) -> None:
        """Refuse pairs where single latents are wanted, or the other way round."""
        if self.pairs != wanted:
            what = "no pairs of latents" if wanted else "pairs of latents, which upsampler and refiner learn from"
            with_or_without = "with" if wanted else "without"
            raise UserError(
                f"the cache {self.folders[0]} holds {what}; make one by 'fsdit cache' {with_or_without} --pairs true"
            )

    def check_made_alike(self, other: CachedLatents) -> None:
        """Refuse folders of another data set that were not made as this one's first."""
        first = self.headers[0]
        for folder, header in zip(other.folders, other.headers, strict=True):
            for name in ("autoencoder", "text_encoder", "image_encoder", "text_len", "pairs", "image_size"):
                if getattr(header, name) != getattr(first, name):
                    raise UserError(
                        f"{folder} was cached with another {shards.PARTS[name]} than "
                        f"{self.folders[0]}; give caches that were made alike"
                    )

    def _read_shards(self, content: Any, lengths: list[list[int]]) -> Iterator[list[shards.SampleRecord]]:
        """The samples of each shard; their numbers go to `lengths`, what decides them to `content`."""
        for folder, header, own in zip(self.folders, self.headers, lengths, strict=True):
            for number in range(header.shards):
                shard = shards.read_shard(folder, number)
                content.update(shard.sha256.encode())
                own.append(len(shard.samples))
                yield shard.samples
            content.update(json.dumps(header.buckets).encode())

    def _add_buckets(self, folder: int, length: int) -> None:
        """Take in the buckets of one cache of so many samples."""
        first = self.buckets[-1].first + len(self.buckets[-1]) if self.buckets else 0
        bucket_of, source_of = (self.samples.columns.numbers[name][first:][:length] for name in ("bucket", "source"))
        for number, bucket in enumerate(self.headers[folder].buckets):
            groups = [
                (weight, np.flatnonzero((bucket_of == number) & (source_of == source)).astype(np.int32))
                for source, weight in enumerate(bucket["weights"])
            ]
            members = [(weight, group) for weight, group in groups if len(group)]
            if members:
                (height, width), share = bucket["size"], bucket["share"] * length
                self.buckets.append(
                    Bucket(bucket["frames"], (height, width), bucket["batch_size"], share, first, members)
                )
                first += len(self.buckets[-1])

    def _place(self, index: int) -> tuple[int, int]:
        """The number of a sample's folder, and of its shard there."""
        shard = int(np.searchsorted(self._shards, index, side="right")) - 1
        folder = int(np.searchsorted(self._folders, shard, side="right")) - 1
        return folder, int(shard - self._folders[folder])

    def _file(self, place: tuple[int, int]) -> Any:
        """A shard's open file; those used last are kept."""
        if place not in self._open:
            self._open[place] = safe_open(shards.shard_path(self.folders[place[0]], place[1]), framework="pt")
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(place)
        return self._open[place]


@dataclass(frozen=True)
class Samples:
    """What to train on, what is held out, and the batch of it to validate on (None if the run never does).

    If there is an embedding of the empty prompt, `L D`, the samples hold embeddings and no encoder is needed.
    """

    samples: Any = None
    held_out: Any = None
    batch: Mapping[str, Any] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    empty_text: Tensor | None = None


def read_cache(
    config: ClipTrainingConfig, cache: CachedLatents, held_out: Any, autoencoder: FSAE | None, *, pairs: bool = False
) -> Samples:
    """What a cache holds, once it is known to be of the autoencoder, and to hold `pairs` or none.

    Of `config.clips`, length and size are those to validate on. The samples held out, if not given, are those of the
    cache `config.validation_data`, or this one's.

    Raises:
        UserError: it is not what is wanted, or other settings of clips are given.
    """
    check_folder(config.loop.output_dir)
    for name, value in vars(config.clips).items():
        if name not in ("frames", "height", "width") and value != getattr(ClipsConfig(), name):
            raise UserError(
                f"clips.{name} is given with a cache, in which all clips are cut and encoded; leave clips.{name} out"
            )
    if held_out is None:
        held_out = CachedLatents(config.validation_data) if config.validation_data else cache
    cache.check_pairs(pairs)
    cache.check_made_alike(held_out)
    if autoencoder is not None:
        cache.check_autoencoder(autoencoder)
    empty = None if cache.empty_text is None else pad_text([cache.empty_text], cache.text_len)[0]
    batch = held_out.first_of_size(config) if config.loop.validate_every else None
    return Samples(cache, held_out, batch, cache.collate, empty)
