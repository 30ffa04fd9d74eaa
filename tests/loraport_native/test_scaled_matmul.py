"""8-bit rows and their products against plain float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraport_native.scaled_matmul import LARGEST, product, to_rows

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
