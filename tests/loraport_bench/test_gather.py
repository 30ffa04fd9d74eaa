"""One report on several benches."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from bench_example import example
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.errors import DataError, SpecError
from loraport_bench import records as r
from loraport_bench.gather import gathered
from loraport_bench.records import Results


def part(profile: str, backends: list[str] | None = None, **protocol: Any) -> Results:
    """The example's rows of one quantisation, as a bench of its own, and of some backends."""
    whole = example()
    runs = [
        run for run in whole.runs if run.profile == profile and run.backend in (backends or whole.protocol.backends)
    ]
    told = whole.protocol.model_copy(update={"profiles": [profile], **protocol})
    inequalities = {name: each for name, each in whole.inequalities.items() if name.endswith(profile)}
    spec = {**whole.spec, "model": {"checkpoint": f"…/{profile}"}}
    more = {"runs": runs, "protocol": told, "inequalities": inequalities, "spec": spec, "spec_sha256": profile * 20}
    return whole.model_copy(update={**more, "command": f"loraport bench --profiles {profile}"})


def test_benches_of_different_cells_are_one_with_what_each_did_otherwise() -> None:
    whole = gathered({"one": part("fp8"), "two": part("nf4", steps=30)})
    assert {run.key for run in whole.runs} == {run.key for run in example().runs}
    assert whole.protocol.profiles == ["fp8", "nf4"]
    assert whole.spec == {**example().spec, "model": {}}
    assert [one.place for one in whole.sources] == ["one", "two"]
    assert [one.protocol.steps for one in whole.sources] == [60, 30]
    assert whole.command.splitlines() == ["loraport bench --profiles fp8", "loraport bench --profiles nf4"]
    again = gathered({"both": whole, "more": part("nf4", ["native"]).model_copy(update={"runs": []})})
    assert [one.place for one in again.sources] == ["one", "two", "more"]


def test_rows_of_a_group_from_several_machines_are_judged_together() -> None:
    first, second = part("fp8", ["native", "diffsynth"]), part("fp8", ["simpletuner"])
    other = second.runs[0].work
    assert other is not None
    second = second.model_copy(
        update={
            "runs": [run.model_copy(update={"work": other.model_copy(update={"modules": 1})}) for run in second.runs],
            "updated": second.updated + timedelta(days=1),
        }
    )
    whole = gathered({"a": first, "b": second})
    assert whole.updated == second.updated
    differs = {run.backend: run.work.differs for run in whole.runs if run.tier == "matched" and run.work}
    assert differs["native"] == ["238 trained modules; others of the group: 1"]
    assert differs["simpletuner"] == ["1 trained modules; others of the group: 238"]
    told = {each.path: each.backends for each in whole.inequalities["matched/fp8"]}
    assert told["train.warmup_steps"].keys() == {"native", "diffsynth", "simpletuner", "ai-toolkit"}


def test_benches_that_cannot_stand_side_by_side_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="a and b are of other images: images_sha256"):
        gathered({"a": part("fp8"), "b": part("nf4", images_sha256="1" * 64)})
    with pytest.raises(DataError, match="a and b both hold the row matched/fp8/native/0/0"):
        gathered({"a": part("fp8"), "b": part("fp8")})
    with pytest.raises(DataError, match="a and b both hold rows of matched/fp8/1, with other numbers of steps"):
        gathered({"a": part("fp8", ["native"]), "b": part("fp8", ["diffsynth"], steps=30)})


@pytest.mark.parametrize(
    ("section", "name", "value"), [("lora", "rank", 64), ("train", "learning_rate", 0.5), ("dataset", "flip", True)]
)
def test_runs_of_other_work_are_no_repeats_of_a_row(section: str, name: str, value: Any) -> None:
    spec = {"lora": {"rank": 4}, "train": {"seed": 0, "learning_rate": 0.1}, "dataset": {"flip": False, "path": "/a"}}

    def trained(repeat: int, **changes: Any) -> Results:
        """One repeat of a backend, as a bench of its own."""
        whole, made = part("fp8", ["native"]), {part: {**spec[part], **changes.get(part, {})} for part in spec}
        run = next(run for run in whole.runs if (run.tier, run.repeat) == ("matched", repeat))
        configuration = r.Configuration(spec=made, files={}, command=[], env={})
        return whole.model_copy(update={"runs": [run.model_copy(update={"configuration": configuration})]})

    first = trained(0)
    alike = gathered({"a": first, "b": trained(1, train={"seed": 9}, dataset={"path": "/b"})})
    assert len(alike.runs) == 2
    with pytest.raises(SpecError) as caught:
        gathered({"a": first, "b": trained(1, **{section: {name: value}})})
    assert f"{section}.{name} is {spec[section][name]!r} in a and {value!r} in b" in caught.value.message
    assert "matched/fp8/1 by native" in caught.value.message


def test_the_command_writes_one_report_and_its_data_beside_it(tmp_path: Path) -> None:
    for name, results in (("one", part("fp8")), ("two", part("nf4", steps=30))):
        (tmp_path / name).mkdir()
        results.write(tmp_path / name / "results.json")

    def run(*given: str) -> tuple[int, str]:
        done = CliRunner().invoke(build_app(), ["bench", "report", str(tmp_path / "one"), *given])
        return done.exit_code, done.output + repr(done.exception)

    code, said = run(str(tmp_path / "two"), "-o", str(tmp_path / "both"))
    assert code == 0, said
    assert len(Results.read(tmp_path / "both" / "results.json").runs) == len(example().runs)
    report = (tmp_path / "both" / "report.md").read_text()
    assert "- Gathered from: one, two" in report
    assert "- Steps (two): 30 optimizer steps" in report
    assert report.count("- Images: ") == 1
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"results.json", "report.md", "report.html"}
    before = (tmp_path / "one" / "results.json").read_bytes()
    for wrong in ([], ["-o", str(tmp_path / "one")]):
        code, said = run(str(tmp_path / "two"), *wrong)
        assert "folder of its own" in said
        assert code != 0
    assert (tmp_path / "one" / "results.json").read_bytes() == before
