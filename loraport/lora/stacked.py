"""More ways to hold a change: whole, as rows from several adapters, and as what nobody multiplies out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from loraport.errors import DataError
from loraport.lora.canonical import Array, Factors, Float64, Rows, exact


class NotExact(DataError):
    """A module that the asked file format cannot hold without loss. `module` is its name."""

    def __init__(self, message: str, *, module: str, hint: str | None = None):
        super().__init__(message, hint=hint)
        self.module = module


@dataclass(frozen=True, eq=False)
class Full(Factors):
    """The whole change: `diff` has the shape of the weight, (out, in[, kh, kw]), or of a bias or norm, (out,)."""

    kind: ClassVar[str] = "full"
    diff: Array

    def problem(self) -> str | None:
        return None if self.diff.ndim else "the change of a parameter is one number"

    @property
    def shape(self) -> tuple[int, int]:
        return self.diff.shape[0], math.prod(self.diff.shape[1:])

    @property
    def rank(self) -> int | None:
        return None

    def product(self) -> Rows:
        return lambda start, stop: exact(self.diff[start:stop])


@dataclass(frozen=True, eq=False)
class Verbatim(Factors):
    """An adapter whose change is made from the base weight, by the endings of its tensors: OFT and BOFT turn its rows,
    GLoRA multiplies it, and a whole weight takes its place. It is kept as it is, bit for bit, and two of them are the
    same when their tensors are."""

    kind: ClassVar[str] = "verbatim"
    tensors: Mapping[str, Array]

    def arrays(self) -> dict[str, Array]:
        return dict(self.tensors)

    def map(self, change: Callable[[str, Array], Array]) -> Self:
        return replace(self, tensors={name: change(name, array) for name, array in self.tensors.items()})

    @property
    def algorithm(self) -> str:
        """What people call it."""
        if ".set_weight" in self.tensors:
            return "replaced weight"
        blocks = self.blocks()
        return "GLoRA" if not blocks else "BOFT" if blocks[0].ndim == 4 else "OFT"

    def blocks(self) -> list[Array]:
        """The blocks of an OFT or BOFT in the order of their rows: one tensor, or one for each part of a fused module,
        as sd-scripts has them."""
        names = [name for name in self.tensors if name.startswith(".oft_blocks")]
        return [self.tensors[name] for name in sorted(names, key=lambda name: (len(name), name))]

    def problem(self) -> str | None:
        empty = next((name for name, array in self.tensors.items() if 0 in array.shape), None)
        if empty is not None:
            return f"{empty} is empty"
        if ".set_weight" in self.tensors:
            return None if self.tensors[".set_weight"].ndim else "the weight is one number"
        if not self.blocks():
            flat = next((name for name, array in self.tensors.items() if name != ".alpha" and array.ndim < 2), None)
            return None if flat is None else f"{flat} has fewer than two axes"
        for blocks in self.blocks():
            if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
                return f"oft_blocks {blocks.shape} are no square blocks"
        if blocks.ndim == 3 and ".rescale" in self.tensors:
            return "an OFT with a trained rescale, which ComfyUI leaves out without a word"
        constraint = self.tensors.get(".alpha")
        if constraint is None and blocks.ndim == 4:
            return "a BOFT without alpha, at which ComfyUI stops"
        if constraint is not None and constraint.size != 1:
            return "alpha must be one number"
        if constraint is not None and float(constraint.reshape(())) > 0:
            return "an OFT with a constraint, which ComfyUI applies otherwise than LyCORIS"
        return None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, 0) of an OFT, whose columns its tensors do not tell."""
        if (weight := self.tensors.get(".set_weight")) is not None:
            return weight.shape[0], math.prod(weight.shape[1:])
        if blocks := self.blocks():
            return sum(each.shape[-3] * each.shape[-1] for each in blocks), 0
        first, second = (self.tensors[f".{name}.weight"] for name in ("b1", "b2"))
        if first.shape[1] != second.shape[0]:  # LyCORIS before 2.0 had them the other way round
            first, second = second, first
        return first.shape[0], math.prod(second.shape[1:])

    @property
    def rank(self) -> int | None:
        return None

    def product(self) -> Rows:
        raise DataError(f"The change of a {self.algorithm} depends on the base weights and cannot be computed.")


@dataclass(frozen=True, eq=False)
class Part:
    """An adapter of some rows of a module: `factors` times `scale` is added from row `start` on."""

    start: int
    factors: Factors
    scale: float

    @property
    def stop(self) -> int:
        return self.start + self.factors.shape[0]


@dataclass(frozen=True, eq=False)
class Stacked(Factors):
    """Rows from several adapters, `rows` in all, zero where none has any: q, k and v in one module, where no single
    kind of adapter holds the three without loss."""

    kind: ClassVar[str] = "stacked"
    rows: int
    parts: tuple[Part, ...]

    def arrays(self) -> dict[str, Array]:
        """The parts' factors, as `0.w1`."""
        return {
            f"{number}.{name}": array
            for number, part in enumerate(self.parts)
            for name, array in part.factors.arrays().items()
        }

    def map(self, change: Callable[[str, Array], Array]) -> Self:
        parts = []
        for number, part in enumerate(self.parts):
            fields = {name: change(f"{number}.{name}", array) for name, array in part.factors.arrays().items()}
            parts.append(replace(part, factors=replace(part.factors, **fields)))
        return replace(self, parts=tuple(parts))

    def problem(self) -> str | None:
        if len({part.factors.shape[1] for part in self.parts}) != 1:
            return "its parts have different widths"
        if any(part.start < 0 or part.stop > self.rows for part in self.parts):
            return f"a part lies outside of its {self.rows} rows"
        return next((problem for part in self.parts if (problem := part.factors.problem())), None)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.parts[0].factors.shape[1]

    @property
    def rank(self) -> int | None:
        return None

    def product(self) -> Rows:
        products = [(part, part.factors.product()) for part in self.parts]

        def rows(start: int, stop: int) -> Float64:
            total = np.zeros((stop - start, self.shape[1]))
            for part, product in products:
                low, high = max(start, part.start), min(stop, part.stop)
                if low < high:
                    total[low - start : high - start] += part.scale * product(low - part.start, high - part.start)
            return total

        return rows
