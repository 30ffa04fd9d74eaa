"""Whether ComfyUI and LyCORIS compute the same with adapters that are made from the base weight: OFT, BOFT, GLoRA.

python turns_child.py CHECKOUT REPORT: REPORT gets, by kind and shape of the weight, how far the two are apart, relative
to the change; null where ComfyUI loads nothing.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from comfyui_child import start

SHAPES = {"square": (32, 32), "tall": (64, 24), "wide": (16, 48), "convolution": (16, 8, 3, 3)}


def computed(layer, shape):
    """The weight that a layer acts as, from unit inputs."""
    import torch

    if len(shape) == 2:
        return layer(torch.eye(shape[1])).T
    units = torch.eye(shape[1] * 9).reshape(-1, *shape[1:])
    return layer(units)[:, :, 0, 0].T.reshape(shape)


def apart(module, options, shape):
    """LyCORIS' own forward pass against ComfyUI's weight, with the tensors that LyCORIS saves."""
    import comfy.lora
    import torch

    torch.manual_seed(0)
    plain = torch.nn.Linear(shape[1], shape[0], bias=False)
    layer = plain if len(shape) == 2 else torch.nn.Conv2d(shape[1], shape[0], 3, bias=False)
    adapter = module("x", layer, 1.0, lora_dim=4, **options).eval()
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    before = layer.weight.detach().clone()
    saved = {f"x.{name}": tensor.detach().clone() for name, tensor in adapter.state_dict().items()}
    with torch.no_grad():
        adapter.apply_to()
        trained = computed(layer, shape)
        patches = comfy.lora.load_lora(saved, {"x": "x.weight"})
        if "x.weight" not in patches:
            return None
        patch = [(1.0, patches["x.weight"], 1.0, None, None)]
        found = comfy.lora.calculate_weight(patch, before.clone(), "x.weight")
    return float((found - trained).norm() / (trained - before).norm())


def main(checkout, report):
    start(checkout)
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.glora import GLoRAModule

    kinds = {
        "OFT": (DiagOFTModule, {"alpha": 0}),
        "OFT with rescale": (DiagOFTModule, {"alpha": 0, "rescaled": True}),
        "OFT with a constraint": (DiagOFTModule, {"constraint": 0.02}),
        "BOFT": (ButterflyOFTModule, {"alpha": 0}),
        "BOFT with rescale": (ButterflyOFTModule, {"alpha": 0, "rescaled": True}),
        "GLoRA": (GLoRAModule, {"alpha": 3}),
    }
    found = {
        kind: {name: apart(module, options, shape) for name, shape in SHAPES.items()}
        for kind, (module, options) in kinds.items()
    }
    report.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
