"""A product added in place, on the CPU and by the Triton kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraport_native import add_product
from loraport_native.add_product import add_product_, narrow_product

SIZES = [(1, 1, 1), (5, 300, 4), (130, 260, 17), (300, 448, 32), (129, 257, 33), (64, 128, 64), (200, 96, 128)]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no card")]),
]


def factors(size: tuple[int, int, int], device: str, dtype: torch.dtype) -> list[Tensor]:
    rows, columns, rank = size
    draw = torch.Generator().manual_seed(0)
    shapes = ((rows, columns), (rows, rank), (columns, rank))
    return [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_product_is_added_in_place(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    total, left, up = factors(size, device, dtype)
    expected = total.double() + left.double() @ up.double().t()
    before = total.data_ptr()
    add_product_(total, left, up.t())  # a transposed view, as a LoRA's factor comes
    assert total.data_ptr() == before
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance * size[2] ** 0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_narrow_product_is_a_new_tensor_that_wide_ones_are_added_to(
    size: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    _, left, up = factors(size, device, dtype)
    torch.full((1 << 22,), float("nan"), device=device, dtype=dtype)  # what memory that is taken next may hold
    found = narrow_product(left, up.t())
    assert (found.dtype, found.is_contiguous()) == (dtype, True)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    slack = {"rtol": tolerance, "atol": tolerance * size[2] ** 0.5}
    torch.testing.assert_close(found.double(), left.double() @ up.double().t(), **slack)
    wide, weight = factors((size[0], size[1], 150), device, dtype)[1:]
    add_product_(found, wide, weight.t())
    expected = left.double() @ up.double().t() + wide.double() @ weight.double().t()
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * 150**0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 2])
def test_what_lies_beside_is_added_as_well(count: int, device: str) -> None:
    total, left, up = factors((129, 257, 33), device, torch.bfloat16)
    others = [factors((257, 129, 1), device, torch.bfloat16)[0].t() for _ in range(count)]
    expected = total.double() + left.double() @ up.double().t() + sum(other.double() for other in others)
    add_product_(total, left, up.t(), others)
    torch.testing.assert_close(total.double(), expected, rtol=3e-2, atol=0.2)


@pytest.mark.parametrize("device", DEVICES)
def test_factors_and_total_may_be_views_of_any_strides(device: str) -> None:
    total, left, up = factors((70, 90, 8), device, torch.bfloat16)
    wide = torch.zeros(70, 180, device=device, dtype=torch.bfloat16)
    add_product_(wide[:, ::2], left, up.t())
    torch.testing.assert_close(wide[:, ::2].float(), left.float() @ up.float().t(), rtol=2e-2, atol=5e-2)
    assert not wide[:, 1::2].any(), "nothing beside the view is touched"
    add_product_(total, left.t().contiguous().t(), up.t().contiguous())


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_are_whole_under_the_compiler(device: str) -> None:
    """Schema, fake tensors and functionalisation, as torch checks operators of one's own."""
    total, left, up = factors((8, 16, 4), device, torch.bfloat16)
    torch.library.opcheck(
        torch.ops.loraport.add_product_.default,
        (total, left, up.t(), [torch.ones_like(total)]),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    torch.library.opcheck(
        torch.ops.loraport.narrow_product.default,
        (left, up.t()),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_without_a_compiler_the_kernel_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton builds launchers in C at a kernel's first use, also where nothing is compiled."""
    monkeypatch.setenv("PATH", str(tmp_path))
    left = torch.zeros(40, 8, dtype=torch.bfloat16)
    for compiler, there in ((sys.executable, True), (str(tmp_path / "cc"), False), (None, False)):
        monkeypatch.setenv("CC", compiler) if compiler else monkeypatch.delenv("CC")
        add_product._triton_builds.cache_clear()
        assert add_product._is_for_the_kernel(left) is there
    add_product._triton_builds.cache_clear()
