"""The launcher, with a stand-in for SimpleTuner that behaves as it does: files, output, signals, exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraport.errors import BackendError, DataError, LoraPortError, OutOfMemoryError
from loraport.planning import Context
from loraport.run import events
from loraport.run.errors_line import find_error
from loraport.run.events import decode_line
from loraport.run.supervisor import write_files
from loraport_simpletuner import launch
from loraport_simpletuner.translate import translate

STAND_IN = Path(__file__).parent.parent / "stand_ins" / "simpletuner.py"


@pytest.fixture(autouse=True)
def _signals_come_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(
    make_spec: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    monkeypatch.setattr(launch, "find_interpreter", lambda name, given=None: Path(sys.executable))
    monkeypatch.setattr(launch, "problem_with", lambda python, recipe: None)
    monkeypatch.setattr(launch, "package_version", lambda python, package: "4.10.1")
    monkeypatch.setattr(launch, "_END_PATIENCE", 0.1)
    monkeypatch.setenv("ENV", "stray")
    monkeypatch.setenv("CONFIG_PATH", "/stray")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("PYTHONPATH", "/stray")
    folder = tmp_path / "rün"

    def go(mode: str, resume: bool = False, **sections: Any) -> tuple[int, str]:
        sections["dataset"] = {"path": str(photos), "resolution": 128} | sections.get("dataset", {})
        spec = make_spec(train={"steps": 4}, **sections)
        made = translate(spec, Context(folder, resume))
        plan = json.loads(made.files["backend/launch.json"])
        plan["arguments"] = [str(STAND_IN)]
        monkeypatch.setenv("STAND_IN", mode)
        write_files(_Files(made.files | {"backend/launch.json": json.dumps(plan)}), folder)
        (folder / "spec.yaml").write_text(spec.to_yaml(), encoding="utf-8")
        code = launch.main(folder)
        return code, capsys.readouterr().out

    return go


class _Files:
    backend = "simpletuner"

    def __init__(self, files: dict[str, str]):
        self.files = files


def told(said: str, kind: type[Any]) -> list[Any]:
    return [event for line in said.splitlines() if isinstance(event := decode_line(line), kind)]


def error(said: str) -> LoraPortError:
    found = find_error(said)
    assert found is not None, said
    return found


def test_each_step_is_told_once_and_success_needs_the_final_file(run) -> None:
    code, said = run("good")
    assert code == 0, said
    assert [(event.step, event.loss, event.images_per_second) for event in told(said, events.Step)] == [
        (number, 0.5, 2.0) for number in (1, 2, 3, 4)
    ]
    assert [event.path for event in told(said, events.Checkpoint)] == ["backend/output/checkpoint-4"]
    assert [event.phase for event in told(said, events.PhaseStarted)] == ["start", "cache", "train"]


def test_a_stray_shell_does_not_leak_in_and_the_trainer_has_a_session_of_its_own(run) -> None:
    _, said = run("good")
    line = next(line for line in said.splitlines() if line.startswith("{"))
    seen, rest = json.JSONDecoder().raw_decode(line)
    assert seen["CONFIG_BACKEND"] == "json"
    assert {name for name, value in seen.items() if value is None} >= {
        "ENV",
        "CONFIG_PATH",
        "ACCELERATE_MIXED_PRECISION",
        "PYTHONPATH",
    }
    assert line[rest:].strip() == "True"


def test_the_bar_stands_in_while_there_is_no_metrics_file(run) -> None:
    _, said = run("bar")
    steps = told(said, events.Step)
    assert steps
    assert all(event.loss == 0.5 and event.lr == 1e-4 for event in steps)


@pytest.mark.parametrize(
    ("mode", "kind", "words"),
    [
        ("empty", BackendError, "as if all were well"),
        ("zero", BackendError, "too few usable images"),
        ("oom", OutOfMemoryError, "CUDA out of memory"),
        ("nan", BackendError, "not a number at step 2"),
    ],
)
def test_a_failure_is_one_error_whatever_the_exit_code(run, mode: str, kind: type[LoraPortError], words: str) -> None:
    code, said = run(mode)
    found = error(said)
    assert type(found).exit_code == kind.exit_code == code
    assert words in str(found)


def test_a_stop_waits_for_a_checkpoint_and_then_ends_the_trainer(run) -> None:
    code, said = run("stop")
    assert code == 130
    assert [event.step for event in told(said, events.Checkpoint)] == [2]
    assert find_error(said) is None


def test_a_second_stop_ends_it_at_once(run) -> None:
    code, said = run("deaf")
    assert code == 130
    assert told(said, events.Checkpoint) == []


def test_a_resumed_run_tells_where_it_goes_on_and_an_old_final_file_is_no_success(run, tmp_path: Path) -> None:
    assert run("good")[0] == 0
    code, said = run("empty", resume=True)
    assert code == 5
    assert [event.step for event in told(said, events.Resumed)] == [4]
    assert not (tmp_path / "rün" / "backend" / "output" / "pytorch_lora_weights.safetensors").exists()


def test_a_new_run_over_old_checkpoints_is_refused(run) -> None:
    run("good")
    code, said = run("good")
    assert code == 7
    assert "another training" in str(error(said))


def test_small_images_are_warned_of_and_mirrored_copies_are_staged(run, tmp_path: Path) -> None:
    _, said = run("good", dataset={"resolution": 256, "flip": True})
    assert "3 images" in told(said, events.Warn)[0].message
    staged = tmp_path / "rün" / "backend" / "dataset" / "images"
    assert sorted(path.suffix for path in staged.iterdir()) == [".png"] * 6 + [".txt"] * 6
    assert {path.read_text(encoding="utf-8") for path in staged.glob("*.txt")} == {
        '{"compositional_deconstruction":{"background":"gräy","elements":[]}}'
    }


def test_another_version_than_the_keys_are_for_is_refused(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "package_version", lambda python, package: "4.8.2")
    code, said = run("good")
    assert code == 5
    assert "backend.options.version: 4.8.2" in str(error(said))


def test_a_missing_package_says_how_to_install_it(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "problem_with", lambda python, recipe: "simpletuner is not installed")
    code, said = run("good")
    assert code == 5
    assert "loraport backends install simpletuner" in str(error(said))
    assert not launch.readiness().ready


def test_an_empty_folder_is_a_data_error_before_anything_starts(run, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    code, said = run("good", dataset={"path": str(tmp_path / "none")})
    assert code == DataError.exit_code
    assert "has no images" in str(error(said))
    assert os.environ["ENV"] == "stray"
