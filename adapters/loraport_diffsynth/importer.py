"""A DiffSynth configuration → a spec, and what could not be carried. No torch.

Read are: a shell script with a command that runs a `train.py`, a JSON list of its arguments, the `training_args.json`
that DiffSynth writes beside its LoRA files, and the `launch.json` of a run of ours.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

from loraport.errors import SpecError
from loraport.ideogram4 import IDEOGRAM4
from loraport.importing import Imported
from loraport_diffsynth.arguments import DEFAULTS, Options, commands_in, parse
from loraport_diffsynth.capabilities import COMPUTED, METHODS, OPTIMIZERS, PREQUANTIZED
from loraport_diffsynth.translate import TEXT_ENCODER, TRANSFORMER, VAE

#: Options that say nothing a spec would, or what this adapter sets itself.
_SETTLED = {
    "data_file_keys",
    "dataset_num_workers",
    "extra_inputs",
    "find_unused_parameters",
    "lora_alpha",
    "lora_base_model",
    "offload_models",
    "remove_prefix_in_ckpt",
    "swanlab_project",
    "tokenizer_path",
    "wandb_project",
}

_WHY_NOT = {
    "fp8_models": "DiffSynth casts them to fp8 without scales; near is memory.quantize: fp8, with a scale a row",
    "lora_checkpoint": "a spec begins with a new LoRA; `loraport resume` goes on with its own",
    "preset_lora_path": "a spec has no second LoRA that is merged before",
    "preset_lora_model": "a spec has no second LoRA that is merged before",
    "resume_from_checkpoint": "DiffSynth's script for Ideogram 4 ignores it",
    "enable_tensorboard_log": "DiffSynth's script for Ideogram 4 ignores it; LoraPort's events.jsonl has every step",
    "enable_swanlab_log": "DiffSynth's script for Ideogram 4 ignores it; LoraPort's events.jsonl has every step",
    "enable_wandb_log": "DiffSynth's script for Ideogram 4 ignores it; LoraPort's events.jsonl has every step",
    "enable_csv_log": "LoraPort's events.jsonl has every step",
}

#: Options that this adapter passes on as they are.
_PASSED_ON = {"use_gradient_checkpointing_offload", "enable_optimizer_cpu_offload", "cpu_offload_split_threshold"}


def import_config(path: Path) -> Imported:
    """Read one of the forms above. Raises SpecError for a file that is none of them, or that trains something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}.") from error
    try:
        content = json.loads(text)
    except ValueError:
        return _from_commands(commands_in(text, path), path.parent, path.stem)
    if isinstance(content, dict) and "phases" in content:
        return from_job(content)
    if isinstance(content, dict) and "lora_rank" in content:
        options = {name: _plain(value) for name, value in content.items() if value not in (None, False, "")}
        return _from_commands([options], path.parent, path.stem)
    if isinstance(content, list) and all(isinstance(item, str) for item in content):
        return _from_commands([parse(content)], path.parent, path.stem)
    raise SpecError(f"{path} is neither a shell script nor a list of arguments of DiffSynth.")


def from_job(job: dict[str, Any]) -> Imported:
    """The spec of a run of ours: its own part of it, and the rest from what DiffSynth is told."""
    carried, entry = job["spec"], job["entry"]
    read = _from_commands([parse(phase["arguments"]) for phase in job["phases"]], Path(), carried["name"]).content
    images = read["train"].pop("gradient_accumulation")
    content = {
        **carried,
        "lora": {**read["lora"], "alpha": entry["alpha"], "rslora": entry["rslora"]},
        "train": {
            **read["train"],
            **carried["train"],
            "gradient_accumulation": images,
            "timestep_mean": entry["timestep_mean"],
            "timestep_std": entry["timestep_std"],
        },
        "memory": _memory_of(read["memory"], carried["model"]["checkpoint"]),
    }
    return Imported(content, [_WARM_UP])


def _all_models(name: str, values: list[str]) -> str:
    """The models of all commands together; of everything else the first."""
    if name == "model_id_with_origin_paths":
        return ",".join(dict.fromkeys(model for value in values for model in value.split(",")))
    if name == "model_paths":
        with contextlib.suppress(ValueError, TypeError):  # what is no list is told later
            return json.dumps([model for value in values for model in json.loads(value)])
    if name == "quant_options":
        return ";".join(values)
    return values[0]


_WARM_UP = "DiffSynth's first five steps run at a third of the learning rate; train.warmup_steps is left at 0."


def _from_commands(commands: list[Options], base: Path, stem: str) -> Imported:
    """The spec of one training, which may be two commands: encoding, then training."""
    training = next(
        (each for each in commands if not str(each.get("task", "")).endswith(":data_process")), commands[-1]
    )
    given: Options = {**{name: value for each in commands for name, value in each.items()}, **training}
    for name in (
        "model_paths",
        "model_id_with_origin_paths",
        "quant_options",
        "dataset_base_path",
        "dataset_metadata_path",
    ):
        # The encoding reads the data, and the models of which the training needs only one.
        read = [str(each[name]) for each in commands if name in each]
        if read:
            given[name] = _all_models(name, read)
    if given.get("lora_base_model") != "dit":
        raise SpecError(
            f"It trains {given.get('trainable_models') or given.get('lora_base_model') or 'no model'}, not a LoRA of "
            "Ideogram 4's transformer (--lora_base_model dit), which is all that a spec describes."
        )
    return _Reader(given, base, stem).imported(split=len(commands) > 1)


class _Reader:
    """Turns options into a spec, and keeps the notes."""

    def __init__(self, given: Options, base: Path, stem: str):
        self.left = dict(given)
        self.notes: list[str] = []
        self.base, self.stem = base, stem

    def imported(self, split: bool) -> Imported:
        per_step = self._integer("gradient_accumulation_steps")
        split = split or str(self.left.get("task", "")).startswith("sft:")
        self._take("task")
        options: dict[str, Any] = {"split": True} if split else {}
        content: dict[str, Any] = {
            "version": 1,
            "name": self._name(),
            "model": {"family": "ideogram4", "checkpoint": self._checkpoint()},
            "dataset": self._dataset(),
            "lora": {"type": "lora", "rank": self._integer("lora_rank"), "targets": self._targets()},
        }
        content["train"] = self._train(per_step, content["dataset"]["repeats"])
        content["memory"] = _memory_of(self._memory(), content["model"]["checkpoint"])
        content["save"] = self._save(per_step)
        passed = [item for name in sorted(_PASSED_ON & set(self.left)) for item in self._again(name)]
        content["backend"] = {"name": "diffsynth", "options": options | ({"arguments": passed} if passed else {})}
        self.notes.append(_WARM_UP)
        for name in sorted(set(self.left) - _SETTLED):
            self.notes.append(f"--{name} {self.left[name]}: {_WHY_NOT.get(name, 'a spec has no such setting')}.")
        return Imported(content, self.notes)

    def _take(self, name: str) -> str | bool | None:
        return self.left.pop(name, DEFAULTS.get(name))

    def _integer(self, name: str) -> int:
        return int(self._number(name))

    def _number(self, name: str) -> float:
        value = self._take(name)
        try:
            return float(str(value))
        except ValueError as error:
            raise SpecError(f"--{name} {value}: this is not a number.") from error

    def _again(self, name: str) -> list[str]:
        value = self.left.pop(name)
        return [f"--{name}"] if value is True else [f"--{name}", str(value)]

    def _name(self) -> str:
        folder = re.sub(r"[^\w.\-]+", "-", Path(str(self._take("output_path"))).name).strip("-.")
        return (
            folder if folder not in ("", "models", "output") else re.sub(r"[^\w.\-]+", "-", self.stem)
        ) or "imported"

    def _checkpoint(self) -> str:
        ids, paths = self._take("model_id_with_origin_paths"), self._take("model_paths")
        if ids:
            return self._common(str(ids).split(","), lambda name: name.rpartition(":")[0])
        try:
            files = [item for item in json.loads(str(paths)) if isinstance(item, str)]
        except ValueError as error:
            raise SpecError(f"--model_paths {paths}: this is not a JSON list.") from error
        return self._common(files, lambda name: str(Path(name).parent.parent))

    def _common(self, names: list[str], whole: Any) -> str:
        """The one checkpoint that the transformer, text encoder and VAE belong to."""
        parts = (TRANSFORMER, TEXT_ENCODER, VAE)
        known = [name for name in dict.fromkeys(names) if name.endswith(parts)]
        transformer = next((name for name in known if name.endswith(TRANSFORMER)), None)
        if transformer is None:
            raise SpecError(f"There is no {TRANSFORMER} among the models: {', '.join(names) or 'none'}.")
        chosen = str(whole(transformer))
        for name in names:
            if name not in known or whole(name) != chosen:
                self.notes.append(f"The model {name} is not of {chosen}; a spec names one checkpoint.")
        return chosen

    def _dataset(self) -> dict[str, Any]:
        dataset: dict[str, Any] = {
            "path": str(self._take("dataset_base_path")),
            "repeats": self._integer("dataset_repeat"),
        }
        height, width = self._take("height"), self._take("width")
        pixels = self._integer("max_pixels")
        if height and height == width:
            return {**dataset, "resolution": int(str(height)), "aspect_buckets": False}
        if height and width:
            self.notes.append(f"--height {height} --width {width}: a spec trains squares or each image's own shape.")
        side = math.isqrt(pixels) // IDEOGRAM4.side_multiple * IDEOGRAM4.side_multiple
        if side * side != pixels:
            self.notes.append(f"--max_pixels {pixels} becomes dataset.resolution {side}, of {side * side} pixels.")
        return {**dataset, "resolution": side}

    def _rows(self) -> int | None:
        """How many images the metadata lists, where it can be read."""
        path = self._take("dataset_metadata_path")
        if not path:
            return None
        self.notes.append(f"Captions come from {path}; a spec reads them from a file beside each image.")
        for folder in (self.base, Path.cwd()):
            file = folder / str(path)
            if file.is_file():
                text = file.read_text(encoding="utf-8")
                if file.suffix == ".json":
                    return len(json.loads(text))
                return len(text.splitlines()) - (file.suffix == ".csv")
        return None

    def _train(self, per_step: int, repeats: int) -> dict[str, Any]:
        rows, epochs = self._rows(), self._integer("num_epochs")
        dotted = str(self._take("customized_optimizer"))
        optimizer = next((name for name, each in OPTIMIZERS.items() if each == dotted), None)
        if optimizer is None:
            optimizer = "adamw"
            self.notes.append(f"--customized_optimizer {dotted}: a spec does not know it; train.optimizer is adamw.")
        train: dict[str, Any] = {
            "batch_size": 1,
            "gradient_accumulation": per_step,
            "learning_rate": self._number("learning_rate"),
            "weight_decay": self._number("weight_decay"),
            "optimizer": optimizer,
            "lr_scheduler": "constant",
            "max_grad_norm": 0.0,
        }
        if rows is None:
            self.notes.append(
                f"{epochs} epochs of the data set {repeats} times over: count its images and set train.steps to "
                f"images x {epochs * repeats} / {per_step}."
            )
        else:
            train["steps"] = max(1, epochs * math.ceil(rows * repeats / per_step))
        return train

    def _targets(self) -> str | list[str]:
        text = str(self._take("lora_target_modules") or "")
        if not text:
            raise SpecError("Without --lora_target_modules DiffSynth chooses the layers itself: name them.")
        return targets_of(text)

    def _memory(self) -> dict[str, Any]:
        known = {method: (name, "model") for name, method in METHODS.items()}
        known |= {method: pair for pair, method in COMPUTED.items()}
        stored = {"storage": "none", "compute": "model", "text_encoder": "none"}
        for entry in filter(None, str(self._take("quant_options") or "").split(";")):
            model, _, rest = entry.rpartition(":")
            method = rest.partition("/")[0]
            if method in known:
                storage, compute = known[method]
                part = (
                    {"text_encoder": storage} if "text_encoder" in model else {"storage": storage, "compute": compute}
                )
                stored |= part
            else:
                self.notes.append(f"--quant_options with {method}: a spec knows {', '.join(known)}.")
        return {
            **stored,
            "offload": self._offload(),
            "compile": "none",
            "gradient_checkpointing": bool(self._take("use_gradient_checkpointing")),
        }

    def _offload(self) -> str:
        if not self._take("enable_model_cpu_offload"):
            return "none"
        return "group+activations" if self._take("use_gradient_checkpointing_offload") else "group"

    def _save(self, per_step: int) -> dict[str, Any]:
        every = self._take("save_steps")
        if every is None:
            self.notes.append("DiffSynth saves after each epoch; save.every counts steps and is 0: only the last.")
            return {"every": 0}
        steps, rest = divmod(int(str(every)), per_step)
        if rest:
            self.notes.append(f"--save_steps {every} counts images; save.every is {max(1, steps)} optimizer steps.")
        return {"every": max(1, steps)}


def targets_of(text: str) -> str | list[str]:
    """The preset or patterns that mean the same as `--lora_target_modules`.

    One name is a regular expression over whole module names for peft; several, between commas, are ends of names.
    """
    if re.fullmatch(r"[\w.]+(,[\w.]+)+", text):
        ends = sorted(text.split(","))
        for preset, names in _ENDS.items():
            if ends == sorted(names):
                return preset
        return [rf"(.*\.)?{re.escape(name)}" for name in ends]
    patterns = _alternatives(text)
    return next((name for name, own in IDEOGRAM4.targets.items() if own == patterns), patterns)


def _alternatives(text: str) -> list[str]:
    if text.startswith("(?:") and text.endswith(")"):
        parts = text[3:-1].split(")|(?:")
        if len(parts) > 1 and all(_compiles(part) for part in parts):
            return parts
    return [text]


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


#: Preset → ends of names as people list them. The last one's also hit the final layer, which the preset leaves.
_ENDS = {
    "attention": ["attention.qkv", "attention.o"],
    "attention+mlp": ["attention.qkv", "attention.o", *(f"feed_forward.w{n}" for n in "123")],
    "all": ["attention.qkv", "attention.o", *(f"feed_forward.w{n}" for n in "123"), "adaln_modulation"],
}


def _memory_of(memory: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """What a checkpoint is stored in is what it is trained in."""
    stored = PREQUANTIZED.get(checkpoint)
    return memory | ({"storage": stored, "text_encoder": stored} if stored else {})


def _plain(value: Any) -> str | bool:
    return value if isinstance(value, bool) else str(value)
