"""What each backend is asked to train: the same for all in the matched tier, its own best for the card in the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loraport.errors import SpecError
from loraport.gpu import FP8_CAPABILITY, Card, cards, settings_for
from loraport.planning import Kind, Plan
from loraport.plugins import plugins
from loraport.profiles import DEFAULTS, QUANTIZED, resolve_memory
from loraport.run.api import DEFAULT_BACKEND, plan
from loraport.spec.load import build_spec
from loraport.spec.models import TrainSpec, set_fields
from loraport_bench.images import Staged, staged_dataset
from loraport_bench.records import Inequality
from loraport_bench.settings import OF_SPEC, Settings

#: What a backend has to do exactly to be compared in the matched tier: the work, and what it costs.
MATCHED = (
    *("model.family", "model.checkpoint", "model.dtype"),
    *("dataset.path", "dataset.sets", "dataset.repeats", "dataset.resolution", "dataset.flip"),
    *("dataset.caption_dropout", "dataset.max_text_tokens"),
    *("dataset.regularization.path", "dataset.regularization.repeats", "dataset.regularization.weight"),
    *("lora.type", "lora.rank", "lora.alpha", "lora.rslora", "lora.dora", "lora.dropout", "lora.targets"),
    *("train.steps", "train.gpus", "train.batch_size", "train.gradient_accumulation", "train.learning_rate"),
    *("train.optimizer", "train.weight_decay", "train.lr_scheduler", "train.max_grad_norm", "train.ema_decay"),
    *("memory.storage", "memory.compute", "memory.offload", "memory.compile", "memory.gradient_checkpointing"),
)

#: The same of what a set of images says itself.
MATCHED_OF_SETS = (
    "path",
    "resolution",
    "repeats",
    "weight",
    "flip",
    "caption_dropout",
    "regularization",
    "loss_weight",
)

#: The values that every trainer is likely to share; taken where one of them does not do the spec's own.
COMMON: dict[str, Any] = {
    "train.max_grad_norm": 0.0,
    "train.warmup_steps": 0,
    "train.lr_scheduler": "constant",
    "train.ema_decay": 0.0,
    "dataset.caption_dropout": 0.0,
    "dataset.flip": False,
    "lora.dropout": 0.0,
    "memory.compute": "model",
    "memory.offload": "none",
    "memory.compile": "none",
    "memory.gradient_checkpointing": "full",
}

#: What measuring asks of a spec, whatever it says.
MEASURED = {
    "dataset.path": "the staged images, at their final size",
    "dataset.upscale": "true: small images are enlarged as they are staged, since not every trainer leaves them small",
    "dataset.trigger_word": "none: it is in the staged captions",
    "validation.every": "0: the held-out images are scored after the run, by one evaluator for all",
    "sample.every": "0: nothing is drawn",
    "save.every": "so that there are checkpoints to score",
}

#: What the bench sets by options of its own, in every spec.
OPTIONS = {
    "train.steps": "--steps",
    "train.seed": "--seeds",
    "train.batch_size": "--batches",
    "save.every": "--checkpoints",
    "save.keep": "--checkpoints",
}


def refuse_options(option: str, given: Mapping[str, Any], changes: list[str], batches: bool = True) -> None:
    """Raise SpecError when changes of a spec say what an option of the bench does, and would be lost; `batches`: of
    the batch size too."""
    said = _said(given, changes, option)
    for path, instead in OPTIONS.items():
        section, name = path.split(".")
        if name in getattr(said, section).model_fields_set and (batches or instead != "--batches"):
            raise SpecError(f"{option}: {path} is set by the bench.", hint=f"Use {instead}, for all trainers alike.")


def content_of(settings: Settings, staged: Staged, backend: str, seed: int, batch: int) -> dict[str, Any]:
    """The spec of a run but for its memory section, as plain data: what all backends share, and what is for this one.

    Raises SpecError when the changes for this backend are no valid spec.
    """
    given = {**settings.given, "train": {**settings.given["train"], "batch_size": batch}}
    if (given["backend"]["name"] or DEFAULT_BACKEND) != backend:  # its options and interpreter are another trainer's
        given["backend"] = {"name": backend}
    spec = build_spec(given, settings.changes.get(backend), base=Path.cwd(), origin=f"the spec for {backend}").spec
    content = spec.model_dump(mode="json")
    content["backend"]["name"] = backend
    if spec.model.checkpoint == given["model"]["checkpoint"]:  # not one that is for this backend alone
        content["model"]["checkpoint"] = staged.checkpoint
    content["dataset"] |= {**staged_dataset(spec, staged.trained), "upscale": True}
    steps, kept = settings.steps, settings.checkpoints
    every = -(-steps // kept) if kept else 0
    content["train"] |= {"steps": steps, "seed": seed}
    content["save"] |= {"every": every, "keep": max(1, kept)}
    content["sample"] |= {"every": 0, "prompts": []}
    content["validation"] |= {"every": 0, "path": None}
    return content


def memory_of(settings: Settings, profile: str) -> dict[str, Any]:
    """The spec's memory section, fully set, with the quantisation that a profile stands for instead of its own. Raises
    SpecError for a name that is not there."""
    asked = settings.given["memory"]
    if profile != OF_SPEC:
        asked = {**asked, **dict.fromkeys(QUANTIZED), "quantize": profile}
    return _filled(settings, asked)


def matched(
    settings: Settings, staged: Staged, profile: str, batch: int
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The matched spec of each backend (seed and repeat left as they are), and what of it is not the given spec's, with
    why. Each field of COMMON takes its common value when more backends do that exactly than the spec's own, those left
    out that are refused in any case.

    Raises SpecError when a change for one backend would have it do other work, or at other cost.
    """
    memory, own = memory_of(settings, profile), memory_of(settings, OF_SPEC)
    contents = {
        name: content_of(settings, staged, name, settings.seeds[0], batch)
        | {"memory": _memory_for(name, memory, settings)}
        for name in settings.backends
    }
    _refuse_different(contents)
    changed = dict(MEASURED)
    if any(memory[name] != own[name] for name in QUANTIZED):
        changed["memory.quantize"] = "what --profiles says"
    lost = _lost(contents)
    for path, value in COMMON.items():
        if all(_at(content, path) == value for content in contents.values()):
            continue
        tried = {backend: _with(content, path, value) for backend, content in contents.items()}
        not_exact = _inexact(contents, path, lost)
        if len(_inexact(tried, path, lost)) < len(not_exact):
            contents = tried
            changed[path] = f"{value}: not done exactly by {', '.join(not_exact)} as the spec has it"
    return contents, changed


def best_effort(settings: Settings, staged: Staged, profile: str, batch: int, backend: str) -> dict[str, Any]:
    """The spec with the memory settings that are recommended for the card, mapped to what this backend can do.

    The hardware profile's settings count; of the quantisations that store weights as `profile` does, the one that
    computes in fewest bits which the backend takes, and compiling where it takes it. What a change for this backend
    says of memory holds whatever is recommended.
    """
    content = content_of(settings, staged, backend, settings.seeds[0], batch)
    recommended = _recommended(settings)
    base = _quantized(settings, profile)
    found = None
    for storage in _quantisations(profile, base):
        for compile_name in dict.fromkeys((recommended["compile"], "none")):
            memory = {**recommended, **storage, "compile": compile_name}
            tried = {**content, "memory": _memory_for(backend, _plain(memory), settings)}
            kinds = {v.path: v.kind for v in make(tried, backend, Path("run")).verdicts if v.path.startswith("memory.")}
            if Kind.REFUSED in kinds.values():
                continue
            if kinds["memory.compute"] in (Kind.EXACT, Kind.APPROXIMATED):
                return tried
            found = found or tried
    return found or {**content, "memory": _memory_for(backend, _plain({**recommended, **base}), settings)}


def make(content: Mapping[str, Any], backend: str, out: Path) -> Plan:
    """The plan of a run's spec. Raises SpecError for a spec that is none."""
    return plan(build_spec(dict(content), base=Path.cwd(), origin=f"the spec for {backend}").spec, backend, out)


def why_not_matched(made: Plan) -> str | None:
    """Why this plan has no place in the matched tier; None when it does all of MATCHED exactly."""
    bad = [verdict for verdict in made.not_exact() if verdict.path in _needed(made)]
    if not bad:
        return None
    return "; ".join(f"{verdict.path} = {shown(verdict.value)}: {verdict.kind}: {verdict.reason}" for verdict in bad)


def shown(value: Any) -> str:
    """A field's value as a refusal tells it."""
    return repr(str(value) if isinstance(value, Path) else value)


def inequalities(plans: Mapping[str, Plan]) -> list[Inequality]:
    """The fields that some of these plans do not do exactly, or that have other values."""
    found = []
    for path in dict.fromkeys(verdict.path for made in plans.values() for verdict in made.verdicts):
        verdicts = {name: verdict for name, made in plans.items() for verdict in made.verdicts if verdict.path == path}
        values = {repr(verdict.value) for verdict in verdicts.values()}
        # No staged image is to be enlarged, whatever is said of those that are.
        if path in ("backend.name", "backend.python", "dataset.upscale") or not verdicts:
            continue
        if len(values) > 1 or any(verdict.kind is not Kind.EXACT for verdict in verdicts.values()):
            told = {
                name: ("" if len(values) == 1 else f"{verdict.value}, ")
                + (str(verdict.kind) if verdict.kind is Kind.EXACT else f"{verdict.kind}: {verdict.reason}")
                for name, verdict in verdicts.items()
            }
            shown = next(iter(verdicts.values())).value if len(values) == 1 else None
            found.append(Inequality(path=path, value=str(shown) if isinstance(shown, Path) else shown, backends=told))
    return found


def _refuse_different(contents: Mapping[str, Mapping[str, Any]]) -> None:
    first, reference = next(iter(contents.items()))
    for name, content in contents.items():
        for path in MATCHED:
            value, same = _at(content, path), _at(reference, path)
            if value != same:
                raise SpecError(
                    f"--for: {path} is {value!r} for {name} and {same!r} for {first}: the matched tier wants it alike.",
                    hint="Change it for all with --set, or measure with --tiers best-effort.",
                )


def _recommended(settings: Settings) -> dict[str, Any]:
    """The settings of the hardware profile that was asked for, else of the machine's card, else the defaults."""
    known = plugins().profiles()
    if settings.card is not None:
        asked = TrainSpec.model_validate({**settings.given, "memory": {"profile": settings.card}})
        return resolve_memory(asked, known).memory.model_dump(mode="json")
    card = _card()
    chosen = settings_for(card, known) if card else None
    return DEFAULTS | (chosen[1] if chosen else {})


def _quantized(settings: Settings, profile: str) -> dict[str, Any]:
    """memory.storage and memory.compute as a profile has them."""
    sets = memory_of(settings, OF_SPEC) if profile == OF_SPEC else plugins().profiles()["quantize", profile].sets
    return {name: sets[name] for name in QUANTIZED}


def _quantisations(profile: str, own: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """What memory.storage and memory.compute may be for a profile, the fastest first."""
    if profile == OF_SPEC:
        return [own]
    card = _card()
    fp8 = card is not None and card.compute_capability >= FP8_CAPABILITY
    same = [each.sets for (kind, _), each in plugins().profiles().items() if kind == "quantize"]
    faster = [
        dict(sets)
        for sets in same
        if sets["storage"] == own["storage"] and sets["compute"] != "model" and (fp8 or sets["compute"] != "fp8")
    ]
    return [*faster, own] if card is not None and own["compute"] == "model" else [own]


def _card() -> Card | None:
    return next(iter(cards()), None)


def _plain(memory: Mapping[str, Any]) -> dict[str, Any]:
    """A memory section of settings alone: the names of profiles that stand for them are left out."""
    return {name: value for name, value in memory.items() if name not in ("profile", "quantize")}


def _said(given: Mapping[str, Any], changes: list[str] | None, origin: str) -> TrainSpec:
    """The spec with these changes, in which of train, memory and save nothing is set but what the changes say."""
    bare = {name: part for name, part in given.items() if name not in ("train", "memory", "save")}
    return build_spec(bare, changes, base=Path.cwd(), origin=origin).spec


def _memory_for(backend: str, memory: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """A memory section with what the changes for this backend say of it."""
    said = _said(settings.given, settings.changes.get(backend), f"the spec for {backend}").memory
    own = said.model_dump(mode="json", exclude_unset=True)
    if "profile" in own:  # which fills only what is left out
        memory = {name: memory[name] for name in QUANTIZED}
    if "quantize" in own:
        memory = {name: value for name, value in memory.items() if name not in QUANTIZED}
    return _filled(settings, {**memory, **own})


def _filled(settings: Settings, memory: Mapping[str, Any]) -> dict[str, Any]:
    """A memory section with every setting."""
    spec = TrainSpec.model_validate({**settings.given, "memory": memory})
    return _plain(resolve_memory(spec, plugins().profiles()).memory.model_dump(mode="json"))


def _needed(made: Plan) -> set[str]:
    """The fields that a plan has to do exactly for a place in the matched tier."""
    of_sets = [path for path in set_fields(made.spec) if path.rpartition(".")[2] in MATCHED_OF_SETS]
    return {*MATCHED, *of_sets, *(["lora.factor"] if made.spec.lora.type == "lokr" else [])}


def _lost(contents: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The backends that are refused for a field which no common value mends."""
    found = set()
    for backend, content in contents.items():
        for path, value in COMMON.items():
            content = _with(content, path, value)
        made = make(content, backend, Path("run"))
        needed = _needed(made)
        bad = {v.path for v in made.not_exact() if v.kind is Kind.REFUSED or v.path in needed}
        if bad - COMMON.keys():
            found.add(backend)
    return found


def _inexact(contents: Mapping[str, Mapping[str, Any]], path: str, lost: set[str]) -> list[str]:
    """The backends, but for those lost, that do not do exactly what is said at `path`."""
    found = []
    for backend, content in contents.items():
        if backend not in lost:
            verdict = next(v for v in make(content, backend, Path("run")).verdicts if v.path == path)
            if verdict.kind is not Kind.EXACT:
                found.append(backend)
    return found


def _at(content: Mapping[str, Any], path: str) -> Any:
    value: Any = content
    for part in path.split("."):
        value = value[part]
    return value


def _with(content: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    section, _, name = path.rpartition(".")
    return {**content, section: {**content[section], name: value}}
