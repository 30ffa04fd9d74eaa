"""Ideogram 4's transformer under the official checkpoint's names, with a lean path for training.

diffusers' model is the reference (`diffusers.models.transformers.transformer_ideogram4`); what differs here:

* attention is one fused `qkv` and `o`, so a LoRA trained here has the module names that ComfyUI loads;
* text may come in already projected, so the 245 M parameters of the projection can go once it is cached;
* there is neither padding nor a mask: samples of different lengths are one packed sequence (see `Packed`), each attends
  by itself, and attention takes its flash kernel;
* norms are torch's own: a kernel each, where the reference's float32 ones are several passes over memory;
* rotary angles are float32 whatever happens around them: see `Rope`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
    _sinusoidal_embedding,
)
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from loraport_native.attention import attend
from loraport_native.frozen import adapted_linears

Rotation = tuple[Tensor, Tensor]
TEXT, IMAGE = 0, 1  # rows of `embed_image_indicator`


class Packed(NamedTuple):
    """What makes a batch of one sequence (1, ΣL, …), in which the samples follow one another."""

    lengths: list[int]  #: of the samples, ΣL together
    sample: Tensor  #: (ΣL,) which one a token is of


#: What attention leaves out: nothing; what a boolean mask that broadcasts to (B, 1, L, L) says; or other samples.
Mask = Tensor | Packed | None


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
        """Turn positions (B, L, 3: time, row, column) into float32 cosines and sines (B, L, head_dim), of which the
        sines of the first half are negated, as `_rotate` takes them."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
            self.axis_of = self.axis_of.to(positions.device)
        angles = positions.to(torch.float32)[..., self.axis_of] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


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
    if not isinstance(mask, Packed):
        return attend(query, key, value, mask)
    samples = (part.split(mask.lengths, dim=1) for part in (query, key, value))
    return torch.cat([attend(*sample) for sample in zip(*samples, strict=True)], dim=1)


def _times(tokens: Tensor, factor: Tensor, mask: Mask) -> Tensor:
    """Multiply tokens (B, L, hidden), also packed ones, by a factor of each sample (B, 1, hidden)."""
    if not isinstance(mask, Packed):
        return tokens * factor
    if torch.compiler.is_compiling() and not factor.requires_grad:
        return tokens * factor[mask.sample, 0]  # never made: it is looked up where it is multiplied by
    samples = zip(tokens.split(mask.lengths, dim=1), factor.split(1), strict=True)
    return torch.cat([sample * its for sample, its in samples], dim=1)


def _rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotate heads (B, L, heads, head_dim), pairing channel i with i + head_dim / 2."""
    cos, sin = (part.unsqueeze(2) for part in rotation)
    return heads * cos + heads.roll(heads.shape[-1] // 2, dims=-1) * sin


class GatedMLP(Ideogram4MLP):
    """diffusers' SwiGLU, whose two products of one input share the work of their LoRAs."""

    def forward(self, x: Tensor) -> Tensor:
        """Run (…, dim) → (…, dim)."""
        adapted: list[Any] = [getattr(linear, "adapted", None) for linear in (self.w1, self.w3)]
        if None in adapted:
            return super().forward(x)
        gate, up = adapted_linears(x, *adapted)
        return self.w2(F.silu(gate) * up)


class FusedBlock(nn.Module):
    """diffusers' block around fused attention, over packed samples too."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_heads: int, norm_eps: float, adaln_dim: int
    ) -> None:
        super().__init__()
        self.attention = FusedAttention(hidden_size, num_heads)
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
            return self.passing(self.compute, *inputs)
        return self.compute(*inputs)

    def compute(self, hidden: Tensor, mask: Mask, rotation: Rotation, modulation: Tensor) -> Tensor:
        """`forward` itself, whatever of it is kept."""
        scale, gate, feed_scale, feed_gate = self.adaln_modulation(modulation).chunk(4, dim=-1)
        attended = self.attention(_times(self.attention_norm1(hidden), 1 + scale, mask), mask, rotation)
        hidden = hidden + _times(self.attention_norm2(attended), gate.tanh(), mask)
        fed = self.feed_forward(_times(self.ffn_norm1(hidden), 1 + feed_scale, mask))
        return hidden + _times(self.ffn_norm2(fed), feed_gate.tanh(), mask)


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
        longest = text.shape[1]
        assert tokens == grid[0] * grid[1], f"{tokens} image tokens do not fill a grid of {grid}"
        if text_lengths is None:
            text_lengths = [longest] * batch
        assert len(text_lengths) == batch
        assert all(0 <= n <= longest for n in text_lengths)
        kinds = self.embed_image_indicator.weight
        text = text.to(self.dtype) + kinds[TEXT]
        image = self.input_proj(latents.to(self.dtype)) + kinds[IMAGE]
        counted = torch.arange(longest, device=latents.device).unsqueeze(-1).expand(-1, 3)
        placed = _image_positions(grid, latents.device)

        if min(text_lengths) == max(text_lengths):
            start = longest - text_lengths[0]
            hidden = torch.cat((text[:, start:], image), dim=1)
            # All samples share one row of positions, and the rotation broadcasts over the batch.
            positions = torch.cat((counted[: longest - start], placed)).unsqueeze(0)
            return self._run(hidden, timestep, positions, None, lambda hidden: hidden[:, -tokens:])

        samples = list(enumerate(text_lengths))
        hidden = torch.cat([part for i, n in samples for part in (text[i, longest - n :], image[i])]).unsqueeze(0)
        positions = torch.cat([part for _, n in samples for part in (counted[:n], placed)]).unsqueeze(0)
        lengths = [n + tokens for n in text_lengths]
        sample = torch.cat([torch.full((n,), i, device=latents.device) for i, n in enumerate(lengths)])
        return self._run(
            hidden,
            timestep,
            positions,
            Packed(lengths, sample),
            lambda hidden: torch.stack([one[-tokens:] for one in hidden[0].split(lengths)]),
        )

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
        sample = self._run(hidden, timestep, position_ids, mask, lambda hidden: hidden)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run(
        self, hidden: Tensor, timestep: Tensor, positions: Tensor, mask: Mask, wanted: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """All blocks, and the last layer on the tokens (B, L, hidden) that are wanted of theirs."""
        time = self.t_embedding(timestep)
        if timestep.dim() == 1:
            time = time.unsqueeze(1)
        modulation = F.silu(self.adaln_proj(time))
        cos, sin = self.rotary_emb(positions)
        rotation = (cos.to(hidden.dtype), sin.to(hidden.dtype))
        for number, block in enumerate(self.layers):
            hidden = self.run_block(number, block, hidden, mask, rotation, modulation)
        return self.final_layer(wanted(hidden), conditioning=modulation)


def _image_positions(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Positions (h·w, 3) of an image's tokens, row by row; the offset keeps them apart from text indices."""
    rows, columns = (torch.arange(side, device=device) for side in grid)
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1) + IMAGE_POSITION_OFFSET
