"""DiffSynth configurations → specs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraport.errors import SpecError
from loraport.ideogram4 import IDEOGRAM4
from loraport.planning import Kind
from loraport.plugins import plugins
from loraport.profiles import resolve_memory
from loraport.spec.models import TrainSpec, value_at
from loraport_diffsynth.arguments import parse
from loraport_diffsynth.capabilities import OPTIMIZERS, verdicts
from loraport_diffsynth.importer import from_job, import_config, targets_of
from loraport_diffsynth.translate import job, phases

MODELS = ",".join(
    f"org/m:{part}"
    for part in (
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    )
)
SCRIPT = r"""
# a comment with an apostrophe: don't
modelscope download --dataset some/data --local_dir ./data
BASE="./data/my images"
accelerate launch --config_file x.yaml examples/ideogram4/model_training/train.py \
    --learning_rate 5e-5 \
    --num_epochs 5 \
    --lora_rank 32 --use_gradient_checkpointing --find_unused_parameters \
    --dataset_base_path "$BASE" \
    --dataset_metadata_path "metadata.jsonl" \
    --model_id_with_origin_paths "MODELS" \
    --lora_base_model "dit" --remove_prefix_in_ckpt "pipe.dit." \
    --max_pixels 1048576 --dataset_repeat 10 --gradient_accumulation_steps 2 \
    --output_path "./models/train/My LoRA" --fp8_models "org/m:text_encoder/model.safetensors" \
    --lora_target_modules "attention.qkv,attention.o,feed_forward.w1,feed_forward.w2,feed_forward.w3,adaln_modulation" \
    --data_file_keys "image" --enable_wandb_log
""".replace("MODELS", MODELS)


def written(tmp_path: Path, content: str, name: str = "train.sh") -> Path:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def test_a_shell_script_becomes_a_spec_and_says_what_is_lost(tmp_path: Path) -> None:
    written(tmp_path, '{"image":"a.png","prompt":"a"}\n{"image":"b.png","prompt":"b"}\n', "metadata.jsonl")
    found = import_config(written(tmp_path, SCRIPT))
    spec = resolve_memory(TrainSpec.model_validate(found.content), plugins().profiles())
    assert (spec.name, spec.model.checkpoint) == ("My-LoRA", "org/m")
    assert spec.dataset.path == Path("data/my images")
    assert (spec.dataset.repeats, spec.dataset.resolution) == (10, 1024)
    assert (spec.lora.rank, spec.lora.alpha, spec.lora.targets) == (32, None, "all")
    assert (spec.train.steps, spec.train.gradient_accumulation, spec.train.learning_rate) == (50, 2, 5e-5)
    assert (spec.train.optimizer, spec.train.max_grad_norm) == ("adamw", 0)
    assert (spec.memory.quantize, spec.memory.gradient_checkpointing) == ("none", "full")
    told = "\n".join(found.notes)
    for word in ("metadata.jsonl", "fp8 without scales", "enable_wandb_log", "third of the learning rate", "epoch"):
        assert word in told


def test_without_the_metadata_the_notes_say_how_to_count_the_steps(tmp_path: Path) -> None:
    found = import_config(written(tmp_path, SCRIPT))
    assert "steps" not in found.content["train"]
    assert any("images x 50 / 2" in note for note in found.notes)


def test_a_list_of_arguments_and_diffsynths_own_record_say_the_same(tmp_path: Path, make_spec: Any) -> None:
    arguments = phases(make_spec())[0]["arguments"]
    from_list = import_config(written(tmp_path, json.dumps(arguments), "run.json")).content
    record = {"preset_lora_path": None, "enable_csv_log": False, **parse(arguments)}
    from_record = import_config(written(tmp_path, json.dumps(record), "run.json")).content
    assert from_list == from_record
    assert from_list["lora"]["rank"] == 16


def test_two_commands_are_one_split_training(tmp_path: Path, make_spec: Any) -> None:
    import shlex

    lines = [
        shlex.join(["python", "train.py", *phase["arguments"]])
        for phase in phases(make_spec(memory={"quantize": "nf4"}))
    ]
    content = import_config(written(tmp_path, "\n".join(lines))).content
    assert content["backend"]["options"]["split"] is True
    assert content["memory"]["storage"] == "nf4"
    assert (content["dataset"]["path"], content["model"]["checkpoint"]) == ("dataset", "checkpoint")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("echo hello\n", "no command"),
        ("python train.py --trainable_models dit --dataset_base_path x\n", "trains dit"),
        ("python train.py --learning_rate\n", "lacks its value"),
        ("python train.py oops\n", "not an option"),
        ('python train.py --lora_rank "8\n', "not shell"),
        ("python train.py --lora_base_model dit --gradient_accumulation_steps eight\n", "not a number"),
        ("python train.py --lora_base_model dit --model_paths oops\n", "not a JSON list"),
        ("python train.py --lora_base_model dit --model_paths []\n", "among the models"),
        ('{"some": "json"}', "neither"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_message(tmp_path: Path, content: str, word: str) -> None:
    with pytest.raises(SpecError, match=word):
        import_config(written(tmp_path, content))


def test_ends_of_names_become_a_preset_or_patterns_that_match_the_same() -> None:
    assert targets_of("attention.o,attention.qkv") == "attention"
    assert targets_of("attention.o,adaln_modulation") == [r"(.*\.)?adaln_modulation", r"(.*\.)?attention\.o"]
    assert targets_of(r"layers\.\d+\.attention\.o") == [r"layers\.\d+\.attention\.o"]


_PATTERN = st.sampled_from([r"layers\.\d+\.attention\.o", r"layers\.[0-3]\.feed_forward\.w1", r"layers\.\d{1,2}\..*"])

SPECS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["a", "My_LoRA-2", "überfahrt"]),
        "model": st.fixed_dictionaries(
            {
                "checkpoint": st.sampled_from(["/m/x", "tiny", "org/name", "ideogram-ai/ideogram-4-nf4"]),
                "dtype": st.sampled_from(["bf16", "fp32"]),
            }
        ),
        "dataset": st.fixed_dictionaries(
            {
                "path": st.just("/data/images"),
                "caption_ext": st.sampled_from(["json", "txt"]),
                "trigger_word": st.sampled_from([None, "zork"]),
                "repeats": st.integers(1, 20),
                "resolution": st.integers(4, 128).map(lambda n: n * 16),
                "aspect_buckets": st.booleans(),
                "flip": st.booleans(),
                "caption_dropout": st.sampled_from([0.0, 0.1]),
                "max_text_tokens": st.sampled_from([512, 2048, 4096]),
            }
        ),
        "lora": st.fixed_dictionaries(
            {
                "rank": st.integers(1, 256),
                "alpha": st.none() | st.floats(0.01, 512),
                "rslora": st.booleans(),
                "dropout": st.sampled_from([0.0, 0.2]),
                "targets": st.sampled_from(sorted(IDEOGRAM4.targets)) | st.lists(_PATTERN, min_size=1, unique=True),
            }
        ),
        "train": st.fixed_dictionaries(
            {
                "steps": st.integers(1, 10**6),
                "batch_size": st.integers(1, 3),
                "gradient_accumulation": st.integers(1, 16),
                "learning_rate": st.floats(1e-9, 10),
                "optimizer": st.sampled_from(sorted(OPTIMIZERS)),
                "weight_decay": st.floats(0, 1),
                "lr_scheduler": st.sampled_from(["constant", "cosine"]),
                "max_grad_norm": st.sampled_from([0.0, 1.0]),
                "seed": st.integers(0, 2**63 - 1),
                "timestep_std": st.sampled_from([1.0, 1.5]),
            }
        ),
        "memory": st.fixed_dictionaries(
            {
                "quantize": st.sampled_from(["none", "nf4", "fp8", "fp8-dynamic", "int8"]),
                "text_encoder": st.sampled_from(["none", "nf4", "fp8", "int8"]),
                "offload": st.sampled_from(["none", "group", "group+activations"]),
                "compile": st.sampled_from(["none", "regional"]),
                "gradient_checkpointing": st.sampled_from(["none", "selective", "full"]),
            }
        ),
        "save": st.fixed_dictionaries({"every": st.integers(0, 1000), "keep": st.integers(1, 9)}),
        "validation": st.fixed_dictionaries({"every": st.sampled_from([0, 10]), "images": st.integers(1, 3)}),
        "backend": st.fixed_dictionaries(
            {"name": st.just("diffsynth"), "options": st.sampled_from([{}, {"split": True}, {"arguments": []}])}
        ),
    }
)


@settings(max_examples=60, deadline=None)
@given(SPECS)
def test_what_is_exact_comes_back_through_the_importer(content: dict[str, Any]) -> None:
    spec = resolve_memory(TrainSpec.model_validate(content), plugins().profiles())
    imported = TrainSpec.model_validate(from_job(json.loads(json.dumps(job(spec)))).content)
    back = resolve_memory(imported, plugins().profiles())
    for verdict in verdicts(spec):
        if verdict.kind is Kind.EXACT:
            assert meaning(back, verdict.path) == meaning(spec, verdict.path), verdict


def meaning(spec: TrainSpec, path: str) -> Any:
    """A field's value, the same for two ways of writing it."""
    if path == "lora.alpha":
        return spec.lora.effective_alpha
    if path == "memory.quantize":
        return None  # another name for storage and compute, which are compared
    if path == "lora.targets":
        return IDEOGRAM4.target_patterns(spec.lora.targets)
    return value_at(spec, path)
