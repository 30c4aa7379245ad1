"""`fsdit cache`: a list of clips and captions becomes sharded files of latents and embeddings (paper §2.3.2).

The list of samples follows from the settings: for each bucket, for each source, its files, `clips_per_file` times.
Sample N is in shard N // shard_size, and shard k is made by process k % ranks, without a word to the others. So the
files do not depend on how many processes make them, or how often they are stopped.

The encoders take turns: the text encoder, the largest, for all captions; then the image encoder and the autoencoder
together, so that each clip is read once. Pairs are a clip's latents and those of its half-size copy (paper §2.4.1).
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from fsae import FSAE
from fsae.data.buckets import BucketedClips
from fsae.data.video import to_video_tensor
from fsae.devices import choose_device
from fsae.errors import UserError
from fsae.storage.files import check_folder
from fsae.transcoding.fingerprints import encoder_fingerprint
from fsdit.conditioning.encoders import ImageEncoder, resize_for_clip
from fsdit.conditioning.folders import (
    image_encoder_fingerprint,
    load_image_encoder,
    load_text_encoder,
    loaded,
    text_encoder_fingerprint,
)
from fsdit.preparation import shards
from fsdit.preparation.config import CacheConfig
from fsdit.preparation.pairs import check_pair_size, encode_pair
from fsdit.preparation.prompts import PromptCache
from fsdit.training.data import report_missing_captions

_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

In = TypeVar("In")
Out = TypeVar("Out")


class Place(NamedTuple):
    """A sample of the list, before it is read: `item` of the clips, drawn for the `epoch`-th time."""

    number: int
    bucket: int
    source: int
    item: int
    epoch: int


class Clip(NamedTuple):
    """A sample that was read, `3 T H W` in [-1, 1], and its span; or why it could not be."""

    place: Place
    video: Tensor | None
    span: tuple[float, float] = (0.0, 0.0)
    error: str = ""


@dataclass(frozen=True)
class CacheReport:
    """What a process has done.

    Attributes:
        folder: The cache.
        samples: Samples in this process's shards.
        made, kept: Shards that it made now, and that were finished before.
        missing: Shards of all processes that are still to be made.
        skipped: Each of its files that could not be read, and why.
    """

    folder: Path
    samples: int
    made: int
    kept: int
    missing: int
    skipped: dict[str, str]


def make_cache(config: CacheConfig, clips: Any = None) -> CacheReport:
    """Make a process's shards of a cache, those that are not finished.

    Args:
        config: What is encoded, by what, and where it goes.
        clips: With what `BucketedClips` has of `buckets`, `entries`, `entry` and `read`; those of `config` if None.

    Raises:
        UserError: the folder holds another cache or other things, or cannot be written; nothing can be read; a part
            that does not fit.
    """
    folder = Path(config.output)
    check_folder(folder)
    shards.check_place(folder)
    device = choose_device(config.device)
    if clips is None:
        clips = BucketedClips(config.clips.mixture(config.data), config.seed)
    places = Places(clips, config.clips_per_file)
    header = _header(config, places)
    shards.begin(folder, header)
    if config.rank == 0:
        report_missing_captions(clips.entries)
    own = range(config.rank, header.shards, config.ranks)
    for number in own:
        shards.remove_remains(folder, number)
    done = {number: shards.finished_shard(folder, number, config.verify) for number in own}
    size = config.shard_size
    todo = {n: range(n * size, min((n + 1) * size, len(places))) for n in own if done[n] is None}
    prompts = None
    if config.encoders:
        prompts = PromptCache(config.prompts or folder / "prompts", header.text_encoder, config.text_len)
        captions = (clips.entry(places[number].item).caption for chosen in todo.values() for number in chosen)
        prompts.fill(chain([""], captions), partial(load_text_encoder, config.encoders, config.text_len), device)
        shards.write_empty(folder, prompts.require("").rows)
    if todo:
        _encode(config, header, places, prompts, todo)
    finished = [shards.read_shard(folder, number) for number in own]
    return CacheReport(
        folder=folder,
        samples=sum(len(shard.samples) for shard in finished),
        made=len(todo),
        kept=len(own) - len(todo),
        missing=sum(shards.finished_shard(folder, number) is None for number in range(header.shards)),
        skipped=dict(pair for shard in finished for pair in shard.skipped),
    )


class Places(Sequence[Place]):
    """The samples of a cache in their order, each worked out when it is asked for.

    Args:
        clips: As for `make_cache`.
        clips_per_file: How often each of its items is taken.
    """

    def __init__(self, clips: Any, clips_per_file: int) -> None:
        self.clips, self.clips_per_file = clips, clips_per_file
        numbered = [enumerate(bucket.members) for bucket in clips.buckets]
        groups = [(b, source, len(part[1])) for b, parts in enumerate(numbered) for source, part in parts]
        self._groups = [group[:2] for group in groups]
        self._ends = list(accumulate(group[2] for group in groups))

    def __len__(self) -> int:
        return self._ends[-1] * self.clips_per_file

    def __getitem__(self, number: int) -> Place:  # type: ignore[override]
        item, epoch = divmod(range(len(self))[number], self.clips_per_file)
        return Place(number, *self._groups[bisect_right(self._ends, item)], item, epoch)


def _header(config: CacheConfig, places: Places) -> shards.Header:
    clips = places.clips
    with loaded(partial(_load_autoencoder, config.autoencoder)) as autoencoder:
        for bucket in clips.buckets:
            autoencoder.latent_shape(bucket.frames, *bucket.size)
            if config.pairs:
                check_pair_size(autoencoder, *bucket.size)
        fingerprint = encoder_fingerprint(autoencoder)
    digest = hashlib.sha256()
    for place in places:
        media, caption = clips.entry(place.item)
        digest.update(json.dumps([*place, media.member or media.path.name, media.start, media.end, caption]).encode())
    return shards.Header(
        autoencoder=fingerprint,
        text_encoder=text_encoder_fingerprint(config.encoders) if config.encoders else "",
        image_encoder=image_encoder_fingerprint(config.encoders) if config.encoders else "",
        clips=asdict(config.clips.mixture(config.data)),
        buckets=[
            {
                "frames": bucket.frames,
                "size": list(bucket.size),
                "batch_size": bucket.batch_size,
                "share": bucket.share,
                "weights": [weight for weight, _ in bucket.members],
            }
            for bucket in clips.buckets
        ],
        data=digest.hexdigest(),
        samples=len(places),
        shard_size=config.shard_size,
        clips_per_file=config.clips_per_file,
        latents=config.latents,
        text_len=config.text_len if config.encoders else 0,
        seed=config.seed,
        pairs=config.pairs,
        image_size=0 if config.encoders else config.image_size,
    )


def _load_autoencoder(folder: str) -> FSAE:
    """An autoencoder that only encodes."""
    model = FSAE.from_pretrained(folder)
    del model.decoder
    return model


# --- encoding


def _encode(
    config: CacheConfig,
    header: shards.Header,
    places: Places,
    prompts: PromptCache | None,
    todo: dict[int, range],
) -> None:
    """Make the shards in `todo`, given with the numbers of their samples, one after the other."""
    clips = places.clips

    def read(place: Place) -> Clip:
        try:
            pixels, span = clips.read(place.item, place.epoch)
        except UserError as error:
            return Clip(place, None, error=str(error))
        return Clip(place, to_video_tensor(torch.from_numpy(pixels)), span)

    chosen_places = (places[number] for chosen in todo.values() for number in chosen)
    device = choose_device(config.device)
    with (
        loaded(partial(_load_autoencoder, config.autoencoder), device) as autoencoder,
        loaded(partial(load_image_encoder, config.encoders), device) if prompts else nullcontext() as image_encoder,
        closing(ahead(read, chosen_places, config.readers)) as stream,
        tqdm(total=sum(map(len, todo.values())), desc="encoding clips", unit="clip") as progress,
        torch.inference_mode(),
    ):
        for number, chosen in todo.items():
            tensors: dict[str, Tensor] = {}
            samples: list[shards.SampleRecord] = []
            skipped: list[tuple[str, str]] = []
            read_clips = _readable(islice(stream, len(chosen)), clips, skipped, progress)
            for batch in _batches(read_clips, config.batch_size):
                encoded = encode_batch(config, autoencoder, image_encoder, batch)
                for clip, *parts in zip(batch, *encoded.values(), strict=True):
                    values = dict(zip(encoded, parts, strict=True))
                    sample = _sample(clips, prompts, clip, values)
                    samples.append(sample)
                    if prompts:
                        values["text"] = prompts.require(sample.caption).rows
                    names = header.names(sample.number, sample.text)
                    tensors |= {name: values[key] for key, name in names.items()}
            shards.write_shard(Path(config.output), number, tensors, samples, skipped)


def encode_batch(
    config: CacheConfig, autoencoder: FSAE, image_encoder: ImageEncoder | None, batch: list[Clip]
) -> dict[str, Tensor]:
    """What `shards.Header.names` names of clips of one size, on the CPU; not the text."""
    video = torch.stack([clip.video for clip in batch if clip.video is not None])
    video = video.to(next(autoencoder.parameters()).device)
    memory = int(config.memory_gb * 1e9) or None
    if config.pairs:
        low, high = encode_pair(autoencoder, video, memory)
        latents = {"low": low, "high": high}
    else:
        latents = {"latents": autoencoder.encode(video, memory=memory)}
    values = {name: value.to(_DTYPES[config.latents]).cpu() for name, value in latents.items()}
    if image_encoder is None:
        return {**values, "image": resize_for_clip(video[:, :, 0], config.image_size).half().cpu()}
    return {**values, "image_embedding": image_encoder(video[:, :, 0]).cpu()}


def _sample(
    clips: BucketedClips, prompts: PromptCache | None, clip: Clip, values: dict[str, Tensor]
) -> shards.SampleRecord:
    place, entry = clip.place, clips.entry(clip.place.item)
    sizes = [values[name] for name in ("low", "high", "latents") if name in values]
    if not all(bool(latents.isfinite().all()) for latents in sizes):
        raise UserError(
            f"the latents of {entry.media} are not finite numbers in {_NAMES[sizes[0].dtype]}; keep them in fp32, or "
            "look at the autoencoder's statistics"
        )
    c, t, h, w = sizes[-1].shape
    return shards.SampleRecord(
        number=place.number,
        bucket=place.bucket,
        source=place.source,
        path=str(entry.media),
        start=clip.span[0],
        end=clip.span[1],
        caption=entry.caption,
        text=prompts.key(entry.caption)[:32] if prompts else "",
        shape=(c, t, h, w),
    )


def _readable(
    read: Iterable[Clip], clips: BucketedClips, skipped: list[tuple[str, str]], progress: tqdm
) -> Iterator[Clip]:
    """The clips that were read; the others are noted in `skipped`."""
    for clip in read:
        progress.update()
        if clip.video is None:
            skipped.append((str(clips.entry(clip.place.item).media), clip.error))
        else:
            yield clip


def _batches(clips: Iterable[Clip], size: int) -> Iterator[list[Clip]]:
    """Lists of up to `size` clips that follow one another and are of one bucket."""
    for _, group in groupby(clips, key=lambda clip: clip.place.bucket):
        while batch := list(islice(group, size)):
            yield batch


def ahead(function: Callable[[In], Out], items: Iterable[In], threads: int) -> Generator[Out]:
    """`map` in threads: while one result is used, as many further ones as there are threads are made."""
    waiting: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
