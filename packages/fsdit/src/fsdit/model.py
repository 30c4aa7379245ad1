"""FSDiT: Wan2.1-I2V's diffusion transformer over 64x compressed latents, with Layer Memory (paper §2.3.1).

Shapes: latents `B C t h w`; tokens `B N D` with N = t·h·w / prod(patch_size); text `B L text_dim`;
image `B M image_dim`; timestep `B` = 1000·sigma. The input stacks noise, mask and condition on channels
(`fsdit.conditioning.model_input`), the output is the velocity of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ClassVar, Literal, get_args

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from fsae.errors import UserError
from fsae.storage.checkpoint import StrictModelMixin
from fsdit.layers import layer_memory
from fsdit.layers.attention import CrossAttention, KeysValues, SelfAttention
from fsdit.layers.context import ContextCache, Embedded
from fsdit.layers.embeddings import ImageEmbedding, TextEmbedding, TimeEmbedding
from fsdit.layers.layer_memory import LayerRouter, States
from fsdit.layers.modulation import WideLayerNorm, add_gated, at_least_float32, full_precision, modulate
from fsdit.layers.rope import Rotary, rotary_tables
from fsdit.parallel import ContextParallel
from fsdit.presets import PRESETS

MemoryKernel = Literal["auto", "plain", "fused"]


class FSDiTBlock(nn.Module):
    """Block l: self-attention with Layer Memory, cross-attention, feed-forward.

    With Mod(u) = LN(u)·(1 + scale_1) + shift_1 and X_0 ... X_{l-1} the residual states so far:

        H  = Mod(X_{l-1}),   Ĥ = Mod(Σ_j w_j(H)·X_j)            (Ĥ = H without a router)
        X' = X_{l-1} + gate_1 · SelfAttention(Q from H; K, V from Ĥ)
        X" = X' + CrossAttention(norm3(X'))
        X_l = X" + gate_2 · FFN(LN(X")·(1 + scale_2) + shift_2)
    """

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float, image: bool) -> None:
        super().__init__()
        self.eps = eps
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.norm3 = WideLayerNorm(dim, eps=eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps, image)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.router: LayerRouter | None = None
        self.memory_kernel: MemoryKernel = "auto"

    def forward(
        self,
        time: Tensor,
        context: Embedded,
        rotary: Rotary,
        states: States,
        into: Tensor | None = None,
    ) -> Tensor:
        """X_l `B N D`.

        Args:
            time: `B 6 D`.
            context: text and image, with the cache of a sampling run.
            rotary: the tokens' positions.
            states: X_0 ... X_{l-1}; the newest alone is enough without a router. As separate tensors they are
                explicit inputs, which gradient checkpointing keeps and differentiates like any other.
            into: where to write X_l, without gradients.
        """
        modulation = self.modulation + time
        hidden, memory = self._remember(states, modulation[:, 0:1], modulation[:, 1:2])
        keys_values = context.keys_values(self.cross_attn)
        return self._body(states[-1], hidden, memory, modulation, keys_values, rotary, into)

    def _remember(self, states: States, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """H and Ĥ, both `B N D`."""
        form = self.memory_form(states[-1])
        hidden = form.modulate(states[-1], shift, scale, self.eps)
        if self.router is None:
            return hidden, hidden
        return hidden, form.retrieve(states, self.router(hidden), shift, scale, self.eps)

    def memory_form(self, x: Tensor) -> ModuleType:
        """The module whose `record`, `modulate` and `retrieve` Layer Memory runs: of Triton kernels where they are set,
        else on a GPU that has Triton; of plain PyTorch otherwise, and where a compiler traces training, which it cannot
        do through gradients that states collect."""
        fused = self.memory_kernel == "fused"
        if self.memory_kernel == "auto":
            fused = x.is_cuda and x.itemsize <= 4 and find_spec("triton") is not None
        if not fused or (torch.is_grad_enabled() and torch.compiler.is_compiling()):
            return layer_memory
        from fsdit.kernels import layer_memory as kernels

        return kernels

    def _body(
        self,
        x: Tensor,
        hidden: Tensor,
        memory: Tensor,
        modulation: Tensor,
        context: KeysValues,
        rotary: Rotary,
        into: Tensor | None,
    ) -> Tensor:
        """All of a block but Layer Memory. Shapes do not depend on l, so a compiler makes one graph for all blocks."""
        _, _, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        x = add_gated(x, self.self_attn(hidden, memory, rotary), gate1)
        x = x + self.cross_attn(self.norm3(x), context)
        x = add_gated(x, self.ffn(modulate(x, shift2, scale2, self.eps)), gate2)
        return x if into is None else into.copy_(x)


class Head(nn.Module):
    """Modulated norm and the linear map from tokens to patches."""

    def __init__(self, dim: int, patch_channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, patch_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x `B N D` and time `B D` -> `B N patch_channels`."""
        shift, scale = (self.modulation + time.unsqueeze(1)).chunk(2, dim=1)
        return self.head(modulate(x, shift, scale, self.eps))


class FSDiT(StrictModelMixin):
    """The diffusion transformer.

    Args:
        dim: D, token width; divisible by `num_heads` into heads of even width.
        ffn_dim: width inside the feed-forward.
        num_heads: attention heads.
        num_layers: blocks.
        freq_dim: width of the timestep's sinusoid.
        text_dim: width of the text features.
        text_len: rows of text the model attends to; shorter text is continued with zero rows, which are not masked.
        image_dim: width of the image features; None builds no image branch.
        latent_channels: channels of the autoencoder's latents.
        mask_channels: channels of the condition mask.
        in_channels: default 2·latent_channels + mask_channels (noise, mask, condition).
        out_channels: default latent_channels.
        patch_size: patch over (t, h, w); the paper's is (1, 1, 1).
        eps: of all norms in the blocks.
        rope_theta: base of the rotary frequencies.
        layer_memory: give blocks 2 ... num_layers a router.
        memory_bias: c of the routers' start (`LayerRouter`): 1 from scratch, 7 to adapt a pretrained model.
        memory_gate: give each router a gate that starts closed, for a pretrained model that starts bit for bit alike.

    Attributes:
        context_parallel: the processes that share each sample, if any do; set by `enable_context_parallel`.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    context_parallel: ContextParallel | None = None
    _supports_gradient_checkpointing = True
    _no_split_modules = ["FSDiTBlock"]
    _repeated_blocks = ["FSDiTBlock"]
    _keep_in_fp32_modules = ["time_embedding", "modulation", "norm3", "router"]
    _skip_layerwise_casting_patterns = ["patch_embedding", "_embedding", "norm", "router"]

    @register_to_config
    def __init__(
        self,
        dim: int = 5120,
        ffn_dim: int = 13824,
        num_heads: int = 40,
        num_layers: int = 40,
        freq_dim: int = 256,
        text_dim: int = 4096,
        text_len: int = 512,
        image_dim: int | None = 1280,
        latent_channels: int = 128,
        mask_channels: int = 4,
        in_channels: int | None = None,
        out_channels: int | None = None,
        patch_size: tuple[int, int, int] = (1, 1, 1),
        eps: float = 1e-6,
        rope_theta: float = 10000.0,
        layer_memory: bool = True,
        memory_bias: float = 1.0,
        memory_gate: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads or (dim // num_heads) % 2:
            raise ValueError(f"dim {dim} does not divide into {num_heads} heads of even width")
        if len(patch_size) != 3 or min(patch_size) < 1:
            raise ValueError(f"patch_size {patch_size} given; three sizes over (t, h, w) are accepted, each 1 or more")
        in_channels = in_channels or 2 * latent_channels + mask_channels
        out_channels = out_channels or latent_channels
        self.register_to_config(in_channels=in_channels, out_channels=out_channels, patch_size=tuple(patch_size))

        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.text_embedding = TextEmbedding(text_dim, dim)
        self.time_embedding = TimeEmbedding(freq_dim, dim)
        self.time_projection = nn.Linear(dim, 6 * dim)
        self.image_embedding = None if image_dim is None else ImageEmbedding(image_dim, dim)
        self.blocks = nn.ModuleList(
            FSDiTBlock(dim, ffn_dim, num_heads, eps, image_dim is not None) for _ in range(num_layers)
        )
        if layer_memory:
            for index in range(1, num_layers):
                self.blocks[index].router = LayerRouter(dim, index + 1, memory_bias, memory_gate)
        self.head = Head(dim, out_channels * math.prod(patch_size), eps)
        self.gradient_checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform linears with zero bias, N(0, 0.02) for the text and time embeddings, a zero head."""
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Linear, nn.Conv3d)):
                continue
            if name.startswith(("text_embedding", "time_embedding")):
                nn.init.normal_(module.weight, std=0.02)
            else:  # K and V share a linear but start as the two matrices they are
                halves = 2 if ".to_kv" in name else 1
                for part in module.weight.detach().flatten(1).chunk(halves):
                    nn.init.xavier_uniform_(part)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.head.weight)

    def router_parameters(self) -> list[nn.Parameter]:
        """All router weights and biases: they train at ten times the rate, without decay (`fsdit.training.task`)."""
        return [p for m in self.blocks.modules() if isinstance(m, LayerRouter) for p in m.parameters()]

    def enable_context_parallel(self, group: Any = None) -> None:
        """Share every sample's tokens among the processes of a group (None: all processes), as `fsdit.parallel` says.

        All of them then call the model alike, with the same inputs, and all receive the whole output.
        """
        self._set_context_parallel(ContextParallel(group))

    def disable_context_parallel(self) -> None:
        """Call the model alone again."""
        self._set_context_parallel(None)

    def _set_context_parallel(self, parallel: ContextParallel | None) -> None:
        self.context_parallel = parallel
        for block in self._own_blocks():
            block.self_attn.context_parallel = parallel

    def set_memory_kernel(self, kernel: MemoryKernel) -> None:
        """How Layer Memory runs, in inference and training: "plain" PyTorch, "fused" in Triton kernels, or "auto", the
        fused form on a GPU."""
        if kernel not in get_args(MemoryKernel):
            raise UserError(f"memory kernel {kernel!r} given; one of {', '.join(get_args(MemoryKernel))} is accepted")
        if kernel == "fused" and find_spec("triton") is None:
            raise UserError('the memory kernel "fused" needs Triton, which is not installed; pip install triton')
        for block in self._own_blocks():
            block.memory_kernel = kernel

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile what all blocks share, one graph for all of them; Layer Memory, whose number of states grows from
        block to block, stays outside. The arguments are torch.compile's."""
        body = torch.compile(FSDiTBlock._body, *args, **kwargs)
        for block in self._own_blocks():
            block._body = body.__get__(block)  # type: ignore[method-assign]

    def _own_blocks(self) -> Iterator[FSDiTBlock]:
        for block in self.blocks:
            assert isinstance(block, FSDiTBlock)
            yield block

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        cache: ContextCache | None = None,
    ) -> Tensor:
        """The velocity eps - z0 that the model predicts.

        Args:
            hidden_states: `B in_channels t h w`; t, h, w divisible by the patch.
            timestep: `B`, 1000·sigma as floats.
            encoder_hidden_states: text, `B L text_dim` with L <= text_len; one text serves any batch.
            encoder_hidden_states_image: image, `B M image_dim`; required unless image_dim is None; one image
                serves any batch.
            cache: of a sampling run, which keeps from step to step what depends on text and image alone.

        Returns:
            `B out_channels t h w` in the dtype of the model's weights (or of autocast).

        Raises:
            ValueError: shapes that do not fit the model or each other.
        """
        self._check_inputs(hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image)
        if cache is not None and torch.is_grad_enabled():
            raise ValueError("a context cache carries no gradients; call the model under torch.no_grad()")
        grid = self._token_grid(hidden_states)
        rotary = self.rotary(hidden_states)
        dtype = self.patch_embedding.weight.dtype
        x = self.patch_embedding(hidden_states.to(dtype)).flatten(2).transpose(1, 2).contiguous()

        # In training's autocast too these stay in the weights' precision: bfloat16 would cost the modulation 0.5 %.
        with full_precision(x):
            time = self.time_embedding(timestep)
            projection = self.time_projection(nn.functional.silu(time).to(dtype))
        context = self._context(encoder_hidden_states, encoder_hidden_states_image, cache)

        if self.context_parallel is not None:
            # Before X_0 is recorded: all states are split with the tokens.
            x = self.context_parallel.split(x)
            cosine, sine = (self.context_parallel.split(table, dim=0) for table in (rotary.cosine, rotary.sine))
            rotary = Rotary(cosine, sine, rotary.length)
        x = self._run_blocks(x, at_least_float32(projection).unflatten(1, (6, -1)), context, rotary)
        x = self.head(x, at_least_float32(time))
        if self.context_parallel is not None:
            x = self.context_parallel.gather(x, rotary.length)
        return self._unpatchify(x, grid)

    def _context(self, text: Tensor, image: Tensor | None, cache: ContextCache | None) -> Embedded:
        """What cross-attention sees: taken from the cache, or made and put there."""
        if cache is None:
            return self._embed(text, image)
        cache.begin(text, image)
        if self not in cache:
            cache[self] = self._embed(text, image)
        embedded: Embedded = cache[self]
        return embedded._replace(cache=cache)

    def _embed(self, text: Tensor, image: Tensor | None) -> Embedded:
        """Text, continued with zero rows, and image at the model's width."""
        dtype = self.patch_embedding.weight.dtype
        embedded_image = None
        if self.image_embedding is not None and image is not None:
            embedded_image = self.image_embedding(image.to(dtype))
        return Embedded(self.text_embedding(self._pad_text(text.to(dtype))), embedded_image)

    def _run_blocks(self, x: Tensor, time: Tensor, context: Embedded, rotary: Rotary) -> Tensor:
        """X_L `B N D`. Every state is kept while Layer Memory may still read it, otherwise only the newest."""
        if self.config.layer_memory and not torch.is_grad_enabled():
            return self._run_blocks_in_place(x, time, context, rotary)
        record = next(self._own_blocks()).memory_form(x).record
        states = record((), x)
        for block in self.blocks:
            arguments = time, context, rotary, states
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, *arguments)
            else:
                x = block(*arguments)
            states = record(states if self.config.layer_memory else (), x)
        return states[-1]

    def _run_blocks_in_place(self, x: Tensor, time: Tensor, context: Embedded, rotary: Rotary) -> Tensor:
        """All states in one buffer `L + 1 B N D`, which every block writes the next one into."""
        states = x.new_empty(len(self.blocks) + 1, *x.shape)
        states[0] = x
        for index, block in enumerate(self.blocks):
            block(time, context, rotary, states[: index + 1], states[index + 1])
        return states[-1]

    def rotary(self, hidden_states: Tensor) -> Rotary:
        """The positions of the tokens of latents `B C t h w`; the last few sizes' tables are shared by all calls."""
        head_dim = self.config.dim // self.config.num_heads
        return rotary_tables(self._token_grid(hidden_states), head_dim, self.config.rope_theta, hidden_states.device)

    def _token_grid(self, hidden_states: Tensor) -> tuple[int, int, int]:
        t, h, w = (size // patch for size, patch in zip(hidden_states.shape[2:], self.config.patch_size, strict=True))
        return t, h, w

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """`B (t h w) (pt ph pw C)` -> `B C (t pt) (h ph) (w pw)`."""
        (t, h, w), (pt, ph, pw) = grid, self.config.patch_size
        x = patches.reshape(len(patches), t, h, w, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(len(patches), -1, t * pt, h * ph, w * pw)

    def _pad_text(self, text: Tensor) -> Tensor:
        return nn.functional.pad(text, (0, 0, 0, self.config.text_len - text.shape[1]))

    def _check_inputs(self, latents: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None) -> None:
        """ValueError for shapes that would otherwise fail deep inside, or not fail and be wrong."""
        if latents.ndim != 5 or latents.shape[1] != self.config.in_channels:
            raise ValueError(f"expected B {self.config.in_channels} t h w, got {tuple(latents.shape)}")
        grid, patch = latents.shape[2:], self.config.patch_size
        if any(size % step for size, step in zip(grid, patch, strict=True)):
            raise ValueError(f"latent grid {tuple(grid)} does not divide by patch {tuple(patch)}")
        if text.ndim == 3 and text.shape[1] > self.config.text_len:
            raise ValueError(f"{text.shape[1]} text tokens given, the model takes at most {self.config.text_len}")
        if (image is None) != (self.image_embedding is None):
            given, wants = ("no image", "needs") if image is None else ("an image", "was built without")
            raise ValueError(f"{given} embedding given, but this model {wants} one")
        batch = len(latents)
        if timestep.shape != (batch,):
            raise ValueError(f"expected {batch} timesteps, got {tuple(timestep.shape)}")
        for name, rows, width in (("text", text, self.config.text_dim), ("image", image, self.config.image_dim)):
            if rows is not None and (rows.ndim != 3 or rows.shape[2] != width or len(rows) not in (1, batch)):
                raise ValueError(f"expected {name} embeddings {batch} L {width}, got {tuple(rows.shape)}")
