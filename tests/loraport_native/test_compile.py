"""Compiled code computes what plain code does under every other setting, and is compiled once for all blocks.

What is compiled here is the graph and mostly its backward pass, by torch's own machinery without the code generator,
which takes most of the time; `test_quantize.py` has trainings with that.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from tiny_steps import model_with, step
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

from loraport_native import recompute
from loraport_native.compile import compile_model
from loraport_native.lora import Adapter
from loraport_native.models.ideogram4 import Ideogram4


def counting(monkeypatch: pytest.MonkeyPatch, backend: str) -> CompileCounterWithBackend:
    """Counts compilations, which `backend` does."""
    found, compile_it = CompileCounterWithBackend(backend), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_it(function, backend=found))
    torch._dynamo.reset()
    return found


def compiled(checkpoint: Path, mode: str = "regional", **settings: Any) -> tuple[Ideogram4, Adapter]:
    model, adapter = model_with(checkpoint, **settings)
    compile_model(model, model.layers, mode)
    return model, adapter


#: Each storage, computation, place, degree of recomputation and adapter at least once, and what is likely to meet.
COMBINATIONS: list[dict[str, Any]] = [
    {"storage": "none", "offload": "group", "gradient_checkpointing": "selective", "kind": "lora", "dora": True},
    {"storage": "none", "offload": "none", "gradient_checkpointing": "none", "kind": "loha"},
    {"storage": "fp8", "offload": "group", "gradient_checkpointing": "full", "kind": "lokr"},
    {"storage": "nf4", "offload": "none", "gradient_checkpointing": "none", "kind": "lora", "dora": True},
    {"storage": "fp8", "compute": "fp8", "offload": "none", "gradient_checkpointing": "none", "kind": "lora"},
    {"storage": "fp8", "compute": "fp8", "offload": "group", "gradient_checkpointing": "selective", "kind": "lora"},
    {"storage": "fp8", "compute": "fp8", "offload": "group+activations", "kind": "lokr"},
    {"storage": "int8", "compute": "int8", "offload": "disk", "gradient_checkpointing": "none", "kind": "lora"},
    {"storage": "int8", "offload": "group+activations", "kind": "lora", "dropout": 0.3},
    {"storage": "nf4", "offload": "none", "gradient_checkpointing": "full", "kind": "lokr"},
    {"storage": "nf4", "offload": "disk", "gradient_checkpointing": "full", "kind": "lora"},
    {"storage": "none", "offload": "none", "gradient_checkpointing": "full", "kind": "lora", "dropout": 0.3},
]


@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda given: "-".join(map(str, given.values())))
def test_compiled_blocks_compute_what_plain_ones_do(
    tiny_official: Path,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORAPORT_CACHE", str(tmp_path))
    counter = counting(monkeypatch, "aot_eager")
    wanted = step(*model_with(tiny_official, **settings), lengths=[5, 3])
    found = step(*compiled(tiny_official, **settings), lengths=[5, 3])
    assert counter.frame_count
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


@pytest.mark.parametrize(("mode", "from_outside"), [("full", 8), ("full", 1), ("selective", 8)])
@pytest.mark.parametrize(
    "settings",
    [
        {"storage": "none"},
        {"storage": "fp8", "compute": "fp8", "offload": "group"},
        {"storage": "nf4", "dropout": 0.3},
        {"storage": "none", "kind": "lokr"},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_a_compiled_block_keeps_no_more_than_recomputation_lets_it(
    tiny_official: Path, settings: dict[str, Any], mode: str, from_outside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = step(*model_with(tiny_official, gradient_checkpointing=mode, **settings))
    monkeypatch.setattr(recompute, "_FROM_OUTSIDE", from_outside)
    counting(monkeypatch, "aot_eager")
    model, adapter = compiled(tiny_official, gradient_checkpointing=mode, **settings)
    kept: list[list[tuple[int, ...]]] = []
    inner = model.run_block

    def run_block(number: int, block: torch.nn.Module, *inputs: Any) -> torch.Tensor:
        weights = [*model.parameters(), *model.buffers()]
        shapes: dict[int, tuple[int, ...]] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_floating_point() and tensor.numel():  # not the state of a generator
                shapes[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = inner(number, block, *inputs)
        given = [one for one in tree_leaves(inputs) if isinstance(one, torch.Tensor)]
        there = {one.untyped_storage().data_ptr() for one in [*weights, *given]}
        kept.append(sorted(shape for place, shape in shapes.items() if place not in there))
        return result

    model.run_block = run_block
    found = step(model, adapter)
    batch, tokens, heads, width = 2, 5 + 4 * 4, 2, 64
    attention = [(batch, heads, tokens), (batch, heads, tokens, width)]  # its result, and what its backward pass needs
    assert kept[:-1] == [attention if mode == "selective" else []] * 2
    assert len(kept[-1]) > len(attention), "the last is not recomputed"
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


@pytest.mark.slow
def test_the_whole_model_in_one_graph_computes_what_its_parts_do(
    tiny_official: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = counting(monkeypatch, "eager")
    settings = {"storage": "fp8", "gradient_checkpointing": "full"}
    wanted = step(*model_with(tiny_official, **settings))
    found = step(*compiled(tiny_official, "full", **settings))
    assert counter.frame_count == 1
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


def test_blocks_share_their_code_and_a_third_size_needs_no_more(
    tiny_official: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = counting(monkeypatch, "eager")
    model, adapter = compiled(tiny_official, gradient_checkpointing="none")
    counts = []
    for tokens, grid in [(5, (4, 4)), (7, (4, 4)), (7, (6, 4)), (12, (4, 6)), (9, (6, 6))]:
        step(model, adapter, batch=1, tokens=tokens, grid=grid)
        counts.append(counter.frame_count)
    # The first block's input needs no gradient, so there are two kinds of block, for the first size and for any.
    assert counts == [2, 4, 4, 4, 4]


def test_batches_of_new_lengths_are_compiled_a_few_times_and_no_more(
    tiny_official: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = counting(monkeypatch, "eager")
    model, adapter = compiled(tiny_official, gradient_checkpointing="full")
    counts = []
    for lengths in [[9, 5], [4, 8], [9, 6], [3, 9], [11, 4], [0, 11], [8, 1], [7, 8]]:
        step(model, adapter, lengths, tokens=max(lengths))
        counts.append(counter.frame_count)
    # Three kinds of block (the first one's input needs no gradient, the last is not recomputed), for the first lengths
    # and for any.
    assert counts == [3] + [6] * 7


@pytest.mark.parametrize(
    ("hint", "numbers", "at_once"),
    [
        ("INNER", 4608, True),
        ("INNER", 12288, False),
        ("DEFAULT", 256, True),
        ("DEFAULT", 4608, False),
        ("OUTER", 4608, False),
    ],
)
def test_norms_are_summed_at_once_and_longer_sums_piece_by_piece(
    tiny_official: Path, monkeypatch: pytest.MonkeyPatch, hint: str, numbers: int, at_once: bool
) -> None:
    """What the code generator for CUDA asks."""
    from torch._inductor import config
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.sizevars import SizeVarAllocator
    from torch._inductor.virtualized import V

    counting(monkeypatch, "eager")
    features = SimpleNamespace(get_reduction_hint=lambda: ReductionHint[hint], reduction_numel=sympy.Integer(numbers))
    with (
        config.patch(inductor_choices_class=None),
        V.set_graph_handler(SimpleNamespace(sizevars=SizeVarAllocator())),
    ):
        compiled(tiny_official)
        assert config.inductor_choices_class().should_use_persistent_reduction(features, False) == at_once
