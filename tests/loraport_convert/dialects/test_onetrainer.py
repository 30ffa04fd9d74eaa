"""OneTrainer's three formats, written here after the facts of its files: it is AGPL, and nothing of it is used."""

import numpy as np
import pytest

from loraport.errors import DataError
from loraport.lora.canonical import ColumnScale
from loraport.lora.dialect import UnknownScale, detect_dialect
from loraport.lora.storage import read_tensors, write_tensors
from loraport.plugins import plugins

H, ALPHA, RANK = 24, 1.0, 4
OUT = "transformer_blocks.0.attn.to_add_out"
QKV = [f"transformer_blocks.0.attn.to_{each}" for each in "qkv"]
NATIVE = {OUT: "double_blocks.0.txt_attn.proj", QKV[0]: "double_blocks.0.img_attn.qkv"}
OWN = {"ot_branch": "master", "ot_revision": "0", "loraport.family": "flux1"}


def factors(name):
    rng = np.random.default_rng(sum(map(ord, name)))
    return rng.standard_normal((RANK, H)).astype(np.float32), rng.standard_normal((H, RANK)).astype(np.float32)


def tensors(form, names):
    """`legacy`: underscores and alpha. `comfy`: ComfyUI's names, alpha. `diffusers`: alpha multiplied into B."""
    found = {}
    for name in names:
        down, up = factors(name)
        if form == "legacy":
            key = "lora_transformer_" + name.replace(".", "_")
            pair = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.array(ALPHA, np.float32)}
        elif form == "comfy":
            key = f"diffusion_model.{NATIVE[name]}"
            pair = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.array(ALPHA, np.float32)}
        else:
            key = f"transformer.{name}"
            pair = {"lora_A.weight": down, "lora_B.weight": up * np.float32(ALPHA / RANK)}
        found |= {f"{key}.{end}": array for end, array in pair.items()}
    return found


def read(path):
    dialect = detect_dialect(path, plugins().dialects())
    return dialect.name, dialect.read(path)


@pytest.mark.parametrize("form", ["legacy", "comfy", "diffusers"])
def test_each_format_means_the_same_change(tmp_path, form):
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors(form, [OUT]), OWN)
    _, lora = read(path)
    down, up = (array.astype(np.float64) for array in factors(OUT))
    module = lora.modules[NATIVE[OUT]]
    np.testing.assert_allclose(module.scale * module.factors.product()(0, H), ALPHA / RANK * up @ down, rtol=1e-6)
    assert (lora.unread, list(lora.modules)) == ((), [NATIVE[OUT]])


def test_only_its_own_metadata_say_that_alpha_is_in_the_factors(tmp_path):
    write_tensors(tmp_path / "x.safetensors", tensors("diffusers", [OUT]), {"loraport.family": "flux1"})
    with pytest.raises(UnknownScale):
        read(tmp_path / "x.safetensors")


def test_split_attention_is_fused_at_three_times_the_rank_which_it_refuses_itself(tmp_path):
    write_tensors(tmp_path / "x.safetensors", tensors("legacy", QKV), OWN)
    name, lora = read(tmp_path / "x.safetensors")
    module = lora.modules[NATIVE[QKV[0]]]
    changes = [ALPHA / RANK * up.astype(np.float64) @ down for down, up in map(factors, QKV)]
    assert (name, module.factors.rank) == ("onetrainer", 3 * RANK)
    np.testing.assert_allclose(module.scale * module.factors.product()(0, 3 * H), np.concatenate(changes), rtol=1e-6)


def test_its_dora_by_column_goes_to_comfyui_without_the_base_and_is_refused_where_it_would_be_fused(tmp_path):
    path, dialects = tmp_path / "x.safetensors", plugins().dialects()
    scale = np.arange(1, H + 1, dtype=np.float32)[None, :]
    write_tensors(path, tensors("legacy", [OUT]) | {f"{legacy(OUT)}.dora_scale": scale}, OWN)
    _, lora = read(path)
    assert isinstance(lora.modules[NATIVE[OUT]].dora, ColumnScale)
    dialects["comfyui"].write(lora, tmp_path / "comfy.safetensors", None, {})
    written = read_tensors(tmp_path / "comfy.safetensors")
    np.testing.assert_array_equal(written[f"diffusion_model.{NATIVE[OUT]}.dora_scale"], scale)
    write_tensors(path, tensors("legacy", QKV) | {f"{legacy(each)}.dora_scale": scale for each in QKV}, OWN)
    _, lora = read(path)
    with pytest.raises(DataError, match="by column"):
        dialects["comfyui"].write(lora, tmp_path / "comfy.safetensors", None, {})


def legacy(name):
    return "lora_transformer_" + name.replace(".", "_")
