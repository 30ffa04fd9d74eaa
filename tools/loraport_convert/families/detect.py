"""Which family a set of module names belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from loraport.errors import DataError
from loraport_convert.families import FAMILIES
from loraport_convert.families.rules import ModuleMap, Shape, Span

_FEWEST = 0.5  #: the share of modules that a family must know

Named = tuple[str, bool]  # a module's name as a file has it, and whether its dots became underscores


def detect_family(modules: Mapping[Named, Shape]) -> ModuleMap | None:
    """The family that knows most of the modules; of several, the one whose models have these widths and depths.

    None where no family knows half of them. Raises DataError when several fit equally and would read the names
    differently, which happens only with models of unusual sizes.
    """
    if not modules:
        return None
    scores = {name: _score(family, modules) for name, family in FAMILIES.items()}
    best = max(scores.values())
    if best[0] < _FEWEST:
        return None
    fitting = [FAMILIES[name] for name, score in scores.items() if score == best]
    readings = {tuple(_spans(family, name, shape) for name, shape in modules.items()) for family in fitting}
    if len(readings) > 1:
        raise DataError(
            f"The modules could be those of {' or '.join(family.name for family in fitting)}: the names fit each, and "
            "the sizes none.",
            hint="Say which it is with --family NAME.",
        )
    return fitting[0]


def _score(family: ModuleMap, modules: Mapping[Named, Shape]) -> tuple[float, float, int]:
    """The share of modules it knows, the share that has one of its widths, and how many stacks are of its depth."""
    known = fitting = 0
    deepest: dict[str, int] = {}
    for name, shape in modules.items():
        spans = _spans(family, name, shape)
        if spans is None:
            continue
        stack = _layer(spans[0].module)
        if stack is not None:
            most = max(family.depths.get(stack[0], (1 << 30,)))
            if stack[1] >= most:
                continue
            deepest[stack[0]] = max(deepest.get(stack[0], 0), stack[1] + 1)
        known += 1
        fitting += shape[1] in family.columns
    complete = sum(depth in family.depths.get(stack, ()) for stack, depth in deepest.items())
    return known / len(modules), fitting / len(modules), complete


def _spans(family: ModuleMap, name: Named, shape: Shape) -> tuple[Span, ...] | None:
    return _cached(family.name, *name, shape)


@lru_cache(maxsize=1 << 15)
def _cached(family: str, name: str, flat: bool, shape: Shape) -> tuple[Span, ...] | None:
    return FAMILIES[family].native(name, shape, flat)


def _layer(module: str) -> tuple[str, int] | None:
    found = re.match(r"(.+?)\.(\d+)\.", module)
    return (found[1], int(found[2])) if found else None
