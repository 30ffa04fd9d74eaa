"""SimpleTuner's configurations become specs; what the adapter wrote exactly comes back the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraport.errors import SpecError
from loraport.ideogram4 import IDEOGRAM4
from loraport.planning import Context, Kind
from loraport.plugins import plugins
from loraport.profiles import resolve_memory
from loraport.run.supervisor import write_files
from loraport.spec.load import build_spec
from loraport.spec.models import TrainSpec, value_at
from loraport_simpletuner import mapping
from loraport_simpletuner.importer import import_config
from loraport_simpletuner.translate import translate


class Files:
    backend = "simpletuner"

    def __init__(self, files: dict[str, str]):
        self.files = files


def same(path: str, before: TrainSpec, after: TrainSpec) -> bool:
    if path == "lora.alpha":
        return before.lora.effective_alpha == after.lora.effective_alpha
    if path == "lora.targets":
        return mapping.modules(IDEOGRAM4.target_patterns(before.lora.targets)) == mapping.modules(
            IDEOGRAM4.target_patterns(after.lora.targets)
        )
    return bool(value_at(before, path) == value_at(after, path))


def exact(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False)


SECTIONS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["a", "Größe_1", "x-2.b"]),
        "model": st.fixed_dictionaries(
            {
                "checkpoint": st.sampled_from([*mapping.OFFICIAL.values(), "/models/mine", "org/other"]),
                "dtype": st.sampled_from(["bf16", "fp32"]),
            }
        ),
        "dataset": st.fixed_dictionaries(
            {
                "caption_ext": st.sampled_from(["json", "txt"]),
                "trigger_word": st.none() | st.text("ab ü", min_size=1, max_size=5),
                "repeats": st.integers(1, 9),
                "resolution": st.integers(4, 128).map(lambda side: side * 16),
                "aspect_buckets": st.booleans(),
                "upscale": st.booleans(),
                "flip": st.booleans(),
                "caption_dropout": exact(0, 1),
                "max_text_tokens": st.sampled_from([512, 2048]),
                "regularization": st.fixed_dictionaries(
                    {"path": st.sampled_from([None, "/reg"]), "repeats": st.integers(1, 5)}
                ),
            }
        ),
        "lora": st.fixed_dictionaries(
            {
                "type": st.sampled_from(["lora", "lokr", "loha"]),
                "rank": st.integers(1, 128),
                "alpha": st.none() | st.integers(1, 64).map(float) | exact(0.01, 64),
                "dropout": st.sampled_from([0.0, 0.05]),
                "targets": st.sampled_from(
                    ["attention", "attention+mlp", "all", [r"layers\.[12]\.attention\.o"], [r".*\.w1", r".*qkv"]]
                ),
                "factor": st.sampled_from([-1, 8]),
            }
        ),
        "train": st.fixed_dictionaries(
            {
                "steps": st.integers(1, 5000),
                "gpus": st.integers(1, 3),
                "batch_size": st.integers(1, 4),
                "gradient_accumulation": st.integers(1, 3),
                "learning_rate": exact(1e-7, 1),
                "optimizer": st.sampled_from(list(mapping.OPTIMIZERS)),
                "weight_decay": st.sampled_from([0.0, 1e-5, 0.01, 1.0, 10.0]) | exact(0, 10),
                "lr_scheduler": st.sampled_from(["constant", "linear", "cosine", "cosine_with_restarts"]),
                "lr_cycles": st.integers(1, 3),
                "warmup_steps": st.integers(0, 20),
                "max_grad_norm": exact(0, 5),
                "seed": st.integers(0, 2**40),
                "timestep_mean": exact(-2, 2),
                "timestep_std": exact(0.1, 3),
            }
        ),
        "memory": st.fixed_dictionaries(
            {
                "quantize": st.sampled_from(["none", "fp8", "fp8-dynamic", "int8", "nf4"]),
                "text_encoder": st.sampled_from(["none", "fp8", "int8", "nf4"]),
                "offload": st.sampled_from(["none", "group", "group+activations", "disk"]),
                "compile": st.sampled_from(["none", "regional", "full"]),
                "gradient_checkpointing": st.sampled_from(["none", "selective", "full"]),
            }
        ),
        "save": st.fixed_dictionaries({"every": st.integers(0, 500), "keep": st.integers(1, 9)}),
        "sample": st.fixed_dictionaries(
            {
                "every": st.integers(0, 5),
                "prompts": st.lists(st.sampled_from(["a", "ein ü"]), min_size=1, max_size=2),
                "steps": st.integers(1, 50),
                "guidance": st.sampled_from([1.0, 4.5]),
            }
        ),
        "validation": st.fixed_dictionaries({"every": st.integers(0, 5), "images": st.integers(1, 3)}),
        "backend": st.fixed_dictionaries(
            {"options": st.sampled_from([{}, {"version": "4.8.0"}, {"config": {"vae_batch_size": 1}}])}
        ),
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sections=SECTIONS)
def test_what_was_written_exactly_is_imported_the_same(make_spec, tmp_path: Path, sections: dict[str, Any]) -> None:
    if sections["lora"]["type"] != "lora":
        sections["lora"] |= {"dropout": 0.0, "alpha": float(round(sections["lora"]["alpha"] or 1) or 1)}
    if sections["backend"]["options"].get("version"):
        sections["backend"]["options"] = {"version": "4.8.0"}
    before = make_spec(**sections)
    made = translate(before, Context(tmp_path))
    if any(verdict.kind is Kind.REFUSED for verdict in made.verdicts):
        assert made.files == {}
        return
    write_files(Files(made.files), tmp_path)
    for stale in ("prompts.json", "lycoris_config.json"):
        if f"backend/config/{stale}" not in made.files:
            (tmp_path / "backend" / "config" / stale).unlink(missing_ok=True)
    imported = import_config(tmp_path / "backend" / "config")
    after = resolve_memory(build_spec(imported.content, base=tmp_path, origin="imported").spec, plugins().profiles())
    for verdict in made.verdicts:
        if verdict.kind is Kind.EXACT:
            assert same(verdict.path, before, after), f"{verdict.path}: {imported.content}"
    assert imported.notes == []


def test_several_sets_of_our_own_come_back_whole(make_spec, golden_cases, tmp_path: Path) -> None:
    before = make_spec(**golden_cases["sets"][0])
    write_files(Files(translate(before, Context(tmp_path)).files), tmp_path)
    imported = import_config(tmp_path / "backend" / "config")
    after = build_spec(imported.content, base=tmp_path, origin="imported").spec
    assert after.dataset == before.dataset
    assert imported.notes == []


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A configuration as SimpleTuner's own documentation would have a user write it."""
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "--model_family": "ideogram",
                "--model_type": "lora",
                "--max_train_steps": 900,
                "--num_train_epochs": 0,
                "--lora_rank": 8,
                "--learning_rate": "1e-4",
                "--optimizer": "adamw_bf16",
                "--lr_scheduler": "polynomial",
                "--data_backend_config": "config/multidatabackend.json",
                "--validation_prompt": "a ship",
                "--eval_steps_interval": 20,
                "--data_backend_sampling": "uniform",
                "--hub_model_id": "me/mine",
                "--max_grad_norm": 0.1,
                "--grad_clip_method": "value",
            }
        )
    )
    (folder / "multidatabackend.json").write_text(
        json.dumps(
            [
                {
                    "id": "pics",
                    "type": "local",
                    "instance_data_dir": "pics",
                    "caption_strategy": "filename",
                    "crop": True,
                    "crop_aspect": "square",
                    "resolution": 1.0,
                    "resolution_type": "area",
                    "repeats": 4,
                },
                {
                    "id": "more",
                    "type": "local",
                    "instance_data_dir": "more",
                    "probability": 0.5,
                    "is_regularisation_data": True,
                },
                {"id": "depth", "dataset_type": "conditioning", "type": "local", "instance_data_dir": "depth"},
                {"id": "held", "dataset_type": "eval", "type": "local", "instance_data_dir": "held"},
                {"id": "t", "dataset_type": "text_embeds", "default": True},
            ]
        )
    )
    return folder


def test_a_foreign_configuration_is_read_and_all_that_is_lost_is_told(foreign: Path) -> None:
    imported = import_config(foreign)
    spec = build_spec(imported.content, base=foreign, origin="imported").spec
    assert (spec.lora.rank, spec.lora.effective_alpha, spec.train.steps) == (8, 8.0, 900)
    pics, more = spec.dataset.sets
    assert (pics.path, pics.resolution, pics.weight) == (foreign / "pics", 1024, 1.0)
    assert (more.path, more.weight, more.regularization) == (foreign / "more", 0.5, True)
    assert (spec.dataset.aspect_buckets, spec.dataset.repeats) == (False, 1)
    assert (spec.validation.every, spec.validation.path) == (20, foreign / "held")
    # SimpleTuner's own defaults hold for what was left out.
    assert (spec.lora.dropout, spec.dataset.caption_dropout, spec.train.batch_size) == (0.1, 0.1, 4)
    notes = "\n".join(imported.notes)
    for told in (
        "hub_model_id",
        "more",
        "depth",
        "by probability until",
        "adamw_bf16",
        "polynomial",
        "filename",
        "lora_dropout",
        "clips by norm",
    ):
        assert told in notes, told


def test_sets_that_are_drawn_by_their_sizes_keep_their_repeats(foreign: Path) -> None:
    config = json.loads((foreign / "config.json").read_text())
    del config["--data_backend_sampling"]
    (foreign / "config.json").write_text(json.dumps(config))
    imported = import_config(foreign)
    sets = build_spec(imported.content, base=foreign, origin="imported").spec.dataset.sets
    assert [(one.repeats, one.weight) for one in sets] == [(5, None), (1, None)]
    assert any(note.startswith("probability: 0.5 was not carried") for note in imported.notes)


def test_a_single_file_is_taken_too(foreign: Path) -> None:
    assert import_config(foreign / "config.json").content["lora"]["rank"] == 8


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[]", "no mapping"),
        ("{}", "not a SimpleTuner configuration"),
        ('{"model_family": "flux", "model_type": "lora"}', "flux"),
        ('{"model_family": "ideogram", "model_type": "full"}', "full"),
    ],
)
def test_another_file_is_refused_with_its_reason(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SpecError, match=told):
        import_config(tmp_path)


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"config\.json cannot be read"):
        import_config(tmp_path)
