"""`loraport backends`, `profiles`, `plugins`, and `--version`."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint, entry_points, version

import pytest
from typer.testing import CliRunner

import loraport.cli.main
import loraport.plugins
from loraport.cli.main import build_app
from loraport.plugins import GROUP, Plugins, plugins


def run(*arguments: str) -> tuple[str, str]:
    result = CliRunner().invoke(build_app(), list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_backends_tell_whether_they_are_ready() -> None:
    out, _ = run("backends")
    assert f"native {version('loraport')}: " in out
    assert "ready: " in out
    rows = json.loads(run("backends", "--json")[0])
    native = next(row for row in rows if row["name"] == "native")
    assert set(native) == {"name", "version", "description", "ready", "detail"}


def test_profiles_are_grouped_by_the_field_that_names_them() -> None:
    out, _ = run("profiles")
    lines = out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "memory.compile:",
        "memory.profile:",
        "memory.offload:",
        "memory.quantize:",
    ]
    assert any(line.startswith("  12gb ") and "quantize: nf4" in line for line in lines)
    cards = [line.split()[0] for line in lines[lines.index("memory.profile:") + 1 : lines.index("memory.offload:")]]
    assert cards == sorted(cards, key=lambda name: int(name.removesuffix("gb")))


def test_profiles_in_json_are_all_there() -> None:
    found = json.loads(run("profiles", "--json")[0])
    assert {(each["kind"], each["name"]) for each in found} == set(plugins().profiles())


def test_plugins_are_listed_with_those_that_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Plugins([*entry_points(group=GROUP), EntryPoint("broken", "no_such_module_anywhere", GROUP)])
    monkeypatch.setattr(loraport.plugins, "plugins", lambda: found)
    monkeypatch.setattr(loraport.cli.main, "plugins", lambda: found)
    out, _ = run("plugins")
    assert "native: loraport_native.plugin\n" in out
    assert "broken: failed: ModuleNotFoundError: No module named 'no_such_module_anywhere'\n" in out
    # Told at every start, before any command.
    assert capsys.readouterr().err.startswith("warning: the plugin broken could not be used: ModuleNotFoundError")


def test_the_version_is_the_packages() -> None:
    assert run("--version")[0] == f"loraport {version('loraport')}\n"
