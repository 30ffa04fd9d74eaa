"""Files that diffusers with PEFT, and LyCORIS, write themselves; their own merge says what they mean."""

import numpy as np
import pytest
from small_networks import MODELS, network

from loraport.lora.dora import with_norms
from loraport.plugins import plugins
from loraport_convert.codec.decode import FAMILY_KEY
from loraport_convert.families import FAMILIES
from loraport_convert.families.rules import cuts
from loraport_convert.reading import read_lora

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

KINDS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
OPTIONS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 3}},
]


def weights(model):
    state = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}
    return {name.removesuffix(".weight"): tensor for name, tensor in state.items() if name.endswith(".weight")}


def expected_changes(family, before, after):
    """ΔW by native module, as matrices, from the weights of diffusers' model before and after its own merge."""
    moved = {}
    for name, weight in before.items():
        change = (after[name] - weight).reshape(weight.shape[0], -1)
        if np.any(change):
            spans = FAMILIES[family].native(name, change.shape)
            for span, (start, stop) in zip(spans, cuts(spans, len(change)), strict=True):
                share = (stop - start) // span.count
                whole = moved.setdefault(span.module, np.zeros((share * span.total, change.shape[1])))
                whole[share * span.first : share * span.first + stop - start] = change[start:stop]
    return moved


def native_weight(family, before, module):
    """The original model's weight, put together from diffusers' parts."""
    spans = FAMILIES[family].diffusers(module.name, module.factors.shape)
    whole = np.zeros(module.factors.shape)
    for span, (start, stop) in zip(spans, cuts(spans, len(whole)), strict=True):
        weight = before[span.module].reshape(before[span.module].shape[0], -1)
        share = (stop - start) // span.count
        whole[start:stop] = weight[share * span.first : share * span.first + stop - start]
    return whole


def assert_converts(path, family, before, after, folder):
    dialects = plugins().dialects()
    told = family if family in ("ideogram4", "z-image") else None  # their small models look alike
    lora = read_lora(path, dialects, None, told).lora
    assert lora.unread == ()
    assert lora.family == family
    expected = expected_changes(family, before, after)
    assert set(lora.modules) == set(expected)
    whole = {name: with_norms(module, native_weight(family, before, module)) for name, module in lora.modules.items()}
    for name, module in whole.items():
        gain = 1.0 if module.dora is None else module.dora.gain()[:, None]
        weight = native_weight(family, before, module)
        change = gain * (weight + module.scale * module.factors.product()(0, len(weight))) - weight
        assert np.linalg.norm(change - expected[name]) < 2e-6 * np.linalg.norm(weight), name
    dialects["comfyui"].write(type(lora)(family, whole, lora.metadata, ()), folder / "comfy.safetensors", None, {})
    assert set(dialects["comfyui"].read(folder / "comfy.safetensors").modules) == set(expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", MODELS)
def test_what_diffusers_saves_is_what_it_merges(tmp_path, family, options):
    model, pipeline = network(family)
    before = weights(model)
    targets = [name for name, module in model.named_modules() if isinstance(module, KINDS)]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
    model.add_adapter(config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.1
    from diffusers.training_utils import _collate_lora_metadata

    layers = peft.get_peft_model_state_dict(model)
    root = FAMILIES[family].root
    metadata = _collate_lora_metadata({root: model})
    pipeline.save_lora_weights(tmp_path, **{f"{root}_lora_layers": layers}, **metadata)
    model.fuse_lora()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in weights(model).items() if "lora_" not in name}
    assert_converts(tmp_path / "pytorch_lora_weights.safetensors", family, before, after, tmp_path)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("family", ["flux1", "qwen-image", "sdxl"])
def test_what_lycoris_saves_is_what_its_training_computes(tmp_path, family, algorithm):
    """Its forward pass says what was trained: its merge multiplies alpha into a LoHa twice."""
    lycoris = pytest.importorskip("lycoris")
    model, _ = network(family)
    before = weights(model)
    # LoKr on split q, k and v is not one LoKr of the fused module: see the reports.
    attention = ["*.to_out.0"] if algorithm == "lokr" else ["*.to_q", "*.to_k", "*.to_v"]
    targets = {"target_name": [*attention, "*.proj_out", "*.net.2"], "target_module": [], "use_fnmatch": True}
    lycoris.LycorisNetwork.apply_preset(targets)
    sizes = {"lora_dim": 2, "conv_lora_dim": 2, "alpha": 3, "conv_alpha": 3, "factor": 4}
    made = lycoris.LycorisNetwork(model, multiplier=1.0, network_module=algorithm, **sizes)
    made.apply_to()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path / "lycoris.safetensors"
    made.save_weights(str(path), torch.float32, {FAMILY_KEY: family})
    after = dict(before)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            with torch.no_grad():
                one, zero = torch.eye(module.in_features), torch.zeros(1, module.in_features)
                weight = (module(one) - module(zero)).double().numpy().T
            if not np.allclose(weight, before[name], atol=1e-6):
                after[name] = weight
    assert_converts(path, family, before, after, tmp_path)
