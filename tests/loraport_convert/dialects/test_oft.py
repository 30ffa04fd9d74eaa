"""OFT on attention that is split in one model and fused in the other, against LyCORIS' own forward pass and sd-scripts'
rule."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lora_reports import report

from loraport.errors import DataError
from loraport.lora.dialect import detect_dialect
from loraport.lora.proof import prove
from loraport.lora.storage import read_tensors, write_tensors
from loraport.plugins import plugins
from loraport_convert.codec.decode import FAMILY_KEY

RNG = np.random.default_rng(0)
H = 16


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture
def converted(tmp_path):
    """The tensors that are written for ComfyUI."""

    def convert(tensors, family="flux1"):
        path, dialects = tmp_path / "x.safetensors", plugins().dialects()
        write_tensors(path, tensors, {FAMILY_KEY: family})
        lora = detect_dialect(path, dialects).read(path)
        assert lora.unread == ()
        dialects["comfyui"].write(lora, tmp_path / "comfy.safetensors", None, {})
        assert prove(lora, dialects["comfyui"].read(tmp_path / "comfy.safetensors")).ok
        return dict(read_tensors(tmp_path / "comfy.safetensors"))

    return convert


def turned(weight, blocks):
    """What ComfyUI makes of a weight: each block of rows turned by the Cayley transform."""
    numbers = blocks.astype(np.float64)
    skew = numbers - numbers.transpose(0, 2, 1)
    one = np.eye(blocks.shape[1])
    turns = (one + skew) @ np.linalg.inv(one - skew)
    rows = weight.astype(np.float64).reshape(*blocks.shape[:2], -1)
    return np.einsum("knm,knc->kmc", turns, rows).reshape(weight.shape)


@pytest.mark.parametrize("constraint", [0, 0.01])
def test_three_ofts_of_lycoris_turn_the_fused_attention_as_they_turn_q_k_and_v(converted, constraint):
    torch = pytest.importorskip("torch")
    oft = pytest.importorskip("lycoris.modules.diag_oft").DiagOFTModule
    torch.manual_seed(0)
    tensors, weights, point, expected = {}, [], torch.randn(5, H), []
    for part, dim in (("q", 4), ("k", 4), ("v", 8)):
        layer = torch.nn.Linear(H, H, bias=False)
        weights.append(layer.weight.detach().numpy().copy())
        module = oft("x", layer, 1.0, dim, constraint=constraint)
        module.apply_to()
        torch.nn.init.normal_(module.oft_blocks, std=0.5)
        with torch.no_grad():
            expected.append(layer(point))
        key = f"lycoris_transformer_blocks_0_attn_to_{part}"
        stored = {name: each.detach().numpy() for name, each in module.state_dict().items()}
        tensors |= {f"{key}.{name}": array for name, array in stored.items()}
    found = converted(tensors)
    (name,) = found
    assert name == "diffusion_model.double_blocks.0.img_attn.qkv.oft_blocks"
    after = turned(np.concatenate(weights), found[name])
    np.testing.assert_allclose(point.numpy() @ after.T, torch.cat(expected, dim=1).numpy(), atol=1e-4)


def test_a_part_that_was_not_trained_is_not_turned(converted):
    tensors = {f"lycoris_transformer_blocks_0_attn_to_{part}.oft_blocks": random(4, 4, 4) for part in "qv"}
    (blocks,) = converted(tensors).values()
    weight = random(3 * H, H)
    np.testing.assert_allclose(turned(weight, blocks)[H : 2 * H], weight[H : 2 * H], atol=1e-6)


def test_a_fused_oft_comes_apart_between_its_blocks(converted):
    key = "lycoris_transformer_blocks_0_attn_to_qkv"
    tensors = {f"{key}.oft_blocks": random(6, 4, 4)}
    found = converted(tensors, "krea2")
    parts = [found[f"diffusion_model.blocks.0.attn.w{part}.oft_blocks"] for part in "qkv"]
    assert [len(part) for part in parts] == [4, 1, 1]
    np.testing.assert_array_equal(np.concatenate(parts), tensors[f"{key}.oft_blocks"])
    with pytest.raises(DataError, match="edge between the parts goes through one of its blocks"):
        converted({f"{key}.oft_blocks": random(3, 8, 8)}, "krea2")


@report(
    "Comfy-Org/ComfyUI#5230",
    wrong="sd-scripts' OFT of FLUX.1 (`oft_unet_…oft_blocks.0`) is not loaded.",
    now="Its blocks become the one tensor that ComfyUI reads, its bound worked in.",
)
@pytest.mark.parametrize("alpha", [1e-3, 10.0])
def test_sd_scripts_blocks_of_each_part_become_one_tensor_within_the_bound_they_were_trained_with(converted, alpha):
    key = "oft_unet_single_blocks_7_linear1"
    rows = [H, H, H, 4 * H]
    parts = [random(4, size // 4, size // 4) for size in rows]
    tensors = {f"{key}.oft_blocks.{number}": part for number, part in enumerate(parts)}
    found = converted({**tensors, f"{key}.alpha": np.array(alpha, np.float32)})
    weight, expected, first = random(sum(rows), H), [], 0
    for part, size in zip(parts, rows, strict=True):
        norm = np.linalg.norm(part.astype(np.float64) - part.astype(np.float64).transpose(0, 2, 1))
        expected.append(turned(weight[first : first + size], part * min(1, alpha * size / norm)))
        first += size
    assert set(found) == {"diffusion_model.single_blocks.7.linear1.oft_blocks"}
    np.testing.assert_allclose(
        turned(weight, found["diffusion_model.single_blocks.7.linear1.oft_blocks"]), np.concatenate(expected), atol=1e-4
    )


@pytest.mark.skipif("SD_SCRIPTS_SRC" not in os.environ, reason="SD_SCRIPTS_SRC names no checkout of sd-scripts")
@pytest.mark.parametrize("alpha", [0.02, 10.0])
def test_sd_scripts_own_oft_computes_what_the_converted_one_does(converted, tmp_path, alpha):
    pytest.importorskip("torch")
    child = Path(__file__).parents[1] / "oft_child.py"
    command = [sys.executable, str(child), os.environ["SD_SCRIPTS_SRC"], str(tmp_path), str(alpha)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = read_tensors(tmp_path / "seen.safetensors")
    (blocks,) = converted(dict(read_tensors(tmp_path / "oft.safetensors"))).values()
    found = seen["input"] @ turned(seen["weight"], blocks).T + seen["bias"]
    np.testing.assert_allclose(found, seen["output"], atol=1e-5)
    assert np.abs(seen["input"] @ seen["weight"].T + seen["bias"] - seen["output"]).max() > 0.1


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"oft_blocks": random(2, 4, 4, 4), "alpha": np.zeros(())}, "BOFT.*butterflies"),
        ({f"{end}.weight": random(H, H) for end in ("a1", "a2", "b1", "b2")}, "GLoRA.*matrix of its own"),
        ({"set_weight": random(H, H)}, "replaced weight.*whole weight"),
    ],
)
def test_what_cannot_be_put_together_exactly_is_refused_with_the_reason(converted, tensors, reason):
    named = {
        f"lycoris_transformer_blocks_0_attn_to_{part}.{end}": array for part in "qkv" for end, array in tensors.items()
    }
    with pytest.raises(DataError, match=reason):
        converted(named)


def test_blocks_of_different_sizes_get_a_common_one_and_are_refused_where_none_ends_with_the_parts(converted):
    key = "lycoris_single_transformer_blocks_0"
    parts = {"attn_to_q": (4, 4, 4), "attn_to_k": (2, 8, 8), "attn_to_v": (1, 16, 16)}
    tensors = {f"{key}_{part}.oft_blocks": random(*size) for part, size in parts.items()}
    (blocks,) = converted({**tensors, f"{key}_proj_mlp.oft_blocks": random(16, 4, 4)}).values()
    assert blocks.shape == (7, 16, 16)
    with pytest.raises(DataError, match="blocks do not end where its parts do"):
        converted({**tensors, f"{key}_proj_mlp.oft_blocks": random(1, 64, 64)})


def test_an_oft_whose_bound_is_no_number_is_refused(converted):
    key = "lycoris_transformer_blocks_0_attn_to_q"
    with pytest.raises(DataError, match="no number"):
        converted({f"{key}.oft_blocks": random(4, 4, 4), f"{key}.alpha": np.array(np.nan, np.float32)})


def test_an_oft_for_kohya_comes_back_the_same(tmp_path):
    dialects, path = plugins().dialects(), tmp_path / "x.safetensors"
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.oft_blocks"
    write_tensors(path, {key: random(2, 8, 8)}, {FAMILY_KEY: "sd15"})
    lora = dialects["kohya"].read(path)
    dialects["kohya"].write(lora, tmp_path / "y.safetensors", None, {})
    assert read_tensors(path)[key].tobytes() == read_tensors(tmp_path / "y.safetensors")[key].tobytes()


@pytest.mark.parametrize("target", ["peft", "diffusers"])
@pytest.mark.parametrize(("end", "array"), [("set_weight", random(3 * H, H)), ("oft_blocks", random(12, 4, 4))])
def test_what_is_kept_as_a_whole_is_refused_where_the_layout_has_the_module_in_parts(tmp_path, target, end, array):
    dialects, path = plugins().dialects(), tmp_path / "x.safetensors"
    write_tensors(path, {f"diffusion_model.double_blocks.0.img_attn.qkv.{end}": array}, {})
    lora = dialects["comfyui"].read(path)
    with pytest.raises(DataError, match=r"img_attn\.qkv is a .*kept as a whole"):
        dialects[target].write(lora, tmp_path / "y.safetensors", None, {})
