"""Runs a real ComfyUI on the CPU, in a process of its own, and writes down what it does with LoRA files.

python comfyui_child.py CHECKOUT FOLDER: FOLDER holds base.safetensors (weights to load into a tiny Ideogram 4) and
LoRA files in loras/. For each, patched/<same name> gets every weight of the patched model, and report.json its log
lines of level WARNING and above. An unpatched copy goes to patched/none.safetensors, the weight shapes of the
full-size model to shapes.json. With sizes.json in FOLDER the model has those sizes, and with inputs.safetensors
(tokens (1, N, channels), features (1, T, width), time (1,), grid (2,)) the velocity that each patched model predicts
goes to velocity/<same name>.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

# ComfyUI imports these for images, sound and video; a LoRA on a transformer needs none of them.
UNUSED = {"torchvision", "torchaudio", "torchsde", "av", "kornia", "spandrel", "scipy"}
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "intermediate_size": 48,
    "adaln_dim": 16,
    "llm_features_dim": 24,
    "mrope_section": [4, 2, 2],
}


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets an import of an unused package succeed with empty modules."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        known = name.split(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda attribute: MagicMock(name=f"{spec.name}.{attribute}")
        return module

    def exec_module(self, module):
        module.__path__ = []


class Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def velocity(network, folder):
    """What ComfyUI's own forward predicts, as tokens; its time runs the other way and so does its sign."""
    import torch
    from safetensors.torch import load_file

    inputs = load_file(folder / "inputs.safetensors")
    rows, columns = inputs["grid"].tolist()
    image = network._tokens_to_img(inputs["tokens"], rows, columns)
    with torch.no_grad():
        return -network._img_to_tokens(network(image, 1 - inputs["time"], inputs["features"])).contiguous()


def start(checkout):
    """Make ComfyUI importable, on the CPU and without what it does not need here."""
    sys.meta_path.insert(0, Absent({name for name in UNUSED if importlib.util.find_spec(name) is None}))
    sys.path.insert(0, checkout)
    sys.argv = ["comfyui", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()


def main(checkout, folder):
    start(checkout)
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    import comfy.utils
    import torch
    from safetensors.torch import save_file

    full = comfy.supported_models.Ideogram4
    sizes = {"in_channels": 16, "num_layers": 2, **TINY}
    if (folder / "sizes.json").exists():
        sizes = json.loads((folder / "sizes.json").read_text())
    extra = {name: size for name, size in sizes.items() if name not in ("in_channels", "num_layers")}
    tiny = type("Tiny", (full,), {"unet_extra_config": {**full.unet_extra_config, **extra}})

    def weights(model):
        state = model.diffusion_model.state_dict()
        return {f"diffusion_model.{key}": tensor.contiguous().clone() for key, tensor in state.items()}

    torch.manual_seed(0)
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    parts = {"image_model": "ideogram4", "dtype": torch.float32}
    parts |= {name: sizes[name] for name in ("in_channels", "num_layers")}
    model = tiny(parts).get_model({}, device=cpu)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    base = comfy.utils.load_torch_file(str(folder / "base.safetensors"))
    assert not model.load_state_dict(base, strict=False).unexpected_keys
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    log = Lines()
    logging.getLogger().addHandler(log)
    report = {}
    save_file(weights(model), folder / "patched" / "none.safetensors")
    for path in sorted((folder / "loras").iterdir()):
        log.lines = []
        lora = comfy.utils.load_torch_file(str(path), safe_load=True)
        patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
        patched.patch_model(device_to=cpu)
        save_file(weights(patched.model), folder / "patched" / path.name)
        if (folder / "inputs.safetensors").exists():
            save_file({"velocity": velocity(patched.model.diffusion_model, folder)}, folder / "velocity" / path.name)
        patched.unpatch_model(device_to=cpu)
        report[path.stem] = log.lines
    (folder / "report.json").write_text(json.dumps(report))

    config = full({"image_model": "ideogram4", "in_channels": 128, "num_layers": 34})
    shapes = {
        key.removesuffix(".weight"): list(tensor.shape)
        for key, tensor in config.get_model({}, device=torch.device("meta")).diffusion_model.state_dict().items()
        if key.endswith(".weight") and tensor.ndim == 2
    }
    (folder / "shapes.json").write_text(json.dumps(shapes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
