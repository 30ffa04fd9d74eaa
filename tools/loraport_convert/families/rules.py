"""A model family's module names: how those of diffusers and those of the original model, which are ComfyUI's, go
together.

A family is a table of rules, one a line, `#` standing for a layer number, `{a,b}` for modules whose rows lie one after
the other, and `*4` for four times as many rows as the others:

    name                      both call it so
    native = diffusers        the same rows
    native ~ diffusers        the two halves of the rows change places
    native ~2 diffusers       so only where the module has twice as many rows as columns
    native <- other           another name for it, that is read and never written (`<-~` with halves changing places)

A module's bias has its module's rows, and its name with `.bias` after it. Norms and other parameters that are no
matrices have a table of their own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate

_BIAS = ".bias"
_NUMBER = {
    separator: re.compile(rf"(?<={re.escape(separator)})(\d+|#)(?={re.escape(separator)}|$)") for separator in "._"
}

Shape = tuple[int, int]  # (rows, columns) of a module's weight, a convolution's kernel being part of its columns


@dataclass(frozen=True)
class Span:
    """Where some rows of a module come to lie: `count` of the `total` equal shares of `module`'s rows, from `first`."""

    module: str
    first: int
    count: int
    total: int

    @property
    def whole(self) -> bool:
        return self.count == self.total


@dataclass(frozen=True)
class _Side:
    """One side of a rule: module patterns and how many shares of the rows each has."""

    patterns: tuple[str, ...]
    shares: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> _Side:
        head, brace, rest = text.partition("{")
        if not brace:
            return cls((text,), (1,))
        inner, _, tail = rest.partition("}")
        parts = [part.partition("*") for part in inner.split(",")]
        return cls(tuple(head + name + tail for name, _, _ in parts), tuple(int(many or 1) for _, _, many in parts))


@dataclass(frozen=True)
class _Entry:
    """One name of a rule: the numbers in it that are fixed, and the rule's other side."""

    fixed: tuple[str | None, ...]
    position: int
    own: _Side
    other: _Side
    swap: str

    def match(self, numbers: tuple[str, ...]) -> tuple[str, ...] | None:
        """The layer numbers of a name of this form, or None."""
        if any(want is not None and want != number for want, number in zip(self.fixed, numbers, strict=True)):
            return None
        return tuple(number for want, number in zip(self.fixed, numbers, strict=True) if want is None)


@dataclass(frozen=True)
class ModuleMap:
    """The module names of one family.

    `columns` are the input widths that modules of its models have, and `depths` the numbers of layers in each native
    stack, over all models of the family: they tell families with the same names apart. `encoders` are ComfyUI's names
    of the text encoders, first to last. `parameters` is the table of what is no matrix; a native name is that of the
    parameter but for its `.weight`. `unbiased` matches the native names of modules without a bias.
    `grows` are the columns of modules that a LoRA may widen, as those that take a control image do.
    """

    name: str
    table: str
    columns: frozenset[int]
    depths: Mapping[str, frozenset[int]]
    root: str = "transformer"
    encoders: tuple[str, ...] = ()
    parameters: str = ""
    unbiased: str = ""
    grows: Mapping[str, int] = field(default_factory=dict)

    def native(self, name: str, shape: Shape | None = None, flat: bool = False) -> tuple[Span, ...] | None:
        """Where the rows of a module lie in the native modules, in the order of its rows; None for an unknown name.

        `flat` names have underscores for dots. `shape` is needed where a rule asks for it.
        """
        return _found(self._flat if flat else self._dotted, name, shape, "_" if flat else ".")

    def diffusers(self, name: str, shape: Shape | None = None) -> tuple[Span, ...] | None:
        """Where the rows of a native module lie in diffusers' modules, in the order of its rows."""
        return _found(self._written, name, shape, ".")

    def is_matrix(self, native: str) -> bool:
        """Whether a native name is that of a Linear or a convolution of this family."""
        return _found(self._matrices, native, None, ".") is not None and not native.endswith(_BIAS)

    def has_bias(self, native: str) -> bool:
        """Whether the module of this native name has a bias."""
        return re.fullmatch(self.unbiased, native) is None

    def patterns(self) -> Iterator[tuple[str, str]]:
        """Every (native, diffusers) pair of patterns that is written, for tests and tools."""
        for native, operator, source in self._rules:
            if not operator.startswith("<-"):
                yield from ((one, other) for one in native.patterns for other in source.patterns)

    @cached_property
    def _rules(self) -> tuple[tuple[_Side, str, _Side], ...]:
        return _parsed(f"{self.table}\n{self.parameters}")

    @cached_property
    def _matrices(self) -> dict[str, list[_Entry]]:
        index: dict[str, list[_Entry]] = {}
        for native, operator, source in _parsed(self.table):
            _add(index, native, source, operator, ".")
        return index

    @cached_property
    def _dotted(self) -> dict[str, list[_Entry]]:
        return self._index(".")

    @cached_property
    def _flat(self) -> dict[str, list[_Entry]]:
        return self._index("_")

    @cached_property
    def _written(self) -> dict[str, list[_Entry]]:
        index: dict[str, list[_Entry]] = {}
        for native, operator, source in self._rules:
            if not operator.startswith("<-"):
                _add(index, native, source, operator, ".")
        return index

    def _index(self, separator: str) -> dict[str, list[_Entry]]:
        """Every readable name: the native ones stand for themselves, the others for what the rules say."""
        index: dict[str, list[_Entry]] = {}
        for native, _, _ in self._rules:
            for pattern in native.patterns:
                _add(index, _Side((pattern,), (1,)), _Side((pattern,), (1,)), "=", separator)
        for native, operator, source in self._rules:
            _add(index, source, native, operator, separator)
        return index


def _parsed(table: str) -> tuple[tuple[_Side, str, _Side], ...]:
    rules = []
    for line in filter(None, map(str.strip, table.splitlines())):
        native, operator, source = line.split() if " " in line else (line, "=", line)
        rules.append((_Side.parse(native), operator, _Side.parse(source)))
    return tuple(rules)


def _found(index: dict[str, list[_Entry]], name: str, shape: Shape | None, separator: str) -> tuple[Span, ...] | None:
    owner = name.removesuffix(_BIAS)
    skeleton, numbers = _skeleton(owner.replace(".", separator), separator)
    for entry in index.get(skeleton, ()):
        if (layers := entry.match(numbers)) is not None:
            spans = _spans(entry, layers, shape)
            return spans if owner == name else tuple(replace(span, module=span.module + _BIAS) for span in spans)
    return None


def _add(index: dict[str, list[_Entry]], own: _Side, other: _Side, operator: str, separator: str) -> None:
    for position, pattern in enumerate(own.patterns):
        skeleton, numbers = _skeleton(pattern.replace(".", separator), separator)
        fixed = tuple(None if number == "#" else number for number in numbers)
        index.setdefault(skeleton, []).append(_Entry(fixed, position, own, other, operator.removeprefix("<-")))


@lru_cache(maxsize=1 << 15)  # every family is asked about the same names
def _skeleton(name: str, separator: str) -> tuple[str, tuple[str, ...]]:
    """A name with `#` for each number that stands alone between separators, and the numbers."""
    alone = _NUMBER[separator]
    return alone.sub("#", name), tuple(alone.findall(name))


def _spans(entry: _Entry, layers: tuple[str, ...], shape: Shape | None) -> tuple[Span, ...]:
    names = [_filled(pattern, layers) for pattern in entry.other.patterns]
    own, other = entry.own.shares, entry.other.shares
    if entry.swap == "~" or (entry.swap == "~2" and shape is not None and shape[0] == 2 * shape[1]):
        return Span(names[0], 1, 1, 2), Span(names[0], 0, 1, 2)
    if len(names) == 1:
        first = sum(own[: entry.position])
        return (Span(names[0], first, own[entry.position], sum(own)),)
    return tuple(Span(name, 0, count, count) for name, count in zip(names, other, strict=True))


def cuts(spans: Collection[Span], rows: int) -> list[tuple[int, int]] | None:
    """The rows (start, stop) of a module that go to each of its spans, or None where they do not divide."""
    shares = [span.count for span in spans]
    one, rest = divmod(rows, sum(shares))
    ends = [one * end for end in accumulate(shares)]
    return None if rest else list(zip([0, *ends], ends, strict=False))


def _filled(pattern: str, layers: tuple[str, ...]) -> str:
    numbers = iter(layers)
    return re.sub("#", lambda _: next(numbers), pattern)
