from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from ai_toolkit_specs import spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraport.errors import SpecError
from loraport.ideogram4 import IDEOGRAM4
from loraport.planning import Kind
from loraport.plugins import plugins
from loraport.profiles import resolve_memory
from loraport.spec.load import build_spec
from loraport.spec.models import TrainSpec, value_at
from loraport.spec.yaml_text import dump_yaml
from loraport_ai_toolkit.capabilities import matching_modules, verdicts
from loraport_ai_toolkit.importer import import_config
from loraport_ai_toolkit.translate import config

# Two configurations made after public tutorials: the same keys and mistakes, other words.
VEHICLE = """
job: extension
config:
  name: toy_truck
  process:
    - type: sd_trainer
      training_folder: "D:/trucks/out"
      device: cuda:0
      trigger_word: toytruck
      network: {type: lora, linear: 16, linear_alpha: 8}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 10, save_format: safetensors, push_to_hub: false}
      datasets:
        - folder_path: "D:/trucks/images"
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          cache_text_embeddings: true
          resolution: [768]
      train:
        batch_size: 1
        gradient_accumulation_steps: 1
        steps: 500
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        cache_text_embeddings: true
        disable_sampling: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        lr: 1e-4
        dtype: bf16
      model:
        name_or_path: "D:/models/ideogram-4-fp8"
        arch: ideogram4
        quantize: true
        qtype: nf4
        quantize_te: true
        low_vram: true
        layer_offloading: true
        layer_offloading_text_encoder_percent: 95
        layer_offloading_transformer_percent: 95
        model_kwargs: {text_encoder_path: "D:/models/ideogram-4-fp8/text_encoder", max_text_length: 2048}
"""
STYLE = """
job: extension
config:
  name: Old Prints
  process:
    - type: diffusion_trainer
      training_folder: out
      sqlite_db_path: ./aitk_db.db
      device: cuda
      trigger_word: old prints
      performance_log_every: 10
      network: {type: lora, linear: 16, linear_alpha: 16, network_kwargs: {ignore_if_contains: []}}
      save: {dtype: bf16, save_every: 250, max_step_saves_to_keep: 12, save_format: diffusers, push_to_hub: false}
      datasets:
        - {folder_path: prints, mask_path: null, mask_min_value: 0.1, default_caption: "", caption_ext: json,
           caption_dropout_rate: 0.05, cache_latents_to_disk: true, is_reg: false, network_weight: 1,
           resolution: [1024], controls: [], shrink_video_to_frames: true, num_frames: 1,
           flip_x: false, flip_y: false, num_repeats: 1}
      train: {batch_size: 1, bypass_guidance_embedding: false, steps: 2500, gradient_accumulation: 1, train_unet: true,
              train_text_encoder: false, gradient_checkpointing: true, noise_scheduler: flowmatch, optimizer: adamw8bit,
              timestep_type: linear, content_or_style: balanced, optimizer_params: {weight_decay: 0.0001},
              unload_text_encoder: false, cache_text_embeddings: true, lr: 0.0001,
              ema_config: {use_ema: true, ema_decay: 0.99}, skip_first_sample: true, force_first_sample: false,
              disable_sampling: true, dtype: bf16, loss_type: mse, diff_output_preservation: false,
              diff_output_preservation_multiplier: 1, diff_output_preservation_class: person, switch_boundary_every: 1}
      logging: {log_every: 1, use_ui_logger: true}
      model: {name_or_path: ideogram-ai/ideogram-4-fp8, quantize: true, qtype: qfloat8, quantize_te: true,
              qtype_te: qfloat8, arch: ideogram4, low_vram: true, model_kwargs: {}, layer_offloading: false,
              layer_offloading_text_encoder_percent: 1, layer_offloading_transformer_percent: 1}
      sample: {sampler: flowmatch, sample_every: 250, width: 768, height: 768, samples: [], neg: "", seed: 42,
               walk_seed: true, guidance_scale: 4, sample_steps: 30, num_frames: 1, fps: 1}
meta: {name: "[name]", version: "1.0"}
"""


def imported(tmp_path: Path, text: str) -> tuple[TrainSpec, str]:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    found = import_config(path)
    return build_spec(found.content, base=tmp_path, origin="imported").spec, "\n".join(found.notes)


def test_a_low_memory_tutorials_mistakes_are_named(tmp_path: Path) -> None:
    spec_, notes = imported(tmp_path, VEHICLE)

    for words in (
        "linear_alpha: 8 is ignored",
        "percent: 95 acts as 1.0; it is a fraction, so 95 percent is 0.95",
        "before a JSON caption that makes it plain text",
        "'nf4' ends ai-toolkit with a KeyError",
        "float16 also rounds",
        "without their scales",
        "space after every comma",
        "save 250 holds 251 optimizer steps",
        "device: 'cuda:0' is read by nothing",
    ):
        assert words in notes
    assert (spec_.lora.rank, spec_.lora.effective_alpha, spec_.lora.targets) == (16, 16, "all")
    assert (spec_.train.learning_rate, spec_.train.steps, spec_.train.optimizer) == (1e-4, 500, "adamw8bit")
    assert (spec_.memory.storage, spec_.memory.offload) == ("fp8", "group")
    assert spec_.backend.options["layer_offloading_transformer_percent"] == 0.95
    assert "text_encoder_path" not in spec_.backend.options
    assert (spec_.dataset.resolution, spec_.dataset.trigger_word, spec_.dataset.caption_ext) == (768, "toytruck", "txt")


def test_a_style_tutorials_configuration_becomes_a_spec(tmp_path: Path) -> None:
    spec_, notes = imported(tmp_path, STYLE)

    assert spec_.name == "Old_Prints"
    assert (spec_.train.ema_decay, spec_.train.weight_decay, spec_.train.steps) == (0.99, 0.0001, 2500)
    assert spec_.backend.options == {"timestep_type": "linear"}
    assert (spec_.memory.storage, spec_.memory.offload, spec_.save.keep, spec_.save.dtype) == (
        "fp8",
        "none",
        12,
        "bf16",
    )
    assert "was not carried" not in notes


def test_what_ai_toolkit_would_default_to_is_written_out(tmp_path: Path) -> None:
    text = "{config: {name: a, process: [{model: {name_or_path: x/y, arch: ideogram4}, datasets: [{folder_path: d}]}]}}"

    spec_, notes = imported(tmp_path, text)

    assert (spec_.train.learning_rate, spec_.model.dtype, spec_.save.dtype) == (1e-6, "fp32", "fp16")
    assert (spec_.save.every, spec_.lora.rank, spec_.dataset.resolution) == (1000, 4, 512)
    assert "so ai-toolkit trains with 1e-6" in notes


SEVERAL = """
config:
  name: several
  process:
    - trigger_word: zork
      model: {name_or_path: x/y, arch: ideogram4}
      train: {reg_weight: 0.5}
      datasets:
        - {folder_path: one, resolution: [512, 768, 1000], num_repeats: 2, caption_ext: json}
        - {folder_path: two, resolution: 512, is_reg: true, loss_multiplier: 0.5, flip_x: true}
"""


def test_several_data_sets_and_resolutions_become_sets(tmp_path: Path) -> None:
    spec_, notes = imported(tmp_path, SEVERAL)

    sets = spec_.dataset.sets
    assert [(one.path, one.resolution, one.repeats) for one in sets] == [
        (tmp_path / "one", 512, 2),
        (tmp_path / "one", 768, 2),
        (tmp_path / "one", 992, 2),
        (tmp_path / "two", 512, 1),
    ]
    assert (sets[3].regularization, sets[3].loss_weight, sets[3].flip, sets[3].caption_ext) == (True, 0.25, True, "txt")
    assert (spec_.dataset.trigger_word, spec_.dataset.max_text_tokens) == ("zork", 3072)
    assert "every other step" in notes
    assert "was not carried" not in notes


def test_a_configuration_of_regularisation_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="has no dataset"):
        imported(tmp_path, SEVERAL.replace("num_repeats: 2", "is_reg: true"))


def test_sets_come_back_whole_from_a_configuration_of_our_own(tmp_path: Path) -> None:
    sets = [{"path": "/a", "weight": 2}, {"path": "hub:me/b", "weight": 1, "caption_field": "text", "resolution": 512}]
    original = spec(dataset={"path": None, "sets": sets, "trigger_word": "zork"})

    again, _ = imported(tmp_path, dump_yaml(config(original)))

    assert again.dataset == original.dataset


def test_old_accumulation_counts_passes(tmp_path: Path) -> None:
    text = VEHICLE.replace("gradient_accumulation_steps: 1", "gradient_accumulation_steps: 4")

    spec_, notes = imported(tmp_path, text)

    assert (spec_.train.steps, spec_.train.gradient_accumulation) == (125, 4)
    assert "counts passes as steps" in notes


def test_a_key_that_nothing_reads_is_named(tmp_path: Path) -> None:
    _, notes = imported(tmp_path, VEHICLE.replace("lr: 1e-4", "learning_rate: 1e-4"))

    assert "train.learning_rate: 0.0001 was not carried" in notes


@pytest.mark.parametrize("text", ["a: 1", "[]", "config: {process: []}", "config: {process: [{type: x}]}"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError):
        imported(tmp_path, text)


NUMBERS = st.floats(1e-6, 1.0, allow_nan=False)
SPECS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["a", "config", "mp_x-1.2", "名前"]),
        "model": st.fixed_dictionaries({"dtype": st.sampled_from(["bf16", "fp32"])}),
        "dataset": st.fixed_dictionaries(
            {
                "caption_ext": st.sampled_from(["json", "txt", "caption"]),
                "default_caption": st.sampled_from([None, "", "a, b"]),
                "trigger_word": st.sampled_from([None, "zork"]),
                "repeats": st.integers(1, 20),
                "resolution": st.integers(4, 128).map(lambda n: 16 * n),
                "aspect_buckets": st.booleans(),
                "flip": st.booleans(),
                "caption_dropout": st.floats(0, 1),
                "regularization": st.fixed_dictionaries(
                    {
                        "path": st.sampled_from([None, "/data/reg"]),
                        "weight": st.floats(0, 5),
                        "repeats": st.integers(1, 4),
                    }
                ),
            }
        ),
        "lora": st.one_of(
            st.fixed_dictionaries(
                {
                    "rank": st.integers(1, 128),
                    "alpha": st.sampled_from([None, 4, 16]),
                    "dropout": st.sampled_from([0.0, 0.25]),
                    "targets": st.sampled_from(["attention", "attention+mlp", "all", [r"layers\.3\..*o"]]),
                }
            ),
            st.fixed_dictionaries({"type": st.just("lokr"), "rank": st.integers(1, 64), "factor": st.integers(-1, 32)}),
        ),
        "train": st.fixed_dictionaries(
            {
                "steps": st.integers(1, 10_000),
                "batch_size": st.integers(1, 8),
                "gradient_accumulation": st.integers(1, 8),
                "learning_rate": NUMBERS,
                "optimizer": st.sampled_from(["adamw", "adamw8bit", "adafactor", "prodigy", "lion"]),
                "weight_decay": NUMBERS,
                "lr_scheduler": st.sampled_from(["constant", "linear", "cosine", "cosine_with_restarts"]),
                "lr_cycles": st.integers(1, 2),
                "warmup_steps": st.sampled_from([0, 10]),
                "max_grad_norm": st.one_of(st.just(0.0), NUMBERS),
                "seed": st.integers(0, 2**31),
                "ema_decay": st.sampled_from([0.0, 0.5, 0.999]),
            }
        ),
        "memory": st.fixed_dictionaries(
            {
                "quantize": st.sampled_from(["none", "fp8", "int8"]),
                "text_encoder": st.sampled_from(["none", "fp8", "int8"]),
                "offload": st.sampled_from(["none", "group"]),
                "compile": st.sampled_from(["none", "regional", "full"]),
                "compute": st.just("model"),
                "gradient_checkpointing": st.sampled_from(["none", "selective", "full"]),
            }
        ),
        "save": st.fixed_dictionaries(
            {
                "every": st.integers(0, 500),
                "keep": st.integers(1, 9),
                "dtype": st.sampled_from(["bf16", "fp16", "fp32"]),
            }
        ),
        "sample": st.fixed_dictionaries(
            {"prompts": st.sampled_from([[], ["a ${b}, c"]]), "seed": st.integers(0, 99), "guidance": st.floats(0, 9)}
        ),
        "backend": st.fixed_dictionaries(
            {
                "python": st.sampled_from([None, "/opt/python"]),
                "options": st.sampled_from([{}, {"device": "cpu"}, {"timestep_type": "linear", "low_vram": False}]),
            }
        ),
    }
)


def meaning(spec_: TrainSpec, path: str) -> Any:
    """The value at a path, alike for two ways of writing the same."""
    if path == "lora.alpha":
        return spec_.lora.effective_alpha
    if path == "lora.targets":
        return matching_modules(IDEOGRAM4.target_patterns(spec_.lora.targets))
    return value_at(spec_, path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SPECS)
def test_a_spec_comes_back_in_every_field_whose_verdict_is_exact(tmp_path: Path, sections: dict[str, Any]) -> None:
    original = spec(**sections)

    unresolved, _ = imported(tmp_path, dump_yaml(config(original)))
    again = resolve_memory(unresolved, plugins().profiles())

    for verdict in verdicts(original):
        if verdict.kind is Kind.EXACT:
            before, after = meaning(original, verdict.path), meaning(again, verdict.path)
            same = math.isclose(before, after, rel_tol=1e-12) if isinstance(before, float) else before == after
            assert same, f"{verdict.path}: {before!r} came back as {after!r}"


def test_the_job_that_ai_toolkit_reads_is_imported_as_json_too(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(config(spec())))

    assert import_config(path).content["name"] == "mp_scifi_buggy"
