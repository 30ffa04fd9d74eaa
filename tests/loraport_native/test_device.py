"""The device that is used, and settings that it cannot do."""

from __future__ import annotations

import pytest
import torch

from loraport.errors import SpecError
from loraport_native.device import check_device, choose_device, make_deterministic


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


@pytest.mark.parametrize("method", ["fp8", "int8", "nf4"])
def test_quantisation_on_mps_is_refused(make_spec, method: str) -> None:
    with pytest.raises(SpecError, match=r"memory\.storage"):
        check_device(make_spec(memory={"quantize": method}), torch.device("mps"))
    check_device(make_spec(memory={"quantize": method}), torch.device("cpu"))


def test_compiling_without_a_compiler_is_refused(make_spec, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SpecError, match=r"memory\.compile.*compiler"):
        check_device(make_spec(memory={"compile": "regional"}), torch.device("cpu"))
    check_device(make_spec(memory={"compile": "none"}), torch.device("cpu"))


def test_deterministic_algorithms_are_used_only_when_asked_for(make_spec) -> None:
    try:
        make_deterministic(make_spec(backend={"options": {}}))
        assert not torch.are_deterministic_algorithms_enabled()
        make_deterministic(make_spec(backend={"options": {"deterministic": True}}))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
