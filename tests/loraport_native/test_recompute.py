"""What is recomputed changes memory and time, and no bit of a result."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from loraport_native import recompute as module
from loraport_native.recompute import recompute


def losses_and_gradients(trainer) -> list[torch.Tensor]:
    for factor in trainer.adapter.parameters():
        factor.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    trainer.model.train()
    loss = trainer._loss(trainer._batch(0), 0)
    return [loss, *torch.autograd.grad(loss, trainer.masters.weights)]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_no_mode_changes_a_bit(make_spec, make_trainer, mode: str) -> None:
    wanted, got = (
        losses_and_gradients(make_trainer(make_spec(lora={"dropout": 0.3}, memory={"gradient_checkpointing": how})))
        for how in ("none", mode)
    )
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def attention_calls(trainer) -> int:
    calls = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            nonlocal calls
            calls += "scaled_dot_product" in str(operator) and "backward" not in str(operator)
            return operator(*args, **(kwargs or {}))

    with Count():
        losses_and_gradients(trainer)
    return calls


def test_selective_recomputes_all_but_attention(make_spec, make_trainer) -> None:
    counted = {
        mode: attention_calls(make_trainer(make_spec(memory={"gradient_checkpointing": mode})))
        for mode in ("none", "selective", "full")
    }
    assert counted == {"none": 3, "selective": 3, "full": 5}, "the last block's is never computed again"


def test_only_the_first_blocks_are_recomputed_when_asked(make_spec, make_trainer, monkeypatch) -> None:
    seen = []

    def note(block, *inputs, **options):
        seen.append(block.__self__)
        return checkpoint(block, *inputs, **options)

    monkeypatch.setattr(module, "checkpoint", note)
    trainer = make_trainer(make_spec())
    recompute(trainer.model, "full", 2)
    losses_and_gradients(trainer)
    assert seen == list(trainer.model.layers)[:2]


@pytest.mark.parametrize(("limit", "expected"), [(90, 3), (115, 2), (126, 1), (1000, 0)])
def test_auto_recomputes_the_fewest_blocks_that_fit(monkeypatch, limit: int, expected: int) -> None:
    """A model of four blocks that needs 100 bytes when all but the last are recomputed, 10 more for each other."""
    recomputed: list[int] = []
    probes: list[int] = []
    monkeypatch.setattr(module, "recompute", lambda model, mode, blocks: recomputed.append(blocks))
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100 + 10 * (3 - recomputed[-1]))
    model = SimpleNamespace(layers=[None] * 4)
    found = module.recompute_what_must_be(model, lambda: probes.append(recomputed[-1]), limit)
    assert found == recomputed[-1] == expected
    assert probes == [3, 3, 1, 1], "each measured once after a first pass that compiles"


def test_auto_recomputes_all_where_nothing_less_fits_even_to_be_tried(monkeypatch) -> None:
    recomputed: list[int] = []
    monkeypatch.setattr(module, "recompute", lambda model, mode, blocks: recomputed.append(blocks))
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100)

    def probe() -> None:
        if recomputed[-1] < 3:
            raise torch.OutOfMemoryError

    assert module.recompute_what_must_be(SimpleNamespace(layers=[None] * 4), probe, 115) == 3
    assert recomputed == [3, 1, 3]


@pytest.mark.parametrize(("recomputed", "inside"), [(31, 27), (4, 0), (3, 0)])
def test_the_last_eighth_of_what_is_recomputed_is_recomputed_from_outside(recomputed: int, inside: int) -> None:
    blocks = [SimpleNamespace() for _ in range(32)]
    model = SimpleNamespace(layers=blocks, blocks=lambda: blocks, modules=lambda: [])
    recompute(model, "full", recomputed)
    assert [block.passing is not None for block in blocks] == [number < inside for number in range(32)]
