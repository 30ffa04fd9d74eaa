"""Profiles: named, shared answers to "how does this fit and run fast". The built-in ones are YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from loraport.errors import SpecError, unknown

if TYPE_CHECKING:
    from loraport.spec.models import TrainSpec

ProfileKind = Literal["hardware", "quantize", "offload", "compile"]

#: The fields of `memory` that the time and the memory of a training step depend on.
STEP_FIELDS = ("storage", "compute", "offload", "compile", "gradient_checkpointing")


@dataclass(frozen=True)
class Measurement:
    """A training at a family's full size that was run on a card. Memory in GiB, of torch's allocator."""

    family: str
    backend: str
    card: str
    date: str
    resolution: int
    text_tokens: int
    rank: int
    batch_size: int
    optimizer: str
    gpus: int
    memory: dict[str, str]  #: each of `STEP_FIELDS`
    step_s: float  #: median seconds a step
    source: str  #: file under docs/benchmarks, or a run folder
    peak_allocated_gib: float | None = None  #: None where it was not measured
    peak_reserved_gib: float | None = None
    #: of a run: `loraport.pace.dataset_key`, as its images were of many sizes; else all were of `resolution`
    dataset: str | None = None


@dataclass(frozen=True)
class Profile:
    """One named setting, which fills fields of `memory` that the spec leaves out.

    A hardware profile's `sets` may hold any of `DEFAULTS`; a quantisation's are `storage` and `compute`, both of them.
    """

    kind: ProfileKind
    name: str
    description: str
    sets: dict[str, Any] = field(default_factory=dict)
    card_gib: int | None = None  #: hardware: memory of the card it is for, GiB
    fits: dict[str, int] = field(default_factory=dict)  #: hardware: the training it is for, where it is not `SHAPE`
    measured: tuple[Measurement, ...] = ()  #: hardware: trainings with these very settings

    def __post_init__(self) -> None:
        if self.kind not in get_args(ProfileKind):
            raise ValueError(unknown("Profile kind", self.kind, get_args(ProfileKind)))
        if self.kind == "hardware" and self.name == AUTO:
            raise ValueError(f"{AUTO} is no name for a hardware profile: it stands for the one of this machine's card")
        settable = {"hardware": set(DEFAULTS), "quantize": set(QUANTIZED)}.get(self.kind, set())
        for name in self.sets:
            if name not in settable:
                raise ValueError(f"the {self.kind} profile {self.name} sets memory.{name}, which it cannot")
        if self.kind == "quantize" and set(self.sets) != set(QUANTIZED):
            raise ValueError(f"the quantize profile {self.name} must set {' and '.join(QUANTIZED)}")
        if self.fits and self.kind != "hardware":
            raise ValueError(f"fits is for hardware profiles, and {self.name} is one of {self.kind}")
        if self.card_gib is not None and self.card_gib < 1:
            raise ValueError(f"card_gib: a whole number from 1 up belongs here, not {self.card_gib}")

    @property
    def shape(self) -> dict[str, int]:
        """The training that a hardware profile is for: each of `SHAPE`."""
        return SHAPE | self.fits


#: What a hardware profile is for unless it says otherwise: `dataset.resolution`, `train.batch_size` and `lora.rank`.
SHAPE = {"resolution": 1024, "batch_size": 1, "rank": 32}

#: What `memory.profile` says to have the profile of this machine's card.
AUTO = "auto"

#: What a quantisation profile sets: how frozen weights are stored, and what their products are computed in.
QUANTIZED = ("storage", "compute")

#: What holds for a field of `memory` that neither the spec nor its profile sets.
DEFAULTS: dict[str, Any] = {
    "quantize": "none",
    "storage": "none",
    "compute": "model",
    "text_encoder": "none",
    "offload": "none",
    "compile": "none",
    "gradient_checkpointing": "full",
}


def resolve_memory(spec: TrainSpec, profiles: Mapping[tuple[str, str], Profile]) -> TrainSpec:
    """The spec with every field of `memory` filled in: its own value, else its profile's, else the default.

    `quantize` becomes the name of the profile with the storage and compute there are, or stays empty when none has
    them; the profile `auto` becomes the one for this machine's card. Raises SpecError for a profile, quantisation,
    offload or compile name that is not registered, and for a quantisation whose storage or compute is contradicted
    beside it.
    """
    from loraport.spec.models import MemorySection

    name, preset = _preset(spec, profiles)
    own = {field: value for field in DEFAULTS if (value := getattr(spec.memory, field)) is not None}
    filled = (
        DEFAULTS
        | _with_quantized(preset, profiles, f"the profile {name}: ")
        | _with_quantized(own, profiles, "memory.")
    )
    for kind in ("offload", "compile"):
        _find(profiles, kind, f"memory.{kind}", filled[kind])
    filled["quantize"] = _quantize_name(filled, profiles)
    return spec.model_copy(update={"memory": MemorySection(profile=name, **filled)})


def _preset(spec: TrainSpec, profiles: Mapping[tuple[str, str], Profile]) -> tuple[str | None, Mapping[str, Any]]:
    name = spec.memory.profile
    if name is None:
        return None, {}
    if name == AUTO:
        return _preset_of_this_machine(spec, profiles)
    return name, _find(profiles, "hardware", "memory.profile", name).sets


def _with_quantized(
    settings: Mapping[str, Any], profiles: Mapping[tuple[str, str], Profile], where: str
) -> dict[str, Any]:
    """Settings with what their `quantize` stands for beside it."""
    if "quantize" not in settings:
        return dict(settings)
    quantize = settings["quantize"]
    stands_for = _find(profiles, "quantize", f"{where}quantize", quantize).sets
    for name, value in stands_for.items():
        if settings.get(name, value) != value:
            raise SpecError(
                f"{where}quantize: {quantize} means {name}: {value}, but {where}{name} is {settings[name]}.",
                hint="Keep one of the two.",
            )
    return {**settings, **stands_for}


def _quantize_name(filled: Mapping[str, Any], profiles: Mapping[tuple[str, str], Profile]) -> str | None:
    """The quantisation with this storage and compute: the one that was named, if it is among them."""
    wanted = {name: filled[name] for name in QUANTIZED}
    same = [name for (kind, name), profile in profiles.items() if kind == "quantize" and profile.sets == wanted]
    return filled["quantize"] if filled["quantize"] in same else next(iter(same), None)


def _find(profiles: Mapping[tuple[str, str], Profile], kind: str, where: str, name: str) -> Profile:
    if (kind, name) not in profiles:
        known = [known for of, known in profiles if of == kind]
        raise SpecError(unknown(f"{where}:", name, [*known, AUTO] if kind == "hardware" else known))
    return profiles[(kind, name)]


def _preset_of_this_machine(
    spec: TrainSpec, profiles: Mapping[tuple[str, str], Profile]
) -> tuple[str | None, Mapping[str, Any]]:
    """The name and the settings of the hardware profile for the smallest of the cards that a spec trains on."""
    from loraport.gpu import cards_for, settings_for

    choices = ", ".join(name for kind, name in profiles if kind == "hardware")
    found = cards_for(spec)
    if not found:
        raise SpecError(
            "memory.profile: auto reads the card, and this machine has no NVIDIA card that can be asked.",
            hint=f"Name a profile instead: {choices}.",
        )
    card = min(found, key=lambda card: card.memory_gib)
    chosen = settings_for(card, profiles)
    if chosen is None:
        raise SpecError(
            f"memory.profile: auto: {card.name} ({card.memory_gib:.1f} GiB) is smaller than the card of every profile.",
            hint=f"Name a profile instead: {choices}.",
        )
    profile, settings = chosen
    return profile.name, settings


def read_profiles(root: Traversable) -> list[Profile]:
    """The profiles under a folder with one subfolder a kind and one YAML file a profile, named by its file.

    Raises SpecError with the file and the key where one is not a profile.
    """
    found = []
    for folder in sorted(root.iterdir(), key=lambda each: each.name):
        if folder.is_dir() and not folder.name.startswith((".", "__")) and folder.name not in get_args(ProfileKind):
            raise SpecError(
                unknown(f"{root}: a folder of profiles is named after a kind;", folder.name, get_args(ProfileKind))
            )
    for kind in get_args(ProfileKind):
        if (root / kind).is_dir():
            files = sorted((root / kind).iterdir(), key=lambda file: file.name)
            found += [_read_profile(kind, file) for file in files if file.name.endswith((".yaml", ".yml"))]
    return found


def user_profiles(folder: Path, known: Mapping[tuple[str, str], Profile]) -> dict[tuple[str, str], Profile]:
    """The user's own profiles, under a folder as `read_profiles` describes it; none when it is not there.

    A name that is taken is an error and no replacement, so that a profile's name means the same everywhere. Raises
    SpecError for that, for a broken file, and for a hardware profile that names a profile which is nowhere.
    """
    if not folder.is_dir():
        return {}
    found: dict[tuple[str, str], Profile] = {(each.kind, each.name): each for each in read_profiles(folder)}
    for (kind, name), profile in found.items():
        file = folder / kind / f"{name}.yaml"
        if (kind, name) in known:
            raise SpecError(f"{file}: there is a {kind} profile {name} already.", hint="Give the file another name.")
        for field_name in ("quantize", "offload", "compile"):
            if field_name in profile.sets:
                _find(dict(known) | found, field_name, f"{file}: sets.{field_name}", profile.sets[field_name])
    return found


def _read_profile(kind: ProfileKind, file: Traversable) -> Profile:
    from loraport.spec.yaml_text import parse_yaml

    try:
        content = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise SpecError(f"{file}: a profile is a mapping of description, sets, card_gib and fits.")
    for key, value in content.items():
        if key not in _KEYS:
            raise SpecError(unknown(f"{file}:", key, _KEYS))
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise SpecError(f"{file}: {key}: {_TYPES[_KEYS[key]]} belongs here, not {value!r}.")
    if "description" not in content:
        raise SpecError(f"{file}: description: needed, but not there.")
    name = file.name.rsplit(".", 1)[0]
    try:
        sets, fits = _sets(content, file), _fits(content, file)
        return Profile(kind, name, content["description"], sets, content.get("card_gib"), fits)
    except ValueError as error:
        raise error if isinstance(error, SpecError) else SpecError(f"{file}: {error}.") from error


def _sets(content: Mapping[str, Any], file: Traversable) -> dict[str, Any]:
    from pydantic import ValidationError

    from loraport.spec.models import MemorySection

    sets = content.get("sets", {})
    for name in sets:
        if name not in DEFAULTS:
            raise SpecError(unknown(f"{file}: sets:", name, DEFAULTS))
    try:
        return MemorySection(**sets).model_dump(exclude_none=True)
    except ValidationError as error:
        problem = error.errors()[0]
        told = f"{problem['msg'][:1].lower()}{problem['msg'][1:]}"
        raise SpecError(f"{file}: sets.{problem['loc'][0]}: {told} (got {problem['input']!r}).") from error


def _fits(content: Mapping[str, Any], file: Traversable) -> dict[str, int]:
    fits: dict[str, int] = content.get("fits", {})
    for name, value in fits.items():
        if name not in SHAPE:
            raise SpecError(unknown(f"{file}: fits:", name, SHAPE))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SpecError(f"{file}: fits.{name}: a whole number from 1 up belongs here, not {value!r}.")
    return fits


#: The keys of a profile's file, and what their values are.
_KEYS: dict[str, type] = {"description": str, "sets": dict, "card_gib": int, "fits": dict}
_TYPES = {str: "text", dict: "a mapping", int: "a whole number"}
