"""On a CUDA card: everything that `memory` offers trains the quickstart. Run with
`pytest -m gpu tests/loraport_native/test_cuda.py`; at full size `loraport bench step` shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from loraport.errors import OutOfMemoryError  # noqa: E402
from loraport.spec.load import load_spec  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "spec.yaml"


@pytest.mark.parametrize(
    "settings",
    [
        ["memory.quantize=none"],
        ["memory.quantize=fp8"],
        ["memory.quantize=int8"],
        ["memory.quantize=nf4"],
        ["memory.quantize=nf4", "memory.gradient_checkpointing=true", "lora.type=lokr", "train.optimizer=adamw8bit"],
        ["memory.quantize=fp8", "memory.compile=regional", "memory.gradient_checkpointing=true"],
        ["memory.compile=regional", "lora.type=loha"],
        ["memory.quantize=fp8-dynamic", "memory.gradient_checkpointing=none"],
        ["memory.quantize=fp8-dynamic", "memory.offload=group", "memory.compile=regional"],
        ["memory.quantize=fp8-dynamic", "memory.offload=group+activations", "memory.compile=regional"],
        ["memory.quantize=nf4", "memory.offload=disk"],
        ["memory.offload=group+activations", "lora.type=lokr"],
        ["memory.gradient_checkpointing=selective", "memory.compile=regional"],
        ["memory.gradient_checkpointing=auto"],
        ["memory.compile=full"],
        ["lora.dora=true"],
        ["lora.dora=true", "memory.quantize=nf4", "memory.offload=group", "memory.compile=regional"],
        ["memory.quantize=int8-dynamic", "memory.compile=regional"],
        ["memory.storage=nf4", "memory.compute=int8"],
        ["memory.storage=nf4", "memory.compute=fp8"],
        ["train.batch_size=4", "memory.quantize=fp8-dynamic", "memory.compile=regional"],
        ["train.batch_size=4", "memory.compile=regional", "memory.gradient_checkpointing=none"],
        ["lora.dropout=0.1", "memory.compile=regional", "memory.gradient_checkpointing=true"],
        ["sample.every=20", "sample.prompts=[a cat]", "sample.width=128", "sample.height=128", "sample.steps=4"],
    ],
    ids=lambda settings: ",".join(settings),
)
def test_the_quickstart_trains_on_the_card(settings: list[str], tmp_path: Path) -> None:
    done = train_quickstart(tmp_path, *settings, "train.steps=40", "validation.every=40")
    assert done.returncode == 0, done.stderr + done.stdout[-3000:]
    told = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    held_out = [event["loss"] for event in told if event["type"] == "validation"]
    assert held_out[-1] < 0.9 * held_out[0]
    assert json.loads((tmp_path / "run" / "proof.json").read_text())["ok"]


def test_a_run_that_needs_more_than_its_limit_ends_as_out_of_memory(tmp_path: Path) -> None:
    """cuBLAS alone works in more than that."""
    done = train_quickstart(tmp_path, "backend.options.memory_limit_gib=0.03")
    assert done.returncode == OutOfMemoryError.exit_code, done.stderr + done.stdout[-3000:]
    assert "error: Out of memory: " in done.stderr


def train_quickstart(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    arguments = [part for setting in (*settings, "model.dtype=bf16") for part in ("--set", setting)]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "loraport.cli.main",
            "train",
            str(QUICKSTART),
            "--out",
            str(folder / "run"),
            *arguments,
        ],
        env={**os.environ, "LORAPORT_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )


def test_with_deterministic_the_same_seed_gives_the_same_lora_on_the_card(tmp_path: Path) -> None:
    from loraport.run.api import train

    def lora(name: str) -> bytes:
        overrides = ["model.dtype=bf16", "train.steps=15", "validation.every=0", "backend.options.deterministic=true"]
        spec = load_spec(QUICKSTART, overrides).spec
        return train(spec, out=tmp_path / name).lora.read_bytes()

    assert lora("a") == lora("b")


def test_dropout_of_compiled_blocks_that_are_recomputed_is_drawn_from_the_seed(tiny_official: Path) -> None:
    from tiny_steps import model_with

    from loraport_native.compile import compile_model

    model, adapter = model_with(tiny_official, dropout=0.3, storage="none", gradient_checkpointing="full")
    model.to("cuda").train()
    compile_model(model, model.layers, "regional")
    draw = torch.Generator().manual_seed(3)
    latents, text = (torch.randn(1, count, 128, generator=draw).cuda() for count in (16, 5))

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(5)
        result = model.velocity(latents, text, None, torch.full((1,), 0.3, device="cuda"), (4, 4))
        return list(torch.autograd.grad(result.square().sum(), adapter.parameters()))

    first = gradients()
    for one, other in zip(gradients(), first, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


def test_nf4_is_made_of_a_weight_that_its_stream_is_still_writing() -> None:
    from loraport_native.quantize import stored_linear

    def quantized(weight: torch.Tensor) -> torch.nn.Module:
        linear = torch.nn.Linear(256, 256, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        return stored_linear(linear, "nf4", "model")

    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    written_late, stream = torch.zeros_like(weight), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # cycles: some 50 ms
        made = quantized(written_late.copy_(weight))
    stream.synchronize()
    assert torch.equal(made.dequantize(), quantized(weight).dequantize())
