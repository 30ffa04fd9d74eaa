"""How SimpleTuner fits a model and runs it fast: what a profile becomes, and what is refused beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraport.planning import Context, Kind
from loraport_simpletuner.capabilities import verdicts
from loraport_simpletuner.translate import translate

BF16 = {"model": {"checkpoint": "/models/bf16"}}
OLD = {"backend": {"options": {"version": "4.8.0"}}}
OFFICIAL_NF4 = {"model": {"checkpoint": "ideogram-ai/ideogram-4-nf4"}}


def written(spec: Any, name: str = "config/config.json") -> dict[str, Any]:
    return json.loads(translate(spec, Context(Path("/runs/a"))).files[f"backend/{name}"])


@pytest.mark.parametrize(
    ("sections", "memory", "keys"),
    [
        ({}, {"quantize": "fp8"}, {"base_model_precision": "no_change", "ideogram_fp8_base_upcast": False}),
        ({}, {"quantize": "none"}, {"base_model_precision": "no_change", "ideogram_fp8_base_upcast": True}),
        ({}, {"storage": "int8", "compute": "int8"}, {"base_model_precision": "int8dq-torchao"}),
        (BF16, {"quantize": "fp8"}, {"base_model_precision": "fp8wo-torchao"}),
        (BF16, {"quantize": "fp8-dynamic"}, {"base_model_precision": "fp8-torchao"}),
        (BF16, {"text_encoder": "int8"}, {"text_encoder_1_precision": "int8-torchao"}),
        (BF16, {"text_encoder": "fp8"}, {"text_encoder_1_precision": "fp8wo-torchao"}),
        ({}, {"text_encoder": "fp8"}, {"text_encoder_1_precision": "no_change"}),
        ({}, {"compile": "full"}, {"dynamo_backend": "inductor", "dynamo_use_regional_compilation": False}),
        ({}, {"compile": "regional"}, {"dynamo_backend": "inductor", "dynamo_use_regional_compilation": True}),
        ({}, {"gradient_checkpointing": "none"}, {"gradient_checkpointing": False}),
        ({}, {"gradient_checkpointing": "selective"}, {"gradient_checkpointing_interval": 2}),
        (OLD, {"offload": "group"}, {"enable_group_offload": True, "gradient_checkpointing_backend": "torch"}),
        (OLD, {"offload": "group+activations"}, {"gradient_checkpointing_backend": "unsloth"}),
        (OLD, {"offload": "disk"}, {"group_offload_to_disk_path": "cache/offload"}),
    ],
)
def test_a_setting_becomes_the_keys_that_do_it(
    make_spec: Any, sections: dict[str, Any], memory: dict[str, str], keys: dict[str, Any]
) -> None:
    found = written(make_spec(**sections, memory=memory))
    assert {key: found.get(key) for key in keys} == keys


@pytest.mark.parametrize(("quantize", "flag"), [("fp8", "0"), ("fp8-dynamic", "1")])
def test_what_the_official_fp8_weights_multiply_in_is_said_and_not_left_to_the_card(
    make_spec: Any, quantize: str, flag: str
) -> None:
    launch = written(make_spec(memory={"quantize": quantize}), "launch.json")
    assert launch["env"]["SIMPLETUNER_IDEOGRAM_FP8_SCALED_MM"] == flag


def test_several_gpus_are_processes_of_accelerate_and_every_image_shape_fills_all_their_batches(make_spec: Any) -> None:
    spec = make_spec(train={"gpus": 2, "batch_size": 3})
    command = written(spec, "launch.json")["arguments"]
    assert command[:3] == ["-m", "accelerate.commands.launch", "--multi_gpu"]
    assert "--num_processes=2" in command
    assert command[-2:] == ["-m", "simpletuner.train"]
    data = json.loads(translate(spec, Context(Path("/runs/a"))).files["backend/config/multidatabackend.json"])
    assert data[0]["repeats"] == 5  # after the first


def test_one_gpu_is_simpletuner_itself(make_spec: Any) -> None:
    assert written(make_spec(), "launch.json")["arguments"] == ["-m", "simpletuner.train"]


#: What goes together with what not: sections of the spec → field that is refused, and words of the reason.
INCOMPATIBLE: dict[str, tuple[dict[str, Any], str, str]] = {
    "nf4 of its own": ({**BF16, "memory": {"quantize": "nf4"}}, "memory.storage", "ideogram-4-nf4"),
    "an nf4 checkpoint as fp8": ({**OFFICIAL_NF4, "memory": {"quantize": "fp8"}}, "memory.storage", "nf4 already"),
    "nf4 computed in fp8": ({"memory": {"storage": "nf4", "compute": "fp8"}}, "memory.compute", "native"),
    "bf16 computed in fp8": ({"memory": {"compute": "fp8"}}, "memory.compute", "only model"),
    "nf4 text encoder": ({**BF16, "memory": {"text_encoder": "nf4"}}, "memory.text_encoder", "fp8 or int8"),
    "group offload since 4.9": ({"memory": {"offload": "group"}}, "memory.offload", "left it in 4.9"),
    "activations since 4.9": ({"memory": {"offload": "group+activations"}}, "memory.offload", "left it in 4.9"),
    "disk since 4.9": ({"memory": {"offload": "disk"}}, "memory.offload", "left it in 4.9"),
    "activations that are not recomputed": (
        {**OLD, "memory": {"offload": "group+activations", "gradient_checkpointing": "none"}},
        "memory.offload",
        "gradient_checkpointing: full",
    ),
    "offload on two GPUs": ({**OLD, "memory": {"offload": "group"}, "train": {"gpus": 2}}, "train.gpus", "one GPU"),
    "nf4-bnb, which does nothing": (
        {"backend": {"options": {"config": {"base_model_precision": "nf4-bnb"}}}},
        "backend.options",
        "quantises nothing",
    ),
    "nf4-bnb for the text encoder": (
        {"backend": {"options": {"config": {"text_encoder_1_precision": "nf4-bnb"}}}},
        "backend.options",
        "quantises nothing",
    ),
    "quanto with group offload": (
        {
            "memory": {"offload": "group"},
            "backend": {"options": {"version": "4.8.0", "config": {"base_model_precision": "int8-quanto"}}},
        },
        "backend.options",
        "quanto's weights cannot be moved",
    ),
    "quanto with group offload by SimpleTuner's own key": (
        {
            "backend": {
                "options": {
                    "version": "4.8.0",
                    "config": {"base_model_precision": "int8-quanto", "enable_group_offload": True},
                }
            }
        },
        "backend.options",
        "with enable_group_offload: quanto's weights cannot be moved",
    ),
    **{
        f"{mode} with PEFT's LoRA": (
            {"backend": {"options": {"config": {"dynamo_mode": mode}}}},
            "backend.options",
            f"{mode} records CUDA graphs",
        )
        for mode in ("reduce-overhead", "max-autotune")
    },
    "block swap": ({"backend": {"options": {"config": {"musubi_blocks_to_swap": 20}}}}, "backend.options", "has none"),
    "RamTorch": ({"backend": {"options": {"config": {"ramtorch": True}}}}, "backend.options", "has none"),
}


@pytest.mark.parametrize(("sections", "path", "says"), INCOMPATIBLE.values(), ids=INCOMPATIBLE)
def test_what_does_not_go_together_is_refused_with_the_reason(
    make_spec: Any, sections: dict[str, Any], path: str, says: str
) -> None:
    spec = make_spec(**sections)
    refused = {verdict.path: verdict.reason for verdict in verdicts(spec) if verdict.kind is Kind.REFUSED}
    assert says in refused[path]
    assert translate(spec, Context(Path("/runs/a"))).files == {}


def test_a_way_of_compiling_that_somebody_added_is_not_taken_for_its_own(make_spec: Any) -> None:
    spec = make_spec()
    spec = spec.model_copy(update={"memory": spec.memory.model_copy(update={"compile": "layers"})})
    refused = {verdict.path: verdict.reason for verdict in verdicts(spec) if verdict.kind is Kind.REFUSED}
    assert "only none, regional, full" in refused["memory.compile"]


def test_lycoris_may_run_under_cuda_graphs(make_spec: Any) -> None:
    spec = make_spec(lora={"type": "lokr"}, backend={"options": {"config": {"dynamo_mode": "reduce-overhead"}}})
    assert not any(verdict.kind is Kind.REFUSED for verdict in verdicts(spec))
