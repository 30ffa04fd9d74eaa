"""What goes wrong with another trainer, through the whole command: one clear error, its exit code, nothing lost.

Stand-ins take the trainers' places in an interpreter of their own; DiffSynth itself is in tests/loraport_diffsynth.
Every path here has spaces and letters beyond ASCII in it, and the data set is one image.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loraport.lora.storage import write_tensors
from loraport.run.record import read_events

BACKENDS = ("simpletuner", "diffsynth", "ai-toolkit")
STAND_INS = Path(__file__).parent / "stand_ins"
#: backend → its distribution, a version that the adapter is for, and one that it is not for.
PACKAGES = {
    "simpletuner": ("simpletuner", "4.10.1", "3.1.6"),
    "diffsynth": ("diffsynth", "2.1.12", "1.1.9"),
    "ai-toolkit": ("optimum-quanto", "0.2.4", "0.1.0"),
}
CAPTION = '{"compositional_deconstruction":{"background":"a wäll","elements":[]}}'
#: The `loraport` command with a watchdog that does not wait for half an hour.
IMPATIENT = (
    "import loraport.run.supervisor as s; s.SILENCE = 1.5; s.GRACE = 1.0; from loraport.cli.main import main; main()"
)


def interpreter(folder: Path, versions: dict[str, str]) -> Path:
    """An interpreter in which these distributions seem to be installed, with the stand-ins as their code."""
    venv.EnvBuilder(symlinks=True).create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    for name, version in versions.items():
        metadata = site / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (site / "simpletuner").mkdir()
    shutil.copyfile(STAND_INS / "simpletuner.py", site / "simpletuner" / "train.py")
    shutil.copyfile(STAND_INS / "torchvision.py", site / "torchvision.py")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def pythons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Interpreters: "right" and "old" by the versions that they have, "empty" without any."""
    root = tmp_path_factory.mktemp("umgebung – ü")
    return {
        "right": interpreter(root / "right", {name: right for name, right, _ in PACKAGES.values()}),
        "old": interpreter(root / "old", {name: old for name, _, old in PACKAGES.values()}),
        "empty": interpreter(root / "empty", {}),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a checkpoint as far as they are looked at before a trainer starts."""
    folder = tmp_path_factory.mktemp("modell ü") / "ideogram 4"
    weights = "diffusion_pytorch_model.safetensors"
    for name in (f"transformer/{weights}", f"vae/{weights}", "text_encoder/model.safetensors"):
        (folder / name).parent.mkdir(parents=True)
        write_tensors(folder / name, {"layers.0.attention.qkv.weight": np.zeros(1, np.float32)}, {})
    (folder / "tokenizer").mkdir()
    for name in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        (folder / name).write_text("{}")
    return folder


class Project:
    """A spec, its image, and the `loraport` command in their folder."""

    def __init__(self, root: Path, python: Path, checkpoint: Path):
        self.root = root / "prøject – ü"
        self.images, self.out = self.root / "bilder ü", self.root / "ein lauf – 1"
        self.images.mkdir(parents=True)
        Image.effect_noise((96, 80), 40).convert("RGB").save(self.images / "é 1.png")
        (self.images / "é 1.json").write_text(CAPTION, encoding="utf-8")
        content = {
            "name": "bäd",
            "model": {"checkpoint": str(checkpoint)},
            "dataset": {"path": "bilder ü", "resolution": 64},
            "lora": {"rank": 2},
            "train": {"steps": 5, "optimizer": "adamw"},
            "save": {"every": 2},
            "backend": {"python": str(python)},
        }
        (self.root / "spéc 1.yaml").write_text(json.dumps(content), encoding="utf-8")
        self.checkout = self.root / "ai toolkit ü"
        (self.checkout / "toolkit").mkdir(parents=True)
        (self.checkout / "extensions_built_in" / "diffusion_models" / "ideogram4").mkdir(parents=True)
        (self.checkout / "version.py").write_text('VERSION = "0.12.26"\n')
        rules = "def digest_caption_string(text):\n    return text\n"
        (self.checkout / "toolkit" / "ideogram_caption.py").write_text(rules)
        shutil.copyfile(STAND_INS / "ai_toolkit.py", self.checkout / "run.py")

    def start(self, *arguments: str, mode: str = "good", code: str | None = None) -> subprocess.Popen[str]:
        command = ["-c", code] if code else ["-m", "loraport.cli.main"]
        return subprocess.Popen(
            [sys.executable, *command, *arguments],
            cwd=self.root,
            env={
                **os.environ,
                "STAND_IN": mode,
                "LORAPORT_HOME": str(self.root / "hjem ø"),
                "LORAPORT_CACHE": str(self.root / "cache ü"),
                "LORAPORT_AI_TOOLKIT": str(self.checkout),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests that run in the background of a shell have it ignored, and the run would honour that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def train(self, backend: str, *more: str) -> list[str]:
        return ["train", "spéc 1.yaml", "--backend", backend, "--out", self.out.name, *more]

    def state(self) -> dict[str, object]:
        return dict(json.loads((self.out / "state.json").read_text(encoding="utf-8")))

    def check_untouched(self) -> None:
        """The user's own folder holds what it held."""
        assert sorted(path.name for path in self.images.iterdir()) == ["é 1.json", "é 1.png"]
        assert (self.images / "é 1.json").read_text(encoding="utf-8") == CAPTION


@pytest.fixture
def project(tmp_path: Path, pythons: dict[str, Path], checkpoint: Path) -> Project:
    return Project(tmp_path, pythons["right"], checkpoint)


def one_error(process: subprocess.Popen[str], exit_code: int, *words: str) -> None:
    said, told = process.communicate(timeout=60)
    assert process.returncode == exit_code, said[-2000:] + told
    assert told.count("error: ") == 1
    assert "Traceback" not in said + told
    for word in words:
        assert word in told


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_is_not_installed_says_how_to_install_it(
    project: Project, pythons: dict[str, Path], backend: str
) -> None:
    python = f"backend.python={pythons['empty']}"
    install = f"loraport backends install {backend}"
    one_error(project.start(*project.train(backend, "--set", python)), 5, "is not installed", install)
    assert not project.out.exists()


def test_a_trainer_that_is_a_checkout_and_is_not_there_says_how_to_get_it(project: Project) -> None:
    shutil.rmtree(project.checkout)
    one_error(project.start(*project.train("ai-toolkit")), 5, "loraport backends install ai-toolkit")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unsupported_version_is_named_beside_what_the_adapter_is_for(
    project: Project, pythons: dict[str, Path], backend: str
) -> None:
    python = f"backend.python={pythons['old']}"
    one_error(project.start(*project.train(backend, "--set", python)), 5, PACKAGES[backend][2], "the adapter is for >=")
    assert not project.out.exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trainer_that_crashes_at_its_start_is_one_error_and_the_log_has_all_of_it(
    project: Project, backend: str
) -> None:
    one_error(project.start(*project.train(backend), mode="crash"), 5, "SystemError: the card is on fire", "log.txt")
    state = project.state()
    assert (state["status"], state["exit_code"]) == ("failed", 5)
    assert "Traceback" in (project.out / "log.txt").read_text(encoding="utf-8")
    project.check_untouched()


@pytest.mark.parametrize("backend", ["simpletuner", "ai-toolkit"])
def test_a_crash_mid_run_keeps_the_checkpoint_and_the_run_ends_well_when_it_is_resumed(
    project: Project, backend: str
) -> None:
    one_error(project.start(*project.train(backend), mode="crash-later"), 5, "the card is on fire")
    kept = project.state()["checkpoint"]
    assert kept in (2, 3)
    resumed = project.start("resume", project.out.name)
    said, told = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, said + told
    events = read_events(project.out / "events.jsonl")
    assert [event.step for event in events if event.type == "resumed"][:1] == [kept]
    assert json.loads((project.out / "proof.json").read_text(encoding="utf-8"))["ok"]
    assert (project.out / "bäd.safetensors").is_file()
    project.check_untouched()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trainer_that_hangs_without_output_is_ended_by_the_watchdog(project: Project, backend: str) -> None:
    process = project.start(*project.train(backend), mode="hang", code=IMPATIENT)
    one_error(process, 5, "printed nothing for", "loraport resume")
    assert project.state()["status"] == "failed"
    trainer = Path("/proc") / (project.out / "backend" / "pid").read_text()
    assert not trainer.exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_field_ends_it_before_anything_is_written(project: Project, backend: str) -> None:
    refused = project.train(backend, "--strict", "--set", "lora.dora=true")
    one_error(project.start(*refused), 3, "lora.dora", "set it to false")
    assert not project.out.exists()


def test_a_folder_in_which_one_backend_trains_is_not_given_to_another(project: Project) -> None:
    first = project.start(*project.train("simpletuner"), mode="hang")
    deadline = time.monotonic() + 30
    while not (project.out / "backend" / "pid").exists():
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    plan = (project.out / "plan.json").read_bytes()
    for backend in ("diffsynth", "ai-toolkit"):
        one_error(project.start(*project.train(backend)), 7, project.out.name)
    assert (project.out / "plan.json").read_bytes() == plan
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    one_error(first, 130, "loraport resume")


@pytest.mark.parametrize(
    ("backend", "option"),
    [
        ("simpletuner", 'config: {output_dir: "/somewhere"}'),
        ("diffsynth", 'arguments: ["--output_path", "/somewhere"]'),
    ],
)
def test_an_option_that_leads_into_another_folder_is_refused(project: Project, backend: str, option: str) -> None:
    arguments = project.train(backend, "--set", f"backend.options={{{option}}}")
    one_error(project.start(*arguments), 3, "backend.options", "output")
    assert not project.out.exists()
