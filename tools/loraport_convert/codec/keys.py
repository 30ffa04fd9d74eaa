"""What the keys of LoRA files say: part of the model, module, and which factor of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

#: (up, down) endings in the order in which ComfyUI looks for them; of several pairs it applies the first.
LOW_RANK = [
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
]
LOHA = {f".hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
LOKR = {f".lokr_{name}": name for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")}
ALPHA, DORA_SCALE, DIFF = ".alpha", ".dora_scale", ".diff"
#: PEFT's magnitude of a DoRA.
MAGNITUDES = (".lora_magnitude_vector.default.weight", ".lora_magnitude_vector.weight", ".lora_magnitude_vector")
#: Kinds that ComfyUI or a trainer knows and LoraPort does not: they change what the module's other keys mean.
UNSUPPORTED = (
    ".lora_mid.weight",
    ".hada_t1",
    ".hada_t2",
    ".lokr_t1",
    ".reshape_weight",
    ".oft_blocks",
    ".oft_diag",
    ".a1.weight",
    ".b1.weight",
    ".lora_embedding_A",
    ".lora_embedding_B",
)
SUFFIXES = sorted(
    [*(end for pair in LOW_RANK for end in pair), *LOHA, *LOKR, ALPHA, DORA_SCALE, DIFF, *MAGNITUDES, *UNSUPPORTED],
    key=len,
    reverse=True,
)

#: The diffusion model, and the place of names that say by themselves which text encoder they mean.
MODEL, NAMED = "model", "named"
TEXT_ENCODERS = "text_encoders."
_FLAT = {
    "lora_unet__": MODEL,  # Wan's "Fun" files
    "lora_unet_": MODEL,
    "lora_transformer_": MODEL,
    "lycoris_": MODEL,
    "lora_te_": "te1",
    "lora_te1_": "te1",
    "lora_te2_": "te2",
    "lora_te3_": "te3",
}
_DOTTED = {
    "lora_unet.": MODEL,
    "lora_transformer.": MODEL,
    "lora_te1.": "te1",
    "lora_te2.": "te2",
    "lora_te3.": "te3",
    "text_encoder.": "te1",
    "text_encoder_2.": "te2",
    "text_encoder_3.": "te3",
}
#: Wrappers of the model that no module is named after; they are taken off as often as they are there.
_WRAPPERS = re.compile(
    r"(?:(?:base_model\.model|model\.diffusion_model|diffusion_model|transformer|unet|pipe\.dit|dit)\.)+"
)
_PROCESSOR = re.compile(r"\.processor(?=\.|$)|_processor(?=_)")


@dataclass(frozen=True)
class Module:
    """A module as a file names it: `part` is the model or a text encoder, `flat` names have underscores for dots."""

    part: str
    name: str
    flat: bool = False


def split(key: str) -> tuple[str, str] | None:
    """(module with its prefix, ending) of a key, None where the ending means nothing."""
    ending = next((each for each in SUFFIXES if key.endswith(each)), None)
    return None if ending is None else (key[: -len(ending)], ending)


def grouped(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module → ending → key, and the keys whose ending means nothing."""
    modules: dict[str, dict[str, str]] = {}
    odd = []
    for key in keys:
        parts = split(key)
        if parts is None:
            odd.append(key)
        else:
            modules.setdefault(parts[0], {})[parts[1]] = key
    return modules, odd


def parse(prefixed: str) -> Module:
    """The part of the model and the module's name without any prefix."""
    if prefixed.startswith(TEXT_ENCODERS):
        return Module(NAMED, prefixed)
    part = MODEL
    name = prefixed
    while True:
        if found := _WRAPPERS.match(name):
            name = name[found.end() :]
        elif flat := _first(_FLAT, name):
            return Module(_FLAT[flat], _PROCESSOR.sub("", name[len(flat) :]), flat=True)
        elif dotted := _first(_DOTTED, name):
            part, name = _DOTTED[dotted], name[len(dotted) :]
        else:
            return Module(part, _PROCESSOR.sub("", name))


def _first(prefixes: Mapping[str, str], name: str) -> str | None:
    return next((prefix for prefix in prefixes if name.startswith(prefix)), None)
