"""The device that is used, and settings that it cannot do."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.torch_version import TorchVersion

from loraport.errors import SpecError
from loraport_native.device import check_device, choose_device, free_memory_bytes, limit_memory, make_deterministic


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_best_device_is_chosen(make_spec, monkeypatch, cuda: bool, mps: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device(make_spec(backend={"options": {}})).type == expected
    assert choose_device(make_spec(backend={"options": {"device": "auto"}})).type == expected
    assert choose_device(make_spec(backend={"options": {"device": "cpu"}})) == torch.device("cpu")


@pytest.mark.parametrize("wanted", ["auto", "cuda", "cuda:0"])
def test_a_cuda_device_has_its_number_which_parts_of_torch_want(make_spec, monkeypatch, wanted: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device(make_spec(backend={"options": {"device": wanted}})) == torch.device("cuda", 0)


@pytest.mark.parametrize("wanted", ["cuda", "cuda:1", "tpu", "cpu:banana", 3, ""])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(make_spec, monkeypatch, wanted: object) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SpecError, match=r"backend\.options\.device.*Here: cpu"):
        choose_device(make_spec(backend={"options": {"device": wanted}}))


def test_a_card_beyond_the_last_is_refused(make_spec, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(make_spec(backend={"options": {"device": "cuda:1"}})) == torch.device("cuda:1")
    with pytest.raises(SpecError, match=r"cuda:2.*Here: cuda, cpu, cuda:0, cuda:1"):
        choose_device(make_spec(backend={"options": {"device": "cuda:2"}}))


@pytest.mark.parametrize("cards", [0, 1])
@pytest.mark.parametrize("options", [{}, {"device": "auto"}, {"device": "cuda"}])
def test_more_gpus_than_there_are_is_refused(make_spec, monkeypatch, cards: int, options: dict[str, str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    with pytest.raises(SpecError, match=rf"train\.gpus: 2 .* can use {cards} CUDA GPUs") as caught:
        choose_device(make_spec(train={"gpus": 2}, backend={"options": options}))
    assert "train.gpus: 1" in str(caught.value)


def test_each_process_of_several_has_a_card_of_its_own(make_spec, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    spec = make_spec(train={"gpus": 2}, backend={"options": {}})
    assert [choose_device(spec, rank) for rank in (0, 1)] == [torch.device("cuda:0"), torch.device("cuda:1")]
    spec = make_spec(train={"gpus": 2}, backend={"options": {"device": "cuda:1"}})
    with pytest.raises(SpecError, match=r"backend\.options\.device: 'cuda:1'.*train\.gpus is 2"):
        choose_device(spec)
    spec = make_spec(train={"gpus": 3}, backend={"options": {"device": "cpu"}})
    assert choose_device(spec, 2) == torch.device("cpu")


@pytest.mark.parametrize("method", ["fp8", "int8", "nf4"])
def test_quantisation_on_mps_is_refused(make_spec, method: str) -> None:
    with pytest.raises(SpecError, match=r"memory\.storage"):
        check_device(make_spec(memory={"quantize": method}), torch.device("mps"))
    check_device(make_spec(memory={"quantize": method}), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["cpu", "mps"])
@pytest.mark.parametrize(
    ("memory", "path"),
    [
        ({"offload": "group"}, "memory.offload: group"),
        ({"offload": "group+activations"}, r"memory.offload: group\+activations"),
        ({"offload": "disk"}, "memory.offload: disk"),
        ({"storage": "nf4", "compute": "fp8"}, "memory.compute: fp8"),
        ({"storage": "nf4", "compute": "int8"}, "memory.compute: int8"),
    ],
)
def test_what_needs_a_cuda_card_is_refused_elsewhere_unless_the_cpu_was_asked_for(
    make_spec, kind: str, memory: dict[str, str], path: str
) -> None:
    unasked = make_spec(memory=memory, backend={"options": {}})
    says = "memory.storage: nf4 needs CUDA or a CPU" if kind == "mps" and "storage" in memory else path
    with pytest.raises(SpecError, match=says):
        check_device(unasked, torch.device(kind))
    check_device(make_spec(memory=memory), torch.device("cpu"))


@pytest.mark.parametrize(("capability", "fits"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_computing_in_fp8_on_a_card_without_it_is_refused_before_anything_loads(
    make_spec, monkeypatch, capability: tuple[int, int], fits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    spec = make_spec(memory={"quantize": "fp8-dynamic"}, backend={"options": {}})
    if fits:
        check_device(spec, torch.device("cuda"))
    else:
        with pytest.raises(SpecError, match=r"capability 8\.9 or more; A Card has 8\.6.*\n.*quantize: int8"):
            check_device(spec, torch.device("cuda"))
    check_device(make_spec(memory={"quantize": "int8"}), torch.device("cuda"))


def card_of(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    return torch.device("cuda")


def test_bf16_on_a_card_that_emulates_it_is_refused(make_spec, monkeypatch) -> None:
    card = card_of(monkeypatch, (7, 5))
    with pytest.raises(SpecError, match=r"model\.dtype: bf16 .*8\.0 or more; A Card has 7\.5.*\n.*dtype: fp32"):
        check_device(make_spec(model={"dtype": "bf16"}), card)
    check_device(make_spec(model={"dtype": "fp32"}), card)
    check_device(make_spec(model={"dtype": "bf16"}), card_of(monkeypatch, (8, 0)))


@pytest.mark.parametrize(
    ("torch_version", "capability", "compiled", "refused"),
    [
        ("2.12.1+cu130", (8, 6), "regional", True),
        ("2.9.1", (8, 0), "full", True),
        ("2.12.1", (8, 6), "none", False),
        ("2.12.1", (8, 9), "regional", False),
        ("2.13.0+cu130", (8, 6), "regional", False),
    ],
)
def test_compiled_fp8_is_refused_where_the_compiler_cannot_read_it(
    make_spec, monkeypatch, torch_version: str, capability: tuple[int, int], compiled: str, refused: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(torch_version))
    monkeypatch.setenv("CC", sys.executable)
    spec, card = make_spec(memory={"storage": "fp8", "compile": compiled}), card_of(monkeypatch, capability)
    if refused:
        with pytest.raises(SpecError, match=r"memory\.storage: fp8 with .* or torch 2\.13; A Card.*\n.*int8"):
            check_device(spec, card)
    else:
        check_device(spec, card)


@pytest.mark.parametrize("mode", ["regional", "full"])
def test_compiling_without_a_compiler_is_refused(make_spec, monkeypatch, mode: str) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SpecError, match=r"memory\.compile.*compiler"):
        check_device(make_spec(memory={"compile": mode}), torch.device("cpu"))
    check_device(make_spec(memory={"compile": "none"}), torch.device("cpu"))


def test_deterministic_algorithms_are_used_only_when_asked_for(make_spec) -> None:
    try:
        make_deterministic(make_spec(backend={"options": {}}))
        assert not torch.are_deterministic_algorithms_enabled()
        make_deterministic(make_spec(backend={"options": {"deterministic": True}}))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_memory_limit_is_a_share_of_the_card_and_counts_in_what_is_free(make_spec, monkeypatch) -> None:
    card, gib = torch.device("cuda"), 2**30
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24 * gib))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    for limit in (6, 24, 48):
        limit_memory(make_spec(backend={"options": {"memory_limit_gib": limit}}), card)
    limit_memory(make_spec(backend={"options": {}}), card)
    assert shares == [0.25, 1.0, 1.0]

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * gib, 24 * gib))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: gib)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: gib)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.25)
    assert free_memory_bytes(card) == 5 * gib
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert free_memory_bytes(card) == 20 * gib


def test_a_memory_limit_off_cuda_is_refused(make_spec) -> None:
    with pytest.raises(SpecError, match="memory_limit_gib"):
        limit_memory(make_spec(backend={"options": {"memory_limit_gib": 6}}), torch.device("cpu"))
