"""The command line answers at once: nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from timing import least_seconds

#: Twice what it takes on a quiet machine; a CI machine shares its cores.
SECONDS = 0.6 if os.environ.get("CI") else 0.3


def test_help_comes_quickly() -> None:
    assert least_seconds(["--help"], runs=5) < SECONDS


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["spec", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = {
        "torch",
        "diffusers",
        "transformers",
        "numpy",
        "PIL",
        "yaml",
        "safetensors",
        "pynvml",
        "loraport.spec.models",
    }
    if len(arguments) == 1:
        heavy.add("pydantic")  # for a command's help Typer itself imports it where it is installed
    probe = (
        "import atexit, sys\n"
        f"heavy = {heavy!r}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "from loraport.cli.main import main\n"
        f"sys.argv = ['loraport', *{arguments!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "loraport" in done.stdout
