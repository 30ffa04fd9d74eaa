"""On a CUDA card: every storage of the frozen weights trains, and every hardware preset fits its card at full size.

Run with `pytest -m gpu tests/loraport_native/test_cuda.py`. With LORAPORT_BENCH_FILE set, the full-size runs append one
JSON line each to that file; with LORAPORT_BENCH_DETERMINISTIC set, they run with backend.options.deterministic.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from loraport.plugins import plugins  # noqa: E402
from loraport.profiles import resolve_memory  # noqa: E402
from loraport.run.events import Step  # noqa: E402
from loraport.spec.load import build_spec, load_spec  # noqa: E402

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
        ["lora.dora=true"],
        ["sample.every=20", "sample.prompts=[a cat]", "sample.width=128", "sample.height=128", "sample.steps=4"],
    ],
    ids=lambda settings: ",".join(settings),
)
def test_the_quickstart_trains_on_the_card(settings: list[str], tmp_path: Path) -> None:
    overrides = [*settings, "model.dtype=bf16", "train.steps=40", "validation.every=40"]
    arguments = [part for override in overrides for part in ("--set", override)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "loraport.cli.main",
            "train",
            str(QUICKSTART),
            "--out",
            str(tmp_path / "run"),
            *arguments,
        ],
        env={**os.environ, "LORAPORT_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout[-3000:]
    told = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    held_out = [event["loss"] for event in told if event["type"] == "validation"]
    assert held_out[-1] < 0.9 * held_out[0]
    assert json.loads((tmp_path / "run" / "proof.json").read_text())["ok"]


@dataclass
class _Sample:
    bucket: tuple[int, int]
    name: str = "noise"
    latents: str = "latents"
    text: str = "text"
    weight: float = 1.0


@dataclass
class _Noise:
    """A training set of noise with the sizes of the real thing: latents (N, 128) and projected text (T, 4608)."""

    side: int
    tokens: int
    samples: list[_Sample] = field(default_factory=list)
    held_out: list[_Sample] = field(default_factory=list)
    empty_text: str = "empty"

    def __post_init__(self) -> None:
        self.samples = [_Sample((self.side, self.side))]
        self._latents = torch.randn((self.side // 16) ** 2, 128)
        self._text = torch.randn(self.tokens, 4608, dtype=torch.bfloat16)

    def latents(self, sample: _Sample) -> torch.Tensor:
        return self._latents

    def text(self, key: str) -> torch.Tensor:
        return self._text


def _fill_with_noise(module: torch.nn.Module) -> None:
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                noise = torch.randn(parameter.shape, dtype=parameter.dtype, device="cuda") * 0.02
                setattr(part, name, torch.nn.Parameter(noise, requires_grad=False))


@pytest.mark.parametrize("profile", ["12gb", "16gb", "24gb", "48gb", "80gb"])
def test_a_hardware_preset_fits_its_card_at_full_size(profile: str, tmp_path: Path) -> None:
    from loraport_native.device import make_deterministic
    from loraport_native.lora import inject
    from loraport_native.models.ideogram4 import Ideogram4
    from loraport_native.quantize import compile_blocks, quantize_blocks
    from loraport_native.trainer import Trainer

    warm_up, measured = 4, 12
    content = {
        "name": "full-size",
        "model": {"checkpoint": "tiny"},
        "dataset": {"path": "."},
        "lora": {"rank": 32},
        "train": {"steps": warm_up + measured, "optimizer": "adamw8bit"},
        "memory": {"profile": profile},
        "save": {"every": 0},
        "backend": {"options": {"deterministic": bool(os.environ.get("LORAPORT_BENCH_DETERMINISTIC"))}},
    }
    spec = resolve_memory(build_spec(content, base=tmp_path, origin="test").spec, plugins().profiles())
    make_deterministic(spec)
    family = plugins().families()["ideogram4"]
    card_gib = plugins().profiles()["hardware", profile].card_gib
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    # A card's name counts 10^9 bytes loosely and the driver keeps some: leave 6 % and the context out of reach.
    torch.cuda.set_per_process_memory_fraction(min(1.0, (0.94 * card_gib - 0.5) * 2**30 / total))
    torch.cuda.reset_peak_memory_stats()
    with torch.device("meta"):
        model = Ideogram4().to(torch.bfloat16)
    model.drop_text_projection()
    # As load_transformer does it: a block at a time, quantised before the next one comes.
    for block in model.layers:
        _fill_with_noise(block)
        quantize_blocks(block, spec.memory.quantize)
    _fill_with_noise(model)
    load_peak = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        adapter = inject(model, spec.lora, family.target_patterns(spec.lora.targets), 0)
        if spec.memory.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        compile_blocks(model.layers, spec.memory.compile)
        seconds: list[float] = []
        started = time.perf_counter()

        def hear(event: object) -> None:
            if isinstance(event, Step):
                seconds.append(event.seconds)

        Trainer(spec, tmp_path, model, adapter, _Noise(1024, 512), hear).fit()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    steady = sorted(seconds[warm_up:])
    row = {
        "profile": profile,
        "memory": spec.memory.model_dump(),
        "resolution": 1024,
        "text_tokens": 512,
        "batch_size": 1,
        "rank": 32,
        "optimizer": spec.train.optimizer,
        "options": spec.backend.options,
        "step_s_median": round(steady[len(steady) // 2], 4),
        "step_s_min": round(steady[0], 4),
        "step_s_max": round(steady[-1], 4),
        "first_step_s": round(seconds[0], 2),
        "all_s": round(time.perf_counter() - started, 1),
        "load_peak_allocated_gib": round(load_peak / 2**30, 2),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "parameters": sum(p.numel() for p in adapter.parameters()),
        "card": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(row))
    if os.environ.get("LORAPORT_BENCH_FILE"):
        with open(os.environ["LORAPORT_BENCH_FILE"], "a") as file:
            file.write(json.dumps(row) + "\n")
    assert row["peak_reserved_gib"] < card_gib


def test_with_deterministic_the_same_seed_gives_the_same_lora_on_the_card(tmp_path: Path) -> None:
    from loraport.run.api import train

    def lora(name: str) -> bytes:
        overrides = ["model.dtype=bf16", "train.steps=15", "validation.every=0", "backend.options.deterministic=true"]
        spec = load_spec(QUICKSTART, overrides).spec
        return train(spec, out=tmp_path / name).lora.read_bytes()

    assert lora("a") == lora("b")
