"""Text features: what Ideogram 4 reads of its text encoder, caption by caption and without padding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraport_native.models.tokens import tokenize
from loraport_native.models.weights import Weights, pour
from loraport_native.quantize import quantize_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYERS = 36
TAPS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35)  # `QWEN3_VL_ACTIVATION_LAYERS` of the pipeline
#: Tokens that pass the blocks together. Their features wait in host memory: 104 kB a token at full size, in bf16.
PASS_TOKENS = 16384


class TextEncoder:
    """The language model of Qwen3-VL, of which one block is in memory at a time, read from the mapped checkpoint.

    Every caption passes a block before the next one is read, so the weights are read once for many captions, and a
    card needs room for two blocks (the next is read while one computes) however large the model is.
    """

    def __init__(
        self,
        model: Any,
        weights: Weights,
        prefix: str,
        dtype: torch.dtype,
        device: torch.device,
        storage: str = "none",
        room: Callable[[], int] = lambda: 0,
    ) -> None:
        """model: a `Qwen3VLTextModel` on the meta device, of known-good `weights` that name it `prefix`.

        dtype: of features and of all weights but the blocks' Linears, which are stored as `storage` (see
        `quantize_blocks`). room: bytes on the device for blocks to stay there, asked when captions need several passes.
        """
        self._model, self._weights, self._prefix = model, weights, prefix
        self.dtype, self.device, self._storage, self._room = dtype, device, storage, room
        # Made anew: on the meta device the rotary frequencies hold nothing, and no file has them.
        self._rotary = type(model.rotary_emb)(model.config)
        self._kept: dict[int, nn.Module] = {}

    def embed(self, ids: list[int]) -> Tensor:
        """The embeddings (1, T, width) of tokens. The table (1.2 GB at full size) stays in its file."""
        rows = self._weights.read_rows(f"{self._prefix}embed_tokens.weight", torch.tensor(ids))
        return rows.to(self.device, self.dtype)[None]

    def rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1, T, head width) for text alone: all three axes count its tokens."""
        positions = torch.arange(length).expand(3, 1, -1)
        cos, sin = self._rotary(torch.empty(0, dtype=self.dtype), positions)
        return cos.to(self.device), sin.to(self.device)

    def block(self, number: int) -> nn.Module:
        """Read a block from disk, frozen, on the device, its Linears stored as they should be."""
        block = copy.deepcopy(self._model.layers[number])
        pour(
            block,
            self._weights,
            self.dtype,
            self.device,
            sources=lambda name: (f"{self._prefix}layers.{number}.{name}",),
            keep_fp8=lambda name: self._storage == "fp8",
        )
        quantize_blocks(block, self._storage)
        return block.eval()

    def blocks(self, again: bool) -> Iterator[tuple[int, nn.Module]]:
        """Each block in turn, with its number; the next is read while one is used.

        again: they will be asked for once more, so those that there is room for stay.
        """
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

        def read(number: int) -> nn.Module:
            if number in self._kept:
                return self._kept[number]
            with torch.no_grad(), torch.cuda.stream(stream):
                block = self.block(number)
            if stream is not None:
                stream.synchronize()
            return block

        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(read, 0)
            for number in range(LAYERS):
                block = coming.result()
                if again and self._room() > 0:
                    self._kept[number] = block
                if number + 1 < LAYERS:
                    coming = reader.submit(read, number + 1)
                yield number, block
                if stream is not None:
                    # Its memory belongs to the reading stream, which must not fill it anew while it is in use.
                    torch.cuda.current_stream(self.device).synchronize()
                del block


def encode(
    text_encoder: TextEncoder, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_tokens: int
) -> Iterator[Tensor]:
    """Encode captions into features (tokens, 13 · width) each, in the encoder's dtype and on its device.

    The same numbers as `Ideogram4Pipeline.encode_prompt` gives for the real tokens: the outputs of layers
    `TAPS`, interleaved so that the 13 values of a channel stand together. One caption at a time passes a block: no
    padding, so causal attention needs no mask. Raises DataError for a caption that is too long, before anything runs.
    """
    return _features(text_encoder, [tokenize(tokenizer, caption, max_tokens) for caption in captions])


@torch.no_grad()
def _features(text_encoder: TextEncoder, captions: list[list[int]]) -> Iterator[Tensor]:
    passes = _passes(captions)
    for index, ids in enumerate(passes):
        hidden = [text_encoder.embed(caption) for caption in ids]
        tapped: list[list[Tensor]] = [[] for _ in ids]
        cos, sin = text_encoder.rotation(max(map(len, ids)))
        for number, block in text_encoder.blocks(again=index + 1 < len(passes)):
            for caption, states in enumerate(hidden):
                length = states.shape[1]
                # Without a mask and with more than one token, attention is causal.
                rotation = (cos[:, :length], sin[:, :length])
                hidden[caption] = block(states, position_embeddings=rotation, attention_mask=None)
                if number in TAPS:
                    tapped[caption].append(hidden[caption][0].to("cpu"))
            del block  # the next one is read into its memory
        for taps in tapped:
            features = torch.stack([tap.to(text_encoder.device) for tap in taps], dim=-1).flatten(1)
            taps.clear()
            yield features


def _passes(captions: list[list[int]]) -> list[list[list[int]]]:
    """Captions, as token ids, in groups of at most `PASS_TOKENS` tokens, and of at least one caption."""
    passes: list[list[list[int]]] = []
    room = 0
    for caption in captions:
        if len(caption) > room or not passes:
            passes.append([])
            room = PASS_TOKENS
        passes[-1].append(caption)
        room -= len(caption)
    return passes
