"""Rows in a bench's folder that are not of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bench_results import results

pytestmark = pytest.mark.usefixtures("stand_ins")

OPTIONS = ("--backends", "swift,steady", "--tiers", "matched", "--seeds", "0", "--held-out", "0")


def test_a_row_of_other_work_is_refused_and_nothing_of_it_counts(bench: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    code, said = bench(*OPTIONS, "--set", "lora.rank=8", "--part", "1/2", "-o", str(other))
    assert code == 0, said
    bench(*OPTIONS, "--part", "2/2")
    before = (tmp_path / "out" / "results.json").read_text()
    copied = tmp_path / "out" / "rows" / "matched-spec-swift-0-0"
    shutil.copytree(other / "rows" / "matched-spec-swift-0-0", copied)
    code, said = bench(*OPTIONS)
    assert code == 4, said
    told = " ".join(said.split())
    assert "matched-spec-swift-0-0 is of another bench" in told
    assert "lora.rank is 8 in it, and 4 here" in told
    assert (tmp_path / "out" / "results.json").read_text() == before
    shutil.rmtree(copied)
    assert bench(*OPTIONS)[0] == 0
    assert results(tmp_path).complete


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (("--warm-up", "3"), "--warm-up is 3 in it, and 2 here"),
        (("--set", "memory.gradient_checkpointing=none"), "memory.gradient_checkpointing is 'none' in it"),
        (("--set", "model.dtype=fp32"), "model.dtype is 'fp32' in it, and 'bf16' here"),
    ],
)
def test_a_row_that_was_timed_or_computed_otherwise_is_refused(
    bench: Any, tmp_path: Path, other: tuple[str, ...], told: str
) -> None:
    bench(*OPTIONS, "--part", "1/2", *other, "-o", str(tmp_path / "other"))
    shutil.copytree(tmp_path / "other" / "rows", tmp_path / "out" / "rows")
    code, said = bench(*OPTIONS)
    assert code == 4, said
    assert told in " ".join(said.split())


def test_rows_of_images_that_were_changed_since_are_refused(bench: Any, tmp_path: Path) -> None:
    bench(*OPTIONS)
    caption = tmp_path / "out" / "data" / "images" / "00001.json"
    text = caption.read_text()
    caption.write_text(json.dumps({"high_level_description": "another one"}))
    code, said = bench(*OPTIONS)
    assert code == 4, said
    assert "its images or captions are not those that are staged here now" in " ".join(said.split())
    caption.write_text(text)
    assert bench(*OPTIONS)[0] == 0


def test_rows_that_another_machine_measured_are_taken(bench: Any, tmp_path: Path) -> None:
    """Its folders lie elsewhere, and what its card decides is its own."""
    best = ("--backends", "swift,steady", "--tiers", "best-effort", "--seeds", "0", "--held-out", "0")
    bench(*best, "--part", "1/2", "-o", str(tmp_path / "node" / "bench"))
    record = tmp_path / "node" / "bench" / "rows" / "best-effort-spec-swift-0-0" / "run.json"
    content = json.loads(record.read_text())
    content["configuration"]["spec"]["memory"]["offload"] = "group"
    record.write_text(json.dumps(content))
    shutil.copytree(record.parents[1], tmp_path / "out" / "rows")
    code, said = bench(*best)
    assert code == 0, said
    assert "best-effort/spec/swift/0/0: there already" in said
    assert results(tmp_path).complete
