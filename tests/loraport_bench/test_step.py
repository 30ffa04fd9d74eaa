"""`loraport bench step` on a CPU: real trainings of the tiny checkpoint, the stock recipe, the file and the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.errors import DataError
from loraport_bench import rows, table
from loraport_bench.idle import alone_on_machine
from loraport_bench.rows import Bar, Row

MEMORY = {"quantize": "none", "offload": "none", "compile": "none", "gradient_checkpointing": True}
SMALL: dict[str, Any] = {"resolution": 64, "text": 64, "rank": 4}
ROWS = (
    Row("plain", MEMORY, stock="bf16", bar=Bar(seconds=1000, ratio=1e9, gib=1000), **SMALL),
    Row("refused", {**MEMORY, "quantize": "fp9"}, **SMALL),
)
QUALITY = (Row("quality-bf16", MEMORY, **SMALL),)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint and two photographs."""
    from loraport_native.tiny import write_tiny

    folder = tmp_path_factory.mktemp("bench")
    write_tiny(folder / "tiny", "official", fp8=True)
    source = Path(__file__).parents[2] / "examples" / "quickstart" / "images"
    (folder / "images").mkdir()
    for name in ("cat", "coffee", "rocket"):
        for suffix in ("jpg", "json"):
            (folder / "images" / f"{name}.{suffix}").symlink_to(source / f"{name}.{suffix}")
    return folder


@pytest.fixture
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROWS", ROWS)
    monkeypatch.setattr(rows, "QUALITY_ROWS", QUALITY)
    monkeypatch.setattr(table, "ROWS", ROWS)
    monkeypatch.setattr(table, "QUALITY_ROWS", QUALITY)


def bench(project: Path, *options: str) -> tuple[int, str]:
    places = [
        f"--{name}={project / path}"
        for name, path in {"out": "rows.jsonl", "checkpoint": "tiny", "images": "images", "work": "work"}.items()
    ]
    done = CliRunner().invoke(build_app(), ["bench", "step", *places, "--warm-up", "1", *options])
    return done.exit_code, done.output + str(done.exception or "")


def lines(project: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project / "rows.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.usefixtures("small_rows")
def test_each_row_is_a_real_training_beside_the_stock_recipe_and_is_not_run_twice(project: Path) -> None:
    code, said = bench(project, "--steps", "3")
    assert code == 0, said
    written = {line["row"]: line for line in lines(project)}
    assert list(written) == ["rate", "stock-bf16", "plain", "refused"]
    plain, stock = written["plain"], written["stock-bf16"]
    assert plain["status"] == stock["status"] == "ok"
    assert 0 < plain["step_s"]["p10"] <= plain["step_s"]["median"] <= plain["step_s"]["p90"]
    assert plain["times_stock"] == pytest.approx(stock["step_s"]["median"] / plain["step_s"]["median"], rel=0.01)
    assert len(list((project / "work" / "images-tiny-64-64").glob("*.txt"))) == 3
    assert {"load", "cache", "train"} <= plain["phases_s"].keys()
    assert plain["floor"]["seconds"] > 0
    assert (
        plain["settings"] | {"resolution": 64, "rank": 4, "batch": 1, "text_tokens": 64, "blocks": 3}
        == plain["settings"]
    )
    assert str(project) not in json.dumps(lines(project))
    # A row that fails is a row, with its reason.
    assert written["refused"]["status"] == "failed"
    assert "memory.quantize" in written["refused"]["message"]
    assert "Below a bar: plain." in said

    before = lines(project)
    code, said = bench(project, "--steps", "3")
    assert code == 0
    assert lines(project) == before
    assert "plain: in the file already" in said


@pytest.mark.slow
@pytest.mark.usefixtures("small_rows")
def test_the_held_out_loss_is_measured_at_each_seed_on_several_cards_at_once(project: Path) -> None:
    code, said = bench(project, "--quality", "--seeds", "0,1", "--steps", "3", "--gpus", "2")
    assert code == 0, said
    rows = [line for line in lines(project) if line["row"] == "quality-bf16"]
    measured = {line["seed"]: line["held_out"] for line in rows}
    assert all(line["settings"]["steps"] == 3 and "step_s" not in line for line in rows)  # cards and cores were shared
    assert measured[0]["start"] == measured[1]["start"] != measured[0]["end"]
    assert measured[0]["end"] != measured[1]["end"]


def test_runs_whose_time_is_measured_share_no_card(project: Path) -> None:
    code, said = bench(project, "--gpus", "2")
    assert code == 3
    assert "--quality" in said


def test_a_machine_that_measures_already_is_left_alone(project: Path, tmp_path: Path) -> None:
    with alone_on_machine("somebody's bench", wait=False):
        code, said = bench(project, "--rows", "bf16")
    assert code == 7
    assert "somebody's bench" in said


def test_no_checkpoint_is_made_on_a_card_that_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr("loraport_bench.data.make_checkpoint", made.append)
    places = ["--out", str(tmp_path / "rows.jsonl"), "--work", str(tmp_path / "work"), "--rows", "bf16"]
    with alone_on_machine("somebody's bench", wait=False):
        done = CliRunner().invoke(build_app(), ["bench", "step", *places])
    assert done.exit_code == 7, done.output
    assert made == []


def test_captions_get_exactly_the_length_asked_for(project: Path) -> None:
    from loraport_native.lengthen import lengthen
    from loraport_native.models.checkpoint import find_checkpoint, load_tokenizer
    from loraport_native.models.tokens import tokenize

    tokenizer = load_tokenizer(find_checkpoint(str(project / "tiny")))
    for text in ("a cat", "a dog runs over a field " * 40, "Ünï 龍 #FF00AA"):
        for tokens in range(90, 110):  # some of them at the end of a word
            longer = lengthen(tokenizer, text, tokens)
            assert longer.startswith(text[:5])
            assert len(tokenize(tokenizer, longer.strip(), 1000)) == tokens
    with pytest.raises(DataError, match="exactly 3 tokens"):
        lengthen(tokenizer, "a cat", 3)


def test_an_unknown_row_names_those_there_are(project: Path) -> None:
    code, said = bench(project, "--rows", "fp8-dynamik")
    assert code == 3
    assert "Did you mean 'fp8-dynamic'" in said
