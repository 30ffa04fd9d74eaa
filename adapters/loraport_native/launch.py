"""How the native trainer is started, and whether it can be. No torch is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

from loraport.backend import Readiness
from loraport.spec.models import TrainSpec

#: Modules the trainer imports, each with the package that brings it.
REQUIRED = {
    "torch": "torch",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "peft": "peft",
    "lycoris": "lycoris-lora",
    "bitsandbytes": "bitsandbytes",
    "prodigyopt": "prodigyopt",
    "lion_pytorch": "lion-pytorch",
    "matplotlib": "matplotlib",
}


def readiness(python: Path | None = None) -> Readiness:
    """Whether the packages of the `native` extra are in this environment, or in that of another interpreter."""
    if python is not None:
        return _readiness_of(python)
    missing = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing:
        return Readiness(False, f"not installed: {', '.join(missing)}. Install with: pip install 'loraport[native]'")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "peft"))
    return Readiness(True, versions)


def _readiness_of(python: Path) -> Readiness:
    code = "import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if u.find_spec(m) is None))"
    asked = [str(python), "-c", code, "loraport_native", *REQUIRED]
    try:
        done = subprocess.run(asked, capture_output=True, text=True)
    except OSError as error:
        return Readiness(False, f"backend.python: {python} cannot be started: {error.strerror}.")
    missing = [REQUIRED.get(module, "loraport") for module in done.stdout.split()]
    if done.returncode or missing:
        return Readiness(False, f"{python} lacks {', '.join(missing) or 'a working Python'}.")
    return Readiness(True, str(python))


def command(spec: TrainSpec, run_dir: Path) -> list[str]:
    """The trainer's process: in this interpreter, or in `backend.python`."""
    python = str(spec.backend.python or sys.executable)
    return [python, "-m", "loraport_native.train", str(run_dir)]
