"""Real trainers on a CPU with the tiny checkpoint: the native one and DiffSynth, and all four where they are at hand.

That takes LORAPORT_SIMPLETUNER_PYTHON, LORAPORT_AI_TOOLKIT and LORAPORT_AI_TOOLKIT_PYTHON, as in those backends' own
tests; docs/bench.md has the command.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from diffsynth_at_hand import find_or_install

pytest.importorskip("torch")

from real_bench import CHECKPOINT, STEPS, bench

from loraport_bench.records import Results

TESTS = Path(__file__).parents[1]
VERIFIED = TESTS.parent / "docs" / "backends-verified" / "bench.json"
NEEDED = ("LORAPORT_SIMPLETUNER_PYTHON", "LORAPORT_AI_TOOLKIT", "LORAPORT_AI_TOOLKIT_PYTHON")


def check(results: Results) -> None:
    """Every row came to its end with the same work done, and a score that its training changed."""
    assert results.complete
    for run in results.runs:
        assert run.status == "ok", run.failure
        assert run.work is not None
        assert (run.work.steps, run.work.images) == (STEPS, STEPS)
        assert not run.work.differs, run.work
        assert run.steps is not None
        assert run.steps.seconds.median > 0
        assert {"start", "load_quantise", "cache", "train", "save", "convert"} <= run.phases.keys(), run.phases
        assert run.host_memory is not None
        assert run.host_memory.by_phase["train"] > 100_000_000
        assert run.host_memory.interval_s < 0.1
        assert run.disk is not None
        assert run.disk.cache_bytes > 0
        assert "torch" in run.versions
        assert run.quality is not None, run.notes
        assert run.quality.loss != run.quality.without
        assert [point.step for point in run.quality.curve] == [2, 4], run.notes
        assert run.quality.without == results.runs[0].quality.without  # type: ignore[union-attr]  # one evaluator


@pytest.fixture
def diffsynth(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, str]:
    """An environment in which DiffSynth is found."""
    python = find_or_install(tmp_path_factory, worker_id)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.yaml").write_text(json.dumps({"python": {"diffsynth": str(python)}}))
    return {"LORAPORT_HOME": str(tmp_path / "home")}


@pytest.mark.slow
def test_the_native_trainer_and_diffsynth_do_the_same_work(tmp_path: Path, diffsynth: dict[str, str]) -> None:
    results = bench(tmp_path, ["native", "diffsynth"], diffsynth, "--seeds", "0")
    check(results)
    native, theirs = results.runs
    assert (native.backend, theirs.backend) == ("native", "diffsynth")
    assert native.steps is not None
    assert native.steps.wall_mean == pytest.approx(native.steps.seconds.mean, rel=0.5)
    assert native.quality is not None
    assert native.quality.loss < native.quality.without
    assert "train.warmup_steps" in {each.path for each in results.inequalities["matched/spec"]}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(any(name not in os.environ for name in NEEDED), reason=f"needs {', '.join(NEEDED)}")
def test_all_four_trainers_do_the_same_work(tmp_path: Path, diffsynth: dict[str, str]) -> None:
    environment = dict(diffsynth)
    pythons = json.loads((tmp_path / "home" / "config.yaml").read_text())["python"]
    simpletuner = tmp_path / "simpletuner"
    simpletuner.write_text(
        f"#!/bin/sh\nexport PYTHONPATH='{TESTS / 'loraport_simpletuner' / 'harness'}' TINY_CHECKPOINT="
        f"'{tmp_path / CHECKPOINT}'\nexec '{os.environ['LORAPORT_SIMPLETUNER_PYTHON']}' \"$@\"\n"
    )
    simpletuner.chmod(0o755)
    toolkit = tmp_path / "ai-toolkit"
    toolkit.mkdir()
    for path in Path(os.environ["LORAPORT_AI_TOOLKIT"]).iterdir():
        if path.name != "run.py":
            (toolkit / path.name).symlink_to(path)
    (toolkit / "real_run.py").symlink_to(Path(os.environ["LORAPORT_AI_TOOLKIT"]) / "run.py")
    shutil.copyfile(TESTS / "loraport_ai_toolkit" / "harness" / "run.py", toolkit / "run.py")
    pythons |= {"simpletuner": str(simpletuner), "ai-toolkit": os.environ["LORAPORT_AI_TOOLKIT_PYTHON"]}
    (tmp_path / "home" / "config.yaml").write_text(json.dumps({"python": pythons}))
    tiny_run = TESTS.parent / "adapters" / "loraport_ai_toolkit"
    environment |= {"LORAPORT_AI_TOOLKIT": str(toolkit), "HARNESS_TINY": str(tiny_run)}
    names = ["native", "diffsynth", "simpletuner", "ai-toolkit"]
    on_cpu = ("--for", "ai-toolkit:backend.options.device=cpu")
    results = bench(tmp_path, names, environment, "--seeds", "0", *on_cpu)
    check(results)
    if "LORAPORT_RECORD" in os.environ:
        record(results)


def record(results: Results) -> None:
    """Write down what was run, with which versions, and what came of it. No times: they are a CPU's."""
    rows = {}
    for run in results.runs:
        assert run.work is not None
        assert run.quality is not None
        work = {name: getattr(run.work, name) for name in ("steps", "images", "modules", "parameters")}
        loss = {"without": round(run.quality.without, 4), "with": round(run.quality.loss, 4)}
        rows[run.backend] = {"versions": run.versions, "work": work, "held_out_loss": loss}
    test = "test_all_four_trainers_do_the_same_work"
    told = {"date": f"{results.created:%Y-%m-%d}", "device": "cpu", "test": test, "outcome": "passed", "rows": rows}
    VERIFIED.write_text(json.dumps(told, indent=2) + "\n")
