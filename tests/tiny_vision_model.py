"""A vision model of a few thousand random weights, as transformers writes one: made on the spot, nothing downloaded."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

#: One token each: enough for any JSON, and few, so that random texts end soon.
ALPHABET = string.ascii_lowercase + string.digits + '"{}[]:,_#Ġ'
_SPECIAL = ["<|end|>", "<|pad|>", "<image>"]
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|end|>{% endfor %}"
)


def write_tiny_vision_model(folder: Path) -> None:
    """A LLaVA of two layers that samples its answers; pictures of 28 px, patches of 14."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(ALPHABET)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images,
        fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**small, image_size=28, patch_size=14),
            text_config=LlamaConfig(**small, vocab_size=len(fast), max_position_embeddings=8192),
            image_token_id=fast.convert_tokens_to_ids("<image>"),
            image_seq_length=4,
        )
    )
    model.generation_config.eos_token_id = fast.eos_token_id
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
