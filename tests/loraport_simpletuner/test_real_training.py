"""The real SimpleTuner trains the tiny checkpoint on the CPU through `loraport train`; stopped, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from equal_work import native_work, work_of
from PIL import Image

from loraport.lora.storage import read_tensors
from loraport.run.record import read_events

PYTHON = os.environ.get("LORAPORT_SIMPLETUNER_PYTHON")
HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="set LORAPORT_SIMPLETUNER_PYTHON to SimpleTuner's interpreter"),
    pytest.mark.timeout(600),
]
PATIENCE = 240.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from loraport_native.tiny import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny model ü") / "official", "official")


class Lab:
    """Runs the `loraport` command with an interpreter that makes SimpleTuner take the tiny checkpoint."""

    def __init__(self, folder: Path, images: Path, tiny: Path):
        self.folder = folder
        self.images, self.tiny = images, tiny
        self.run = folder / "rün 1"
        wrapper = folder / "python"
        wrapper.write_text(
            f"#!/bin/sh\nexport PYTHONPATH='{HERE / 'harness'}' TINY_CHECKPOINT='{tiny}'\nexec '{PYTHON}' \"$@\"\n"
        )
        wrapper.chmod(0o755)
        (folder / "home").mkdir()
        (folder / "home" / "config.yaml").write_text(json.dumps({"python": {"simpletuner": str(wrapper)}}))
        self.environment = os.environ | {
            "LORAPORT_HOME": str(folder / "home"),
            "LORAPORT_CACHE": str(folder / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            # A stray shell must not leak in.
            "ENV": "nonsense",
            "CONFIG_PATH": "/nowhere",
            "ACCELERATE_MIXED_PRECISION": "fp16",
        }

    def spec(self, **sections: Any) -> Path:
        content: dict[str, Any] = {
            "name": "real",
            "model": {"checkpoint": str(self.tiny), "dtype": "fp32"},
            "dataset": {"path": str(self.images), "resolution": 128, "trigger_word": "zk", "upscale": True},
            "lora": {"rank": 4, "alpha": 8},
            "train": {"steps": 4, "optimizer": "adamw", "learning_rate": 1e-3},
            "save": {"every": 2, "dtype": "fp32"},
            "memory": {"gradient_checkpointing": False},
        }
        for name, values in sections.items():
            content[name] = {**content.get(name, {}), **values}
        path = self.folder / "spec.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        return path

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "loraport.cli.main", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
        )

    def loraport(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        said, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, said

    def train(self, spec: Path, *arguments: str) -> tuple[int, str]:
        return self.loraport("train", str(spec), "--backend", "simpletuner", "--out", str(self.run), *arguments)

    def events(self, kind: str) -> list[Any]:
        return [event for event in read_events(self.run / "events.jsonl") if event.type == kind]

    def await_step(self, process: subprocess.Popen[str], step: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and process.poll() is None:
            if (self.run / "events.jsonl").is_file() and any(each.step >= step for each in self.events("step")):
                return
            time.sleep(0.05)
        raise AssertionError(f"step {step} was not reached: {(self.run / 'log.txt').read_text()[-3000:]}")

    def check_result(self, alpha: float, modules: int) -> None:
        tensors = read_tensors(self.run / "real.safetensors")
        alphas = [float(tensors[name]) for name in tensors if name.endswith(".alpha")]
        assert alphas == [alpha] * modules
        proof = json.loads((self.run / "proof.json").read_text())
        assert proof["ok"]
        assert len(proof["modules"]) == modules
        assert all(np.any(tensors[name]) for name in tensors if ".lora_" in name)


@pytest.fixture
def lab(tmp_path: Path, photos: Path, tiny: Path) -> Lab:
    return Lab(tmp_path, photos, tiny)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    left = subprocess.run(["pgrep", "-f", "simpletuner.train"], capture_output=True, text=True).stdout.split()
    assert left == []


def test_a_training_runs_to_the_proven_file_with_every_field_exact(lab: Lab) -> None:
    before = {path: path.stat().st_mtime_ns for path in lab.images.iterdir()}
    code, said = lab.train(lab.spec(train={"lr_scheduler": "cosine"}), "--strict")
    assert code == 0, said
    lab.check_result(alpha=8.0, modules=15)
    steps = lab.events("step")
    assert [event.step for event in steps] == [1, 2, 3, 4]
    # The rate after each step of half a wave from 1e-3 to 0.
    assert [event.lr for event in steps] == pytest.approx([8.536e-4, 5e-4, 1.464e-4, 0.0], abs=1e-6)
    assert [event.step for event in lab.events("checkpoint")] == [2, 4]
    assert {event.phase for event in lab.events("phase")} >= {"cache", "train", "convert"}
    captions = [path.read_text() for path in (lab.run / "backend" / "dataset" / "images").glob("*.txt")]
    assert len(captions) == 3
    assert all(caption.startswith('{"high_level_description":"zk"') and "\n" not in caption for caption in captions)
    assert {path: path.stat().st_mtime_ns for path in lab.images.iterdir()} == before


def test_ctrl_c_keeps_a_checkpoint_of_the_last_step_and_resume_goes_on_from_it(lab: Lab) -> None:
    process = lab.start(
        "train",
        str(lab.spec(train={"steps": 60}, save={"every": 0})),
        "--backend",
        "simpletuner",
        "--out",
        str(lab.run),
    )
    lab.await_step(process, 3)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    kept = [event.step for event in lab.events("checkpoint")]
    assert len(kept) == 1
    assert kept[0] >= 3
    code, said = lab.loraport("resume", str(lab.run))
    assert code == 0, said
    assert [event.step for event in lab.events("resumed")] == kept
    resumed = [event.step for event in lab.events("step")]
    assert resumed[-1] == 60
    assert kept[0] + 1 in resumed
    lab.check_result(alpha=8.0, modules=15)


def test_a_killed_run_leaves_nothing_running_and_resumes_from_its_checkpoint(lab: Lab) -> None:
    process = lab.start(
        "train",
        str(lab.spec(train={"steps": 40}, save={"every": 5})),
        "--backend",
        "simpletuner",
        "--out",
        str(lab.run),
    )
    lab.await_step(process, 7)
    process.kill()
    process.communicate(timeout=PATIENCE)
    deadline = time.monotonic() + 30
    while subprocess.run(["pgrep", "-f", "simpletuner.train"], capture_output=True).stdout:
        assert time.monotonic() < deadline, "SimpleTuner outlived its supervisor"
        time.sleep(0.1)
    code, said = lab.loraport("resume", str(lab.run))
    assert code == 0, said
    assert lab.events("resumed")[0].step >= 5
    assert lab.events("step")[-1].step == 40
    lab.check_result(alpha=8.0, modules=15)


def test_a_lokr_of_every_module_comes_out_proven(lab: Lab) -> None:
    code, said = lab.train(
        lab.spec(
            lora={"type": "lokr", "rank": 2, "alpha": 1, "factor": 8, "targets": "all"},
            train={"steps": 2, "batch_size": 2, "optimizer": "adamw8bit"},
            model={"dtype": "bf16"},
            dataset={"flip": True, "caption_dropout": 0.5},
        )
    )
    assert code == 0, said
    proof = json.loads((lab.run / "proof.json").read_text())
    assert proof["ok"]
    assert len(proof["modules"]) == 18
    assert {module["kind"] for module in proof["modules"]} == {"lokr"}


def test_a_checkpoint_of_the_wrong_layout_is_one_clear_error(lab: Lab, tmp_path: Path) -> None:
    from loraport_native.tiny import write_tiny

    split = write_tiny(tmp_path / "split", "diffusers")
    code, said = lab.train(lab.spec(model={"checkpoint": str(split)}))
    assert code == 4, said
    assert "official layout" in said
    assert "Traceback" not in said


def test_an_argument_it_does_not_know_is_one_clear_error(lab: Lab) -> None:
    code, said = lab.train(lab.spec(backend={"options": {"config": {"no_such_argument": 1}}}))
    assert code == 5, said
    assert "no_such_argument" in said
    assert "does not take an argument" in said
    assert "Traceback" not in said


def test_a_loss_that_is_not_a_number_is_one_clear_error(lab: Lab) -> None:
    code, said = lab.train(lab.spec(train={"learning_rate": 10, "steps": 60, "max_grad_norm": 0, "weight_decay": 10}))
    assert code == 5, said
    assert "not a number" in said
    assert not (lab.run / "real.safetensors").exists()


def test_it_does_the_same_work_as_the_native_trainer(lab: Lab, tmp_path: Path) -> None:
    code, said = lab.train(lab.spec(train={"gradient_accumulation": 2}))
    assert code == 0, said
    # It writes the noise level of each image that its model was given.
    drawn = (lab.run / "backend" / "output" / "timestep_distribution.jsonl").read_text().splitlines()
    theirs = work_of(lab.run, sum(len(json.loads(line)["timesteps"]) for line in drawn))
    assert theirs.images == 4 * 2
    assert theirs == native_work(lab.run, tmp_path / "ours")


def test_samples_are_drawn_and_the_held_out_loss_is_measured(lab: Lab) -> None:
    drawn = {"every": 2, "prompts": ["--seed eine Gräte"], "steps": 2, "guidance": 3, "width": 96, "height": 128}
    code, said = lab.train(lab.spec(sample=drawn, validation={"every": 2, "images": 1}))
    assert code == 0, said
    assert [event.step for event in lab.events("sample")] == [2, 4]
    for event in lab.events("sample"):
        with Image.open(lab.run / event.path) as image:
            assert image.width == 96
            assert image.height >= 128
            assert image.convert("L").crop((0, image.height - 128, 96, image.height)).getextrema()[1] > 0
    assert [event.step for event in lab.events("validation")] == [2, 4]
    held_out = [event.loss for event in lab.events("validation")]
    assert held_out[1] < held_out[0]
    losses = [event.loss for event in lab.events("step")]
    lab.run = lab.folder / "without samples"
    code, said = lab.train(lab.spec(validation={"every": 2, "images": 1}))
    assert code == 0, said
    # Drawing takes random numbers, which the steps after it would have had.
    assert [event.loss for event in lab.events("step")][:2] == losses[:2]
    assert [event.step for event in lab.events("validation")] == [2, 4]
    assert lab.events("validation")[0].loss == held_out[0]
    assert lab.events("sample") == []


def test_one_image_is_enough_and_a_caption_that_is_too_long_is_one_clear_error(lab: Lab) -> None:
    for extra in ("1 é", "2 é"):
        (lab.images / f"{extra}.png").unlink()
        (lab.images / f"{extra}.json").unlink()
    code, said = lab.train(lab.spec(train={"steps": 2, "batch_size": 2, "gradient_accumulation": 2}))
    assert code == 0, said
    lab.run = lab.folder / "too long"
    long = {"compositional_deconstruction": {"background": "wall " * 2500, "elements": []}}
    (lab.images / "0 é.json").write_text(json.dumps(long))
    code, said = lab.train(lab.spec())
    assert code == 4, said
    assert "too long" in said
    assert "Traceback" not in said
