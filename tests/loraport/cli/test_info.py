"""`loraport backends`, `profiles`, `plugins`, and `--version`."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint, entry_points, version

import pytest
from typer.testing import CliRunner

import loraport.cli.main
import loraport.plugins
from loraport import gpu
from loraport.cli.main import build_app
from loraport.gpu import Card
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


def test_profiles_are_grouped_by_the_field_that_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out, _ = run("profiles")
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines)) <= 100
    heads = [line.split()[0] for line in lines if line.startswith("memory.")]
    assert heads == ["memory.compile:", "memory.offload:", "memory.quantize:", "memory.profile:"]
    hardware = "\n".join(lines[[line.split()[:1] for line in lines].index(["memory.profile:"]) :])
    names = [profile.name for (kind, _), profile in plugins().profiles().items() if kind == "hardware"]
    assert sorted(names, key=hardware.index) == sorted(names, key=lambda name: int(name.removesuffix("gb")))


def test_a_hardware_profile_stands_beside_what_it_is_predicted_and_was_measured_to_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    profile = plugins().profiles()["hardware", "6gb"]
    (row,) = [row for row in profile.measured if (row.resolution, row.rank, row.batch_size) == (768, 16, 1)]
    out, _ = run("profiles")
    lines = out.splitlines()
    index = next(i for i, line in enumerate(lines) if line.split()[:1] == [profile.name])
    assert f"{row.peak_allocated_gib:.1f}" in lines[index]
    assert f"{row.step_s:.2f}" in lines[index]
    assert row.card in lines[index]
    assert "768 px, rank 16, batch 1" in lines[index]
    assert all(f"{name}: {value}" in lines[index + 1] for name, value in profile.sets.items())
    (told,) = [p for p in json.loads(run("profiles", "--json")[0]) if p["name"] == profile.name]
    assert row.peak_allocated_gib in [each["peak_allocated_gib"] for each in told["measured"]]
    # Both are rounded, to one digit and to two.
    shown = lines[index].partition("batch 1")[2].split()[0]
    assert float(shown) == pytest.approx(told["predicted"]["peak_gib"], abs=0.06)


@pytest.mark.parametrize(
    ("cards", "says"),
    [
        ([], "has none that can be asked"),
        ([Card("Small", 3.9, (8, 6))], "none, for Small"),
        ([Card("Large", 23.6, (8, 6)), Card("Other", 7.6, (8, 9))], "24gb, for Large"),
    ],
)
def test_auto_stands_among_the_profiles_with_the_one_that_it_is_here(
    monkeypatch: pytest.MonkeyPatch, cards: list[Card], says: str
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setattr(gpu, "cards", lambda: cards)
    (line,) = [line for line in run("profiles")[0].splitlines() if line.startswith("  auto ")]
    assert line.rstrip().endswith(says)


def test_a_measurement_that_the_profiles_own_card_has_no_room_for_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of four takes 18 GiB with the settings of the preset for 16."""
    monkeypatch.setenv("COLUMNS", "240")
    sizes = [row.batch_size for row in plugins().profiles()["hardware", "16gb"].measured]
    assert 4 in sizes
    assert "batch 4" not in run("profiles")[0]


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
