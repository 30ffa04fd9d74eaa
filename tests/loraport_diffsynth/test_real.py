"""Real trainings by DiffSynth on a CPU, with a tiny checkpoint, to the LoRA for ComfyUI."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from equal_work import native_work, work_of

from loraport.errors import BackendError, Interrupted, SpecError
from loraport.lora.storage import read_tensors
from loraport.run import events
from loraport.run.api import RunResult, resume, train
from loraport.spec.models import TrainSpec

pytestmark = pytest.mark.slow
MakeSpec = Callable[..., TrainSpec]


@pytest.fixture(autouse=True)
def _diffsynth(diffsynth_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(f"python: {{diffsynth: {json.dumps(str(diffsynth_python))}}}\n")
    monkeypatch.setenv("LORAPORT_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def small(make_spec: MakeSpec, tiny: Path, pictures: Path) -> Callable[..., TrainSpec]:
    """small(section={…}): four steps on three pictures of 128 px, changed by what is given."""

    def make(**sections: Any) -> TrainSpec:
        basis: dict[str, Any] = {
            "model": {"checkpoint": str(tiny)},
            "dataset": {"path": str(pictures), "resolution": 128},
            "lora": {"rank": 4, "alpha": 8},
            "train": {"steps": 4, "gradient_accumulation": 2, "optimizer": "adamw", "learning_rate": 1e-3},
            "save": {"every": 2},
        }
        for name, values in sections.items():
            basis[name] = {**basis.get(name, {}), **values}
        return make_spec(**basis)

    return make


def passes(run_dir: Path) -> int:
    """How often DiffSynth's own progress bar says its model was trained with an image."""
    bars = re.findall(r"(\d+)/\d+ \[", (run_dir / "log.txt").read_text(encoding="utf-8"))
    return int(bars[-1])


def modules_of(result: RunResult) -> set[str]:
    return {
        key.split("diffusion_model.")[1].rpartition(".lora_")[0] for key in read_tensors(result.lora) if "lora_" in key
    }


def test_a_training_that_is_stopped_and_resumed_ends_with_a_proven_lora(small: Any, tmp_path: Path) -> None:
    told: list[events.Event] = []

    def stop_at_two(event: events.Event) -> None:
        told.append(event)
        if isinstance(event, events.Step) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    run_dir = tmp_path / "run, ünd more"
    with pytest.raises(Interrupted):
        train(small(train={"steps": 30}, save={"every": 2, "keep": 2}), "diffsynth", run_dir, on_event=stop_at_two)
    stopped = max(event.step for event in told if isinstance(event, events.Checkpoint))
    assert 2 <= stopped < 30

    more: list[events.Event] = []
    result = resume(run_dir, more.append)
    assert [event.step for event in more if isinstance(event, events.Resumed)] == [stopped]
    assert any("weights only" in event.message for event in more if isinstance(event, events.Warn))
    assert [event.step for event in more if isinstance(event, events.Step)] == list(range(stopped + 1, 31))
    assert sorted(path.name for path in (run_dir / "backend" / "output").glob("step-*")) == [
        "step-000028.safetensors",
        "step-000030.safetensors",
    ]
    assert len(modules_of(result)) == 3 * 5  # three blocks: qkv, o, w1, w2, w3
    # alpha 8 at rank 4: the scale that DiffSynth's own file does not tell.
    assert {float(value) for key, value in read_tensors(result.lora).items() if key.endswith(".alpha")} == {8.0}
    log = (run_dir / "log.txt").read_text(encoding="utf-8")
    assert "LoRA checkpoint loaded. Total 30 keys" in log
    assert "LoRA key mismatch" not in log
    phases = [event.phase for event in told if isinstance(event, events.PhaseStarted)]
    assert phases == ["cache", "load", "load", "train"]


def test_the_same_seed_gives_the_same_lora_and_steps_are_optimizer_steps(small: Any, tmp_path: Path) -> None:
    told: list[events.Event] = []
    first = train(small(), "diffsynth", tmp_path / "a", on_event=told.append)
    second = train(small(), "diffsynth", tmp_path / "b")
    other = train(small(train={"seed": 1}), "diffsynth", tmp_path / "c")
    assert first.lora.read_bytes() == second.lora.read_bytes() != other.lora.read_bytes()
    steps = [event for event in told if isinstance(event, events.Step)]
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert all(step.loss is not None and step.lr == pytest.approx(1e-3 / 3) for step in steps)
    assert [event.step for event in told if isinstance(event, events.Checkpoint)] == [2, 4]
    bars = re.findall(r"\d+/8 ", (tmp_path / "a" / "log.txt").read_text(encoding="utf-8"))
    assert "8/8 " in bars  # four steps of two images


def test_split_quantised_training_with_every_kind_of_row(small: Any, tmp_path: Path, pictures: Path) -> None:
    regular = {"path": str(pictures), "repeats": 2, "weight": 0.5}
    spec = small(
        dataset={"flip": True, "caption_dropout": 0.5, "trigger_word": "zork", "regularization": regular},
        lora={"rslora": True, "alpha": 2, "targets": ["layers\\.[0-1]{1,2}\\.attention\\.(o|qkv)"]},
        memory={"quantize": "nf4"},
        train={"optimizer": "adamw8bit"},
    )
    result = train(spec, "diffsynth", tmp_path / "run")
    assert modules_of(result) == {f"layers.{n}.attention.{part}" for n in (0, 1) for part in ("qkv", "o")}
    # 2 / √4 is 1, so at rank 4 alpha is 4.
    assert {float(value) for key, value in read_tensors(result.lora).items() if key.endswith(".alpha")} == {4.0}
    # three pictures, mirrored, and three regular ones, never mirrored; each with and without its caption
    backend = tmp_path / "run" / "backend"
    assert len((backend / "dataset" / "encode.jsonl").read_text(encoding="utf-8").splitlines()) == 2 * (6 + 3)
    assert not (backend / "cache").exists()
    assert "bitsandbytes_nf4" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("split", [False, True])
def test_a_checkpoint_stored_in_fp8_trains_as_it_is(small: Any, tmp_path: Path, tiny_fp8: Path, split: bool) -> None:
    spec = small(model={"checkpoint": str(tiny_fp8)}, backend={"options": {"split": split}})
    assert len(modules_of(train(spec, "diffsynth", tmp_path / "run"))) == 3 * 5


@pytest.mark.parametrize(
    ("sections", "kind", "words"),
    [
        ({"backend": {"options": {"arguments": ["--lora_alpha", "8"]}}}, SpecError, "unrecognized arguments"),
        ({"lora": {"targets": ["layers\\.99\\.attention\\.o"]}}, SpecError, "not found"),
        ({"memory": {"offload": "group"}, "backend": {"options": {"split": False}}}, BackendError, "needs a GPU"),
        ({"train": {"learning_rate": 10, "weight_decay": 10, "steps": 400}}, BackendError, "loss became"),
    ],
)
def test_a_failure_of_diffsynth_is_one_clear_error(
    small: Any, tmp_path: Path, sections: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        train(small(**sections), "diffsynth", tmp_path / "run")


@pytest.fixture
def command(small: Any, tmp_path: Path, pictures: Path) -> Callable[..., subprocess.Popen[str]]:
    """command(argument, …): the `loraport` command beside a spec of one picture."""
    for extra in ("1", "2"):
        (pictures / f"{extra}.png").unlink()
        (pictures / f"{extra}.json").unlink()
    spec = small(train={"steps": 400, "gradient_accumulation": 1})
    (tmp_path / "spéc 1.yaml").write_text(spec.to_yaml(), encoding="utf-8")

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "loraport.cli.main", *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_a_diffsynth_that_is_killed_mid_run_is_one_error_and_its_saves_stay(
    command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = command("train", "spéc 1.yaml", "--out", "ein lauf ü")
    saves = tmp_path / "ein lauf ü" / "backend" / "output"
    deadline = time.monotonic() + 120
    while not list(saves.glob("step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (trainer,) = (child for child in psutil.Process(process.pid).children(recursive=True) if entry_is_run_by(child))
    trainer.kill()
    said, told = process.communicate(timeout=60)
    assert process.returncode == 6
    assert told.count("error: ") == 1
    assert "SIGKILL" in told
    assert "Traceback" not in said + told
    assert "loraport resume" in told
    state = json.loads((tmp_path / "ein lauf ü" / "state.json").read_text(encoding="utf-8"))
    assert (state["status"], state["exit_code"]) == ("failed", 6)
    assert (saves / f"step-{state['checkpoint']:06d}.safetensors").is_file()


def entry_is_run_by(process: psutil.Process) -> bool:
    return any(word.endswith("entry.py") for word in process.cmdline())


def test_a_caption_of_more_than_2048_tokens_is_one_error_before_training(
    command: Callable[..., subprocess.Popen[str]], pictures: Path
) -> None:
    long = {"compositional_deconstruction": {"background": "wall " * 2500, "elements": []}}
    (pictures / "0.json").write_text(json.dumps(long))
    process = command("train", "spéc 1.yaml", "--out", "run")
    said, told = process.communicate(timeout=120)
    assert process.returncode == 4
    assert told.count("error: ") == 1
    assert "more than dataset.max_text_tokens (2048)" in told
    assert "Traceback" not in said + told


def test_a_checkouts_own_script_trains_too(small: Any, tmp_path: Path) -> None:
    script = os.environ.get("LORAPORT_DIFFSYNTH_SCRIPT")
    if not script:
        pytest.skip("LORAPORT_DIFFSYNTH_SCRIPT does not name a checkout's examples/ideogram4/model_training/train.py")
    for split in (False, True):
        spec = small(lora={"alpha": 4}, backend={"options": {"script": script, "split": split}})
        result = train(spec, "diffsynth", tmp_path / f"run {split}")
        assert {float(value) for key, value in read_tensors(result.lora).items() if key.endswith(".alpha")} == {4.0}


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", "all"])
def test_it_does_the_same_work_as_the_native_trainer(small: Any, tmp_path: Path, targets: str) -> None:
    result = train(small(lora={"targets": targets}), "diffsynth", tmp_path / "theirs")
    theirs = work_of(result.folder, passes(result.folder))
    assert theirs.images == 4 * 2
    assert theirs == native_work(result.folder, tmp_path / "ours")


def test_several_sets_are_the_same_work_as_the_native_trainers(small: Any, tmp_path: Path, pictures: Path) -> None:
    general = tmp_path / "general"
    general.mkdir()
    for file in sorted(pictures.iterdir())[:2]:
        (general / file.name).write_bytes(file.read_bytes())
    sets = [
        {"path": str(pictures), "weight": 2, "caption_dropout": 0.5, "trigger_word": "zork"},
        {"path": str(general), "weight": 1, "resolution": 96, "regularization": True, "loss_weight": 0.5},
    ]
    result = train(small(dataset={"path": None, "sets": sets}), "diffsynth", tmp_path / "theirs")
    rows = (result.folder / "backend" / "dataset" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    weights = [json.loads(row)["loss_weight"] for row in rows]
    assert len(weights) == 4 * 2
    assert set(weights) == {1.0, 0.5}
    theirs = work_of(result.folder, passes(result.folder))
    assert theirs == native_work(result.folder, tmp_path / "ours")
