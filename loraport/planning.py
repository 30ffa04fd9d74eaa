"""A plan: what one backend will do with every field of a spec, and exactly what would be started.

Making a plan writes nothing and starts nothing, so planning, comparing and testing are the same call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraport.errors import BackendError, SpecError
from loraport.spec.models import ImageSetSection, TrainSpec, leaf_fields, set_fields, value_at

if TYPE_CHECKING:
    from loraport.footprint import Forecast


class Kind(StrEnum):
    """What a backend does with a field."""

    EXACT = "exact"  #: as the spec says
    APPROXIMATED = "approximated"  #: something close; the reason says how it differs
    DEFAULTED = "defaulted"  #: the backend's own fixed value instead; the reason names it
    IGNORED = "ignored"  #: nothing; the reason says why
    REFUSED = "refused"  #: the backend cannot train this spec; the reason says what to do


@dataclass(frozen=True)
class Verdict:
    """What happens to the value at one dotted path of the spec, and why."""

    path: str
    value: Any
    kind: Kind
    reason: str


@dataclass(frozen=True)
class Translation:
    """What a backend makes of a spec: verdicts by path, files to write, the command to start.

    `files` maps a path relative to the run folder to its text. `command` and `env` hold absolute paths.
    """

    verdicts: list[Verdict]
    files: dict[str, str]
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Where a translation will run."""

    run_dir: Path
    resume: bool = False


@dataclass(frozen=True)
class Plan:
    """A translation with the backend's name and version and the spec it was made from."""

    backend: str
    backend_version: str
    spec: TrainSpec
    run_dir: Path
    verdicts: list[Verdict]
    files: dict[str, str]
    command: list[str]
    env: dict[str, str]
    memory: Forecast | None = None  #: the device memory it will take, of a backend that predicts it
    card: str | None = None  #: the card of this machine that it was made for; of several, the smallest
    lacking: str | None = None  #: what that card has no hardware for, and what to do

    def not_exact(self) -> list[Verdict]:
        """The verdicts `--strict` stops at."""
        return [verdict for verdict in self.verdicts if verdict.kind is not Kind.EXACT]

    def refused(self) -> list[Verdict]:
        """The verdicts that stop any run."""
        return [verdict for verdict in self.verdicts if verdict.kind is Kind.REFUSED]

    @property
    def reads_images(self) -> bool:
        """Whether the backend does anything with the images that the spec names."""
        return all(v.kind is not Kind.IGNORED for v in self.verdicts if v.path == "dataset.path")

    def check(self, strict: bool = False) -> None:
        """Raise SpecError when a field is refused, or, if `strict`, when any is not exact."""
        bad = self.not_exact() if strict else self.refused()
        if bad:
            lines = "\n".join(f"  {v.path} = {v.value!r}: {v.kind}: {v.reason}" for v in bad)
            rule = "--strict allows only exact fields" if strict else "these fields must change first"
            raise SpecError(f"{self.backend} will not train this spec as written; {rule}:\n{lines}")

    def check_card(self) -> None:
        """Raise SpecError when this machine's card clearly cannot do it, so that nothing is loaded in vain."""
        if self.lacking is not None:
            raise SpecError(self.lacking)
        if self.memory is not None:
            self.memory.check()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data for JSON."""
        return {
            "backend": self.backend,
            "backend_version": self.backend_version,
            "spec_hash": self.spec.hash(),
            "run_dir": str(self.run_dir),
            "verdicts": [
                {"path": v.path, "value": _plain(v.value), "kind": str(v.kind), "reason": v.reason}
                for v in self.verdicts
            ],
            "files": self.files,
            "command": self.command,
            "env": self.env,
            "memory": None if self.memory is None else self.memory.to_dict(),
            "card": self.card,
            "lacking": self.lacking,
        }


#: With this verdict on `dataset.sets`, what the single sets say needs none of its own: it holds for all of them.
_WHOLESALE = (Kind.IGNORED, Kind.REFUSED)
SETS = "dataset.sets"


class VerdictTable:
    """Collects one verdict for each field of a spec, and fails loudly when a field is forgotten or judged twice.

    What a set of images says itself (`dataset.sets[0].path`) is a field too, unless all of `dataset.sets` is ignored or
    refused.
    """

    def __init__(self, spec: TrainSpec):
        self.spec = spec
        self._verdicts: dict[str, Verdict] = {}
        self._paths = spec_fields(spec)

    def exact(self, *paths: str, reason: str) -> None:
        self._add(paths, Kind.EXACT, reason)

    def approximated(self, *paths: str, reason: str) -> None:
        self._add(paths, Kind.APPROXIMATED, reason)

    def defaulted(self, *paths: str, reason: str) -> None:
        self._add(paths, Kind.DEFAULTED, reason)

    def ignored(self, *paths: str, reason: str) -> None:
        self._add(paths, Kind.IGNORED, reason)

    def refused(self, *paths: str, reason: str) -> None:
        self._add(paths, Kind.REFUSED, reason)

    def choose(self, path: str, supported: Iterable[Any], exact: str, instead: str) -> None:
        """Exact when the value is among `supported`, else refused with `instead` as what to do."""
        supported = list(supported)
        if value_at(self.spec, path) in supported:
            self.exact(path, reason=exact)
        else:
            choices = ", ".join(str(choice) for choice in supported)
            self.refused(path, reason=f"only {choices}; {instead}")

    def finish(self) -> list[Verdict]:
        """All verdicts in the spec's order. A missing one is a defect of the backend."""
        verdicts = _with_sets(self.spec, self._verdicts)
        missing = [path for path in self._paths if path not in verdicts]
        assert not missing, f"no verdict for {missing}"
        return [verdicts[path] for path in self._paths]

    def _add(self, paths: Iterable[str], kind: Kind, reason: str) -> None:
        for path in paths:
            assert path in self._paths, f"{path} is not a field of the spec"
            assert path not in self._verdicts, f"second verdict for {path}"
            self._verdicts[path] = Verdict(path, _shown(self.spec, path), kind, reason)


def spec_fields(spec: TrainSpec) -> list[str]:
    """Every path of a spec that has a verdict, in order: all fields, and what the sets of images say themselves."""
    paths = list(leaf_fields())
    at = paths.index(SETS) + 1
    return [*paths[:at], *set_fields(spec), *paths[at:]]


def _with_sets(spec: TrainSpec, verdicts: dict[str, Verdict]) -> dict[str, Verdict]:
    """The verdicts, with that on all sets for what each of them says, where it holds for it."""
    whole = verdicts.get(SETS)
    if whole is None or whole.kind not in _WHOLESALE:
        return verdicts
    return {path: Verdict(path, value_at(spec, path), whole.kind, whole.reason) for path in set_fields(spec)} | verdicts


def _shown(spec: TrainSpec, path: str) -> Any:
    """The value as a verdict tells it: of the sets, where they are."""
    return [str(one.path) for one in spec.dataset.sets] if path == SETS else value_at(spec, path)


def make_plan(spec: TrainSpec, backend: Any, run_dir: Path, resume: bool = False) -> Plan:
    """Ask a backend (`loraport.backend.Backend`) what it would do with a resolved spec. Writes and starts nothing.

    The verdicts come in the spec's order. Raises BackendError when the backend does not judge every field once.
    """
    translate: Callable[[TrainSpec, Context], Translation] = backend.translate
    result = translate(spec, Context(run_dir=run_dir, resume=resume))
    counts = Counter(verdict.path for verdict in result.verdicts)
    verdicts = _with_sets(spec, {verdict.path: verdict for verdict in result.verdicts})
    fields = spec_fields(spec)
    for what, paths in (
        ("gives no verdict for", [path for path in fields if path not in verdicts]),
        ("judges what is no field of the spec", [path for path in counts if path not in fields]),
        ("judges twice", [path for path, count in counts.items() if count > 1]),
    ):
        if paths:
            raise BackendError(
                f"The backend {backend.name} {what}: {', '.join(paths)}.",
                hint="This is a defect of that backend: it must judge every field of the spec, once.",
            )
    return Plan(
        backend=backend.name,
        backend_version=backend.version,
        spec=spec,
        run_dir=run_dir,
        verdicts=[verdicts[path] for path in fields],
        files=result.files,
        command=result.command,
        env=result.env,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, ImageSetSection):
        return str(value.path)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value
