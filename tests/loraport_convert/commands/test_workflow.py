import json

import numpy as np
import pytest


def nodes_of(path, kind):
    return [node["inputs"] for node in json.loads(path.read_text()).values() if node["class_type"] == kind]


def test_a_workflow_names_the_file_its_trigger_and_what_comfyui_needs(run, comfy, tmp_path):
    out = tmp_path / "workflow.json"
    path = comfy(metadata={"modelspec.trigger_phrase": "mp_buggy"})
    code, text, _ = run("workflow", path, "-o", out)
    assert (code, "comfy.safetensors" in text, "ideogram4_unconditional" in text) == (0, True, True)
    assert {each["lora_name"] for each in nodes_of(out, "LoraLoaderModelOnly")} == {path.name}
    assert json.loads(nodes_of(out, "CLIPTextEncode")[0]["text"]) == {"high_level_description": "mp_buggy"}


def test_what_is_asked_for_is_in_it(run, comfy, tmp_path):
    out = tmp_path / "workflow.json"
    a, b = comfy("a.safetensors"), comfy("b.safetensors", seed=1)
    options = ["--prompt", "a cat", "--seed", 5, "--side", 512, "--model", "mine.safetensors"]
    assert run("workflow", f"{a}:0.5", f"{b}:2", "-o", out, *options)[0] == 0
    used = {(each["lora_name"], each["strength_model"]) for each in nodes_of(out, "LoraLoaderModelOnly")}
    assert {("a.safetensors", 0.5), ("b.safetensors", 2.0), ("a.safetensors", 0.75), ("b.safetensors", 3.0)} <= used
    assert {each["text"] for each in nodes_of(out, "CLIPTextEncode")} == {"a cat"}
    assert {each["noise_seed"] for each in nodes_of(out, "RandomNoise")} == {5}
    assert {each["width"] for each in nodes_of(out, "EmptyFlux2LatentImage")} == {512}
    assert "mine.safetensors" in {each["unet_name"] for each in nodes_of(out, "UNETLoader")}


def test_a_lora_that_comfyui_does_not_load_is_told(run, peft, tmp_path):
    code, _, notes = run("workflow", peft(), "-o", tmp_path / "w.json")
    assert (code, "convert it first" in notes) == (0, True)


@pytest.mark.parametrize("options", [["--side", 500], ["--family", "nothing"]])
def test_what_cannot_be_is_refused(run, comfy, tmp_path, options):
    assert run("workflow", comfy(), "-o", tmp_path / "w.json", *options)[0] == 4
    assert not (tmp_path / "w.json").exists()


def test_a_lora_is_never_overwritten_by_its_workflow(run, comfy):
    path = comfy()
    before = path.read_bytes()
    assert run("workflow", path, "-o", path)[0] == 4
    assert path.read_bytes() == before


def test_a_family_that_nothing_tells_must_be_named(run, comfy, tmp_path):
    key = "diffusion_model.something.else.0"
    odd = {f"{key}.lora_down.weight": np.ones((2, 8), np.float32), f"{key}.lora_up.weight": np.ones((8, 2), np.float32)}
    gone = {
        f"diffusion_model.layers.0.{module}.{end}": None
        for module in ("attention.qkv", "attention.o", "feed_forward.w1")
        for end in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    path = comfy(**odd, **gone)
    code, _, error = run("workflow", path, "-o", tmp_path / "w.json")
    assert (code, "--family" in error) == (4, True)
    assert run("workflow", path, "-o", tmp_path / "w.json", "--family", "flux1")[0] == 0
