from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from ai_toolkit_specs import GOLDEN, spec

from loraport.planning import Context, make_plan
from loraport_ai_toolkit import layout
from loraport_ai_toolkit.plugin import AiToolkit
from loraport_ai_toolkit.translate import NO_CLIPPING, config, translate

FOLDER = Path(__file__).parent / "golden"


def made(case: str) -> dict[str, str]:
    context = Context(run_dir=Path("/runs/one"), resume=case == "resume")
    return translate(GOLDEN[case], context).files


@pytest.mark.parametrize("case", GOLDEN)
def test_the_generated_files_are_exactly_the_golden_ones(case: str) -> None:
    files = made(case)
    folder = FOLDER / case
    if os.environ.get("LORAPORT_WRITE_GOLDEN"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / Path(name).name).write_text(text, encoding="utf-8")
    assert {Path(name).name: text for name, text in files.items()} == {
        path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()
    }


@pytest.mark.parametrize("case", GOLDEN)
def test_an_ordinary_yaml_reader_sees_the_same_numbers(case: str) -> None:
    text = made(case)[layout.CONFIG]

    assert yaml.safe_load(text) == config(GOLDEN[case])


@pytest.mark.parametrize("case", GOLDEN)
def test_every_field_gets_a_verdict_and_nothing_is_refused(case: str) -> None:
    plan = make_plan(GOLDEN[case], AiToolkit(), Path("/runs/one"))

    assert plan.refused() == []


def test_the_trigger_word_is_not_given_to_ai_toolkit() -> None:
    made_for = config(spec(dataset={"trigger_word": "zork"}))

    assert "zork" not in json.dumps(made_for["config"])


def test_clipping_turned_off_is_a_norm_no_gradient_reaches() -> None:
    assert config(spec(train={"max_grad_norm": 0}))["config"]["process"][0]["train"]["max_grad_norm"] == NO_CLIPPING


def test_summed_gradients_are_clipped_at_a_norm_that_many_times_as_large() -> None:
    process = config(spec(train={"max_grad_norm": 0.5, "gradient_accumulation": 4}))["config"]["process"][0]

    assert process["train"]["max_grad_norm"] == 2.0


@pytest.mark.parametrize("name", ["c", "config", "opt", "samples", "loss_log"])
def test_a_name_that_ai_toolkit_would_mistake_for_its_own_files_is_lengthened(name: str) -> None:
    assert config(spec(name=name))["config"]["name"] == f"lora-{name}"


def test_a_linear_rate_falls_to_zero_and_does_not_rise_from_a_third() -> None:
    train = config(spec(train={"lr_scheduler": "linear"}))["config"]["process"][0]["train"]

    assert train["lr_scheduler_params"] == {"start_factor": 1.0, "end_factor": 0.0}


def test_patterns_become_whole_names_none_of_which_is_part_of_another() -> None:
    network = config(spec(lora={"targets": [r"layers\.1\.attention\.o"]}))["config"]["process"][0]["network"]
    only = network["network_kwargs"]["only_if_contains"]

    assert only == ["layers.1.attention.o"]
    assert not any(part in "transformer.layers.11.attention.o" for part in only)
