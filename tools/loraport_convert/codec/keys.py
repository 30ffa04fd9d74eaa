"""What the keys of LoRA files say: part of the model, module, and which factor of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraport.errors import DataError

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
LOHA_CORES = {f".hada_{name}": name for name in ("t1", "t2")}
MID = ".lora_mid.weight"  #: the core of a Tucker convolution, which belongs to the first pair of `LOW_RANK`
LOKR = {f".lokr_{name}": name for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")}
ALPHA, DORA_SCALE, DIFF = ".alpha", ".dora_scale", ".diff"
#: A weight itself, which takes the place of the model's.
SET = ".set_weight"
#: Changes of whole weights: LyCORIS' of modules and of norms.
NORM = ".w_norm"
WHOLE = (DIFF, NORM)
#: What changes a bias, as a module of its own: `<module>.bias`. PEFT multiplies its own by the LoRA's scale.
BIAS, PEFT_BIAS, NORM_BIAS = ".bias", ".lora_B.bias", ".b_norm"
DIFF_BIAS = ".diff_b"
#: The change of a parameter that is no module's weight, which Wan's distilled LoRAs have: `<block>.modulation`.
MODULATION, DIFF_MODULATION = ".modulation", ".diff_m"
_OF_ANOTHER = {DIFF_BIAS: BIAS, NORM_BIAS: BIAS, PEFT_BIAS: BIAS, DIFF_MODULATION: MODULATION}
#: PEFT's magnitude of a DoRA.
MAGNITUDES = (".lora_magnitude_vector.default.weight", ".lora_magnitude_vector.weight", ".lora_magnitude_vector")
#: Kinds whose change is made from the base weight, and their endings: they are kept as they are, never multiplied out.
OFT, RESCALE = ".oft_blocks", ".rescale"
#: sd-scripts has those of a fused module's parts apart.
OFT_PARTS = tuple(f"{OFT}.{number}" for number in range(8))
GLORA = (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight")
#: Endings of kinds that cannot be converted, and why.
UNSUPPORTED = {
    ".lokr_t1": "a core on the first side of a LoKr, which no loader applies",
    ".oft_diag": "an OFT of an early sd-scripts, which ComfyUI does not read",
    ".lora_embedding_A": "a LoRA of an embedding, for which ComfyUI has no form",
    ".lora_embedding_B": "a LoRA of an embedding, for which ComfyUI has no form",
    **{f".oft_{name}": "an OFT of PEFT's, which ComfyUI does not read" for name in ("R.weight", "R", "r", "s")},
    **{f".boft_{name}": "a BOFT of PEFT's, which ComfyUI does not read" for name in ("R", "s")},
    ".bm.weight": "a GLoRA with a middle factor, which ComfyUI does not read",
    ".lambda_layer": "a T-LoRA, which ComfyUI does not read",
    ".on_input": "an IA³, which ComfyUI does not read",
    ".lora_E": "an AdaLoRA, which ComfyUI does not read: its ranks are pruned after training",
    ".ia3_l": "an IA³, which ComfyUI does not read",
    ".vera_lambda_b": "a VeRA, which ComfyUI does not read",
    ".vera_lambda_d": "a VeRA, which ComfyUI does not read",
}
#: The shape that a LoRA makes a weight larger to, as control LoRAs do.
RESHAPE = ".reshape_weight"
#: What the makers of FLUX.1 call the norms that their control LoRAs replace.
_REPLACED_NORMS, SCALE = ("query_norm.scale", "key_norm.scale"), ".scale"
#: Endings of what alpha means nothing for.
UNSCALED = frozenset((*WHOLE, SET, *_OF_ANOTHER))
_ALONE = (RESHAPE, ALPHA, DORA_SCALE, *WHOLE, SET, *_OF_ANOTHER, MID, OFT, *OFT_PARTS, RESCALE)
ENDINGS = frozenset(
    [*(end for pair in LOW_RANK for end in pair), *LOHA, *LOHA_CORES, *LOKR, *_ALONE, *GLORA, *MAGNITUDES, *UNSUPPORTED]
)
_MOST_DOTS = max(end.count(".") for end in ENDINGS)
_UNDERSCORED = tuple(end for end in ENDINGS if not end.startswith("."))

#: The diffusion model, and the place of names that say by themselves which text encoder they mean.
MODEL, NAMED = "model", "named"
TEXT_ENCODERS = "text_encoders."
_FLAT = {
    "lora_unet__": MODEL,  # Wan's "Fun" files
    "lora_unet_": MODEL,
    "oft_unet_": MODEL,  # sd-scripts' OFT
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
#: PEFT puts the adapter's name before `weight`; `default` is what it is called unless somebody names it.
_NAMED_ADAPTER = re.compile(r"(.+)\.(lora_[AB]|lora_magnitude_vector)\.(\w+)\.weight$")
_PROCESSOR = re.compile(r"\.processor(?=\.|$)|_processor(?=_)")


@dataclass(frozen=True)
class Module:
    """A module as a file names it: `part` is the model or a text encoder, `flat` names have underscores for dots."""

    part: str
    name: str
    flat: bool = False


def split(key: str) -> tuple[str, str] | None:
    """(module with its prefix, ending) of a key, None where the ending means nothing. A bias is a module of its own."""
    parts = _split(key)
    return None if parts is None else (parts[0] + _OF_ANOTHER.get(parts[1], ""), parts[1])


def _split(key: str) -> tuple[str, str] | None:
    found, dot = -1, len(key)
    for _ in range(_MOST_DOTS):
        dot = key.rfind(".", 0, dot)
        if dot < 0:
            break
        if key[dot:] in ENDINGS:
            found = dot  # a longer ending counts more
    if found < 0:
        found = next((len(key) - len(end) for end in _UNDERSCORED if key.endswith(end)), -1)
    if found < 0 and key.endswith(_REPLACED_NORMS):
        found = len(key) - len(SCALE)
    if found < 0 and (named := _NAMED_ADAPTER.match(key)):
        return named[1], f".{named[2]}.default.weight"
    return None if found < 0 else (key[:found], key[found:])


def grouped(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module → ending → key, and the keys whose ending means nothing.

    Raises DataError where a module has adapters of several names.
    """
    modules: dict[str, dict[str, str]] = {}
    odd = []
    for key in keys:
        parts = split(key)
        if parts is None:
            odd.append(key)
        elif (other := modules.setdefault(parts[0], {}).setdefault(parts[1], key)) != key:
            raise DataError(
                f"One file holds several adapters for the module {parts[0]}: {other} and {key}.",
                hint="Save each adapter in a file of its own, then `loraport merge` them as you like.",
            )
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
