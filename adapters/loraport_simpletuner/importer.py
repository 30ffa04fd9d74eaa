"""SimpleTuner's configuration folder → a spec, with notes of what could not be carried."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from loraport.errors import SpecError
from loraport.importing import Imported
from loraport_simpletuner import mapping

_OPTIMIZERS = {theirs: ours for ours, theirs in mapping.OPTIMIZERS.items()} | {
    "adamw_bf16": "adamw",
    "optimi-adamw": "adamw",
    "ao-adamw8bit": "adamw8bit",
    "optimi-lion": "lion",
    "bnb-lion8bit": "lion",
}
_SAME = {name: name for name in ("adamw", "adamw8bit", "lion", "adafactor", "prodigy")}
#: Their values when the file leaves them out, where they differ from the spec's.
_DEFAULTS: dict[str, Any] = {
    "lora_rank": 16,
    "lora_dropout": 0.1,
    "learning_rate": 4e-7,
    "train_batch_size": 4,
    "caption_dropout_probability": 0.1,
    "max_grad_norm": 2.0,
    "checkpoint_step_interval": 500,
    "checkpoints_total_limit": 5,
    "lr_scheduler": "constant_with_warmup",
    "resolution": 1024,
    "resolution_type": "pixel_area",
    "gradient_checkpointing": True,
    "optimizer": "adamw_bf16",
    "grad_clip_method": "value",
    "validation_step_interval": 100,
}
_PRECISIONS = {theirs: ours for ours, theirs in mapping.PRECISIONS.items()} | {
    "int8-quanto": ("int8", "model"),
    "fp8-quanto": ("fp8", "model"),
}
_TEXT_ENCODER = {
    "no_change": "none",
    "fp8wo-torchao": "fp8",
    "fp8-torchao": "fp8",
    "fp8-quanto": "fp8",
    "int8-torchao": "int8",
    "int8-quanto": "int8",
}
#: Keys that say nothing a spec could hold, or that this adapter always writes the same.
_SILENT = frozenset(
    [
        "model_family",
        "model_type",
        "model_flavour",
        "output_dir",
        "data_backend_config",
        "resume_from_checkpoint",
        "cache_dir",
        "cache_dir_text",
        "cache_dir_vae",
        "lora_type",
        "lora_init_type",
        "lora_format",
        "num_train_epochs",
        "lr_end",
        "use_ema",
        "flow_schedule_shift",
        "offset_noise",
        "input_perturbation",
        "resolution_type",
        "aspect_bucket_alignment",
        "caption_strategy",
        "ideogram_auto_json",
        "ideogram_prompt_upsample",
        "text_embed_full_cache",
        "disable_bucket_pruning",
        "quantize_via",
        "vae_dtype",
        "base_model_default_dtype",
        "group_offload_type",
        "group_offload_blocks_per_group",
        "group_offload_use_stream",
        "validation_disable",
        "validation_disable_unconditional",
        "validation_negative_prompt",
        "num_validation_images",
        "eval_timesteps",
        "num_eval_images",
        "eval_dataset_pooling",
        "ideogram_load_unconditional_transformer",
        "report_to",
        "disable_benchmark",
        "push_to_hub",
        "attention_mechanism",
    ]
)


def import_config(path: Path) -> Imported:
    """Read a folder with config.json (and multidatabackend.json, lycoris_config.json), or that config.json.

    Raises SpecError when it is no SimpleTuner configuration of an Ideogram LoRA.
    """
    file = path / "config.json" if path.is_dir() else path
    raw = _read(file)
    if not isinstance(raw, dict):
        raise SpecError(f"{file} is not a SimpleTuner configuration: it is no mapping.")
    config = {str(key).lstrip("-"): value for key, value in raw.items()}
    if "model_family" not in config or "model_type" not in config:
        raise SpecError(f"{file} is not a SimpleTuner configuration: model_family and model_type are missing.")
    if config["model_family"] != "ideogram" or config["model_type"] != "lora":
        raise SpecError(
            f"{file} trains a {config['model_type']} of {config['model_family']}; only Ideogram LoRAs are imported."
        )
    return _Import(file.parent, config).run()


class _Import:
    def __init__(self, folder: Path, config: dict[str, Any]):
        self.folder, self.config = folder, config
        self.notes: list[str] = []
        self.read: set[str] = set()
        self.sets = self._data_sets()

    def run(self) -> Imported:
        carried = self._carried()
        content: dict[str, Any] = {
            "version": 1,
            "name": carried.get("name", "imported"),
            "model": {"family": "ideogram4"} | self._model() | carried.get("model", {}),
            "dataset": self._whole_dataset(carried.get("dataset")),
            "lora": self._lora(),
            "train": self._train() | carried.get("train", {}),
            "memory": self._memory() | carried.get("memory", {}),
            "save": {"every": self.get("checkpoint_step_interval"), "keep": self.get("checkpoints_total_limit")}
            | carried.get("save", {}),
            "sample": self._sample() | carried.get("sample", {}),
            "validation": self._validation() | carried.get("validation", {}),
            "backend": carried.get("backend", {"name": "simpletuner"}),
        }
        own = carried.get("backend", {}).get("options", {}).get("config", {})
        for key, value in self.config.items():
            if key not in self.read and key not in _SILENT and key not in own:
                self.note(key, value, "the spec has no such field")
        return Imported(content, self.notes)

    def get(self, key: str) -> Any:
        """A key's value, or what SimpleTuner takes without it, which is noted."""
        self.read.add(key)
        if key in self.config:
            return self.config[key]
        if key in _DEFAULTS:
            self.notes.append(f"{key} is not set; SimpleTuner's default, {_DEFAULTS[key]!r}, was taken")
        return _DEFAULTS.get(key)

    def take(self, key: str, default: Any = None) -> Any:
        """A key's value, or `default`, with nothing to note."""
        self.read.add(key)
        return self.config.get(key, default)

    def note(self, key: str, value: Any, why: str) -> None:
        self.notes.append(f"{key}: {value!r} was not carried: {why}")

    def _carried(self) -> dict[str, Any]:
        """What LoraPort kept beside files of its own making."""
        file = self.folder.parent / "launch.json"
        if not file.is_file():
            return {}
        content = _read(file)
        found = content.get("carried") if isinstance(content, dict) else None
        return found if isinstance(found, dict) else {}

    def _model(self) -> dict[str, Any]:
        flavour = self.take("model_flavour", "fp8")
        checkpoint = self.take("pretrained_model_name_or_path") or mapping.OFFICIAL.get(
            flavour, mapping.OFFICIAL["fp8"]
        )
        precision = self.take("mixed_precision", "bf16")
        dtypes = {"bf16": "bf16", "no": "fp32", "fp16": "fp16"}
        if precision not in dtypes:
            self.note("mixed_precision", precision, "the spec knows bf16, fp16 and fp32")
        revision = self.take("revision")
        return {"checkpoint": checkpoint, "dtype": dtypes.get(precision, "bf16")} | (
            {"revision": revision} if revision else {}
        )

    def _whole_dataset(self, carried: dict[str, Any] | None) -> dict[str, Any]:
        """The data sets as they are written; of our own making, as the spec had them, with nothing to note."""
        told = len(self.notes)
        found = self._dataset()
        if carried is None:
            return found
        del self.notes[told:]
        return found | carried

    def _dataset(self) -> dict[str, Any]:
        sets = [each for each in self.sets if each.get("dataset_type", "image") == "image"]
        for each in self.sets:
            if each not in sets and each.get("dataset_type") not in ("eval", "text_embeds", "image_embeds"):
                self.note("data set", each.get("id"), f"the spec has none of the kind {each.get('dataset_type')!r}")
        first = sets[0] if sets else {}
        if first.get("instance_data_dir") is None:
            self.notes.append("no image data set with an instance_data_dir was found; dataset.path must be set")
        content: dict[str, Any] = {
            "aspect_buckets": not first.get("crop", False) or first.get("crop_aspect", "square") != "square",
            "upscale": True,
            "caption_dropout": self.get("caption_dropout_probability"),
        }
        sampling = self.take("data_backend_sampling", "auto-weighting")
        if len(sets) < 2:
            return content | self._set(first)
        content["sets"] = [self._set(each) | self._how_often(each, sampling) for each in sets]
        self.notes = list(dict.fromkeys(self.notes))
        return content

    def _set(self, each: dict[str, Any]) -> dict[str, Any]:
        """A set of images without how often it is drawn, but for its repeats."""
        found: dict[str, Any] = {
            "path": str(each.get("instance_data_dir") or "./images"),
            "caption_ext": "txt",
            "repeats": int(each.get("repeats") or 0) + 1,
            "resolution": self._resolution(each),
        }
        self._captions(each, found)
        return found

    def _how_often(self, each: dict[str, Any], sampling: str) -> dict[str, Any]:
        """A weight where sets are drawn by probability, and what else tells one of several sets from the others."""
        found: dict[str, Any] = {}
        if each.get("is_regularisation_data") or each.get("is_regularization_data"):
            found["regularization"] = True
            self.notes.append(
                f"data set {each.get('id')}: is_regularisation_data compares with the base model's prediction there; "
                "the spec trains the images as they are"
            )
        if sampling == "uniform":
            found |= {"weight": float(each.get("probability", 1)), "repeats": None}
            self.notes.append(
                "data sets are drawn by probability until they are used up there; in the spec these are the weights of "
                "the sets in every epoch, instead of repeats"
            )
        elif each.get("probability", 1) != 1:
            self.note("probability", each["probability"], "with auto-weighting sets are drawn by their sizes")
        return found

    def _data_sets(self) -> list[dict[str, Any]]:
        named = self.take("data_backend_config")
        candidates = [self.folder / Path(named).name if named else None, self.folder / "multidatabackend.json"]
        if named:
            candidates.append(Path(named) if Path(named).is_absolute() else self.folder.parent / named)
        file = next((each for each in candidates if each is not None and each.is_file()), None)
        if file is None:
            self.notes.append("multidatabackend.json was not found, so the images are not known")
            return []
        content = _read(file)
        if not isinstance(content, list):
            raise SpecError(f"{file} is not a list of data sets.")
        return [each for each in content if isinstance(each, dict) and not each.get("disabled")]

    def _captions(self, first: dict[str, Any], content: dict[str, Any]) -> None:
        strategy = first.get("caption_strategy", self.take("caption_strategy", "filename"))
        prompt = first.get("instance_prompt", self.take("instance_prompt"))
        if strategy in ("instanceprompt", "instance_prompt"):
            content["default_caption"] = prompt
            self.notes.append("every image has one caption: dataset.default_caption, for images without a .txt file")
        elif strategy != "textfile":
            self.note("caption_strategy", strategy, "captions are read from .txt files beside the images")
        if strategy == "textfile" and (first.get("prepend_instance_prompt") or self.take("prepend_instance_prompt")):
            content["trigger_word"] = prompt
            self.notes.append("the prepended instance prompt became dataset.trigger_word")

    def _resolution(self, first: dict[str, Any]) -> int:
        value = first.get("resolution", self.get("resolution"))
        self.read.add("resolution")
        kind = first.get("resolution_type", self.take("resolution_type", "pixel_area"))
        side = math.sqrt(float(value) * 1e6) if kind == "area" else float(value)
        rounded = max(64, round(side / 16) * 16)
        if kind == "pixel" and first.get("crop_aspect") != "square":
            self.notes.append("resolution_type: pixel is the shorter side there; the spec's is a pixel budget")
        if kind == "area":
            rounded = mapping.square_side(rounded)
        if rounded != side:
            self.notes.append(f"resolution {value} ({kind}) became {rounded}")
        return rounded

    def _lora(self) -> dict[str, Any]:
        if str(self.take("lora_type", "standard")).lower() == "lycoris":
            return self._lycoris()
        rank = self.get("lora_rank")
        alpha = self.take("lora_alpha")
        content: dict[str, Any] = {
            "type": "lora",
            "rank": rank,
            "alpha": rank if alpha is None else alpha,
            "dropout": self.get("lora_dropout"),
            "dora": bool(self.take("use_dora", False)),
        }
        names = self.take("peft_lora_target_modules")
        if isinstance(names, str):
            names = _inline(names)
        if isinstance(names, list) and names:
            content["targets"] = mapping.spec_targets([str(name) for name in names])
        return content

    def _lycoris(self) -> dict[str, Any]:
        named = Path(self.take("lycoris_config", "lycoris_config.json")).name
        file = self.folder / named
        if not file.is_file():
            raise SpecError(f"{file} is missing, which lora_type: lycoris needs.")
        self.read |= {"lora_rank", "lora_alpha", "lora_dropout", "use_dora", "peft_lora_target_modules"}
        content = _read(file)
        algo = content.get("algo") if isinstance(content, dict) else None
        if algo not in ("lokr", "loha"):
            raise SpecError(f"{file}: the LyCORIS algorithm {algo!r} cannot be imported, only lokr and loha.")
        rank = int(content.get("linear_dim", 4))
        lora: dict[str, Any] = {"type": algo, "rank": rank, "alpha": int(content.get("linear_alpha", 1))}
        if algo == "lokr":
            lora["factor"] = content.get("factor", -1)
        preset = content.get("apply_preset") or {}
        patterns = preset.get("target_name")
        if patterns and not preset.get("target_module") and not preset.get("use_fnmatch"):
            plain = [str(pattern).removeprefix("(?:").removesuffix(")$") for pattern in patterns]
            lora["targets"] = mapping.spec_targets(plain, whole=True)
        elif preset:
            self.note("apply_preset", preset, "only target_name patterns can be; lora.targets is the spec's default")
        for key in sorted(
            set(content) - {"algo", "multiplier", "linear_dim", "linear_alpha", "factor", "apply_preset"}
        ):
            self.note(f"{named}: {key}", content[key], "the spec has no such field")
        return lora

    def _train(self) -> dict[str, Any]:
        steps = self.take("max_train_steps")
        if not steps:
            steps = 1000
            self.notes.append("training is measured in epochs there (num_train_epochs); train.steps is 1000")
        theirs = self.get("optimizer")
        optimizer = (_OPTIMIZERS | _SAME).get(theirs)
        if optimizer is None or mapping.OPTIMIZERS[optimizer] != theirs:
            self.note("optimizer", theirs, f"{optimizer or 'adamw8bit'} was taken")
        if self.get("grad_clip_method") != "norm":
            self.note("grad_clip_method", self.config.get("grad_clip_method", "value"), "the spec clips by norm")
        if self.take("use_ema"):
            self.note("use_ema", True, "SimpleTuner's final LoRA holds the plain weights")
        self.read.add("ema_decay")
        return {
            "steps": int(steps),
            "gpus": int(self.take("num_processes") or 1),
            "batch_size": self.get("train_batch_size"),
            "gradient_accumulation": self.take("gradient_accumulation_steps", 1),
            "learning_rate": float(self.get("learning_rate")),
            "optimizer": optimizer or "adamw8bit",
            "weight_decay": self._weight_decay(),
            **self._schedule(int(steps)),
            "max_grad_norm": self.get("max_grad_norm"),
            "seed": self.take("seed", 42),
            "timestep_mean": self.take("ideogram_schedule_mu", 0.0),
            "timestep_std": self.take("ideogram_schedule_std", 1.5),
        }

    def _weight_decay(self) -> float:
        decay = 0.01
        for option in str(self.take("optimizer_config") or "").split(","):
            name, _, value = option.partition("=")
            if name == "weight_decay":
                decay = float(value)
            elif name:
                self.note("optimizer_config", option, "only weight_decay can be")
        return decay

    def _schedule(self, steps: int) -> dict[str, Any]:
        theirs = self.get("lr_scheduler")
        warmup, cycles = int(self.take("lr_warmup_steps", 0) or 0), int(self.take("lr_num_cycles", 1))
        if theirs in ("cosine", "cosine_with_restarts"):
            wave = warmup or 1000
            if theirs == "cosine" and wave != steps:
                self.notes.append(f"cosine has a half wave of {wave} steps there; the spec's ends with the training")
            if theirs == "cosine_with_restarts":
                cycles = max(1, round(steps / wave))
            return {"lr_scheduler": theirs, "lr_cycles": cycles, "warmup_steps": 0}
        known = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear"}
        if theirs not in known:
            self.note("lr_scheduler", theirs, "constant was taken")
        return {"lr_scheduler": known.get(theirs, "constant"), "lr_cycles": cycles, "warmup_steps": warmup}

    def _memory(self) -> dict[str, Any]:
        precision = self.take("base_model_precision", "no_change")
        upcast, flavour = bool(self.take("ideogram_fp8_base_upcast", False)), self.config.get("model_flavour", "fp8")
        if precision == "no_change":
            storage, compute = ("none" if upcast else str(flavour)), "model"
        elif precision in _PRECISIONS:
            storage, compute = _PRECISIONS[precision]
        else:
            storage, compute = "fp8", "model"
            why = "quantises nothing of Ideogram" if precision == "nf4-bnb" else "is not in the spec"
            self.note("base_model_precision", precision, f"{why}; fp8 was taken")
        text_encoder = self.take("text_encoder_1_precision", "no_change")
        if text_encoder not in _TEXT_ENCODER:
            self.note("text_encoder_1_precision", text_encoder, "none was taken")
        if self.take("musubi_blocks_to_swap") or self.take("ramtorch"):
            self.notes.append("musubi_blocks_to_swap and ramtorch do nothing for Ideogram; memory.offload is none")
        return {
            "storage": storage,
            "compute": compute,
            "text_encoder": _TEXT_ENCODER.get(text_encoder, "none"),
            "offload": self._offload(),
            "compile": self._compile(),
            "gradient_checkpointing": self._checkpointing(),
        }

    def _offload(self) -> str:
        unsloth = str(self.take("gradient_checkpointing_backend", "torch")).startswith("unsloth")
        on_disk = self.take("group_offload_to_disk_path")
        if self.take("enable_group_offload", False):
            return "disk" if on_disk else "group+activations" if unsloth else "group"
        if unsloth:
            self.notes.append("gradient_checkpointing_backend: unsloth: the spec offloads activations with blocks only")
        return "none"

    def _compile(self) -> str:
        regional = self.take("dynamo_use_regional_compilation", False)
        if self.take("dynamo_backend", "no") in ("no", "", None):
            return "none"
        return "regional" if regional else "full"

    def _checkpointing(self) -> str:
        interval = int(self.take("gradient_checkpointing_interval") or 1)
        if not self.get("gradient_checkpointing"):
            return "none"
        return "full" if interval == 1 else "selective"

    def _sample(self) -> dict[str, Any]:
        drawn = bool(self.take("ideogram_validation", False)) and not self.take("validation_disable", False)
        prompts: list[str] = []
        library = self.take("user_prompt_library")
        if library and (self.folder / Path(library).name).is_file():
            found = _read(self.folder / Path(library).name)
            prompts = [text for text in found.values() if isinstance(text, str)] if isinstance(found, dict) else []
        elif self.take("validation_prompt"):
            prompts = [self.config["validation_prompt"]]
        content: dict[str, Any] = {
            "every": int(self.get("validation_step_interval")) if drawn and prompts else 0,
            "prompts": prompts,
            "steps": self.take("validation_num_inference_steps", 28),
            "guidance": self.take("validation_guidance", 7.0),
            "seed": self.take("validation_seed") or 0,
        }
        width, _, height = str(self.take("validation_resolution", "1024x1024")).partition("x")
        if width.isdigit() and (height or width).isdigit() and int(width) % 16 == 0 == int(height or width) % 16:
            return content | {"width": int(width), "height": int(height or width)}
        self.note("validation_resolution", self.config["validation_resolution"], "1024 × 1024 was taken")
        return content

    def _validation(self) -> dict[str, Any]:
        every = self.take("eval_steps_interval")
        held_out = [each for each in self.sets if each.get("dataset_type") == "eval"]
        if not every or not held_out:
            return {}
        return {"every": int(every), "path": held_out[0].get("instance_data_dir")}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SpecError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise SpecError(f"{file} is not JSON: {error}.") from error


def _inline(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return [part.strip() for part in text.split(",") if part.strip()]
