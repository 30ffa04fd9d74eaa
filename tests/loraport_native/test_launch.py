"""Whether the trainer can be started, in this interpreter or in one that the spec names."""

from __future__ import annotations

import sys
import venv
from pathlib import Path

import pytest

from loraport_native import launch


def test_this_environment_is_ready_and_says_its_versions() -> None:
    found = launch.readiness()
    assert found.ready
    assert "torch" in found.detail


def test_a_missing_package_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch.REQUIRED, "no_such_module", "no-such-package")
    found = launch.readiness()
    assert not found.ready
    assert "no-such-package" in found.detail
    assert "loraport[native]" in found.detail


def test_an_interpreter_of_the_specs_is_asked_itself(tmp_path: Path) -> None:
    assert launch.readiness(Path(sys.executable)).ready
    venv.create(tmp_path / "bare", with_pip=False)
    bare = launch.readiness(tmp_path / "bare" / "bin" / "python")
    assert not bare.ready
    assert "torch" in bare.detail
    absent = launch.readiness(tmp_path / "nowhere")
    assert not absent.ready
    assert "backend.python" in absent.detail
