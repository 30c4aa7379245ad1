"""What the routers of Layer Memory choose: the weight that each layer gives each earlier state (paper §2.3.1, Fig. 6).

A router's weights differ from token to token, from clip to clip and with the noise. The map holds, for every layer
l = 2 ... L and every state j = 0 ... l-1 (0 is the patch embedding), their largest value and their mean over all of
these. Layer 1 has one state and no router.

Shapes: latents `B C t h w`, normalised.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from fsae import FSAE
from fsae.data.datasets import VideoFolder
from fsae.errors import UserError
from fsae.evaluation.charts import heat_map
from fsae.storage.files import atomic_path
from fsdit.conditioning.encoders import ImageEncoder, TextEncoder
from fsdit.conditioning.inputs import Context, model_input, training_condition, training_context
from fsdit.flow.path import TIMESTEPS, FlowSchedule, interpolate
from fsdit.layers.layer_memory import LayerRouter
from fsdit.model import FSDiT
from fsdit.training.data import CachedLatents


@dataclass(frozen=True)
class RouterMap:
    """Weights over all tokens, clips and noise levels that were seen.

    Attributes:
        maximum: `L-1 L` float64, layer l in row l-2, state j in column j; nan where the layer has no such state.
        mean: of the same form.
        tokens: how many tokens each figure is of.
    """

    maximum: NDArray[np.float64]
    mean: NDArray[np.float64]
    tokens: int

    def save(self, picture: str | Path, table: str | Path, title: str) -> None:
        """Write the maxima as a picture and all figures as a table, both whole or not at all.

        Args:
            picture: a PNG file; rows are layers, columns states.
            table: a CSV file with the columns layer, state, max and mean.
            title: of the picture.
        """
        layers, states = self.maximum.shape
        rows = ("layer", [str(layer + 2) for layer in range(layers)])
        columns = ("state (0: patch embedding, j: output of layer j)", [str(state) for state in range(states)])
        with atomic_path(picture) as path:
            heat_map(self.maximum, title, rows, columns).save(path)
        with atomic_path(table) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("layer", "state", "max", "mean"))
            for layer, state in zip(*np.tril_indices(layers, 1, states), strict=True):
                figures = (f"{values[layer, state]:.6g}" for values in (self.maximum, self.mean))
                writer.writerow((layer + 2, state, *figures))


@dataclass
class RouterTally:
    """Running figures of the weights, filled by hooks on the routers.

    Attributes:
        largest: for each layer, `l` float64.
        total: for each layer, sums over the tokens, `l` float64.
        tokens: for each layer, how many.
    """

    largest: dict[int, Tensor] = field(default_factory=dict)
    total: dict[int, Tensor] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    def add(self, layer: int, weights: Tensor) -> None:
        """Take account of weights `B N l`."""
        flat = weights.detach().flatten(0, -2).double()
        largest, total = flat.amax(dim=0), flat.sum(dim=0)
        if layer in self.tokens:
            largest, total = torch.maximum(largest, self.largest[layer]), total + self.total[layer]
        self.largest[layer], self.total[layer] = largest, total
        self.tokens[layer] = self.tokens.get(layer, 0) + len(flat)

    def result(self) -> RouterMap:
        """The map of what was seen."""
        layers = max(self.tokens, default=0)
        if not layers:
            raise ValueError("the model was not run while its routers were watched")
        maximum, mean = np.full((2, layers - 1, layers), np.nan)
        for layer in self.tokens:
            maximum[layer - 2, :layer] = self.largest[layer].cpu().numpy()
            mean[layer - 2, :layer] = (self.total[layer] / self.tokens[layer]).cpu().numpy()
        return RouterMap(maximum, mean, self.tokens[layers])


@contextmanager
def watch_routers(model: FSDiT) -> Iterator[RouterTally]:
    """A context in which every run of the model adds its routers' weights, gates included, to the tally.

    Raises:
        UserError: the model has no Layer Memory.
    """
    routers = [(layer, b.router) for layer, b in enumerate(model.blocks, start=1) if isinstance(b.router, LayerRouter)]
    if not routers:
        raise UserError("the model has no router to look at; give one of several layers, with layer_memory on")
    tally = RouterTally()
    hooks = [
        router.register_forward_hook(lambda _module, _inputs, weights, layer=layer: tally.add(layer, weights))
        for layer, router in routers
    ]
    try:
        yield tally
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def map_routers(
    model: FSDiT,
    clips: Iterable[tuple[Tensor, Context]],
    schedule: FlowSchedule,
    levels: int,
    generator: torch.Generator,
) -> RouterMap:
    """Run the model on noised clips, as in training, at each noise level of a sampling grid.

    Args:
        model: the transformer, with Layer Memory.
        clips: batches of clean latents `B C t h w` with their text and image embeddings; the first latent is given
            to the model, as in image-to-video; of single frames only the text is.
        schedule: of the noise.
        levels: how many levels, from 1 downwards (`FlowSchedule.sigmas`).
        generator: of the noise; on the CPU.

    Raises:
        UserError: the model has no Layer Memory.
    """
    sigmas = torch.tensor(schedule.sigmas(levels)[:-1])
    with watch_routers(model) as tally:
        for latents, context in clips:
            condition = training_condition(latents, model.config.mask_channels)
            context = training_context(context, latents.shape[2])
            # Clip by clip, so that the noise does not depend on what shares a batch.
            noise = torch.stack([torch.randn(clip.shape, generator=generator) for clip in latents]).to(latents)
            for sigma in sigmas.to(latents.device):
                times = (TIMESTEPS * sigma).expand(len(latents))
                model(model_input(interpolate(latents, noise, sigma), condition), times, context.text, context.image)
    return tally.result()


@torch.no_grad()
def encoded_clips(
    clips: VideoFolder,
    samples: int,
    batch_size: int,
    autoencoder: FSAE,
    encoders: tuple[TextEncoder, ImageEncoder],
) -> Iterator[tuple[Tensor, Context]]:
    """Batches for `map_routers` of videos or images, encoded as in training, on the encoders' device.

    Args:
        clips: the data set.
        samples: how many clips at most, spread over it.
        batch_size: clips in a batch.
        autoencoder: gives the latents.
        encoders: of the captions and of the first frames.
    """
    device = next(autoencoder.parameters()).device
    text_encoder, image_encoder = encoders
    loader = DataLoader(Subset(clips, _spread(len(clips), samples)), batch_size=batch_size)
    for batch in tqdm(loader, desc="watching routers", unit="batch"):
        video = batch["video"].to(device)
        context = Context(text_encoder(batch["caption"]).embeddings, image_encoder(video[:, :, 0]))
        yield autoencoder.encode(video).float(), context


def cached_clips(
    cache: CachedLatents, samples: int, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Context]]:
    """Batches for `map_routers` from a cache; see `encoded_clips`. A batch is of one shape, so some are smaller."""
    cache.check_pairs(False)
    if cache.empty_text is None:
        raise UserError("the cache was made without encoders; make one with them by 'fsdit cache --encoders FOLDER'")
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in _spread(len(cache), samples):
        groups.setdefault(tuple(cache.shapes[index].tolist()), []).append(index)
    batches = [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]
    for indices in tqdm(batches, desc="watching routers", unit="batch"):
        batch = cache.collate([cache[index] for index in indices])
        context = Context(batch["text"].to(device), batch["image_embedding"].to(device))
        yield batch["latents"].to(device), context


def _spread(length: int, samples: int) -> list[int]:
    """At most `samples` of the indices below `length`, evenly spread."""
    count = min(samples, length)
    return [number * length // count for number in range(count)]
