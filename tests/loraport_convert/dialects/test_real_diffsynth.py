"""LoRAs that DiffSynth's own code saves, of its own models under its own names.

DIFFSYNTH_SRC names a folder that holds the package `diffsynth`, such as its unpacked wheel; nothing of it is imported
here, it writes in a process of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import family_models as models
import numpy as np
import pytest

from loraport.lora.proof import prove
from loraport.lora.storage import read_tensors
from loraport.plugins import plugins
from loraport_convert.families import FAMILIES
from loraport_convert.families.rules import cuts
from loraport_convert.reading import Scale, read_lora

#: DiffSynth's model → the same of diffusers.
MODELS = {
    "flux1": "flux1",
    "flux2": "flux2",
    "qwen-image": "qwen-image",
    "z-image": "z-image",
    "wan": "wan-14b",
    "krea2": "krea2",
    "ideogram4": "ideogram4",
    "sdxl": "sdxl",
    "sd15": "sd15",
}
pytestmark = pytest.mark.skipif(
    "DIFFSYNTH_SRC" not in os.environ or importlib.util.find_spec("diffusers") is None,
    reason="DIFFSYNTH_SRC names no DiffSynth, or diffusers is not installed",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that one process of DiffSynth's filled."""
    folder = tmp_path_factory.mktemp("diffsynth")
    (folder / "natives.json").write_text(json.dumps(list(models.natives("flux1"))))
    child = Path(__file__).parents[1] / "diffsynth_child.py"
    command = [sys.executable, str(child), os.environ["DIFFSYNTH_SRC"], str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def modules(folder, family):
    found = json.loads((folder / "modules.json").read_text())[family]
    return {name: (shape[0], int(np.prod(shape[1:]))) for name, shape in found.items()}


@pytest.mark.parametrize("family", MODELS)
def test_every_linear_and_convolution_has_its_own_rows_of_the_native_model(written, family):
    natives, taken = models.natives(MODELS[family]), {}
    for name, shape in modules(written, family).items():
        spans = FAMILIES[family].native(name, shape)
        assert spans, name
        for span, (start, stop) in zip(spans, cuts(spans, shape[0]), strict=True):
            share = (stop - start) // span.count
            if span.module not in natives and family == "wan":
                continue  # the model here has other layers than the one there
            assert natives[span.module] == (share * span.total, shape[1]), name
            taken.setdefault(span.module, []).append((share * span.first, share * span.first + stop - start))
    for native, rows in taken.items():
        ends = sorted(rows)
        assert ends[0][0] == 0, native
        assert [stop for _, stop in ends] == [start for start, _ in ends[1:]] + [natives[native][0]], native


def test_its_own_names_of_flux_mean_what_its_own_converter_says(written):
    converted = json.loads((written / "flux.json").read_text())
    assert len(converted) == len(models.natives("flux1"))
    for name, native in converted.items():
        (span,) = FAMILIES["flux1"].native(name.removesuffix(".weight"), models.natives("flux1")[native])
        assert (span.module, span.first, span.whole) == (native, 0, True), name


@pytest.mark.parametrize("family", MODELS)
def test_what_it_saves_is_read_whole_and_becomes_a_file_for_comfyui(written, tmp_path, family):
    path, dialects = written / f"{family}.safetensors", plugins().dialects()
    found = read_lora(path, dialects, Scale(None))
    assert (found.dialect.name, found.lora.family, found.lora.unread) == ("diffsynth", family, ())
    factors = read_tensors(path)
    parts = {key.partition(".lora_A.")[0] for key in factors if ".lora_A." in key}
    total = sum(np.sum(changed(factors, part) ** 2) for part in parts)
    norms = [each.norm for each in prove(found.lora, halved(found.lora)).modules]
    assert sum(norm**2 for norm in norms) == pytest.approx(total, rel=1e-5)
    dialects["comfyui"].write(found.lora, tmp_path / "comfy.safetensors", None, {})
    assert prove(found.lora, dialects["comfyui"].read(tmp_path / "comfy.safetensors")).ok


def changed(factors, part):
    """The norm of B @ A of rank 1, alpha being the rank."""
    return np.linalg.norm(factors[f"{part}.lora_A.default.weight"]) * np.linalg.norm(
        factors[f"{part}.lora_B.default.weight"]
    )


def halved(lora):
    """Another LoRA, so that the proof tells the norms of the first."""
    from dataclasses import replace

    modules = {name: lora.modules[name] for name in lora.modules}
    for name, module in modules.items():
        arrays = {field: array * 0.5 for field, array in module.factors.arrays().items()}
        modules[name] = replace(module, factors=replace(module.factors, **arrays))
    return replace(lora, modules=modules)
