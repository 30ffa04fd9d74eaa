import json

import ml_dtypes
import numpy as np
import pytest

from loraport.lora.storage import read_tensors, write_tensors
from loraport_convert.comfyui import ComfyUI

QKV = "layers.0.attention.qkv"
NATIVE = f"diffusion_model.{QKV}"


def names(folder):
    return sorted(each.name for each in folder.iterdir())


def test_a_trainers_folder_becomes_a_file_for_comfyui_with_its_proof(run, peft, factors, tmp_path):
    code, out, _ = run("convert", peft())
    assert (code, "3 modules" in out, "exact" in out) == (0, True, True)
    tensors = read_tensors(tmp_path / "adapter.comfyui.safetensors")
    down, up = factors()[QKV]
    assert tensors[f"{NATIVE}.lora_up.weight"].tobytes() == up.tobytes()
    assert tensors[f"{NATIVE}.lora_down.weight"].tobytes() == down.tobytes()
    assert float(tensors[f"{NATIVE}.alpha"]) == 2.0
    proof = json.loads((tmp_path / "adapter.comfyui.proof.json").read_text())
    assert proof["ok"]
    assert {row["difference"] for row in proof["modules"]} == {0.0}
    carried = json.loads(tensors.metadata["loraport.proof"])
    assert carried["exact"]
    assert set(carried["differences"]) == {row["name"] for row in proof["modules"]}


def test_the_scale_comes_from_the_file_then_from_the_person_and_is_never_a_silent_one(run, bare, tmp_path):
    path, out = bare(), tmp_path / "out.safetensors"
    code, _, error = run("convert", path, "-o", out)
    assert code == 4
    assert "--alpha N" in error
    assert not out.exists()
    assert run("convert", path, "-o", out, "--alpha", 2)[0] == 0
    assert float(read_tensors(out)[f"{NATIVE}.alpha"]) == 2.0
    assert run("convert", path, "-o", out, "--assume-alpha", "rank", "--overwrite")[0] == 0
    assert float(read_tensors(out)[f"{NATIVE}.alpha"]) == 4.0
    assert run("convert", path, "-o", out, "--assume-alpha", "rank", "--alpha", 1, "--overwrite")[0] == 4
    assert run("convert", path, "-o", out, "--alpha", "nan", "--overwrite")[0] == 4


def test_an_alpha_of_the_person_does_not_replace_that_of_the_file(run, comfy, tmp_path):
    code, _, notes = run("convert", comfy(), "-o", tmp_path / "out.safetensors", "--alpha", 99)
    assert code == 0
    assert "tells its scale itself" in notes
    assert float(read_tensors(tmp_path / "out.safetensors")[f"{NATIVE}.alpha"]) == 2.0


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_dtype_is_kept_unless_asked(run, comfy, tmp_path, dtype):
    kinds = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}
    path = comfy(dtype=dtype)
    assert run("convert", path, "-o", tmp_path / "kept.safetensors")[0] == 0
    assert read_tensors(tmp_path / "kept.safetensors")[f"{NATIVE}.lora_up.weight"].dtype == kinds[dtype]
    code, out, _ = run("convert", path, "-o", tmp_path / "bf16.safetensors", "--dtype", "bf16", "--json")
    assert code == 0
    assert json.loads(out)["worst"]["difference"] < 8e-3
    assert read_tensors(tmp_path / "bf16.safetensors")[f"{NATIVE}.lora_up.weight"].dtype == ml_dtypes.bfloat16


def test_a_folder_is_converted_in_one_go_and_what_fails_is_told(run, comfy, bare, tmp_path):
    for step in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / "run" / step).mkdir(parents=True)
        comfy(f"run/{step}/lora.safetensors")
    assert run("convert", tmp_path / "run", "-o", tmp_path / "out")[0] == 0
    expected = [f"checkpoint-{n}-lora.comfyui.{end}" for n in (1, 2) for end in ("proof.json", "safetensors")]
    assert names(tmp_path / "out") == expected
    bare("run/odd.safetensors")
    code, _, error = run("convert", tmp_path / "run", "-o", tmp_path / "out", "--overwrite")
    assert code == 4
    assert "1 of 3 files" in error
    assert names(tmp_path / "out") == expected


def test_outputs_of_an_earlier_go_are_not_converted_again(run, comfy, tmp_path):
    (tmp_path / "run").mkdir()
    for number in (1, 2):
        comfy(f"run/{number}.safetensors")
    for _ in range(2):
        assert run("convert", tmp_path / "run", "--overwrite")[0] == 0
    assert len(names(tmp_path / "run")) == 6


def test_two_inputs_for_one_place_are_refused_before_anything_is_written(run, comfy, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        comfy(f"{folder}/x.safetensors")
    code, _, error = run("convert", tmp_path / "a/x.safetensors", tmp_path / "b/x.safetensors", "-o", tmp_path / "out")
    assert (code, "both be written" in error) == (4, True)
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("link", ["none", "soft", "hard"])
def test_the_output_never_replaces_the_input(run, comfy, tmp_path, link):
    path = comfy()
    before = path.read_bytes()
    out = path if link == "none" else tmp_path / "link.safetensors"
    if link == "soft":
        out.symlink_to(path)
    elif link == "hard":
        out.hardlink_to(path)
    code, _, error = run("convert", path, "-o", out, "--overwrite")
    assert (code, "the input itself" in error) == (4, True)
    assert path.read_bytes() == before


def test_another_input_is_no_output_either(run, comfy, tmp_path):
    first, second = comfy("x.safetensors"), comfy("x.comfyui.safetensors", seed=1)
    before = second.read_bytes()
    assert run("convert", first, "--overwrite", "-o", second)[0] == 0  # named once, and asked for
    second.write_bytes(before)
    code, _, error = run("convert", first, second, "--overwrite")
    assert (code, "the input itself" in error) == (4, True)
    assert second.read_bytes() == before


def test_an_existing_file_is_replaced_only_when_asked(run, comfy, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    code, _, error = run("convert", comfy(), "-o", out)
    assert (code, "--overwrite" in error, out.read_text()) == (4, True, "mine")


def test_only_some_modules_can_be_extracted(run, comfy, tmp_path):
    out = tmp_path / "out.safetensors"
    assert run("convert", comfy(), "-o", out, "--only", r"layers\.\d+\.attention\..*")[0] == 0
    assert {key.split(".")[3] for key in read_tensors(out)} == {"attention"}
    code, _, error = run("convert", comfy(), "-o", tmp_path / "none.safetensors", "--only", "attention")
    assert (code, QKV in error) == (4, True)
    assert run("convert", comfy(), "-o", tmp_path / "none.safetensors", "--only", "(")[0] == 4


def test_a_key_without_a_meaning_stops_the_conversion(run, comfy, tmp_path):
    path = comfy(**{"diffusion_model.layers.0.attention.o.secret": np.ones(3, np.float32)})
    code, _, error = run("convert", path, "-o", tmp_path / "out.safetensors")
    assert (code, "secret" in error) == (4, True)
    assert names(tmp_path) == ["comfy.safetensors"]


def test_the_metadata_keeps_what_is_true_and_no_path_of_somebodys_machine(run, comfy, tmp_path):
    told = {
        "modelspec.title": "Buggy",
        "ss_output_name": "buggy",
        "ss_sd_model_name": "/home/ann/secret/model.safetensors",
        "ss_datasets": '[{"image_dir": "C:\\\\Users\\\\ann\\\\pictures"}]',
        "ss_url": "https://example.org/x",
        "lora_adapter_metadata": "{}",
        "../../escape": "x",
    }
    assert run("convert", comfy(metadata=told), "-o", tmp_path / "out.safetensors")[0] == 0
    metadata = read_tensors(tmp_path / "out.safetensors").metadata
    assert {"modelspec.title", "ss_output_name", "ss_url"} <= set(metadata)
    assert not {"ss_sd_model_name", "ss_datasets", "lora_adapter_metadata", "../../escape"} & set(metadata)


def test_an_adapter_for_peft_is_a_folder_and_no_configuration_is_overwritten(run, comfy, tmp_path):
    path = comfy(metadata={"loraport.family": "ideogram4"})
    assert run("convert", path, "--to", "peft")[0] == 0
    folder = tmp_path / "comfy.peft"
    assert names(folder) == ["adapter_config.json", "adapter_model.proof.json", "adapter_model.safetensors"]
    assert run("verify", path, folder)[0] == 0
    before = (folder / "adapter_config.json").read_bytes()
    code, _, error = run("convert", folder, "--to", "peft", "-o", folder / "other.safetensors", "--overwrite")
    assert (code, "exists already" in error) == (4, True)
    assert (folder / "adapter_config.json").read_bytes() == before
    assert len(names(folder)) == 3


def test_a_conversion_that_fails_leaves_no_folder(run, comfy, tmp_path):
    path = comfy(**{"diffusion_model.layers.0.attention.o.secret": np.ones(3, np.float32)})
    assert run("convert", path, "--to", "peft")[0] == 4
    assert names(tmp_path) == ["comfy.safetensors"]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_a_checkpoint_in_a_run_folder_has_the_alpha_of_the_runs_spec(tmp_path, run, rslora, scale):
    work = tmp_path / "runs" / "x" / "work" / "checkpoint-1"
    work.mkdir(parents=True)
    spec = {
        "version": 1,
        "name": "x",
        "model": {"family": "ideogram4", "checkpoint": "c"},
        "dataset": {"path": "d"},
        "lora": {"rank": 4, "alpha": 8, "rslora": rslora},
        "train": {"steps": 1},
    }
    for name, text in (("spec.yaml", json.dumps(spec)), ("plan.json", "{}"), ("state.json", "{}")):
        (tmp_path / "runs" / "x" / name).write_text(text)
    key = "transformer.layers.0.attention.qkv"
    pair = {f"{key}.lora_A.weight": np.ones((4, 32), np.float32), f"{key}.lora_B.weight": np.ones((96, 4), np.float32)}
    write_tensors(work / "l.safetensors", pair, {"loraport.family": "ideogram4"})
    code, _, err = run("convert", work / "l.safetensors", "--alpha", 1)
    assert (code, "is that of" in err) == (0, True)
    module = ComfyUI().read(work / "l.comfyui.safetensors").modules["layers.0.attention.qkv"]
    assert module.scale == scale
    spec["lora"]["rank"] = 8  # another run's spec
    (tmp_path / "runs" / "x" / "spec.yaml").write_text(json.dumps(spec))
    code, _, err = run("convert", work / "l.safetensors", "--overwrite")
    assert (code, "does not tell its scale" in err) == (4, True)
