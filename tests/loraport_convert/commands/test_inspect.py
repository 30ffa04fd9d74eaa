import json
import os
import subprocess
import sys

import numpy as np
import pytest
from timing import least_seconds

from loraport.lora.storage import write_tensors

QKV = "diffusion_model.layers.0.attention.qkv"


def told(run, path):
    code, out, error = run("inspect", path, "--json")
    assert code == 0, error
    return json.loads(out)


def test_a_file_for_comfyui_is_explained_and_found_complete(run, comfy):
    path = comfy(metadata={"modelspec.title": "Buggy"})
    code, out, _ = run("inspect", path)
    assert code == 0
    for text in ("3 modules", "comfyui (100%)", "ideogram4", "4 (3)", "0.5 (3)", "alpha tensor", "BF16", "Buggy"):
        assert text in out
    assert "ComfyUI loads all of it at the right strength." in out
    facts = told(run, path)
    assert facts["modules"][0] | {"name": ""} == {
        "name": "",
        "kind": "lora",
        "rows": 32,
        "columns": 32,
        "rank": 4,
        "alpha": 2.0,
        "scale": 0.5,
        "scale_from": "alpha tensor",
        "dtype": "BF16",
        "dora": False,
    }


def test_a_scale_that_only_peft_knows_is_told_with_what_comfyui_would_do(run, peft):
    facts = told(run, peft())
    assert {(module["scale"], module["scale_from"]) for module in facts["modules"]} == {(0.5, "metadata")}
    assert facts["comfyui"]["loads"] == 0
    assert len(facts["comfyui"]["skips"]) == 3


def test_a_file_that_does_not_tell_its_scale_says_so(run, bare, comfy):
    facts = told(run, bare())
    assert {(module["scale"], module["scale_from"]) for module in facts["modules"]} == {(None, "not in the file")}
    assert "no alpha" in told(run, comfy(alpha=None))["comfyui"]["problems"][0]


@pytest.mark.parametrize(
    ("changed", "problem", "aborts"),
    [
        ({f"{QKV}.lora_down.weight": None}, "half of a pair", True),
        ({f"{QKV}.alpha": np.ones(2, np.float32)}, "more than one number", True),
        ({f"{QKV}.dora_scale": np.ones(96, np.float32)}, "one axis", False),
        ({f"{QKV}.lora_magnitude_vector": np.ones(96, np.float32)}, "magnitude is not read", False),
    ],
)
def test_what_goes_wrong_in_comfyui_is_told(run, comfy, changed, problem, aborts):
    verdict = told(run, comfy(**changed))["comfyui"]
    assert any(problem in each for each in verdict["problems"])
    assert verdict["aborts"] is aborts
    assert verdict["loads"] == (0 if aborts else 3)


def test_diffusers_names_load_where_comfyui_takes_them_and_not_where_it_does_not(run, tmp_path):
    def lora(*modules, prefix):
        tensors = {}
        for name, out, columns in modules:
            tensors[f"{prefix}{name}.lora_down.weight"] = np.ones((2, columns), np.float32)
            tensors[f"{prefix}{name}.lora_up.weight"] = np.ones((out, 2), np.float32)
            tensors[f"{prefix}{name}.alpha"] = np.array(2.0, np.float32)
        write_tensors(tmp_path / "x.safetensors", tensors, {})
        return told(run, tmp_path / "x.safetensors")

    flux = [(f"single_transformer_blocks.0.attn.to_{x}", 3072, 3072) for x in "qkv"]
    assert lora(*flux, prefix="transformer.")["comfyui"]["loads"] == 3
    assert lora(*flux, prefix="diffusion_model.")["comfyui"]["loads"] == 0
    ideogram = [(f"layers.0.attention.to_{x}", 4608, 4608) for x in "qkv"]
    split = lora(*ideogram, prefix="transformer.")
    assert (split["family"], split["comfyui"]["loads"], len(split["comfyui"]["skips"])) == ("ideogram4", 0, 3)


def test_what_is_no_lora_is_refused(run, tmp_path):
    write_tensors(tmp_path / "vae.safetensors", {"decoder.conv.weight": np.ones((2, 2), np.float32)}, {})
    code, _, error = run("inspect", tmp_path / "vae.safetensors")
    assert (code, "holds no LoRA" in error) == (4, True)


def measured(path):
    """(what `loraport inspect` prints, seconds of the processor, most memory in kB), in a process of its own."""
    code = "import sys; sys.argv = ['loraport', 'inspect', sys.argv[1]]; from loraport.cli.main import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    out = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return out, usage.ru_utime + usage.ru_stime, usage.ru_maxrss


def test_only_the_header_is_read_of_a_file_of_any_size(comfy, tmp_path):
    """A sparse file of 8 GiB costs no more than a small one: neither memory nor time of the processor."""
    path = tmp_path / "big.safetensors"
    rows, header, offset = 1 << 20, {}, 0
    for n in range(8):
        for end, shape in (("lora_down", (64, rows)), ("lora_up", (rows * 7, 64))):
            size = 2 * shape[0] * shape[1]
            key = f"diffusion_model.layers.{n}.attention.o.{end}.weight"
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    out, seconds, memory = measured(path)
    _, small_seconds, small_memory = measured(comfy())
    assert "8 modules" in out
    assert memory < small_memory + 20_000
    assert seconds < 1.5 * small_seconds + 0.2


def test_a_file_with_every_module_of_a_large_model_is_explained_at_once(tmp_path):
    """The numbers of FLUX.1, of 2 GB; they are never read, so they need not be there."""
    path, header, offset = tmp_path / "flux.safetensors", {}, 0
    for block in range(57):
        single = block >= 19
        stack = f"single_transformer_blocks.{block - 19}" if single else f"transformer_blocks.{block}"
        names = ["to_q", "to_k", "to_v"] if single else ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out"]
        for name in names:
            for end, shape in (("A", (1000, 3072)), ("B", (3072, 1000))):
                size = 2 * shape[0] * shape[1]
                key = f"transformer.{stack}.attn.{name}.lora_{end}.weight"
                header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
                offset += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    assert path.stat().st_size > 2e9
    assert least_seconds(["inspect", str(path)], runs=5) < (0.6 if os.environ.get("CI") else 0.3)
