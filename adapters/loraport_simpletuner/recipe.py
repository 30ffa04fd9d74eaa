"""The environment SimpleTuner runs in, and the versions this adapter was written for."""

from __future__ import annotations

import shutil
import sys

from packaging.version import Version

from loraport.envs import Recipe

#: What is installed, and what keys are written for unless backend.options.version says otherwise.
PINNED = "4.10.1"
SUPPORTED = ">=4.8,<4.11"

#: First version without the group-offload keys; blocks are swapped instead.
_NO_GROUP_OFFLOAD = Version("4.9")


def has_group_offload(version: str) -> bool:
    """Whether this version of SimpleTuner knows the group-offload keys."""
    return Version(version) < _NO_GROUP_OFFLOAD


def _extra() -> str:
    """torch comes with one of SimpleTuner's extras only."""
    if sys.platform == "darwin":
        return "apple"
    return "cuda" if shutil.which("nvidia-smi") else "cpu"


def recipe() -> Recipe:
    """A tried set: 4.10.1 leaves torch and transformers open, and newer ones break the import of peft."""
    return Recipe(
        package="simpletuner",
        versions=SUPPORTED,
        module="simpletuner.helpers.models.ideogram.model",
        requirements=[f"simpletuner[{_extra()}]=={PINNED}", "bitsandbytes>=0.45; sys_platform == 'linux'"],
        constraints=["torch==2.13.0", "torchvision==0.28.0", "torchaudio<2.14", "transformers<5.18"],
        python=">=3.12,<3.15",
    )
