"""The trainer's process: it can be stopped and killed at any moment, and tells in one line why it failed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraport.errors import Interrupted, LoraPortError, OutOfMemoryError, RunFolderError
from loraport.run.events import Event, Step, decode_line
from loraport.spec.models import TrainSpec
from loraport_native import train
from loraport_native.checkpoints import whole_checkpoints
from loraport_native.progress import explain_failure

STEPS = 24
CASES: dict[str, dict[str, Any]] = {
    "adamw and everything random": {
        "dataset": {"caption_dropout": 0.4, "flip": True},
        "lora": {"dropout": 0.3},
        "train": {"ema_decay": 0.9, "gradient_accumulation": 2, "lr_scheduler": "cosine", "warmup_steps": 4},
    },
    "adamw8bit": {"lora": {"rank": 64}, "train": {"optimizer": "adamw8bit"}},
    "prodigy": {"train": {"optimizer": "prodigy", "learning_rate": 1.0, "ema_decay": 0.9}},
}


class Process:
    """A trainer's process, whose events come as they are printed."""

    def __init__(self, run_dir: Path):
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "loraport_native.train", str(run_dir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.output = ""

    def events(self) -> Iterator[Event]:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.output += line
            event = decode_line(line)
            if event is not None:
                yield event

    def end(self) -> int:
        for _ in self.events():
            pass
        self.errors = self.popen.stderr.read() if self.popen.stderr else ""
        return self.popen.wait()


def start(run_dir: Path, spec: TrainSpec) -> Process:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "spec.yaml").write_text(spec.to_yaml())
    return Process(run_dir)


def last_adapter(run_dir: Path) -> bytes:
    return (run_dir / "checkpoints" / f"step-{STEPS:06d}" / "adapter.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_stopped_or_killed_and_resumed_it_ends_bit_identical(
    case: str, make_spec, make_trainer, tmp_path: Path
) -> None:
    """Asked to stop by SIGINT, killed at a step, in the middle of writing a checkpoint, and anywhere.

    Every resumed process must go on from the last whole checkpoint, and the last one end with the bytes of a run that
    was left alone.
    """
    changes = {**CASES[case], "train": {"steps": STEPS, **CASES[case].get("train", {})}}
    spec = make_spec(**changes, save={"every": 2, "keep": 3})
    make_trainer(spec, tmp_path / "alone").fit()

    run_dir = tmp_path / "troubled"
    process = start(run_dir, spec)
    steps = kill_when(process, lambda event: isinstance(event, Step) and event.step == 5, signal.SIGINT)
    assert steps[-1] in (5, 6)
    assert process.popen.returncode == 130
    assert isinstance(explain_failure(130, process.output), Interrupted)
    assert max(whole_checkpoints(run_dir)) == steps[-1], "SIGINT writes a checkpoint first"

    draw = random.Random(case)
    for moment in ("step", "write", "anywhere"):
        process, done = start(run_dir, spec), max(whole_checkpoints(run_dir))
        if moment == "write":
            steps = kill_while_it_writes(process, run_dir)
        else:
            pause = draw.uniform(0, 0.03) if moment == "anywhere" else 0.0
            steps = kill_when(
                process, lambda event, n=done + 3: isinstance(event, Step) and event.step >= n, pause=pause
            )
        assert process.popen.returncode == -signal.SIGKILL
        assert not steps or steps[0] == done + 1
    assert not (run_dir / "checkpoints" / f"step-{STEPS:06d}").exists(), "it was killed before the end"

    process = start(run_dir, spec)
    assert process.end() == 0, process.errors
    assert "Traceback" not in process.errors
    assert last_adapter(run_dir) == last_adapter(tmp_path / "alone")
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        f"step-{step:06d}" for step in (STEPS - 4, STEPS - 2, STEPS)
    ]


def kill_when(
    process: Process, now: Callable[[Event], bool], sent: signal.Signals = signal.SIGKILL, pause: float = 0.0
) -> list[int]:
    """Signal the process at the first such event; the steps that it told until its end."""
    steps = []
    for event in process.events():
        steps += [event.step] if isinstance(event, Step) else []
        if now(event):
            time.sleep(pause)
            process.popen.send_signal(sent)
            now = lambda event: False  # noqa: E731
    process.end()
    return steps


def kill_while_it_writes(process: Process, run_dir: Path) -> list[int]:
    """Kill at the moment at which a draft of a checkpoint is there."""
    folder = run_dir / "checkpoints"
    deadline = time.monotonic() + 60
    while not any(folder.glob(".step-*.draft")):
        assert time.monotonic() < deadline
        assert process.popen.poll() is None
    process.popen.kill()
    steps = [event.step for event in process.events() if isinstance(event, Step)]
    process.end()
    return steps


@pytest.mark.slow
def test_stopping_before_training_began_is_an_interruption(make_spec, tmp_path: Path) -> None:
    for sent in (signal.SIGINT, signal.SIGTERM):
        process = start(tmp_path / sent.name, make_spec())
        next(process.events())  # libraries are being loaded
        time.sleep(0.3)
        process.popen.send_signal(sent)
        assert process.end() == 130
        error = explain_failure(130, process.output)
        assert isinstance(error, Interrupted)
        assert "before training began" in error.message


@pytest.mark.slow
def test_the_process_says_nothing_that_nobody_can_act_on(make_spec, tmp_path: Path) -> None:
    process = start(tmp_path / "run", make_spec(train={"steps": 1}))
    assert process.end() == 0
    assert process.errors == ""
    strange = [line for line in process.output.splitlines() if decode_line(line) is None]
    assert [line.split()[:3] for line in strange] == [["The", "cache", "holds"]]


@pytest.mark.slow
def test_the_tiny_checkpoint_is_made_in_the_run_folder(make_spec, tmp_path: Path) -> None:
    process = start(tmp_path / "run", make_spec(model={"checkpoint": "tiny"}, train={"steps": 1}))
    assert process.end() == 0, process.errors
    assert (tmp_path / "run" / "tiny-checkpoint" / "transformer").is_dir()
    assert list(whole_checkpoints(tmp_path / "run")) == [1]


@pytest.fixture
def run_dir(tmp_path: Path, make_spec) -> Path:
    (tmp_path / "spec.yaml").write_text(make_spec().to_yaml())
    return tmp_path


def failure(run_dir: Path, monkeypatch, capsys, raised: BaseException) -> tuple[int, LoraPortError]:
    """The exit code and the told error of a process whose loop raises `raised`."""
    from loraport_native.trainer import Trainer

    def fail(self: Any, *_: Any) -> None:
        raise raised

    monkeypatch.setattr(Trainer, "_loss", fail)
    monkeypatch.setattr(sys, "argv", ["train", str(run_dir)])
    keep_signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = train.main()
    finally:
        for number, handler in keep_signals.items():
            signal.signal(number, handler)
    return code, explain_failure(code, capsys.readouterr().out)


MEMORY_ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("case", MEMORY_ERRORS)
def test_out_of_memory_names_the_profile_for_this_card(run_dir, monkeypatch, capsys, case: str) -> None:
    from loraport import gpu

    monkeypatch.setattr(gpu, "cards", lambda: [SimpleNamespace(memory_gib=15.99)])
    code, error = failure(run_dir, monkeypatch, capsys, MEMORY_ERRORS[case])
    assert code == error.exit_code == 6
    assert isinstance(error, OutOfMemoryError)
    assert "--set memory.profile=16gb" in str(error)
    assert "\n" not in error.message


def test_out_of_memory_without_a_card_says_what_to_lower(run_dir, monkeypatch, capsys) -> None:
    from loraport import gpu

    monkeypatch.setattr(gpu, "cards", list)
    code, error = failure(run_dir, monkeypatch, capsys, MEMORY_ERRORS["cpu"])
    assert code == 6
    assert "dataset.resolution" in str(error)


def test_an_error_of_the_file_system_is_told_with_its_file(run_dir, monkeypatch, capsys) -> None:
    code, error = failure(run_dir, monkeypatch, capsys, OSError(28, "No space left on device", "/somewhere/file"))
    assert code == 7
    assert isinstance(error, RunFolderError)
    assert error.message == "/somewhere/file: No space left on device."


def test_a_defect_is_not_dressed_up_as_the_users_fault(run_dir, monkeypatch, capsys) -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        failure(run_dir, monkeypatch, capsys, RuntimeError("shapes do not fit"))


def test_torch_really_says_so_when_the_cpu_has_no_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert any(words in str(caught.value) for words in train._OUT_OF_MEMORY)
