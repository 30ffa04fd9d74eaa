"""The launcher around a stand-in for ai-toolkit: a run.py that behaves at its edges as the real one does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ai_toolkit_specs import spec
from PIL import Image

from loraport.errors import BackendError
from loraport.files import write_atomic
from loraport.planning import Context
from loraport.run.errors_line import find_error
from loraport.run.events import decode_line
from loraport_ai_toolkit import layout
from loraport_ai_toolkit.collect import collect, numbered_saves, read_save
from loraport_ai_toolkit.launch import _prepare_saves, readiness, trainer_environment
from loraport_ai_toolkit.recipe import CHECKOUT_VARIABLE
from loraport_ai_toolkit.translate import translate

STAND_IN = Path(__file__).parent.parent / "stand_ins" / "ai_toolkit.py"

CAPTION_RULES = "def digest_caption_string(text):\n    return text\n"


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    checkout = tmp_path / "check out"
    (checkout / "toolkit").mkdir(parents=True)
    (checkout / "extensions_built_in" / "diffusion_models" / "ideogram4").mkdir(parents=True)
    (checkout / "version.py").write_text('VERSION = "0.12.26"\n')
    shutil.copyfile(STAND_IN, checkout / "run.py")
    (checkout / "toolkit" / "ideogram_caption.py").write_text(CAPTION_RULES)
    monkeypatch.setenv(CHECKOUT_VARIABLE, str(checkout))
    images = tmp_path / "bilder und mehr"
    images.mkdir()
    Image.new("RGB", (64, 64)).save(images / "ä b.png")
    (images / "ä b.txt").write_text("one, two", encoding="utf-8")
    Image.new("RGBA", (64, 64)).save(images / "glass.bmp.png")
    (images / "glass.bmp.txt").write_text("three", encoding="utf-8")
    return tmp_path / "run_cn_1"


def launch(run_dir: Path, mode: str, **sections: Any) -> subprocess.Popen[str]:
    wanted = spec(
        name="name",
        dataset={"path": str(run_dir.parent / "bilder und mehr"), "caption_ext": "txt"} | sections.pop("dataset", {}),
        train={"steps": 4, **sections.pop("train", {})},
        save={"every": 2},
        backend={"python": sys.executable, **sections.pop("backend", {})},
        **sections,
    )
    run_dir.mkdir(exist_ok=True)
    write_atomic(run_dir / "spec.yaml", wanted.to_yaml())
    made = translate(wanted, Context(run_dir))
    for name, text in made.files.items():
        (run_dir / name).parent.mkdir(exist_ok=True)
        write_atomic(run_dir / name, text)
    return subprocess.Popen(
        made.command,
        env={**os.environ, **made.env, "STAND_IN": mode},
        cwd=run_dir,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str], code: int) -> tuple[list[Any], str]:
    """The events and the output of a launcher that ended with `code`."""
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    return [event for line in output.splitlines() if (event := decode_line(line))], output


def test_a_run_tells_its_steps_and_saves_and_ends_with_the_final_file(run_dir: Path) -> None:
    events, _ = ended(launch(run_dir, "plain"), 0)

    assert [event.step for event in events if event.type == "step"] == [1, 2, 3, 4]
    assert [(event.step, event.path) for event in events if event.type == "checkpoint"] == [
        (2, "backend/output/name/name_000000002.safetensors")
    ]
    assert read_save(run_dir / "backend/output/name/name.safetensors") is not None
    assert (run_dir / layout.set_folder("images") / "00002.txt").read_text() == "one,two"
    with Image.open(run_dir / layout.set_folder("images") / "00001.png") as image:
        assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 255, 255))


def test_sets_are_staged_apart_and_their_weights_become_repeats(run_dir: Path) -> None:
    more = run_dir.parent / "mehr"
    more.mkdir()
    for number in range(6):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(more / f"{number}.png")
    sets = [{"path": run_dir.parent / "bilder und mehr", "weight": 1}, {"path": more, "weight": 1}]
    ended(launch(run_dir, "plain", dataset={"path": None, "sets": sets, "default_caption": "x"}), 0)

    datasets = json.loads((run_dir / layout.JOB).read_text())["config"]["process"][0]["datasets"]
    assert [(one["folder_path"], one["num_repeats"]) for one in datasets] == [
        ("backend/set-0", 3),
        ("backend/set-1", 1),
    ]
    assert [len(list((run_dir / one["folder_path"]).glob("*.png"))) for one in datasets] == [2, 6]
    assert (run_dir / "backend/set-1/00006.txt").read_text() == "x"


def test_an_exit_with_code_0_and_no_file_is_a_failure(run_dir: Path) -> None:
    _, output = ended(launch(run_dir, "no-file"), 5)

    error = find_error(output)
    assert isinstance(error, BackendError)
    assert "without its final file" in error.message


def test_a_stop_saves_first_and_the_next_session_goes_on_from_there(run_dir: Path) -> None:
    process = launch(run_dir, "slow", train={"steps": 100})
    assert process.stdout is not None
    while "lr:" not in process.stdout.readline():
        pass
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    events, _ = ended(process, 130)

    last = numbered_saves(run_dir / "backend/output/name", "name")[-1]
    assert [event.step for event in events if event.type == "checkpoint"][-1] == last.step < 100
    assert _prepare_saves(run_dir / "backend/output/name", "name") == last.step


def test_losses_that_are_no_numbers_end_the_run(run_dir: Path) -> None:
    events, output = ended(launch(run_dir, "nan", train={"steps": 60}), 5)

    error = find_error(output)
    assert error is not None
    assert "not a number since step 1," in error.message
    assert all(event.loss is None for event in events if event.type == "step")


def test_the_trainers_failure_is_one_error(run_dir: Path) -> None:
    _, output = ended(launch(run_dir, "gated"), 4)

    error = find_error(output)
    assert error is not None
    assert "gated" in error.message


def test_stray_variables_do_not_reach_the_trainer_and_no_variable_is_put_into_the_job(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEED", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # with it, run.py would not find what lies beside it

    _, output = ended(
        launch(
            run_dir,
            "environment",
            sample={"every": 2, "prompts": ["${HOME}"]},
            backend={"options": {"device": "cuda:1"}},
        ),
        0,
    )

    found = json.loads(next(line for line in output.splitlines() if line.startswith("ENV "))[4:])
    assert "SEED" not in found
    assert "ACCELERATE_MIXED_PRECISION" not in found
    assert "PYTHONSAFEPATH" not in found
    assert found["CUDA_VISIBLE_DEVICES"] == "1"
    assert "${" not in (run_dir / layout.JOB).read_text()
    assert 'WITH [{"prompt": "${HOME}"}]' in output


def test_an_unknown_device_is_refused_with_the_choices() -> None:
    with pytest.raises(BackendError, match="auto, cpu"):
        trainer_environment("gpu", offline=False)


def test_a_checkout_that_is_not_there_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECKOUT_VARIABLE, str(tmp_path))

    found = readiness()

    assert not found.ready
    assert "loraport backends install ai-toolkit" in found.detail


def test_a_checkout_of_another_version_is_told(run_dir: Path) -> None:
    version = Path(os.environ[CHECKOUT_VARIABLE]) / "version.py"
    assert "0.12.26" not in readiness().detail
    version.write_text('VERSION = "0.9.0"\n')

    assert "0.9.0" in readiness().detail


def save(path: Path, step: int, cut: int = 0) -> Path:
    """A file as ai-toolkit saves it, without its last `cut` bytes."""
    header = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "__metadata__": {"training_info": json.dumps({"step": step, "epoch": 0})},
    }
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(16)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[: len(data) - cut])
    return path


def test_a_save_that_was_cut_off_is_put_aside_and_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a_000000002.safetensors", 2)
    save(tmp_path / "a_000000004.safetensors", 4, cut=3)

    assert _prepare_saves(tmp_path, "a") == 2
    assert (tmp_path / "damaged-a_000000004.safetensors").is_file()
    assert not list(tmp_path.glob("a_000000004*"))
    assert "cut off" in capsys.readouterr().out


def test_the_save_of_the_latest_step_becomes_the_newest_file(tmp_path: Path) -> None:
    latest = save(tmp_path / "a_000000004.safetensors", 4)
    time.sleep(0.02)
    other = save(tmp_path / "a_000000002.safetensors", 2)
    time.sleep(0.02)

    assert _prepare_saves(tmp_path, "a") == 4
    assert latest.stat().st_ctime_ns > other.stat().st_ctime_ns


def test_an_optimizer_without_a_save_is_not_begun_with(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_bytes(b"old")

    assert _prepare_saves(tmp_path, "a") == 0
    assert not (tmp_path / "optimizer.pt").exists()


def test_the_final_file_is_collected_only_when_it_holds_all_steps(tmp_path: Path) -> None:
    wanted = spec(name="a", train={"steps": 4})
    with pytest.raises(BackendError, match="without its final file"):
        collect(wanted, tmp_path)
    path = save(tmp_path / layout.save_folder("a") / "a.safetensors", 3)
    with pytest.raises(BackendError, match="3 of 4"):
        collect(wanted, tmp_path)
    save(path, 4)

    assert collect(wanted, tmp_path) == path
