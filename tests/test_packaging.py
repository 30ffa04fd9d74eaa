"""The wheel, in a fresh environment, trains the quickstart's first steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {"loraport", "loraport_bench", "loraport_convert", "loraport_dataset", "loraport_profiles"}
PACKAGES |= {"loraport_ai_toolkit", "loraport_diffsynth", "loraport_native", "loraport_simpletuner"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_our_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == PACKAGES
    assert {"loraport_profiles/hardware/12gb.yaml", "loraport_profiles/measured.jsonl"} <= set(names)
    assert {"loraport_dataset/report/page.html.jinja", "loraport_dataset/report/style.css"} <= set(names)


def test_a_fresh_environment_trains_the_quickstart_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = REPOSITORY / "constraints.txt"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
    subprocess.run([*install, f"{wheel}[native]"], check=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    spec = REPOSITORY / "examples" / "quickstart" / "spec.yaml"
    subprocess.run(
        [tmp_path / "venv" / "bin" / "loraport", "train", str(spec), "--out", "run", "--set", "train.steps=3"],
        check=True,
        cwd=tmp_path,
        env={**clean, "LORAPORT_CACHE": str(tmp_path / "cache")},
    )
    run = tmp_path / "run"
    assert json.loads((run / "proof.json").read_text())["ok"]
    assert {"quickstart.safetensors", "loss.png", "spec.yaml", "plan.json"} <= {path.name for path in run.iterdir()}
