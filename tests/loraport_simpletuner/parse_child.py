"""Run by SimpleTuner's interpreter: its own loader reads `config/config.json` of each folder given."""

import importlib.metadata
import json
import os
import sys

from simpletuner.helpers.configuration.loader import load_config

results = {}
for folder in sys.argv[1:]:
    os.chdir(folder)
    parsed = load_config(exit_on_error=True)
    results[folder] = {name: str(value) for name, value in vars(parsed).items()} | {
        name: value for name, value in vars(parsed).items() if isinstance(value, str | int | float | bool | list | None)
    }
packages = ("simpletuner", "torch", "transformers", "diffusers", "peft", "lycoris-lora", "accelerate", "bitsandbytes")
versions = {name: importlib.metadata.version(name) for name in packages}
print("@parsed " + json.dumps({"versions": versions, "python": sys.version.split()[0], "results": results}))
