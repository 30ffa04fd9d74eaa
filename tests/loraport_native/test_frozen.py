"""Products with stored weights, with and without a LoRA, against autograd over the weight they stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraport_native import frozen
from loraport_native.frozen import PRODUCTS, Adapted, adapted_linears, from_bytes, frozen_linear, to_bytes
from loraport_native.quantize import StoredLinear, stored_linear
from loraport_native.scaled_matmul import product

CASES: dict[str, tuple[Any, ...]] = {
    "plain": ("none", "model"),
    "rows": ("fp8", "model"),
    "scaled rows": ("fp8", "fp8"),
    "scaled rows and columns": ("fp8", "fp8", True),
    "nf4": ("nf4", "model"),
    "nf4 fp8": ("nf4", "fp8"),
    "nf4 int8": ("nf4", "int8"),
}
# Only what is computed in 8 bits errs, as its format does: e4m3 rounds to 3 bits of mantissa, two or three times here.
ALLOWED = {"scaled rows": 0.04, "scaled rows and columns": 0.04, "nf4 fp8": 0.06, "nf4 int8": 0.02}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(kind: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """A weight (96, 64) as stored, and the float32 weight that it stands for."""
    linear = nn.Linear(64, 96, bias=False).requires_grad_(False)
    linear.weight.copy_(draw(96, 64, seed=1))
    if kind == "plain":
        return (linear.weight,), linear.weight
    layer = stored_linear(linear, *CASES[kind])
    assert isinstance(layer, StoredLinear)
    assert layer.kind == kind
    simple, tensors = ("rows", layer.stored[:2]) if "rows" in kind else (kind.split()[0], layer.stored)
    exact = frozen_linear(torch.eye(64), simple, tensors)
    return layer.stored, exact.t()


def close(kind: str, got: Tensor, wanted: Tensor) -> None:
    assert (got - wanted).norm() / wanted.norm() < ALLOWED.get(kind, 1e-5)


def test_kept_columns_give_the_gradient_of_transposed_rows_bit_for_bit() -> None:
    weight, with_columns = (stored(kind)[0] for kind in ("scaled rows", "scaled rows and columns"))
    (forward, back), (forward_too, back_too) = (PRODUCTS[kind] for kind in ("scaled rows", "scaled rows and columns"))
    assert torch.equal(forward(draw(5, 64), *weight), forward_too(draw(5, 64), *with_columns))
    assert torch.equal(back(draw(5, 96), *weight), back_too(draw(5, 96), *with_columns))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_scales_in_8_bits_err_by_half_a_step_between_the_extremes_of_256(count: int) -> None:
    values = draw(count, seed=3).abs() + 0.5
    numbers, least, step = to_bytes(values)
    assert numbers.dtype == torch.uint8
    assert numbers.shape == (math.ceil(count / 256), 256)
    again = from_bytes(numbers, least, step)[:count]
    for group in range(len(numbers)):
        here = slice(256 * group, 256 * (group + 1))
        half = float(values[here].max() - values[here].min()) / 510
        assert (again[here] - values[here]).abs().max() <= half * 1.01 + 1e-6


def test_every_kind_is_tested() -> None:
    assert set(CASES) == set(PRODUCTS)


@pytest.mark.parametrize("kind", CASES)
def test_the_gradient_is_that_of_the_weight_it_stands_for(kind: str) -> None:
    tensors, weight = stored(kind)
    x, upstream = draw(2, 5, 64).requires_grad_(), draw(2, 5, 96, seed=2)
    wanted = x @ weight.t()
    got = frozen_linear(x, kind, tensors)
    close(kind, got, wanted)
    close(kind, *(torch.autograd.grad(result, x, upstream)[0] for result in (got, wanted)))


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind in ALLOWED])
def test_products_in_8_bits_get_rows_as_a_card_wants_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's scaled product refuses a right side that is not row-major before it is transposed."""
    seen = []

    def note(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append(left.is_contiguous() and right.is_contiguous())
        return product(left, left_scale, right, right_scale, dtype)

    monkeypatch.setattr(frozen, "product", note)
    tensors, _ = stored(kind)
    frozen_linear(draw(5, 64).requires_grad_(), kind, tensors).sum().backward()
    assert seen == [True, True], "forward and backward"


@pytest.mark.parametrize("kind", CASES)
def test_a_lora_on_top_gets_the_gradients_of_its_definition(kind: str) -> None:
    tensors, weight = stored(kind)
    x, down, up = (
        draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(2, 5, 64), (4, 64), (96, 4)])
    )
    upstream = draw(2, 5, 96, seed=7)
    wanted = x @ weight.t() + 0.75 * (x @ down.t()) @ up.t()
    (got,) = adapted_linears(x, Adapted(down, up, 0.75, kind, tensors))
    close(kind, got, wanted)
    for one, other in zip(*(torch.autograd.grad(r, (x, down, up), upstream) for r in (got, wanted)), strict=True):
        close(kind, one, other)


@pytest.mark.parametrize("kind", CASES)
def test_layers_of_one_input_give_what_each_gives_by_itself(kind: str) -> None:
    tensors, _ = stored(kind)
    x = draw(2, 5, 64).requires_grad_()
    layers = [
        Adapted(draw(rank, 64, seed=rank).requires_grad_(), draw(96, rank).requires_grad_(), scale, kind, tensors)
        for rank, scale in ((4, 0.75), (3, 1.0), (1, 2.0))
    ]
    upstream = [draw(2, 5, 96, seed=seed) for seed in range(3)]
    leaves = [x, *(factor for layer in layers for factor in (layer.down, layer.up))]
    together = adapted_linears(x, *layers)
    apart = [adapted_linears(x, layer)[0] for layer in layers]
    torch.testing.assert_close(together, tuple(apart))
    torch.testing.assert_close(
        torch.autograd.grad(together, leaves, upstream), torch.autograd.grad(apart, leaves, upstream)
    )
    with torch.no_grad():
        torch.testing.assert_close(adapted_linears(x, *layers), tuple(apart))


def test_an_input_that_needs_no_gradient_gets_none_and_costs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, _ = stored("plain")

    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("computed for nothing")

    monkeypatch.setitem(PRODUCTS, "plain", (PRODUCTS["plain"][0], refuse))
    down, up = draw(4, 64).requires_grad_(), draw(96, 4).requires_grad_()
    adapted_linears(draw(3, 64), Adapted(down, up, 1.0, "plain", tensors))[0].sum().backward()
    assert down.grad is not None
