"""The Ideogram 4 family: a built-in plugin of the port."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loraport.errors import DataError
from loraport.families import Dimensions, Family
from loraport.hookspecs import hookimpl
from loraport.ideogram4_captions import CAPTION_SCHEMA, wrap_caption

_ATTENTION = [r"layers\.\d+\.attention\.(qkv|o)"]
_MLP = [r"layers\.\d+\.feed_forward\.w[123]"]
_MODULATION = [r"layers\.\d+\.adaln_modulation"]


def place_trigger(caption: str, word: str) -> str:
    """Put a trigger word into a caption that lacks it, keeping a JSON caption valid JSON.

    Ideogram 4 reads JSON captions; a word in front of the JSON would make it plain text. The word goes to the front of
    `high_level_description`, or of the first element's `desc` when there is no such description, or becomes that
    description. A plain-text caption gets it in front. A caption whose text already holds the word is unchanged.
    """
    content = _json_object(caption)
    if content is None:
        if word in caption:
            return caption
        return f"{word}, {caption}" if caption else word
    if any(word in text for text in _texts(content)):
        return caption
    description, element = content.get("high_level_description"), _first_element(content)
    if isinstance(description, str) and description:
        content["high_level_description"] = f"{word}, {description}"
    elif element is not None and "high_level_description" not in content:
        element["desc"] = f"{word}, {element['desc']}" if element["desc"] else word
    else:
        content = {"high_level_description": word} | content | {"high_level_description": word}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _json_object(caption: str) -> dict[str, Any] | None:
    try:
        content = json.loads(caption)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _texts(content: dict[str, Any]) -> Iterator[str]:
    """Every text in a JSON object; keys are not text."""
    waiting: list[Any] = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value


def _first_element(content: dict[str, Any]) -> dict[str, Any] | None:
    """The first element with a description, in a caption of the usual shape."""
    composition = content.get("compositional_deconstruction")
    elements = composition.get("elements") if isinstance(composition, dict) else None
    for element in elements if isinstance(elements, list) else []:
        if isinstance(element, dict) and isinstance(element.get("desc"), str):
            return element
    return None


def _dimensions(
    blocks: int,
    width: int,
    feed_forward: int,
    modulation: int,
    channels: int,
    text_features: int,
    text_encoder_blocks: int,
    text_encoder_block_parameters: int,
    text_encoder_other_parameters: int,
    vae_parameters: int,
    vae_channels: int,
) -> Dimensions:
    return Dimensions(
        blocks=blocks,
        width=width,
        feed_forward=feed_forward,
        block_name="layers.{}",
        block_linears={
            "attention.qkv": (3 * width, width),
            "attention.o": (width, width),
            "feed_forward.w1": (feed_forward, width),
            "feed_forward.w2": (width, feed_forward),
            "feed_forward.w3": (feed_forward, width),
            "adaln_modulation": (4 * width, modulation),
        },
        other_linears={
            "input_proj": (width, channels),
            "t_embedding.mlp_in": (width, width),
            "t_embedding.mlp_out": (width, width),
            "adaln_proj": (modulation, width),
            "final_layer.linear": (channels, width),
            "final_layer.adaln_modulation": (width, modulation),
        },
        text_features=text_features,
        text_encoder_blocks=text_encoder_blocks,
        text_encoder_block_parameters=text_encoder_block_parameters,
        text_encoder_other_parameters=text_encoder_other_parameters,
        vae_parameters=vae_parameters,
        vae_channels=vae_channels,
    )


#: The released model: diffusers' `Ideogram4Transformer2DModel` and `AutoencoderKLFlux2` with their defaults, and the
#: language model of Qwen/Qwen3-VL-8B-Instruct (its config.json: 36 layers of width 4096, 32 heads and 8 of keys and
#: values of 128 each, feed-forward 12288, vocabulary 151936) with its final norm.
RELEASED = _dimensions(
    blocks=34,
    width=4608,
    feed_forward=12288,
    modulation=512,
    channels=128,
    text_features=13 * 4096,
    text_encoder_blocks=36,
    text_encoder_block_parameters=2 * 4096 * (4096 + 1024) + 3 * 4096 * 12288 + 2 * (4096 + 128),
    text_encoder_other_parameters=151_936 * 4096 + 4096,
    vae_parameters=84_046_115,
    vae_channels=128,
)


def read_dimensions(checkpoint: Path) -> Dimensions:
    """The dimensions of a checkpoint folder, in the official or the diffusers layout, from its headers alone.

    Raises DataError when a file is damaged or a tensor is missing.
    """
    shapes = _shapes(checkpoint / "transformer")
    text_encoder, vae = _shapes(checkpoint / "text_encoder"), _shapes(checkpoint / "vae")
    language = {name: shape for name, shape in text_encoder.items() if "visual." not in name and "lm_head" not in name}
    in_block = {name: shape for name, shape in language.items() if ".layers." in name}
    text_blocks = _count(r".*\.layers\.(\d+)\.", language)
    parameters = _parameters(in_block)
    try:
        (width, channels), (feed_forward, _) = shapes["input_proj.weight"], shapes["layers.0.feed_forward.w1.weight"]
        return _dimensions(
            blocks=_count(r"layers\.(\d+)\.", shapes),
            width=width,
            feed_forward=feed_forward,
            modulation=shapes["adaln_proj.weight"][0],
            channels=channels,
            text_features=shapes["llm_cond_norm.weight"][0],
            text_encoder_blocks=text_blocks,
            text_encoder_block_parameters=parameters // max(text_blocks, 1),
            text_encoder_other_parameters=_parameters(language) - parameters,
            vae_parameters=_parameters(vae),
            vae_channels=vae["encoder.conv_in.weight"][0],
        )
    except (KeyError, ValueError) as error:
        raise DataError(f"{checkpoint} does not hold the parts of Ideogram 4: {error} is missing.") from error


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a folder's safetensors files, the scales of fp8 rows left out."""
    from loraport.lora.storage import read_tensors

    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= read_tensors(file).shapes
    return {name: shape for name, shape in found.items() if not name.endswith("_scale")}


def _parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _count(pattern: str, names: Mapping[str, Any]) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})


IDEOGRAM4 = Family(
    name="ideogram4",
    title="Ideogram 4",
    checkpoint="ideogram-ai/ideogram-4-fp8",
    caption_format="json",
    targets={
        "attention": _ATTENTION,
        "attention+mlp": _ATTENTION + _MLP,
        "all": _ATTENTION + _MLP + _MODULATION,
    },
    architecture="ideogram-4/lora",
    place_trigger=place_trigger,
    caption_schema=CAPTION_SCHEMA,
    wrap_caption=wrap_caption,
    dimensions=RELEASED,
    read_dimensions=read_dimensions,
)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    register(IDEOGRAM4)
