"""SimpleTuner's own loader and parser take every golden configuration, and hold what a verdict calls exact."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraport.ideogram4 import IDEOGRAM4
from loraport.planning import Context, Kind
from loraport.run.supervisor import write_files
from loraport.spec.models import value_at
from loraport_simpletuner import mapping
from loraport_simpletuner.launch import _environment
from loraport_simpletuner.recipe import has_group_offload
from loraport_simpletuner.translate import translate

PYTHON = os.environ.get("LORAPORT_SIMPLETUNER_PYTHON")
HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="set LORAPORT_SIMPLETUNER_PYTHON to SimpleTuner's interpreter"),
    pytest.mark.timeout(600),
]

Parsed = dict[str, Any]
#: Field → how SimpleTuner's parsed arguments (a), first data set (d) and LyCORIS file (y) hold it.
HELD: dict[str, Callable[[Parsed, Parsed, Parsed], Any]] = {
    "model.family": lambda a, d, y: {"ideogram": "ideogram4"}[a["model_family"]],
    "model.checkpoint": lambda a, d, y: a["pretrained_model_name_or_path"],
    "model.revision": lambda a, d, y: a["revision"],
    "model.dtype": lambda a, d, y: {"bf16": "bf16", "no": "fp32"}[a["mixed_precision"]],
    "dataset.repeats": lambda a, d, y: d["repeats"] + 1,
    "dataset.resolution": lambda a, d, y: d["resolution"] if d["resolution"] == a["resolution"] else None,
    "dataset.aspect_buckets": lambda a, d, y: d["crop_aspect"] == "preserve",
    "dataset.caption_dropout": lambda a, d, y: a["caption_dropout_probability"],
    "lora.type": lambda a, d, y: y["algo"] if a["lora_type"] == "lycoris" else "lora",
    "lora.rank": lambda a, d, y: y["linear_dim"] if y else a["lora_rank"],
    "lora.alpha": lambda a, d, y: y["linear_alpha"] if y else a["lora_alpha"],
    "lora.dora": lambda a, d, y: a["use_dora"],
    "lora.dropout": lambda a, d, y: a["lora_dropout"],
    "lora.targets": lambda a, d, y: _targets(a, y),
    "lora.factor": lambda a, d, y: y.get("factor", -1),
    "train.steps": lambda a, d, y: a["max_train_steps"],
    "train.batch_size": lambda a, d, y: a["train_batch_size"],
    "train.gradient_accumulation": lambda a, d, y: a["gradient_accumulation_steps"],
    "train.learning_rate": lambda a, d, y: a["learning_rate"],
    "train.optimizer": lambda a, d, y: {theirs: ours for ours, theirs in mapping.OPTIMIZERS.items()}[a["optimizer"]],
    "train.weight_decay": lambda a, d, y: float(a["optimizer_config"].removeprefix("weight_decay=")),
    "train.lr_scheduler": lambda a, d, y: a["lr_scheduler"].removesuffix("_with_warmup"),
    "train.lr_cycles": lambda a, d, y: a["lr_num_cycles"],
    "train.warmup_steps": lambda a, d, y: 0 if a["lr_scheduler"] == "cosine" else a["lr_warmup_steps"],
    "train.max_grad_norm": lambda a, d, y: a["max_grad_norm"] if a["grad_clip_method"] == "norm" else None,
    "train.seed": lambda a, d, y: a["seed"],
    "train.ema_decay": lambda a, d, y: a["ema_decay"] if a["use_ema"] else 0.0,
    "train.timestep_mean": lambda a, d, y: a["ideogram_schedule_mu"],
    "train.timestep_std": lambda a, d, y: a["ideogram_schedule_std"],
    "memory.storage": lambda a, d, y: "none" if a["ideogram_fp8_base_upcast"] else a["model_flavour"],
    "memory.offload": lambda a, d, y: "group" if a.get("enable_group_offload") else "none",
    "memory.compile": lambda a, d, y: _compile(a),
    "memory.gradient_checkpointing": lambda a, d, y: "full" if a["gradient_checkpointing"] else "none",
    "save.every": lambda a, d, y: a["checkpoint_step_interval"],
    "save.keep": lambda a, d, y: a["checkpoints_total_limit"],
    "sample.every": lambda a, d, y: 0 if a["validation_disable"] else a["validation_step_interval"],
    "sample.prompts": lambda a, d, y: [a["validation_prompt"]] if a["validation_prompt"] else [],
    "sample.steps": lambda a, d, y: a["validation_num_inference_steps"],
    "sample.guidance": lambda a, d, y: a["validation_guidance"],
    "sample.seed": lambda a, d, y: a["validation_seed"],
}
#: Done by LoraPort itself, while staging, converting or starting; SimpleTuner has no argument for them.
OURS = {
    "version", "name", "dataset.path", "dataset.caption_ext", "dataset.caption_field", "dataset.sets",
    "dataset.default_caption", "dataset.trigger_word",
    "dataset.upscale", "dataset.flip", "dataset.max_text_tokens", "dataset.regularization.path",
    "dataset.regularization.caption_ext", "dataset.regularization.repeats", "dataset.regularization.weight",
    "lora.rslora", "memory.profile", "memory.quantize", "memory.compute", "train.gpus",
    "save.dtype", "validation.every", "validation.images",
    "validation.path", "backend.name", "backend.python", "backend.options",
}  # fmt: skip


def _compile(arguments: Parsed) -> str:
    if arguments["dynamo_backend"] == "no":
        return "none"
    return "regional" if arguments["dynamo_use_regional_compilation"] else "full"


def _targets(arguments: Parsed, lycoris: Parsed) -> list[str]:
    if lycoris:
        return mapping.modules([name.removesuffix("$") for name in lycoris["apply_preset"]["target_name"]])
    names = arguments["peft_lora_target_modules"]
    every = mapping.modules([".*"])
    return [module for module in every if any(module == name or module.endswith(f".{name}") for name in names)]


def test_the_real_parser_holds_every_exact_field_of_every_golden_spec(
    make_spec: Any, golden_cases: dict[str, Any], tmp_path: Path, simpletuner_versions: dict[str, Any]
) -> None:
    installed = simpletuner_versions["simpletuner"]
    folders, specs = {}, {}
    for name, (sections, resume) in golden_cases.items():
        content = json.loads(json.dumps(sections))
        backend = content.setdefault("backend", {})
        backend["options"] = {**backend.get("options", {}), "version": installed}
        if not has_group_offload(installed) and content.get("memory", {}).get("offload") == "group":
            content["memory"]["offload"] = "none"
        specs[name] = make_spec(**content)
        root = tmp_path / f"rün {name}"
        write_files(_Plan(translate(specs[name], Context(root, resume)).files), root)
        folders[name] = root / "backend"
    environment = _environment({"env": {"CONFIG_BACKEND": "json"}, "checkpoint": None}, tmp_path)
    assert PYTHON is not None
    done = subprocess.run(
        [PYTHON, str(HERE / "parse_child.py"), *map(str, folders.values())],
        capture_output=True, text=True, env=environment | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("@parsed ")]
    assert lines, done.stderr[-3000:] + done.stdout[-1000:]
    results = json.loads(lines[0].removeprefix("@parsed "))["results"]
    for name, spec in specs.items():
        work = folders[name]
        sets = json.loads((work / "config" / "multidatabackend.json").read_text(encoding="utf-8"))
        data = sets[0]
        lycoris_file = work / "config" / "lycoris_config.json"
        lycoris = json.loads(lycoris_file.read_text(encoding="utf-8")) if lycoris_file.is_file() else {}
        for verdict in translate(spec, Context(work.parent)).verdicts:
            unused = verdict.path.startswith("sample.") and not spec.sample.every
            staged = verdict.path.startswith("dataset.sets[") and not verdict.path.endswith((".resolution", ".repeats"))
            # Each set has its own, which is compared below.
            of_no_set = bool(spec.dataset.sets) and verdict.path in ("dataset.repeats", "dataset.resolution")
            if verdict.kind is not Kind.EXACT or verdict.path in OURS or unused or staged or of_no_set:
                continue
            if verdict.path == "memory.text_encoder":
                assert results[str(work)]["text_encoder_1_precision"] == "no_change"
                continue
            if verdict.path.startswith("dataset.sets["):
                number, field = re.match(r"dataset\.sets\[(\d+)\]\.(\w+)", verdict.path).groups()
                assert sets[int(number)][field] == value_at(spec, verdict.path) - (field == "repeats")
                continue
            held = HELD[verdict.path](results[str(work)], data, lycoris)
            assert held == _wanted(spec, verdict.path), f"{name}: {verdict.path}"


def _wanted(spec: Any, path: str) -> Any:
    if path == "lora.alpha":
        return spec.lora.effective_alpha
    if path == "lora.targets":
        return mapping.modules(IDEOGRAM4.target_patterns(spec.lora.targets))
    if path == "model.checkpoint" and mapping.is_local(spec.model.checkpoint):
        return mapping.LOCAL_ID
    return value_at(spec, path)


class _Plan:
    backend = "simpletuner"

    def __init__(self, files: dict[str, str]):
        self.files = files
