"""8-bit rows and their products against plain float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraport_native.scaled_matmul import LARGEST, integer_product, product, to_rows

FORMATS = list(LARGEST)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", FORMATS)
def test_rows_are_as_close_as_their_format_allows(dtype: torch.dtype) -> None:
    values = draw(8, 64) * torch.logspace(-6, 6, 8)[:, None]
    numbers, scale = to_rows(values, dtype)
    assert (numbers.dtype, scale.shape, scale.dtype) == (dtype, (8, 1), torch.float32)
    half_step = values.abs() / 16 if dtype.is_floating_point else scale / 2  # e4m3 has 3 bits of mantissa
    smallest = scale * 2**-10 if dtype.is_floating_point else 0.0
    assert ((numbers.float() * scale - values).abs() <= half_step * 1.001 + smallest).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_row_of_zeros_stays_zero(dtype: torch.dtype) -> None:
    numbers, scale = to_rows(torch.zeros(2, 16), dtype)
    assert not (numbers.float() * scale).any()


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_product_takes_the_scales_out_of_the_sum(dtype: torch.dtype) -> None:
    left, right = to_rows(draw(32, 64), dtype), to_rows(draw(48, 64, seed=1), dtype)
    wanted = (left[0].float() * left[1]) @ (right[0].float() * right[1]).t()
    torch.testing.assert_close(product(*left, *right, torch.float32), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_a_card_is_never_asked_for_a_product_of_sixteen_rows_or_fewer(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's `_int_mm` refuses them; a CPU's takes any, so its rule is made here."""
    multiply = torch._int_mm

    def as_on_a_card(left: Tensor, right: Tensor) -> Tensor:
        assert len(left) > 16
        return multiply(left, right)

    monkeypatch.setattr(torch, "_int_mm", as_on_a_card)
    left, right = to_rows(draw(rows, 64), torch.int8)[0], to_rows(draw(48, 64, seed=1), torch.int8)[0]
    assert torch.equal(integer_product(left, right), left.int() @ right.int().t())
