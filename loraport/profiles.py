"""Profiles: named, shared answers to "how does this fit and run fast". The built-in ones are YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any, Literal, get_args

from loraport.errors import SpecError, unknown

if TYPE_CHECKING:
    from loraport.spec.models import TrainSpec

ProfileKind = Literal["hardware", "quantize", "offload", "compile"]


@dataclass(frozen=True)
class Measurement:
    """A training of the native backend at full size that was run on a card. Memory in GiB, of torch's allocator."""

    card: str
    date: str
    resolution: int
    text_tokens: int
    rank: int
    batch_size: int
    optimizer: str
    gpus: int
    memory: dict[str, str]  #: storage, compute, offload, compile, gradient_checkpointing
    step_s: float  #: median seconds a step
    peak_allocated_gib: float
    peak_reserved_gib: float
    source: str  #: file under docs/benchmarks


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
    measured: tuple[Measurement, ...] = ()  #: hardware: trainings with these very settings

    def __post_init__(self) -> None:
        if self.kind not in get_args(ProfileKind):
            raise ValueError(unknown("Profile kind", self.kind, get_args(ProfileKind)))
        settable = {"hardware": set(DEFAULTS), "quantize": set(QUANTIZED)}.get(self.kind, set())
        for name in self.sets:
            if name not in settable:
                raise ValueError(f"the {self.kind} profile {self.name} sets memory.{name}, which it cannot")
        if self.kind == "quantize" and set(self.sets) != set(QUANTIZED):
            raise ValueError(f"the quantize profile {self.name} must set {' and '.join(QUANTIZED)}")


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
    them. Raises SpecError for a profile, quantisation, offload or compile name that is not registered, and for a
    quantisation whose storage or compute is contradicted beside it.
    """
    from loraport.spec.models import MemorySection

    name = spec.memory.profile
    preset = {} if name is None else _find(profiles, "hardware", "memory.profile", name).sets
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
        raise SpecError(unknown(f"{where}:", name, [known for of, known in profiles if of == kind]))
    return profiles[(kind, name)]


def read_profiles(root: Traversable) -> list[Profile]:
    """The profiles under a folder with one subfolder a kind and one YAML file a profile, named by its file."""
    import yaml

    found = []
    for kind in get_args(ProfileKind):
        for file in sorted((root / kind).iterdir(), key=lambda file: file.name):
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            found.append(Profile(kind=kind, name=file.name.removesuffix(".yaml"), **content))
    return found
