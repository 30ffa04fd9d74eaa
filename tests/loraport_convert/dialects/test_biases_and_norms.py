"""Biases, norms, modulations and replaced weights: kept bit for bit wherever ComfyUI has a place for them."""

import numpy as np
import pytest
from lora_reports import report

from loraport.errors import DataError
from loraport.lora.dialect import detect_dialect
from loraport.lora.proof import prove
from loraport.lora.stacked import NotExact
from loraport.lora.storage import read_tensors, write_tensors
from loraport.plugins import plugins
from loraport_convert.codec.decode import FAMILY_KEY
from loraport_convert.inspection import inspect

RNG = np.random.default_rng(0)
H = 8


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float16)


def pair(key, rows=H, columns=H, alpha=2):
    tensors = {f"{key}.lora_down.weight": random(2, columns), f"{key}.lora_up.weight": random(rows, 2)}
    return {**tensors, f"{key}.alpha": np.array(alpha, np.float32)}


@pytest.fixture
def converted(tmp_path):
    def convert(tensors, family, target="comfyui", **metadata):
        path, dialects = tmp_path / "x.safetensors", plugins().dialects()
        write_tensors(path, tensors, {FAMILY_KEY: family, **metadata})
        lora = detect_dialect(path, dialects).read(path)
        assert lora.unread == ()
        dialects[target].write(lora, tmp_path / "adapter_model.safetensors", None, {})
        back = dialects[target].read(tmp_path / "adapter_model.safetensors")
        assert prove(lora, back, kept=frozenset(lora.modules)).ok
        return dict(read_tensors(tmp_path / "adapter_model.safetensors"))

    return convert


#: What a trainer writes → where ComfyUI looks for it.
PLACES = {
    "sd15": {
        "lora_unet_down_blocks_0_attentions_0_norm.w_norm": "input_blocks.1.1.norm.diff",
        "lora_unet_down_blocks_0_attentions_0_norm.b_norm": "input_blocks.1.1.norm.diff_b",
        "lora_unet_mid_block_resnets_0_norm2.w_norm": "middle_block.0.out_layers.0.diff",
        "lora_unet_conv_norm_out.b_norm": "out.0.diff_b",
        "lora_unet_mid_block_attentions_0_proj_in.diff_b": "middle_block.1.proj_in.diff_b",
        "lora_te_text_model_encoder_layers_0_layer_norm1.w_norm": (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.layer_norm1.diff"
        ),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.diff_b": (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.diff_b"
        ),
    },
    "wan": {
        "lycoris_blocks_0_norm2.w_norm": "blocks.0.norm3.diff",
        "lycoris_blocks_0_norm2.b_norm": "blocks.0.norm3.diff_b",
        "lycoris_blocks_0_attn2_norm_added_k.w_norm": "blocks.0.cross_attn.norm_k_img.diff",
        "lycoris_blocks_0_attn2_add_k_proj.diff_b": "blocks.0.cross_attn.k_img.diff_b",
    },
    "flux1": {"lycoris_transformer_blocks_0_attn_norm_q.w_norm": "double_blocks.0.img_attn.norm.query_norm.diff"},
    "krea2": {"lycoris_transformer_blocks_0_attn_norm_q.w_norm": "blocks.0.attn.qknorm.qnorm.scale.diff"},
    "z-image": {"lycoris_layers_3_attention_norm_k.w_norm": "layers.3.attention.k_norm.diff"},
    "ideogram4": {"lycoris_layers_3_ffn_norm2.w_norm": "layers.3.ffn_norm2.diff"},
    "sd3": {"lycoris_transformer_blocks_0_attn2_norm_k.w_norm": "joint_blocks.0.x_block.attn2.ln_k.diff"},
    "qwen-image": {
        "lycoris_transformer_blocks_0_attn_norm_added_q.w_norm": "transformer_blocks.0.attn.norm_added_q.diff"
    },
}


@report(
    "Comfy-Org/ComfyUI#1347",
    "Comfy-Org/ComfyUI#1467",
    wrong="LyCORIS' trained norms (`w_norm`, `b_norm`) and biases (`diff_b`) of whole modules are not loaded.",
    now="Each goes where ComfyUI looks for it, bit for bit; one that the model does not have is refused by name.",
)
@pytest.mark.parametrize("family", PLACES)
def test_each_goes_where_comfyui_looks_for_it_bit_for_bit(converted, family):
    tensors = {key: random(H) for key in PLACES[family]}
    found = converted(tensors, family)
    places = {
        key: each if each.startswith("text_") else f"diffusion_model.{each}" for key, each in PLACES[family].items()
    }
    assert set(found) == set(places.values())
    for key, place in places.items():
        assert found[place].dtype == np.float16
        np.testing.assert_array_equal(found[place], tensors[key])


@report(
    "Comfy-Org/ComfyUI#8922",
    wrong="Wan's distilled LoRAs: `diff_m` is not loaded.",
    now="It becomes the change of `modulation`, which ComfyUI loads; biases and norms stay, bit for bit.",
)
def test_a_distilled_lora_of_wan_keeps_its_biases_norms_and_modulations(converted):
    tensors = {"diffusion_model.head.diff_m": random(1, 2, H)}
    for key in (f"diffusion_model.blocks.{number}" for number in range(4)):
        for part in ("q", "k", "v", "o"):
            for attention in ("self_attn", "cross_attn"):
                tensors |= pair(f"{key}.{attention}.{part}")
                tensors[f"{key}.{attention}.{part}.diff_b"] = random(H)
        tensors[f"{key}.self_attn.norm_q.diff"] = random(H)
        tensors |= {f"{key}.norm3.diff": random(H), f"{key}.norm3.diff_b": random(H)}
        tensors[f"{key}.diff_m"] = random(1, 6, H)
    found = converted(tensors, "wan")
    expected = {name.replace(".diff_m", ".modulation.diff"): array for name, array in tensors.items()}
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], array) for name, array in expected.items())


def test_the_bias_of_a_lora_of_pefts_is_multiplied_by_its_scale(converted):
    tensors = pair("transformer.transformer_blocks.0.attn.to_add_out", alpha=6)
    tensors["transformer.transformer_blocks.0.attn.to_add_out.lora_B.bias"] = random(H)
    found = converted(tensors, "flux1")["diffusion_model.double_blocks.0.txt_attn.proj.diff_b"]
    expected = 3 * tensors["transformer.transformer_blocks.0.attn.to_add_out.lora_B.bias"].astype(np.float32)
    np.testing.assert_array_equal(found, expected)


def test_the_bias_of_a_dora_is_refused_since_its_norms_scale_it_too(converted):
    key = "transformer.transformer_blocks.0.attn.to_add_out"
    tensors = {**pair(key), f"{key}.lora_B.bias": random(H), f"{key}.lora_magnitude_vector": random(H)}
    with pytest.raises(DataError, match=r"lora_B\.bias belongs to is a DoRA"):
        converted(tensors, "flux1")


def test_biases_of_split_attention_become_one_and_those_not_trained_are_zeros(converted):
    parts = {part: random(H) for part in "qv"}
    tensors = {f"lycoris_transformer_blocks_0_attn_to_{part}.diff_b": bias for part, bias in parts.items()}
    found = converted(tensors, "flux1")
    expected = np.concatenate([parts["q"], np.zeros(H), parts["v"]])
    assert set(found) == {"diffusion_model.double_blocks.0.img_attn.qkv.diff_b"}
    np.testing.assert_array_equal(found["diffusion_model.double_blocks.0.img_attn.qkv.diff_b"], expected)


def test_a_bias_whose_halves_change_places_follows_its_weight(converted):
    key = "transformer.transformer_blocks.23.norm1_context.linear"
    tensors = {f"{key}.diff": random(2 * H, H), f"{key}.diff_b": random(2 * H)}
    found = converted(tensors, "sd3")
    name = "diffusion_model.joint_blocks.23.context_block.adaLN_modulation.1"
    np.testing.assert_array_equal(found[f"{name}.diff_b"], np.roll(tensors[f"{key}.diff_b"], H))
    np.testing.assert_array_equal(found[f"{name}.diff"], np.roll(tensors[f"{key}.diff"], H, axis=0))
    with pytest.raises(DataError, match="order of rows"):
        converted({f"{key}.diff_b": random(2 * H)}, "sd3")


def test_a_replaced_weight_keeps_its_very_numbers(converted):
    key = "lycoris_transformer_blocks_0_attn_norm_q"
    tensors = {f"{key}.set_weight": random(H)}
    found = converted(tensors, "flux1")
    np.testing.assert_array_equal(
        found["diffusion_model.double_blocks.0.img_attn.norm.query_norm.set_weight"], tensors[f"{key}.set_weight"]
    )


@pytest.mark.parametrize(
    ("family", "tensors", "reason"),
    [
        ("ideogram4", {"lycoris_layers_0_attention_qkv.diff_b": random(H)}, "has none in ideogram4"),
        ("flux2", {"lycoris_transformer_blocks_0_ff_linear_in.diff_b": random(H)}, "has none in flux2"),
        ("ideogram4", {"lycoris_layers_0_attention_qkv.diff": random(H)}, "is a matrix"),
        ("ideogram4", pair("lycoris_layers_0_ffn_norm2"), "only a whole change fits"),
        ("sd15", {"lora_te_text_model_encoder_layers_0_mlp_fc1.diff": random(H)}, "is a matrix"),
        ("flux1", {"transformer.proj_out.lora_B.bias": random(H)}, "is missing"),
        ("ideogram4", {"lycoris_layers_0_ffn_norm2.w_norm": np.array(1.0)}, "one number"),
    ],
)
def test_what_the_model_has_no_place_for_is_refused_with_the_reason(converted, family, tensors, reason):
    with pytest.raises(DataError, match=reason):
        converted(tensors, family)


@pytest.mark.parametrize("target", ["kohya", "ai-toolkit"])
def test_other_formats_that_have_them_come_back_the_same(converted, target):
    tensors = {
        "lycoris_blocks_0_norm2.w_norm": random(H),
        "lycoris_blocks_0_norm2.b_norm": random(H),
        "lycoris_blocks_0_attn1_to_q.diff": random(H, H),
        "lycoris_blocks_0_attn1_to_q.diff_b": random(H),
    }
    assert len(converted(tensors, "wan", target)) == 4


@pytest.mark.parametrize("target", ["diffusers", "peft"])
def test_a_format_for_matrices_alone_refuses_them_by_name(converted, target):
    with pytest.raises(NotExact, match="layout holds changes of matrices alone"):
        converted({**pair("lycoris_blocks_0_attn1_to_q"), "lycoris_blocks_0_norm2.w_norm": random(H)}, "wan", target)


def test_kohyas_layout_refuses_what_is_the_weight_of_no_module(converted):
    with pytest.raises(NotExact, match=r"blocks\.0\.modulation is the weight of no module"):
        converted({"diffusion_model.blocks.0.diff_m": random(1, 6, H)}, "wan", "kohya")


def test_the_lora_of_a_file_with_norms_still_tells_its_family(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = pair("diffusion_model.blocks.0.self_attn.q", 5120, 5120)
    tensors |= {f"diffusion_model.blocks.{n}.norm3.diff": random(5120) for n in range(30)}
    tensors |= {f"diffusion_model.blocks.{n}.self_attn.q.diff_b": random(5120) for n in range(30)}
    write_tensors(path, tensors, {})
    assert detect_dialect(path, plugins().dialects()).read(path).family == "wan"
    assert inspect(path, plugins().dialects()).family == "wan"


def test_inspect_tells_what_comfyui_would_leave_out(tmp_path):
    path = tmp_path / "x.safetensors"
    key = "transformer.transformer_blocks.0.attn"
    tensors = (
        pair(f"{key}.to_q")
        | pair(f"{key}.to_add_out")
        | {
            f"{key}.to_q.diff_b": random(H),
            f"{key}.to_add_out.lora_B.bias": random(H),
            f"{key}.norm_q.b_norm": random(H),
        }
    )
    write_tensors(path, tensors, {FAMILY_KEY: "flux1"})
    verdict = inspect(path, plugins().dialects()).comfyui
    assert set(verdict.skips) == {f"{key}.to_add_out.bias", f"{key}.norm_q.bias"}
    assert any("part of a fused module is left out" in problem for problem in verdict.problems)
