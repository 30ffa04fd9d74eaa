"""DiffSynth-Studio's own environment, and whether an interpreter can run it."""

from __future__ import annotations

from pathlib import Path

from loraport.backend import Readiness
from loraport.envs import Recipe, find_interpreter, package_version, problem_with
from loraport.errors import SpecError

NAME = "diffsynth"

#: From 2.1.4 on there are `--quant_options`; 2.1.12 is what the tests train with.
RECIPE = Recipe(
    package="diffsynth",
    versions=">=2.1.4,<2.2",
    # DiffSynth itself is imported by the entry alone, which can do so beside a CPU build of torch too.
    module="accelerate",
    python=">=3.11",
    requirements=[
        "diffsynth>=2.1.4,<2.2",
        "torchvision",
        "bitsandbytes>=0.46",
        "torchao>=0.16",
        "comfy-kitchen>=0.2",
        "lion-pytorch>=0.2.2",
        "prodigyopt>=1.1",
    ],
    constraints=[
        "accelerate==1.15.0",
        "bitsandbytes==0.50.2",
        "comfy-kitchen==0.2.40",
        "diffsynth==2.1.12",
        "lion-pytorch==0.2.5",
        "modelscope==1.40.2",
        "pandas==3.1.1",
        "peft==0.21.2",
        "prodigyopt==1.1.2",
        "torch==2.13.0",
        "torchao==0.18.0",
        "torchvision==0.28.0",
        "transformers==5.23.0",
    ],
)


def readiness(given: Path | None = None) -> Readiness:
    """Whether DiffSynth is there, in a version this adapter was written for. Nothing of it is imported."""
    try:
        python = find_interpreter(NAME, given)
    except SpecError as error:
        return Readiness(False, error.message)
    problem = problem_with(python, RECIPE)
    if problem:
        return Readiness(False, f"{problem}. Install it with: loraport backends install {NAME}")
    return Readiness(True, f"{RECIPE.package} {package_version(python, RECIPE.package)} at {python}")
