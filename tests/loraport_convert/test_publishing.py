import json
import struct
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from loraport.errors import DataError
from loraport.lora.canonical import LoKr, LoraFile, LoraModule, LowRank
from loraport.lora.stacked import Part, Stacked
from loraport.lora.storage import read_tensors, write_tensors
from loraport.plugins import plugins
from loraport_convert.comfyui import ComfyUI
from loraport_convert.publishing import PROOF_KEY, Target, publish


class Faulty(ComfyUI):
    """A writer with a defect: `fault` changes the LoRA before it is written."""

    def __init__(self, fault):
        self.fault = fault

    def write(self, lora, path, dtype, metadata):
        super().write(self.fault(lora), path, dtype, metadata)


def fused():
    """A LoRA with q, k and v in one module, block by block, and another module."""
    rng = np.random.default_rng(3)
    modules = [
        LoraModule("layers.0.attention.qkv", LowRank(down=rng.random((6, 32)), up=blocks(rng)), 0.5),
        LoraModule("layers.0.attention.o", LowRank(down=rng.random((2, 32)), up=rng.random((32, 2))), 0.5),
    ]
    narrow = [replace(each, factors=each.factors.map(lambda _, a: a.astype(np.float32))) for each in modules]
    return LoraFile("ideogram4", {each.name: each for each in narrow})


def blocks(rng):
    up = np.zeros((96, 6))
    for n in range(3):
        up[n * 32 : (n + 1) * 32, n * 2 : (n + 1) * 2] = rng.random((32, 2))
    return up


def changed(change):
    """A fault that replaces the module of q, k and v."""
    name = "layers.0.attention.qkv"
    return lambda lora: replace(lora, modules={**lora.modules, name: change(lora.modules[name])})


def with_up(rows):
    return changed(lambda module: replace(module, factors=replace(module.factors, up=module.factors.up[rows])))


Q, K, V = (np.arange(n * 32, (n + 1) * 32) for n in range(3))
FAULTS = {
    "forgotten alpha": changed(lambda module: replace(module, scale=1.0)),
    "alpha not tripled": changed(lambda module: replace(module, scale=module.scale / 3)),
    "k and q swapped": with_up(np.concatenate([K, Q, V])),
    "truncated tensor": with_up(np.arange(95)),
    "missing module": lambda lora: replace(lora, modules={n: m for n, m in lora.modules.items() if "qkv" not in n}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_writer_that_does_this_is_caught_and_leaves_no_output(tmp_path, fault):
    target = Target(tmp_path / "out.safetensors", Faulty(FAULTS[fault]))
    with pytest.raises(DataError, match=r"not written.*attention\.qkv"):
        publish(fused(), target, [])
    assert list(tmp_path.iterdir()) == []
    assert publish(fused(), replace(target, writer=ComfyUI()), []).proof.ok


def flipped(path, name):
    """Change the last bit of a tensor's last number."""
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    _, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    size = read_tensors(path)[name].dtype.itemsize
    raw[8 + length + end - size] ^= 1
    path.write_bytes(raw)


class Flipping(ComfyUI):
    """A writer, or a disk, that changes one bit of the tensor `name`."""

    def __init__(self, name):
        self.name = name

    def write(self, lora, path, dtype, metadata):
        super().write(lora, path, dtype, metadata)
        flipped(path, self.name)


def large(dtype):
    """A LoRA with so many numbers that one of them hardly counts."""
    rng = np.random.default_rng(4)
    factors = LowRank(down=rng.standard_normal((32, 768)), up=rng.standard_normal((2304, 32)))
    module = LoraModule("layers.0.attention.qkv", factors.map(lambda _, array: array.astype(dtype)), 1 / 3)
    return LoraFile("ideogram4", {module.name: module})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("end", ["lora_up.weight", "lora_down.weight"])
def test_one_flipped_bit_is_caught_where_nothing_was_to_be_rounded(tmp_path, dtype, end):
    name = f"diffusion_model.layers.0.attention.qkv.{end}"
    target = Target(tmp_path / "out.safetensors", Flipping(name))
    with pytest.raises(DataError, match=r"not written.*attention\.qkv differs"):
        publish(large(dtype), target, [])
    assert list(tmp_path.iterdir()) == []
    proof = publish(large(dtype), replace(target, writer=ComfyUI()), []).proof
    assert (proof.ok, [module.method for module in proof.modules]) == (True, ["identical bytes"])


def test_a_flipped_bit_of_alpha_is_within_what_alpha_itself_is_rounded_by(tmp_path):
    name = "diffusion_model.layers.0.attention.qkv.alpha"
    (module,) = publish(large(np.float32), Target(tmp_path / "out.safetensors", Flipping(name)), []).proof.modules
    assert 0 < module.difference < 2e-7


def test_what_is_rounded_on_purpose_may_differ_by_its_rounding_and_is_multiplied(tmp_path):
    target = Target(tmp_path / "out.safetensors", ComfyUI(), dtype="bf16")
    (module,) = publish(large(np.float32), target, []).proof.modules
    assert module.method == "products in fp64"
    assert 1e-4 < module.difference < module.tolerance


def test_the_proof_beside_the_file_says_how_each_module_was_compared(tmp_path):
    publish(large(np.float16), Target(tmp_path / "out.safetensors", ComfyUI()), [])
    (row,) = json.loads((tmp_path / "out.proof.json").read_text())["modules"]
    assert (row["method"], row["ok"], row["difference"] < 1e-7) == ("identical bytes", True, True)


def test_a_writer_that_makes_a_dora_scale_of_one_axis_is_caught(tmp_path):
    class Flat(ComfyUI):
        def write(self, lora, path, dtype, metadata):
            super().write(lora, path, dtype, metadata)
            key = "diffusion_model.layers.0.attention.o.dora_scale"
            write_tensors(path, {**read_tensors(path), key: np.ones(32, np.float32)}, metadata)

    with pytest.raises(DataError, match="dora_scale"):
        publish(fused(), Target(tmp_path / "out.safetensors", Flat()), [])
    assert list(tmp_path.iterdir()) == []


def test_a_crash_of_the_writer_leaves_the_old_output(tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("mine")

    def crash(lora):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        publish(fused(), Target(out, Faulty(crash), overwrite=True), [])
    assert [each.name for each in tmp_path.iterdir()] == [out.name]
    assert out.read_text() == "mine"


def stacked():
    """A Kronecker product on each of q, k and v, which is none of the three together."""
    rng = np.random.default_rng(5)
    parts = tuple(Part(n * 32, LoKr(w1=rng.random((4, 4)), w2=rng.random((8, 8))), 0.5) for n in range(3))
    return LoraModule("layers.0.attention.qkv", Stacked(96, parts).map(lambda _, array: array.astype(np.float32)), 1.0)


def test_a_module_that_no_format_holds_is_approximated_only_when_asked(tmp_path):
    module = stacked()
    source, out = LoraFile("ideogram4", {module.name: module}), tmp_path / "out.safetensors"
    with pytest.raises(DataError, match="--approximate"):
        publish(source, Target(out, ComfyUI()), [])
    assert list(tmp_path.iterdir()) == []
    low = publish(source, Target(out, ComfyUI(), approximate="svd", rank=8), [])
    assert low.approximated == (module.name,)
    product = module.factors.product()(0, 96)
    sizes = np.linalg.svd(product, compute_uv=False)
    best = np.linalg.norm(sizes[8:]) / np.linalg.norm(sizes)
    assert low.proof.modules[0].difference == pytest.approx(best, rel=0.01)
    assert json.loads(read_tensors(out).metadata[PROOF_KEY])["approximated"] == [module.name]
    whole = publish(source, Target(out, ComfyUI(), approximate="diff", overwrite=True), [])
    assert (whole.approximated, whole.proof.ok) == ((), True)


def test_a_convolution_that_peft_cannot_hold_is_approximated_in_its_own_shape(tmp_path):
    rng = np.random.default_rng(7)
    w1, w2 = rng.random((2, 2)).astype(np.float32), rng.random((320, 160, 3, 3)).astype(np.float32)
    module = LoraModule("input_blocks.3.0.op", LoKr(w1=w1, w2=w2), 1.0)
    source = LoraFile("sdxl", {module.name: module})
    writer = plugins().dialects()["diffusers"]
    with pytest.raises(DataError, match="--approximate svd"):
        publish(source, Target(tmp_path / "x.safetensors", writer), [])
    target = Target(tmp_path / "x.safetensors", writer, approximate="svd", rank=4)
    assert publish(source, target, []).approximated == (module.name,)
    shapes = sorted(shape for shape in read_tensors(target.path).shapes.values() if shape)
    assert shapes == [(4, 320, 3, 3), (640, 4, 1, 1)]
