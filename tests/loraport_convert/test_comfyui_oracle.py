"""What ComfyUI itself does with the files we write. Needs COMFY_SRC, a ComfyUI checkout, and torch."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from loraport.families import matches
from loraport.ideogram4 import IDEOGRAM4
from loraport.lora.canonical import LoHa, LoKr, LoraFile, LoraModule, LowRank, RowScale
from loraport.lora.storage import read_tensors, write_tensors
from loraport_convert.comfyui import ComfyUI

pytestmark = pytest.mark.skipif(
    "COMFY_SRC" not in os.environ or importlib.util.find_spec("torch") is None,
    reason="COMFY_SRC names no ComfyUI checkout, or torch is not installed",
)

HIDDEN, FFN, ADALN = 32, 48, 16
SHAPES = {
    f"layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "attention.qkv": (3 * HIDDEN, HIDDEN),
        "attention.o": (HIDDEN, HIDDEN),
        "feed_forward.w1": (FFN, HIDDEN),
        "feed_forward.w2": (HIDDEN, FFN),
        "feed_forward.w3": (FFN, HIDDEN),
        "adaln_modulation": (4 * HIDDEN, ADALN),
    }.items()
}
DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}
KINDS = ["lora", "loha", "lokr", "lokr-w1", "lokr-w2", "lokr-both"]
CASES = [(kind, dtype, dora) for kind in KINDS for dtype in DTYPES for dora in (False, True)]


def seeded(*parts):
    return np.random.default_rng(sum(map(ord, "".join(map(str, parts)))))


def base_weights():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def factors_of(kind, shape, rng, dtype, rank=3):
    def random(*size):
        return (0.2 * rng.standard_normal(size)).astype(dtype)

    out, columns = shape
    small, large = (4, 2), (out // 4, columns // 2)
    if kind == "lora":
        return LowRank(down=random(rank, columns), up=random(out, rank))
    if kind == "loha":
        return LoHa(random(out, rank), random(rank, columns), random(out, rank), random(rank, columns))
    w1 = {"w1": random(*small)}
    if kind in ("lokr-w2", "lokr-both"):
        w1 = {"w1_a": random(small[0], rank), "w1_b": random(rank, small[1])}
    w2 = {"w2": random(*large)}
    if kind in ("lokr-w1", "lokr-both"):
        w2 = {"w2_a": random(large[0], rank), "w2_b": random(rank, large[1])}
    return LoKr(**w1, **w2)


def change_of(factors):
    """The product in fp64, from the definitions and not from the code under test."""
    f = {name: array.astype(np.float64) for name, array in factors.arrays().items()}
    if isinstance(factors, LowRank):
        return f["up"] @ f["down"]
    if isinstance(factors, LoHa):
        return (f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"])
    w1 = f["w1"] if "w1" in f else f["w1_a"] @ f["w1_b"]
    w2 = f["w2"] if "w2" in f else f["w2_a"] @ f["w2_b"]
    return np.kron(w1, w2)


def trained(kind, dtype, dora):
    """A LoRA on every module of the tiny model, and the weights it should leave, in fp64."""
    rng = seeded(kind, dtype, dora)
    modules, expected = {}, {}
    for index, (name, weight) in enumerate(base_weights().items()):
        factors, scale = factors_of(kind, weight.shape, rng, DTYPES[dtype]), (1.0, 0.25, 1.7)[index % 3]
        merged = weight.astype(np.float64) + scale * change_of(factors)
        part = None
        if dora:
            norms = [np.linalg.norm(each.astype(np.float64), axis=1) for each in (weight, merged)]
            magnitude = norms[0] * (1 + 0.1 * rng.standard_normal(len(weight)))
            part = RowScale(magnitude, *norms)
            merged = magnitude[:, None] * merged / norms[1][:, None]
        modules[name] = LoraModule(name, factors, scale, part)
        expected[name] = merged
    return LoraFile("ideogram4", modules), expected


def odd_files():
    """Files other tools write, whose meaning under ComfyUI's rules `ComfyUI.read` claims to know."""
    name, shape = "layers.0.attention.o", SHAPES["layers.0.attention.o"]
    key = f"diffusion_model.{name}"
    low, other = (factors_of("lora", shape, seeded("odd", n), np.float32) for n in (1, 2))
    kron = factors_of("lokr", shape, seeded("odd", 3), np.float32)
    pair = {f"{key}.lora_A.weight": low.down, f"{key}.lora_B.weight": low.up}
    kohya = {f"{key}.lora_down.weight": other.down, f"{key}.lora_up.weight": other.up}
    alpha = {f"{key}.alpha": np.array(7.0, np.float32)}
    return {
        "no-alpha": pair,
        "ab-with-alpha": {**pair, **alpha},
        "peft-default": {k.replace(".weight", ".default.weight"): array for k, array in pair.items()},
        "two-pairs": {**pair, **kohya, **alpha},
        "lokr-alpha-ignored": {
            f"{key}.lokr_w1": kron.w1,
            f"{key}.lokr_w2": kron.w2,
            f"{key}.alpha": np.array(9999999999.0, np.float32),
        },
        "lora-and-lokr": {**pair, f"{key}.lokr_w1": kron.w1, f"{key}.lokr_w2": kron.w2},
        "magnitude-vector": {**pair, f"{key}.lora_magnitude_vector": np.ones(shape[0], np.float32)},
        "diffusers-prefix": {**pair, "transformer.layers.1.attention.o.lora_A.weight": low.down},
    }


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """The folder that one ComfyUI process filled: patched weights, its warnings, the full model's shapes."""
    folder = tmp_path_factory.mktemp("comfy")
    for name in ("loras", "patched"):
        (folder / name).mkdir()
    weights = {f"diffusion_model.{name}.weight": array for name, array in base_weights().items()}
    write_tensors(folder / "base.safetensors", weights, {})
    for kind, dtype, dora in CASES:
        source, _ = trained(kind, dtype, dora)
        ComfyUI().write(source, folder / "loras" / f"{kind}-{dtype}-{dora}.safetensors", dtype, {})
    for name, tensors in odd_files().items():
        write_tensors(folder / "loras" / f"{name}.safetensors", tensors, {})
    child = Path(__file__).with_name("comfyui_child.py")
    done = subprocess.run(
        [sys.executable, str(child), os.environ["COMFY_SRC"], str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def assert_weights(folder, name, expected):
    """Every weight of the patched model is as expected, and those not named are as before."""
    before = read_tensors(folder / "patched" / "none.safetensors")
    after = read_tensors(folder / "patched" / f"{name}.safetensors")
    for key in before:
        module = key.removeprefix("diffusion_model.").removesuffix(".weight")
        if module in expected:
            distance = np.linalg.norm(after[key] - expected[module]) / np.linalg.norm(expected[module])
            assert distance < 5e-7, (key, distance)
        else:
            np.testing.assert_array_equal(after[key], before[key], err_msg=key)


def warnings(folder, name):
    return json.loads((folder / "report.json").read_text())[name]


@pytest.mark.parametrize(("kind", "dtype", "dora"), CASES)
def test_comfyui_patches_exactly_what_was_trained(comfy, kind, dtype, dora):
    name = f"{kind}-{dtype}-{dora}"
    assert warnings(comfy, name) == []
    assert_weights(comfy, name, trained(kind, dtype, dora)[1])


@pytest.mark.parametrize("name", sorted(odd_files()))
def test_a_file_is_read_to_mean_what_comfyui_makes_of_it(comfy, name):
    back = ComfyUI().read(comfy / "loras" / f"{name}.safetensors")
    base = base_weights()
    expected = {
        module.name: base[module.name] + module.scale * change_of(module.factors) for module in back.modules.values()
    }
    assert_weights(comfy, name, expected)


@pytest.mark.parametrize("name", sorted(odd_files()))
def test_the_keys_called_unread_are_those_comfyui_complains_of(comfy, name):
    unread = ComfyUI().read(comfy / "loras" / f"{name}.safetensors").unread
    complaints = {line.removeprefix("lora key not loaded: ") for line in warnings(comfy, name)}
    # Of two kinds under one name ComfyUI applies the last without a word; to us the other's keys are unread.
    silent = {key for key in unread if name == "lora-and-lokr" and ".lora_" in key}
    assert set(unread) - silent == complaints


def test_the_family_names_every_trainable_module_of_the_full_size_model(comfy):
    shapes = json.loads((comfy / "shapes.json").read_text())
    layers = {name: tuple(shape) for name, shape in shapes.items() if name.startswith("layers.")}
    assert all(matches(IDEOGRAM4.target_patterns("all"), name) for name in layers)
    assert len(layers) == 34 * 6
    assert layers["layers.33.attention.qkv"] == (13824, 4608)
