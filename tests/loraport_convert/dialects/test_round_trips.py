"""From any dialect to ComfyUI's form and back: the same change of the same modules, at any rank, alpha and dtype."""

import json

import ml_dtypes
import numpy as np
import pytest
import small_loras
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_loras import MODELS, assert_same_changes, native_changes, shapes

from loraport.lora.dialect import detect_dialect
from loraport.lora.proof import prove
from loraport.lora.storage import read_tensors, write_tensors
from loraport.plugins import plugins
from loraport_convert.codec.decode import FAMILY_KEY

pytest.importorskip("diffusers")
DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
WRITABLE = ["comfyui", "diffusers", "peft", "kohya", "ai-toolkit"]


@pytest.fixture(scope="module")
def dialects():
    return plugins().dialects()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loras")


def trained(model, names, seed, ranks=(2,), alphas=(1.0,), dtype=np.float32):
    """{diffusers module: (down, up, alpha)}, and ΔW by native module."""
    rng = np.random.default_rng(seed)
    factors, changes = {}, {}
    for name in names:
        rows, columns = shapes(model)[name]
        rank, alpha = int(rng.choice(ranks)), float(rng.choice(alphas))
        down, up = (rng.standard_normal(size).astype(dtype) for size in ((rank, columns), (rows, rank)))
        factors[name] = (down, up, alpha)
        changes[name] = alpha / rank * up.astype(np.float64) @ down.astype(np.float64)
    return factors, native_changes(model, changes)


def keyed(factors, prefix="transformer.", flat=False, halves=("lora_A.weight", "lora_B.weight"), alpha=True):
    tensors = {}
    for name, (down, up, strength) in factors.items():
        key = prefix + (name.replace(".", "_") if flat else name)
        tensors |= {f"{key}.{halves[0]}": down, f"{key}.{halves[1]}": up}
        if alpha:
            tensors[f"{key}.alpha"] = np.array(strength, np.float32)
    return tensors


KOHYA = ("lora_down.weight", "lora_up.weight")
STYLES = {
    "diffusers": {},
    "kohya": {"prefix": "lora_unet_", "flat": True, "halves": KOHYA},
    "lycoris": {"prefix": "lycoris_", "flat": True, "halves": KOHYA},
    "onetrainer": {"prefix": "lora_transformer_", "flat": True, "halves": KOHYA},
    "peft": {"prefix": "base_model.model."},
    "doubled": {"prefix": "transformer.base_model.model.transformer."},
    "simpletuner-comfyui": {"prefix": "diffusion_model."},
    "diffsynth": {"prefix": "", "halves": ("lora_A.default.weight", "lora_B.default.weight")},
    "old": {"prefix": "transformer.", "halves": ("lora.down.weight", "lora.up.weight")},
    "linear-layer": {
        "prefix": "transformer.",
        "halves": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    },
    "bare": {"prefix": "", "halves": ("lora_A.weight", "lora_B.weight")},
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("model", MODELS)
def test_every_module_of_every_family_arrives_in_comfyuis_names_with_its_change(dialects, folder, model, style):
    factors, expected = trained(model, shapes(model), seed=1, ranks=(1, 3), alphas=(1.0, 0.5, 3.0))
    path = folder / "x.safetensors"
    write_tensors(path, keyed(factors, **STYLES[style]), {})
    found = detect_dialect(path, dialects).read(path)
    assert found.family == small_loras.models.family_of(model)
    assert_same_changes(found, expected)
    dialects["comfyui"].write(found, folder / "comfy.safetensors", None, {})
    written = dialects["comfyui"].read(folder / "comfy.safetensors")
    assert prove(found, written).ok
    assert_same_changes(written, expected)
    assert detect_dialect(folder / "comfy.safetensors", dialects).name == "comfyui"


@pytest.mark.parametrize("target", WRITABLE)
@pytest.mark.parametrize("model", MODELS)
@given(st.data())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lora_written_in_any_dialect_is_detected_and_means_the_same(dialects, folder, model, target, data):
    names = data.draw(st.lists(st.sampled_from(sorted(shapes(model))), min_size=1, max_size=8, unique=True))
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    ranks, alphas = data.draw(st.sampled_from([(2,), (1, 4)])), data.draw(st.sampled_from([(2.0,), (1.0, 0.3, 8.0)]))
    factors, expected = trained(model, names, data.draw(st.integers(0, 99)), ranks, alphas, DTYPES[dtype])
    path, family = folder / "y.safetensors", {FAMILY_KEY: small_loras.models.family_of(model)}
    write_tensors(path, keyed(factors), family)
    source = detect_dialect(path, dialects).read(path)
    assert_same_changes(source, expected)
    (folder / target).mkdir(exist_ok=True)
    written = folder / target / "z.safetensors"
    dialects[target].write(source, written, None, family)
    dialect = detect_dialect(written, dialects)
    if target != "ai-toolkit":  # its native names without alpha are also ComfyUI's
        assert dialect.name == target
    assert_same_changes(dialect.read(written), expected)


def test_a_fused_module_split_again_has_the_very_tensors_it_came_from(dialects, folder):
    factors, _ = trained("flux1", shapes("flux1"), seed=3, ranks=(2, 3), alphas=(2.0, 6.0))
    path = folder / "x.safetensors"
    write_tensors(path, keyed(factors, alpha=True), {})
    source = dialects["diffusers"].read(path)
    dialects["comfyui"].write(source, folder / "comfy.safetensors", None, {})
    dialects["diffusers"].write(dialects["comfyui"].read(folder / "comfy.safetensors"), path, None, {})
    back = read_tensors(path)
    for name, (down, up, _) in factors.items():
        found_down, found_up = back[f"transformer.{name}.lora_A.weight"], back[f"transformer.{name}.lora_B.weight"]
        if down.shape == found_down.shape and np.array_equal(down, found_down):
            np.testing.assert_allclose(found_up / up, np.full_like(up, (found_up / up).flat[0]), rtol=1e-5)
        else:
            assert name == "norm_out.linear", name
    config = json.loads(back.metadata["lora_adapter_metadata"])
    assert config["transformer.r"] in (2, 3)
    assert len(back) == 2 * len(factors)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), ml_dtypes.float8_e4m3fn])
def test_factors_keep_their_dtype_and_bits_where_no_scale_goes_into_them(dialects, folder, dtype):
    factors, _ = trained("ideogram4", ["layers.0.attention.to_q", "layers.0.feed_forward.w1"], 4, (4,), (4.0,), dtype)
    write_tensors(folder / "x.safetensors", keyed(factors), {FAMILY_KEY: "ideogram4"})
    source = dialects["diffusers"].read(folder / "x.safetensors")
    dialects["comfyui"].write(source, folder / "comfy.safetensors", None, {})
    written = read_tensors(folder / "comfy.safetensors")
    key = "diffusion_model.layers.0.feed_forward.w1"
    assert written[f"{key}.lora_down.weight"].tobytes() == factors["layers.0.feed_forward.w1"][0].tobytes()
    fused = written["diffusion_model.layers.0.attention.qkv.lora_up.weight"]
    assert fused.dtype == dtype
    assert fused[: len(fused) // 3].tobytes() == factors["layers.0.attention.to_q"][1].tobytes()
    assert not np.any(fused[len(fused) // 3 :].astype(np.float32))


def test_one_a_for_q_k_and_v_keeps_the_rank_and_three_add_up(dialects, folder):
    names = [f"layers.0.attention.to_{each}" for each in "qkv"]
    factors, _ = trained("ideogram4", names, 5, (4,), (4.0,))
    down = factors[names[0]][0]
    for shared, rank in ((True, 4), (False, 12)):
        tensors = keyed({name: (down if shared else own, up, alpha) for name, (own, up, alpha) in factors.items()})
        write_tensors(folder / "x.safetensors", tensors, {FAMILY_KEY: "ideogram4"})
        module = dialects["diffusers"].read(folder / "x.safetensors").modules["layers.0.attention.qkv"]
        assert module.factors.rank == rank
        assert module.scale == 1.0
