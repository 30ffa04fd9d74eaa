"""What ComfyUI's loader does with a file as it is, told from the keys and shapes.

Its rules for key endings and scale are those of the ComfyUI dialect. Which prefixes it takes in front of diffusers'
names differs by architecture; the table is what its real loader accepts (ComfyUI 0.33), and the tests ask it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from loraport.lora.storage import Tensors
from loraport_convert.codec import keys
from loraport_convert.families import ENCODERS, FAMILIES
from loraport_convert.families.norms import PARAMETERS
from loraport_convert.families.rules import Span

#: Family → the prefixes under which ComfyUI takes diffusers' names, but for the two exceptions below.
_DIFFUSERS_NAMES = {
    "flux1": ("transformer.", "", "lora_transformer_", "lycoris_"),
    "flux2": ("transformer.", "", "lora_transformer_", "lycoris_"),
    "qwen-image": ("transformer.", "diffusion_model.", "", "lora_unet_", "lycoris_"),
    "z-image": ("transformer.", "diffusion_model.", "", "lycoris_"),
    "sd3": ("transformer.", "base_model.model.", "lora_transformer_", "lycoris_"),
    "krea2": ("transformer.", "diffusion_model.", "", "lycoris_"),
    "sdxl": ("unet.", "", "lora_unet_", "lycoris_"),
    "sd15": ("unet.", "", "lora_unet_", "lycoris_"),
}
#: Of FLUX.2 it has no such names for what the blocks share.
_SHARED_OF_FLUX2 = ("double_stream_modulation", "single_stream_modulation", "time_guidance_embed")
#: Of Stable Diffusion it takes dotted names of attention as diffusers had them when they were processors.
#: Keys by which it recognises the control LoRAs of FLUX.1's makers.
_CONTROL = {"img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"}
_ATTENTION = re.compile(r"\.(processor\.)?to_(?:[qkv]|out(\.0)?)$")
_OWN = "text_encoders."
_NATIVE = ("diffusion_model.", "lora_unet_")
_BLOCKS = tuple(f"{root}{block}_block" for root in ("unet.", "") for block in ("down", "mid", "up"))
_TEXT_ENCODERS = (
    _OWN,
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "text_encoder.text_model.",
    "text_encoder_2.text_model.",
)


@dataclass(frozen=True)
class Verdict:
    """`loads` and `skips` are modules; `problems` say what goes wrong, silently or not; `aborts` that nothing loads."""

    loads: int
    skips: tuple[str, ...]
    problems: tuple[str, ...]
    aborts: bool

    @property
    def fine(self) -> bool:
        return not (self.skips or self.problems or self.aborts)


def judge(
    tensors: Tensors, modules: Mapping[str, Mapping[str, str]], family: str | None, scales: Mapping[str, float | None]
) -> Verdict:
    """What happens to the modules, grouped as prefixed name → ending → key; `scales` are what the file really means."""
    if tensors.keys() >= _CONTROL:
        return Verdict(len(modules), (), (), False)  # it knows these files, and puts their keys right by itself
    skips = tuple(
        prefixed
        for prefixed, endings in modules.items()
        if not _known(prefixed.removesuffix(keys.BIAS), family) or not _looked_for(prefixed, endings, modules)
    )
    loaded = {prefixed: endings for prefixed, endings in modules.items() if prefixed not in set(skips)}
    found: dict[str, list[str]] = {}
    aborts = False
    for prefixed, endings in loaded.items():
        problems = _problems(prefixed, endings, tensors, scales)
        if prefixed.endswith(keys.BIAS) and (problem := _bias_problem(prefixed.removesuffix(keys.BIAS), family)):
            problems.append((problem, False))
        if _grows(prefixed, endings, tensors, family):
            problems.append(("a weight gets more inputs, at which ComfyUI fails and leaves the module out", False))
        for problem, fatal in problems:
            found.setdefault(problem, []).append(prefixed)
            aborts |= fatal
    told = tuple(f"{problem} ({len(names)} modules, such as {names[0]})" for problem, names in found.items())
    return Verdict(0 if aborts else len(loaded), skips, told, aborts)


def _looked_for(prefixed: str, endings: Mapping[str, str], modules: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether it reads these endings at all: not PEFT's biases and Wan's modulation, a norm's bias with its weight."""
    if any(not key.endswith(ending) for ending, key in endings.items()):
        return False  # PEFT's keys with the name of an adapter
    if keys.NORM_BIAS in endings:
        return keys.NORM in modules.get(prefixed.removesuffix(keys.BIAS), {})
    return not endings.keys() <= {keys.PEFT_BIAS, keys.DIFF_MODULATION, keys.SCALE}


def _bias_problem(prefixed: str, family: str | None) -> str | None:
    """Why the change of a module's bias would be lost without a word, or None."""
    if family not in FAMILIES:
        return None
    module = keys.parse(prefixed)
    if module.part != keys.MODEL:
        return None
    spans = FAMILIES[family].native(module.name, None, module.flat)
    if spans and not FAMILIES[family].has_bias(spans[0].module):
        return "the model has no such bias, and ComfyUI leaves its change out without a word"
    if spans and not (len(spans) == 1 and spans[0].whole):
        return "the bias of a part of a fused module is left out without a word"
    return None


def _known(prefixed: str, family: str | None) -> bool:
    """Whether ComfyUI finds the module. Without a known family, only its own prefixes count."""
    if prefixed.startswith(_TEXT_ENCODERS):
        flat = prefixed.startswith("lora_te")
        names = (
            ENCODERS["clip"].native(keys.parse(prefixed).name, None, flat) if not prefixed.startswith(_OWN) else None
        )
        return names is None or ENCODERS["clip"].is_matrix(names[0].module)
    module = keys.parse(prefixed)
    attention = _ATTENTION.search(prefixed) if family in ("sd15", "sdxl") and not module.flat else None
    if attention is not None and not prefixed.startswith(_NATIVE):
        return attention[1] is not None and attention[2] is None and prefixed.startswith(_BLOCKS)
    length = len(prefixed) - len(module.name)
    prefix = prefixed[:length]
    if prefixed[length:] != module.name:
        return False  # something in the middle of the name was left out to understand it
    if family not in FAMILIES:
        return prefix in _NATIVE
    native = FAMILIES[family].native(module.name, None, module.flat)
    if native is not None and native[0].module.endswith(PARAMETERS):  # it takes them under their own full names alone
        return prefix == _NATIVE[0] and _same(native, module)
    if prefix in _NATIVE and (native is None or _same(native, module)):
        return native is not None
    lacks = family == "flux2" and module.name.startswith(_SHARED_OF_FLUX2)
    return prefix in _DIFFUSERS_NAMES.get(family or "", ()) and native is not None and not lacks


def _grows(prefixed: str, endings: Mapping[str, str], tensors: Tensors, family: str | None) -> bool:
    """Whether a LoRA makes a weight larger without telling ComfyUI."""
    down = next((endings[down] for _, down in keys.LOW_RANK if down in endings), None)
    if down is None or family not in FAMILIES or keys.RESHAPE in endings:
        return False
    module = keys.parse(prefixed)
    spans = FAMILIES[family].native(module.name, None, module.flat) if module.part == keys.MODEL else None
    most = FAMILIES[family].grows.get(spans[0].module) if spans else None
    return most is not None and tensors.shapes[down][1:] > (most,)


def _same(spans: tuple[Span, ...], module: keys.Module) -> bool:
    """Whether the native name is the module's own."""
    name = spans[0].module.replace(".", "_") if module.flat else spans[0].module
    return len(spans) == 1 and spans[0].whole and name == module.name


def _problems(
    prefixed: str, endings: Mapping[str, str], tensors: Tensors, scales: Mapping[str, float | None]
) -> list[tuple[str, bool]]:
    """(what goes wrong, whether the load aborts)."""
    found = []
    shapes = tensors.shapes
    if any((up in endings) != (down in endings) for up, down in keys.LOW_RANK):
        found.append(("one half of a pair is missing, and the load aborts", True))
    if keys.ALPHA in endings and shapes[endings[keys.ALPHA]] not in ((), (1,)):
        found.append(("alpha has more than one number, and the load aborts", True))
    if keys.DORA_SCALE in endings and len(shapes[endings[keys.DORA_SCALE]]) < 2:
        found.append(
            ("the dora_scale has one axis and is applied to the wrong one: nearly nothing of it is right", False)
        )
    if ".lokr_t2" in endings:
        found.append(("a LoKr with a Tucker core, at which ComfyUI fails and leaves the module out", False))
    if any(each in endings for each in keys.MAGNITUDES):
        found.append(("the DoRA magnitude is not read, while its factors are applied as a plain LoRA", False))
    scale = scales.get(prefixed)
    if keys.ALPHA not in endings and not endings.keys() & keys.UNSCALED:
        if scale is None:
            found.append(("no alpha: it is applied at scale 1, which may not be what was trained", False))
        elif abs(scale - 1) > 1e-6:
            found.append((f"no alpha tensor: it is applied at scale 1 instead of {scale:g}", False))
    return found
