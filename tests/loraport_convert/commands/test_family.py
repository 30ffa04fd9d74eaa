"""`--family`: files whose names fit several models, or none that LoraPort knows."""

import numpy as np
import pytest

from loraport.lora.storage import read_tensors, write_tensors

H = 32


@pytest.fixture
def write(tmp_path):
    def make(*modules, metadata=None):
        tensors = {}
        for module in modules:
            tensors[f"{module}.lora_down.weight"] = np.ones((2, H), np.float32)
            tensors[f"{module}.lora_up.weight"] = np.ones((H, 2), np.float32)
            tensors[f"{module}.alpha"] = np.array(2, np.float32)
        write_tensors(tmp_path / "x.safetensors", tensors, metadata or {})
        return tmp_path / "x.safetensors"

    return make


def modules(path):
    return {key.partition(".lora_")[0] for key in read_tensors(path) if "lora_up" in key}


@pytest.mark.parametrize(("family", "module"), [("ideogram4", "attention.o"), ("z-image", "attention.out")])
@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_names_of_two_models_are_asked_about_and_then_taken_as_told(run, write, tmp_path, prefix, family, module):
    path, out = write(f"{prefix}layers.0.attention.to_out.0"), tmp_path / "out.safetensors"
    if prefix == "transformer.":
        code, _, error = run("convert", path, "-o", out)
        assert (code, "ideogram4 or z-image" in error, "--family" in error) == (4, True, True)
    assert run("convert", path, "-o", out, "--family", family)[0] == 0
    assert modules(out) == {f"diffusion_model.layers.0.{module}"}
    assert run("verify", path, out, "--family", family)[0] == 0
    for target in ("kohya", "diffusers", "ai-toolkit"):
        assert run("convert", out, "-o", tmp_path / f"{target}.safetensors", "--to", target)[0] == 0
        assert run("verify", path, tmp_path / f"{target}.safetensors", "--family", family)[0] == 0


def test_merging_and_resizing_are_told_too(run, write, tmp_path):
    path, out = write("transformer.layers.0.attention.to_out.0"), tmp_path / "out.safetensors"
    assert run("merge", path, f"{path}:0.5", "-o", out, "--family", "z-image")[0] == 0
    assert modules(out) == {"diffusion_model.layers.0.attention.out"}
    assert run("resize", path, "--rank", 1, "-o", out, "--overwrite", "--family", "ideogram4")[0] == 0
    assert modules(out) == {"diffusion_model.layers.0.attention.o"}


def test_a_family_that_the_file_contradicts_is_an_error(run, write, tmp_path):
    path = write("transformer.layers.0.attention.to_out.0", metadata={"loraport.family": "z-image"})
    code, _, error = run("convert", path, "-o", tmp_path / "out.safetensors", "--family", "ideogram4")
    assert (code, "of the family z-image" in error) == (4, True)


def test_modules_that_the_told_family_does_not_have_are_not_dropped(run, write, tmp_path):
    path = write("transformer.layers.0.attention.to_out.0", "transformer.layers.0.attention.unheard_of")
    code, _, error = run("convert", path, "-o", tmp_path / "out.safetensors", "--family", "z-image")
    assert (code, "unheard_of" in error) == (4, True)
    assert not (tmp_path / "out.safetensors").exists()


def test_an_unknown_family_offers_the_nearest(run, write, tmp_path):
    code, _, error = run("convert", write("x"), "-o", tmp_path / "out.safetensors", "--family", "zimage")
    assert (code, "Did you mean 'z-image'" in error) == (4, True)


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_", "lora_transformer_"])
def test_names_with_underscores_of_an_unknown_model_are_refused_since_no_loader_could_find_them(
    run, write, tmp_path, prefix
):
    code, _, error = run("convert", write(f"{prefix}trunk_0_mixer"), "-o", tmp_path / "out.safetensors")
    assert (code, "underscores" in error, "--family" in error) == (4, True, True)


def test_dotted_names_of_an_unknown_model_are_kept_with_a_note(run, write, tmp_path):
    code, _, error = run("convert", write("transformer.trunk.0.mixer"), "-o", tmp_path / "out.safetensors")
    assert (code, "family that LoraPort does not know" in error) == (0, True)
    assert modules(tmp_path / "out.safetensors") == {"diffusion_model.trunk.0.mixer"}
