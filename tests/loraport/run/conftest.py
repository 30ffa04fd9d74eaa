"""Runs with a fake trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_datasets import write_pair

import loraport.plugins
from loraport.planning import Plan, make_plan
from loraport.run.folder import RunFolder
from loraport.spec.models import TrainSpec

sys.path.insert(0, str(Path(__file__).parent))

from run_fakes import FakeBackend, FakePlugin, fake_plugins, write_lora

MakeSpec = Callable[..., TrainSpec]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakePlugin:
    """The only plugin there is."""
    plugin = FakePlugin(FakeBackend(), [])
    found = fake_plugins(plugin)
    monkeypatch.setattr(loraport.plugins, "plugins", lambda: found)
    return plugin


@pytest.fixture
def make_spec(tmp_path: Path) -> MakeSpec:
    """A spec for the fake backend: `make_spec("crash", steps=4, seconds=0.1)`."""
    lora = tmp_path / "lora-to-train.safetensors"
    write_lora(lora)
    write_pair(tmp_path / "photos", "a.png")

    def make(mode: str = "train", steps: int = 4, seconds: float = 0.0, **options: Any) -> TrainSpec:
        return TrainSpec.model_validate(
            {
                "name": "demo",
                "model": {"checkpoint": "tiny"},
                "dataset": {"path": str(tmp_path / "photos"), "trigger_word": "demoword"},
                "train": {"steps": steps},
                "memory": {"quantize": "none", "offload": "none", "compile": "none", "gradient_checkpointing": True},
                "backend": {
                    "name": "fake",
                    "options": {"mode": mode, "seconds": seconds, "lora": str(lora), **options},
                },
            }
        )

    return make


@pytest.fixture
def make_plan_for(make_spec: MakeSpec, tmp_path: Path) -> Callable[..., Plan]:
    """A plan in `tmp_path/run`, from the arguments of `make_spec`."""
    return lambda *args, **options: make_plan(make_spec(*args, **options), FakeBackend(), tmp_path / "run")


@pytest.fixture
def new_run(make_plan_for: Callable[..., Plan]) -> Iterator[Callable[..., tuple[Plan, RunFolder]]]:
    """A plan and its new, locked folder."""
    opened: list[RunFolder] = []

    def make(*args: Any, **options: Any) -> tuple[Plan, RunFolder]:
        plan = make_plan_for(*args, **options)
        folder = RunFolder.create(plan.run_dir, plan)
        opened.append(folder)
        return plan, folder

    yield make
    for folder in opened:
        folder.release()


@pytest.fixture
def survivors(tmp_path: Path) -> Callable[[], list[str]]:
    """The processes that still work for a run under `tmp_path`, by command line."""

    def find() -> list[str]:
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = " ".join(process.info["cmdline"] or [])
            if str(tmp_path) in line and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(line)
        return found

    return find
