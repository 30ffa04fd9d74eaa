"""Runs in DiffSynth's interpreter: what our entry makes of DiffSynth's training module.

Arguments: the entry, a checkpoint folder, the settings as JSON, DiffSynth's arguments. Writes the LoRA's scales, the
trained parameters, and mean and deviation of logit(sigma) for two sizes.
"""

import importlib.util
import json
import sys

sys.path.pop(0)
specification = importlib.util.spec_from_file_location("entry", sys.argv[1])
entry = importlib.util.module_from_spec(specification)
specification.loader.exec_module(entry)
entry.make_torchvision_importable()

import torch  # noqa: E402

settings = json.loads(sys.argv[3])
args = entry.parse(sys.argv[4:])
args.lora_alpha = settings["alpha"]
entry.register(sys.argv[2])
module = entry.training_module(settings, args, "cpu")


def levels(height: int, width: int) -> list[float]:
    sigma = module.schedule(height, width).sigmas.double()[1:-1]
    logit = torch.log(sigma / (1 - sigma))
    return [float(logit.median()), float((logit.quantile(0.8413) - logit.quantile(0.1587)) / 2)]


found = {
    "scales": sorted({layer.scaling["default"] for layer in module.modules() if hasattr(layer, "lora_A")}),
    "trained": {name: [list(p.shape), str(p.dtype)] for name, p in module.named_parameters() if p.requires_grad},
    "levels": {"512x512": levels(512, 512), "1024x512": levels(1024, 512)},
}
print("@found " + json.dumps(found))
