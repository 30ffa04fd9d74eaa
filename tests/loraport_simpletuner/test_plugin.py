"""What the plugin registers, without SimpleTuner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loraport.envs import Recipe
from loraport.planning import make_plan
from loraport.plugins import plugins
from loraport_simpletuner.recipe import PINNED, SUPPORTED, has_group_offload, recipe


def test_the_backend_and_its_dialect_are_registered() -> None:
    backend = plugins().backend("simpletuner")
    assert isinstance(backend.environment, Recipe)
    assert "simpletuner" in plugins().dialects()


def test_planning_needs_no_simpletuner_and_imports_no_torch(make_spec, tmp_path: Path) -> None:
    plan = make_plan(make_spec(), plugins().backend("simpletuner"), tmp_path)
    assert plan.refused() == []
    code = (
        "import sys, loraport_simpletuner.plugin, loraport_simpletuner.translate, loraport_simpletuner.launch, "
        "loraport_simpletuner.importer, loraport_simpletuner.collect\n"
        "assert not {'torch', 'simpletuner'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_simpletuner_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPORT_HOME", str(tmp_path))
    readiness = plugins().backend("simpletuner").readiness()
    assert not readiness.ready
    assert "loraport backends install simpletuner" in readiness.detail


def test_an_interpreter_that_is_not_there_is_told_and_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPORT_HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("python: {simpletuner: /no/such/python}")
    readiness = plugins().backend("simpletuner").readiness()
    assert not readiness.ready
    assert "/no/such/python" in readiness.detail


def test_the_pinned_version_is_a_supported_one() -> None:
    from packaging.specifiers import SpecifierSet

    assert SpecifierSet(SUPPORTED).contains(PINNED)
    assert any(PINNED in requirement for requirement in recipe().requirements)
    assert has_group_offload("4.8.9")
    assert not has_group_offload("4.9.0")


def test_the_specs_own_interpreter_is_asked_where_it_names_one(tmp_path: Path) -> None:
    readiness = plugins().backend("simpletuner").readiness(tmp_path / "python")
    assert not readiness.ready
    assert str(tmp_path / "python") in readiness.detail
