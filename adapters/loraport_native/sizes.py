"""How large a random checkpoint is: the few megabytes that run anywhere, or the real model's dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraport_native.models.text import LAYERS, TAPS

VOCABULARY = 1024  #: of the random checkpoints' tokenizer, whatever their size


@dataclass(frozen=True)
class Size:
    """The dimensions of a checkpoint's parts, in the words of diffusers' and transformers' configurations."""

    transformer: dict[str, Any]
    text: dict[str, Any]  #: Qwen3-VL's language model; layers and vocabulary come by themselves
    vae: dict[str, Any]

    def text_encoder(self) -> dict[str, Any]:
        """The text encoder's configuration. Its vision tower is never read for captions, so it is always tiny."""
        sections = {"rope_type": "default", "rope_theta": 5_000_000, "mrope_interleaved": True}
        sections |= {"mrope_section": self.text["mrope_section"]}
        text = {name: value for name, value in self.text.items() if name != "mrope_section"}
        return {
            "text_config": {
                "vocab_size": VOCABULARY,
                "num_hidden_layers": LAYERS,
                "rope_parameters": sections,
                **text,
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 1,
                "out_hidden_size": text["hidden_size"],
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        }


#: About 9 MB. Sides are divisible by 64, so that every quantisation works.
TINY = Size(
    transformer={
        "in_channels": 128,
        "num_layers": 3,
        "attention_head_dim": 64,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "adaln_dim": 64,
        "llm_features_dim": 64 * len(TAPS),
        "mrope_section": (12, 10, 10),
    },
    text={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "mrope_section": [12, 10, 10],
    },
    vae={"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "latent_channels": 32, "sample_size": 256},
)

#: Ideogram 4 as released: the defaults of diffusers' transformer and FLUX.2 VAE, and Qwen3-VL-8B's language model
#: (its config.json) with the tiny tokenizer's vocabulary.
FULL = Size(
    transformer={
        "in_channels": 128,
        "num_layers": 34,
        "attention_head_dim": 256,
        "num_attention_heads": 18,
        "intermediate_size": 12288,
        "adaln_dim": 512,
        "llm_features_dim": 4096 * len(TAPS),
        "mrope_section": (24, 20, 20),
    },
    text={
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "mrope_section": [24, 20, 20],
    },
    vae={},
)

SIZES = {"tiny": TINY, "full": FULL}
