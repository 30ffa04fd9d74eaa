import json

import numpy as np
import pytest

from loraport.lora.storage import read_tensors, write_tensors

QKV = "layers.0.attention.qkv"
KEY = f"diffusion_model.{QKV}"


def change(path):
    tensors = read_tensors(path)
    up, down = (tensors[f"{KEY}.lora_{end}.weight"].astype(np.float64) for end in ("up", "down"))
    return float(tensors[f"{KEY}.alpha"]) / len(down) * (up @ down)


def relative(path, other):
    return np.linalg.norm(change(path) - change(other)) / np.linalg.norm(change(path))


def test_the_error_is_that_of_the_best_change_of_the_rank_and_it_is_told(run, comfy, tmp_path):
    path, out = comfy(rank=8, dtype="fp32"), tmp_path / "out.safetensors"
    code, text, error = run("resize", path, "--rank", 3, "-o", out, "--json")
    assert code == 0, error
    told = json.loads(text)
    sizes = np.linalg.svd(change(path), compute_uv=False)
    best = np.linalg.norm(sizes[3:]) / np.linalg.norm(sizes)
    (row,) = (each for each in told["modules"] if each["name"] == QKV)
    assert row["difference"] == pytest.approx(best, rel=1e-4)
    assert relative(path, out) == pytest.approx(best, rel=1e-4)
    assert read_tensors(out)[f"{KEY}.lora_down.weight"].shape == (3, 32)
    assert (
        min(each["difference"] for each in told["modules"])
        < told["total"]
        < max(each["difference"] for each in told["modules"])
    )
    assert len(told["approximated"]) == 3


def test_a_lora_of_no_higher_rank_is_left_as_it_is(run, comfy, tmp_path):
    path, out = comfy(rank=4), tmp_path / "out.safetensors"
    assert run("resize", path, "--rank", 4, "-o", out)[0] == 0
    assert read_tensors(out)[f"{KEY}.lora_up.weight"].tobytes() == read_tensors(path)[f"{KEY}.lora_up.weight"].tobytes()


def test_a_rank_that_loses_nothing_loses_only_the_rounding(run, comfy, tmp_path):
    path, out = comfy(rank=4), tmp_path / "wide.safetensors"
    assert run("merge", path, path, "-o", out)[0] == 0  # rank 8, of which 4 are needed
    code, text, _ = run("resize", out, "--rank", 4, "-o", tmp_path / "out.safetensors", "--json")
    assert (code, json.loads(text)["approximated"]) == (0, [])


def test_a_kronecker_product_becomes_a_lora(run, comfy, tmp_path):
    rng = np.random.default_rng(0)
    changed = {f"{KEY}.lora_up.weight": None, f"{KEY}.lora_down.weight": None, f"{KEY}.alpha": None}
    w1, w2 = rng.random((4, 4)).astype(np.float32), rng.random((24, 8)).astype(np.float32)
    path = comfy(dtype="fp32", **changed, **{f"{KEY}.lokr_w1": w1, f"{KEY}.lokr_w2": w2})
    assert run("resize", path, "--rank", 32, "-o", tmp_path / "out.safetensors")[0] == 0
    np.testing.assert_allclose(change(tmp_path / "out.safetensors"), np.kron(w1, w2), atol=1e-4)


def test_a_dora_is_refused(run, comfy, tmp_path):
    path = comfy(**{f"{KEY}.dora_scale": np.ones((96, 1), np.float32)})
    code, _, error = run("resize", path, "--rank", 2, "-o", tmp_path / "out.safetensors")
    assert (code, "DoRA" in error, (tmp_path / "out.safetensors").exists()) == (4, True, False)


def test_a_convolution_keeps_its_kernel(run, tmp_path):
    rng = np.random.default_rng(1)
    key = "diffusion_model.x_embedder"
    tensors = {
        f"{key}.lora_down.weight": rng.random((6, 8, 3, 3)).astype(np.float32),
        f"{key}.lora_up.weight": rng.random((16, 6, 1, 1)).astype(np.float32),
        f"{key}.alpha": np.array(6.0, np.float32),
    }
    write_tensors(tmp_path / "conv.safetensors", tensors, {})
    code, _, error = run("resize", tmp_path / "conv.safetensors", "--rank", 2, "-o", tmp_path / "out.safetensors")
    assert code == 0, error
    back = read_tensors(tmp_path / "out.safetensors")
    assert back[f"{key}.lora_down.weight"].shape == (2, 8, 3, 3)
    assert back[f"{key}.lora_up.weight"].shape == (16, 2, 1, 1)


def test_norms_and_biases_stay_as_they_are(run, tmp_path, comfy):
    key = "diffusion_model.layers.0"
    vectors = {
        f"{key}.ffn_norm1.diff": np.ones(32, np.float32),
        f"{key}.adaln_modulation.diff_b": np.ones(8, np.float32),
    }
    path, out = comfy(), tmp_path / "small.safetensors"
    write_tensors(path, {**read_tensors(path), **vectors}, {"loraport.family": "ideogram4"})
    assert run("resize", path, "--rank", 2, "-o", out)[0] == 0
    found = read_tensors(out)
    assert all(found[name].tobytes() == array.tobytes() for name, array in vectors.items())
    assert found.shapes["diffusion_model.layers.0.attention.o.lora_down.weight"] == (2, 32)
