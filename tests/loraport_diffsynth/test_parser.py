"""DiffSynth's own parsers read every generated configuration, and what is called exact is found in what they read."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loraport.ideogram4 import IDEOGRAM4
from loraport.planning import Kind, Verdict
from loraport.spec.models import TrainSpec
from loraport_diffsynth import launch
from loraport_diffsynth.capabilities import method_of, verdicts

GOLDEN = Path(__file__).parent / "golden"
JOBS = {path.parent.name: json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*/launch.json"))}

#: Fields that DiffSynth's arguments carry → how they are read from what its parser made of them.
CARRIED: dict[str, Any] = {
    "lora.rank": lambda options: options["lora_rank"],
    "lora.targets": lambda options: options["lora_target_modules"],
    "train.learning_rate": lambda options: options["learning_rate"],
    "train.weight_decay": lambda options: options["weight_decay"],
    "train.gradient_accumulation": lambda options: options["gradient_accumulation_steps"],
    "memory.gradient_checkpointing": lambda options: "full" if options["use_gradient_checkpointing"] else "none",
    "save.every": lambda options: options["save_steps"] // options["gradient_accumulation_steps"],
}


@pytest.fixture(scope="module")
def parsed(diffsynth_python: Path) -> dict[str, list[dict[str, Any]]]:
    """Case → what DiffSynth made of each phase's arguments."""
    phases = [phase for job in JOBS.values() for phase in job["phases"]]
    child = [str(diffsynth_python), str(Path(__file__).with_name("parser_child.py")), str(launch.ENTRY)]
    done = subprocess.run(child, input=json.dumps(phases) + "\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("@found "))
    results = iter(json.loads(line.removeprefix("@found ")))
    return {case: [next(results) for _ in job["phases"]] for case, job in JOBS.items()}


def spec_of(case: str) -> TrainSpec:
    import importlib.util

    found = importlib.util.spec_from_file_location("golden_cases", Path(__file__).with_name("test_golden.py"))
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    resolved: TrainSpec = module.resolved(case)
    return resolved


@pytest.mark.slow
@pytest.mark.parametrize("case", JOBS)
def test_what_is_called_exact_is_found_in_what_diffsynth_read(
    parsed: dict[str, list[dict[str, Any]]], case: str
) -> None:
    spec, training = spec_of(case), parsed[case][-1]
    judged: dict[str, Verdict] = {verdict.path: verdict for verdict in verdicts(spec)}
    for path, read in CARRIED.items():
        verdict = judged[path]
        if verdict.kind is not Kind.EXACT:
            continue
        wanted = verdict.value
        if path == "lora.targets":
            patterns = IDEOGRAM4.target_patterns(spec.lora.targets)
            for module in ("layers.3.attention.o", "layers.3.feed_forward.w1", "final_layer.adaln_modulation"):
                wanted = any(re.fullmatch(pattern, module) for pattern in patterns)
                assert bool(re.fullmatch(read(training["options"]), module)) is wanted
        else:
            assert read(training["options"]) == wanted, path
    if judged["dataset.resolution"].kind is Kind.EXACT:
        assert parsed[case][0]["options"]["max_pixels"] == spec.dataset.resolution**2
    classes = {"adamw": "AdamW", "adamw8bit": "AdamW8bit", "prodigy": "Prodigy"}
    assert training["optimizer"] == classes[spec.train.optimizer]


@pytest.mark.slow
@pytest.mark.parametrize("case", JOBS)
def test_diffsynth_quantises_what_the_spec_says_and_loads_only_what_a_phase_needs(
    parsed: dict[str, list[dict[str, Any]]], case: str
) -> None:
    spec = spec_of(case)
    methods = {
        "transformer": method_of(spec, "transformer"),
        "text_encoder": method_of(spec, "text_encoder"),
        "vae": None,
    }
    *encoding, training = parsed[case]
    assert len(training["models"]) == (1 if encoding else 3)
    for phase in parsed[case]:
        for model in phase["models"]:
            part = next(part for part in methods if f"{part}/" in model["file"])
            assert model["quantized"] == methods[part]
    for phase in encoding:
        assert not any("transformer/" in model["file"] for model in phase["models"])
