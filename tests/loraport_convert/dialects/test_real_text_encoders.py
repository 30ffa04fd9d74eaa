"""LoRAs of text encoders as diffusers and LyCORIS save them, from real CLIP models of a few numbers."""

import numpy as np
import pytest
from small_networks import clip

from loraport.lora.dialect import detect_dialect
from loraport.lora.proof import prove
from loraport.plugins import plugins
from loraport_convert.reading import read_lora

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

#: family → (pipeline, root of the model's own part, ComfyUI's encoders by the argument they are saved with)
PIPELINES = {
    "sd15": ("StableDiffusionPipeline", "unet", {"text_encoder": "clip_l"}),
    "sdxl": ("StableDiffusionXLPipeline", "unet", {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}),
    "flux1": ("FluxPipeline", "transformer", {"text_encoder": "clip_l"}),
    "sd3": ("StableDiffusion3Pipeline", "transformer", {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}),
}
MODULES = {
    "unet": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "transformer": "transformer_blocks.0.attn.to_out.0",
}


def matrices(model):
    """Weights in fp64 by the name that every loader knows, with `text_model.` in front."""
    found = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 2 and "lora_" not in name and "embedding" not in name:
            inner = name.replace(".base_layer", "").removesuffix(".weight").removeprefix("text_model.")
            found[f"text_model.{inner}"] = tensor.double().numpy().copy()
    return found


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"fc1": 3}, "rank_pattern": {"fc2": 1}}]
)
@pytest.mark.parametrize("family", PIPELINES)
def test_text_encoders_that_diffusers_saves_arrive_with_what_they_were_trained_to(tmp_path, family, options):
    pipeline, root, encoders = PIPELINES[family]
    layers, metadata, expected = {}, {}, {}
    for seed, (argument, encoder) in enumerate(encoders.items()):
        model = clip(seed)
        before = matrices(model)
        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
        config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=targets, init_lora_weights=False, **options)
        model.add_adapter(config)
        layers[f"{argument}_lora_layers"] = peft.get_peft_model_state_dict(model)
        metadata[f"{argument}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
        for _, module in model.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.merge()
        after = matrices(model)
        for name, weight in before.items():
            expected[f"text_encoders.{encoder}.transformer.{name}"] = after[name] - weight
    assert len(expected) == 12 * len(encoders)
    own = {f"{MODULES[root]}.lora_A.weight": torch.randn(2, 8), f"{MODULES[root]}.lora_B.weight": torch.randn(8, 2)}
    told = {"r": 2, "lora_alpha": 2, "target_modules": [MODULES[root]]}
    layers[f"{root}_lora_layers"], metadata[f"{root}_lora_adapter_metadata"] = own, told
    getattr(diffusers, pipeline).save_lora_weights(tmp_path, **layers, **metadata)

    dialects = plugins().dialects()
    path = tmp_path / "pytorch_lora_weights.safetensors"
    assert detect_dialect(path, dialects).name == "diffusers"
    lora = read_lora(path, dialects, None, family).lora
    assert lora.unread == ()
    assert len(lora.modules) == len(expected) + 1
    for name, change in expected.items():
        module = lora.modules[name]
        found = module.scale * module.factors.product()(0, len(change))
        assert np.linalg.norm(found - change) < 1e-5 * np.linalg.norm(change), name
    for target in ("comfyui", "kohya", "diffusers"):
        dialects[target].write(lora, tmp_path / f"{target}.safetensors", None, {})
        assert prove(lora, read_lora(tmp_path / f"{target}.safetensors", dialects).lora).ok
