"""LoraPort: one LoRA training spec for any trainer, and a LoRA that ComfyUI loads at the end.

from loraport import TrainSpec, plan, train

result = train(TrainSpec.load("spec.yaml"), backend="native")
print(result.lora)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraport.run.api import RunResult, plan, resume, runs, train
    from loraport.spec.models import TrainSpec

__all__ = ["RunResult", "TrainSpec", "plan", "resume", "runs", "train"]


def __getattr__(name: str) -> Any:
    # Imported when first used, so that `loraport --help` starts at once.
    if name == "TrainSpec":
        from loraport.spec.models import TrainSpec

        return TrainSpec
    if name in __all__:
        from loraport.run import api

        return getattr(api, name)
    raise AttributeError(f"module 'loraport' has no attribute {name!r}")
