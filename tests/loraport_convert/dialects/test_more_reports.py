"""More failures that users of LoRA files reported: keys of other programs, kinds of adapters, and alphas on the way."""

import json

import numpy as np
import pytest
from lora_reports import report

from loraport.errors import DataError
from loraport.lora.canonical import ColumnScale, RowScale
from loraport.lora.dialect import UnknownScale, detect_dialect
from loraport.lora.stacked import NotExact
from loraport.lora.storage import read_tensors, write_tensors
from loraport.plugins import plugins
from loraport_convert.codec.decode import FAMILY_KEY
from loraport_convert.inspection import inspect
from loraport_convert.merging import Ingredient, merged
from loraport_convert.publishing import Target, publish
from loraport_convert.reading import expression_of, only, read_lora

RNG = np.random.default_rng(0)
H = 12
UP_DOWN, B_A = ("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def pair(key, endings=UP_DOWN, rows=H, columns=H, rank=2, alpha=None):
    up, down = endings
    tensors = {f"{key}.{up}": random(rows, rank), f"{key}.{down}": random(rank, columns)}
    return tensors if alpha is None else {**tensors, f"{key}.alpha": np.array(alpha, np.float32)}


@pytest.fixture
def file(tmp_path):
    def make(tensors, family=None, name="x.safetensors"):
        path = tmp_path / name
        write_tensors(path, tensors, {FAMILY_KEY: family} if family else {})
        return path

    return make


@pytest.fixture
def converted(tmp_path, file):
    """What is written for ComfyUI (or another), by key, with the proof that came with it."""

    def convert(tensors, family=None, to="comfyui", pattern=None, **target):
        found = read_lora(file(tensors, family), plugins().dialects())
        lora = found.lora if pattern is None else only(found.lora, pattern)
        place = tmp_path / "converted.safetensors"
        published = publish(lora, Target(place, plugins().dialects()[to], overwrite=True, **target), [found.path])
        return dict(read_tensors(place)), published

    return convert


def names(tensors):
    """The modules of the written keys."""
    return {key.removeprefix("diffusion_model.").partition(".lora_")[0].removesuffix(".alpha") for key in tensors}


@report(
    "Comfy-Org/ComfyUI#3319",
    "Comfy-Org/ComfyUI#6157",
    wrong="LyCORIS' OFT and BOFT, of text encoders too, are not loaded.",
    now="Kept bit for bit under the names where ComfyUI reads them.",
)
@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 3, 4, 4)])
def test_ofts_and_bofts_of_lycoris_keep_their_numbers(converted, shape):
    tensors = {
        f"{key}.{end}": array
        for key in ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_mid_block_attentions_0_proj_in")
        for end, array in {"oft_blocks": random(*shape), "alpha": np.zeros((), np.float32)}.items()
    }
    found, _ = converted(tensors, "sdxl")
    places = (
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
        "diffusion_model.middle_block.1.proj_in",
    )
    for place, (key, array) in zip(places, [each for each in tensors.items() if "blocks" in each[0]], strict=True):
        assert found[f"{place}.oft_blocks"].tobytes() == array.tobytes(), key


@report(
    "Comfy-Org/ComfyUI#6381",
    wrong="An IA³ (`on_input`) is not loaded.",
    now="Refused by its name: ComfyUI has no form for it.",
)
def test_an_ia3_is_refused_by_name(converted):
    key = "lora_unet_up_blocks_2_attentions_2_transformer_blocks_0_attn1_to_v"
    with pytest.raises(DataError, match="an IA³, which ComfyUI does not read"):
        converted({f"{key}.on_input": np.array(True), f"{key}.weight": random(H)}, "sd15")


@report(
    "Nerogar/OneTrainer#885",
    wrong="SDXL: ComfyUI's own module names stand under `unet.`, and nothing loads.",
    now="Only the prefix is changed; a DoRA is rescaled with the base.",
)
def test_native_names_under_unet_load(converted):
    tensors = pair("unet.output_blocks.5.1.transformer_blocks.1.ff.net.2", alpha=1)
    tensors |= pair("unet.output_blocks.1.1.transformer_blocks.5.attn1.to_v", alpha=1)
    found, _ = converted(tensors, "sdxl")
    assert names(found) == {
        "output_blocks.5.1.transformer_blocks.1.ff.net.2",
        "output_blocks.1.1.transformer_blocks.5.attn1.to_v",
    }


@report(
    "Comfy-Org/ComfyUI#5417",
    wrong="SD 3.5 medium: SimpleTuner's LoKr on `attn2` does not load.",
    now="With `--approximate diff` the three become one whole change; without it, it says why.",
)
def test_three_lokr_of_sd_3_5_become_one_whole_change_where_asked(converted):
    tensors, whole = {}, []
    for part in "qkv":
        key = f"lycoris_transformer_blocks_3_attn2_to_{part}"
        tensors |= {f"{key}.lokr_w1": random(3, 2), f"{key}.lokr_w2": random(4, 6), f"{key}.alpha": np.array(1e10)}
        whole.append(np.kron(tensors[f"{key}.lokr_w1"], tensors[f"{key}.lokr_w2"]))
    with pytest.raises(NotExact, match="--approximate diff"):
        converted(tensors, "sd3")
    found, _ = converted(tensors, "sd3", approximate="diff")
    np.testing.assert_allclose(
        found["diffusion_model.joint_blocks.3.x_block.attn2.qkv.diff"], np.concatenate(whole), rtol=1e-6
    )


@report(
    "kohya-ss/musubi-tuner#26",
    wrong="HunyuanVideo: `lora_unet_double_blocks_0_img_mlp_fc1` and the like do not load.",
    now="Refused: a model that LoraPort does not know, and underscores do not tell its names.",
)
def test_names_with_underscores_of_an_unknown_model_are_refused(converted):
    tensors = pair("lora_unet_double_blocks_0_img_mlp_fc1", alpha=1) | pair(
        "lora_unet_double_blocks_0_img_mlp_fc2", alpha=1
    )
    with pytest.raises(DataError, match=r"underscores for dots.*no family"):
        converted(tensors)


@report(
    "larsupb/LoRA-Merger-ComfyUI#17",
    wrong="Merged LoRAs without alpha are saved with alpha 1, at a fraction of their strength.",
    now="`merge` keeps each one's scale, and the proof compares the sum.",
)
def test_merging_files_without_alpha_keeps_their_strength(file):
    key = "diffusion_model.double_blocks.0.txt_attn.proj"
    tensors = [pair(key, B_A, rank=rank) for rank in (2, 4)]
    dialects = plugins().dialects()
    read = [
        Ingredient(path, read_lora(path, dialects).lora, strength)
        for path, strength in [(file(each, "flux1", f"{n}.safetensors"), 0.5 + n) for n, each in enumerate(tensors)]
    ]
    module = merged(read).modules["double_blocks.0.txt_attn.proj"]
    expected = sum(
        (0.5 + n) * each[f"{key}.lora_B.weight"] @ each[f"{key}.lora_A.weight"] for n, each in enumerate(tensors)
    )
    np.testing.assert_allclose(module.scale * module.factors.product()(0, H), expected, rtol=1e-4, atol=1e-5)


@report(
    "huggingface/diffusers#11675",
    "black-forest-labs/flux#473",
    wrong="Keys hold the name of PEFT's adapter: `lora_A.default_0.weight`, `lora_A.lora_1.weight`.",
    now="The name is taken off; several adapters in one file are refused.",
)
@pytest.mark.parametrize("adapter", ["default_0", "lora_1"])
def test_the_name_of_an_adapter_is_taken_off(file, converted, adapter):
    key = "transformer.single_transformer_blocks.0.proj_out"
    one = pair(key, (f"lora_B.{adapter}.weight", f"lora_A.{adapter}.weight"), alpha=4)
    assert inspect(file(one, "flux1"), plugins().dialects()).comfyui.skips == (key,)
    found, _ = converted(one, "flux1")
    assert names(found) == {"single_blocks.0.linear2"}
    np.testing.assert_array_equal(
        found["diffusion_model.single_blocks.0.linear2.lora_up.weight"], one[f"{key}.lora_B.{adapter}.weight"]
    )
    with pytest.raises(DataError, match=r"several adapters for the module .*proj_out"):
        converted({**one, **pair(key, ("lora_B.other.weight", "lora_A.other.weight"))}, "flux1")


@report(
    "ostris/ai-toolkit#801",
    "huggingface/diffusers#13249",
    wrong="Z-Image: diffusers stops at the alpha of a module that has none while others have one.",
    now="Each module's own: alpha / rank with an alpha, 1 without; `--to diffusers` tells all of them.",
)
def test_modules_with_and_without_alpha_in_one_file_keep_each_its_own(file, converted, tmp_path):
    tensors = pair("diffusion_model.layers.0.adaLN_modulation.0", B_A)
    tensors |= pair("diffusion_model.layers.0.feed_forward.w1", B_A, alpha=8)
    modules = read_lora(file(tensors, "z-image"), plugins().dialects()).lora.modules
    assert {name: module.scale for name, module in modules.items()} == {
        "layers.0.adaLN_modulation.0": 1.0,
        "layers.0.feed_forward.w1": 4.0,
    }
    converted(tensors, "z-image", to="diffusers")
    told = json.loads(read_tensors(tmp_path / "converted.safetensors").metadata["lora_adapter_metadata"])
    alphas = {told["transformer.lora_alpha"], *told["transformer.alpha_pattern"].values()}
    assert (told["transformer.r"], alphas) == (2, {2, 8})


@report(
    "kohya-ss/musubi-tuner#905",
    wrong="FLUX.2 klein: a conversion writes `double_blocks.0.img_attn_qkv`, which does not load.",
    now="Understood as `img_attn.qkv`.",
)
@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_attention_with_an_underscore_loads(converted, family):
    tensors = {}
    for part in ("img_attn", "txt_attn"):
        tensors |= pair(f"diffusion_model.double_blocks.0.{part}_qkv", B_A, rows=3 * H)
        tensors |= pair(f"diffusion_model.double_blocks.0.{part}_proj", B_A)
    found, _ = converted(tensors, family)
    assert names(found) == {
        f"double_blocks.0.{part}.{each}" for part in ("img_attn", "txt_attn") for each in ("qkv", "proj")
    }


@report(
    "kijai/ComfyUI-WanVideoWrapper#869",
    wrong="Wan: half of the dots are underscores, as in `lora_unet_blocks_22.self_attn.k`.",
    now="Understood.",
)
def test_names_with_dots_and_underscores_load(converted):
    tensors = pair("lora_unet_blocks_22.self_attn.k", alpha=2) | pair("lora_unet_blocks_23.cross_attn.o", alpha=2)
    found, _ = converted(tensors, "wan")
    assert names(found) == {"blocks.22.self_attn.k", "blocks.23.cross_attn.o"}


@report(
    "Nerogar/OneTrainer#485",
    wrong="An embedding that is bundled with the LoRA (`bundle_emb`) is not loaded.",
    now="It stops and names the keys; with `--ignore 'bundle_emb.*'` they are left out, and the proof says so.",
)
def test_a_bundled_embedding_is_lost_only_where_asked(converted, tmp_path):
    tensors = pair("lora_unet_input_blocks_4_1_proj_in", alpha=2)
    tensors["bundle_emb.my token.clip_l"] = random(1, 768)
    with pytest.raises(DataError, match=r"bundle_emb\.my token\.clip_l.*\n.*--ignore"):
        converted(tensors, "sdxl")
    found, published = converted(tensors, "sdxl", ignore=expression_of("--ignore", "bundle_emb.*"))
    assert names(found) == {"input_blocks.4.1.proj_in"}
    assert published.ignored == ("bundle_emb.my token.clip_l",)
    assert json.loads((tmp_path / "converted.proof.json").read_text())["ignored"] == ["bundle_emb.my token.clip_l"]


@report(
    "Comfy-Org/ComfyUI#10222",
    "kijai/ComfyUI-WanVideoWrapper#1862",
    wrong="Wan: `k_img`, `v_img` and `norm_k_img` of an image-to-video LoRA are not loaded by a text-to-video model.",
    now="All of them convert for the model that has them; `--only` takes out the rest for the other.",
)
def test_a_lora_of_wans_image_model_is_whole_or_without_what_the_text_model_lacks(converted):
    block = "diffusion_model.blocks.25.cross_attn"
    tensors = pair(f"{block}.k_img", alpha=2) | pair(f"{block}.q", alpha=2)
    tensors |= {f"{block}.k_img.diff_b": random(H), f"{block}.norm_k_img.diff": random(H)}
    found, _ = converted(tensors, "wan")
    assert set(found) == set(tensors)
    found, _ = converted(tensors, "wan", pattern=r"(?!.*_img).*")
    assert names(found) == {"blocks.25.cross_attn.q"}


@report(
    "huggingface/diffusers#10860",
    wrong="Stable Diffusion 1.5: `unet.….to_k.lora.down.weight` of diffusers' script is not loaded.",
    now="Native names.",
)
def test_the_old_endings_of_diffusers_script_load(converted):
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    found, _ = converted(pair(key, ("lora.up.weight", "lora.down.weight")), "sd15")
    assert names(found) == {"input_blocks.1.1.transformer_blocks.0.attn1.to_out.0"}


@report(
    "huggingface/diffusers#14005",
    wrong="`conv_in`, `conv_out` and `time_embedding` of a file of kohya's are not applied by diffusers.",
    now="`--to diffusers` names them as diffusers does.",
)
def test_the_ends_of_the_unet_get_diffusers_names(converted):
    tensors = pair("lora_unet_conv_in", alpha=2, columns=4) | pair("lora_unet_time_embedding_linear_1", alpha=2)
    found, _ = converted(tensors, "sd15", to="diffusers")
    assert {key.partition(".lora_")[0] for key in found} == {"unet.conv_in", "unet.time_embedding.linear_1"}


@report(
    "Comfy-Org/ComfyUI#3701",
    wrong="SD 3: OneTrainer's text encoders, T5 (`lora_te3_`) and the projections among them, are not loaded.",
    now="All three get ComfyUI's full names.",
)
def test_the_three_text_encoders_of_sd_3_load(converted):
    tensors = pair("lora_te3_encoder_block_0_layer_0_SelfAttention_k", alpha=2)
    tensors |= pair("lora_te2_text_projection", alpha=2) | pair("lora_te1_text_projection", alpha=2)
    found, _ = converted(tensors, "sd3")
    assert names(found) == {
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.k",
        "text_encoders.clip_g.transformer.text_projection",
        "text_encoders.clip_l.transformer.text_projection",
    }


@report(
    "KohakuBlueleaf/LyCORIS#246",
    "Comfy-Org/ComfyUI#15458",
    wrong="LoHa and LoKr with a DoRA by row give noise: ComfyUI divides by other norms than LyCORIS.",
    now="By row it is rescaled with the base weights, or refused without them; by column it stays as it is.",
)
@pytest.mark.parametrize("kind", ["hada", "lokr"])
def test_a_dora_by_row_needs_the_base_and_one_by_column_does_not(file, converted, kind):
    key = "lora_unet_input_blocks_4_1_proj_in"
    loha = {"w1_a": (H, 2), "w1_b": (2, H), "w2_a": (H, 2), "w2_b": (2, H)}
    parts = loha if kind == "hada" else {"w1": (3, 2), "w2": (4, 6)}
    tensors = {f"{key}.{kind}_{name}": random(*shape) for name, shape in parts.items()}
    tensors[f"{key}.alpha"] = np.array(2, np.float32)
    for shape, meant in (((H, 1), RowScale), ((1, H), ColumnScale)):
        scaled = {**tensors, f"{key}.dora_scale": np.ones(shape, np.float32)}
        (module,) = read_lora(file(scaled, "sdxl"), plugins().dialects()).lora.modules.values()
        assert isinstance(module.dora, meant)
        if meant is RowScale:
            with pytest.raises(DataError, match="--base"):
                converted(scaled, "sdxl")
        else:
            found, _ = converted(scaled, "sdxl")
            assert found["diffusion_model.input_blocks.4.1.proj_in.dora_scale"].shape == (1, H)


@report(
    "Comfy-Org/ComfyUI#5868",
    wrong="FLUX.1's control LoRAs widen `img_in`: `shape '[3072, 64]' is invalid`, and it is left out.",
    now="`reshape_weight` tells ComfyUI the new shape; biases and replaced norms of such files go along.",
)
@pytest.mark.parametrize("written_by", ["diffusers", "the makers of FLUX.1"])
def test_a_control_lora_tells_that_img_in_gets_wider(file, converted, written_by):
    own = written_by != "diffusers"
    tensors = pair("img_in" if own else "transformer.x_embedder", B_A, columns=128, alpha=2)
    tensors[f"{'img_in' if own else 'transformer.x_embedder'}.lora_B.bias"] = random(H)
    if own:
        tensors["single_blocks.0.norm.key_norm.scale"] = random(H)
    verdict = inspect(file(tensors, "flux1"), plugins().dialects()).comfyui
    assert verdict.fine == own
    assert own or any("more inputs" in problem for problem in verdict.problems)
    found, _ = converted(tensors, "flux1")
    key = "diffusion_model.img_in"
    assert found[f"{key}.reshape_weight"].tolist() == [H, 128]
    assert found[f"{key}.diff_b"].shape == (H,)
    assert f"{key}.lora_down.weight" in found
    assert ("diffusion_model.single_blocks.0.norm.key_norm.set_weight" in found) == own
    again, _ = converted(found, "flux1")
    assert {name: array.tobytes() for name, array in again.items()} == {
        name: array.tobytes() for name, array in found.items()
    }
    usual, _ = converted(pair("transformer.x_embedder", B_A, columns=64, alpha=2), "flux1")
    assert f"{key}.reshape_weight" not in usual


def test_a_weight_that_grows_elsewhere_is_refused(converted):
    key = "diffusion_model.layers.0.attention.o"
    for wrong in ([H, H], [H, 2 * H]):
        with pytest.raises(DataError, match="makes a weight larger"):
            converted({**pair(key, alpha=1), f"{key}.reshape_weight": np.array(wrong)}, "ideogram4")
    with pytest.raises(DataError, match="makes a weight larger"):
        converted(
            {**pair("diffusion_model.img_in", alpha=1), "diffusion_model.img_in.reshape_weight": np.array([4, 4])},
            "flux1",
        )
    odd = {"diffusion_model.img_in.reshape_weight": np.full(2, np.nan)}
    with pytest.raises(DataError, match="makes a weight larger"):
        converted({**pair("diffusion_model.img_in", alpha=1), **odd}, "flux1")
    with pytest.raises(DataError, match="two numbers"):
        converted({**pair(key, alpha=1), f"{key}.reshape_weight": np.ones(3)}, "ideogram4")


@report(
    "huggingface/diffusers#6087",
    wrong="diffusers before 0.34 saves no alpha: trained with 8, loaded with another.",
    now="It stops and asks; `--alpha 8` is then what counts.",
)
def test_pefts_keys_without_metadata_do_not_load_at_strength_one(file):
    tensors = pair("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", B_A, rank=4)
    path, dialects = file(tensors, "sdxl"), plugins().dialects()
    with pytest.raises(UnknownScale, match="rank 4"):
        detect_dialect(path, dialects).read(path)
    (module,) = detect_dialect(path, dialects).read_with_alpha(path, 8.0).modules.values()
    assert module.scale == 2.0


@report(
    "kohya-ss/musubi-tuner#444",
    wrong="Qwen-Image: converted for diffusers, the LoRA is weaker than it was.",
    now="The alphas go along in `lora_adapter_metadata`; diffusers and PEFT themselves apply the trained scale.",
)
def test_diffusers_applies_the_scale_of_a_converted_lora(converted, tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 8}
    model = diffusers.QwenImageTransformer2DModel(**sizes, in_channels=16, out_channels=4, axes_dims_rope=(4, 6, 6))
    key = "lora_unet_transformer_blocks_0_attn_to_q"
    tensors = pair(key, rows=32, columns=32, alpha=8) | pair(
        "lora_unet_transformer_blocks_0_attn_to_k", rows=32, columns=32, alpha=1
    )
    converted(tensors, "qwen-image", to="diffusers")
    from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin

    state, metadata = QwenImageLoraLoaderMixin.lora_state_dict(
        str(tmp_path), weight_name="converted.safetensors", return_lora_metadata=True
    )
    model.load_lora_adapter(state, metadata=metadata, prefix="transformer")
    layer = model.transformer_blocks[0].attn
    assert (layer.to_q.scaling["default_0"], layer.to_k.scaling["default_0"]) == (4.0, 0.5)
    with torch.no_grad():
        change = layer.to_q.get_delta_weight("default_0").numpy()
    expected = 4 * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    np.testing.assert_allclose(change, expected, rtol=1e-4, atol=1e-4)
