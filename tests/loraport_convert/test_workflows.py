import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraport.errors import DataError
from loraport_convert.families import FAMILIES
from loraport_convert.workflows import RECIPES, Ingredient, Picture, workflow

ONE = [Ingredient("buggy.safetensors", 0.8)]
TWO = [Ingredient("buggy.safetensors", 0.8), Ingredient("style.safetensors", 0.5, text_encoders=True)]
PICTURE = Picture("a buggy", seed=7)
#: Where ComfyUI looks for the file that a loader's input names.
FOLDERS = {
    "unet_name": "diffusion_models",
    "ckpt_name": "checkpoints",
    "vae_name": "vae",
    "lora_name": "loras",
    "clip_name": "text_encoders",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
}


def upstream(nodes, number):
    """The ids of all nodes that a node depends on, itself included."""
    found = {number}
    for value in nodes[number]["inputs"].values():
        if isinstance(value, list):
            found |= upstream(nodes, value[0])
    return found


def branches(nodes):
    """Title of the picture → kinds of nodes it depends on, with their inputs."""
    return {
        node["_meta"]["title"]: [nodes[each] for each in upstream(nodes, number)]
        for number, node in nodes.items()
        if node["class_type"] == "SaveImage"
    }


def strengths(branch):
    return sorted(
        (n["inputs"]["lora_name"], n["inputs"]["strength_model"]) for n in branch if "lora_name" in n["inputs"]
    )


def test_every_family_that_can_be_converted_has_a_recipe():
    assert set(RECIPES) == set(FAMILIES)


@pytest.mark.parametrize("family", RECIPES)
def test_there_are_four_pictures_that_differ_only_in_the_lora(family):
    found = branches(workflow(family, ONE, PICTURE))
    assert set(found) == {"no LoRA", "strength 0.7", "strength 1.0", "strength 1.5"}
    assert {title: strengths(branch) for title, branch in found.items()} == {
        "no LoRA": [],
        "strength 0.7": [("buggy.safetensors", 0.56)],
        "strength 1.0": [("buggy.safetensors", 0.8)],
        "strength 1.5": [("buggy.safetensors", 1.2)],
    }
    without = [
        sorted(
            json.dumps([n["class_type"], sorted(k for k in n["inputs"])])
            for n in branch
            if "lora_name" not in n["inputs"]
        )
        for branch in found.values()
    ]
    assert all(each == without[0] for each in without)
    seeds = {
        value
        for branch in found.values()
        for node in branch
        for name, value in node["inputs"].items()
        if name in ("seed", "noise_seed")
    }
    assert seeds == {7}
    texts = {n["inputs"]["text"] for branch in found.values() for n in branch if n["class_type"] == "CLIPTextEncode"}
    assert texts <= {"a buggy", ""}


def test_the_unconditional_model_of_ideogram_4_gets_no_lora():
    nodes = workflow("ideogram4", TWO, PICTURE)
    guiders = [node["inputs"] for node in nodes.values() if node["class_type"] == "DualModelGuider"]
    assert len(guiders) == 4
    kinds = [{nodes[each]["class_type"] for each in upstream(nodes, g["model_negative"][0])} for g in guiders]
    assert kinds == [{"UNETLoader"}] * 4
    with_lora = [any("lora_name" in nodes[each]["inputs"] for each in upstream(nodes, g["model"][0])) for g in guiders]
    assert with_lora == [False, True, True, True]
    names = {nodes[g["model_negative"][0]]["inputs"]["unet_name"] for g in guiders}
    assert all("unconditional" in name for name in names)


def test_several_loras_are_used_together_and_one_with_text_encoders_changes_the_prompt():
    nodes = workflow("sdxl", TWO, PICTURE)
    found = branches(nodes)
    assert strengths(found["strength 0.7"]) == [("buggy.safetensors", 0.56), ("style.safetensors", 0.35)]
    for title, branch in found.items():
        loaders = {node["class_type"] for node in branch}
        assert ("LoraLoader" in loaders) == (title != "no LoRA")
    encoders = [number for number, node in nodes.items() if node["class_type"] == "CLIPTextEncode"]
    assert len(encoders) == 8


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(DataError, match="ideogram4"):
        workflow(None, ONE, PICTURE)


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """What ComfyUI's own check of a prompt says of every family's workflow, and of broken ones."""
    folder = tmp_path_factory.mktemp("workflows")
    for family in RECIPES:
        for name, loras in (("one", ONE), ("two", TWO)):
            nodes = workflow(family, loras, PICTURE)
            (folder / f"{family}-{name}.json").write_text(json.dumps(nodes))
            for node in nodes.values():
                for key, value in node["inputs"].items():
                    if key in FOLDERS:
                        place = folder / "models" / FOLDERS[key] / value
                        place.parent.mkdir(parents=True, exist_ok=True)
                        place.touch()
    broken = copy.deepcopy(workflow("ideogram4", ONE, PICTURE))
    next(node for node in broken.values() if node["class_type"] == "DualModelGuider")["inputs"].pop("model")
    (folder / "broken.json").write_text(json.dumps(broken))
    child = Path(__file__).with_name("workflow_child.py")
    done = subprocess.run(
        [sys.executable, str(child), os.environ["COMFY_SRC"], str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report").read_text())


needs_comfy = pytest.mark.skipif(
    "COMFY_SRC" not in os.environ or importlib.util.find_spec("torch") is None,
    reason="COMFY_SRC names no ComfyUI checkout, or torch is not installed",
)


@needs_comfy
@pytest.mark.parametrize("family", RECIPES)
@pytest.mark.parametrize("loras", ["one", "two"])
def test_comfyui_accepts_the_workflow_and_every_picture_of_it(comfy, family, loras):
    assert comfy[f"{family}-{loras}"] == {"valid": True, "complaints": [], "outputs": [4, 4]}


@needs_comfy
def test_comfyui_notices_a_broken_one(comfy):
    assert comfy["broken"]["complaints"]
