"""The one form a LoRA is held in between dialects: factors, a true scale, and the official module names.

Every dialect is read into this form and written from it, so a rule about scale or shape lives in exactly one
place. Arrays are numpy (bf16 and fp8 through ml_dtypes) and keep the dtype they were stored in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from loraport.errors import DataError
from loraport.lora.bits import all_finite

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Rows = Callable[[int, int], Float64]


def exact(array: Array) -> Float64:
    """The same numbers in fp64. A conv factor becomes a matrix: its kernel joins the last axis."""
    return array.astype(np.float64).reshape(array.shape[0], -1)


@dataclass(frozen=True, eq=False)
class Factors(ABC):
    """What an adapter stores for one module. The change it stands for is `scale` times the product of its
    factors, taken as a matrix (out, columns), where columns is `in`, or `in·kh·kw` for a convolution."""

    kind: ClassVar[str]

    def arrays(self) -> dict[str, Array]:
        """The stored factors by field name."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: array for name, array in named.items() if array is not None}

    def map(self, change: Callable[[str, Array], Array]) -> Self:
        """The same kind of factors with `change(field name, array)` in place of each array."""
        return replace(self, **{name: change(name, array) for name, array in self.arrays().items()})

    @abstractmethod
    def problem(self) -> str | None:
        """Why these factors cannot be multiplied, or None."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, columns) of the product."""

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """The inner size that file formats divide alpha by, or None where the kind has none."""

    @abstractmethod
    def product(self) -> Rows:
        """A function (start, stop) → those rows of the product, in fp64. Lets callers bound their memory."""


@dataclass(frozen=True, eq=False)
class LowRank(Factors):
    """LoRA: up @ down. `down` is (r, in) or (r, in, kh, kw); `up` is (out, r) or (out, r, 1, 1)."""

    kind: ClassVar[str] = "lora"
    down: Array
    up: Array

    def problem(self) -> str | None:
        if self.down.ndim < 2 or self.up.ndim < 2 or math.prod(self.up.shape[2:]) != 1:
            return f"up {self.up.shape} is not (out, r[, 1, 1]) or down {self.down.shape} not (r, in[, kh, kw])"
        if self.up.shape[1] != self.down.shape[0]:
            return f"up {self.up.shape} and down {self.down.shape} disagree on the rank"
        return None

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], math.prod(self.down.shape[1:])

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def product(self) -> Rows:
        up, down = exact(self.up), exact(self.down)
        return lambda start, stop: up[start:stop] @ down


@dataclass(frozen=True, eq=False)
class Tucker(Factors):
    """A convolution's LoRA with a core: Σ_ij mid[i, j] up[:, i] down[j]. `up` is (out, r), `down` (q, in), both
    perhaps with a kernel of 1, and `mid` (r, q, kh, kw), the kernel being the core's. LyCORIS and older sd-scripts
    write it."""

    kind: ClassVar[str] = "tucker"
    down: Array
    mid: Array
    up: Array

    def problem(self) -> str | None:
        for name, array in (("up", self.up), ("down", self.down)):
            if array.ndim < 2 or math.prod(array.shape[2:]) != 1:
                return f"{name} {array.shape} has a kernel beside that of the core"
        if self.mid.ndim < 3 or self.mid.shape[:2] != (self.up.shape[1], self.down.shape[0]):
            return f"the core {self.mid.shape} does not fit up {self.up.shape} and down {self.down.shape}"
        return None

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1] * math.prod(self.mid.shape[2:])

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def inner(self) -> Float64:
        """The core and `down` as one factor (r, in·kh·kw), in fp64."""
        core = self.mid.astype(np.float64).reshape(*self.mid.shape[:2], -1)
        joined = np.einsum("ijk,jc->ick", core, exact(self.down))
        return joined.reshape(len(core), -1)

    def product(self) -> Rows:
        up, inner = exact(self.up), self.inner()
        return lambda start, stop: up[start:stop] @ inner


@dataclass(frozen=True, eq=False)
class LoHa(Factors):
    """LoHa: (w1_a @ w1_b) ∘ (w2_a @ w2_b), with *_a (out, r) and *_b (r, columns).

    A Tucker convolution has the cores t1 and t2 (r, r, kh, kw) besides; then *_a are (r, out), *_b (r, in), and each
    side is Σ_ij t[i, j] a[i]ᵀ b[j], as LyCORIS has it.
    """

    kind: ClassVar[str] = "loha"
    w1_a: Array
    w1_b: Array
    w2_a: Array
    w2_b: Array
    t1: Array | None = None
    t2: Array | None = None

    def problem(self) -> str | None:
        for name, array in self.arrays().items():
            if array.ndim != (4 if name.startswith("t") else 2):
                return f"{name} must have {'four' if name.startswith('t') else 'two'} axes, not {array.shape}"
        if (self.t1 is None) != (self.t2 is None):
            return "t1 and t2 come together, and one is missing"
        if self.t1 is not None and self.t2 is not None:
            return self._tucker_problem(self.t1, self.t2)
        if self.w1_a.shape[1] != self.w1_b.shape[0] or self.w2_a.shape[1] != self.w2_b.shape[0]:
            return "w1_a, w1_b or w2_a, w2_b disagree on the rank"
        if (self.w1_a.shape[0], self.w1_b.shape[1]) != (self.w2_a.shape[0], self.w2_b.shape[1]):
            return "the two products have different shapes"
        return None

    def _tucker_problem(self, t1: Array, t2: Array) -> str | None:
        for name, core, a, b in (("t1", t1, self.w1_a, self.w1_b), ("t2", t2, self.w2_a, self.w2_b)):
            if core.shape[:2] != (a.shape[0], b.shape[0]):
                return f"{name} {core.shape} does not fit {a.shape} and {b.shape}"
        one, other = ((a.shape[1], b.shape[1]) for a, b in ((self.w1_a, self.w1_b), (self.w2_a, self.w2_b)))
        same = one == other and t1.shape[2:] == t2.shape[2:]
        return None if same else "the two products have different shapes"

    @property
    def shape(self) -> tuple[int, int]:
        if self.t1 is not None:
            return self.w1_a.shape[1], self.w1_b.shape[1] * math.prod(self.t1.shape[2:])
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @property
    def rank(self) -> int:
        return int(self.w1_b.shape[0])

    def product(self) -> Rows:
        if self.t1 is not None and self.t2 is not None:
            product = _tucker(self.t1, self.w1_a, self.w1_b) * _tucker(self.t2, self.w2_a, self.w2_b)
            return lambda start, stop: product[start:stop]
        w1_a, w1_b, w2_a, w2_b = map(exact, (self.w1_a, self.w1_b, self.w2_a, self.w2_b))
        return lambda start, stop: (w1_a[start:stop] @ w1_b) * (w2_a[start:stop] @ w2_b)


@dataclass(frozen=True, eq=False)
class LoKr(Factors):
    """LoKr: the Kronecker product w1 ⊗ w2, where each side is stored directly or as a product.

    w1 is (a, b), or w1_a (a, r) @ w1_b (r, b). w2 is (c, d[, kh, kw]), or w2_a (c, r) @ w2_b (r, d), or with
    the core t2 (r, r, kh, kw) of a Tucker convolution, w2_a (r, c), w2_b (r, d): Σ_ij t2[i, j] w2_a[i]ᵀ
    w2_b[j], as LyCORIS has it.
    """

    kind: ClassVar[str] = "lokr"
    w1: Array | None = None
    w2: Array | None = None
    w1_a: Array | None = None
    w1_b: Array | None = None
    w2_a: Array | None = None
    w2_b: Array | None = None
    t2: Array | None = None

    def problem(self) -> str | None:
        for side in ("w1", "w2"):
            direct, a, b = (getattr(self, side + part) for part in ("", "_a", "_b"))
            if (a is None) != (b is None):
                return f"{side}_a and {side}_b come together, and one is missing"
            if (direct is None) == (a is None):
                return f"give either {side}, or {side}_a and {side}_b"
            tucker = side == "w2" and self.t2 is not None
            if a is not None and (a.ndim != 2 or b.ndim != 2 or (not tucker and a.shape[1] != b.shape[0])):
                return f"{side}_a {a.shape} and {side}_b {b.shape} disagree on the rank"
        if self.t2 is not None:
            if self.w2_a is None or self.w2_b is None:
                return "t2 needs w2_a and w2_b"
            if self.t2.ndim != 4 or self.t2.shape[:2] != (self.w2_a.shape[0], self.w2_b.shape[0]):
                return f"t2 {self.t2.shape} does not fit w2_a {self.w2_a.shape} and w2_b {self.w2_b.shape}"
        if self.w1 is not None and self.w1.ndim != 2:
            return f"w1 must have two axes, not {self.w1.shape}"
        if self.w2 is not None and self.w2.ndim not in (2, 4):
            return f"w2 must have two axes, or four for a convolution, not {self.w2.shape}"
        return None

    @property
    def shape(self) -> tuple[int, int]:
        (a, b), (c, d) = self._grid()
        return a * c, b * d

    @property
    def rank(self) -> int | None:
        """The rank of the factored side (of w2 where both are), None where both sides are direct."""
        for factor in (self.w2_b, self.w1_b):
            if factor is not None:
                return int(factor.shape[0])
        return None

    def sides(self) -> tuple[Float64, Float64]:
        """w1 (a, b) and w2 (c, d·kh·kw), multiplied out in fp64."""
        return self._side(self.w1, self.w1_a, self.w1_b), self._side(self.w2, self.w2_a, self.w2_b, self.t2)

    def product(self) -> Rows:
        w1, w2 = self.sides()
        (_, b), (c, d) = w1.shape, w2.shape

        def rows(start: int, stop: int) -> Float64:
            outer, inner = np.divmod(np.arange(start, stop), c)
            return (w1[outer][:, :, None] * w2[inner][:, None, :]).reshape(-1, b * d)

        return rows

    @staticmethod
    def _side(direct: Array | None, a: Array | None, b: Array | None, core: Array | None = None) -> Float64:
        if direct is not None:
            return exact(direct)
        assert a is not None
        assert b is not None
        if core is None:
            return exact(a) @ exact(b)
        return _tucker(core, a, b)

    def _grid(self) -> tuple[tuple[int, int], tuple[int, int]]:
        if self.w1 is not None:
            first = self.w1.shape
        else:
            assert self.w1_a is not None
            assert self.w1_b is not None
            first = (self.w1_a.shape[0], self.w1_b.shape[1])
        if self.w2 is not None:
            return first, (self.w2.shape[0], math.prod(self.w2.shape[1:]))
        assert self.w2_a is not None
        assert self.w2_b is not None
        if self.t2 is not None:
            return first, (self.w2_a.shape[1], self.w2_b.shape[1] * math.prod(self.t2.shape[2:]))
        return first, (self.w2_a.shape[0], self.w2_b.shape[1])


def _tucker(core: Array, a: Array, b: Array) -> Float64:
    """Σ_ij core[i, j] a[i]ᵀ b[j] as a matrix (rows, columns·kh·kw), in fp64."""
    side = np.einsum("ijkl,ic,jd->cdkl", core.astype(np.float64), exact(a), exact(b), optimize=True)
    return side.reshape(side.shape[0], -1)


@dataclass(frozen=True, eq=False)
class ColumnScale:
    """The other kind of DoRA: each input of W + ΔW, with its whole kernel, is multiplied by `trained / ‖its column of
    W + ΔW‖`.

    `trained` is (in,), `axes` the number of axes of the weight. LyCORIS writes it with `wd_on_output=False`, and
    ComfyUI applies it by the same rule (its norm is that of the changed weight there), so the base weights are not
    needed to keep it.

    Of a module that is put together from several, `trained` is (parts, in), and `ends` are the rows where each part
    ends: the norms are those of its rows alone. No file holds that but as its whole change.
    """

    trained: Array
    axes: int = 2
    ends: tuple[int, ...] = ()

    def problem(self, columns: int) -> str | None:
        """Why this does not fit a module with `columns`, or None."""
        parts = self.trained.shape[:-1]
        if (
            parts != ((len(self.ends),) if self.ends else ())
            or not self.trained.size
            or columns % self.trained.shape[-1]
        ):
            return f"the DoRA by column has {self.trained.shape} numbers for {columns} columns"
        return None if np.isfinite(self.trained).all() else "the DoRA by column holds NaN or infinity"


@dataclass(frozen=True, eq=False)
class RowScale:
    """The DoRA part of a module: each output row of W + ΔW is multiplied by `trained / norm` (arXiv
    2402.09353).

    `divisor` says which norm: that of the changed rows, ‖W + s·BA‖ ("merged", as DoRA and PEFT define it),
    or that of the rows of W ("base", as ComfyUI computes it). All three arrays are (out,). The norms are
    facts of the base model: a file does not hold them, so they are None until somebody who has the weights
    fills them in. `axes` is the number of axes of the weight, which files repeat in the shape of the scale.
    """

    trained: Array
    base_norm: Array | None = None
    merged_norm: Array | None = None
    divisor: Literal["merged", "base"] = "merged"
    axes: int = 2

    def gain(self, base_norm: Array | None = None) -> Float64:
        """The factor (out,) on each row, in fp64; `base_norm` stands in where this part has none of its own.

        Raises DataError when the norm it divides by is not known.
        """
        known = self.base_norm if self.base_norm is not None else base_norm
        norm = self.merged_norm if self.divisor == "merged" else known
        if norm is None:
            raise DataError(
                f"A DoRA's change cannot be computed without the row norms of the {self.divisor} weights.",
                hint="Give the base model that the LoRA was trained on.",
            )
        return self.trained.astype(np.float64) / norm.astype(np.float64)

    def problem(self, out: int) -> str | None:
        """Why this does not fit a module with `out` rows, or None."""
        for each in fields(self):
            array = getattr(self, each.name)
            if not isinstance(array, np.ndarray):
                continue
            if array.shape != (out,):
                return f"the DoRA {each.name} must be ({out},), not {array.shape}"
            if not np.isfinite(array).all():
                return f"the DoRA {each.name} holds NaN or infinity"
            if each.name != "trained" and not (array > 0).all():
                return f"the DoRA {each.name} has a row that is not positive"
        return None


@dataclass(frozen=True, eq=False)
class LoraModule:
    """One changed module. W becomes W + scale · product(factors), then scaled by row where there is a DoRA
    part.

    `name` is the official checkpoint's module path, such as `layers.0.attention.qkv`; `scale` is the true
    multiplier (alpha/r, alpha/√r for rsLoRA). Raises DataError naming the module when parts do not fit or
    hold NaN or infinity; with `finite` the caller knows that no factor does.
    """

    name: str
    factors: Factors
    scale: float
    dora: RowScale | ColumnScale | None = None
    finite: InitVar[bool] = False

    def __post_init__(self, finite: bool) -> None:
        problem = self.factors.problem() or self._useless(finite)
        if problem is None and self.dora is not None:
            problem = self.dora.problem(self.factors.shape[isinstance(self.dora, ColumnScale)])
        if problem is not None:
            raise DataError(
                f"LoRA module {self.name}: {problem}.",
                hint="The file is damaged or the training diverged: use an earlier checkpoint.",
            )

    def _useless(self, finite: bool) -> str | None:
        for name, array in self.factors.arrays().items():
            if 0 in array.shape:
                return f"{name} is empty: {array.shape}"
            if not finite and not all_finite(array):
                return f"{name} holds NaN or infinity"
        return None if math.isfinite(self.scale) else f"the scale is {self.scale}"


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A whole LoRA. `family` is None where the file does not tell; `unread` are the keys of the file that
    the dialect gave no meaning to. `modules` may be a `LazyModules`. Raises DataError when there is no module."""

    family: str | None
    modules: Mapping[str, LoraModule]
    metadata: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.modules:
            some = ", ".join(self.unread[:3]) or "none"
            raise DataError(f"No LoRA module was found; keys that mean nothing to this dialect: {some}.")
        if isinstance(self.modules, dict):
            assert all(name == module.name for name, module in self.modules.items())
