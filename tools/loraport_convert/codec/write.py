"""Writing a canonical LoRA in the layouts of other programs."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loraport.errors import DataError
from loraport.files import atomic_path, write_atomic
from loraport.lora.canonical import Array, ColumnScale, LoraFile, LoraModule, LowRank, RowScale
from loraport.lora.stacked import Full, NotExact, Part, Verbatim
from loraport.lora.streaming import replace_metadata, stream_tensors
from loraport_convert.codec import keys
from loraport_convert.codec.decode import FAMILY_KEY
from loraport_convert.codec.encode import (
    dora_shaped,
    low_rank_tensors,
    lycoris_tensors,
    narrow,
    of_one_module,
    spelled,
    without_core,
)
from loraport_convert.codec.rows import cut, fuse, scaled, without_idle_rank
from loraport_convert.codec.scale import ADAPTER_METADATA
from loraport_convert.families import FAMILIES
from loraport_convert.families.norms import PARAMETERS
from loraport_convert.families.rules import ModuleMap, cuts

CONFIG = "adapter_config.json"
_UP, _DOWN, _MAGNITUDE = ".lora_B.weight", ".lora_A.weight", ".lora_magnitude_vector"
_FLAT_FAMILIES = ("sd15", "sdxl")  #: for these ai-toolkit writes kohya's layout


def write_peft(lora: LoraFile, path: Path, dtype: str | None, metadata: Mapping[str, str]) -> None:
    """diffusers' layout: PEFT's tensors under `transformer.` or `unet.`, each part's configuration in the metadata."""
    family = _family(lora)
    configs = _Configs()

    def tensors() -> Iterator[tuple[str, Array]]:
        for part, name, whole in _in_diffusers(lora, family):
            module = without_core(whole)
            root = family.root if part == keys.MODEL else _encoder_root(family, part)
            configs.add(root, name, module)
            for ending, array in _peft_tensors(module, dtype).items():
                yield f"{root}.{name}{ending}", array

    with atomic_path(path) as draft:
        stream_tensors(draft, tensors(), {})
        replace_metadata(draft, {**_stated(metadata, family), ADAPTER_METADATA: configs.text()})


def write_peft_adapter(lora: LoraFile, path: Path, dtype: str | None, metadata: Mapping[str, str]) -> None:
    """PEFT's layout: the tensors of one model, and its configuration beside the file."""
    family = _family(lora)
    configs = _Configs()

    def tensors() -> Iterator[tuple[str, Array]]:
        for part, name, whole in _in_diffusers(lora, family):
            module = without_core(whole)
            if part != keys.MODEL:
                raise NotExact(
                    f"LoRA module {module.name} belongs to a text encoder; a PEFT adapter is of one model.",
                    module=module.name,
                    hint="Write diffusers' layout, which holds both.",
                )
            configs.add("", name, module)
            for ending, array in _peft_tensors(module, dtype).items():
                yield f"base_model.model.{name}{ending}", array

    stream_tensors(path, tensors(), _stated(metadata, family))
    config = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True, **configs.of("")}
    write_atomic(path.with_name(CONFIG), json.dumps(config, indent=2) + "\n")


def write_kohya(lora: LoraFile, path: Path, dtype: str | None, metadata: Mapping[str, str]) -> None:
    """kohya's layout: flat names with `lora_up`, `lora_down` and alpha; LyCORIS' endings for its kinds."""
    family = _family(lora)

    def tensors() -> Iterator[tuple[str, Array]]:
        modules = _in_diffusers(lora, family) if family.name == "sd15" else _by_part(lora, family)
        for part, name, module in modules:
            if name.endswith(PARAMETERS):
                raise NotExact(
                    f"{name} is the weight of no module, and kohya's layout has names for those alone.",
                    module=name,
                    hint="Write it for ComfyUI, or leave it out with --only.",
                )
            prefix = "lora_unet_" if part == keys.MODEL else _kohya_encoder(family, part)
            owner = name.removesuffix(keys.BIAS)
            flat = prefix + owner.replace(".", "_") + name[len(owner) :]
            tensors = low_rank_tensors(module, dtype, ".lora_up.weight", ".lora_down.weight")
            for ending, array in (tensors or lycoris_tensors(module, dtype, "kohya's layout")).items():
                yield spelled(flat, ending), array
            if module.dora is not None:
                yield flat + keys.DORA_SCALE, dora_shaped(_magnitude(module), module.dora)

    stream_tensors(path, tensors(), _stated(metadata, family))


def write_ai_toolkit(lora: LoraFile, path: Path, dtype: str | None, metadata: Mapping[str, str]) -> None:
    """ai-toolkit's layout: no alpha, so the scale goes into `lora_B`; kohya's for Stable Diffusion, as it has it."""
    family = _family(lora)
    if family.name in _FLAT_FAMILIES:
        return write_kohya(lora, path, dtype, metadata)
    configs = _Configs()

    def tensors() -> Iterator[tuple[str, Array]]:
        prefix = "transformer." if family.name == "flux1" else "diffusion_model."
        modules = _in_diffusers(lora, family) if family.name == "flux1" else _by_part(lora, family)
        for part, name, whole in modules:
            module = without_core(whole)
            if part != keys.MODEL or module.dora is not None:
                raise NotExact(f"LoRA module {module.name}: ai-toolkit's layout has no such part.", module=module.name)
            if isinstance(module.factors, LowRank):
                up = scaled(module.factors.up, module.scale)
                module = replace(module, scale=1.0, factors=replace(module.factors, up=up))
                configs.add(family.root, name, module)
                written = _peft_tensors(module, dtype)
            else:
                written = lycoris_tensors(module, dtype, "ai-toolkit's layout")
            for ending, array in written.items():
                yield spelled(f"{prefix}{name}", ending), array

    with atomic_path(path) as draft:
        stream_tensors(draft, tensors(), {})
        replace_metadata(draft, {**_stated(metadata, family), ADAPTER_METADATA: configs.text()})
    return None


class _Configs:
    """PEFT's configuration of each part of a model, gathered while its modules are written."""

    def __init__(self) -> None:
        self._modules: dict[str, dict[str, tuple[int, float]]] = {}
        self._dora: dict[str, set[bool]] = {}

    def add(self, root: str, name: str, module: LoraModule) -> None:
        rank = module.factors.rank or 0
        self._modules.setdefault(root, {})[name] = (rank, _number(module.scale * rank))
        self._dora.setdefault(root, set()).add(module.dora is not None)
        if len(self._dora[root]) > 1:
            raise NotExact(
                f"LoRA module {module.name}: PEFT has DoRA on all modules of a model or on none.", module=module.name
            )

    def of(self, root: str) -> dict[str, Any]:
        modules = self._modules[root]
        rank, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*modules.values(), strict=True))
        # `^` and not the bare name, which PEFT would also find at the end of a longer one.
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {f"^{re.escape(name)}": r for name, (r, _) in modules.items() if r != rank},
            "alpha_pattern": {f"^{re.escape(name)}": a for name, (_, a) in modules.items() if a != alpha},
            "target_modules": sorted(modules),
            "use_dora": True in self._dora[root],
        }

    def text(self) -> str:
        """All of them as diffusers has them in one JSON text."""
        packed = {f"{root}.{key}": value for root in self._modules for key, value in self.of(root).items()}
        return json.dumps(packed, indent=2, sort_keys=True)


def _family(lora: LoraFile) -> ModuleMap:
    if lora.family not in FAMILIES:
        raise DataError(
            f"The model family of this LoRA is {lora.family or 'not known'}, and its names in other layouts neither. "
            f"Known: {', '.join(FAMILIES)}."
        )
    return FAMILIES[lora.family]


def _stated(metadata: Mapping[str, str], family: ModuleMap) -> dict[str, str]:
    """The metadata, with the family, which small or partial files do not tell by their names."""
    return {**metadata, FAMILY_KEY: family.name, "format": "pt"}


def _by_part(lora: LoraFile, family: ModuleMap) -> Iterator[tuple[str, str, LoraModule]]:
    """(the model or ComfyUI's name of a text encoder, name within it, module)."""
    for name, module in lora.modules.items():
        if name.startswith(keys.TEXT_ENCODERS):
            encoder, _, inner = name.removeprefix(keys.TEXT_ENCODERS).partition(".transformer.")
            if encoder not in family.encoders or not inner:
                raise NotExact(f"LoRA module {name}: {family.name} has no such text encoder.", module=name)
            yield encoder, inner, module
        else:
            yield keys.MODEL, name, module


def _in_diffusers(lora: LoraFile, family: ModuleMap) -> Iterator[tuple[str, str, LoraModule]]:
    """The same under diffusers' names, fused modules split."""
    for part, name, module in _by_part(lora, family):
        if part != keys.MODEL:
            yield part, name, module
            continue
        split = list(_split(module, family))
        # A part that nothing was trained on comes out as zeros, and was not in the file that this one came from.
        trained = [each for each in split if not _is_zero(each)] or split
        yield from ((part, each.name, each) for each in trained)


def _split(module: LoraModule, family: ModuleMap) -> Iterator[LoraModule]:
    spans = family.diffusers(module.name, module.factors.shape)
    ranges = None if spans is None else cuts(spans, module.factors.shape[0])
    if spans is None or ranges is None:
        raise NotExact(f"LoRA module {module.name}: diffusers' {family.name} has no such module.", module=module.name)
    if isinstance(module.factors, Verbatim):
        if len(spans) > 1:
            raise NotExact(
                f"LoRA module {module.name} is a {module.factors.algorithm}, which is kept as a whole; diffusers' "
                f"{family.name} has that module in parts.",
                module=module.name,
            )
        yield replace(module, name=spans[0].module)
        return
    targets: dict[str, tuple[list[Part], list[tuple[int, int, int]], int]] = {}
    whole = Part(0, module.factors, module.scale)
    for span, (start, stop) in zip(spans, ranges, strict=True):
        share = (stop - start) // span.count
        parts, rows, _ = targets.setdefault(span.module, ([], [], share * span.total))
        parts += cut(whole, start, stop, share * span.first)
        rows.append((share * span.first, start, stop))
    for name, (parts, rows, size) in targets.items():
        factors, scale = fuse(parts, size)
        dora: RowScale | ColumnScale | None = None
        if isinstance(module.dora, ColumnScale):
            if len(targets) > 1:
                raise NotExact(
                    f"LoRA module {module.name} is a DoRA by column, whose norms are those of the whole module; it "
                    "cannot be split.",
                    module=module.name,
                )
            dora = module.dora
        elif module.dora is not None:
            chosen = np.concatenate([np.arange(start, stop) for _, start, stop in sorted(rows)])
            norms = (module.dora.base_norm, module.dora.merged_norm)
            base, merged = (None if norm is None else norm[chosen] for norm in norms)
            dora = replace(module.dora, trained=module.dora.trained[chosen], base_norm=base, merged_norm=merged)
        yield LoraModule(name, without_idle_rank(factors), scale, dora)


def _is_zero(module: LoraModule) -> bool:
    return isinstance(module.factors, LowRank) and not np.any(module.factors.up) and module.dora is None


def _peft_tensors(module: LoraModule, dtype: str | None) -> dict[str, Array]:
    if isinstance(module.factors, Full) and (module.factors.diff.ndim == 1 or module.factors.shape[0] == 1):
        raise NotExact(
            f"{module.name} is a bias, a norm or another parameter that is changed as a whole; this layout holds "
            "changes of matrices alone.",
            module=module.name,
            hint="Write it for ComfyUI or kohya, or leave it out with --only.",
        )
    if not isinstance(module.factors, LowRank):
        raise NotExact(
            f"LoRA module {module.name} is a {module.factors.kind}, which this layout cannot hold.",
            module=module.name,
            hint="Write it for ComfyUI or kohya, or come near it: --approximate svd.",
        )
    arrays = narrow(module, dtype)
    tensors = {_DOWN: arrays["down"], _UP: arrays["up"]}
    if module.dora is not None:
        if isinstance(module.dora, ColumnScale):
            raise NotExact(
                f"LoRA module {module.name} is a DoRA by column; PEFT's is by row.",
                module=module.name,
                hint="Write it for ComfyUI or kohya.",
            )
        magnitude = _magnitude(module)
        axes = module.dora.axes
        tensors[_MAGNITUDE] = magnitude if axes == 2 else magnitude.reshape(1, -1, *(1 for _ in range(axes - 2)))
    return tensors


def _magnitude(module: LoraModule) -> Array:
    """The trained magnitude, as DoRA defines it: (out,), or (in,) of one by column."""
    dora = module.dora
    assert dora is not None
    if isinstance(dora, ColumnScale):
        of_one_module(dora, module.name)
    if isinstance(dora, RowScale) and dora.divisor != "merged":
        raise NotExact(
            f"LoRA module {module.name} has a DoRA scale made for ComfyUI; the trained magnitude is not in the file.",
            module=module.name,
            hint="Convert the trainer's own file.",
        )
    return np.ascontiguousarray(dora.trained)


def _encoder_root(family: ModuleMap, encoder: str) -> str:
    number = family.encoders.index(encoder) + 1
    return "text_encoder" if number == 1 else f"text_encoder_{number}"


def _kohya_encoder(family: ModuleMap, encoder: str) -> str:
    if len(family.encoders) == 1:
        return "lora_te_"
    # T5 is the third for sd-scripts, also in FLUX.1, which has two.
    return "lora_te3_" if encoder.startswith("t5") else f"lora_te{family.encoders.index(encoder) + 1}_"


def _number(value: float) -> float | int:
    """A whole number as an int, as configurations have it; what is one but for rounding counts as whole."""
    nearest = round(value)
    return nearest if abs(value - nearest) <= 1e-6 * abs(value) else value
