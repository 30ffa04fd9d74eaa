"""Runs in DiffSynth's interpreter: its own parsers and configuration classes, on arguments from standard input.

Reads a JSON list of {"arguments": [...]}; writes a list of what DiffSynth made of each: its parsed options, and the
quantisation and files that it would load.
"""

import importlib.util
import json
import sys

sys.path.pop(0)
specification = importlib.util.spec_from_file_location("entry", sys.argv[1])
entry = importlib.util.module_from_spec(specification)
specification.loader.exec_module(entry)
entry.make_torchvision_importable()

from diffsynth.diffusion import DiffusionTrainingModule  # noqa: E402
from diffsynth.diffusion.runner import get_optimizer_class  # noqa: E402

module = DiffusionTrainingModule()
found = []
for case in json.loads(sys.stdin.readline()):
    options = entry.parse(case["arguments"])
    configs = module.parse_model_configs(
        options.model_paths,
        options.model_id_with_origin_paths,
        offload_models=options.offload_models,
        quant_options=options.quant_options,
    )
    models = [
        {
            "file": config.path or f"{config.model_id}:{config.origin_file_pattern}",
            "quantized": config.quantize.method if config.quantize else None,
        }
        for config in configs
    ]
    optimizer = get_optimizer_class(options.customized_optimizer)
    found.append({"options": vars(options), "models": models, "optimizer": optimizer.__name__})
print("@found " + json.dumps(found))
