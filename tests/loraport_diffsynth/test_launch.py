"""The supervised process, with a stand-in for DiffSynth's interpreter."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loraport.lora.storage import write_tensors
from loraport.planning import Context
from loraport.run.errors_line import find_error
from loraport.spec.models import TrainSpec
from loraport_diffsynth.launch import child_environment, value_of
from loraport_diffsynth.translate import translate

MakeSpec = Callable[..., TrainSpec]

#: Notes how it was started, then does what the test says.
STAND_IN = """#!{python}
import json, os, pathlib, signal, subprocess, sys, time
note = {{"arguments": sys.argv[2:], "settings": json.load(open(sys.argv[2])), "environment": dict(os.environ),
        "group": os.getpgrp(), "rows": len(open("dataset/metadata.jsonl").readlines())}}
pathlib.Path("note.json").write_text(json.dumps(note))
{body}
"""


@pytest.fixture
def prepared(
    make_spec: MakeSpec, write_checkpoint: Callable[..., Path], pictures: Path, tmp_path: Path
) -> Callable[..., tuple[list[str], Path]]:
    """prepared(body): the command of a run whose DiffSynth is the stand-in, and the run's folder."""

    def prepare(body: str, **sections: object) -> tuple[list[str], Path]:
        python = tmp_path / "python"
        python.write_text(STAND_IN.format(python=sys.executable, body=body))
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        models = write_checkpoint(tmp_path / "models", "layers.0.attention.qkv.weight")
        spec = make_spec(
            model={"checkpoint": str(models)},
            dataset={"path": str(pictures), "resolution": 128},
            backend={"python": str(python)},
            **{"train": {"steps": 5, "gradient_accumulation": 2}, **sections},
        )
        run_dir = tmp_path / "run, ü"
        (run_dir / "backend").mkdir(parents=True)
        made = translate(spec, Context(run_dir=run_dir))
        for name, text in made.files.items():
            (run_dir / name).write_text(text, encoding="utf-8")
        return made.command, run_dir

    return prepare


def note_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "backend" / "note.json").read_text())


def test_diffsynth_is_started_with_its_arguments_in_a_group_of_its_own(prepared, monkeypatch) -> None:
    for name, value in (("ACCELERATE_MIXED_PRECISION", "fp16"), ("RANK", "3"), ("CONFIG_PATH", "/x"), ("KEEP", "1")):
        monkeypatch.setenv(name, value)
    command, run_dir = prepared("print('hello')")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "hello" in done.stdout
    note = note_of(run_dir)
    assert note["arguments"][0] == "entry.json"
    assert value_of(note["arguments"], "--lora_rank") == "16"
    assert "--lora_checkpoint" not in note["arguments"]
    assert note["rows"] == 10
    assert (note["settings"]["start"], note["settings"]["checkpoint"]) == (0, "checkpoint")
    assert not {"ACCELERATE_MIXED_PRECISION", "RANK", "CONFIG_PATH"} & set(note["environment"])
    assert note["environment"]["KEEP"] == "1"
    assert note["environment"]["DIFFSYNTH_SKIP_DOWNLOAD"] == "True"
    assert note["group"] != os.getpgrp()


def test_a_run_with_a_save_goes_on_from_its_weights_with_the_steps_that_are_left(prepared) -> None:
    command, run_dir = prepared("")
    (run_dir / "backend" / "output").mkdir()
    for step in (2, 3):
        save = run_dir / "backend" / "output" / f"step-{step:06d}.safetensors"
        write_tensors(save, {"a": np.zeros(1, np.float32)}, {})
    done = subprocess.run(command, capture_output=True, text=True)
    note = note_of(run_dir)
    assert value_of(note["arguments"], "--lora_checkpoint") == "output/step-000003.safetensors"
    assert (note["settings"]["start"], note["rows"]) == (3, 4)
    assert '"type":"resumed"' in done.stdout
    assert "weights only" in done.stdout


def test_a_run_that_has_its_last_save_starts_nothing(prepared) -> None:
    command, run_dir = prepared("")
    (run_dir / "backend" / "output").mkdir()
    write_tensors(run_dir / "backend/output/step-000005.safetensors", {"a": np.zeros(1, np.float32)}, {})
    assert subprocess.run(command).returncode == 0
    assert not (run_dir / "backend" / "note.json").exists()


def test_its_exit_code_is_passed_on(prepared) -> None:
    assert subprocess.run(prepared("sys.exit(9)")[0], capture_output=True).returncode == 9


def test_what_is_wrong_before_diffsynth_starts_is_told_as_one_error(prepared, pictures: Path) -> None:
    (pictures / "0.json").write_text("{")
    command, run_dir = prepared("")
    done = subprocess.run(command, capture_output=True, text=True)
    error = find_error(done.stdout)
    assert done.returncode == 4
    assert error is not None
    assert "0.json" in error.message
    assert not (run_dir / "backend" / "note.json").exists()


def started(command: list[str], run_dir: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not (run_dir / "backend" / "ready").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_asked_to_stop_it_asks_diffsynth_and_says_that_it_was_stopped(prepared) -> None:
    body = (
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\npathlib.Path('ready').touch()\n"
        "while True: time.sleep(0.01)"
    )
    command, run_dir = prepared(body)
    process = started(command, run_dir)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 130


def test_asked_twice_it_kills_diffsynth_and_all_that_diffsynth_started(prepared) -> None:
    body = (
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "pathlib.Path('ready').touch()\ntime.sleep(60)"
    )
    command, run_dir = prepared(body)
    process = started(command, run_dir)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    child = int((run_dir / "backend" / "child").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_models_folder_of_the_users_is_kept_and_there_is_one_otherwise(monkeypatch) -> None:
    monkeypatch.delenv("DIFFSYNTH_MODEL_BASE_PATH", raising=False)
    assert child_environment({})["DIFFSYNTH_MODEL_BASE_PATH"].endswith("models/diffsynth")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", "/big/disk")
    assert child_environment({"A": "b"})["DIFFSYNTH_MODEL_BASE_PATH"] == "/big/disk"


def test_the_last_of_two_values_counts() -> None:
    assert value_of(["--a", "1", "--b", "--a", "2"], "--a") == "2"
