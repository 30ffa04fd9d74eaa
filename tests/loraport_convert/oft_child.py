"""Runs sd-scripts' own OFT of a fused layer, in a process of its own, and writes down its file and what it computes.

python oft_child.py CHECKOUT FOLDER ALPHA: oft.safetensors is the module's state under its name for FLUX.1's
single_blocks.7.linear1, and seen.safetensors holds weight, bias, input and output.
"""

import sys
import types
from pathlib import Path

import torch
from comfyui_child import Absent
from safetensors.torch import save_file

WIDTH, NAME = 16, "oft_unet_single_blocks_7_linear1"


def main(checkout, folder, alpha):
    # It asks its own library for a logger alone, which imports all of the trainer.
    utils = types.ModuleType("library.utils")
    utils.setup_logging = lambda *args, **kwargs: None
    sys.modules |= {"library": types.ModuleType("library"), "library.utils": utils}
    sys.meta_path.append(Absent({"cv2"}))
    sys.path.insert(0, checkout)
    from networks.oft_flux import OFTModule

    torch.manual_seed(0)
    layer = torch.nn.Linear(WIDTH, 7 * WIDTH)
    seen = {"weight": layer.weight.detach().clone(), "bias": layer.bias.detach().clone()}
    module = OFTModule(NAME, layer, 1.0, 4, alpha, [WIDTH, WIDTH, WIDTH, 4 * WIDTH])
    module.apply_to()
    for blocks in module.oft_blocks:
        torch.nn.init.normal_(blocks, std=0.5)
    with torch.no_grad():
        seen["input"] = torch.randn(5, WIDTH)
        seen["output"] = layer(seen["input"])
    save_file({f"{NAME}.{key}": value for key, value in module.state_dict().items()}, folder / "oft.safetensors")
    save_file(seen, folder / "seen.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
