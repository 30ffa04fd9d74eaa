"""Ideogram 4's transformer under the official checkpoint's names, with a lean path for training.

diffusers' model is the reference (`diffusers.models.transformers.transformer_ideogram4`); what differs here:

* attention is one fused `qkv` and `o`, so a LoRA trained here has the module names that ComfyUI loads;
* text may come in already projected, so the 245 M parameters of the projection can go once it is cached;
* a batch without padding runs without any mask, which is what lets attention take its flash kernel;
* norms are torch's own: a kernel each, where the reference's float32 ones are several passes over memory;
* rotary angles are float32 whatever happens around them: see `Rope`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
    Ideogram4EmbedScalar,
    Ideogram4MLP,
    Ideogram4Transformer2DModel,
    Ideogram4TransformerBlock,
    _sinusoidal_embedding,
)
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from loraport_native.attention import attend
from loraport_native.frozen import adapted_linears

Rotation = tuple[Tensor, Tensor]
#: What attention leaves out: nothing; what a boolean mask that broadcasts to (B, 1, L, L) says; or, of each sample, so
#: many tokens of padding at its start.
Mask = Tensor | list[int] | None
TEXT, IMAGE = 0, 1  # rows of `embed_image_indicator`


class Rope(nn.Module):
    """Three-axis rotary embedding whose angles are exact float32.

    Image positions start at 65536, where bfloat16, autocast and TF32 matmuls all merge neighbouring
    positions. So the frequencies are a plain attribute made on the CPU (a buffer would follow
    `model.to(bfloat16)`, and would hold nothing after construction on the meta device) and the angle is an
    elementwise product.
    """

    def __init__(self, head_dim: int, base: float, sections: tuple[int, ...]) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        self.frequencies = 1.0 / (base**exponents)
        self.axis_of = torch.zeros(head_dim // 2, dtype=torch.long, device="cpu")
        for axis in (1, 2):
            self.axis_of[axis : sections[axis] * 3 : 3] = axis

    def forward(self, positions: Tensor) -> Rotation:
        """Turn positions (B, L, 3: time, row, column) into float32 cosines and sines (B, L, head_dim)."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
            self.axis_of = self.axis_of.to(positions.device)
        angles = positions.to(torch.float32)[..., self.axis_of] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class EmbedTime(Ideogram4EmbedScalar):
    """Time embedding that takes a float32 time under half-precision weights, as the official model does.

    The sinusoid runs over 1e4·t, so a time rounded to bfloat16 beforehand would be off by up to 20 radians.
    """

    def forward(self, time: Tensor) -> Tensor:
        scaled = 1e4 * (time.to(torch.float32) - self.range_min) / (self.range_max - self.range_min)
        sinusoid = _sinusoidal_embedding(scaled, self.dim).to(self.mlp_in.weight.dtype)
        return self.mlp_out(F.silu(self.mlp_in(sinusoid)))


class FusedAttention(nn.Module):
    """Self-attention with one `qkv` projection, whose rows are those of q, then k, then v."""

    def __init__(self, hidden_size: int, num_heads: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.o = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm_q = nn.RMSNorm(self.head_dim, eps=eps)
        self.norm_k = nn.RMSNorm(self.head_dim, eps=eps)

    def forward(self, hidden_states: Tensor, attention_mask: Mask, image_rotary_emb: Rotation) -> Tensor:
        """Attend over (B, L, hidden)."""
        heads = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = heads.unbind(2)
        query = _rotate(self.norm_q(query), image_rotary_emb)
        key = _rotate(self.norm_k(key), image_rotary_emb)
        return self.o(_attend(query, key, value, attention_mask).flatten(2))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Attention over (B, L, heads, head_dim)."""
    if not isinstance(mask, list):
        return attend(query, key, value, mask)
    # One call a sample without its padding keeps the flash kernel, which takes no mask; what padding would get is zero.
    attended = []
    for sample, start in enumerate(mask):
        one = slice(sample, sample + 1)
        real = attend(query[one, start:], key[one, start:], value[one, start:])
        attended.append(F.pad(real, (0, 0, 0, 0, start, 0)))
    return torch.cat(attended)


def _rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotate heads (B, L, heads, head_dim), pairing channel i with i + head_dim / 2."""
    cos, sin = (part.unsqueeze(2) for part in rotation)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


class GatedMLP(Ideogram4MLP):
    """diffusers' SwiGLU, whose two products of one input share the work of their LoRAs."""

    def forward(self, x: Tensor) -> Tensor:
        """Run (…, dim) → (…, dim)."""
        adapted: list[Any] = [getattr(linear, "adapted", None) for linear in (self.w1, self.w3)]
        if None in adapted:
            return super().forward(x)
        gate, up = adapted_linears(x, *adapted)
        return self.w2(F.silu(gate) * up)


class FusedBlock(Ideogram4TransformerBlock):
    """diffusers' block around fused attention; only the construction differs."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_heads: int, norm_eps: float, adaln_dim: int
    ) -> None:
        # Not the parent's: it would also make, and randomly fill, the split attention that is never used.
        nn.Module.__init__(self)
        self.attention = FusedAttention(hidden_size, num_heads)  # type: ignore[assignment]
        self.feed_forward = GatedMLP(hidden_size, intermediate_size)
        self.attention_norm1 = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.ffn_norm1 = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.attention_norm2 = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.ffn_norm2 = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.adaln_modulation = nn.Linear(adaln_dim, 4 * hidden_size)
        #: How the forward pass is run: (it, its inputs) → its result. `loraport_native.recompute` sets it.
        self.passing: Callable[..., Tensor] | None = None

    def forward(self, *inputs: Any) -> Tensor:
        """Run (hidden_states (B, L, hidden), mask, rotation, modulation (B, 1, adaln_dim)) → (B, L, hidden)."""
        if self.passing is not None and torch.is_grad_enabled():
            return self.passing(super().forward, *inputs)
        return super().forward(*inputs)


class Ideogram4(Ideogram4Transformer2DModel):
    """Ideogram 4 with the official parameter names; `forward` is the pipeline's, `velocity` is for training.

    The arguments are diffusers' own and default to the released model (34 blocks, width 4608).
    """

    _no_split_modules = ["FusedBlock"]  # noqa: RUF012  (diffusers' own class attributes)
    _repeated_blocks = ["FusedBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 128,
        num_layers: int = 34,
        attention_head_dim: int = 256,
        num_attention_heads: int = 18,
        intermediate_size: int = 12288,
        adaln_dim: int = 512,
        llm_features_dim: int = 53248,
        rope_theta: int = 5_000_000,
        mrope_section: tuple[int, int, int] = (24, 20, 20),
        norm_eps: float = 1e-5,
    ) -> None:
        hidden_size = attention_head_dim * num_attention_heads
        assert llm_features_dim != hidden_size, "`forward` tells features from projected text by width"
        super().__init__(
            in_channels=in_channels,
            num_layers=0,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            intermediate_size=intermediate_size,
            adaln_dim=adaln_dim,
            llm_features_dim=llm_features_dim,
            rope_theta=rope_theta,
            mrope_section=mrope_section,
            norm_eps=norm_eps,
        )
        self.register_to_config(num_layers=num_layers)  # the parent has just noted 0
        self.t_embedding = EmbedTime(hidden_size, input_range=(0.0, 1.0))
        self.rotary_emb = Rope(  # type: ignore[assignment]
            attention_head_dim, rope_theta, tuple(mrope_section)
        )
        self.layers = nn.ModuleList(
            FusedBlock(hidden_size, intermediate_size, num_attention_heads, norm_eps, adaln_dim)
            for _ in range(num_layers)
        )
        #: How a block is run: (its number, the block, its inputs) → its output. Recomputation and streaming set it.
        self.run_block: Callable[..., Tensor] = lambda number, block, *inputs: block(*inputs)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in: that of a weight which no quantisation touches."""
        return self.embed_image_indicator.weight.dtype

    def blocks(self) -> list[FusedBlock]:
        """The blocks in their order."""
        return list(self.layers)  # type: ignore[arg-type]

    def project_text(self, features: Tensor) -> Tensor:
        """Project text features (B, T, llm_features_dim) to (B, T, hidden), each token by itself.

        Independent of image and time, so a cache may hold the result. AssertionError after
        `drop_text_projection`.
        """
        assert self.llm_cond_proj is not None, "the text projection was dropped"
        return self.llm_cond_proj(self.llm_cond_norm(features.to(self.dtype)))

    def drop_text_projection(self) -> None:
        """Free the text projection (245 M parameters at full size); from now on text comes in projected."""
        self.llm_cond_norm = None  # type: ignore[assignment]
        self.llm_cond_proj = None  # type: ignore[assignment]

    def velocity(
        self,
        latents: Tensor,
        text: Tensor,
        text_lengths: list[int] | None,
        timestep: Tensor,
        grid: tuple[int, int],
    ) -> Tensor:
        """Predict the velocity (data minus noise) of noisy latents; equals `forward` on the same tokens.

        latents: (B, N, in_channels), the h·w image tokens row by row.
        text: (B, T, hidden) from `project_text`, each sample's tokens at the right end, zeros before them;
            T may be 0.
        text_lengths: how many of the T tokens of each sample are real; None means all.
        timestep: (B,), 0 is noise and 1 is data; keep it in float32.
        grid: (h, w), the image's height and width in tokens of 16 pixels.
        Returns (B, N, in_channels) in the weights' dtype.
        """
        batch, tokens, _ = latents.shape
        length = text.shape[1]
        assert tokens == grid[0] * grid[1], f"{tokens} image tokens do not fill a grid of {grid}"
        if text_lengths is not None:
            assert len(text_lengths) == batch
            assert all(0 <= n <= length for n in text_lengths)
        starts = [length - n for n in text_lengths] if text_lengths is not None and min(text_lengths) < length else None
        padding = torch.tensor(starts or [0]).unsqueeze(1).to(latents.device, non_blocking=True)

        # Without padding all samples share one row of positions, and the rotation broadcasts over the batch.
        index = torch.arange(length, device=latents.device) - padding
        positions = torch.cat(
            (
                index.clamp(min=0).unsqueeze(-1).expand(-1, -1, 3),
                _image_positions(grid, latents.device).expand(len(padding), -1, -1),
            ),
            dim=1,
        )
        role = F.pad(torch.full((length,), TEXT, device=latents.device), (0, tokens), value=IMAGE)

        hidden = torch.cat((text.to(self.dtype), self.input_proj(latents.to(self.dtype))), dim=1)
        hidden = hidden + self.embed_image_indicator(role)
        return self._run(hidden, timestep, positions, starts, image_from=length)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        indicator: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Run the pipeline's packed sequence, as `Ideogram4Transformer2DModel.forward` documents it.

        `encoder_hidden_states` may also be projected text: (B, L, hidden), told apart by its width.
        """
        dtype = self.dtype
        is_text = (indicator == LLM_TOKEN_INDICATOR).unsqueeze(-1).to(dtype)
        is_image = (indicator == OUTPUT_IMAGE_INDICATOR).unsqueeze(-1)
        text = encoder_hidden_states
        if text.shape[-1] != self.hidden_size:
            text = self.project_text(text * is_text)
        hidden = self.input_proj(hidden_states.to(dtype) * is_image) * is_image + text.to(dtype) * is_text
        hidden = hidden + self.embed_image_indicator(is_image.squeeze(-1).long())

        mask = None
        if bool((segment_ids != segment_ids[:, :1]).any()):
            mask = (segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)).unsqueeze(1)
        sample = self._run(hidden, timestep, position_ids, mask)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run(self, hidden: Tensor, timestep: Tensor, positions: Tensor, mask: Mask, image_from: int = 0) -> Tensor:
        time = self.t_embedding(timestep)
        if timestep.dim() == 1:
            time = time.unsqueeze(1)
        modulation = F.silu(self.adaln_proj(time))
        cos, sin = self.rotary_emb(positions)
        rotation = (cos.to(hidden.dtype), sin.to(hidden.dtype))
        for number, block in enumerate(self.layers):
            hidden = self.run_block(number, block, hidden, mask, rotation, modulation)
        return self.final_layer(hidden[:, image_from:], conditioning=modulation)


def _image_positions(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Positions (h·w, 3) of an image's tokens, row by row; the offset keeps them apart from text indices."""
    rows, columns = (torch.arange(side, device=device) for side in grid)
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1) + IMAGE_POSITION_OFFSET
