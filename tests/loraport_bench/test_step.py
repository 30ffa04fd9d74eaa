"""`loraport bench step` on a CPU: real trainings of the tiny checkpoint, the stock recipe, the file and the tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport_bench import rows, table
from loraport_bench.rows import Bar, Row

MEMORY = {"quantize": "none", "offload": "none", "compile": "none", "gradient_checkpointing": True}
SMALL: dict[str, Any] = {"resolution": 64, "rank": 4}
ROWS = (
    Row("plain", MEMORY, stock="bf16", bar=Bar(seconds=1000, ratio=1e9, gib=1000), **SMALL),
    Row("pair", MEMORY, batch=2, bar=Bar(of="plain", throughput=1e9), **SMALL),
    Row("capped", MEMORY, limit_gib=6, **SMALL),
)
QUALITY = (Row("quality-bf16", MEMORY, **SMALL), Row("quality-other", MEMORY, **SMALL))


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


@pytest.mark.usefixtures("small_rows")
def test_each_row_is_a_real_training_beside_the_stock_recipe_and_is_not_run_twice(project: Path) -> None:
    code, said = bench(project, "--steps", "3")
    assert code == 0, said
    written = {line["row"]: line for line in lines(project)}
    assert list(written) == ["rate", "stock-bf16", "plain", "pair", "capped"]
    plain, stock = written["plain"], written["stock-bf16"]
    assert plain["status"] == stock["status"] == "ok"
    assert 0 < plain["step_s"]["p10"] <= plain["step_s"]["median"] <= plain["step_s"]["p90"]
    assert plain["times_stock"] == pytest.approx(stock["step_s"]["median"] / plain["step_s"]["median"], rel=0.01)
    assert {"load", "cache", "train"} <= plain["phases_s"].keys()
    assert plain["floor"]["seconds"] > 0
    assert (
        plain["settings"] | {"resolution": 64, "rank": 4, "batch": 1, "text_tokens": 512, "blocks": 3}
        == plain["settings"]
    )
    assert str(project) not in json.dumps(lines(project))
    pair = written["pair"]
    assert pair["images_per_second"] == pytest.approx(2 / pair["step_s"]["median"], rel=0.01)
    # The cap is for CUDA cards; a row that fails is a row, with its reason.
    assert written["capped"]["status"] == "failed"
    assert "memory_limit_gib" in written["capped"]["message"]
    assert "Below a bar: plain, pair (2 images)." in said

    before = lines(project)
    code, said = bench(project, "--steps", "3")
    assert code == 0
    assert lines(project) == before
    assert "plain: in the file already" in said


@pytest.mark.usefixtures("small_rows")
def test_the_held_out_loss_of_each_profile_is_measured_at_each_seed(project: Path) -> None:
    code, said = bench(project, "--quality", "--seeds", "0,1", "--steps", "3", "--gpus", "2")
    assert code == 0, said
    measured = {(line["row"], line["seed"]): line["held_out"] for line in lines(project) if "seed" in line}
    assert set(measured) == {(row.name, seed) for row in QUALITY for seed in (0, 1)}
    for seed in (0, 1):  # the same training under two names
        assert measured["quality-bf16", seed] == measured["quality-other", seed]
    assert measured["quality-bf16", 0]["start"] == measured["quality-bf16", 1]["start"]
    assert measured["quality-bf16", 0]["end"] != measured["quality-bf16", 1]["end"]
    assert "+0.00000 ± 0.00000" in said


def test_captions_get_exactly_the_length_asked_for(project: Path, tmp_path: Path) -> None:
    from loraport_native.models.checkpoint import find_checkpoint, load_tokenizer
    from loraport_native.models.text import tokenize

    texts = {"short": "a cat", "long": "a dog runs over a field " * 40, "odd": "Ünï 龍 #FF00AA"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    command = [sys.executable, "-m", "loraport_native.lengthen", str(project / "tiny"), "100", str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ})
    tokenizer = load_tokenizer(find_checkpoint(str(project / "tiny")))
    for name in texts:
        assert len(tokenize(tokenizer, (tmp_path / f"{name}.txt").read_text(), 1000)) == 100


def test_an_unknown_row_names_those_there_are(project: Path) -> None:
    code, said = bench(project, "--rows", "fp8-dynamik")
    assert code == 3
    assert "Did you mean 'fp8-dynamic'" in said
