"""Lets DiffSynth's own code put LoRAs into its models and save them, in a process of its own, without any weights.

python diffsynth_child.py SOURCE FOLDER: FOLDER/MODEL.safetensors gets what it saves for each of its models, rank 1 on
every Linear and convolution of block 0 and of no block, and FOLDER/modules.json their shapes by DiffSynth's names.
FOLDER/flux.json says where its own converter puts the weights of FLUX.1's original checkpoint.
"""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from comfyui_child import Absent

MODELS = {
    "flux1": ("flux_dit", "FluxDiT"),
    "flux2": ("flux2_dit", "Flux2DiT"),
    "qwen-image": ("qwen_image_dit", "QwenImageDiT"),
    "z-image": ("z_image_dit", "ZImageDiT"),
    "wan": ("wan_video_dit", "WanModel"),
    "krea2": ("krea2_dit", "SingleStreamDiT"),
    "ideogram4": ("ideogram4_dit", "Ideogram4DiT"),
    "sdxl": ("stable_diffusion_xl_unet", "SDXLUNet2DConditionModel"),
    "sd15": ("stable_diffusion_unet", "UNet2DConditionModel"),
}
WAN = {
    "dim": 5120,
    "in_dim": 16,
    "ffn_dim": 13824,
    "out_dim": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "eps": 1e-6,
    "patch_size": (1, 2, 2),
    "num_heads": 40,
    "num_layers": 1,
    "has_image_input": False,
}


class Accelerator:
    """As much of accelerate's as the saver asks for."""

    is_main_process = True

    def wait_for_everyone(self):
        pass

    def get_state_dict(self, model):
        return model.state_dict()

    def unwrap_model(self, model):
        return model

    def save(self, state, path, safe_serialization=True):
        from safetensors.torch import save_file

        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)


def main(source, folder):
    sys.path.insert(0, source)
    wanted = {"torchvision", "imageio", "modelscope", "pandas", "torchaudio", "av", "ftfy", "scipy", "datasets", "cv2"}
    sys.meta_path.insert(0, Absent({name for name in wanted if importlib.util.find_spec(name) is None}))
    import torch
    from diffsynth.diffusion.logger import ModelLogger
    from diffsynth.diffusion.training_module import DiffusionTrainingModule

    shapes = {}
    for name, (file, kind) in MODELS.items():
        made = getattr(importlib.import_module(f"diffsynth.models.{file}"), kind)
        with torch.device("meta"):
            dit = made(**WAN) if name == "wan" else made()
        kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
        found = {each: module for each, module in dit.named_modules() if isinstance(module, kinds)}
        shapes[name] = {each: list(module.weight.shape) for each, module in found.items()}
        targets = [each for each in found if not re.search(r"(?:blocks|layers|refiner)\.[1-9]", each)]
        dit.requires_grad_(False)
        trained = DiffusionTrainingModule()
        torch.manual_seed(0)
        trained.dit = trained.add_lora_to_model(dit, targets, 1)
        for module in trained.modules():
            for each, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.requires_grad:
                    module._parameters[each] = torch.nn.Parameter(torch.randn(parameter.shape))
        logger = ModelLogger(str(folder), remove_prefix_in_ckpt="dit.")
        logger.save_model(Accelerator(), trained, f"{name}.safetensors")
    (folder / "modules.json").write_text(json.dumps(shapes))

    converters = importlib.import_module("diffsynth.utils.state_dict_converters.flux_dit")
    natives = json.loads((folder / "natives.json").read_text())
    original = {f"{native}.weight": native for native in natives}
    (folder / "flux.json").write_text(json.dumps(converters.FluxDiTStateDictConverter(original)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
