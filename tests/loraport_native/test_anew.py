"""What is stored in few bits is unpacked for one product at a time, also where both passes are compiled together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_steps import model_with, step
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from loraport_native.anew import teach_compiler, to_anew
from loraport_native.compile import compile_model
from loraport_native.frozen import frozen_linear
from loraport_native.scaled_matmul import to_rows

#: Every kind of product at least once, what else unpacks weights, and recomputation inside the compiled block.
KEEPING: list[dict[str, Any]] = [
    {"storage": "fp8"},
    {"storage": "int8", "kind": "lokr"},
    {"storage": "fp8", "dora": True},
    {"storage": "fp8", "compute": "fp8"},
    {"storage": "nf4"},
    {"storage": "nf4", "compute": "fp8"},
    {"storage": "nf4", "compute": "int8"},
    {"storage": "nf4", "kind": "lokr", "gradient_checkpointing": "selective"},
]


@pytest.mark.parametrize("settings", KEEPING, ids=lambda given: "-".join(map(str, given.values())))
def test_compiled_blocks_keep_no_unpacked_weight(
    tiny_official: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_it = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_it(function, backend="aot_eager"))
    torch._dynamo.reset()
    model, adapter = model_with(tiny_official, **{"gradient_checkpointing": "none", **settings})
    compile_model(model, model.layers, "regional")
    few = {"batch": 1, "tokens": 2, "grid": (2, 2)}  # tokens, so that what they leave behind is smaller than a weight
    step(model, adapter, **few)  # type: ignore[arg-type]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        step(model, adapter, **few)  # type: ignore[arg-type]
    at_hand = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in at_hand]
    assert 0 < max(tensor.numel() for tensor in kept) < 128 * 128  # the smallest weight


def test_the_copy_is_one_of_its_own_and_the_operator_whole_under_the_compiler() -> None:
    stored, after = torch.arange(6.0).view(2, 3), torch.ones(1)
    same = to_anew(stored, torch.float32, after)
    assert torch.equal(same, stored)
    assert same.data_ptr() != stored.data_ptr()
    torch.library.opcheck(
        torch.ops.loraport.to_anew.default,
        (stored, torch.bfloat16, after),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.slow
def test_in_generated_code_it_is_a_conversion_like_any_other() -> None:
    teach_compiler()
    torch._dynamo.reset()
    rows = to_rows(torch.randn(48, 32), torch.float8_e4m3fn)
    x = torch.randn(3, 32, requires_grad=True)

    def gradient() -> Tensor:
        result = torch.compile(lambda x: frozen_linear(x, "rows", rows))(x)
        return torch.autograd.grad(result, x, torch.ones_like(result))[0]

    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        found, (_, backward) = run_and_get_code(gradient)
    torch.testing.assert_close(found, torch.ones(3, 48) @ (rows[0].float() * rows[1]))
    assert "extern_kernels.mm" in backward
    assert "ops.loraport" not in backward
