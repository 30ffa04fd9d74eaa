"""The reports: whole, escaped, true to the results, and shown quietly by a real browser."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bench_example import FILE, example
from chromium import chromium
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport_bench import records as r
from loraport_bench.report import charts, tables, write_reports
from loraport_bench.report.markdown import escaped, leading, markdown
from loraport_bench.report.numbers import groups, numbers
from loraport_bench.report.page import page

EVIL = '"><script>document.title="owned"</script><img src=x onerror=alert(1)>{{ 7*7 }}|`</style>'


class Parsed(HTMLParser):
    """Start tags with their attributes, and the texts of tables' cells."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))


def changed(results: r.Results, **values: Any) -> r.Results:
    return results.model_copy(update=values)


def evil_results() -> r.Results:
    """Every text that people, trainers and machines wrote would like to be markup."""

    def poisoned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {
                EVIL if key in ("files", "env", "versions") else name: poisoned(each, name)
                for name, each in value.items()
            }
        if isinstance(value, list):
            return [poisoned(each, key) for each in value]
        kept = {"tier", "tiers", "status", "kind", "scope", "measured", "started", "created", "updated", "timeline"}
        return EVIL if isinstance(value, str) and key not in kept | {"reason"} else value

    content = poisoned(example().model_dump(mode="json"))
    return r.Results.model_validate(content)


def bare_results() -> r.Results:
    """One failed run of which nothing is known, and one that was measured in nothing but its time."""
    results = example()
    empty = {"tier": "matched", "profile": "spec", "repeat": 0, "seed": 0, "started": results.created, "versions": {}}
    failed = r.Run(**empty, key="a", position=0, backend="native", status="failed", total_s=1, verdicts=[],
                   failure=r.Failure(reason="error", message="It fell."))  # fmt: skip
    timed = r.Run(**empty, key="b", position=1, backend="diffsynth", status="ok", total_s=0.0, verdicts=[])
    return changed(results, runs=[failed, timed], inequalities={})


def test_the_page_is_whole_and_loads_nothing() -> None:
    text = page(example())
    parsed = Parsed(text)
    tags = Counter(tag for tag, _ in parsed.tags)
    assert tags["script"] == tags["iframe"] == tags["object"] == tags["img"] == 0
    links = [attributes[name] for _, attributes in parsed.tags for name in ("src", "href") if name in attributes]
    assert all(link is not None and link.startswith(("#", "data:")) for link in links)
    assert {link for link in links if link and link.startswith("#")} <= {
        f"#{attributes['id']}" for _, attributes in parsed.tags if "id" in attributes
    }
    assert "url(" not in text
    assert "@import" not in text
    assert len(text) < 1_000_000
    drawn = {attributes["aria-label"].split(",")[0] for tag, attributes in parsed.tags
             if tag == "svg" and attributes.get("aria-label")}  # fmt: skip
    assert drawn >= {
        "Seconds a step",
        "Peak of device memory",
        "Device memory over time",
        "Phases of the runs",
        "Held-out loss",
        "Held-out loss against time",
        "Printed losses: Against images",
        "Printed losses: Against time",
    }
    for tag, attributes in parsed.tags:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
    headings = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))


def test_both_reports_tell_the_results_failures_inequalities_and_conditions() -> None:
    results = example()
    for text in (page(results), markdown(results).replace("\\", "")):
        for wanted in (
            "CUDA out of memory. Tried to allocate 2.00 GiB.",
            "Ended after 3600 s, the limit of a run.",
            "ai-toolkit has no nf4",
            "its first five steps run at a third of the learning rate",
            "the captions as they are: 412 to 655 tokens" if "<html" not in text else "412 to 655 tokens",
            "some trainers do not clip",
            "Invented GPU",
            "driver 580.00",
            "2.11.0",
            "2026-11-20",
            "0 of 3: refused",
            "0 of 3: out of memory",
            "2 of 3",
            "85,229,568",
            "native 0.1.0, bf16",
            "The step time is DiffSynth",
            "+0.30 %",
        ):
            assert wanted in text, wanted
    html = page(results)
    for wanted in ("must not be compared", "{&#34;invented&#34;: true}", "an invented reason", "seed&#34;: 1"):
        assert wanted in html, wanted


def test_the_tables_hold_the_medians_of_the_rows() -> None:
    results = example()
    runs = [run for run in results.runs if run.group == ("matched", "fp8", 1) and run.backend == "diffsynth"]
    steps = sorted(each for run in runs if run.steps for each in run.steps.each)
    peaks = sorted(run.device_memory.peak_bytes for run in runs if run.device_memory)
    (line,) = [
        line
        for line in markdown(results).split("## Matched, nf4")[0].splitlines()
        if line.startswith("| diffsynth | 1") and line.endswith("of 3 |")
    ]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1].startswith(f"{(steps[74] + steps[75]) / 2:#.3g} (")
    assert cells[4] == f"{peaks[1] / 2**30:.2f} GiB"
    assert cells[8] == "3 of 3"


def test_what_leads_is_said_with_whether_it_is_beyond_the_spread() -> None:
    first = groups(example())[0]
    speed, memory, quality = first.headlines()
    assert speed.startswith("Speed: native is first at 0.455 s a step; simpletuner, the next, takes 2.30 times")
    assert "native takes least" in memory
    assert "within the spread over the seeds" in quality
    natives = [run for run in example().runs if run.backend == "native"]
    twins = [run.model_copy(update={"backend": name}) for run in natives for name in ("native", "simpletuner")]
    assert "are level" in groups(changed(example(), runs=twins))[0].headlines()[0]


def test_memory_of_training_and_of_the_whole_run_are_told_apart_where_they_differ() -> None:
    def loading(run: r.Run, gib: float) -> r.Run:
        """The run with a peak before training that its steps do not reach."""
        if run.device_memory is None:
            return run
        peaks = {**run.device_memory.by_phase, "cache": int(gib * 2**30)}
        memory = run.device_memory.model_copy(update={"by_phase": peaks, "peak_bytes": max(peaks.values())})
        return run.model_copy(update={"device_memory": memory})

    runs = [loading(run, 23.07) if run.backend == "native" else run for run in example().runs]
    results = changed(example(), runs=runs)
    _, training, whole, _ = groups(results)[0].headlines()
    assert training.startswith("Device memory while training: native takes least, 12.08 GiB; simpletuner")
    assert whole.startswith("Device memory over the whole run: simpletuner takes least")
    first = markdown(results).split("## Matched, nf4")[0]
    (line,) = [line for line in first.splitlines() if line.startswith("| native | 0.4")]
    assert "| 12.08 GiB | 23.07 GiB |" in line
    assert "### Peak of device memory in each phase" in first
    assert "23.07 GiB" in page(results)


@pytest.mark.parametrize(("gaps", "told"), [((0.06, 0.934), "0.93 s"), ((0.06, 0.1), None)])
def test_samples_of_memory_that_lie_far_apart_are_told(gaps: tuple[float, float], told: str | None) -> None:
    content = example().model_dump(mode="json")
    traces = [run["device_memory"] for run in content["runs"] if run["device_memory"]]
    for number, trace in enumerate(traces):
        trace["longest_gap_s"] = gaps[number % 2]
    text, sentence = markdown(r.Results.model_validate(content)), "The longest time between two samples was"
    assert f"{sentence} {told}." in text if told else sentence not in text


def test_power_and_energy_of_an_earlier_version_are_left_out_since_compiling_went_into_them() -> None:
    def earlier(run: r.Run) -> r.Run:
        cards = [card.model_copy(update={"samples": None}) for card in run.cards]
        return run.model_copy(
            update={"cards": cards, "energy": run.energy and run.energy.model_copy(update={"steps_joules": None})}
        )

    new, old = (markdown(changed(example(), runs=runs)).split("## Matched, nf4")[0] for runs in (
        example().runs, [earlier(run) for run in example().runs]
    ))  # fmt: skip
    assert "655 W" in new
    assert "J an image" in new
    assert "energy of the run" in old
    for told in (" W |", "J an image", "MHz"):
        assert told not in old


def test_what_training_took_before_its_measured_steps_is_told_beside_it() -> None:
    def compiling(run: r.Run) -> r.Run:
        return run.model_copy(update={"phases": {**run.phases, "train": 100.0}}) if "train" in run.phases else run

    first = groups(changed(example(), runs=[compiling(run) for run in example().runs]))[0]
    native = first.entries[0]
    measured = [run.steps.wall_mean * 50 for run in native.good if run.steps and run.steps.wall_mean]
    assert native.first_steps_s is not None
    assert native.first_steps_s.median == pytest.approx(100 - sorted(measured)[1])
    table = tables.phases(first)
    assert table.head[table.head.index("train") + 1] == "first steps of it"
    assert {len(row) for row in table.rows} == {len(table.head)}
    assert "the first 10, in which trainers compile" in page(example())


def test_rows_of_the_schedule_that_are_not_there_are_named() -> None:
    results = changed(example(), runs=example().runs[:-1], complete=False)
    told = f"47 rows: 38 came to their end, 4 failed, 5 refused. Not run: {example().runs[-1].key};"
    assert told in markdown(results)
    assert told in page(results)
    none = changed(example(), runs=example().runs[:2], complete=False)
    assert "and 40 more; the command" in markdown(none)
    assert "Not run" not in markdown(example())


def test_one_repeat_is_told_as_what_it_is() -> None:
    runs = [run for run in example().runs if run.repeat == 0]
    protocol = example().protocol.model_copy(update={"repeats": 1, "seeds": [0]})
    told = markdown(changed(example(), runs=runs, protocol=protocol))
    assert "Each trainer ran once: how far runs differ from each other is not known." in told
    assert "Held-out loss: of one seed" in told
    assert "- Order: 1 repeat: native, diffsynth, simpletuner, ai-toolkit; seed 0" in told
    assert "Each trainer ran once" not in markdown(example())


def test_each_group_is_told_who_scored_its_own_runs() -> None:
    def scored(run: r.Run) -> r.Run:
        if run.quality is None or run.profile != "nf4":
            return run
        return run.model_copy(update={"quality": run.quality.model_copy(update={"evaluator": "another 2.0"})})

    of_group: dict[str, list[str]] = {}
    for part in markdown(changed(example(), runs=[scored(run) for run in example().runs])).split("\n## ")[1:]:
        of_group[part.partition("\n")[0]] = re.findall(r"Scored by (\S+)", part)
    assert {group: who for group, who in of_group.items() if who} == {
        "Matched, fp8": ["native"],
        "Matched, nf4": ["another"],
        "Best effort, fp8": ["native"],
        "Best effort, nf4": ["another"],
    }


def test_a_table_of_what_is_unequal_has_the_backends_that_have_rows_and_needs_two() -> None:
    def only(*backends: str) -> r.Results:
        return changed(example(), runs=[run for run in example().runs if run.backend in backends])

    table = tables.unequal(only("native", "diffsynth"), "matched/fp8")
    assert table is not None
    assert table.head == ("field", "spec", "native", "diffsynth")
    assert tables.unequal(only("native"), "matched/fp8") is None


def test_a_page_may_show_speed_and_memory_alone() -> None:
    brief = leading(example(), brief=True)
    assert brief.startswith(
        "**Matched, fp8**\n\n| backend | s a step | images/s | memory, training | memory, whole run"
    )
    assert "held-out" not in brief
    assert "held-out loss" in leading(example())
    assert "| ai-toolkit | refused | – | – | – | – |" in brief
    for part in brief.split("\n\n"):
        assert len({line.count("|") for line in part.splitlines()}) == 1


def test_a_clock_that_is_too_coarse_for_the_steps_breaks_no_report() -> None:
    none = {"median": 0.0, "p10": 0.0, "p90": 0.0, "mean": 0.0}
    runs = [
        run.model_copy(
            update={
                "steps": run.steps.model_copy(
                    update={"seconds": run.steps.seconds.model_copy(update=none), "each": [0.0]}
                )
            }
        )
        for run in example().runs
        if run.steps and run.backend == "native"
    ]
    results = changed(example(), runs=[*runs, *(run for run in example().runs if run.backend != "native")])
    assert "native and simpletuner are level, at 0.00 s" in markdown(results)
    assert page(results)


def test_memory_of_the_whole_card_is_marked_and_what_was_not_measured_is_no_zero() -> None:
    runs = [
        run.model_copy(update={"device_memory": run.device_memory.model_copy(update={"scope": "device"})})
        for run in example().runs
        if run.device_memory
    ]
    told = markdown(changed(example(), runs=runs))
    assert "12.08 GiB \\*" in told
    assert "All that is in use on the card" in told
    bare = markdown(bare_results())
    assert "| native | – | – | – | – | – | – | 0 of 1: error |" in bare
    assert "| diffsynth | – | – | – | – | 0.00 s | – | 1 of 1 |" in bare
    assert "nan" not in page(bare_results())


def test_without_a_gpu_the_hosts_memory_is_drawn_over_time() -> None:
    runs = [run.model_copy(update={"device_memory": None}) for run in example().runs]
    text = page(changed(example(), runs=runs))
    assert "Host memory over time, Matched, fp8" in text
    assert "Device memory over time" not in text
    assert "Device memory over time, Matched, fp8" in page(example())


def test_what_people_wrote_is_text_and_never_markup() -> None:
    results = evil_results()
    text = page(results)
    parsed = Parsed(text)
    assert not any(tag in ("script", "img") for tag, _ in parsed.tags)
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert text.count("</style>") == 1
    assert "{{ 7*7 }}" in text
    told = markdown(results)
    assert "<script>" not in told.replace("\\<", "")
    heads = [line for line in told.splitlines() if line.startswith("|---")]
    tables = told.split("\n\n")
    for table in (part for part in tables if part.startswith("| ")):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1
    assert heads
    assert escaped("a|b\nc_d") == "a\\|b c\\_d"


@pytest.mark.parametrize("made", [example, evil_results, bare_results])
def test_a_real_browser_shows_it_quietly_and_it_fits_a_phone(tmp_path: Path, made: Any) -> None:
    write_reports(made(), tmp_path)
    spilling = (
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg, details:not([open])') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.className)"
    )
    clipped = (
        "[...document.querySelectorAll('svg.plot')].flatMap(s => [...s.querySelectorAll('text')].filter(t => {"
        "const a = t.getBoundingClientRect(), b = s.getBoundingClientRect();"
        "return b.width && (a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1)})"
        ".map(t => t.textContent))"
    )
    unfold = "document.querySelectorAll('details').forEach(d => d.open = true)"
    with chromium(tmp_path / "profile") as browser:
        for width in (1280, 390, 360):
            shown = browser.open(tmp_path / "report.html", width, ask=("document.title", clipped, unfold, spilling))
            assert shown.messages == []
            assert shown.requests == []
            assert shown.width == width
            title, cut, _, spilled = shown.values
            assert title.endswith(": benchmark")
            assert title != "owned"
            assert spilled == []
            if made is not evil_results:
                assert cut == []
        assert "Protocol" in shown.text


def test_plots_hold_for_one_value_for_none_and_for_extremes() -> None:
    axis = charts.Axis("x", str)
    for points in ([], [(0.0, 0.0)], [(1.0, 5.0)], [(0.0, float("nan")), (1.0, 2.0)], [(0.0, -1e9), (1e9, 1e12)]):
        drawn = charts.curves([charts.Curve("a", 0, points)], axis, axis, "t")
        assert "nan" not in drawn
        assert "inf" not in drawn
    assert numbers([]) is None
    assert numbers([None, 3.0]) is not None
    many = [(float(n), float(n)) for n in range(100_000)]
    assert len(charts.curves([charts.Curve("a", 0, many)], axis, axis, "t")) < 10_000


def test_the_command_writes_the_reports_anew_and_tells_of_a_folder_without_results(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(FILE.read_bytes())
    done = CliRunner().invoke(build_app(), ["bench", "report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md", "report.html"}
    assert (tmp_path / "report.md").read_text() == markdown(example())
    failed = CliRunner().invoke(build_app(), ["bench", "report", str(tmp_path / "none")])
    assert failed.exit_code == 4
    assert "cannot be read" in failed.stderr
    place = tmp_path / "results.json" / "x"
    taken = CliRunner().invoke(build_app(), ["bench", "report", str(tmp_path), "-o", str(place)])
    assert taken.exit_code == 7
    assert "cannot be made" in taken.stderr


def test_an_overhead_is_told_with_the_phases_that_it_is_in() -> None:
    told = tables.overheads(example())
    assert told is not None
    assert told.rows[0][told.head.index("in its phases")] == "start +0.6 s; load, quantise +0.5 s; save +0.2 s"
