import json

import numpy as np
import pytest

from loraport.errors import DataError
from loraport.lora.canonical import LoraFile
from loraport.lora.dialect import Dialect
from loraport.lora.dora import with_norms
from loraport.lora.proof import prove
from loraport.lora.storage import read_tensors, write_tensors
from loraport_convert.comfyui import ComfyUI
from loraport_convert.dialects.peft import Peft

RNG = np.random.default_rng(0)
NAME = "layers.0.attention.o"
KEY = f"base_model.model.{NAME}"
PAIR = {
    f"{KEY}.lora_A.weight": RNG.standard_normal((4, 6)).astype(np.float32),
    f"{KEY}.lora_B.weight": RNG.standard_normal((8, 4)).astype(np.float32),
}


def saved(folder, tensors=PAIR, **config):
    write_tensors(folder / "adapter_model.safetensors", tensors, {})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8, **config}))
    return folder


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"attention.o": 2}}, 0.5),
        ({"alpha_pattern": {r"layers\.\d+\.attention\.o": 1}, "use_rslora": True}, 0.5),
        ({"alpha_pattern": {"tention.o": 2, "o": 4, "attention.o": 1}}, 1.0),
    ],
)
def test_the_scale_is_alpha_by_rank_or_by_its_root(tmp_path, config, scale):
    assert Peft().read(saved(tmp_path, **config)).modules[NAME].scale == scale


def test_the_tensor_file_can_be_named_instead_of_its_folder(tmp_path):
    lora = Peft().read(saved(tmp_path) / "adapter_model.safetensors")
    assert list(lora.modules) == [NAME]
    assert lora.unread == ()


def test_a_missing_config_says_that_the_scale_is_kept_there(tmp_path):
    write_tensors(tmp_path / "adapter_model.safetensors", PAIR, {})
    with pytest.raises(DataError, match=r"scale.*\n.*adapter_config\.json"):
        Peft().read(tmp_path)


@pytest.mark.parametrize("config", ["{", "[]", '{"peft_type": "LOHA", "lora_alpha": 1}', '{"peft_type": "LORA"}'])
def test_a_config_of_something_else_is_refused(tmp_path, config):
    (saved(tmp_path) / "adapter_config.json").write_text(config)
    with pytest.raises(DataError, match="adapter_config"):
        Peft().read(tmp_path)


@pytest.mark.parametrize("start", ["pissa_niter_4", "olora", "corda"])
def test_a_start_that_moved_the_base_weights_is_refused(tmp_path, start):
    with pytest.raises(DataError, match=start):
        Peft().read(saved(tmp_path, init_lora_weights=start))


@pytest.mark.parametrize("lost", ["lora_A.weight", "lora_B.weight"])
def test_a_missing_half_is_named(tmp_path, lost):
    kept = {key: array for key, array in PAIR.items() if not key.endswith(lost)}
    with pytest.raises(DataError, match=rf"{lost} is missing"):
        Peft().read(saved(tmp_path, kept))


def test_other_keys_are_reported_as_unread_and_a_bias_that_the_model_does_not_have_is_refused(tmp_path):
    odd = {"classifier.weight": np.ones(2, np.float32)}
    assert set(Peft().read(saved(tmp_path, {**PAIR, **odd})).unread) == set(odd)
    with pytest.raises(DataError, match="has none in ideogram4"):
        Peft().read(saved(tmp_path, {**PAIR, f"{KEY}.lora_B.bias": np.ones(8, np.float32)}))


def test_detection_goes_by_the_prefix():
    assert Peft().detect(list(PAIR), {}, {}) == 1.0
    assert Peft().detect(["diffusion_model.m.lora_A.weight"], {}, {}) == 0.0
    assert isinstance(Peft(), Dialect)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"o": 3}}])
def test_what_peft_saves_is_what_peft_merges_and_becomes_a_comfyui_file(tmp_path, options):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"qkv": torch.nn.Linear(6, 9, bias=False), "o": torch.nn.Linear(6, 8, bias=False)})
    base = {name: layer.weight.detach().numpy().copy() for name, layer in model.items()}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["qkv", "o"], init_lora_weights=False, **options)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.1
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload()

    read = Peft().read(tmp_path)
    assert read.unread == ()
    modules = {name: with_norms(module, base[name]) for name, module in read.modules.items()}
    assert set(modules) == {"qkv", "o"}
    for name, module in modules.items():
        gain = 1.0 if module.dora is None else module.dora.gain()[:, None]
        out = module.factors.shape[0]
        expected = gain * (base[name] + module.scale * module.factors.product()(0, out))
        np.testing.assert_allclose(merged[name].weight.detach().numpy(), expected, atol=1e-6)

    source = LoraFile("ideogram4", modules)
    ComfyUI().write(source, tmp_path / "out.safetensors", "fp32", {})
    assert prove(source, ComfyUI().read(tmp_path / "out.safetensors")).ok
    assert len(read_tensors(tmp_path / "out.safetensors")) == (8 if "use_dora" in options else 6)
