"""What is made of measurements: statistics of a run's events, the data file, the floor, and the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_example import example
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.errors import DataError, SpecError
from loraport.footprint import Footprint, Forecast, Phase
from loraport.gpu import Card
from loraport.run import events
from loraport.run.api import plan
from loraport.spec.load import build_spec
from loraport_bench import measure, table
from loraport_bench.floor import Dimensions, floor_gib, floor_seconds, tokens
from loraport_bench.measure import Bench, Held, spec_of, spread, summarise
from loraport_bench.monitor import DeviceMonitor
from loraport_bench.places import shortened
from loraport_bench.records import Results
from loraport_bench.report.numbers import groups
from loraport_bench.results import DataFile
from loraport_bench.rows import QUALITY_ROWS, ROWS, Bar, Row

IDEOGRAM4 = Dimensions.of(
    {"num_layers": 34, "attention_head_dim": 256, "num_attention_heads": 18, "intermediate_size": 12288}
)


def step(number: int, time: float, seconds: float = 1.0) -> events.Step:
    peaks = {"peak_memory_gib": 3.0 + number, "peak_reserved_gib": 4.0 + number}
    return events.Step(step=number, total=9, loss=0.5, seconds=seconds, time=time, **peaks)


def monitor(*samples: tuple[float, float]) -> DeviceMonitor:
    watched = DeviceMonitor("0")
    watched.samples = [(moment, int(gib * 2**30)) for moment, gib in samples]
    return watched


def test_a_step_lasts_from_the_end_of_the_one_before_so_that_nothing_between_is_left_out() -> None:
    told = [
        events.PhaseStarted(phase="load", time=0),
        events.PhaseStarted(phase="cache", time=10),
        events.Progress(done=1, total=1, peak_memory_gib=2.5, time=12),
        events.PhaseStarted(phase="train", time=14),
        step(1, 24, seconds=10),
        step(2, 25),
        step(3, 27),  # two seconds, of which the trainer counted one
        events.Checkpoint(step=3, path="x", time=30),
        step(4, 31),  # a checkpoint before it
        step(5, 32),
        events.PhaseStarted(phase="validate", time=32),
        events.Validation(step=5, loss=0.25, time=40),
        events.PhaseStarted(phase="train", time=41),
        step(6, 43),  # the first after a pause has no beginning to count from
        step(7, 44),
        events.Finished(step=7, lora="a", proof="b", worst_difference=0.0, time=46),
    ]
    numbers = summarise(told, 2, monitor((5, 1.0), (11, 7.0), (20, 5.0), (60, 99.0)))
    assert numbers["step_s"] == spread([2, 4, 1, 1])
    assert numbers["first_steps_extra_s"] == 11 - 2 * 1.5
    assert numbers["phases_s"] == {"load": 10, "cache": 4, "train": 23, "validate": 9}
    assert numbers["card_peak_gib"] == {"load": 1.0, "cache": 7.0, "train": 5.0}
    assert numbers["cache_peak_allocated_gib"] == 2.5
    assert (numbers["peak_allocated_gib"], numbers["peak_reserved_gib"]) == (10.0, 11.0)
    assert numbers["held_out"] == {"start": 0.25, "end": 0.25}


@pytest.mark.parametrize(
    ("code", "message", "status"),
    [
        (3, "error: This run does not fit the card: 44.0 GiB are predicted", "does not fit"),
        (3, "error: memory.quantize: 'fp9' is not known.", "failed"),
        (5, "error: Out of memory: CUDA", "out of memory"),
    ],
)
def test_a_row_that_is_too_large_for_the_card_says_so(code: int, message: str, status: str) -> None:
    assert measure._failure(code, message)["status"] == status


def test_what_a_run_says_that_is_not_begun_is_what_the_bench_looks_for() -> None:
    phase = Phase("training", {"weights": 44.0}, "")
    with pytest.raises(SpecError, match=measure._TOO_LARGE):
        Forecast(Footprint([phase], {}, room_gib=23.5), Card("A card", 24, (8, 9))).check()


def test_a_run_without_a_step_has_no_step_time() -> None:
    assert "step_s" not in summarise([events.PhaseStarted(phase="load", time=0)], 1, monitor())


def test_what_a_killed_session_tore_is_cut_off_when_the_next_writes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    DataFile(path).append({"row": "a", "status": "ok"})
    with path.open("ab") as file:
        file.write(b'{"row": "b", "sta')
    file = DataFile(path)
    assert list(file.rows) == [("a", None)]
    file.append({"row": "c", "seed": 1, "status": "failed"})
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == ["a", "c"]
    assert DataFile(path).good("c", 1) is None
    file.append({"row": "a", "status": "ok", "newest": True})
    assert DataFile(path).good("a") == {"row": "a", "status": "ok", "newest": True}


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"row": "a", "status": "ok"}\n{"name": "b"}\n')
    with pytest.raises(DataError, match="line 2"):
        DataFile(tmp_path / "rows.jsonl")


def test_the_floor_is_that_of_the_sums_done_by_hand() -> None:
    # 34 blocks of 4·4608² + 3·4608·12288 parameters; 4096 + 512 tokens; a card of 790 TFLOP/s.
    assert IDEOGRAM4.projections == 8_663_334_912
    assert IDEOGRAM4.adapter(32) == 85_229_568
    assert tokens(1024, 512) == 4608
    seconds = {
        (recomputed, fp8): floor_seconds(IDEOGRAM4, 4608, 1, recomputed, fp8, 790)
        for recomputed in (False, True)
        for fp8 in (False, True)
    }
    assert seconds[False, False] == pytest.approx((2 * 79.84 + 3.5 * 13.31) / 790, rel=1e-3)
    assert seconds[True, False] == pytest.approx((3 * 79.84 + 4.5 * 13.31) / 790, rel=1e-3)
    assert seconds[False, True] == pytest.approx((79.84 + 3.5 * 13.31) / 790, rel=1e-3)
    assert floor_seconds(IDEOGRAM4, 4608, 4, True, True, 790) == pytest.approx(4 * seconds[True, True])


def test_the_memory_floor_holds_what_must_be_held() -> None:
    adapter = 85_229_568 * 16 / 2**30
    saved = 34 * 4608 * 4608 * 2 / 2**30
    whole = floor_gib(IDEOGRAM4, 4608, 1, 32, "fp8", streamed=False, activations=False)
    assert whole == pytest.approx(8_663_334_912 / 2**30 + saved + adapter)
    streamed = floor_gib(IDEOGRAM4, 4608, 1, 32, "fp8", streamed=True, activations=True)
    assert streamed == pytest.approx(8_663_334_912 / 34 / 2**30 + adapter)


def measured(name: str, seconds: float, gib: float = 5.0, hour: int = 9, **more: Any) -> dict[str, Any]:
    peaks = {"peak_allocated_gib": gib, "images_per_second": 1 / seconds}
    date = f"2026-12-01T{hour:02}:00:00+00:00"
    return {"row": name, "date": date, "status": "ok", "step_s": spread([seconds]), **peaks, **more}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataFile:
    rows = (
        Row("fast", {}, bar=Bar(seconds=0.4, ratio=2.0, gib=4.0)),
        Row("streamed", {}, bar=Bar(of="fast", times=1.08)),
        Row("batch", {}, batch=4, bar=Bar(of="fast", throughput=1.1)),
        Row("broken", {}, bar=Bar(seconds=1.0)),
        Row("not-run", {}),
    )
    monkeypatch.setattr(table, "ROWS", rows)
    file = DataFile(tmp_path / "rows.jsonl")
    file.append(measured("stock-bf16", 1.0))
    file.append(
        measured("fast", 0.4, times_stock=2.5, floor={"seconds": 0.2, "gib": 3.0}, card_peak_gib={"train": 6.0})
    )
    file.append(measured("streamed", 0.44))
    file.append(measured("batch", 1.4) | {"images_per_second": 4 / 1.4})
    file.append({"row": "broken", "status": "out of memory"})
    return file


def test_the_table_holds_each_row_to_its_bar(data: DataFile) -> None:
    lines = {line[0]: line for line in table.step_cells(data)}
    assert list(lines) == ["fast", "streamed", "batch (4 images)", "broken", "*stock-bf16*"]
    assert lines["fast"][1:] == [
        "0.400 (0.400 to 0.400)", "0.400", "≤ 0.4 ✓", "2.50", "≥ 2 ✓", "2.00", "5.00", "≤ 4 ✗", "3.00", "6.0",
    ]  # fmt: skip
    assert lines["streamed"][3] == "1.100 × fast, ≤ 1.08 ✗"
    assert lines["batch (4 images)"][3] == "1.143 × the images/s of fast, ≥ 1.1 ✓"
    assert lines["broken"][1] == "out of memory"
    assert table.missed(data) == ["fast", "streamed"]
    # Measured again later, on another machine perhaps: what was measured with it is still compared with the first.
    data.append(measured("fast", 0.3, hour=17))
    data.append(measured("batch", 1.2, hour=16) | {"images_per_second": 4 / 1.2})
    lines = {line[0]: line for line in table.step_cells(data)}
    assert lines["streamed"][3] == "1.100 × fast, ≤ 1.08 ✗"
    assert lines["batch (4 images)"][3] == "1.000 × the images/s of fast, ≥ 1.1 ✗"


def test_held_out_losses_are_compared_seed_by_seed(tmp_path: Path) -> None:
    file = DataFile(tmp_path / "rows.jsonl")
    ends = {"bf16": (0.50, 0.60), "nf4": (0.51, 0.62)}
    for name, losses in ends.items():
        for seed, loss in enumerate(losses):
            row = {"row": f"quality-{name}", "seed": seed, "status": "ok", "held_out": {"start": 1.0, "end": loss}}
            file.append(row)
    reference, nf4 = table.quality_cells(file)
    assert reference == ["bf16", "1.00000 ± 0.00000", "0.55000 ± 0.07071", "–", "0, 1"]
    assert nf4[2:] == ["0.56500 ± 0.07778", "+0.01500 ± 0.00707", "0, 1"]


def test_each_row_tells_the_held_out_loss_of_its_quantisation_once_some_were_measured(tmp_path: Path) -> None:
    file = DataFile(tmp_path / "rows.jsonl")
    for name in ("bf16", "nf4-checkpointing", "int8-checkpointing", "preset-6gb", "stock-nf4"):
        file.append(measured(name, 0.4))
    assert table.step_head(file) == table.STEP_HEAD
    for name, losses in {"bf16": (0.50, 0.60), "nf4": (0.51, 0.62)}.items():
        for seed, loss in enumerate(losses):
            row = {"row": f"quality-{name}", "seed": seed, "status": "ok", "held_out": {"start": 1.0, "end": loss}}
            file.append(row)
    assert table.step_head(file)[-1] == table.HELD_OUT
    lines = {line[0]: line for line in table.step_cells(file)}
    assert {name: line[-1] for name, line in lines.items()} == {
        "bf16": "0, at 0.55000 ± 0.07071",
        "nf4-checkpointing": "+0.01500 ± 0.00707",
        "preset-6gb": "+0.01500 ± 0.00707",  # it stores nf4
        "int8-checkpointing": "–",
        "*stock-nf4*": "–",
    }
    assert {len(line) for line in lines.values()} == {len(table.step_head(file))}
    file.append({"row": "quality-int8", "seed": 1, "status": "ok", "held_out": {"start": 1.0, "end": 0.61}})
    assert "+0.01000 (one seed)" in [line[-1] for line in table.step_cells(file)]


def test_a_page_gets_its_tables_from_the_file_between_the_markers(data: DataFile, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench: rows.jsonl -->\nstale\n<!-- /bench -->\nafter\n")
    filled = table.fill(page)
    assert filled == f"before\n<!-- bench: rows.jsonl -->\n{table.markdown(data)}<!-- /bench -->\nafter\n"
    page.write_text(filled)
    assert table.fill(page) == filled
    page.write_text("<!-- bench: rows.jsonl short -->\n<!-- /bench -->\n")
    brief = table.fill(page).splitlines()
    assert brief[0] == "<!-- bench: rows.jsonl short -->"
    assert brief[1] == "| profile | s/step | × stock | peak GiB |"
    assert all(line.count("|") == 5 for line in brief[1:-1])
    (tmp_path / "trainers").mkdir()
    example().write(tmp_path / "trainers" / "results.json")
    page.write_text("<!-- bench: trainers/results.json -->\n<!-- /bench -->\n")
    trainers = table.fill(page)
    assert "**Matched, fp8**\n\n| backend | s a step |" in trainers
    assert trainers.count("**") == 2 * len(groups(example()))
    assert "held-out loss" in trainers
    page.write_text("<!-- bench: trainers/results.json short -->\n<!-- /bench -->\n")
    assert "held-out loss" not in table.fill(page)
    assert "| memory, training | memory, whole run | whole run |" in table.fill(page)
    page.write_text("<!-- bench: gone.jsonl -->\n<!-- /bench -->\n")
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        table.fill(page)


def test_a_page_that_cannot_be_filled_is_told_and_stays_as_it_is(data: DataFile, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nosuch\.md cannot be read: No such file"):
        table.fill(tmp_path / "nosuch.md")
    page = tmp_path / "page.md"
    opened = "<!-- bench: rows.jsonl -->\n"
    for text, said in (
        ("nothing, not even inline: `<!-- bench: FILE -->`\n", "has no marker of a table"),
        (f"{opened}mine\n", r"the table of rows\.jsonl has no end"),
        (f"{opened}mine\n{opened}<!-- /bench -->\n", r"the table of rows\.jsonl has no end"),
    ):
        page.write_text(text)
        with pytest.raises(DataError, match=said):
            table.fill(page)
        assert page.read_text() == text


def test_the_command_tells_how_many_tables_of_a_page_it_renewed(data: DataFile, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for number, said in ((1, "Renewed 1 table in"), (2, "Renewed 2 tables in")):
        page.write_text("<!-- bench: rows.jsonl -->\n<!-- /bench -->\n" * number)
        done = CliRunner().invoke(build_app(), ["bench", "table", "--into", str(page)])
        assert said in " ".join(done.output.split())
        assert page.read_text().count(table.markdown(data)) == number


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks/README.md"])
def test_the_numbers_in_our_own_pages_are_those_of_the_data_files(page: str) -> None:
    path = Path(__file__).parents[2] / page
    assert table.fill(path) == path.read_text(encoding="utf-8"), f"run: loraport bench table --into {page}"


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "docs" / "benchmarks").glob("*/results.json")))
def test_the_benches_that_are_kept_read_and_tell_no_place_of_a_machine(path: Path) -> None:
    assert Results.read(path).runs
    content = json.loads(path.read_text(encoding="utf-8"))
    assert shortened(content) == content


def test_rows_that_share_a_stock_recipe_are_of_one_size_and_bars_name_rows_that_are_there() -> None:
    assert len({(row.resolution, row.text, row.rank, row.batch) for row in ROWS if row.stock}) == 1
    names = [row.name for row in (*ROWS, *QUALITY_ROWS)]
    assert len(names) == len(set(names))
    assert {row.bar.of for row in ROWS if row.bar.of} <= set(names)


@pytest.mark.parametrize("row", [*ROWS, *QUALITY_ROWS], ids=lambda row: row.name)
def test_the_native_trainer_takes_every_row_as_it_is(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "make_dataset", lambda *arguments: tmp_path)
    bench = Bench(tmp_path / "model", tmp_path, tmp_path, steps=30, warm_up=10)
    held = Held(1) if row in QUALITY_ROWS else None
    spec = build_spec(spec_of(row, bench, held), base=tmp_path, origin=row.name).spec
    made = plan(spec, "native", tmp_path / "run")
    made.check()
    assert not made.not_exact()
    assert made.spec.train.steps == 40
