"""Asks a real ComfyUI which modules its models have and what it makes of LoRA files, without any weights.

python families_child.py CHECKOUT FOLDER: FOLDER/models.json holds, by model, the shapes that ComfyUI recognises it by;
FOLDER/MODEL/*.safetensors are LoRA files for it. report.json gets, by model, the shapes of its parameters and those of
its text encoders, and by file the warnings of the loader. FOLDER/MODEL/NAME.probe holds ΔW @ p for every parameter that
the file changes, where p_j = cos(j): of ones that are zeros, or for kinds.safetensors those of `weight`. Of files that
are named keys-* only the names are looked up.
"""

import json
import logging
import sys
from pathlib import Path

from comfyui_child import Lines, start

LARGEST = 70_000_000  # numbers in a weight


def by_weight(patches):
    """{weight: its patches}, in the form that ComfyUI calculates with."""
    sorted_out = {}
    for target, patch in patches.items():
        key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        sorted_out.setdefault(key, []).append((1.0, patch, 1.0, offset, function))
    return sorted_out


def weight(shape):
    """Numbers that the test can make too: sin(1 + 0.7 i + 0.3 j) in row i and column j, a kernel in the columns."""
    import torch

    rows, columns = torch.arange(shape[0], dtype=torch.float64), torch.arange(shape[1:].numel(), dtype=torch.float64)
    return torch.sin(1 + 0.7 * rows[:, None] + 0.3 * columns[None, :]).float().reshape(shape)


def encoders_of(name):
    """A model's text encoders, without weights, or None."""
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.text_encoders.flux
    import comfy.text_encoders.sd3_clip
    import torch

    parts = {"device": torch.device("meta"), "dtype": torch.float32}
    if name == "sd15":
        return comfy.sd1_clip.SD1ClipModel(**parts)
    if name == "sdxl":
        return comfy.sdxl_clip.SDXLClipModel(**parts)
    if name == "flux1":
        return comfy.text_encoders.flux.FluxClipModel(dtype_t5=torch.float32, **parts)
    if name.startswith("sd3"):
        return comfy.text_encoders.sd3_clip.SD3ClipModel(dtype_t5=torch.float32, **parts)
    return None


def main(checkout, folder):
    start(checkout)
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_detection
    import comfy.utils
    import torch
    from safetensors.torch import save_file

    log, report = Lines(), {}
    logging.getLogger().addHandler(log)
    for name, told in json.loads((folder / "models.json").read_text()).items():
        if "config" in told:
            config = comfy.model_detection.model_config_from_unet_config(told["config"], None)
        else:
            state = {key: torch.empty(shape, device="meta") for key, shape in told["state"].items()}
            config = comfy.model_detection.model_config_from_unet(state, "")
        model = config.get_model({}, device=torch.device("meta"))
        encoders = encoders_of(name)
        states = [model.state_dict(), *([encoders.state_dict()] if encoders is not None else [])]
        weights = {key: tensor.shape for state in states for key, tensor in state.items() if tensor.ndim}
        names = comfy.lora.model_lora_keys_unet(model, {})
        if encoders is not None:
            names = comfy.lora.model_lora_keys_clip(encoders, names)
        report[name] = {"weights": {key: list(shape) for key, shape in weights.items()}, "files": {}}
        for path in sorted((folder / name).glob("*.safetensors")):
            log.lines = []
            lora = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(path), safe_load=True))
            patches = comfy.lora.load_lora(lora, names)
            found = {}
            if path.stem.startswith("keys-"):
                patches = {}
            for key, several in by_weight(patches).items():
                shape = weights[key]
                if shape.numel() > LARGEST:
                    continue
                before = weight(shape) if path.stem == "kinds" else torch.zeros(shape)
                after = comfy.lora.calculate_weight(several, before.clone(), key)
                if after.shape != before.shape:  # a control LoRA makes it larger
                    before = torch.zeros_like(after)
                change = (after - before).reshape(shape[0], -1)
                found[key] = (change @ torch.cos(torch.arange(change.shape[1], dtype=torch.float32))).contiguous()
            save_file(found, path.with_suffix(".probe"))
            report[name]["files"][path.stem] = log.lines
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
