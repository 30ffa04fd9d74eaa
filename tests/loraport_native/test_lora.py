"""The adapter: zero at the start, exactly what its file says afterwards, on exactly the modules asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from loraport.errors import SpecError
from loraport.families import matches
from loraport.lora.canonical import LoraFile, LoraModule
from loraport.lora.proof import prove
from loraport.plugins import plugins
from loraport.spec.models import LoraSection
from loraport_native.dialect import NativeDialect
from loraport_native.lora import Masters, inject, write_adapter
from loraport_native.models.checkpoint import find_checkpoint, load_transformer
from loraport_native.models.ideogram4 import Ideogram4

GRID, TEXT = (4, 4), 5

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 8, "alpha": 12},
    "rslora": {"type": "lora", "rank": 8, "alpha": 6, "rslora": True},
    "dora": {"type": "lora", "rank": 8, "alpha": 4, "dora": True},
    "lokr": {"type": "lokr", "rank": 4, "alpha": 10},
    "lokr of factor 8": {"type": "lokr", "rank": 3, "alpha": 1, "factor": 8},
    "lokr of full matrices": {"type": "lokr", "rank": 512, "alpha": 16, "factor": 4},
    "loha": {"type": "loha", "rank": 6, "alpha": 3},
}


@pytest.fixture
def model(tiny_official: Path) -> Ideogram4:
    loaded = load_transformer(find_checkpoint(str(tiny_official)), torch.float32, "cpu")
    loaded.drop_text_projection()
    return loaded


def forward(model: Ideogram4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return model.velocity(
            torch.randn(2, 16, 128, generator=draw),
            torch.randn(2, TEXT, 128, generator=draw).to(model.dtype),
            [TEXT, 3],
            torch.tensor([0.2, 0.7]),
            GRID,
        )


def all_patterns() -> list[str]:
    return plugins().families()["ideogram4"].target_patterns("all")


def merged_weight(module: LoraModule, weight: np.ndarray) -> np.ndarray:
    """What the canonical form says the weight becomes, in fp64."""
    weight = weight.astype(np.float64)
    changed = weight + module.scale * module.factors.product()(0, len(weight))
    if module.dora is None:
        return changed
    # DoRA's own definition, from the weights alone: what the file says about norms must agree with it.
    norms = np.linalg.norm(changed, axis=1)
    np.testing.assert_allclose(module.dora.merged_norm, norms, rtol=1e-5)
    np.testing.assert_allclose(module.dora.base_norm, np.linalg.norm(weight, axis=1), rtol=1e-5)
    return changed * (module.dora.trained / norms)[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_adapter_changes_nothing_at_all(model: Ideogram4, kind: str) -> None:
    before = forward(model)
    inject(model, LoraSection(**KINDS[kind]), all_patterns(), seed=1)
    if kind == "dora":  # ‖W‖ / ‖W‖ is 1 but for the last bit
        torch.testing.assert_close(forward(model), before, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(forward(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_model_computes_what_its_file_says(kind, make_spec, make_trainer, tiny_official, tmp_path) -> None:
    """Real training, then W + ΔW from the written file in fp64 put into a fresh model: the same outputs."""
    spec = make_spec(lora={**KINDS[kind], "targets": "all"}, train={"steps": 6, "learning_rate": 3e-3})
    trainer = make_trainer(spec)
    before = forward(load(tiny_official))
    trainer.fit()
    trainer.model.eval()

    file = written(tmp_path)
    assert len(file.modules) == 3 * 6
    plain = load(tiny_official)
    for name, module in file.modules.items():
        weight = plain.get_submodule(name).weight
        weight.data = torch.from_numpy(merged_weight(module, weight.detach().numpy())).float()
    change = (forward(plain) - before).abs().max()
    torch.testing.assert_close(forward(trainer.model), forward(plain), rtol=0, atol=float(change) * 1e-4)
    assert change > 0.01


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_comfyui_file_means_what_was_trained(kind: str, dtype: str, model: Ideogram4, tmp_path: Path) -> None:
    lora = LoraSection(**KINDS[kind])
    source = tmp_path / "adapter.safetensors"
    write_random(inject(model, lora, all_patterns(), seed=1), lora, source)
    comfyui = plugins().dialects()["comfyui"]
    trained = NativeDialect().read(source)
    comfyui.write(trained, tmp_path / "out.safetensors", dtype, {})
    proof = prove(trained, comfyui.read(tmp_path / "out.safetensors"))
    assert proof.ok, proof.to_json()["worst"]
    assert len(proof.modules) == 3 * 6
    assert not proof.zeros


def write_random(adapter: Any, lora: LoraSection, path: Path) -> None:
    """The adapter's file with random factors, as the trainer writes it."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, factor in adapter.factors.items():
        noise = torch.randn(factor.shape, generator=draw)
        tensors[name] = factor.detach() * (1 + 0.1 * noise) if name.endswith("magnitude") else 0.05 * noise
    write_adapter(path, adapter, tensors, "ideogram4", 7)


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("attention", {"attention.qkv", "attention.o"}),
        (
            "attention+mlp",
            {"attention.qkv", "attention.o", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"},
        ),
        (
            "all",
            {
                "attention.qkv",
                "attention.o",
                "feed_forward.w1",
                "feed_forward.w2",
                "feed_forward.w3",
                "adaln_modulation",
            },
        ),
    ],
)
@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_presets_pick_these_modules_of_every_block(model, targets: str, wanted: set[str], kind: str) -> None:
    patterns = plugins().families()["ideogram4"].target_patterns(targets)
    adapter = inject(model, LoraSection(type=kind), patterns, seed=0)
    assert set(adapter.scales) == {f"layers.{block}.{name}" for block in range(3) for name in wanted}


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_patterns_pick_whole_names(model: Ideogram4, kind: str) -> None:
    patterns = [r"layers\.[12]\.attention\.qkv", r"final_layer\.linear"]
    adapter = inject(model, LoraSection(type=kind), patterns, seed=0)
    assert list(adapter.scales) == ["layers.1.attention.qkv", "layers.2.attention.qkv", "final_layer.linear"]
    assert not matches(["attention"], "layers.0.attention.qkv")


@pytest.mark.parametrize("pattern", [r"layers\.\d+\.attention\.to_q", "qkv", r"layers\.0\.attention\.norm_q"])
def test_a_pattern_that_matches_no_linear_is_refused_with_a_name_that_exists(model: Ideogram4, pattern: str) -> None:
    with pytest.raises(SpecError, match=r"lora\.targets.*layers\.\d\.attention") as caught:
        inject(model, LoraSection(), [r"layers\.0\.attention\.o", pattern], seed=0)
    assert repr(pattern) in str(caught.value)
    assert not any(isinstance(module, nn.ModuleDict) for module in model.modules()), "the model is untouched"


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_is_trained(model: Ideogram4, kind: str) -> None:
    adapter = inject(model, LoraSection(**KINDS[kind]), all_patterns(), seed=0)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in adapter.parameters()}
    assert {name.rpartition(".")[0] for name in adapter.factors} == set(adapter.scales)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha"])
def test_the_start_depends_on_the_seed_alone(tiny_official: Path, kind: str) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(1)  # whatever was drawn before
        return dict(inject(load(tiny_official), LoraSection(**KINDS[kind]), all_patterns(), seed).factors)

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    state = torch.get_rng_state()
    inject(load(tiny_official), LoraSection(**KINDS[kind]), all_patterns(), 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_float32_masters_keep_updates_that_bf16_would_lose(tiny_official: Path) -> None:
    model = load_transformer(find_checkpoint(str(tiny_official)), torch.bfloat16, "cpu")
    adapter = inject(model, LoraSection(), all_patterns(), seed=0)
    masters = Masters(adapter, model.dtype)
    assert {live.dtype for live in masters.live} == {torch.bfloat16}
    assert {weight.dtype for weight in masters.weights} == {torch.float32}
    name = "layers.0.attention.qkv.lora_A"
    index = masters.names.index(name)
    start = masters.weights[index].detach().clone()
    for _ in range(100):
        for weight in masters.weights:
            weight.data.mul_(1 + 1e-4)  # a bf16 number stays where it is: its steps are 4e-3 wide
        masters.publish()
    torch.testing.assert_close(masters.weights[index].detach(), start * (1 + 1e-4) ** 100, rtol=1e-5, atol=0)
    torch.testing.assert_close(adapter.factors[name].detach().float(), start * 1.01, rtol=8e-3, atol=0)
    assert not torch.equal(adapter.factors[name].detach(), start.bfloat16())


def load(folder: Path) -> Ideogram4:
    model = load_transformer(find_checkpoint(str(folder)), torch.float32, "cpu")
    model.drop_text_projection()
    return model


def written(run_dir: Path) -> LoraFile:
    (path,) = run_dir.glob("**/checkpoints/step-*/adapter.safetensors")
    return NativeDialect().read(path)
