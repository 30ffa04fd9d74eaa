"""The header of the published LoRA file: what it is and how it was made.

ComfyUI takes no setting from it; it is for model browsers, galleries and the person who finds the file a year on. Keys:
`modelspec.*` of Stability AI's model metadata standard 1.0.0, the `ss_*` keys that kohya's trainer made common, and our
own under `loraport.`.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from loraport.families import Family
from loraport.planning import Plan
from loraport.sets import subject

_NETWORK_MODULES = {"lora": "networks.lora", "lokr": "lycoris.kohya", "loha": "lycoris.kohya"}


def lora_metadata(plan: Plan, family: Family) -> dict[str, str]:
    """The header's text entries.

    There is no date among them, so that equal trainings give equal files, and no folder of the machine's owner.
    """
    spec, main = plan.spec, subject(plan.spec.dataset)
    versions = {"loraport": version("loraport"), plan.backend: plan.backend_version}
    checkpoint = Path(spec.model.checkpoint)
    described = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": family.architecture,
        "modelspec.implementation": "https://github.com/Comfy-Org/ComfyUI",
        "modelspec.title": spec.name,
        "modelspec.resolution": f"{main.resolution}x{main.resolution}",
        "ss_base_model_version": family.name,
        "ss_sd_model_name": checkpoint.name if checkpoint.is_absolute() else spec.model.checkpoint,
        "ss_output_name": spec.name,
        "ss_network_module": _NETWORK_MODULES[spec.lora.type],
        "ss_network_dim": str(spec.lora.rank),
        "ss_network_alpha": str(spec.lora.effective_alpha),
        "ss_steps": str(spec.train.steps),
        "loraport.family": family.name,
        "loraport.spec_sha256": spec.hash(),
        "loraport.versions": json.dumps(versions, sort_keys=True),
    }
    if spec.lora.type != "lora":
        described["ss_network_args"] = json.dumps({"algo": spec.lora.type})
    if main.trigger_word:
        described["modelspec.trigger_phrase"] = main.trigger_word
    return described
