"""Two benches against each other: what changed beyond the noise, and what can't be compared and why.

A number has changed when each median lies outside the other's range from 10th to 90th percentile, and the medians
differ by more than a threshold. The range is over all measured steps of all repeats for seconds a step, over the
repeats for everything else; of one repeat it is a point, so there the threshold alone decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from loraport.errors import DataError, SpecError, unknown
from loraport_bench.records import Results, Run
from loraport_bench.report.numbers import PHASES, Entry, Numbers, gib, groups, seconds
from loraport_bench.report.tables import phase_title

Aspect = Literal["speed", "memory", "phases", "quality"]
ASPECTS: tuple[Aspect, ...] = ("speed", "memory", "phases", "quality")
Verdict = Literal["worse", "better", "same"]
#: A phase, or a whole run, must change by more than this too, in seconds: starting a program varies so much.
PHASE_SECONDS = 1.0
#: Losses without a LoRA that differ by a larger share are of other images, another model or another evaluator.
SAME_WITHOUT = 0.001
_CLOCKS = {"trainer": "the trainer's own clock", "outside": "a clock outside"}
_NOT_SETTINGS = ("train.seed", "dataset.path", "name", "version")
#: Settings that decide how much work a run is, or what is trained.
WORK = ("lora.", "train.", "dataset.")
_PROTOCOL = {
    "steps": "optimizer steps",
    "warm_up": "steps of warm-up",
    "resolution": "resolution",
    "images_sha256": "images or captions",
}


@dataclass(frozen=True)
class Change:
    """A number of a row, in both benches. `share`: by how much the new median is larger, of the old one; of held-out
    losses by how much it is larger as a share of the loss without a LoRA. `verdict` follows the rule above."""

    row: str
    aspect: Aspect
    what: str
    unit: Literal["s", "bytes", "loss"]
    old: Numbers
    new: Numbers
    share: float
    verdict: Verdict

    def text(self) -> str:
        """One line without the verdict."""
        of = " of the loss without a LoRA" if self.unit == "loss" else ""
        old, new = (_shown(each.median, self.unit) for each in (self.old, self.new))
        return f"{self.row}: {self.what}: {old} → {new} ({100 * self.share:+.1f} %{of})"


@dataclass
class Comparison:
    """What comes of comparing two benches."""

    threshold: float
    quality_threshold: float
    differences: list[str] = field(default_factory=list)  #: of hardware, versions and settings
    changes: list[Change] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  #: rows that came to their end before, and don't now
    repaired: list[str] = field(default_factory=list)  #: rows that come to their end only now
    missing: list[str] = field(default_factory=list)  #: rows of OLD that NEW has not
    added: list[str] = field(default_factory=list)  #: rows of NEW that OLD has not
    skipped: list[str] = field(default_factory=list)  #: what could not be compared, and why

    def of(self, verdict: Verdict) -> list[Change]:
        """The changes with a verdict."""
        return [change for change in self.changes if change.verdict == verdict]

    @property
    def worse(self) -> int:
        """How much got worse."""
        return len(self.of("worse")) + len(self.broken)

    def as_json(self) -> dict[str, Any]:
        """Plain data, with the number of what got worse."""
        return {**asdict(self), "worse": self.worse}

    def lines(self) -> list[str]:
        """What to print."""
        found = [f"note: {each}" for each in self.differences]
        found += [f"only in OLD: {each}" for each in self.missing]
        found += [f"only in NEW: {each}" for each in self.added]
        found += [f"worse: {each}" for each in self.broken]
        found += [f"worse: {change.text()}" for change in self.of("worse")]
        found += [f"better: {each}" for each in self.repaired]
        found += [f"better: {change.text()}" for change in self.of("better")]
        found += [f"not compared: {each}" for each in self.skipped]
        same = len(self.of("same"))
        better = len(self.of("better")) + len(self.repaired)
        found.append(f"{self.worse} worse, {better} better, {same} within the noise.")
        return found


def compare(
    old: Results,
    new: Results,
    threshold: float = 0.05,
    quality_threshold: float = 0.01,
    aspects: Sequence[Aspect] = ASPECTS,
) -> Comparison:
    """Compare rows of the same tier, quantisation, batch size and backend. Thresholds are shares: of the old median,
    and for held-out losses of the loss without a LoRA. Raises DataError when the two have no row in common, or none
    that can be compared."""
    found = Comparison(threshold, quality_threshold)
    before, after = _rows(old), _rows(new)
    if not before.keys() & after.keys():
        raise DataError(
            "The two benches have no row in common.",
            hint=f"OLD has {', '.join(before) or 'none'}; NEW has {', '.join(after) or 'none'}.",
        )
    found.missing = [row for row in before if row not in after]
    found.added = [row for row in after if row not in before]
    found.differences = [f"{name} is not complete" for name, each in (("OLD", old), ("NEW", new)) if not each.complete]
    found.differences += _machines(old, new)
    other = [
        f"{name} {getattr(old.protocol, key)} → {getattr(new.protocol, key)}"
        for key, name in _PROTOCOL.items()
        if getattr(old.protocol, key) != getattr(new.protocol, key)
    ]
    for row in before:
        if row in after:
            _row(found, row, before[row], after[row], other, aspects)
    found.differences = list(dict.fromkeys(found.differences))
    if found.skipped and not (found.changes or found.broken or found.repaired):
        raise DataError("Nothing of the two benches can be compared.", hint="\n  ".join(found.skipped))
    return found


def share_of(text: str, option: str) -> float:
    """A threshold such as `5%` or `0.05` as a share. Raises SpecError naming the option."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise SpecError(f"{option}: {text!r} is no share; give one such as 5% or 0.05, below 100%.")
    return value


def aspects_of(text: str) -> list[Aspect]:
    """Aspects from a list with commas. Raises SpecError for one that isn't there."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ASPECTS:
            raise SpecError(unknown("--of: aspect", name, ASPECTS))
    if not names:
        raise SpecError(f"--of names nothing to compare. Choices: {', '.join(ASPECTS)}.")
    return [each for each in ASPECTS if each in names]


def _rows(results: Results) -> dict[str, Entry]:
    return {f"{group.name}/{one.backend}": one for group in groups(results) for one in group.entries}


def _row(found: Comparison, row: str, old: Entry, new: Entry, other: Sequence[str], aspects: Sequence[Aspect]) -> None:
    work, settings = _settings(old, new)
    if other or work:
        found.skipped.append(f"{row}: other work: {'; '.join([*other, *work])}")
        return
    if settings:
        found.differences.append(f"{row}: other settings: {'; '.join(settings)}")
    found.differences += _versions(old, new)
    failed_before, failed_now = _failures(old), _failures(new)
    if len(failed_now) / len(new.runs) > len(failed_before) / len(old.runs):
        why = "; ".join(dict.fromkeys(failed_now))
        found.broken.append(f"{row}: {len(new.good)} of {len(new.runs)} runs come to their end ({why})")
    elif len(failed_now) / len(new.runs) < len(failed_before) / len(old.runs):
        found.repaired.append(f"{row}: {len(new.good)} of {len(new.runs)} runs come to their end")
    if old.good and new.good:
        for aspect in aspects:
            found.changes += list(_judged(found, row, aspect, old, new))


def _failures(one: Entry) -> list[str]:
    return [f"{run.failure.reason}: {' '.join(run.failure.message.split())[:200]}" for run in one.runs if run.failure]


def _judged(found: Comparison, row: str, aspect: Aspect, old: Entry, new: Entry) -> Iterator[Change]:
    """The changes of an aspect; what can't be compared goes to `found.skipped`."""

    def skip(what: str, why: str) -> None:
        found.skipped.append(f"{row}: {what}: {why}")

    def judged(
        what: str, unit: Literal["s", "bytes", "loss"], one: Numbers | None, other: Numbers | None, least: float = 0.0
    ) -> Iterator[Change]:
        if one is None and other is None:
            return
        if one is None or other is None:
            skip(what, f"measured only in {'NEW' if one is None else 'OLD'}")
            return
        whole = without if unit == "loss" else one.median
        difference = other.median - one.median
        share = difference / whole if whole else float(difference > 0)
        limit = found.quality_threshold if unit == "loss" else found.threshold
        changed = one.apart_from(other) and abs(share) > limit and abs(difference) > least
        verdict: Verdict = "same" if not changed else "worse" if difference > 0 else "better"
        yield Change(row, aspect, what, unit, one, other, share, verdict)

    without = 1.0
    if aspect == "speed":
        clocks = [{run.steps.measured for run in each.good if run.steps} for each in (old, new)]
        if clocks[0] != clocks[1] and all(clocks):
            whose = [_either([_CLOCKS[each] for each in of]) for of in clocks]
            skip("seconds a step", f"by {whose[0]} in OLD, by {whose[1]} in NEW")
        else:
            yield from judged("seconds a step", "s", old.step_s, new.step_s)
        yield from judged("whole run", "s", old.total_s, new.total_s, PHASE_SECONDS)
    elif aspect == "memory":
        if old.scopes != new.scopes and old.scopes and new.scopes:
            skip("device memory", f"of {_either(old.scopes)} in OLD, of {_either(new.scopes)} in NEW")
        else:
            yield from judged("device memory", "bytes", old.device_bytes, new.device_bytes)
        yield from judged("host memory", "bytes", old.host_bytes, new.host_bytes)
    elif aspect == "phases":
        for name in PHASES:
            what = f"phase {phase_title(name)}"
            yield from judged(what, "s", old.phase(name), new.phase(name), PHASE_SECONDS)
    else:
        scored = [[run.quality for run in each.good if run.quality] for each in (old, new)]
        if all(scored):
            one, other = scored[0][0], scored[1][0]
            if one.triples != other.triples or abs(other.without / one.without - 1) > SAME_WITHOUT:
                told = f"{one.without:.4f} over {one.triples} in OLD, {other.without:.4f} over {other.triples} in NEW"
                skip("held-out loss", f"another one without a LoRA: {told}")
                return
            if one.evaluator != other.evaluator:
                found.differences.append(f"other evaluator: {one.evaluator} → {other.evaluator}")
            without = one.without
        yield from judged("held-out loss", "loss", old.loss, new.loss)


def _either(names: Sequence[str]) -> str:
    return " or ".join(sorted(names))


def _machines(old: Results, new: Results) -> list[str]:
    """What differs in hardware and drivers, over the whole bench."""

    def parts(results: Results) -> dict[str, list[str]]:
        at = [run.machine for run in results.runs if run.machine]
        told = {
            "GPU": [each.card or "none" for each in at],
            "GPUs": [str(each.cards) for each in at],
            "driver": [each.driver or "none" for each in at],
            "processor": [each.processor for each in at],
            "cores": [str(each.cores) for each in at],
            "system": [each.system for each in at],
        }
        return {name: sorted(set(values)) for name, values in told.items()}

    before, after = parts(old), parts(new)
    return [
        f"other hardware or system: {name} {', '.join(before[name])} → {', '.join(after[name])}"
        for name in before
        if before[name] != after[name] and before[name] and after[name]
    ]


def _versions(old: Entry, new: Entry) -> list[str]:
    def held(one: Entry) -> dict[str, list[str]]:
        names = {name for run in one.runs for name in run.versions}
        return {name: sorted({run.versions[name] for run in one.runs if name in run.versions}) for name in names}

    before, after = held(old), held(new)
    return [
        f"{old.backend}: other version: {name} {_listed(before.get(name))} → {_listed(after.get(name))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _listed(values: list[str] | None) -> str:
    return ", ".join(values) if values else "none"


def _settings(old: Entry, new: Entry) -> tuple[list[str], list[str]]:
    """The settings that differ: those that make it other work, and the rest."""
    before, after = settings_of(old.runs), settings_of(new.runs)
    if before is None or after is None:
        return [], []
    told = {name: f"{name} {one!r} → {two!r}" for name, (one, two) in differing(before, after).items()}
    work = [text for name, text in told.items() if name.startswith(WORK)]
    return work, [text for name, text in told.items() if not name.startswith(WORK)]


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of each setting that differs; None where one side has it not."""
    names = dict.fromkeys([*before, *after])
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def settings_of(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The settings of a row by dotted paths, without what differs between its repeats; None when it has no plan."""
    made = next((run.configuration for run in runs if run.configuration), None)
    return None if made is None else dict(_flat(made.spec))


def _flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        path = f"{before}{name}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}.")
        elif path not in _NOT_SETTINGS and not _is_place(value):
            yield path, value


def _is_place(value: Any) -> bool:
    """Whether a value is a path of one machine."""
    return isinstance(value, str) and value.startswith(("/", "<", "…/"))


def _shown(value: float, unit: str) -> str:
    return {"s": seconds, "bytes": gib, "loss": "{:.4f}".format}[unit](value)
