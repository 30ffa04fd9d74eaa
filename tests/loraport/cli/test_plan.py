"""`loraport plan` and what every command does with a user's mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_datasets import write_pair
from typer.testing import CliRunner

import loraport.plugins
from loraport.backend import Readiness
from loraport.cli.main import build_app
from loraport.gpu import Card
from loraport.hookspecs import hookimpl
from loraport.planning import Context, Translation, VerdictTable
from loraport.spec.models import TrainSpec, leaf_fields

MINIMAL = "name: demo\nmodel: {checkpoint: tiny}\ndataset: {path: images}\n"


class Modest:
    """A backend that does little, for comparison."""

    name, version, description = "modest", "0.1", "for tests"

    def readiness(self, python: object = None) -> Readiness:
        return Readiness(False, "it is only a test")

    def translate(self, spec: TrainSpec, context: Context) -> Translation:
        table = VerdictTable(spec)
        table.choose("lora.type", ["lora"], "the only one", "set lora.type: lora")
        for path in set(leaf_fields()) - {"lora.type"}:
            table.ignored(path, reason="[bold]too modest[/] for it")
        return Translation(
            table.finish(), {"config/a.toml": 'name = "[red]"\n'}, ["modest", "a b"], {"MODEST_HOME": "c d"}
        )


class Plugin:
    @hookimpl
    def register_backends(self, register: Any) -> None:
        register(Modest())


@pytest.fixture(autouse=True)
def _modest_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loraport.plugins.Plugins()
    found.manager.register(Plugin(), "modest")
    monkeypatch.setattr(loraport.plugins, "plugins", lambda: found)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def spec_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "spec.yaml"
    path.write_text(MINIMAL)
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error; a traceback would be an exception other than SystemExit."""
    result = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_every_field_is_shown_with_verdict_and_reason(spec_file: Path) -> None:
    code, out, err = run("plan", spec_file)
    assert (code, err) == (0, "")
    assert "demo with native" in out
    assert all(path in out for path in leaf_fields())
    assert f"{len(leaf_fields())} exact" in out
    assert "loraport_native" in out


def test_files_command_and_environment_are_shown_as_they_are(spec_file: Path) -> None:
    code, out, _ = run("plan", spec_file, "--backend", "modest")
    assert code == 0
    assert "config/a.toml" in out
    assert 'name = "[red]"' in out
    assert "MODEST_HOME='c d' modest 'a b'" in out
    assert "[bold]too modest[/] for it" in out


def test_json_is_the_plan(spec_file: Path, tmp_path: Path) -> None:
    code, out, _ = run("plan", spec_file, "--json", "--out", tmp_path / "here", "--set", "train.steps=7")
    content = json.loads(out)
    assert code == 0
    assert content["backend"] == "native"
    assert content["run_dir"] == str(tmp_path / "here")
    assert [verdict["path"] for verdict in content["verdicts"]] == list(leaf_fields())
    assert {verdict["path"]: verdict["value"] for verdict in content["verdicts"]}["train.steps"] == 7
    assert len(content["spec_hash"]) == 64


def test_two_backends_stand_side_by_side(spec_file: Path) -> None:
    code, out, _ = run("plan", spec_file, "--against", "modest")
    assert code == 0
    header = next(line for line in out.splitlines() if line.startswith("field"))
    assert header.index("native") < header.index("modest")
    row = next(line for line in out.splitlines() if line.startswith("train.steps"))
    assert row.index("exact") < row.index("ignored")
    assert f"{len(leaf_fields()) - 1} of {len(leaf_fields())} fields are treated differently." in out


def test_two_backends_in_json_are_a_list(spec_file: Path) -> None:
    code, out, _ = run("plan", spec_file, "--against", "modest", "--json")
    assert code == 0
    assert [each["backend"] for each in json.loads(out)] == ["native", "modest"]


def test_strict_ends_with_three_unless_all_is_exact(spec_file: Path) -> None:
    assert run("plan", spec_file, "--strict")[0] == 0
    code, out, err = run("plan", spec_file, "--strict", "--backend", "modest")
    assert code == 3
    assert "train.steps" in out
    assert err.startswith("error: modest will not train this spec as written; --strict allows only exact fields:")
    assert "lora.type" not in err


def test_a_refused_field_ends_with_three_after_the_plan_is_shown(spec_file: Path) -> None:
    code, out, err = run("plan", spec_file, "--backend", "modest", "--set", "lora.type=loha", "--json")
    assert code == 3
    assert json.loads(out)["backend"] == "modest"
    assert "lora.type = 'loha': refused: only lora; set lora.type: lora" in err


def test_foreign_names_are_told_on_standard_error(spec_file: Path) -> None:
    spec_file.write_text(MINIMAL + "lr: 1e-3\n")
    code, out, err = run("plan", spec_file, "--json")
    assert code == 0
    json.loads(out)
    assert f"note: {spec_file}: read lr as train.learning_rate" in err


def test_the_specs_own_backend_is_used_and_the_option_wins(spec_file: Path) -> None:
    spec_file.write_text(MINIMAL + "backend: {name: modest}\n")
    assert json.loads(run("plan", spec_file, "--json")[1])["backend"] == "modest"
    assert json.loads(run("plan", spec_file, "--json", "-b", "native")[1])["backend"] == "native"


@pytest.mark.parametrize(
    ("content", "arguments", "says"),
    [
        (MINIMAL + "trian: {}\n", [], "trian: no such field. Did you mean train?"),
        (MINIMAL + "\tx", [], "a tab"),
        (MINIMAL, ["--backend", "nativ"], "Backend 'nativ' is not known. Did you mean 'native'?"),
        (MINIMAL, ["--against", "nobody"], "Backend 'nobody' is not known. Choices: "),
        (MINIMAL, ["--set", "memory.profile=12gbs"], "memory.profile: '12gbs' is not known. Did you mean '12gb'?"),
        (MINIMAL, ["--set", "model.family=flux"], "model.family: 'flux' is not known."),
        (MINIMAL, ["--set", "lora.targets=al"], "lora.targets: 'al' is not known. Did you mean 'all'?"),
        (MINIMAL, ["--set", "backend.options.fast=1"], "not known here: fast"),
        (MINIMAL, ["--set", "oops"], "write it as section.field=value"),
    ],
)
def test_a_bad_spec_ends_with_three_and_one_message(
    spec_file: Path, content: str, arguments: list[str], says: str
) -> None:
    spec_file.write_text(content)
    for command in ("plan", "train"):
        if command == "train" and "--against" in arguments:
            continue
        code, _, err = run(command, spec_file, *arguments)
        assert code == 3
        assert err.startswith("error: ")
        assert says in err
        assert "Traceback" not in err
    assert sorted(path.name for path in spec_file.parent.iterdir()) == ["spec.yaml"]


FULL_SIZE = ["--set", "model.checkpoint=ideogram-ai/ideogram-4-fp8"]


def a_card(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr("loraport.gpu.cards", lambda: [Card("Some card", gib, (8, 9))])


def test_the_memory_is_predicted_term_by_term(spec_file: Path) -> None:
    code, out, err = run("plan", spec_file, *FULL_SIZE)
    assert (code, err) == (0, "")
    assert "Memory " in out
    assert "GiB allocated while training, predicted" in out
    assert "frozen weights 16.8" in out
    memory = json.loads(run("plan", spec_file, *FULL_SIZE, "--json")[1])["memory"]
    terms = next(phase for phase in memory["phases"] if phase["name"] == "training")["terms"]
    assert sum(terms.values()) == pytest.approx(memory["peak_gib"], abs=0.01)
    assert memory["card"] is None


def test_nothing_is_predicted_for_another_backend(spec_file: Path) -> None:
    _, out, _ = run("plan", spec_file, *FULL_SIZE, "-b", "modest")
    assert "Memory not predicted by modest for this spec" in out
    assert json.loads(run("plan", spec_file, *FULL_SIZE, "-b", "modest", "--json")[1])["memory"] is None


def test_a_plan_that_does_not_fit_the_card_is_shown_with_a_warning(
    spec_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_card(monkeypatch, 16)
    code, out, err = run("plan", spec_file, *FULL_SIZE)
    assert code == 0
    assert "Some card has 16.0 GiB: it does not fit" in out
    assert "warning: native: 19." in err
    assert "The profile 16gb would fit: set memory.profile: 16gb" in err
    assert run("plan", spec_file, *FULL_SIZE, "--set", "memory.profile=16gb")[2] == ""


FP8 = ["--set", "memory.quantize=fp8-dynamic"]


@pytest.mark.parametrize(("capability", "fits"), [((8, 6), False), ((8, 9), True)])
def test_a_card_without_8_bit_floats_is_told_in_the_plan_and_stops_the_run(
    spec_file: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fits: bool
) -> None:
    monkeypatch.setattr("loraport.gpu.cards", lambda: [Card("Some card", 80, capability)])
    code, _, err = run("plan", spec_file, *FULL_SIZE, *FP8)
    says = "memory.compute: fp8 needs a card of compute capability 8.9 or more, and Some card has 8.6. Set memory.quant"
    assert (code, says in err) == (0, not fits)
    assert (json.loads(run("plan", spec_file, *FULL_SIZE, *FP8, "--json")[1])["lacking"] is None) is fits
    # What DiffSynth would not do with such a checkpoint, it needs no hardware for; nor does a CPU.
    assert "8.6" not in run("plan", spec_file, *FULL_SIZE, *FP8, "-b", "diffsynth")[2]
    assert "8.6" not in run("plan", spec_file, *FULL_SIZE, *FP8, "--set", "backend.options.device=cpu")[2]
    if not fits:
        code, _, err = run("train", spec_file, *FULL_SIZE, *FP8)
        assert (code, err.startswith("error: memory.compute: fp8")) == (3, True)
        assert sorted(path.name for path in spec_file.parent.iterdir()) == ["spec.yaml"]


def test_a_run_that_clearly_does_not_fit_ends_with_three_before_anything_is_loaded(
    spec_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_card(monkeypatch, 16)
    code, _, err = run("train", spec_file, *FULL_SIZE)
    assert code == 3
    assert err.startswith("error: This run does not fit the card: 19.")
    assert "set memory.profile: 16gb" in err
    assert sorted(path.name for path in spec_file.parent.iterdir()) == ["spec.yaml"]


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_spec_that_is_not_there_ends_with_three(spec_file: Path, name: str) -> None:
    code, out, err = run("plan", name)
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {name}")


def test_a_backend_that_is_not_ready_ends_with_five_and_leaves_nothing(spec_file: Path) -> None:
    write_pair(spec_file.parent / "images", "a.png")
    code, _, err = run("train", spec_file, "--backend", "modest")
    assert code == 5
    assert "The backend modest cannot train here: it is only a test" in err
    assert sorted(path.name for path in spec_file.parent.iterdir()) == ["images", "spec.yaml"]


def test_an_output_folder_that_is_a_file_ends_with_seven(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Modest, "readiness", lambda self, python=None: Readiness(True, ""))
    write_pair(spec_file.parent / "images", "a.png")
    code, _, err = run("train", spec_file, "--backend", "modest", "--out", spec_file)
    assert code == 7
    assert f"{spec_file} is a file" in err
    assert spec_file.read_text() == MINIMAL


def test_resuming_what_is_no_run_ends_with_seven(spec_file: Path) -> None:
    code, _, err = run("resume", "nowhere")
    assert code == 7
    assert err.startswith("error: nowhere is not there.")


def test_a_wrong_option_or_argument_ends_with_two(spec_file: Path) -> None:
    for arguments in (["plan"], ["plan", spec_file, "--nope"], ["nope"], ["plan", spec_file, "--strict=maybe"]):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert "Error" in err


def test_advice_stands_beside_the_verdicts_and_changes_no_exit_code(spec_file: Path) -> None:
    code, out, _ = run("plan", spec_file, "--set", "train.steps=1")
    assert code == 0
    assert "Steps 1 steps. Advice (public guides, at batch size 1): 60 to 120 an image" in out
    assert "Rank 16. Advice (public guides)" in out
    assert "Time not known: the tiny checkpoint is only for trying things out" in out
    assert "Disk not known" in out
    code, out, _ = run("plan", spec_file, "--json")
    assert json.loads(out)["advice"]["time"]["seconds"] is None


def test_the_images_of_an_epoch_are_counted_by_set(tmp_path: Path, spec_file: Path) -> None:
    for folder, count in {"one": 2, "two": 6}.items():
        (tmp_path / folder).mkdir()
        for number in range(count):
            (tmp_path / folder / f"{number}.png").touch()
    spec_file.write_text(
        "name: demo\nmodel: {checkpoint: tiny}\ntrain: {steps: 24}\n"
        "dataset: {sets: [{path: one, weight: 1}, {path: two, weight: 1}]}\n"
    )
    code, out, _ = run("plan", spec_file)
    assert code == 0
    assert "Images 8 images in 2 sets, 12 samples an epoch, 2 epochs" in out
    assert f"dataset.sets[0]: 2 of {tmp_path}/one, 3 times each: 50 % of the samples" in out
    code, out, _ = run("plan", spec_file, "--json")
    assert [one["repeats"] for one in json.loads(out)["epoch"]["sets"]] == [3, 1]
    code, out, _ = run("plan", spec_file, "--backend", "native", "--against", "modest")
    assert "dataset.sets[1].weight" in out
