from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_fakes import FakePlugin

import loraport
from loraport.errors import BackendError, DataError, Interrupted, RunFolderError, SpecError
from loraport.lora.canonical import LoraFile
from loraport.run import api, events
from loraport.run.events import Event
from loraport.run.folder import RunFolder
from loraport.run.record import read_events
from loraport.spec.models import TrainSpec
from loraport_convert.comfyui import ComfyUI

MakeSpec = Callable[..., TrainSpec]
Survivors = Callable[[], list[str]]

pytestmark = pytest.mark.usefixtures("fakes")


def told(folder: Path) -> list[str]:
    return [event.type for event in read_events(folder / "events.jsonl")]


def wait_for(what: Callable[[], Any], seconds: float = 15.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


class Run:
    """`run_fakes.py` in a process of its own, as the command line would be."""

    def __init__(self, *arguments: str | Path):
        script = Path(__file__).with_name("run_fakes.py")
        roots = os.pathsep.join([str(Path(loraport.__file__).parents[1]), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": roots},
        )

    def until(self, kind: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["type"] == kind:
                return event
        raise AssertionError(f"no {kind}")

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.fixture
def started(make_spec: MakeSpec, tmp_path: Path) -> Callable[..., Run]:
    """Start a run in another process: `started("stubborn")`."""

    def start(*args: Any, **options: Any) -> Run:
        spec = tmp_path / "spec.yaml"
        spec.write_text(make_spec(*args, **options).to_yaml())
        return Run("train", spec, tmp_path / "run")

    return start


def test_training_ends_with_a_lora_and_a_folder_that_explains_itself(make_spec: MakeSpec, tmp_path: Path) -> None:
    heard: list[Event] = []
    result = api.train(make_spec(steps=4), out=tmp_path / "run", on_event=heard.append)
    assert (result.folder, result.lora, result.steps) == (tmp_path / "run", tmp_path / "run" / "demo.safetensors", 4)
    assert json.loads(result.proof.read_text())["ok"]
    assert [event.type for event in heard] == told(result.folder)
    assert told(result.folder)[-2:] == ["phase", "finished"]
    names = {path.name for path in result.folder.iterdir()}
    assert {"spec.yaml", "plan.json", "log.txt", "events.jsonl", "state.json", "checkpoints", "proof.json"} <= names
    assert [(run.status, run.cells()[3]) for run in api.runs(tmp_path)] == [("finished", "4/4")]


def test_the_default_folder_is_numbered(make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert api.runs() == []
    folders = [api.train(make_spec(steps=1)).folder for _ in range(2)]
    assert folders == [tmp_path / "runs" / "demo", tmp_path / "runs" / "demo-2"]
    assert len(api.runs()) == 2


def test_planning_writes_nothing(make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    plan = api.plan(make_spec())
    assert (plan.backend, plan.run_dir) == ("fake", tmp_path / "runs" / "demo")
    assert sorted(tmp_path.rglob("*")) == before


def test_relative_paths_of_a_spec_made_in_python_start_at_the_current_folder(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = make_spec()
    spec = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"path": Path("images")})})
    assert api.plan(spec).spec.dataset.path == tmp_path / "images"


def test_the_backend_given_wins_over_that_of_the_spec(make_spec: MakeSpec) -> None:
    with pytest.raises(SpecError, match=r"'fak' is not known. Did you mean 'fake'"):
        api.plan(make_spec(), backend="fak")
    spec = make_spec()
    spec = spec.model_copy(update={"backend": spec.backend.model_copy(update={"name": "other"})})
    assert api.plan(spec, backend="fake").spec.backend.name == "fake"


@pytest.mark.parametrize(("kind", "strict"), [("refused", False), ("ignored", True)])
def test_a_refused_field_stops_before_anything_is_made(
    make_spec: MakeSpec, tmp_path: Path, kind: str, strict: bool
) -> None:
    with pytest.raises(SpecError, match=r"lora.rank = 16"):
        api.train(make_spec(verdict={"lora.rank": kind}), out=tmp_path / "run", strict=strict)
    assert not (tmp_path / "run").exists()


def test_a_backend_that_is_not_ready_says_why_before_anything_is_made(
    make_spec: MakeSpec, fakes: FakePlugin, tmp_path: Path
) -> None:
    fakes.backend.ready = False  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match="cannot train here: pip install fake"):
        api.train(make_spec(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_failed_run_is_recorded_and_can_be_gone_on_with(make_spec: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="the fake broke"):
        api.train(make_spec("crash"), out=tmp_path / "run")
    state = RunFolder.open(tmp_path / "run").read_state()
    assert (state.status, state.exit_code) == ("failed", 5)
    assert "the fake broke" in (state.message or "")
    assert told(tmp_path / "run")[-1] == "failed"
    with pytest.raises(BackendError):
        api.resume(tmp_path / "run")


def test_exit_code_0_without_a_lora_is_a_failure(make_spec: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="without a LoRA"):
        api.train(make_spec("no-file"), out=tmp_path / "run")
    state = RunFolder.open(tmp_path / "run").read_state()
    assert (state.status, state.trained) == ("failed", False)


def test_a_stopped_run_goes_on_from_its_checkpoint(make_spec: MakeSpec, tmp_path: Path) -> None:
    pressed: list[Event] = []

    def press(event: Event) -> None:
        if isinstance(event, events.Checkpoint) and not pressed:
            pressed.append(event)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        api.train(make_spec(steps=30, seconds=0.03), out=tmp_path / "run", on_event=press)
    state = RunFolder.open(tmp_path / "run").read_state()
    assert (state.status, state.exit_code) == ("interrupted", 130)
    assert told(tmp_path / "run")[-1] == "interrupted"

    heard: list[Event] = []
    assert api.resume(tmp_path / "run", on_event=heard.append).steps == 30
    resumed = next(event for event in heard if isinstance(event, events.Resumed))
    assert resumed.step == state.checkpoint
    assert next(event for event in heard if isinstance(event, events.Step)).step == resumed.step + 1
    assert isinstance(heard[0], events.Started)
    assert heard[0].resume


def test_a_finished_run_says_so_and_stays_as_it_is(make_spec: MakeSpec, tmp_path: Path) -> None:
    first = api.train(make_spec(), out=tmp_path / "run")
    before = {path: path.read_bytes() for path in first.folder.iterdir() if path.is_file()}
    heard: list[Event] = []
    assert api.resume(tmp_path / "run", on_event=heard.append) == first
    assert {path: path.read_bytes() for path in before} == before
    assert [getattr(event, "message", "") for event in heard] == [
        f"{first.folder} has finished already; there is nothing left to do."
    ]


def test_when_only_the_conversion_failed_only_that_is_done_again(
    make_spec: MakeSpec, fakes: FakePlugin, tmp_path: Path
) -> None:
    class Broken(ComfyUI):
        def write(self, lora: LoraFile, path: Path, dtype: str, metadata: Mapping[str, str]) -> None:
            raise DataError("a number does not fit")

    fakes.dialects = [Broken()]
    with pytest.raises(DataError):
        api.train(make_spec(), out=tmp_path / "run")
    fakes.dialects = [ComfyUI()]
    heard: list[Event] = []
    assert api.resume(tmp_path / "run", on_event=heard.append).lora.exists()
    assert [event.type for event in heard] == ["phase", "finished"]


def test_when_the_trained_file_is_gone_too_training_goes_on(make_spec: MakeSpec, tmp_path: Path) -> None:
    first = api.train(make_spec(), out=tmp_path / "run")
    first.lora.unlink()
    (first.folder / "trained.safetensors").unlink()
    assert api.resume(first.folder).lora.exists()
    assert "resumed" in told(first.folder)


def test_an_unexpected_error_is_recorded_and_not_hidden(
    make_spec: MakeSpec, fakes: FakePlugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(fakes.backend), "collect", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        api.train(make_spec(), out=tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").read_state().message == "ZeroDivisionError: division by zero"


def test_ctrl_c_during_the_conversion_loses_no_training(make_spec: MakeSpec, fakes: FakePlugin, tmp_path: Path) -> None:
    class Slow(ComfyUI):
        def write(self, lora: LoraFile, path: Path, dtype: str, metadata: Mapping[str, str]) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    fakes.dialects = [Slow()]
    with pytest.raises(Interrupted, match="the training is done, and only the LoRA's conversion is left"):
        api.train(make_spec(), out=tmp_path / "run")
    fakes.dialects = [ComfyUI()]
    assert api.resume(tmp_path / "run").lora.exists()


def test_listeners_of_plugins_follow_the_run_and_a_broken_one_is_a_warning(
    make_spec: MakeSpec, fakes: FakePlugin, tmp_path: Path
) -> None:
    heard: list[Event] = []

    class Tracker:
        def handle(self, event: Event) -> None:
            heard.append(event)

    def broken(spec: TrainSpec, backend: str, run_dir: Path) -> None:
        raise ImportError("no tracker installed")

    fakes.listeners = [broken, lambda *_: None, lambda spec, backend, run_dir: Tracker()]
    api.train(make_spec(), out=tmp_path / "run")
    warnings = [event.message for event in heard if isinstance(event, events.Warn)]
    assert len(warnings) == 1
    assert "broken could not be started: ImportError: no tracker installed" in warnings[0]
    assert heard[-1].type == "finished"


def test_a_run_in_use_cannot_be_resumed(make_spec: MakeSpec, tmp_path: Path) -> None:
    caught: list[RunFolderError] = []

    def meddle(event: Event) -> None:
        if isinstance(event, events.PhaseStarted) and not caught:
            with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}") as error:
                api.resume(tmp_path / "run")
            caught.append(error.value)
            with pytest.raises(RunFolderError, match="already holds a run"):
                api.train(make_spec(), out=tmp_path / "run")

    assert api.train(make_spec(), out=tmp_path / "run", on_event=meddle).lora.exists()
    assert caught


def test_resuming_something_that_is_no_run_names_the_near_ones(make_spec: MakeSpec, tmp_path: Path) -> None:
    api.train(make_spec(), out=tmp_path / "run")
    with pytest.raises(RunFolderError, match=f"Runs nearby: {tmp_path / 'run'}"):
        api.resume(tmp_path / "run2")


def test_a_broken_spec_in_a_run_folder_is_named(make_spec: MakeSpec, tmp_path: Path) -> None:
    api.train(make_spec(), out=tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    folder.write_state(replace(folder.read_state(), status="failed"))
    folder.spec_file.write_text("name: demo\nrank: 3\n")
    with pytest.raises(SpecError, match=r"run/spec.yaml is not a valid spec"):
        api.resume(tmp_path / "run")


def test_training_from_another_thread_works(make_spec: MakeSpec, tmp_path: Path) -> None:
    results: list[api.RunResult] = []
    thread = threading.Thread(target=lambda: results.append(api.train(make_spec(), out=tmp_path / "run")))
    thread.start()
    thread.join(20)
    assert results[0].lora.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_stops_it_with_130_and_how_to_go_on(
    started: Callable[..., Run], survivors: Survivors, tmp_path: Path, number: int
) -> None:
    run = started(steps=1000, seconds=0.03)
    run.until("checkpoint")
    run.process.send_signal(number)
    code, errors = run.end()
    assert code == 130
    assert f"loraport resume {tmp_path / 'run'}" in errors
    assert survivors() == []


@pytest.mark.parametrize(
    "mode",
    [
        "train",
        "stubborn",
        *(["orphan", "setsid"] if sys.platform == "linux" else []),
    ],
)
def test_after_kill_9_nothing_survives_and_the_run_can_go_on(
    started: Callable[..., Run], survivors: Survivors, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPORT_TEST_GRACE", "1")
    run = started(mode, steps=1000, seconds=0.02)
    run.until("checkpoint" if mode == "train" else "phase")
    run.process.kill()
    run.process.wait()
    folder = RunFolder.open(tmp_path / "run")
    wait_for(lambda: folder.status() == "died")
    assert survivors() == []  # the lock is given back only when the last process is gone
    if mode == "train":
        (tmp_path / "run" / "events.jsonl").open("ab").write(b'{"type":"st')
        text = folder.spec_file.read_text()
        folder.spec_file.write_text(text.replace("steps: 1000", f"steps: {folder.read_state().checkpoint + 3}"))
        resumed = Run("resume", tmp_path / "run")
        assert resumed.until("resumed")["step"] >= 2
        assert resumed.end()[0] == 0
        assert told(tmp_path / "run")[-1] == "finished"


def test_going_on_right_after_kill_9_waits_until_the_old_trainer_is_gone(
    started: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPORT_TEST_GRACE", "1.5")
    run = started("stubborn")
    run.until("phase")
    old = psutil.Process(
        int(
            wait_for(
                lambda: (tmp_path / "run" / "trainer.pid").exists() and (tmp_path / "run" / "trainer.pid").read_text()
            )
        )
    )
    run.process.kill()
    run.process.wait()
    spec = tmp_path / "run" / "spec.yaml"
    spec.write_text(spec.read_text().replace("mode: stubborn", "mode: train"))
    alive_at_start: list[bool] = []
    api.resume(tmp_path / "run", on_event=lambda _: alive_at_start.append(old.is_running()))
    assert alive_at_start[0] is False
