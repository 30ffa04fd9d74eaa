import json

import ml_dtypes
import numpy as np
import pytest

from loraport.lora.storage import read_tensors, write_tensors

QKV = "layers.0.attention.qkv"
KEY = f"diffusion_model.{QKV}"


def change(path, module=QKV):
    """What ComfyUI adds to the weight, in fp64 and from its definition."""
    tensors = read_tensors(path)
    key = f"diffusion_model.{module}"
    up, down = (tensors[f"{key}.lora_{end}.weight"].astype(np.float64) for end in ("up", "down"))
    return float(tensors[f"{key}.alpha"]) / len(down) * (up @ down)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_merged_change_is_the_sum_of_strength_times_change(run, comfy, tmp_path, dtype):
    a, b = comfy("a.safetensors", rank=4, dtype=dtype), comfy("b.safetensors", seed=1, rank=3, alpha=5.0, dtype=dtype)
    out = tmp_path / "out.safetensors"
    code, text, error = run("merge", f"{a}:0.7", f"{b}:-0.35", "-o", out, "--json")
    assert code == 0, error
    assert json.loads(text)["ok"]
    expected = 0.7 * change(a) - 0.35 * change(b)
    assert np.linalg.norm(change(out) - expected) / np.linalg.norm(expected) < (1e-6 if dtype == "fp32" else 8e-3)
    tensors = read_tensors(out)
    assert tensors[f"{KEY}.lora_down.weight"].shape == (7, 32)
    stored = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16}[dtype]
    assert tensors[f"{KEY}.lora_up.weight"].dtype == stored


def test_a_module_of_one_file_keeps_its_factors_and_no_strength_means_one(run, comfy, tmp_path):
    a = comfy("a.safetensors")
    b = comfy(
        "b.safetensors", seed=1, **{f"{KEY}.{end}": None for end in ("lora_up.weight", "lora_down.weight", "alpha")}
    )
    out = tmp_path / "out.safetensors"
    assert run("merge", a, f"{b}:0.5", "-o", out)[0] == 0
    np.testing.assert_array_equal(change(out), change(a))
    other = "layers.0.attention.o"
    np.testing.assert_allclose(change(out, other), change(a, other) + 0.5 * change(b, other), atol=2e-3)


def test_the_dtypes_of_several_files_meet_in_fp32(run, comfy, tmp_path):
    a, b = comfy("a.safetensors"), comfy("b.safetensors", seed=1, dtype="fp16")
    assert run("merge", a, b, "-o", tmp_path / "out.safetensors")[0] == 0
    assert read_tensors(tmp_path / "out.safetensors")[f"{KEY}.lora_up.weight"].dtype == np.float32


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({f"{KEY}.dora_scale": np.ones((96, 1), np.float32)}, "is a DoRA"),
        (
            {
                f"{KEY}.lora_up.weight": None,
                f"{KEY}.lora_down.weight": None,
                f"{KEY}.lokr_w1": np.ones((4, 4), np.float32),
                f"{KEY}.lokr_w2": np.ones((24, 8), np.float32),
            },
            "cannot be added",
        ),
        ({f"{KEY}.lora_down.weight": np.ones((4, 31), np.float32)}, "different sizes"),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused_and_nothing_is_written(run, comfy, tmp_path, changed, reason):
    out = tmp_path / "out.safetensors"
    code, _, error = run("merge", comfy("a.safetensors"), comfy("b.safetensors", seed=1, **changed), "-o", out)
    assert (code, reason in error, out.exists()) == (4, True, False)


def test_what_was_typed_wrong_is_told(run, comfy, tmp_path):
    a, b, out = comfy("a.safetensors"), comfy("b.safetensors", seed=1), tmp_path / "out.safetensors"
    assert run("merge", a, "-o", out)[0] == 4
    for strength in ("much", "nan", ""):
        code, _, error = run("merge", a, f"{b}:{strength}", "-o", out)
        assert (code, "strength" in error) == (4, True)
    assert run("merge", a, b, "-o", a, "--overwrite")[0] == 4
    odd = tmp_path / "a:0.5.safetensors"
    odd.write_bytes(b.read_bytes())
    assert run("merge", a, odd, "-o", out)[0] == 0


def test_loras_of_different_models_are_refused(run, comfy, tmp_path):
    flux = {}
    for name in ("single_blocks.0.linear1", "single_blocks.0.linear2"):
        flux[f"diffusion_model.{name}.lora_down.weight"] = np.ones((2, 3072), np.float32)
        flux[f"diffusion_model.{name}.lora_up.weight"] = np.ones((21504, 2), np.float32)
    write_tensors(tmp_path / "flux.safetensors", flux, {})
    code, _, error = run("merge", comfy(), tmp_path / "flux.safetensors", "-o", tmp_path / "out.safetensors")
    assert (code, "different models" in error) == (4, True)


def test_whole_changes_biases_and_norms_are_added(run, tmp_path):
    key, shapes = "diffusion_model.layers.0", {"attention.o.diff": (32, 32), "ffn_norm1.diff": (32,)}
    shapes["adaln_modulation.diff_b"] = (128,)
    rng, files = np.random.default_rng(0), []
    for number in range(2):
        files.append({f"{key}.{name}": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
        write_tensors(tmp_path / f"{number}.safetensors", files[-1], {"loraport.family": "ideogram4"})
    out = tmp_path / "sum.safetensors"
    assert run("merge", f"{tmp_path}/0.safetensors:0.5", f"{tmp_path}/1.safetensors:2", "-o", out)[0] == 0
    found = read_tensors(out)
    assert set(found) == set(files[0])
    for name, array in found.items():
        np.testing.assert_allclose(array, 0.5 * files[0][name] + 2 * files[1][name], rtol=1e-6)


def test_an_oft_is_merged_at_its_own_strength_alone(run, tmp_path, comfy):
    blocks = {"diffusion_model.layers.1.attention.o.oft_blocks": np.ones((8, 4, 4), np.float32)}
    write_tensors(tmp_path / "oft.safetensors", blocks, {"loraport.family": "ideogram4"})
    code, _, err = run("merge", f"{tmp_path}/oft.safetensors:0.5", comfy(), "-o", tmp_path / "sum.safetensors")
    assert (code, "(OFT) can be kept at no other strength" in err) == (4, True)
    assert run("merge", tmp_path / "oft.safetensors", comfy(), "-o", tmp_path / "sum.safetensors")[0] == 0
