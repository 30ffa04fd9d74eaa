"""On a CUDA card: rows of `loraport bench step` on the tiny checkpoint, the card's memory watched, and a limit kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from typer.testing import CliRunner  # noqa: E402

from loraport.cli.main import build_app  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
ROWS = ("fp8-dynamic-checkpointing", "fp8-dynamic-streamed", "nf4-checkpointing")


def bench(folder: Path, *options: str) -> dict[str, dict]:
    places = ["--out", str(folder / "rows.jsonl"), "--checkpoint", str(folder / "tiny"), "--work", str(folder / "work")]
    few = ["--steps", "6", "--warm-up", "3"]
    done = CliRunner().invoke(build_app(), ["bench", "step", *places, *few, *options])
    assert done.exit_code == 0, done.output
    lines = map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    return {line["row"]: line for line in lines}


def test_rows_are_measured_with_the_memory_of_the_whole_card(tmp_path: Path) -> None:
    from loraport_native.sizes import TINY
    from loraport_native.tiny import write_checkpoint

    write_checkpoint(tmp_path / "tiny", "official", TINY, fp8=True, device="cuda")
    rows = bench(tmp_path, "--rows", ",".join(ROWS))
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    assert rows["rate"]["bf16_tflops"] > 1
    for name in ROWS:
        row = rows[name]
        assert row["peak_allocated_gib"] <= row["peak_reserved_gib"] <= row["card_peak_gib"]["train"]
    assert rows["nf4-checkpointing"]["times_stock"] > 0

    (tmp_path / "rows.jsonl").unlink()
    half = rows["nf4-checkpointing"]["peak_allocated_gib"] / 2
    capped = bench(tmp_path, "--rows", "nf4-checkpointing", "--limit-memory", str(half))["nf4-checkpointing"]
    assert capped["status"] == "out of memory", capped
    assert capped["settings"]["limit_gib"] == half


def test_a_trainer_on_a_card_is_watched_by_what_the_driver_tells(tmp_path: Path) -> None:
    from real_bench import bench as bench_trainers

    (run,) = bench_trainers(tmp_path, ["native"], {}, "--seeds", "0", "--profiles", "fp8", cards=None).runs
    assert run.status == "ok", run.failure
    assert run.machine is not None
    assert run.machine.card
    assert run.machine.driver
    assert run.machine.idle is not None
    assert run.device_memory is not None
    assert run.device_memory.interval_s < 0.1
    assert run.device_memory.by_phase["train"] > 100 * 2**20  # more than CUDA's own
    assert run.torch_peaks is not None
    assert run.torch_peaks.allocated_bytes < run.device_memory.peak_bytes
    assert run.host_memory is not None
    assert run.quality is not None
    (card,) = run.cards
    assert card.samples is not None  # none, where all measured steps fall between two looks
    told = card.temperature_c is not None or card.power_w is not None
    assert told == (card.samples > 0), "the driver tells nothing of this card"
    if run.energy is not None:
        assert run.energy.joules > 0
