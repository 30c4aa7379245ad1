"""What cross-attention sees, and where a sampling run keeps what the layers make of it.

Shapes: text `B L D`, image `B M D`, both at the model's width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fsdit.layers.attention import CrossAttention, KeysValues


class ContextCache:
    """One sampling run's state: what each layer made of the prompt and the image.

    That depends on the two alone. A run that gives the model the same cache in all its steps computes it once: a layer
    that is in the cache is not asked again. For inference: what is kept carries no gradients. Other tensors empty the
    cache; values that change in place, of the tensors or of the weights, go unnoticed.
    """

    def __init__(self) -> None:
        self._source: tuple[Tensor, Tensor | None] | None = None
        self._made: dict[nn.Module, Any] = {}

    def begin(self, text: Tensor, image: Tensor | None) -> None:
        """Forget what was made of other tensors than these two."""
        if self._source is None or self._source[0] is not text or self._source[1] is not image:
            self._source, self._made = (text, image), {}

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._made

    def __getitem__(self, layer: nn.Module) -> Any:
        return self._made[layer]

    def __setitem__(self, layer: nn.Module, made: Any) -> None:
        self._made[layer] = made


class Embedded(NamedTuple):
    """Text and image, of which each cross-attention makes its keys and values, and the cache of a sampling run."""

    text: Tensor
    image: Tensor | None
    cache: ContextCache | None = None

    def keys_values(self, attention: CrossAttention) -> KeysValues:
        """The keys and values of one block, which calls this in its forward: only there are its weights sure to be
        on the device."""
        if self.cache is None:
            return attention.keys_values(self.text, self.image)
        if attention not in self.cache:
            self.cache[attention] = attention.keys_values(self.text, self.image)
        kept: KeysValues = self.cache[attention]
        return kept
