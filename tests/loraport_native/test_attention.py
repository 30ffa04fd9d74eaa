"""Attention by FlashAttention-3 where it is there: on the CPU torch's flash attention in its place."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loraport.errors import BackendError
from loraport_native import attention
from loraport_native.attention import attend, flash_3_is_there
from loraport_native.recompute import keeping

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@pytest.fixture
def taken(monkeypatch) -> None:
    """FlashAttention-3 is there for every tensor; what computes it is torch's flash attention for the CPU."""
    monkeypatch.setattr(attention, "_flash_3_takes", lambda query: True)


@pytest.fixture
def hopper(monkeypatch) -> list[str]:
    """A Hopper card and a package that loads; the names that torch was asked to use."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "flash_attn_interface", object())
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", asked.append)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: asked[-1] if asked else None)
    monkeypatch.setattr(attention, "_DEVICE", "cpu")
    flash_3_is_there.cache_clear()
    yield asked
    flash_3_is_there.cache_clear()


class Called(TorchDispatchMode):
    """Counts the calls of an operator."""

    def __init__(self, operator: object) -> None:
        super().__init__()
        self.operator, self.times = operator, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.times += operator is self.operator
        return operator(*args, **(kwargs or {}))


def heads(device: str = "cpu", dtype: torch.dtype = torch.float32, width: int = 8, length: int = 12) -> list[Tensor]:
    """Query and key of their own, value a slice of a fused projection, as the model makes them."""
    draw = torch.Generator().manual_seed(0)
    fused = torch.randn(2, length, 3, 2, width, generator=draw).to(device, dtype)
    query, key, value = fused.unbind(2)
    return [query.contiguous().requires_grad_(), key.contiguous().requires_grad_(), value.detach().requires_grad_()]


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.einsum("blhd,bmhd->bhlm", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), value)


def result_and_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    result = function(*inputs)
    weights = torch.linspace(-1, 1, result.numel(), device=result.device).view(result.shape).to(result.dtype)
    return [result, *torch.autograd.grad(result, inputs, weights)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("taken")
def test_its_result_and_gradients_are_attention(compiled: bool) -> None:
    inputs = heads()
    function = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    for got, wanted in zip(result_and_gradients(function, inputs), result_and_gradients(by_hand, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("taken")
def test_only_what_has_no_mask_goes_to_flash_attention() -> None:
    inputs = heads()
    with Called(FLASH) as flash:
        attend(*inputs)
    assert flash.times == 1
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    causal = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in inputs), is_causal=True).transpose(1, 2)
    torch.testing.assert_close(attend(*inputs, mask), causal)


@pytest.mark.usefixtures("taken")
def test_selective_recomputation_keeps_its_result() -> None:
    inputs = heads()
    block = lambda *inputs: keeping(True, False, lambda query, *rest: attend(query.sin(), *rest).cos(), *inputs)  # noqa: E731
    with Called(FLASH) as flash:
        result_and_gradients(block, inputs)
    assert flash.times == 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_it_is_taken_on_hopper_unless_equal_bits_were_asked_for(hopper: list[str], deterministic: bool) -> None:
    choose = torch.compile(lambda query: query + attention._flash_3_takes(query), backend="eager", fullgraph=True)
    query = torch.zeros(1, attention._WIDTH, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert [bool(function(query).all()) for function in (choose, choose)] == [not deterministic] * 2
    finally:
        torch.use_deterministic_algorithms(False)
    assert hopper == ([] if deterministic else ["FA3"]), "and torch was asked once"


@pytest.mark.parametrize("keeps_attention", [False, True])
def test_a_compiled_block_that_is_recomputed_takes_it_in_one_graph(hopper: list[str], keeps_attention: bool) -> None:
    def block(*inputs: Tensor) -> Tensor:
        return keeping(keeps_attention, False, lambda query, *rest: attend(query.sin(), *rest).cos(), *inputs)

    inputs = heads(dtype=torch.bfloat16, width=attention._WIDTH)
    wanted = result_and_gradients(block, inputs)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, result_and_gradients(compiled, inputs), wanted))
    assert hopper == ["FA3"]


@pytest.mark.parametrize(("width", "dtype"), [(128, torch.bfloat16), (256, torch.float32)], ids=str)
def test_other_widths_and_dtypes_stay_with_torch(hopper: list[str], width: int, dtype: torch.dtype) -> None:
    assert not attention._flash_3_takes(torch.zeros(1, width, dtype=dtype))
    assert not hopper


@pytest.mark.parametrize("lacking", ["card", "package", "torch"])
def test_torch_does_it_where_something_is_lacking(hopper: list[str], monkeypatch, lacking: str) -> None:
    if lacking == "card":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: (8, 9))
    elif lacking == "package":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    assert not flash_3_is_there(0)


def test_a_package_that_cannot_be_loaded_is_told(hopper: list[str], monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(BackendError, match=r"cannot be loaded.*(\n.*)*docs/native\.md"):
        flash_3_is_there(0)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn_interface") is None,
    reason="no FlashAttention-3",
)
@pytest.mark.parametrize("length", [7, 80, 1000])
def test_flash_attention_3_gives_what_attention_is(length: int) -> None:
    inputs = heads("cuda", torch.bfloat16, width=256, length=length)
    assert attention._flash_3_takes(inputs[0])
    exact = [part.detach().float().requires_grad_() for part in inputs]
    for got, wanted in zip(result_and_gradients(attend, inputs), result_and_gradients(by_hand, exact), strict=True):
        assert (got.float() - wanted).norm() < 1e-2 * wanted.norm() + 1e-6
