"""Spec → arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from loraport.ideogram4 import IDEOGRAM4
from loraport.planning import Context
from loraport.spec.models import TrainSpec
from loraport_diffsynth.arguments import parse
from loraport_diffsynth.translate import JOB, job, phases, target_expression, translate

MakeSpec = Callable[..., TrainSpec]


def test_translating_twice_gives_the_same_and_no_path_of_the_machine_is_in_the_arguments(make_spec: MakeSpec) -> None:
    spec, context = make_spec(), Context(run_dir=Path("/runs/a, b;c:d"))
    assert translate(spec, context) == translate(spec, context)
    for phase in phases(spec):
        assert not [argument for argument in phase["arguments"] if "/runs" in argument or "/models" in argument]


def test_a_refused_spec_gets_no_files(make_spec: MakeSpec) -> None:
    made = translate(make_spec(lora={"type": "loha", "targets": "no such preset"}), Context(run_dir=Path("/runs/a")))
    assert made.files == {}


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", "all"])
def test_the_targets_are_the_presets_modules_and_not_the_final_layers(make_spec: MakeSpec, targets: str) -> None:
    expression = target_expression(make_spec(lora={"targets": targets}))
    modules = [
        "layers.0.attention.qkv",
        "layers.33.attention.o",
        "layers.7.feed_forward.w2",
        "layers.7.adaln_modulation",
        "final_layer.adaln_modulation",
        "layers.0.attention.norm_q",
    ]
    patterns = IDEOGRAM4.targets[targets]
    for module in modules:
        wanted = any(re.fullmatch(pattern, module) for pattern in patterns)
        assert bool(re.fullmatch(expression, module)) is wanted, module


TRANSFORMER = "checkpoint/transformer/diffusion_pytorch_model.safetensors"


def test_saving_memory_splits_encoding_from_training(make_spec: MakeSpec) -> None:
    encode, train = phases(make_spec(memory={"quantize": "nf4", "text_encoder": "int8"}))
    first, second = parse(encode["arguments"]), parse(train["arguments"])
    assert TRANSFORMER not in json.loads(str(first["model_paths"]))
    assert json.loads(str(second["model_paths"])) == [TRANSFORMER]
    assert second["quant_options"] == f"{TRANSFORMER}:bitsandbytes_nf4"
    assert first["quant_options"] == "checkpoint/text_encoder/model.safetensors:torchao_int8_w8a16"
    assert second["dataset_base_path"] == "order"
    assert "dataset_metadata_path" not in second
    assert first["use_gradient_checkpointing"] is True


def test_products_in_eight_bits_are_asked_of_the_transformer_alone(make_spec: MakeSpec) -> None:
    encode, train = phases(make_spec(memory={"quantize": "fp8-dynamic", "text_encoder": "fp8"}))
    first, second = parse(encode["arguments"]), parse(train["arguments"])
    assert str(first["quant_options"]).endswith(":torchao_fp8_w8a16")
    assert second["quant_options"] == f"{TRANSFORMER}:comfy_kitchen_fp8_w8a8"


def test_offloaded_activations_are_layers_and_checkpoints_in_host_memory(make_spec: MakeSpec) -> None:
    options = parse(phases(make_spec(memory={"offload": "group+activations"}))[-1]["arguments"])
    assert options["enable_model_cpu_offload"] is options["use_gradient_checkpointing_offload"] is True


def test_a_checkouts_script_needs_the_transformer_for_encoding_but_on_disk(make_spec: MakeSpec) -> None:
    options = {"script": "/checkout/train.py", "split": True}
    encode = parse(phases(make_spec(backend={"options": options}))[0]["arguments"])
    assert TRANSFORMER in json.loads(str(encode["model_paths"]))
    assert encode["offload_models"] == TRANSFORMER


def test_the_option_decides_over_the_profile(make_spec: MakeSpec) -> None:
    assert len(phases(make_spec(memory={"quantize": "nf4"}, backend={"options": {"split": False}}))) == 1
    assert len(phases(make_spec(backend={"options": {"split": True}}))) == 2


def test_saves_and_rows_count_images_while_the_spec_counts_steps(make_spec: MakeSpec) -> None:
    spec = make_spec(train={"steps": 10, "batch_size": 2, "gradient_accumulation": 3}, save={"every": 5})
    options = parse(phases(spec)[0]["arguments"])
    assert (options["gradient_accumulation_steps"], options["save_steps"]) == ("6", "30")
    only_last = make_spec(train={"steps": 10}, save={"every": 0})
    assert parse(phases(only_last)[0]["arguments"])["save_steps"] == "10"


def test_a_hub_checkpoint_is_downloaded_and_a_folder_is_never(make_spec: MakeSpec) -> None:
    hub = job(make_spec(model={"checkpoint": "org/name"}))
    options = parse(hub["phases"][0]["arguments"])
    assert str(options["model_id_with_origin_paths"]).startswith("org/name:transformer/")
    assert options["tokenizer_path"] == "org/name:tokenizer/"
    assert hub["environment"]["DIFFSYNTH_DOWNLOAD_SOURCE"] == "huggingface"
    local = job(make_spec())["environment"]
    assert (local["DIFFSYNTH_SKIP_DOWNLOAD"], local["HF_HUB_OFFLINE"]) == ("True", "1")


def test_a_weight_travels_with_its_row(make_spec: MakeSpec) -> None:
    regular = {"regularization": {"path": "/data/cars", "weight": 0.5}}
    assert parse(phases(make_spec(dataset=regular))[0]["arguments"])["extra_inputs"] == "loss_weight"


def test_the_users_own_arguments_win(make_spec: MakeSpec) -> None:
    spec = make_spec(backend={"options": {"arguments": ["--learning_rate", "0.5"]}})
    assert parse(phases(spec)[0]["arguments"])["learning_rate"] == "0.5"
    content = json.loads(translate(spec, Context(run_dir=Path("/runs/a"))).files[JOB])
    assert content["spec"]["backend"]["options"] == {"arguments": ["--learning_rate", "0.5"]}
