"""Shared by these tests. The real ai-toolkit is at hand when two environment variables say where:

LORAPORT_AI_TOOLKIT         its checkout
LORAPORT_AI_TOOLKIT_PYTHON  an interpreter with its packages
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# The specs that several of these tests share.
sys.path.insert(0, str(Path(__file__).parent))

HARNESS = Path(__file__).parent / "harness"
RECORD = Path(__file__).parents[2] / "docs" / "backends-verified" / "ai-toolkit.json"
_VERSIONS = (
    "import importlib.metadata as m, json, platform; print(json.dumps({'python': platform.python_version()} | "
    "{n: m.version(n) for n in ('torch', 'torchvision', 'transformers', 'diffusers', 'optimum-quanto', 'torchao', "
    "'accelerate')}))"
)
_outcomes: dict[str, str] = {}


@pytest.fixture(scope="session")
def ai_toolkit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The real ai-toolkit, in a folder of links to its own with the harness's run.py."""
    checkout, python = os.environ.get("LORAPORT_AI_TOOLKIT"), os.environ.get("LORAPORT_AI_TOOLKIT_PYTHON")
    if not checkout or not python:
        pytest.skip("LORAPORT_AI_TOOLKIT and LORAPORT_AI_TOOLKIT_PYTHON do not say where the real ai-toolkit is")
    folder = tmp_path_factory.mktemp("ai-toolkit, ü")
    for path in Path(checkout).iterdir():
        if path.name != "run.py":
            (folder / path.name).symlink_to(path)
    (folder / "real_run.py").symlink_to(Path(checkout) / "run.py")
    shutil.copyfile(HARNESS / "run.py", folder / "run.py")
    return {"checkout": folder, "python": Path(python)}


@pytest.fixture(scope="session")
def ask(ai_toolkit: dict[str, Path]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Asks ai-toolkit's own classes; see harness/ask.py."""

    def run(question: dict[str, Any]) -> dict[str, Any]:
        command = [str(ai_toolkit["python"]), str(HARNESS / "ask.py"), str(ai_toolkit["checkout"])]
        done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return run


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "test_real.py" in report.nodeid and (report.when == "call" or report.outcome == "failed"):
        _outcomes[report.nodeid.partition("::")[2]] = report.outcome


@pytest.hookimpl
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write down what ran with which versions, when all of it ran."""
    checkout, python = os.environ.get("LORAPORT_AI_TOOLKIT"), os.environ.get("LORAPORT_AI_TOOLKIT_PYTHON")
    chosen = session.config.getoption("keyword") or any("::" in one for one in session.config.args)
    if not (checkout and python and _outcomes) or chosen or "skipped" in _outcomes.values():
        return
    from loraport_ai_toolkit.recipe import REPOSITORY, checkout_version

    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, check=True).stdout
    content = {
        "backend": "ai-toolkit",
        "repository": REPOSITORY,
        "version": checkout_version(Path(checkout)),
        "commit": commit or None,
        "environment": json.loads(versions),
        "device": "cpu",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "outcome": "passed" if set(_outcomes.values()) == {"passed"} else "failed",
        "tests": dict(sorted(_outcomes.items())),
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
