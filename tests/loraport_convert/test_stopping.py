"""Stopping a command and full disks, as processes: nothing is lost and nothing half done is left."""

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from loraport.errors import Interrupted
from loraport.lora.storage import write_tensors
from loraport_convert import stopping
from loraport_convert.stopping import stoppable, undivided

#: Runs `loraport` with a function of the converter that first says that it is reached, and waits.
WAITING = """
import importlib, sys, time
module, name, reached = sys.argv[1:4]
module = importlib.import_module(module)
function = getattr(module, name)
def waiting(*arguments, **named):
    open(reached, "w").close()
    [time.sleep(0.01) for _ in range(30000)]  # one long sleep misses a signal that comes just before it
    return function(*arguments, **named)
setattr(module, name, waiting)
sys.argv = ["loraport", *sys.argv[4:]]
from loraport.cli.main import main
main()
"""
STAGES = {
    "writing": ("loraport.lora.streaming", "_write_header"),
    "proving": ("loraport_convert.publishing", "prove"),
    "moving": ("loraport_convert.publishing", "_move"),
}


@pytest.fixture
def folder(tmp_path):
    """A folder with two LoRAs and an output of an earlier time."""
    work = tmp_path / "work"
    work.mkdir()
    rng = np.random.default_rng(0)
    for file in ("a", "b"):
        tensors = {}
        for name in ("layers.0.attention.qkv", "layers.1.attention.qkv"):
            tensors[f"diffusion_model.{name}.lora_down.weight"] = rng.standard_normal((8, 512)).astype(np.float32)
            tensors[f"diffusion_model.{name}.lora_up.weight"] = rng.standard_normal((1536, 8)).astype(np.float32)
            tensors[f"diffusion_model.{name}.alpha"] = np.array(8, np.float32)
        write_tensors(work / f"{file}.safetensors", tensors, {})
    (work / "out.safetensors").write_text("mine")
    return work


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arguments(command, folder, out):
    files = [folder / "a.safetensors", *([folder / "b.safetensors"] if command == "merge" else [])]
    return [*map(str, (command, *files, "-o", out)), "--overwrite", *(["--rank", "4"] if command == "resize" else [])]


def stopped(stage, number, given, reached):
    """(exit code, standard error) of a command that gets a signal at some stage."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *STAGES[stage], str(reached), *given],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not reached.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    return process.returncode, error


@pytest.mark.parametrize(
    ("command", "stage", "number"),
    [
        ("convert", "writing", signal.SIGTERM),
        ("convert", "proving", signal.SIGINT),
        ("convert", "moving", signal.SIGHUP),
        ("merge", "writing", signal.SIGINT),
        ("resize", "proving", signal.SIGTERM),
    ],
)
def test_a_stopped_command_leaves_everything_as_it_was(folder, tmp_path, command, stage, number):
    before = content(folder)
    code, error = stopped(stage, number, arguments(command, folder, folder / "out.safetensors"), tmp_path / "reached")
    assert (code, "Traceback" in error) == (130, False)
    assert number.name in error
    assert content(folder) == before
    assert sorted(each.name for each in folder.iterdir()) == ["a.safetensors", "b.safetensors", "out.safetensors"]


def test_the_folder_that_an_output_needed_goes_too(folder, tmp_path):
    given = arguments("convert", folder, folder / "new" / "out.safetensors")
    assert stopped("proving", signal.SIGTERM, given, tmp_path / "reached")[0] == 130
    assert not (folder / "new").exists()


def test_what_was_converted_before_the_stop_stays(folder, tmp_path):
    code = f"""
import loraport_convert.publishing as publishing, sys, time
function, calls = publishing.prove, []
def second(*arguments, **named):
    calls.append(1)
    if len(calls) == 2:
        open({str(tmp_path / "reached")!r}, "w").close()
        [time.sleep(0.01) for _ in range(30000)]
    return function(*arguments, **named)
publishing.prove = second
sys.argv = ["loraport", "convert", "a.safetensors", "b.safetensors", "-o", "converted"]
from loraport.cli.main import main
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "reached").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "a.comfyui.safetensors: 2 modules" in out
    names = sorted(each.name for each in (folder / "converted").iterdir())
    assert names == ["a.comfyui.proof.json", "a.comfyui.safetensors"]


@pytest.mark.parametrize("command", ["convert", "merge", "resize"])
@pytest.mark.parametrize("room", [0, 4096, 20_000])
def test_a_full_disk_loses_nothing_and_is_told(folder, command, room):
    before = content(folder)
    done = subprocess.run(
        [sys.executable, "-m", "loraport.cli.main", *arguments(command, folder, folder / "out.safetensors")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (7, False)
    assert "out.safetensors cannot be written: File too large" in done.stderr
    assert content(folder) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a folder that even root cannot write")
def test_a_folder_that_cannot_be_written_is_told(folder):
    done = subprocess.run(
        [sys.executable, "-m", "loraport.cli.main", *arguments("convert", folder, "/proc/out.safetensors")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (7, False)
    assert "/proc/out.safetensors cannot be written" in done.stderr


def test_a_signal_in_an_undivided_block_is_heard_at_its_end():
    done = []

    def command():
        with undivided():
            with undivided():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("never")

    with pytest.raises(Interrupted, match="SIGTERM"), stoppable():
        command()
    assert done == ["inner", "outer"]


def test_the_second_signal_does_not_disturb_taking_the_drafts_away():
    taken = []

    def command():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            taken.append("draft")

    with pytest.raises(Interrupted, match="SIGINT"), stoppable():
        command()
    assert taken == ["draft"]


def test_afterwards_signals_do_what_they_did_and_an_ignored_one_stays_ignored():
    before = [signal.getsignal(number) for number in stopping._SIGNALS]
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            assert signal.getsignal(signal.SIGTERM) == stopping._stop.handle
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, ignored)
    assert [signal.getsignal(number) for number in stopping._SIGNALS] == before
