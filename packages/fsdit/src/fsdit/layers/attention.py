"""Self-attention with separate inputs for queries and for keys and values, and cross-attention to text and image.

Shapes: tokens `B N D`, text context `B L D`, image context `B M D`; inside, heads are `B N heads head_dim`.
Queries and keys pass an RMS norm over their full width before they are split into heads (Wan2.1). K and V share their
input and hence one projection; Q has an input of its own under Layer Memory (paper §2.3.1, eq. 8).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from fsdit.layers.modulation import FullWidthRMSNorm
from fsdit.layers.rope import Rotary, rotate
from fsdit.parallel import ContextParallel


class _Attention(nn.Module, AttentionModuleMixin):
    """Heads around diffusers' attention dispatcher, so that `model.set_attention_backend` chooses the kernel."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.norm_q = FullWidthRMSNorm(dim, eps=eps)
        self.norm_k = FullWidthRMSNorm(dim, eps=eps)

    @property
    def processor(self) -> _Attention:
        """diffusers keeps the chosen back end on an attention's processor; here that is the module itself."""
        return self

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """softmax(QKᵀ/√head_dim)V for `B N heads head_dim`; of that shape. One key and value serve any batch."""
        if len(key) == 1 < len(query):
            key, value = key.expand(len(query), -1, -1, -1), value.expand(len(query), -1, -1, -1)
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend)


class SelfAttention(_Attention):
    """W_o·Attn(Q, K, V) with Q from the block's own input and K, V from what Layer Memory retrieved.

    Attributes:
        context_parallel: The processes that share the sequence, if several do (`fsdit.parallel`).
    """

    context_parallel: ContextParallel | None = None

    def forward(self, hidden: Tensor, memory: Tensor, rotary: Rotary) -> Tensor:
        """hidden and memory `B n D` -> `B n D`. Without Layer Memory both are the same tensor."""
        key, value = self.to_kv(memory).chunk(2, dim=-1)
        query = rotate(self.heads(self.norm_q(self.to_q(hidden))), rotary)
        key = rotate(self.heads(self.norm_k(key)), rotary)
        if self.context_parallel is None:
            out = self.attend(query, key, self.heads(value))
        else:
            out = self.context_parallel.attend(query, key, self.heads(value), self.attend, rotary.length)
        return self.to_out(out.flatten(2))


class KeysValues(NamedTuple):
    """What a cross-attention makes of its context: keys and values `B L heads head_dim` of the text, `B M heads
    head_dim` of the image (None without image). They are the same in every step of a sampling run."""

    text_key: Tensor
    text_value: Tensor
    image_key: Tensor | None = None
    image_value: Tensor | None = None


class CrossAttention(_Attention):
    """Attention to the text and, with the same queries, to the image; the two results are summed, then projected.

    Text padding is not masked: the zero rows behind a prompt are keys like any other, as Wan2.1 was trained.
    """

    def __init__(self, dim: int, num_heads: int, eps: float, image: bool) -> None:
        super().__init__(dim, num_heads, eps)
        self.to_kv_image = nn.Linear(dim, 2 * dim) if image else None
        self.norm_k_image = FullWidthRMSNorm(dim, eps=eps) if image else None

    def keys_values(self, text: Tensor, image: Tensor | None) -> KeysValues:
        """text `B L D` and image `B M D` (None only if built without image)."""
        key, value = self.to_kv(text).chunk(2, dim=-1)
        made = KeysValues(self.heads(self.norm_k(key)), self.heads(value))
        if self.to_kv_image is None or self.norm_k_image is None or image is None:
            return made
        key, value = self.to_kv_image(image).chunk(2, dim=-1)
        return made._replace(image_key=self.heads(self.norm_k_image(key)), image_value=self.heads(value))

    def forward(self, hidden: Tensor, context: KeysValues) -> Tensor:
        """hidden `B N D` -> `B N D`."""
        query = self.heads(self.norm_q(self.to_q(hidden)))
        out = self.attend(query, context.text_key, context.text_value)
        if context.image_key is not None and context.image_value is not None:
            out = out + self.attend(query, context.image_key, context.image_value)
        return self.to_out(out.flatten(2))
