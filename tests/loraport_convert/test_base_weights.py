"""What a DoRA means, from the weights it was trained on: rescaled for ComfyUI, or its change as a whole."""

import json

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.errors import DataError
from loraport.lora.canonical import ColumnScale, LoraFile, LoraModule, LowRank
from loraport.lora.proof import prove
from loraport.lora.storage import read_tensors, write_tensors
from loraport_convert.base_weights import BaseModel, with_base
from loraport_convert.comfyui import ComfyUI

H = 24
OUT, QKV = "layers.0.attention.o", "layers.0.attention.qkv"
FAMILY = {"loraport.family": "ideogram4"}


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    app = build_app()

    def call(*arguments):
        done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
        return done.exit_code, done.stdout, done.stderr

    return call


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights():
    """Weights by native module."""
    return {OUT: random(0, H, H), QKV: random(1, 3 * H, H)}


def native_base(folder, prefix="", dtype=np.float32):
    tensors = {f"{prefix}{name}.weight": weight.astype(dtype) for name, weight in weights().items()}
    write_tensors(folder / "base.safetensors", tensors, {})
    return folder / "base.safetensors"


def diffusers_base(folder):
    """The same in diffusers' folder, its attention split, in two files."""
    (folder / "model" / "transformer").mkdir(parents=True)
    q, k, v = np.split(weights()[QKV], 3)
    first = {"layers.0.attention.to_q.weight": q, "layers.0.attention.to_out.0.weight": weights()[OUT]}
    second = {"layers.0.attention.to_k.weight": k, "layers.0.attention.to_v.weight": v}
    for number, tensors in enumerate((first, second), 1):
        write_tensors(folder / "model" / "transformer" / f"model-0000{number}-of-00002.safetensors", tensors, {})
    return folder / "model"


def peft_dora(folder):
    """A DoRA as diffusers saves it, on split attention, and the weights after training in fp64."""
    config = {"transformer.r": 2, "transformer.lora_alpha": 3, "transformer.use_dora": True}
    tensors, after = {}, {}
    parts = dict(zip(("to_q", "to_k", "to_v"), np.split(weights()[QKV], 3), strict=True)) | {"to_out.0": weights()[OUT]}
    for seed, (part, weight) in enumerate(parts.items(), 10):
        key = f"transformer.layers.0.attention.{part}"
        down, up = random(seed, 2, H), random(seed + 10, H, 2)
        magnitude = np.abs(random(seed + 20, H)) + 3
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.lora_magnitude_vector": magnitude}
        merged = weight.astype(np.float64) + 1.5 * up.astype(np.float64) @ down
        after[part] = magnitude[:, None] * merged / np.linalg.norm(merged, axis=1, keepdims=True)
    path = folder / "dora.safetensors"
    write_tensors(path, tensors, {"lora_adapter_metadata": json.dumps(config), **FAMILY})
    return path, {QKV: np.concatenate([after[p] for p in ("to_q", "to_k", "to_v")]), OUT: after["to_out.0"]}


def in_comfyui(path, weight, module):
    """The weight after loading, by ComfyUI's rule for a DoRA by row."""
    tensors, key = read_tensors(path), f"diffusion_model.{module}"
    if f"{key}.diff" in tensors:
        return weight + tensors[f"{key}.diff"].astype(np.float64)
    down, up = (tensors[f"{key}.lora_{name}.weight"].astype(np.float64) for name in ("down", "up"))
    merged = weight + float(tensors[f"{key}.alpha"]) / len(down) * up @ down
    return tensors[f"{key}.dora_scale"] / np.linalg.norm(weight, axis=1, keepdims=True) * merged


@pytest.mark.parametrize("base", ["native", "comfyui", "diffusers"])
@pytest.mark.parametrize("way", ["rescale", "diff"])
def test_a_dora_converts_exactly_with_the_base_in_any_layout(run, tmp_path, base, way):
    path, expected = peft_dora(tmp_path)
    prefix = {"native": "", "comfyui": "model.diffusion_model."}
    place = diffusers_base(tmp_path) if base == "diffusers" else native_base(tmp_path, prefix[base])
    out = tmp_path / "out.safetensors"
    code, _, error = run("convert", path, "-o", out, "--base", place, "--dora", way)
    assert (code, error) == (0, "")
    for module, weight in weights().items():
        found = in_comfyui(out, weight.astype(np.float64), module)
        assert np.linalg.norm(found - expected[module]) < 1e-6 * np.linalg.norm(weight), module
    assert json.loads((tmp_path / "out.proof.json").read_text())["ok"]
    assert run("verify", path, out, "--base", place)[0] == 0


def test_without_the_base_a_dora_is_refused_and_the_option_named(run, tmp_path):
    path, _ = peft_dora(tmp_path)
    code, _, error = run("convert", path, "-o", tmp_path / "out.safetensors")
    assert (code, "--base" in error) == (4, True)
    assert run("convert", path, "-o", tmp_path / "out.safetensors", "--dora", "diff")[0] == 4
    assert not (tmp_path / "out.safetensors").exists()


def test_a_base_in_fp8_is_multiplied_by_its_scales(tmp_path):
    weight = weights()[OUT]
    scale = np.abs(weight).max(axis=1) / 400
    narrow = (weight / scale[:, None]).astype(ml_dtypes.float8_e4m3fn)
    for name, scales in (("weight_scale", scale), ("scale_weight", np.array(0.5))):
        tensors = {f"{OUT}.weight": narrow, f"{OUT}.{name}": scales.astype(np.float32)}
        write_tensors(tmp_path / "base.safetensors", tensors, {})
        found = BaseModel(tmp_path / "base.safetensors", "ideogram4").weight(OUT)
        expected = narrow.astype(np.float32) * scales.astype(np.float32).reshape(-1, 1)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("fault", ["missing", "part", "shape", "quantised", "folder", "family"])
def test_a_base_that_does_not_fit_is_refused_with_the_reason(tmp_path, fault):
    path, _ = peft_dora(tmp_path)
    tensors = {f"{name}.weight": weight for name, weight in weights().items()}
    if fault == "missing":
        del tensors[f"{OUT}.weight"]
    elif fault == "part":
        tensors["layers.0.attention.to_q.weight"] = tensors.pop(f"{QKV}.weight")[:H]
    elif fault == "shape":
        tensors[f"{OUT}.weight"] = random(0, H, H + 1)
    elif fault == "quantised":
        tensors[f"{OUT}.weight"] = np.zeros((H, H), np.uint8)
    base = tmp_path / "folder" / "base.safetensors"
    base.parent.mkdir()
    if fault != "folder":
        write_tensors(base, tensors, {})
    from loraport.lora.dialect import detect_dialect
    from loraport.plugins import plugins

    lora = detect_dialect(path, plugins().dialects()).read(path)
    if fault == "family":
        lora = LoraFile(None, lora.modules)
    reason = {"shape": "columns", "quantised": "quantised", "folder": "no .safetensors", "family": "--family"}
    with pytest.raises(DataError, match=reason.get(fault, "no whole weight")):
        list(with_base(lora, base.parent, "rescale").modules.values())


@pytest.mark.parametrize("shape", [(H, H), (8, 6, 3, 3)])
def test_the_whole_change_of_a_dora_by_column_is_what_lycoris_computes(tmp_path, shape):
    functional = pytest.importorskip("lycoris.functional.general")
    torch = pytest.importorskip("torch")
    name, family = (OUT, "ideogram4") if len(shape) == 2 else ("input_blocks.1.0.in_layers.2", "sd15")
    out, columns = shape[0], int(np.prod(shape[1:]))
    kernel = shape[2:]
    up, down = random(1, out, 2, *(1 for _ in kernel)), random(2, 2, shape[1], *kernel)
    scale = np.abs(random(3, shape[1])) + 1
    weight = random(4, *shape)
    module = LoraModule(name, LowRank(down=down, up=up), 0.5, ColumnScale(scale, len(shape)))
    write_tensors(tmp_path / "base.safetensors", {f"{name}.weight": weight}, {})
    lora = LoraFile(family, {name: module})
    whole = with_base(lora, tmp_path / "base.safetensors", "diff").modules[name]
    merged = weight + 0.5 * (up.reshape(out, 2) @ down.reshape(2, columns)).reshape(shape)
    trained = torch.from_numpy(scale.reshape(1, -1, *(1 for _ in kernel)))
    expected = functional.weight_decompose(torch.from_numpy(merged), trained, 1, False).numpy() - weight
    np.testing.assert_allclose(whole.factors.diff, expected, atol=1e-5)
    kept = with_base(lora, tmp_path / "base.safetensors", "rescale")
    ComfyUI().write(kept, tmp_path / "comfy.safetensors", None, {})
    assert prove(lora, ComfyUI().read(tmp_path / "comfy.safetensors")).ok


def test_doras_by_column_on_q_k_and_v_become_one_whole_change(tmp_path, run):
    functional = pytest.importorskip("lycoris.functional.general")
    torch = pytest.importorskip("torch")
    base, tensors, expected = native_base(tmp_path), {}, []
    for number, (part, weight) in enumerate(zip("qkv", np.split(weights()[QKV], 3), strict=True)):
        key = f"lycoris_layers_0_attention_to_{part}"
        up, down, scale = random(5 + number, H, 2), random(8 + number, 2, H), np.abs(random(11 + number, 1, H)) + 1
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.dora_scale": scale}
        tensors[f"{key}.alpha"] = np.array(2, np.float32)
        merged = torch.from_numpy(weight + up @ down)
        expected.append(functional.weight_decompose(merged, torch.from_numpy(scale), 1, False).numpy() - weight)
    path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    write_tensors(path, tensors, FAMILY)
    for arguments in ((), ("--base", base)):
        code, _, err = run("convert", path, "-o", out, *arguments)
        assert (code, "--base MODEL --dora diff" in err) == (4, True)
    assert run("convert", path, "-o", out, "--base", base, "--dora", "diff")[0] == 0
    found = read_tensors(out)[f"diffusion_model.{QKV}.diff"]
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-5)
    assert run("verify", path, out, "--base", base)[0] == 0
    assert run("verify", path, out)[0] != 0
