"""The proof that two LoRA files mean the same: ΔW of every module, compared in fp64.

Nothing of size (out, in) is formed where the factors allow it. For low-rank factors the difference of two
changes is itself low-rank, [s_a·B_a, −s_b·B_b] @ [A_a; A_b]; reducing the right stack to its R factor keeps
all row norms and subtracts inside one small product, so equal files come out at about 1e-16 instead of the
1e-8 that the subtraction of squared Gram norms would leave. A Kronecker product is an outer product of its
flattened sides, hence the same trick with rank one a file. Anything else is compared in blocks of rows.

Two short cuts keep a conversion about as fast as a copy. Where both files store the same factors bit for bit, only the
scales can differ, and nothing is multiplied. Where the factors differ a little, as after rounding, U·D − U'·D' =
U·(D − D') + (U − U')·D' is a sum of two small terms, whose norm follows from Gram matrices (r, r) without cancellation.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, cast

import numpy as np

from loraport.errors import DataError
from loraport.lora.bits import all_zero, same_bits
from loraport.lora.canonical import (
    Array,
    ColumnScale,
    Factors,
    Float64,
    LoHa,
    LoKr,
    LoraFile,
    LoraModule,
    LowRank,
    RowScale,
    exact,
)
from loraport.lora.lazy import side_by_side
from loraport.lora.witness import Witness

# Rounding to a dtype with p significant bits moves each number by at most 2^-p of itself, and a product of two
# rounded factors by at most twice that: 9.8e-4 for fp16 (p = 11), 7.8e-3 for bf16 (p = 8). Errors of different signs
# average out, so real files stay at about a third of it, or half with four factors. A file whose rank terms nearly
# cancel can exceed it, and then what was lost is real: fp32 keeps it. For fp32 the bound is 1.2e-7; the rest is room
# for the fp32 alpha. There is no entry for fp8: nothing may be lost in a file that is stored so.
_TOLERANCE = {"float64": 1e-6, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
_LOSSLESS = 1e-6
_CANCELLED = 1e-3
_CLOSE = 0.1  # the largest relative difference of factors that counts as rounding
_BLOCK_NUMBERS = 4_000_000
_GRAM_NUMBERS = 1 << 19  # more would fill the processor's cache

_PLAIN = ("lora", "tucker", "loha", "lokr", "full", "verbatim")

Method = Literal["identical bytes", "products in fp64"]
IDENTICAL: Final[Method] = "identical bytes"
PRODUCTS: Final[Method] = "products in fp64"

Term = tuple[Float64, Factors]  # coefficients of the rows (out,), and the product they multiply


@dataclass(frozen=True)
class ModuleProof:
    """One module: `difference` is ‖ΔW_source − ΔW_written‖ / ‖ΔW_source‖ (Frobenius), `norm` is ‖ΔW_source‖, or None
    where both files store the same factors bit for bit and it was not needed.

    With DoRA it is the larger of that (its upper bound, see `_dora_norms`) and the same for the added product
    alone. `zero` says that the source changes nothing here, as an untrained LoRA does. `method` says how they were
    compared: with `IDENTICAL` factors only the scales can differ, and what they make is not computed.
    """

    name: str
    kind: str
    norm: float | None
    difference: float
    tolerance: float
    zero: bool
    method: Method = PRODUCTS

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance

    @property
    def used(self) -> float:
        """How much of its tolerance the difference takes: 1 is all of it."""
        if self.difference == 0 or self.tolerance == 0:
            return 0.0 if self.difference == 0 else math.inf
        return self.difference / self.tolerance


@dataclass(frozen=True)
class Proof:
    """The comparison of two files. `missing` modules are only in the source, `extra` ones only in the
    written file."""

    modules: tuple[ModuleProof, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    unread_source: tuple[str, ...]
    unread_written: tuple[str, ...]

    @property
    def worst(self) -> ModuleProof | None:
        """The module that uses most of its tolerance."""
        return max(self.modules, key=lambda module: module.used, default=None)

    @property
    def zeros(self) -> tuple[str, ...]:
        """The modules that the source leaves unchanged."""
        return tuple(module.name for module in self.modules if module.zero)

    @property
    def ok(self) -> bool:
        """Whether both files change the same modules by the same amounts and every key was understood."""
        odd = self.missing or self.extra or self.unread_source or self.unread_written
        return not odd and all(module.ok for module in self.modules)

    @property
    def why(self) -> str:
        """What is not as it should be, in one line; empty when all is well."""
        problems = [
            f"{what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
            for what, names in (
                ("modules missing", self.missing),
                ("modules too many", self.extra),
                ("keys not understood in the source", self.unread_source),
                ("keys not understood in the written file", self.unread_written),
            )
            if names
        ]
        worst = self.worst
        if worst is not None and not worst.ok:
            problems.append(
                f"{worst.name} differs by {worst.difference:.2e} of its size, where {worst.tolerance:.0e} is allowed"
            )
        return "; ".join(problems)

    def to_json(self) -> dict[str, Any]:
        """A dict ready for `json.dump`; an infinite difference becomes null."""
        worst = self.worst
        return {
            "ok": self.ok,
            "worst": worst and {"module": worst.name, "difference": _finite(worst.difference)},
            "zero": list(self.zeros),
            "missing": list(self.missing),
            "extra": list(self.extra),
            "unread_source": list(self.unread_source),
            "unread_written": list(self.unread_written),
            "modules": [
                {
                    "name": module.name,
                    "kind": module.kind,
                    "norm": module.norm,
                    "difference": _finite(module.difference),
                    "tolerance": module.tolerance,
                    "zero": module.zero,
                    "method": module.method,
                    "ok": module.ok,
                }
                for module in self.modules
            ],
        }


def prove(
    source: LoraFile,
    written: LoraFile,
    both_rounded: bool = False,
    kept: Collection[str] = frozenset(),
    witness: Witness | None = None,
) -> Proof:
    """Compare what two files mean, module by module, allowing for the rounding of the written one.

    With `both_rounded` neither is the source: the rounding of the coarser of the two dtypes is allowed. `kept` modules
    were not to be rounded: where they are stored alike in both files nothing at all may differ. What `witness` has
    seen to be the same bytes is not read again. Raises DataError when a DoRA part lacks the norms of the base weights
    in both files.
    """

    def compare(name: str) -> ModuleProof:
        return _compare(source.modules[name], written.modules[name], both_rounded, name in kept, witness)

    common = [name for name in source.modules if name in written.modules]
    return Proof(
        modules=tuple(side_by_side(compare, common)),
        missing=tuple(name for name in source.modules if name not in written.modules),
        extra=tuple(name for name in written.modules if name not in source.modules),
        unread_source=source.unread,
        unread_written=written.unread,
    )


def _compare(a: LoraModule, b: LoraModule, both_rounded: bool, kept: bool, witness: Witness | None) -> ModuleProof:
    rounded = [*b.factors.arrays().values(), *(a.factors.arrays().values() if both_rounded else ())]
    tolerance = _LOSSLESS if kept else max(_TOLERANCE.get(array.dtype.name, _LOSSLESS) for array in rounded)
    same = _same_numbers(a.factors, b.factors, witness)
    if same and _same_dora(a.dora, b.dora) and (a.dora is None or a.scale == b.scale):
        empty = _is_zero(a.factors) and a.dora is None
        difference = 0.0 if empty else _relative(abs(a.scale - b.scale), abs(a.scale))
        return ModuleProof(a.name, b.factors.kind, None, difference, tolerance, empty or a.scale == 0, IDENTICAL)
    proof = _compare_products(a, b, tolerance)
    return replace(proof, tolerance=0.0) if kept and not same and _stored_alike(a, b) else proof


def _compare_products(a: LoraModule, b: LoraModule, tolerance: float) -> ModuleProof:
    if "verbatim" in (a.factors.kind, b.factors.kind):
        return ModuleProof(a.name, b.factors.kind, None, math.inf, tolerance, zero=False)
    if isinstance(a.dora, ColumnScale) or isinstance(b.dora, ColumnScale):
        return _compare_columns(a, b, tolerance)
    if a.dora is None and b.dora is None and (close := _close_norms(a, b)):
        norm, apart = close
        return ModuleProof(a.name, b.factors.kind, norm, _relative(apart, norm), tolerance, zero=norm == 0)
    norm = _norm([_term(a, 1.0)])
    if a.factors.shape != b.factors.shape:
        return ModuleProof(a.name, b.factors.kind, norm, math.inf, tolerance, zero=norm == 0)
    difference = _relative(_norm([_term(a, 1.0), _term(b, -1.0)]), norm)
    if a.dora is not None or b.dora is not None:
        norm, apart, base = _dora_norms(a, b)
        # The added product is still compared by itself, because a changed row scale can outweigh it in ΔW.
        difference = max(difference, _relative(apart, norm))
        # The row scale multiplies W itself, so its fp32 rounding counts in units of ‖W‖, however small ΔW is.
        tolerance += 2.0**-23 * base / norm if norm else 0.0
    return ModuleProof(a.name, b.factors.kind, norm, difference, tolerance, zero=norm == 0)


def _compare_columns(a: LoraModule, b: LoraModule, tolerance: float) -> ModuleProof:
    """Two changes that are scaled by column, by the same rule whatever the base weights are: both parts must agree."""
    norm = _norm([_term(a, 1.0)])
    difference = math.inf
    one, other = a.dora, b.dora
    if (
        isinstance(one, ColumnScale)
        and isinstance(other, ColumnScale)
        and (one.trained.shape, one.ends) == (other.trained.shape, other.ends)
        and a.factors.shape == b.factors.shape
    ):
        trained = one.trained.astype(np.float64)
        apart = _relative(
            float(np.linalg.norm(trained - other.trained.astype(np.float64))), float(np.linalg.norm(trained))
        )
        difference = max(apart, _relative(_norm([_term(a, 1.0), _term(b, -1.0)]), norm))
    return ModuleProof(a.name, b.factors.kind, norm, difference, tolerance, zero=False)


def _same_numbers(a: Factors, b: Factors, witness: Witness | None) -> bool:
    """Whether two modules store the same factors, bit for bit, of a kind whose arrays are all there is to it."""
    if type(a) is not type(b) or a.kind not in _PLAIN:
        return False
    mine, other = a.arrays(), b.arrays()
    return mine.keys() == other.keys() and all(
        (witness is not None and witness.knows(mine[name], other[name])) or same_bits(mine[name], other[name])
        for name in mine
    )


def _stored_alike(a: LoraModule, b: LoraModule) -> bool:
    """Whether both have arrays of the same names, dtypes and shapes, and the same scale but for the rounding of it."""
    mine, other = ({name: (x.dtype, x.shape) for name, x in each.factors.arrays().items()} for each in (a, b))
    return mine == other and math.isclose(a.scale, b.scale, rel_tol=_LOSSLESS)


def _same_dora(a: RowScale | ColumnScale | None, b: RowScale | ColumnScale | None) -> bool:
    """Whether neither is a DoRA, or both are the same one for any base weights."""
    if a is None or b is None:
        return a is b
    if isinstance(a, ColumnScale) or isinstance(b, ColumnScale):
        same = isinstance(a, ColumnScale) and isinstance(b, ColumnScale) and a.ends == b.ends
        return same and np.array_equal(a.trained, b.trained)
    return a.divisor == b.divisor and np.array_equal(a.trained, b.trained) and _norms(a) == _norms(b)


def _norms(dora: RowScale) -> list[list[float] | None]:
    return [None if norm is None else norm.tolist() for norm in (dora.base_norm, dora.merged_norm)]


def _is_zero(factors: Factors) -> bool:
    """Whether a factor of a product, or everything where the kind is not a plain product, holds zeros alone."""
    zeros = (all_zero(array) for array in factors.arrays().values())
    return any(zeros) if isinstance(factors, LowRank | LoHa | LoKr) else all(zeros)


def _close_norms(a: LoraModule, b: LoraModule) -> tuple[float, float] | None:
    """‖ΔW_a‖ and ‖ΔW_a − ΔW_b‖ of two low-rank modules whose factors nearly agree and whose differences do not
    cancel, else None."""
    first, second = a.factors, b.factors
    if not (isinstance(first, LowRank) and isinstance(second, LowRank)) or a.scale == 0:
        return None
    if (first.shape, first.rank) != (second.shape, second.rank):
        return None
    down, down_off, off_down = _grams(_rows(first.down), _rows(second.down), 1.0)
    up, up_off, off_up = _grams(_rows(first.up).T, _rows(second.up).T, b.scale / a.scale)
    if any(np.trace(off) > _CLOSE**2 * np.trace(whole) for off, whole in ((off_up, up), (off_down, down))):
        return None
    # U·D − U'·D' = U·(D − D') + (U − U')·D'; and D', D' = D − (D − D').
    other = down - down_off - down_off.T + off_down
    apart = np.sum(up * off_down) + np.sum(off_up * other)
    squares = apart + 2 * np.sum(up_off * (down_off.T - off_down))
    if squares < _CANCELLED * apart:
        return None
    norm = math.sqrt(max(float(np.sum(up * down)), 0.0))
    return abs(a.scale) * norm, abs(a.scale) * math.sqrt(float(squares))


def _grams(one: Array, other: Array, ratio: float) -> tuple[Float64, Float64, Float64]:
    """X·Xᵀ, X·Eᵀ and E·Eᵀ for X = `one` (r, n) and E = X − ratio · `other`, in blocks of columns."""
    rank = one.shape[0]
    whole, mixed, off = np.zeros((3, rank, rank))
    same = ratio == 1.0 and same_bits(one, other)
    block = max(1, _GRAM_NUMBERS // rank)
    for start in range(0, one.shape[1], block):
        x = one[:, start : start + block].astype(np.float64)
        whole += x @ x.T
        if not same:
            e = x - ratio * other[:, start : start + block].astype(np.float64)
            mixed += x @ e.T
            off += e @ e.T
    return whole, mixed, off


def _rows(array: Array) -> Array:
    """The array as a matrix: a convolution's kernel joins the last axis."""
    return array.reshape(array.shape[0], -1)


def _relative(apart: float, norm: float) -> float:
    if norm == 0:
        return math.inf if apart else 0.0
    return apart / norm


def _term(module: LoraModule, coefficient: float | Float64) -> Term:
    return module.scale * coefficient * np.ones(module.factors.shape[0]), module.factors


def _dora_norms(a: LoraModule, b: LoraModule) -> tuple[float, float, float]:
    """‖ΔW_a‖, a bound on ‖ΔW_a − ΔW_b‖, and ‖W‖, from row norms alone.

    With P = s·BA and the gain g of each row, ΔW = (g − 1)·W + g·P. W is not at hand, but W·P of a row
    follows from ‖W + P‖² = ‖W‖² + 2·W·P + ‖P‖². The difference (g_a − g_b)·W + (g_a·P_a − g_b·P_b) is
    bounded by its two parts.
    """
    rows = [part if isinstance(part, RowScale) else None for part in (a.dora, b.dora)]
    base_norm = next((part.base_norm for part in rows if part and part.base_norm is not None), None)
    merged_norm = rows[0].merged_norm if rows[0] else None
    if base_norm is None or (rows[0] and merged_norm is None):
        raise DataError(
            f"LoRA module {a.name}: a DoRA cannot be compared without the row norms of the base weights.",
            hint="Give the base model that the LoRA was trained on.",
        )
    base = base_norm.astype(np.float64)
    gain_a, gain_b = (_gain(module, base) for module in (a, b))
    rest = _row_norms([_term(a, gain_a), _term(b, -gain_b)])
    apart = np.linalg.norm(np.abs(gain_a - gain_b) * base + rest)

    added = _row_norms([_term(a, 1.0)])
    inner = np.zeros_like(base)
    if merged_norm is not None:
        inner = np.clip((merged_norm.astype(np.float64) ** 2 - base**2 - added**2) / 2, -base * added, base * added)
    squares = ((gain_a - 1) * base) ** 2 + (gain_a * added) ** 2 + 2 * (gain_a - 1) * gain_a * inner
    return math.sqrt(max(float(squares.sum()), 0.0)), float(apart), float(np.linalg.norm(base))


def _gain(module: LoraModule, base_norm: Float64) -> Float64:
    return module.dora.gain(base_norm) if isinstance(module.dora, RowScale) else np.ones_like(base_norm)


def _norm(terms: list[Term]) -> float:
    """The Frobenius norm of a sum of scaled products."""
    sides = [factors.sides() for _, factors in terms if isinstance(factors, LoKr)]
    if len(sides) == len(terms) and len({first.shape for first, _ in sides}) == 1:
        # vec(w1) vec(w2)ᵀ holds the same numbers as w1 ⊗ w2; here each row has the same coefficient.
        left = np.stack([rows[0] * first.ravel() for (rows, _), (first, _) in zip(terms, sides, strict=True)], axis=1)
        return float(np.linalg.norm(_lowrank_rows(left, np.stack([second.ravel() for _, second in sides]))))
    return float(np.linalg.norm(_row_norms(terms)))


def _row_norms(terms: list[Term]) -> Float64:
    """The norm of each row of a sum of products whose rows are scaled."""
    if all(isinstance(factors, LowRank) for _, factors in terms):
        pairs = [(rows, factors) for rows, factors in terms if isinstance(factors, LowRank)]
        left = np.concatenate([rows[:, None] * exact(factors.up) for rows, factors in pairs], axis=1)
        return _lowrank_rows(left, np.concatenate([exact(factors.down) for _, factors in pairs]))
    count, columns = terms[0][1].shape
    products = [(rows, factors.product()) for rows, factors in terms]
    block = max(1, _BLOCK_NUMBERS // columns)
    norms = np.empty(count)
    for start in range(0, count, block):
        stop = min(start + block, count)
        total = sum(rows[start:stop, None] * product(start, stop) for rows, product in products)
        norms[start:stop] = np.linalg.norm(total, axis=1)
    return norms


def _lowrank_rows(left: Float64, right: Float64) -> Float64:
    """The row norms of left (m, k) @ right (k, n): an orthogonal factor on the right changes none of them."""
    # The stub of `qr` does not know that mode "r" gives one array.
    core = cast(Float64, np.linalg.qr(right.T, mode="r"))
    norms: Float64 = np.linalg.norm(left @ core.T, axis=1)
    return norms


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
