"""Text encoders, which every layout counts in its own way."""

import numpy as np
import pytest

from loraport.lora.canonical import LoraFile, LoraModule, LowRank
from loraport.lora.dialect import detect_dialect
from loraport.lora.proof import prove
from loraport.lora.stacked import NotExact
from loraport.lora.storage import read_tensors, write_tensors
from loraport.plugins import plugins

CLIP, T5 = "text_model.encoder.layers.1.self_attn.q_proj", "encoder.block.0.layer.0.SelfAttention.q"
MODEL = {
    "sd15": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "sdxl": "input_blocks.4.1.transformer_blocks.1.attn1.to_q",
    "flux1": "single_blocks.37.linear2",
    "sd3": "joint_blocks.0.x_block.mlp.fc1",
}
CASES = [
    ("sd15", "clip_l", CLIP, "lora_te_", "text_encoder."),
    ("sdxl", "clip_l", CLIP, "lora_te1_", "text_encoder."),
    ("sdxl", "clip_g", CLIP, "lora_te2_", "text_encoder_2."),
    ("flux1", "clip_l", CLIP, "lora_te1_", "text_encoder."),
    ("flux1", "t5xxl", T5, "lora_te3_", "text_encoder_2."),
    ("sd3", "clip_g", CLIP, "lora_te2_", "text_encoder_2."),
    ("sd3", "t5xxl", T5, "lora_te3_", "text_encoder_3."),
]


def lora(family, *names):
    rng = np.random.default_rng(0)

    def factors():
        return LowRank(rng.standard_normal((2, 8)).astype(np.float32), rng.standard_normal((8, 2)).astype(np.float32))

    return LoraFile(family, {name: LoraModule(name, factors(), 1.5) for name in (MODEL[family], *names)})


@pytest.mark.parametrize(("family", "encoder", "module", "kohya", "diffusers"), CASES)
def test_an_encoder_has_its_number_in_each_layout_and_comes_back(tmp_path, family, encoder, module, kohya, diffusers):
    dialects = plugins().dialects()
    source = lora(family, f"text_encoders.{encoder}.transformer.{module}")
    for target, prefix in (("kohya", kohya), ("diffusers", diffusers), ("comfyui", f"text_encoders.{encoder}.")):
        path = tmp_path / f"{target}.safetensors"
        dialects[target].write(source, path, None, {"loraport.family": family})
        assert sum(key.startswith(prefix) for key in read_tensors(path)) in (2, 3)
        assert detect_dialect(path, dialects).name == target
        assert prove(source, dialects[target].read(path)).ok


def test_the_second_encoder_of_flux_is_t5_for_onetrainer_too(tmp_path):
    dialects = plugins().dialects()
    source = lora("flux1", f"text_encoders.t5xxl.transformer.{T5}")
    dialects["kohya"].write(source, tmp_path / "x.safetensors", None, {})
    tensors = read_tensors(tmp_path / "x.safetensors")
    renamed = {key.replace("lora_te3_", "lora_te2_"): array for key, array in tensors.items()}
    write_tensors(tmp_path / "y.safetensors", renamed, {"loraport.family": "flux1"})
    assert prove(source, dialects["kohya"].read(tmp_path / "y.safetensors")).ok


def test_a_layout_of_one_model_refuses_a_text_encoder(tmp_path):
    source = lora("sdxl", f"text_encoders.clip_l.transformer.{CLIP}")
    with pytest.raises(NotExact, match="text encoder"):
        plugins().dialects()["peft"].write(source, tmp_path / "adapter_model.safetensors", None, {})
