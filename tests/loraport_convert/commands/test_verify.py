import json

import pytest

from loraport.lora.storage import read_tensors, write_tensors

QKV = "diffusion_model.layers.0.attention.qkv"


def test_the_same_adapter_in_two_dialects_is_the_same(run, peft, comfy):
    code, out, _ = run("verify", peft(), comfy())
    assert (code, "same adapter: 3 modules" in out) == (0, True)


def test_a_rounded_copy_is_the_same_whichever_is_named_first(run, comfy, tmp_path):
    wide, narrow = comfy(dtype="fp32"), tmp_path / "narrow.safetensors"
    assert run("convert", wide, "-o", narrow, "--dtype", "bf16")[0] == 0
    assert run("verify", wide, narrow)[0] == run("verify", narrow, wide)[0] == 0


@pytest.mark.parametrize("fault", ["alpha", "seed", "missing"])
def test_another_adapter_ends_with_its_own_code_and_says_what_differs(run, comfy, fault):
    changed = {"alpha": {"alpha": 4.0}, "seed": {"seed": 1}, "missing": {}}[fault]
    if fault == "missing":
        changed = {f"{QKV}.{end}": None for end in ("lora_up.weight", "lora_down.weight", "alpha")}
    code, out, error = run("verify", comfy(), comfy("other.safetensors", **changed))
    assert (code, "not the same adapter" in error) == (8, True)
    assert "layers.0.attention.qkv" in out


def test_the_verdict_for_machines_names_every_module(run, comfy):
    path = comfy()
    code, out, _ = run("verify", path, comfy("other.safetensors", seed=1), "--json")
    told = json.loads(out)
    assert (code, told["ok"], len(told["modules"])) == (8, False, 3)
    assert json.loads(run("verify", path, path, "--json")[1])["ok"]


def test_a_damaged_file_is_not_a_different_one(run, comfy, tmp_path):
    whole = comfy()
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-10])
    assert run("verify", whole, tmp_path / "cut.safetensors")[0] == 4


def test_swapped_q_and_k_are_caught(run, comfy, tmp_path):
    path = comfy()
    tensors = dict(read_tensors(path))
    up = tensors[f"{QKV}.lora_up.weight"]
    tensors[f"{QKV}.lora_up.weight"] = up.reshape(3, 32, -1)[[1, 0, 2]].reshape(up.shape)
    write_tensors(tmp_path / "swapped.safetensors", tensors, {})
    assert run("verify", path, tmp_path / "swapped.safetensors")[0] == 8
