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
class Profile:
    """One named setting. A hardware profile's `sets` fills fields of `memory` that the spec leaves out."""

    kind: ProfileKind
    name: str
    description: str
    sets: dict[str, Any] = field(default_factory=dict)
    card_gib: int | None = None  #: hardware: memory of the card it is for, GiB

    def __post_init__(self) -> None:
        if self.kind not in get_args(ProfileKind):
            raise ValueError(unknown("Profile kind", self.kind, get_args(ProfileKind)))
        for name in self.sets:
            if self.kind != "hardware" or name not in DEFAULTS:
                raise ValueError(f"the {self.kind} profile {self.name} sets memory.{name}, which it cannot")


#: What holds for a field of `memory` that neither the spec nor its profile sets.
DEFAULTS: dict[str, Any] = {
    "quantize": "none",
    "offload": "none",
    "compile": "none",
    "gradient_checkpointing": True,
}


def resolve_memory(spec: TrainSpec, profiles: Mapping[tuple[str, str], Profile]) -> TrainSpec:
    """The spec with every field of `memory` filled in: its own value, else its profile's, else the default.

    Raises SpecError for a profile, quantisation, offload or compile name that is not registered.
    """
    from loraport.spec.models import MemorySection

    chosen: dict[str, Any] = {}
    if spec.memory.profile is not None:
        chosen = _find(profiles, "hardware", "memory.profile", spec.memory.profile).sets
    filled: dict[str, Any] = {"profile": spec.memory.profile}
    for name, default in DEFAULTS.items():
        own = getattr(spec.memory, name)
        filled[name] = chosen.get(name, default) if own is None else own
        if name != "gradient_checkpointing":
            _find(profiles, name, f"memory.{name}", filled[name])
    return spec.model_copy(update={"memory": MemorySection(**filled)})


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
