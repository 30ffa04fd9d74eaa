"""What ComfyUI's own loader does with converted files of every family. Needs COMFY_SRC, a checkout, and torch."""

import datetime
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import family_models as models
import numpy as np
import pytest
from comfyui_kinds import KINDS, adapter, modules_for
from small_loras import dense

from loraport.lora.canonical import LoraFile, LoraModule, LowRank
from loraport.lora.dialect import detect_dialect
from loraport.lora.stacked import Full
from loraport.lora.storage import read_tensors, write_tensors
from loraport.plugins import plugins
from loraport_convert.codec.keys import split
from loraport_convert.families import FAMILIES
from loraport_convert.families.norms import PARAMETERS
from loraport_convert.inspection import inspect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        "COMFY_SRC" not in os.environ or importlib.util.find_spec("diffusers") is None,
        reason="COMFY_SRC names no ComfyUI checkout, or diffusers is not installed",
    ),
]
RECORD = Path(__file__).parents[2] / "docs" / "comfyui-verified.json"
MODELS = ["ideogram4", "flux1", "flux2", "qwen-image", "z-image", "sdxl", "sd15", "sd3-3.5-medium", "wan-14b", "krea2"]
#: What ComfyUI recognises a model by, beyond its Linear layers.
MARKS = {
    "ideogram4": {"embed_image_indicator.weight": (2, 4608)},
    "flux1": {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
    "flux2": {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
    "qwen-image": {"txt_norm.weight": (3584,)},
    "z-image": {"noise_refiner.0.attention.k_norm.weight": (128,), "cap_pad_token": (1, 3840)},
    "sd3-3.5-medium": {
        "x_embedder.proj.weight": (1536, 16, 2, 2),
        "joint_blocks.0.context_block.attn.ln_q.weight": (64,),
        "pos_embed": (1, 384 * 384, 1536),
    },
    "wan-14b": {"head.modulation": (1, 2, 5120), "patch_embedding.weight": (5120, 16, 1, 2, 2)},
    "krea2": {"txtfusion.layerwise_blocks.0.prenorm.scale": (2560,)},
}
_UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "model_channels": 320,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
CONFIGS = {
    "sdxl": {
        **_UNET,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "channel_mult": [1, 2, 4],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "use_linear_in_transformer": True,
        "context_dim": 2048,
        "num_head_channels": 64,
    },
    "sd15": {
        **_UNET,
        "adm_in_channels": None,
        "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "use_linear_in_transformer": False,
        "context_dim": 768,
        "num_heads": 8,
    },
}
#: The keys that ComfyUI itself knows for diffusers' modules of a family: two ways to the same change.
ITS_OWN = {
    "flux1": "transformer.{}",
    "qwen-image": "transformer.{}",
    "z-image": "transformer.{}",
    "sd3-3.5-medium": "transformer.{}",
    "krea2": "transformer.{}",
    "sdxl": "lora_unet_{}",
    "sd15": "lora_unet_{}",
}


def first_of_each(model):
    """The modules of the first and the last layer of each stack, under diffusers' names."""
    last = {"sd3-3.5-medium": "transformer_blocks.23."}.get(model, "-")
    parts = [f".{number}." for number in range(1, 60)]
    return {
        name: shape
        for name, shape in models.modules(model).items()
        if (model in ("sdxl", "sd15") and not any(f"transformer_blocks.{n}." in name for n in range(1, 10)))
        or name.startswith(last)
        or not any(f"{stack}{part}" in f".{name}" for stack in ("blocks", "layers", "refiner") for part in parts)
    }


def trained(model):
    """A rank-2 LoRA under diffusers' names: {module: (down, up)}, and alpha 3."""
    rng = np.random.default_rng(0)
    convolutions = {"conv_in", "conv_out", "pos_embed.proj", "patch_embedding"}
    return {
        name: (rng.standard_normal((2, columns)).astype(np.float32), rng.standard_normal((rows, 2)).astype(np.float32))
        for name, (rows, columns) in first_of_each(model).items()
        if name not in convolutions and "conv" not in name and not (model == "sd15" and ".proj_" in name)
    }


def keyed(factors, pattern):
    tensors = {}
    for name, (down, up) in factors.items():
        key = pattern.format(name.replace(".", "_") if "lora_unet" in pattern else name)
        alpha = np.array(3, np.float32)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}
    return tensors


#: Ways of writing keys: what stands before a module and after it, and whether its dots become underscores.
STYLES = {
    "diffusers": ("transformer.", "lora_A.weight", "lora_B.weight"),
    "unet": ("unet.", "lora_A.weight", "lora_B.weight"),
    "bare": ("", "lora_A.default.weight", "lora_B.default.weight"),
    "prefixed": ("diffusion_model.", "lora_A.weight", "lora_B.weight"),
    "peft": ("base_model.model.", "lora_A.weight", "lora_B.weight"),
    "doubled": ("transformer.base_model.model.", "lora_A.weight", "lora_B.weight"),
    "kohya": ("lora_unet_", "lora_down.weight", "lora_up.weight"),
    "onetrainer": ("lora_transformer_", "lora_down.weight", "lora_up.weight"),
    "lycoris": ("lycoris_", "lora_down.weight", "lora_up.weight"),
    "old": ("transformer.", "lora.down.weight", "lora.up.weight"),
    "linear-layer": ("transformer.", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
}
_CLIP = [f"text_model.encoder.layers.0.{each}" for each in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")]
_T5_LAYERS = ("0.SelfAttention.v", "1.DenseReluDense.wi_0", "1.DenseReluDense.wo")
_T5 = [f"encoder.block.1.layer.{each}" for each in _T5_LAYERS]
_WIDTHS = {"clip_l": 768, "clip_g": 1280, "t5xxl": 4096}


def styled(factors, style):
    start, down_ending, up_ending = STYLES[style]
    tensors = {}
    for name, (down, up) in factors.items():
        key = start + (name.replace(".", "_") if start.endswith("_") else name)
        alpha = np.array(3, np.float32)
        tensors |= {f"{key}.{down_ending}": down, f"{key}.{up_ending}": up, f"{key}.alpha": alpha}
    return tensors


def encoder_modules(model):
    """{canonical module: LoRA of it}, of a model's text encoders at their real sizes."""
    family, rng, found = FAMILIES[models.family_of(model)], np.random.default_rng(5), {}
    for encoder in family.encoders:
        width = _WIDTHS[encoder]
        wide = 10240 if encoder == "t5xxl" else 4 * width
        for inner in _T5 if encoder == "t5xxl" else _CLIP:
            rows = wide if inner.endswith(("fc1", "wi_0")) else width
            columns = wide if inner.endswith("wo") else width
            down, up = (rng.standard_normal(size).astype(np.float32) for size in ((2, columns), (rows, 2)))
            name = f"text_encoders.{encoder}.transformer.{inner}"
            found[name] = LoraModule(name, LowRank(down=down, up=up), 0.75)
    return found


def vectors(model):
    """{ComfyUI's name of a bias, a norm or a modulation: the change of it} of the first layers, at their real sizes."""
    family, rng, found = FAMILIES[models.family_of(model)], np.random.default_rng(6), {}
    named = dict(models.build(model).named_modules())
    first = set(first_of_each(model))
    for name in models.norms(model):
        if not _is_first(name):
            continue
        (span,) = family.native(name)
        for kind in ("", ".bias") if models.norms(model)[name] else ("",):
            found[span.module + kind] = rng.standard_normal(named[name].weight.shape).astype(np.float32)
    for native, rows in models.layout(model).items():
        if family.has_bias(native) and {row[2] for row in rows} <= first:
            found[f"{native}.bias"] = rng.standard_normal(rows[0][5]).astype(np.float32)
    if model == "wan-14b":
        found |= {"blocks.0.modulation": rng.standard_normal((1, 6, 5120)).astype(np.float32)}
    return found


def _is_first(name):
    return not any(f"{stack}.{number}." in f"{name}." for stack in ("blocks", "layers") for number in range(1, 70))


def parameter(native):
    """ComfyUI's key of what a native name without a matrix means."""
    own = native.endswith((".bias", *PARAMETERS))
    return f"diffusion_model.{native}" if own else f"diffusion_model.{native}.weight"


def vectors_styled(model, style):
    """The same as a trainer would write it that knows diffusers' names, and `.diff_b` for biases."""
    start, family, tensors = STYLES[style][0], FAMILIES[models.family_of(model)], {}
    for native, change in vectors(model).items():
        for span in family.diffusers(native, None):
            owner = span.module.removesuffix(".bias")
            key = start + (owner.replace(".", "_") if start.endswith("_") else owner)
            tensors[f"{key}.diff_b" if native.endswith(".bias") else f"{key}.diff"] = change  # the names count
    return tensors


def growing():
    """A LoRA of FLUX.1 that takes a control image: `img_in` with twice the columns, and its bias."""
    rng = np.random.default_rng(7)
    down, up, bias = (rng.standard_normal(size).astype(np.float32) for size in ((2, 128), (3072, 2), (3072,)))
    module = LoraModule("img_in", LowRank(down=down, up=up), 0.75)
    return {"img_in": module, "img_in.bias": LoraModule("img_in.bias", Full(bias), 1.0)}


def write_files(model, folder, dialects):
    """Everything that ComfyUI is asked about a model."""
    source = folder / f"{model}.safetensors"
    write_tensors(source, keyed(trained(model), "transformer.{}"), {})
    lora = detect_dialect(source, dialects).read(source)
    assert lora.unread == ()
    for target in ("comfyui", "kohya"):
        dialects[target].write(lora, folder / model / f"{target}.safetensors", None, {})
    if model == "flux1":
        dialects["comfyui"].write(LoraFile(lora.family, growing()), folder / model / "growing.safetensors", None, {})
    if model in ITS_OWN:
        write_tensors(folder / model / "own.safetensors", keyed(trained(model), ITS_OWN[model]), {})
    kinds = {name: adapter(kind, name, shape)[0] for kind, name, shape in modules_for(model)}
    dialects["comfyui"].write(LoraFile(lora.family, kinds), folder / model / "kinds.safetensors", None, {})
    whole = {name: LoraModule(name, Full(change), 1.0) for name, change in vectors(model).items()}
    if whole:
        for target in ("comfyui", "kohya"):
            path = folder / model / f"vectors-{target}.safetensors"
            held = {name: each for name, each in whole.items() if target == "comfyui" or not name.endswith(PARAMETERS)}
            dialects[target].write(LoraFile(lora.family, held), path, None, {})
    for style in STYLES:
        write_tensors(folder / model / f"keys-vectors-{style}.safetensors", vectors_styled(model, style), {})
        write_tensors(folder / model / f"keys-{style}.safetensors", styled(trained(model), style), {})
    if encoders := encoder_modules(model):
        for target in ("comfyui", "kohya", "diffusers"):
            name = f"encoders-{target}" if target != "diffusers" else "keys-encoders-diffusers"
            dialects[target].write(LoraFile(lora.family, encoders), folder / model / f"{name}.safetensors", None, {})


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """The folder that one ComfyUI process filled."""
    folder, dialects, told = tmp_path_factory.mktemp("families"), plugins().dialects(), {}
    for model in MODELS:
        (folder / model).mkdir()
        state = {f"{name}.weight": shape for name, shape in models.natives(model).items()}
        told[model] = {"config": CONFIGS[model]} if model in CONFIGS else {"state": {**state, **MARKS[model]}}
        write_files(model, folder, dialects)
    (folder / "models.json").write_text(json.dumps(told))
    child = Path(__file__).with_name("families_child.py")
    command = [sys.executable, str(child), os.environ["COMFY_SRC"], str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def report(folder, model):
    return json.loads((folder / "report.json").read_text())[model]


def expected(model):
    """ΔW @ p by native weight, from where diffusers' rows lie in the native model."""
    changes = {}
    for name, (down, up) in trained(model).items():
        point = np.cos(np.arange(down.shape[1], dtype=np.float64))
        changes[name] = 3 / 2 * up.astype(np.float64) @ (down.astype(np.float64) @ point)
    placed = {}
    for native, rows in models.layout(model).items():
        for start, stop, name, low, high, size in rows:
            if name in changes:
                whole = placed.setdefault(f"diffusion_model.{native}.weight", np.zeros(size))
                whole[start:stop] = changes[name][low:high]
    return placed


def too_large(model):
    """The weights that the child leaves out, because ΔW would take too long."""
    return {f"diffusion_model.{name}.weight" for name, shape in models.natives(model).items() if math.prod(shape) > 7e7}


@pytest.mark.parametrize("model", MODELS)
def test_comfyuis_model_has_exactly_the_native_modules_of_the_table(comfy, model):
    weights = report(comfy, model)["weights"]
    for name, (rows, columns) in models.natives(model).items():
        shape = weights[f"diffusion_model.{name}.weight"]
        assert (shape[0], int(np.prod(shape[1:]))) == (rows, columns), name


def probed(change):
    return change @ np.cos(np.arange(change.shape[1], dtype=np.float64))


@functools.cache
def wanted_of(model, name):
    """ΔW @ p by ComfyUI's name of the weight, of what one of a model's files holds."""
    if name == "kinds":
        changes = {native: adapter(kind, native, shape)[1] for kind, native, shape in modules_for(model)}
        return {f"diffusion_model.{native}.weight": probed(change) for native, change in changes.items()}
    if name.startswith("encoders"):
        modules = encoder_modules(model).values()
        return {f"{each.name.removeprefix('text_encoders.')}.weight": probed(dense(each)) for each in modules}
    if name == "growing":
        modules = growing()
        changes = {"weight": dense(modules["img_in"]), "bias": dense(modules["img_in.bias"])}
        return {f"diffusion_model.img_in.{key}": probed(change) for key, change in changes.items()}
    if name.startswith("vectors"):
        changes = {parameter(native): change.reshape(len(change), -1) for native, change in vectors(model).items()}
        return {key: probed(change) for key, change in changes.items()}
    return expected(model)


def differences(folder, model, name):
    """How far ΔW @ p, as ComfyUI computes it, is from what was trained, by weight."""
    found, wanted = dict(read_tensors(folder / model / f"{name}.probe")), wanted_of(model, name)
    return {
        key: float(np.linalg.norm(change - wanted[key]) / np.linalg.norm(wanted[key])) for key, change in found.items()
    }


def test_the_outcome_is_recorded(comfy):
    if "LORAPORT_RECORD" not in os.environ:
        pytest.skip("LORAPORT_RECORD is not set")
    outcome = {
        model: {
            "native modules": len(models.natives(model)),
            "diffusers modules": len(models.modules(model)),
            "files": {
                name: {
                    "keys not loaded": len(lines),
                    "weights compared": len(differences(comfy, model, name)),
                    "largest relative difference": max(differences(comfy, model, name).values()),
                }
                for name, lines in report(comfy, model)["files"].items()
                if name != "own" and not name.startswith("keys-")
            },
            "kinds": [f"{kind}: {native}" for kind, native, _ in modules_for(model)],
            "modules that it does not find as they are written": {
                style: len(not_found(comfy, model, f"keys-{style}")) for style in STYLES
            },
        }
        for model in MODELS
    }
    version = {}
    exec((Path(os.environ["COMFY_SRC"]) / "comfyui_version.py").read_text(), version)
    command = ["git", "-C", os.environ["COMFY_SRC"], "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    content = {
        "comfyui": version["__version__"],
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        **{package: importlib.metadata.version(package) for package in ("diffusers", "torch", "loraport")},
        "models": outcome,
    }
    RECORD.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@pytest.mark.parametrize("target", ["comfyui", "kohya"])
@pytest.mark.parametrize("model", MODELS)
def test_comfyui_loads_every_key_and_computes_what_was_trained(comfy, model, target):
    assert report(comfy, model)["files"][target] == []
    apart = differences(comfy, model, target)
    assert set(apart) == set(expected(model)) - too_large(model)
    assert max(apart.values()) < 1e-4, apart


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_adapter_does_in_comfyui_what_it_was_trained_to(comfy, model):
    assert report(comfy, model)["files"]["kinds"] == []
    apart = differences(comfy, model, "kinds")
    assert set(apart) == {f"diffusion_model.{native}.weight" for _, native, _ in modules_for(model)}
    assert len(apart) >= len(KINDS)
    # An OFT's change nearly vanishes on the point of the probe, so that fp32 tells it less exactly.
    assert max(apart.values()) < 1e-3, apart


@pytest.mark.parametrize("target", ["comfyui", "kohya"])
@pytest.mark.parametrize("model", [model for model in MODELS if FAMILIES[models.family_of(model)].encoders])
def test_comfyui_applies_every_text_encoder(comfy, model, target):
    name = f"encoders-{target}"
    assert report(comfy, model)["files"][name] == []
    apart = differences(comfy, model, name)
    assert len(apart) == 3 * len(FAMILIES[models.family_of(model)].encoders)
    assert max(apart.values()) < 1e-4, apart


@pytest.mark.parametrize("model", MODELS)
def test_comfyuis_model_has_the_norms_and_the_biases_of_the_tables_and_no_other_bias(comfy, model):
    family, state = FAMILIES[models.family_of(model)], report(comfy, model)["weights"]
    for name in models.norms(model):
        (span,) = family.native(name)
        assert parameter(span.module) in state, span.module
        assert (f"diffusion_model.{span.module}.bias" in state) == family.has_bias(span.module), span.module
    for native in models.natives(model):
        assert (f"diffusion_model.{native}.bias" in state) == family.has_bias(native), native


@pytest.mark.parametrize("target", ["comfyui", "kohya"])
@pytest.mark.parametrize("model", MODELS)
def test_comfyui_changes_biases_norms_and_modulations_as_they_were_trained(comfy, model, target):
    name = f"vectors-{target}"
    assert report(comfy, model)["files"][name] == []
    apart = differences(comfy, model, name)
    held = {native for native in vectors(model) if target == "comfyui" or not native.endswith(PARAMETERS)}
    assert set(apart) == {parameter(native) for native in held}
    assert max(apart.values()) < 1e-6


def test_comfyui_makes_the_weight_larger_that_a_control_lora_widens(comfy):
    assert report(comfy, "flux1")["files"]["growing"] == []
    apart = differences(comfy, "flux1", "growing")
    assert set(apart) == {"diffusion_model.img_in.weight", "diffusion_model.img_in.bias"}
    assert max(apart.values()) < 1e-5


def not_found(folder, model, name):
    """The modules of a file, under its own names, of which ComfyUI's loader says that it found no key."""
    lines = report(folder, model)["files"][name]
    keys = [line.removeprefix("lora key not loaded: ") for line in lines]
    return {split(key)[0] for key in keys}


@pytest.mark.parametrize("style", [*STYLES, *(f"vectors-{style}" for style in STYLES), "encoders-diffusers"])
@pytest.mark.parametrize("model", MODELS)
def test_inspect_knows_beforehand_which_modules_comfyui_does_not_find(comfy, model, style):
    path = comfy / model / f"keys-{style}.safetensors"
    if not path.exists():
        pytest.skip("this model's text encoders are not changed by LoRAs")
    verdict = inspect(path, plugins().dialects()).comfyui
    assert set(verdict.skips) == not_found(comfy, model, f"keys-{style}")


@pytest.mark.parametrize("style", [style for style in STYLES if style != "unet"])
@pytest.mark.parametrize("model", MODELS)
def test_a_file_in_any_style_becomes_the_very_file_that_comfyui_loaded(comfy, tmp_path, model, style):
    dialects, path = plugins().dialects(), comfy / model / f"keys-{style}.safetensors"
    dialects["comfyui"].write(detect_dialect(path, dialects).read(path), tmp_path / "x.safetensors", None, {})
    found, loaded = read_tensors(tmp_path / "x.safetensors"), read_tensors(comfy / model / "comfyui.safetensors")
    assert set(found) == set(loaded)
    assert all(found[key].tobytes() == loaded[key].tobytes() for key in loaded)


@pytest.mark.parametrize("model", ITS_OWN)
def test_comfyuis_own_reading_of_diffusers_names_agrees(comfy, model):
    apart = differences(comfy, model, "own")
    assert len(apart) > 5
    assert max(apart.values()) < 1e-4, apart
