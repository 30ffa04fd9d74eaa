from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from loraport.errors import DataError
from loraport_dataset import plugin

GOOD = '{"compositional_deconstruction":{"background":"a wall","elements":[]}}'
SPACED = GOOD.replace(":", ": ")
BROKEN = '{"high_level_description":"A dog."}'


@pytest.fixture
def cli() -> typer.Typer:
    cli = typer.Typer()
    plugin.register_commands(cli)
    return cli


def run(cli: typer.Typer, *arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["dataset", "check", *map(str, arguments)])
    return result.exit_code, result.stdout


def test_a_folder_of_good_captions_ends_with_zero(cli: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(GOOD)
    assert run(cli, tmp_path) == (0, "1 captions, 0 errors, 0 warnings.\n")


def test_errors_are_printed_with_file_place_and_rule_and_end_with_four(cli: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(GOOD)
    (tmp_path / "b.json").write_text(BROKEN)
    code, out = run(cli, tmp_path)
    assert code == 4
    assert out.startswith("b.json: compositional_deconstruction: error [root] Required and missing.")
    assert out.endswith("2 captions, 1 errors, 0 warnings.\n")


def test_warnings_alone_end_with_zero(cli: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(SPACED)
    code, out = run(cli, tmp_path)
    assert code == 0
    assert "a.json: the caption: warning [serialisation]" in out


def test_json_output_holds_every_finding(cli: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(BROKEN)
    code, out = run(cli, tmp_path, "--json")
    report = json.loads(out)
    assert (code, report["captions"], report["errors"], report["warnings"]) == (4, 1, 1, 0)
    assert report["findings"][0].keys() == {"file", "rule", "severity", "json_path", "message"}
    assert report["findings"][0]["file"] == "b.json"


def test_text_files_count_only_when_they_hold_json(cli: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog on a beach")
    (tmp_path / "b.txt").write_text("buggy, " + GOOD)
    (tmp_path / "c.caption").write_text(GOOD + "\n")
    code, out = run(cli, tmp_path)
    assert code == 4
    assert "b.txt: the caption: error [json]" in out
    assert out.endswith("2 captions, 1 errors, 0 warnings.\n")


def test_a_caption_that_is_not_utf_8_is_named_with_the_byte(cli: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('{"high_level_description":"café"}'.encode("latin-1"))
    code, out = run(cli, tmp_path)
    assert code == 4
    assert "a.json: the caption: error [json] Not UTF-8: byte 31 " in out


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_folder_without_captions_is_a_data_error(cli: typer.Typer, tmp_path: Path, name: str) -> None:
    result = CliRunner().invoke(cli, ["dataset", "check", str(tmp_path / name)])
    assert isinstance(result.exception, DataError)
    assert result.exception.hint


def test_loading_the_plugin_imports_nothing_heavy() -> None:
    probe = (
        "import sys, typer\n"
        "from loraport_dataset import plugin\n"
        "assert 'loraport_dataset.cli' not in sys.modules\n"
        "plugin.register_commands(typer.Typer())\n"
        "assert not {'torch', 'numpy', 'PIL', 'loraport_dataset.captions'} & set(sys.modules)\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", probe], check=True, env=environment)
