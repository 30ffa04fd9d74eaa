"""What the tests of `loraport bench` share: trainers that stand in for real ones, a spec, and a lock of their own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from loraport.plugins import plugins
from loraport.spec.yaml_text import dump_yaml

STAND_INS = Path(__file__).parent.parent / "stand_ins" / "bench_trainers.py"
Bench = Callable[..., tuple[int, str]]


@pytest.fixture
def stand_ins(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in backends, installed for this process and those that it starts."""
    place = tmp_path_factory.mktemp("site")
    shutil.copy(STAND_INS, place)
    info = place / "bench_trainers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench_trainers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[loraport]\nbench_trainers = bench_trainers\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.syspath_prepend(str(place))
    plugins.cache_clear()
    monkeypatch.setattr("loraport_bench.quality.evaluator", lambda: plugins().backend("swift"))
    yield
    plugins.cache_clear()


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPORT_BENCH_LOCK", str(tmp_path / "machine.lock"))


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    """A spec with five images of different shapes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, size in enumerate([(160, 128), (128, 128), (96, 200), (64, 64), (300, 100)]):
        Image.linear_gradient("L").resize(size).convert("RGB").save(folder / f"{number}.jpg")
        (folder / f"{number}.json").write_text(json.dumps({"high_level_description": f"a slope {number}"}))
    content: dict[str, Any] = {
        "name": "demo",
        "model": {"checkpoint": "/models/none"},
        "dataset": {"path": str(folder), "resolution": 64, "trigger_word": "slp"},
        "lora": {"rank": 4, "alpha": 2},
        "train": {"steps": 1000, "max_grad_norm": 1.0},
    }
    path = tmp_path / "spec.yaml"
    path.write_text(dump_yaml(content))
    return path


@pytest.fixture
def bench(spec_file: Path, tmp_path: Path) -> Bench:
    """bench(options…): the exit code of `loraport bench` on the spec in `tmp_path/out`, and what it printed."""
    from loraport.cli.main import build_app

    def run(*options: str) -> tuple[int, str]:
        given = ["bench", str(spec_file), "-o", str(tmp_path / "out"), "--steps", "6", "--warm-up", "2", *options]
        done = CliRunner().invoke(build_app(), given)
        return done.exit_code, done.output + (repr(done.exception) if done.exit_code == 1 else "")

    return run
