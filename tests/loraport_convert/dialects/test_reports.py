"""Failures that users of LoRA files reported, and what becomes of such a file now."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_reports import report

from loraport.errors import DataError
from loraport.lora.canonical import LoKr
from loraport.lora.dialect import UnknownScale, detect_dialect
from loraport.lora.dora import with_norms
from loraport.lora.stacked import NotExact, Stacked
from loraport.lora.storage import read_tensors, write_tensors
from loraport.plugins import plugins
from loraport_convert.approximation import truncated
from loraport_convert.codec.decode import FAMILY_KEY
from loraport_convert.comfyui import ComfyUI

RNG = np.random.default_rng(0)
H = 12
IDEOGRAM = {FAMILY_KEY: "ideogram4"}


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def pair(key, rows=H, columns=H, rank=2, halves=("lora_A.weight", "lora_B.weight"), alpha=None):
    tensors = {f"{key}.{halves[0]}": random(rank, columns), f"{key}.{halves[1]}": random(rows, rank)}
    return tensors if alpha is None else {**tensors, f"{key}.alpha": np.array(alpha, np.float32)}


def lokr(key, outer=(3, 2), inner=(4, 6), alpha=None):
    tensors = {f"{key}.lokr_w1": random(*outer), f"{key}.lokr_w2": random(*inner)}
    return tensors if alpha is None else {**tensors, f"{key}.alpha": np.array(alpha, np.float32)}


@pytest.fixture
def read(tmp_path):
    def reading(tensors, metadata=None, alpha=()):
        path = tmp_path / "x.safetensors"
        write_tensors(path, tensors, metadata or {})
        dialect = detect_dialect(path, plugins().dialects())
        return dialect.read_with_alpha(path, *alpha) if alpha else dialect.read(path)

    return reading


def change(module):
    return module.scale * module.factors.product()(0, module.factors.shape[0])


def written(lora, tmp_path, dtype=None):
    """What ComfyUI makes of the LoRA after conversion."""
    ComfyUI().write(lora, tmp_path / "comfy.safetensors", dtype, {})
    return ComfyUI().read(tmp_path / "comfy.safetensors")


@report(
    "Comfy-Org/ComfyUI#14477",
    "Nerogar/OneTrainer#1522",
    wrong="Ideogram 4's split `to_q`, `to_k`, `to_v` do not load; renamed by hand, they give rubbish.",
    now="The three become `qkv` at rank 3r, exactly.",
)
def test_split_ideogram_attention_becomes_the_fused_one_at_rank_three_r(read, tmp_path):
    tensors = {}
    for part in ("to_q", "to_k", "to_v"):
        tensors |= pair(f"transformer.layers.0.attention.{part}", rank=2, alpha=8)
    module = written(read(tensors, IDEOGRAM), tmp_path).modules["layers.0.attention.qkv"]
    expected = np.concatenate(
        [
            4
            * tensors[f"transformer.layers.0.attention.to_{part}.lora_B.weight"].astype(np.float64)
            @ tensors[f"transformer.layers.0.attention.to_{part}.lora_A.weight"]
            for part in "qkv"
        ]
    )
    assert (module.factors.rank, module.scale) == (6, 4.0)
    np.testing.assert_allclose(change(module), expected, rtol=1e-6)
    # What hand-made conversions got wrong would be seen.
    for wrong in (expected / 4, expected / 3, np.roll(expected, H, axis=0)):
        assert np.linalg.norm(change(module) - wrong) > 0.3 * np.linalg.norm(expected)


@report(
    "Comfy-Org/ComfyUI#12191",
    wrong="alpha 64 at rank 16 is not in the file; it needs a strength of about 3.",
    now="It stops and asks for the alpha; nothing is taken at 1 in silence.",
)
@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_a_file_that_lost_its_alpha_is_not_taken_at_strength_one(read, metadata):
    tensors = pair("transformer.transformer_blocks.0.img_mlp.net.2", rank=16)
    with pytest.raises(UnknownScale, match=r"rank 16, have no alpha.*\n.*--alpha"):
        read(tensors, metadata)
    assert read(tensors, metadata, alpha=(64.0,)).modules["transformer_blocks.0.img_mlp.net.2"].scale == 4.0
    assert read(tensors, metadata, alpha=(None,)).modules["transformer_blocks.0.img_mlp.net.2"].scale == 1.0


@report(
    "Comfy-Org/ComfyUI#6909",
    wrong="Rank 32 with alpha 1 seems to do nothing.",
    now="The scale stays 1/32, for that is what was trained.",
)
def test_rank_32_with_alpha_1_stays_that_weak(read):
    tensors = pair("lora_unet_double_blocks_0_img_mlp_0", 48, H, 32, ("lora_down.weight", "lora_up.weight"), alpha=1)
    assert read(tensors).modules["double_blocks.0.img_mlp.0"].scale == 1 / 32


@report(
    "huggingface/diffusers#14088",
    wrong="alpha is wrong where ranks differ between modules.",
    now="Alpha and rank patterns and rsLoRA count, for each module.",
)
def test_patterns_of_alpha_and_rank_and_rslora_count(read):
    told = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.rank_pattern": {"layers.0.feed_forward.w2": 2},
        "transformer.alpha_pattern": {"feed_forward.w3": 1},
    }
    tensors = {}
    for part, rank in (("w1", 4), ("w2", 2), ("w3", 4)):
        tensors |= pair(f"transformer.layers.0.feed_forward.{part}", rank=rank)
    for rslora, scales in ((False, (2, 4, 0.25)), (True, (4, 8 / 2**0.5, 0.5))):
        metadata = {"lora_adapter_metadata": json.dumps({**told, "transformer.use_rslora": rslora}), **IDEOGRAM}
        modules = read(tensors, metadata).modules
        found = tuple(modules[f"layers.0.feed_forward.{part}"].scale for part in ("w1", "w2", "w3"))
        assert found == pytest.approx(scales)


@report(
    "Comfy-Org/ComfyUI#15114",
    wrong="A LoKr with two whole factors: one program divides by its alpha, the other does not.",
    now="Its alpha means nothing, also where it is 9999999999; the numbers stay.",
)
@pytest.mark.parametrize("alpha", [1.0, 9999999999.0, np.inf])
def test_alpha_means_nothing_where_both_factors_of_a_lokr_are_whole(read, tmp_path, alpha):
    tensors = lokr("lycoris_layers_0_attention_qkv", (9, 2), (4, 6), alpha=alpha)
    found = read(tensors, IDEOGRAM)
    expected = np.kron(
        *(tensors[f"lycoris_layers_0_attention_qkv.lokr_{name}"].astype(np.float64) for name in ("w1", "w2"))
    )
    np.testing.assert_allclose(change(found.modules["layers.0.attention.qkv"]), expected)
    np.testing.assert_allclose(change(written(found, tmp_path).modules["layers.0.attention.qkv"]), expected)


@report(
    "Comfy-Org/ComfyUI#12938",
    wrong="A `dora_scale` with one axis is applied along the wrong one.",
    now="Read by rows, rescaled with the base to ComfyUI's rule, written as (out, 1).",
)
@pytest.mark.parametrize("shape", [(H,), (H, 1)])
def test_a_dora_magnitude_becomes_what_comfyui_divides_as_it_was_trained(read, tmp_path, shape):
    key = "lora_unet_layers_0_attention_o"
    tensors = pair(key, halves=("lora_down.weight", "lora_up.weight"), alpha=2)
    weight, magnitude = random(H, H), np.abs(random(H)) + 1
    tensors[f"{key}.dora_scale"] = magnitude.reshape(shape)
    module = with_norms(read(tensors, IDEOGRAM).modules["layers.0.attention.o"], weight)
    merged = weight + change(module)
    trained = magnitude[:, None] * merged / np.linalg.norm(merged, axis=1, keepdims=True)
    np.testing.assert_allclose(module.dora.gain()[:, None] * merged, trained, rtol=1e-6)


@report(
    "Comfy-Org/ComfyUI#3494",
    "Comfy-Org/ComfyUI#4259",
    wrong="PEFT's magnitude is not loaded, and the DoRA is applied as a plain LoRA.",
    now="Read, and refused without the base weights that it needs; never dropped.",
)
@pytest.mark.parametrize("ending", ["lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
def test_pefts_magnitude_vector_is_read_and_never_dropped(read, tmp_path, ending):
    tensors = pair("transformer.layers.0.attention.to_out.0", alpha=2)
    tensors[f"transformer.layers.0.attention.to_out.0.{ending}"] = np.ones(H, np.float32)
    found = read(tensors, IDEOGRAM)
    assert found.unread == ()
    module = found.modules["layers.0.attention.o"]
    assert (module.dora.divisor, module.dora.trained.shape) == ("merged", (H,))
    with pytest.raises(DataError, match="base model"):
        written(found, tmp_path)


@report(
    "Comfy-Org/ComfyUI#12452",
    wrong="SDXL: attention under `unet.` does not load.",
    now="Native names, all of it.",
)
@pytest.mark.parametrize("middle", ["attn1.to_q", "attn1.processor.to_q", "attn2.to_out.0"])
def test_sdxl_attention_by_diffusers_names_loads(read, tmp_path, middle):
    tensors = pair(f"unet.down_blocks.1.attentions.0.transformer_blocks.1.{middle}", alpha=2)
    module = middle.replace("processor.", "")
    assert list(written(read(tensors), tmp_path).modules) == [f"input_blocks.4.1.transformer_blocks.1.{module}"]


def test_diffusers_old_attention_processors_load(read):
    """Files of diffusers before PEFT."""
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    tensors = {f"{key}.down.weight": random(2, H), f"{key}.up.weight": random(H, 2)}
    found = read(tensors)
    assert {name: module.scale for name, module in found.modules.items()} == {
        "middle_block.1.transformer_blocks.0.attn1.to_q": 1.0
    }


@report(
    "Comfy-Org/ComfyUI#8285",
    "Comfy-Org/ComfyUI#9043",
    wrong="Wan: LyCORIS files under diffusers' names do not load.",
    now="Native names, all of it.",
)
@pytest.mark.parametrize(
    "prefix", ["lycoris_blocks_3_attn1_to_q", "transformer.blocks.3.attn1.to_q", "lora_unet__blocks_3_self_attn_q"]
)
def test_wan_lokr_by_any_name_loads(read, tmp_path, prefix):
    assert list(written(read(lokr(prefix)), tmp_path).modules) == ["blocks.3.self_attn.q"]


@report(
    "nv-tlabs/ChronoEdit#22",
    "modelscope/DiffSynth-Studio#1117",
    wrong="DiffSynth's keys end in `.default.weight` and have no prefix.",
    now="Both are put right.",
)
def test_a_default_adapter_name_and_a_missing_prefix_are_understood(read, tmp_path):
    tensors = pair("blocks.0.cross_attn.k", halves=("lora_A.default.weight", "lora_B.default.weight"))
    assert list(written(read(tensors, alpha=(None,)), tmp_path).modules) == ["blocks.0.cross_attn.k"]


@report(
    "Comfy-Org/ComfyUI#4347",
    "bghira/SimpleTuner#779",
    wrong="Keys begin with `transformer.base_model.model.`, some twice.",
    now="Wrappers are taken off as often as they are there.",
)
def test_a_doubled_prefix_is_taken_off(read):
    key = "transformer.base_model.model.transformer.base_model.model.single_transformer_blocks.7.proj_out"
    assert list(read(pair(key, alpha=1)).modules) == ["single_blocks.7.linear2"]


@report(
    "Comfy-Org/ComfyUI#9213",
    wrong="Qwen-Image with `lora.up` and `lora.down`.",
    now="Read and written with the usual endings.",
)
def test_qwen_with_the_old_endings_loads(read):
    tensors = pair("transformer_blocks.5.img_mlp.net.2", halves=("lora.down.weight", "lora.up.weight"), alpha=1)
    assert list(read(tensors).modules) == ["transformer_blocks.5.img_mlp.net.2"]


@report(
    "Comfy-Org/ComfyUI#11487",
    "kohya-ss/musubi-tuner#770",
    wrong="Z-Image: `lora_unet_…_attention_to_q` and the like do not load.",
    now="The three become `qkv` at rank 3r, exactly.",
)
@pytest.mark.parametrize("prefix", ["lora_unet_layers_2_attention_{}", "diffusion_model.layers.2.attention.{}"])
def test_split_attention_of_z_image_is_fused(read, tmp_path, prefix):
    tensors = {}
    for part in ("to_q", "to_k", "to_v"):
        key = prefix.format(part)
        tensors |= pair(key, halves=("lora_down.weight", "lora_up.weight"), alpha=2)
    found = written(read(tensors, {FAMILY_KEY: "z-image"}), tmp_path)
    assert {name: module.factors.rank for name, module in found.modules.items()} == {"layers.2.attention.qkv": 6}


@report(
    "ostris/ai-toolkit#538",
    "Comfy-Org/ComfyUI#10973",
    wrong="Z-Image: split attention, with LoKr too, does not load.",
    now="LoRA is exact; of three LoKr it says that no single one is, and offers `--approximate`.",
)
def test_three_lokr_are_not_one_and_that_is_said(read, tmp_path):
    tensors = {}
    for part in ("to_q", "to_k", "to_v"):
        tensors |= lokr(f"diffusion_model.layers.2.attention.{part}")
    module = read(tensors, {FAMILY_KEY: "z-image"}).modules["layers.2.attention.qkv"]
    assert isinstance(module.factors, Stacked)
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        w1, w2 = (tensors[f"diffusion_model.layers.2.attention.{part}.lokr_{name}"] for name in ("w1", "w2"))
        np.testing.assert_allclose(change(module)[number * H : (number + 1) * H], np.kron(w1, w2), rtol=1e-6)
    with pytest.raises(NotExact, match=r"--approximate") as caught:
        written(read(tensors, {FAMILY_KEY: "z-image"}), tmp_path)
    assert caught.value.module == "layers.2.attention.qkv"


def test_the_rank_at_which_a_lora_is_exact_is_told(read, tmp_path):
    tensors = {}
    for part in ("to_q", "to_k", "to_v"):
        key = f"lycoris_layers_2_attention_{part}"
        tensors |= {
            f"{key}.lokr_w1": random(2, 2),
            f"{key}.lokr_w2_a": random(24, 1),
            f"{key}.lokr_w2_b": random(1, 24),
        }
        tensors[f"{key}.alpha"] = np.array(1, np.float32)
    lora = read(tensors, {FAMILY_KEY: "z-image"})
    with pytest.raises(NotExact, match="LoRA of rank 6 is exact"):
        written(lora, tmp_path)
    module = lora.modules["layers.2.attention.qkv"]
    assert truncated(module, 6).loss.difference < 1e-6 < truncated(module, 5).loss.difference


def test_lokr_that_share_their_second_factor_stay_one_lokr(read):
    tensors = {}
    for part in ("to_q", "to_k", "to_v"):
        tensors |= lokr(f"diffusion_model.layers.2.attention.{part}")
        tensors[f"diffusion_model.layers.2.attention.{part}.lokr_w2"] = np.ones((4, 6), np.float32)
    module = read(tensors, {FAMILY_KEY: "z-image"}).modules["layers.2.attention.qkv"]
    assert isinstance(module.factors, LoKr)
    assert module.factors.w1.shape == (9, 2)


@report(
    "bghira/SimpleTuner#3222",
    "Comfy-Org/ComfyUI#16234",
    wrong="Krea 2: a LoKr with DoRA on `to_qkv`, for which ComfyUI has no place.",
    now="Split into `wq`, `wk`, `wv`, exactly, with its scales.",
)
def test_a_fused_lokr_with_dora_of_krea_2_is_split_into_three_modules(read):
    key = "lycoris_transformer_blocks_0_attn_to_qkv"
    tensors = {**lokr(key, (6, 2), (4, 6)), f"{key}.dora_scale": np.arange(1, 25, dtype=np.float32)[:, None]}
    found = read(tensors)
    whole = np.kron(tensors[f"{key}.lokr_w1"], tensors[f"{key}.lokr_w2"])
    for name, start, stop in (("wq", 0, 16), ("wk", 16, 20), ("wv", 20, 24)):
        module = found.modules[f"blocks.0.attn.{name}"]
        assert isinstance(module.factors, LoKr)
        np.testing.assert_allclose(change(module), whole[start:stop], rtol=1e-6)
        np.testing.assert_array_equal(module.dora.trained, np.arange(start + 1, stop + 1))


@report(
    "bghira/SimpleTuner#2439",
    "Comfy-Org/ComfyUI#11926",
    wrong="FLUX.2: keys under diffusers' names are missing in ComfyUI.",
    now="Native names, the seven modules that the blocks share too.",
)
def test_flux_2_lokr_finds_the_modules_that_comfyui_has_no_diffusers_name_for(read):
    names = {
        "double_stream_modulation_img_linear": "double_stream_modulation_img.lin",
        "single_stream_modulation_linear": "single_stream_modulation.lin",
        "time_guidance_embed_guidance_embedder_linear_2": "guidance_in.out_layer",
        "single_transformer_blocks_3_attn_to_qkv_mlp_proj": "single_blocks.3.linear1",
        "transformer_blocks_1_ff_linear_in": "double_blocks.1.img_mlp.0",
    }
    tensors = {}
    for name in names:
        tensors |= lokr(f"lycoris_{name}")
    assert set(read(tensors).modules) == set(names.values())


def both_names(disagree):
    """A Z-Image file that holds its fused attention and the same once more, split."""
    native = pair("lora_unet_layers_0_attention_qkv", 3 * H, H, 2, ("lora_down.weight", "lora_up.weight"), alpha=2)
    tensors = dict(native)
    for number, part in enumerate("qkv"):
        key = f"lora_unet_layers_0_attention_to_{part}"
        up = native["lora_unet_layers_0_attention_qkv.lora_up.weight"][number * H : (number + 1) * H]
        tensors |= {
            f"{key}.lora_up.weight": up * (2 if disagree else 1),
            f"{key}.lora_down.weight": native["lora_unet_layers_0_attention_qkv.lora_down.weight"],
            f"{key}.alpha": np.array(2, np.float32),
        }
    return tensors


@report(
    "huggingface/diffusers#13203",
    wrong="One file holds both `qkv` and `to_q`, `to_k`, `to_v`.",
    now="It counts once where the two agree, and is refused where they do not.",
)
def test_a_module_under_two_names_that_agree_counts_once(read):
    tensors = both_names(disagree=False)
    module = read(tensors, {FAMILY_KEY: "z-image"}).modules["layers.0.attention.qkv"]
    native = "lora_unet_layers_0_attention_qkv"
    up, down = tensors[f"{native}.lora_up.weight"].astype(np.float64), tensors[f"{native}.lora_down.weight"]
    np.testing.assert_allclose(change(module), up @ down)


def test_a_module_under_two_names_that_disagree_is_refused(read):
    found = read(both_names(disagree=True), {FAMILY_KEY: "z-image"})
    with pytest.raises(DataError, match="two names"):
        found.modules["layers.0.attention.qkv"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["lora_te_text_model_encoder_layers_3_mlp_fc1"], "clip_l"),
        (["lora_te2_text_model_encoder_layers_3_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"], "clip_g"),
        (["text_encoder_2.text_model.encoder.layers.3.mlp.fc1"], "clip_g"),
        (["text_encoder_2.encoder.layers.3.mlp.fc1"], "clip_g"),
        (["text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc1"], "clip_g"),
    ],
)
def test_text_encoders_get_comfyuis_full_names(read, tmp_path, keys, expected):
    tensors = {}
    for key in keys:
        tensors |= pair(key, halves=("lora_down.weight", "lora_up.weight"), alpha=2)
    found = written(read(tensors), tmp_path)
    assert f"text_encoders.{expected}.transformer.text_model.encoder.layers.3.mlp.fc1" in found.modules
    assert found.unread == ()


def test_keys_of_a_part_that_the_family_does_not_have_are_reported(read):
    tensors = pair("transformer.layers.0.feed_forward.w1", alpha=1) | pair("transformer.layers.0.unheard.of", alpha=1)
    assert len(read(tensors, IDEOGRAM).unread) == 3


@pytest.mark.parametrize("odd", ["oft_R", "lokr_t1", "on_input"])
def test_kinds_that_cannot_be_read_are_refused_by_name(read, odd):
    key = "diffusion_model.layers.0.attention.o"
    with pytest.raises(DataError, match=odd):
        read({**pair(key), f"{key}.{odd}": random(2, 2)})


def test_a_dora_on_q_alone_is_refused_and_not_flattened(read):
    tensors = pair("transformer.layers.0.attention.to_q", alpha=2) | pair(
        "transformer.layers.0.attention.to_k", alpha=2
    )
    tensors["transformer.layers.0.attention.to_q.lora_magnitude_vector"] = np.ones(H, np.float32)
    found = read(tensors, IDEOGRAM)
    with pytest.raises(DataError, match="in some of its rows only"):
        found.modules["layers.0.attention.qkv"]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_any_cut_of_a_lokr_and_any_stack_of_loha_is_exact(blocks, rows, columns, rank, data):
    from loraport.lora.canonical import LoHa
    from loraport.lora.stacked import Part
    from loraport_convert.codec.rows import cut, fuse

    factors = LoKr(w1=random(blocks, 2), w2_a=random(rows, rank), w2_b=random(rank, columns))
    whole = factors.product()(0, blocks * rows)
    start = data.draw(st.integers(0, blocks * rows - 1))
    stop = data.draw(st.integers(start + 1, blocks * rows))
    pieces, scale = fuse(cut(Part(0, factors, 2.0), start, stop, 0), stop - start)
    np.testing.assert_allclose(scale * pieces.product()(0, stop - start), 2 * whole[start:stop])

    lohas = [LoHa(random(rows, r), random(r, 5), random(rows, rank), random(rank, 5)) for r in (rank, 1)]
    parts = [Part(rows * (2 - 2 * number), loha, 1.0 + number) for number, loha in enumerate(lohas)]
    fused, scale = fuse(parts, 3 * rows)
    assert isinstance(fused, LoHa)
    expected = np.zeros((3 * rows, 5))
    for part in parts:
        expected[part.start : part.stop] = part.scale * part.factors.product()(0, rows)
    np.testing.assert_allclose(scale * fused.product()(0, 3 * rows), expected, atol=1e-6)


def test_a_convolution_keeps_its_kernel(read, tmp_path):
    key = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {
        f"{key}.lora_down.weight": random(2, 4, 3, 3),
        f"{key}.lora_up.weight": random(8, 2, 1, 1),
        f"{key}.alpha": np.array(1, np.float32),
    }
    found = written(read(tensors, {FAMILY_KEY: "sd15"}), tmp_path)
    assert found.modules["input_blocks.1.0.in_layers.2"].factors.shape == (8, 36)
    stored = read_tensors(tmp_path / "comfy.safetensors")
    assert stored["diffusion_model.input_blocks.1.0.in_layers.2.lora_down.weight"].shape == (2, 4, 3, 3)
