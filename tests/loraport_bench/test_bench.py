"""`loraport bench SPEC` from end to end, with trainers that stand in for real ones."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import psutil
import pytest
from bench_results import results
from PIL import Image

from loraport.spec.yaml_text import dump_yaml, parse_yaml
from loraport_bench.bench import shortened_command
from loraport_bench.records import Run

pytestmark = pytest.mark.usefixtures("stand_ins")


def by_backend(tmp_path: Path) -> dict[str, Run]:
    return {run.backend: run for run in results(tmp_path).runs}


def test_two_trainers_are_measured_scored_and_told_in_alternating_order(bench: Any, tmp_path: Path) -> None:
    code, said = bench("--backends", "swift,steady", "--tiers", "matched", "--seeds", "5,6", "--checkpoints", "3")
    assert code == 0, said
    told = results(tmp_path)
    assert told.complete
    assert [(run.backend, run.seed) for run in told.runs] == [
        ("swift", 5), ("steady", 5), ("steady", 6), ("swift", 6),
    ]  # fmt: skip
    for run in told.runs:
        assert run.status == "ok"
        assert run.failure is None
        # Everything that was done from the start of the process to its end is in some phase.
        assert sum(run.phases.values()) == pytest.approx(run.total_s, abs=0.01)
        assert list(run.phases) == ["start", "load_quantise", "cache", "train", "save", "convert"]
        assert run.steps is not None
        assert run.steps.seconds.count == 4
        assert 0.01 <= run.steps.seconds.p10 <= run.steps.seconds.median <= run.steps.seconds.p90
        assert run.images_per_second == pytest.approx(1 / (run.steps.wall_mean or 0), rel=0.01)
        assert [loss.loss for loss in run.losses] == [pytest.approx(1 / step) for step in range(1, 7)]
        assert run.work is not None
        assert (run.work.steps, run.work.images, run.work.modules, run.work.parameters) == (6, 6, 1, 64)
        assert run.work.differs == []
        assert run.disk is not None
        assert 100_000 < run.disk.cache_bytes < 200_000
        assert run.disk.lora_bytes is not None
        assert run.device_memory is None
        assert run.configuration is not None
        assert run.configuration.files == {"backend/settings.txt": "steps 6\n"}
        assert {verdict.path for verdict in run.verdicts} >= {"train.steps", "lora.rank"}
        assert run.quality is not None
        assert (run.quality.without, run.quality.loss, run.quality.images) == (1.0, 0.994, 2)
        assert [(point.step, round(point.loss, 6)) for point in run.quality.curve] == [
            (2, 0.998),
            (4, 0.996),
            (6, 0.994),
        ]
        times = [point.train_s for point in run.quality.curve]
        assert times == sorted(times)
    memory = {run.backend: run.host_memory.peak_bytes for run in told.runs if run.host_memory is not None}
    assert memory["steady"] - memory["swift"] > 25_000_000  # the 40 MB that it holds
    written = (tmp_path / "out" / "results.json").read_text() + (tmp_path / "out" / "report.md").read_text()
    assert str(tmp_path) not in written
    assert "/models" not in written
    assert told.runs[0].configuration is not None
    assert told.runs[0].configuration.spec["model"]["checkpoint"] == told.spec["model"]["checkpoint"] == "…/none"


def test_all_trainers_read_the_same_images_at_their_final_size_with_the_same_captions(
    bench: Any, tmp_path: Path
) -> None:
    small = tmp_path / "images" / "0.jpg"
    Image.open(small).resize((20, 16)).save(small)
    code, said = bench("--backends", "swift", "--tiers", "matched", "--seeds", "0", "--held-out", "1")
    assert code == 0, said
    staged = tmp_path / "out" / "data"
    assert [path.name for path in sorted((staged / "images").iterdir())] == [
        f"0000{number}.{suffix}" for number in range(1, 5) for suffix in ("json", "png")
    ]
    assert (staged / "held-out" / "00001.png").is_file()
    for path in staged.rglob("*.png"):
        with Image.open(path) as image:
            # The small one too: some trainers would enlarge it, others train less than they.
            assert 40 * 64 <= image.size[0] * image.size[1] <= 64 * 64
            assert not image.size[0] % 16
            assert not image.size[1] % 16
    assert "slp" in (staged / "images" / "00002.json").read_text()
    (run,) = results(tmp_path).runs
    assert run.configuration is not None
    spec = run.configuration.spec
    assert spec["dataset"]["path"] == "<bench>/data/images"
    assert spec["dataset"]["trigger_word"] is None
    assert spec["dataset"]["upscale"] is True


def test_several_sets_are_staged_apart_with_what_each_says_of_itself(
    bench: Any, spec_file: Path, tmp_path: Path
) -> None:
    content = parse_yaml(spec_file.read_text(), "spec")
    folder = Path(content["dataset"].pop("path"))
    rows = [{"file_name": f"{number}.png", "caption": f"a wall {number}"} for number in range(2)]
    (tmp_path / "walls").mkdir()
    for row in rows:
        Image.new("RGB", (90, 90)).save(tmp_path / "walls" / row["file_name"])
    (tmp_path / "walls" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    general = {"path": str(tmp_path / "walls"), "caption_field": "caption", "regularization": True}
    sets = [
        {"path": str(folder), "repeats": 2, "caption_dropout": 0.5},
        {**general, "resolution": 80, "loss_weight": 0.5},
    ]
    spec_file.write_text(dump_yaml({**content, "dataset": {**content["dataset"], "sets": sets}}))
    code, said = bench("--backends", "swift,setless", "--tiers", "matched", "--seeds", "0", "--held-out", "1")
    assert code == 0, said
    staged = tmp_path / "out" / "data"
    assert len(list((staged / "images" / "set-0").glob("*.png"))) == 4
    assert len(list((staged / "held-out").glob("*.png"))) == 1
    with Image.open(staged / "images" / "set-1" / "00001.png") as image:
        assert image.size == (80, 80)
    assert (staged / "images" / "set-1" / "00002.txt").read_text() == "a wall 1"
    assert "slp" in (staged / "images" / "set-0" / "00001.json").read_text()
    told = results(tmp_path)
    assert (told.protocol.images, told.protocol.held_out, told.protocol.sets, told.protocol.resolution) == (6, 1, 2, 80)
    swift, setless = told.runs
    assert swift.status == "ok"
    assert swift.quality is not None
    assert swift.configuration is not None
    first, second = swift.configuration.spec["dataset"]["sets"]
    # What was worked into the staged files is not done again; the rest is the trainer's.
    assert (first["path"], first["repeats"], first["caption_dropout"]) == ("<bench>/data/images/set-0", 2, 0.5)
    assert (first["caption_ext"], first["trigger_word"]) == ("json", None)
    assert (second["caption_ext"], second["caption_field"], second["loss_weight"]) == ("txt", None, 0.5)
    assert second["regularization"] is True
    assert setless.failure is not None
    assert setless.failure.message.startswith("dataset.sets = ")
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()


def test_images_of_the_general_class_are_staged_beside_the_subject(bench: Any, spec_file: Path, tmp_path: Path) -> None:
    general = {"path": str(tmp_path / "general"), "caption_ext": "txt", "repeats": 3, "weight": 0.0}
    (tmp_path / "general").mkdir()
    Image.new("RGB", (90, 90)).save(tmp_path / "general" / "a.png")
    (tmp_path / "general" / "a.txt").write_text("anything")
    content = parse_yaml(spec_file.read_text(), "spec")
    content["dataset"]["regularization"] = general
    spec_file.write_text(dump_yaml(content))
    code, said = bench("--backends", "swift", "--tiers", "matched", "--seeds", "0", "--held-out", "2")
    assert code == 0, said
    assert (tmp_path / "out" / "data" / "images" / "regularization" / "00001.txt").read_text() == "anything"
    (run,) = results(tmp_path).runs
    assert run.configuration is not None
    dataset = run.configuration.spec["dataset"]
    assert dataset["path"] == "<bench>/data/images/images"
    assert dataset["regularization"] == {**general, "path": "<bench>/data/images/regularization"}


def test_what_one_trainer_does_not_do_takes_its_common_value_and_what_stays_different_is_listed(
    bench: Any, tmp_path: Path
) -> None:
    code, said = bench("--backends", "swift,steady", "--seeds", "0")
    assert code == 0, said
    told = results(tmp_path)
    specs = {run.key: run.configuration.spec for run in told.runs if run.configuration}
    # steady doesn't clip: in the matched tier nobody does, in the other each as the spec says.
    assert specs["matched/spec/swift/0/0"]["train"]["max_grad_norm"] == 0
    assert specs["best-effort/spec/swift/0/0"]["train"]["max_grad_norm"] == 1
    assert "steady" in told.protocol.changed["train.max_grad_norm"]
    (left,) = told.inequalities["matched/spec"]
    assert (left.path, left.backends) == ("train.warmup_steps", {"swift": "exact", "steady": "defaulted: always 5"})
    assert [each.path for each in told.inequalities["best-effort/spec"]] == [
        "train.warmup_steps",
        "train.max_grad_norm",
    ]


def test_each_batch_size_is_a_group_of_its_own(bench: Any, tmp_path: Path) -> None:
    given = ("--tiers", "matched", "--seeds", "0", "--checkpoints", "1", "--steps", "3", "--warm-up", "1")
    code, said = bench("--backends", "swift,inexact", "--batches", "1,4", *given)
    assert code == 0, said
    told = results(tmp_path)
    assert [(run.key, run.batch, run.status) for run in told.runs] == [
        ("matched/spec/swift/0/0", 1, "ok"),
        ("matched/spec/inexact/0/0", 1, "refused"),
        ("matched/spec/batch-4/swift/0/0", 4, "ok"),
        ("matched/spec/batch-4/inexact/0/0", 4, "refused"),
    ]
    assert (told.protocol.batches, told.protocol.images_a_step) == ([1, 4], [1, 4])
    one, four = told.runs[0].work, told.runs[2].work
    assert one is not None
    assert four is not None
    assert (one.images, one.expected_images, four.images, four.expected_images) == (3, 3, 12, 12)
    assert one.differs == four.differs == []
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Matched, as the spec says, batch 4" in report
    assert "3 optimizer steps a run, of 1 or 4 images each" in report


def test_every_kind_of_failure_is_a_row_with_its_reason_and_the_others_go_on(bench: Any, tmp_path: Path) -> None:
    names = "greedy,broken,endless,inexact,absent,lazy,wide,swift"
    code, said = bench(
        "--backends", names, "--tiers", "matched", "--seeds", "0", "--time-limit", "4", "--held-out", "0"
    )
    assert code == 0, said
    rows = by_backend(tmp_path)
    reasons = {name: run.failure.reason for name, run in rows.items() if run.failure}
    assert reasons == {
        "greedy": "out-of-memory",
        "broken": "error",
        "endless": "time-out",
        "inexact": "refused",
        "absent": "not-ready",
    }
    assert rows["inexact"].failure is not None
    assert rows["inexact"].failure.message == "train.batch_size = 1: approximated: in parts"
    assert rows["broken"].failure is not None
    assert "the card is on fire" in rows["broken"].failure.message
    assert rows["broken"].work is not None
    assert rows["broken"].work.steps == 2
    assert rows["endless"].total_s >= 4
    child = int((tmp_path / "out" / "rows" / "matched-spec-endless-0-0" / "child.pid").read_text())
    assert not psutil.pid_exists(child)
    for name, difference in {"lazy": "5 optimizer steps instead of 6", "wide": "2 trained modules"}.items():
        work = rows[name].work
        assert work is not None
        assert any(difference in text for text in work.differs), work
    assert rows["swift"].status == "ok"


def test_the_recorded_command_tells_no_place_of_the_machine() -> None:
    given = ["bench", "/data/my specs/a.yaml", "-o", "/data/out", "--set", "model.checkpoint=/models/x", "rel/b.yaml"]
    told = shortened_command([*given, "--for", "a:dataset.path=c/d"], Path("/data/out"))
    assert shlex.split(told) == [
        *("loraport", "bench", "…/a.yaml", "-o", "<bench>", "--set", "model.checkpoint=…/x", "rel/b.yaml"),
        *("--for", "a:dataset.path=c/d"),
    ]


def test_a_dry_run_writes_nothing_and_tells_refusals_before_anything_is_started(bench: Any, tmp_path: Path) -> None:
    code, said = bench("--backends", "swift,inexact", "--seeds", "0", "--dry-run", "--json")
    assert code == 0, said
    told = json.loads(said)
    assert [(row["key"], row["state"]) for row in told["rows"]] == [
        ("matched/spec/swift/0/0", "to run"),
        ("matched/spec/inexact/0/0", "refused"),
        ("best-effort/spec/swift/0/0", "to run"),
        ("best-effort/spec/inexact/0/0", "to run"),
    ]
    assert told["at_most_s"] == 3 * 3600
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backends", "swfit"], "Did you mean 'swift'"),
        (["--profiles", "fp9"], "--profiles: 'fp9' is not known"),
        (["--tiers", "best"], "--tiers: 'best' is not known"),
        (["--seeds", "a"], "--seeds: 'a' is not a whole number"),
        (["--batches", "0"], "--batches: a batch is of at least 1 image"),
        (["--batches", "2,2"], "--batches: each only once"),
        (["--profiles", ","], "--profiles names none"),
        (["--seeds", "1,1"], "--seeds: each only once"),
        (["--card", "5gb"], "--card: '5gb' is not known"),
        (["--warm-up", "6"], "--warm-up 6 leaves no step of 6"),
        (["--for", "swift"], "write it as BACKEND:FIELD=VALUE"),
        (["--for", "native:train.steps=3"], "--for: 'native' is not known"),
        (["--part", "3/2"], "--part '3/2'"),
        (["--on", "cloud", "--dry-run"], "--on: 'cloud' is not known"),
        (["--job", "timeout_min=5"], "--job would do nothing here"),
        (["--card", "24gb", "--tiers", "matched"], "--card would do nothing here"),
        (["--on", "local", "--session-limit", "0"], "--job timeout_min=MINUTES"),
        (["--write-sky", "task.yaml", "--on", "local"], "--on would do nothing here"),
        (["--write-sky", "task.yaml", "--json"], "--json would do nothing here"),
        (["--for", "swift:train.stps=3", "--dry-run"], "train.stps"),
    ],
)
def test_a_wrong_option_is_told_with_what_would_be_right(
    bench: Any, tmp_path: Path, options: list[str], message: str
) -> None:
    code, said = bench(*(["--backends", "swift"] if "--backends" not in options else []), *options)
    assert code == 3, said
    assert message in " ".join(said.split())
    assert not (tmp_path / "out").exists()


def test_a_field_can_be_set_for_one_trainer_alone(bench: Any, tmp_path: Path) -> None:
    code, said = bench(
        *("--backends", "swift,steady", "--tiers", "best-effort", "--seeds", "0", "--held-out", "0"),
        *("--for", "swift:backend.options.fast=true"),
    )
    assert code == 0, said
    options = {
        run.backend: run.configuration.spec["backend"]["options"] for run in results(tmp_path).runs if run.configuration
    }
    assert options == {"swift": {"fast": True}, "steady": {}}


def test_an_option_of_one_trainer_alone_is_listed_as_what_is_unequal(bench: Any, tmp_path: Path) -> None:
    options = ("--backends", "swift,steady", "--tiers", "matched", "--seeds", "0", "--held-out", "0")
    code, said = bench(*options, "--for", "swift:backend.options.fast=true")
    assert code == 0, said
    told = {each.path: each.backends for each in results(tmp_path).inequalities["matched/spec"]}
    assert told["backend.options"]["swift"].startswith("{'fast': True}")
    assert "| backend.options | – |" in (tmp_path / "out" / "report.md").read_text()


def test_one_run_at_a_time_is_measured_on_a_machine(bench: Any, tmp_path: Path) -> None:
    import fcntl

    with open(tmp_path / "machine.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 1, row x")
        lock.flush()
        code, said = bench("--backends", "swift", "--tiers", "matched", "--seeds", "0")
    assert code == 7
    assert "measuring already (process 1, row x)" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "swift:train.steps=4"], "--for swift: train.steps is set by the bench. Use --steps"),
        (["--for", "swift:train.batch_size=4"], "--for swift: train.batch_size is set by the bench. Use --batches"),
        (["--set", "train.steps=10"], "--set: train.steps is set by the bench. Use --steps"),
        (["--set", "train.batch_size=2", "--batches", "1,4"], "--set: train.batch_size is set by the bench."),
    ],
)
def test_a_change_that_the_bench_would_override_is_refused_before_anything_is_written(
    bench: Any, tmp_path: Path, options: list[str], message: str
) -> None:
    code, said = bench("--backends", "swift", *options)
    assert code == 3, said
    assert message in " ".join(said.split())
    assert not (tmp_path / "out").exists()


def test_the_examples_of_changes_in_the_help_work(bench: Any) -> None:
    given = ("--set", "lora.rank=32", "--set", "train.batch_size=2", "--for", "native:memory.text_encoder=fp8")
    code, said = bench("--backends", "native,swift", *given, "--seeds", "0", "--dry-run")
    assert code == 0, said
    assert "matched/spec/batch-2/native/0/0: to run" in said


def test_a_checkpoint_whose_name_has_spaces_and_commas_is_told_by_its_last_part_everywhere(
    bench: Any, spec_file: Path, tmp_path: Path
) -> None:
    place = "/mnt/My models (v2), painter's/tiny"
    content = parse_yaml(spec_file.read_text(), "spec")
    spec_file.write_text(dump_yaml({**content, "model": {"checkpoint": place}}))
    given = ("--backends", "swift,inexact,broken", "--tiers", "matched", "--seeds", "0", "--held-out", "0")
    code, said = bench(*given, "--set", f"model.checkpoint={place}")
    assert code == 0, said
    told = results(tmp_path)
    assert told.spec["model"]["checkpoint"] == "…/tiny"
    assert [run.configuration.spec["model"]["checkpoint"] for run in told.runs if run.configuration] == ["…/tiny"] * 2
    for path in (tmp_path / "out").glob("re*.*"):
        assert not [part for part in ("/mnt", "My models", "painter") if part in path.read_text()], path
    command = ["bench", "a.yaml", "--set", f"model.checkpoint={place}", "-o", f"{place}/out, 2"]
    assert shlex.split(shortened_command(command, Path("/data/out")))[-3:] == [
        "model.checkpoint=…/tiny", "-o", "…/out, 2",
    ]  # fmt: skip


def test_seeds_that_no_repeat_takes_are_not_told_as_measured(bench: Any, tmp_path: Path) -> None:
    code, said = bench("--backends", "swift", "--tiers", "matched", "--held-out", "0", "--repeats", "1")
    assert code == 0, said
    told = results(tmp_path)
    assert told.complete
    assert told.protocol.seeds == [run.seed for run in told.runs] == [0]
