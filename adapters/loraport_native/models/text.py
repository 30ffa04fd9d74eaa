"""Text features: what Ideogram 4 reads of its text encoder, caption by caption and without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3VLModel

from loraport.errors import DataError

LAYERS = 36
TAPS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35)  # `QWEN3_VL_ACTIVATION_LAYERS` of the pipeline


def tokenize(tokenizer: PreTrainedTokenizerBase, caption: str, max_tokens: int) -> list[int]:
    """Turn a caption into the token ids of one chat message from the user, as the pipeline does.

    Raises DataError when there are more than `max_tokens`.
    """
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": caption}]}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > max_tokens:
        start = caption if len(caption) <= 60 else caption[:60] + "…"
        raise DataError(
            f"A caption has {len(ids)} tokens, the limit is {max_tokens}: {start}",
            hint="Shorten it or raise `dataset.max_text_tokens`.",
        )
    return ids


@torch.no_grad()
def encode(
    text_encoder: Qwen3VLModel, tokenizer: PreTrainedTokenizerBase, captions: list[str], max_tokens: int
) -> list[Tensor]:
    """Encode captions into features (tokens, 13 · width), in the encoder's dtype and on its device.

    The same numbers as `Ideogram4Pipeline.encode_prompt` gives for the real tokens: the outputs of layers
    `TAPS`, interleaved so that the 13 values of a channel stand together. One caption at a time: no padding,
    so causal attention needs no mask. Raises DataError for a caption that is too long, before anything runs.
    """
    tokens = [tokenize(tokenizer, caption, max_tokens) for caption in captions]
    model = text_encoder.language_model
    tapped: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda module, inputs, output: tapped.__setitem__(layer, output)

    hooks = [model.layers[layer].register_forward_hook(keep(layer)) for layer in TAPS]
    try:
        features = []
        for ids in tokens:
            model(input_ids=torch.tensor([ids], device=text_encoder.device), use_cache=False)
            features.append(torch.stack([tapped[layer][0] for layer in TAPS], dim=-1).flatten(1))
    finally:
        for hook in hooks:
            hook.remove()
    return features
