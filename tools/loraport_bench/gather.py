"""Several benches as one: cells of a comparison that were measured apart, on cards or machines of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loraport.errors import DataError, SpecError
from loraport_bench import records as r
from loraport_bench.compare import WORK, differing, settings_of
from loraport_bench.equal_work import with_differences

#: What must be alike wherever rows are shown side by side.
_SAME = ("images", "held_out", "images_sha256", "resolution")
#: What must be alike within a group too, whose rows are compared.
_SAME_IN_GROUP = ("steps", "warm_up", "sampling_s")


def gathered(benches: Mapping[str, r.Results]) -> r.Results:
    """One results file of several, by the names of their folders. Raises DataError when they trained other images,
    when a group of rows that are compared took other steps in one of them, or when two hold the same row; SpecError
    when what would be repeats of one row trained otherwise."""
    found = list(benches.values())
    _refuse_others(benches)
    _refuse_other_work(benches)
    sources = [source for place, each in benches.items() for source in _sources(place, each)]
    hashes = list(dict.fromkeys(each.spec_sha256 for each in found))
    runs = [run for each in found for run in each.runs]
    return r.Results(
        name=", ".join(dict.fromkeys(each.name for each in found)),
        command="\n".join(dict.fromkeys(each.command for each in found)),
        created=min(each.created for each in found),
        updated=max(each.updated for each in found),
        complete=all(each.complete for each in found),
        spec_sha256=hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest(),
        spec=_shared([each.spec for each in found]),
        protocol=_together([each.protocol for each in found]),
        inequalities=_inequalities(found),
        runs=with_differences(runs),
        sources=sources,
    )


def _sources(place: str, one: r.Results) -> list[r.Source]:
    if one.sources:
        return one.sources
    names = set(r.Source.model_fields) - {"place"}
    return [r.Source(place=place, **{name: getattr(one, name) for name in names})]


def _refuse_others(benches: Mapping[str, r.Results]) -> None:
    (first, reference), *others = benches.items()
    for place, other in others:
        for name in _SAME:
            one, two = (getattr(each.protocol, name) for each in (reference, other))
            if one != two:
                raise DataError(
                    f"{first} and {place} are of other images: {name} is {one!r} and {two!r}.",
                    hint="A report is on one set of images. `loraport bench compare` tells how two benches differ.",
                )
    steps: dict[tuple[str, str, int], tuple[str, tuple[Any, ...]]] = {}
    keys: dict[str, str] = {}
    for place, each in benches.items():
        took = tuple(getattr(each.protocol, name) for name in _SAME_IN_GROUP)
        for run in each.runs:
            if (told := steps.setdefault(run.group, (place, took)))[1] != took:
                raise DataError(
                    f"{told[0]} and {place} both hold rows of {'/'.join(map(str, run.group))}, with other numbers of "
                    f"{', '.join(_SAME_IN_GROUP)}: {told[1]} and {took}.",
                    hint="Rows of a group are compared with each other: measure them alike.",
                )
            if run.key in keys:
                raise DataError(
                    f"{keys[run.key]} and {place} both hold the row {run.key}.",
                    hint="Each row counts once. Leave one of them out, or give the second other --seeds.",
                )
            keys[run.key] = place


def _refuse_other_work(benches: Mapping[str, r.Results]) -> None:
    """Runs of a backend in a group are repeats of one row, whose medians are told: they must be of the same work."""
    known: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}
    for place, each in benches.items():
        for run in each.runs:
            if (settings := settings_of([run])) is None:
                continue
            first, reference = known.setdefault((run.group, run.backend), (place, settings))
            for name, (one, two) in differing(reference, settings).items():
                if name.startswith(WORK):
                    raise SpecError(
                        f"The runs of {'/'.join(map(str, run.group))} by {run.backend} are no repeats of each other: "
                        f"{name} is {one!r} in {first} and {two!r} in {place}.",
                        hint="A report is on equal work. `loraport bench compare` tells how two benches differ.",
                    )


def _together(protocols: Sequence[r.Protocol]) -> r.Protocol:
    """What the benches did together; where they differ in a number, the first one's."""

    def union(name: str) -> list[Any]:
        return list(dict.fromkeys(value for each in protocols for value in getattr(each, name)))

    lists = ("backends", "profiles", "tiers", "seeds", "matched_fields")
    sizes = {batch: size for each in protocols for batch, size in zip(each.batches, each.images_a_step, strict=True)}
    more: dict[str, Any] = {name: union(name) for name in lists}
    more |= {"batches": list(sizes), "images_a_step": list(sizes.values())}
    more["repeats"] = max(each.repeats for each in protocols)
    more["changed"] = {path: why for each in protocols for path, why in each.changed.items()}
    return protocols[0].model_copy(update=more)


def _shared(specs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all specs say alike."""
    content = {}
    for name, value in specs[0].items():
        others = [spec.get(name) for spec in specs[1:]]
        if isinstance(value, dict) and all(isinstance(other, dict) for other in others):
            content[name] = _shared([value, *(other for other in others if isinstance(other, dict))])
        elif all(other == value for other in others):
            content[name] = value
    return content


def _inequalities(found: Iterable[r.Results]) -> dict[str, list[r.Inequality]]:
    """Of each group, a backend's word as any bench has it."""
    groups: dict[str, dict[str, r.Inequality]] = {}
    for each in found:
        for name, told in each.inequalities.items():
            paths = groups.setdefault(name, {})
            for one in told:
                known = paths.get(one.path, one)
                value = one.value if one.value == known.value else None
                backends = {**one.backends, **known.backends}
                paths[one.path] = r.Inequality(path=one.path, value=value, backends=backends)
    return {name: list(paths.values()) for name, paths in groups.items()}
