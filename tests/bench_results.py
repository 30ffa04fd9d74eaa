"""Reads what a bench of the tests wrote."""

from __future__ import annotations

from pathlib import Path

from loraport_bench.records import Results


def results(tmp_path: Path) -> Results:
    return Results.read(tmp_path / "out" / "results.json")
