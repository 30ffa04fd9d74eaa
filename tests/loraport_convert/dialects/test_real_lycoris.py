"""What LyCORIS itself saves of a small Stable Diffusion with its text encoder, in every algorithm and form.

Its own forward pass on random inputs says what was trained; its merge multiplies alpha into a LoHa twice.
"""

import numpy as np
import pytest
from safetensors.torch import load_file
from small_networks import SD15, clip

from loraport.errors import DataError
from loraport.lora.canonical import ColumnScale, LoraFile, RowScale
from loraport.lora.dora import with_norms
from loraport.lora.proof import prove
from loraport.plugins import plugins
from loraport_convert.approximation import truncated, whole
from loraport_convert.codec.decode import FAMILY_KEY
from loraport_convert.families import FAMILIES
from loraport_convert.reading import read_lora

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
lycoris = pytest.importorskip("lycoris.kohya")

#: What is trained → the arguments that ask for it.
EXACT = {
    "lora": {},
    "lora, rank-stabilised": {"rs_lora": True},
    "lora with a scalar": {"use_scalar": True},
    "lora, tucker": {"use_tucker": True},
    "lora, dora": {"dora_wd": True},
    "lora, dora by column": {"dora_wd": True, "wd_on_output": False},
    "lora, tucker, dora": {"use_tucker": True, "dora_wd": True},
    "loha": {"algo": "loha"},
    "loha, tucker": {"algo": "loha", "use_tucker": True},
    "loha, dora": {"algo": "loha", "dora_wd": True},
    "loha, dora by column": {"algo": "loha", "dora_wd": True, "wd_on_output": False},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr, both factored": {"algo": "lokr", "factor": 4, "decompose_both": True},
    "lokr, full matrix": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr, tucker": {"algo": "lokr", "factor": 2, "use_tucker": True},
    "lokr, dora": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "dylora": {"algo": "dylora", "block_size": 1},
}
AS_THEY_ARE = {"diag-oft": {"algo": "diag-oft"}, "boft": {"algo": "boft"}, "glora": {"algo": "glora"}}
REFUSED = {
    "rescale": {"algo": "diag-oft", "rescaled": True},
    "IA³": {"algo": "ia3"},
}


#: Its own preset names two modules of diffusers' UNet twice, which it then refuses.
PRESET = """
enable_conv = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
unet_target_name = ["conv_in", "conv_out"]
text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]
"""


def models():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**SD15), clip(0)


def saved(path, options, family="sd15"):
    """{module of the UNet or text encoder: it}, once trained; the file is written."""
    unet, encoder = trained_models(path, options, family)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    parts = [("", unet), ("text_encoders.clip_l.transformer.text_model.", encoder)]
    return {
        start + name.removeprefix("text_model."): module
        for start, model in parts
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module.forward.__self__ is not module
    }


def trained_models(path, options, family="sd15"):
    """The UNet and the text encoder with what LyCORIS trains in them; the file is written."""
    unet, encoder = models()
    preset = path.with_name("preset.toml")
    preset.write_text(PRESET)
    sizes = {"conv_dim": 2, "conv_alpha": 3, "preset": str(preset)}
    made = lycoris.create_network(1.0, 2, 3, None, encoder, unet, **sizes, **options)
    made.apply_to(encoder, unet, True, True)
    made.eval()
    for name, parameter in made.named_parameters():
        if "dora_scale" in name:
            parameter.data *= 1 + 0.1 * torch.randn_like(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    made.save_weights(str(path), torch.float32, {FAMILY_KEY: family})
    return unet, encoder


def with_change(module, weight):
    """The weight after training, from what was read of the file."""
    flat = weight.reshape(len(weight), -1)
    merged = flat + module.scale * module.factors.product()(0, len(flat))
    if isinstance(module.dora, RowScale):
        merged = with_norms(module, weight).dora.gain()[:, None] * merged
    elif isinstance(module.dora, ColumnScale):
        by_input = merged.reshape(len(flat), weight.shape[1], -1)
        norms = np.sqrt((by_input**2).sum(axis=(0, 2)))
        merged = by_input * (module.dora.trained / norms)[None, :, None]
    return merged.reshape(weight.shape)


@pytest.mark.parametrize("kind", EXACT)
def test_what_lycoris_saves_is_what_its_forward_pass_computes(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("random.randint", lambda low, high: high)  # a DyLoRA draws its rank: the whole of it
    path, dialects = tmp_path / "x.safetensors", plugins().dialects()
    trained = saved(path, EXACT[kind])
    found = read_lora(path, dialects)
    lora = found.lora
    assert (found.dialect.name, lora.unread) == ("kohya", ())
    named = {name if name.startswith("text_encoders.") else native(name): each for name, each in trained.items()}
    assert set(lora.modules) == set(named)
    assert len(named) > 100
    for name, layer in named.items():
        weight = layer.weight.detach().double().numpy()
        after = torch.from_numpy(with_change(lora.modules[name], weight)).float()
        is_linear = isinstance(layer, torch.nn.Linear)
        point = torch.randn(4, weight.shape[1]) if is_linear else torch.randn(1, weight.shape[1], 5, 5)
        with torch.no_grad():
            expected = layer(point)
            if is_linear:
                got = torch.nn.functional.linear(point, after, layer.bias)
            else:
                got = torch.nn.functional.conv2d(point, after, layer.bias, layer.stride, layer.padding)
        assert (got - expected).norm() < 2e-5 * expected.norm(), name
    if not any(isinstance(module.dora, RowScale) for module in lora.modules.values()):
        dialects["comfyui"].write(lora, tmp_path / "comfy.safetensors", None, {})
        assert prove(lora, dialects["comfyui"].read(tmp_path / "comfy.safetensors")).ok


@pytest.mark.parametrize("options", [{"train_norm": True}, {"algo": "full", "train_norm": True}])
def test_norms_biases_and_whole_modules_make_of_the_models_what_was_trained(tmp_path, options):
    path, dialects = tmp_path / "x.safetensors", plugins().dialects()
    trained, fresh = trained_models(path, options), models()
    lora = read_lora(path, dialects).lora
    assert lora.unread == ()
    dialects["comfyui"].write(lora, tmp_path / "comfy.safetensors", None, {})
    read = dialects["comfyui"].read(tmp_path / "comfy.safetensors")
    assert prove(lora, read, kept=frozenset(lora.modules)).ok
    weights = dict(fresh[0].named_parameters()) | {
        f"text_encoders.clip_l.transformer.{'' if name.startswith('text_model.') else 'text_model.'}{name}": parameter
        for name, parameter in fresh[1].named_parameters()
    }
    for name, module in read.modules.items():
        owner = name.removesuffix(".bias")
        if not name.startswith("text_encoders."):
            (span,) = FAMILIES["sd15"].diffusers(owner)
            owner = span.module
        weight = weights[f"{owner}.{'bias' if name.endswith('.bias') else 'weight'}"]
        change = module.scale * module.factors.product()(0, len(weight))
        weight.data += torch.from_numpy(change.reshape(weight.shape)).float()
    point, tokens = torch.randn(1, 4, 16, 16), torch.arange(8)[None]
    prompt = torch.randn(1, 8, SD15["cross_attention_dim"])
    with torch.no_grad():
        texts = [encoder(tokens).last_hidden_state for _, encoder in (trained, fresh)]
        images = [unet(point, 7, prompt).sample for unet, _ in (trained, fresh)]
        untrained = models()[0](point, 7, prompt).sample
    for expected, got in (texts, images):
        assert (got - expected).norm() < 1e-4 * expected.norm()
    assert (untrained - images[0]).norm() > 0.1 * images[0].norm()


def native(name):
    (span,) = FAMILIES["sd15"].native(name)
    return span.module


@pytest.mark.parametrize("kind", AS_THEY_ARE)
def test_what_needs_the_base_keeps_its_very_tensors_under_comfyuis_names(tmp_path, kind):
    path, dialects = tmp_path / "x.safetensors", plugins().dialects()
    trained = saved(path, AS_THEY_ARE[kind])
    lora = read_lora(path, dialects).lora
    assert (lora.unread, len(lora.modules)) == ((), len(trained))
    dialects["comfyui"].write(lora, tmp_path / "comfy.safetensors", "bf16", {})
    before, after = load_file(path), load_file(tmp_path / "comfy.safetensors")
    assert len(before) == len(after)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    for name in [each.removeprefix(key) for each in before if each.startswith(key)]:
        assert torch.equal(
            before[key + name], after[f"diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q{name}"]
        )
    assert prove(lora, dialects["comfyui"].read(tmp_path / "comfy.safetensors")).ok


@pytest.mark.parametrize("reason", REFUSED)
def test_what_comfyui_would_get_wrong_is_refused_with_the_reason(tmp_path, reason):
    saved(tmp_path / "x.safetensors", REFUSED[reason])
    with pytest.raises(DataError, match=reason):
        list(read_lora(tmp_path / "x.safetensors", plugins().dialects()).lora.modules.values())


@pytest.mark.parametrize("target", ["diffusers", "peft"])
def test_a_tucker_convolution_becomes_a_plain_one_where_a_layout_has_no_core(tmp_path, target):
    dialects = plugins().dialects()
    saved(tmp_path / "x.safetensors", EXACT["lora, tucker"])
    lora = read_lora(tmp_path / "x.safetensors", dialects).lora
    names = [name for name in lora.modules if not name.startswith("text_encoders.")]
    of_model = LoraFile(lora.family, {name: lora.modules[name] for name in names})
    written = tmp_path / "adapter_model.safetensors"
    dialects[target].write(of_model, written, None, {})
    assert prove(of_model, dialects[target].read(written)).ok


@pytest.mark.parametrize("kind", ["lora, tucker", "loha, tucker", "lokr, tucker"])
def test_an_approximated_convolution_with_a_core_keeps_its_kernel(tmp_path, kind):
    dialects = plugins().dialects()
    saved(tmp_path / "x.safetensors", EXACT[kind])
    lora = read_lora(tmp_path / "x.safetensors", dialects).lora
    module = lora.modules["input_blocks.1.0.in_layers.2"]
    out, columns = module.factors.shape
    made = [whole(module).module, truncated(module, 64).module]
    assert made[0].factors.diff.shape == (out, columns // 9, 3, 3)
    assert made[1].factors.down.shape[1:] == (columns // 9, 3, 3)
    for each in made:
        assert prove(LoraFile(None, {module.name: module}), LoraFile(None, {module.name: each})).worst.difference < 1e-5
