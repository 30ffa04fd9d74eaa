"""An ai-toolkit configuration → a spec's content, and what it says that does not happen or cannot be carried. No torch.

Values that ai-toolkit would take from its own defaults are written into the spec, so that the spec means what the
configuration did: a rate of 1e-6, float32, a save every 1000 steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraport.errors import SpecError
from loraport.importing import Imported
from loraport.spec.load import parse_yaml
from loraport_ai_toolkit.capabilities import INT8_COMPUTE, MODULES, PRODIGY_LOWEST_RATE, matching_modules
from loraport_ai_toolkit.known_keys import HARMLESS
from loraport_ai_toolkit.translate import NO_CLIPPING, OWN, TEXT_ENCODER

_DTYPES = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
    "single": "fp32",
}
_OPTIMIZERS = {
    "adamw": "adamw",
    "adamw8bit": "adamw8bit",
    "adafactor": "adafactor",
    "prodigy": "prodigy",
    "lion": "lion",
}
_QUANTIZE = {"qfloat8": "fp8", "float8": "fp8", "int8": "int8", "qint8": "int8"}


def import_config(path: Path) -> Imported:
    """Read an ai-toolkit YAML or JSON file. Raises SpecError for a file that is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}.") from error
    content = (
        json.loads(text) if path.suffix == ".json" and text.lstrip().startswith("{") else parse_yaml(text, str(path))
    )
    config = content.get("config") if isinstance(content, dict) else None
    processes = config.get("process") if isinstance(config, dict) else None
    if not isinstance(processes, list) or not processes or not isinstance(processes[0], dict):
        raise SpecError(f"{path} is no ai-toolkit configuration: it has no config.process list.")
    if not isinstance(processes[0].get("model"), dict):
        raise SpecError(f"{path} is no ai-toolkit training: its process has no model section.")
    found = _Import(content, processes[0])
    if len(processes) > 1:
        found.note(f"config.process has {len(processes)} processes; only the first is imported")
    return Imported(found.spec(), found.notes)


class _Import:
    """One configuration being read: every key is taken, and what is left over is noted."""

    def __init__(self, content: dict[str, Any], process: dict[str, Any]):
        own = content.get(OWN)
        self._own: dict[str, Any] = own if isinstance(own, dict) else {}
        self._name = content["config"].get("name")
        self._process = dict(process)
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(f"{message}.")

    def spec(self) -> dict[str, Any]:
        """The spec's content."""
        model = self._section("model")
        options: dict[str, Any] = {}
        content: dict[str, Any] = {
            "version": 1,
            "name": self._run_name(),
            "model": self._model(model, options),
            "dataset": self._datasets(),
            "lora": self._network(),
            "train": self._train(options),
            "memory": self._memory(model, options),
            "save": self._save(),
            "sample": self._sample(),
            "backend": {"name": "ai-toolkit", "options": self._own.get("options", options)},
        }
        if self._own.get("python"):
            content["backend"]["python"] = self._own["python"]
        if self._validation:
            content["validation"] = self._validation
        content["dataset"]["max_text_tokens"] = self._max_tokens
        if self._trigger and content["dataset"].get("trigger_word") is None:
            content["dataset"]["trigger_word"] = self._trigger
        self._leftovers("", self._process)
        return content

    def _run_name(self) -> str:
        name = self._own.get("name", self._name)
        kept = "".join(one if one.isalnum() or one in "_.-" else "_" for one in str(name or "lora"))[:100]
        if kept != name:
            self.note(f"config.name: {name!r} became {kept!r}, for the spec's names have no spaces")
        self._trigger = self._process.pop("trigger_word", None)
        if "device" in self._process:
            self.note(
                f"device: {self._process.pop('device')!r} is read by nothing in ai-toolkit; "
                f"CUDA_VISIBLE_DEVICES chooses"
            )
        if self._trigger:
            self.note(
                f"trigger_word: ai-toolkit puts {self._trigger!r} in front of every caption without it; before "
                f"a JSON caption "
                "that makes it plain text. The spec's trigger word goes inside the JSON"
            )
        return kept

    def _model(self, model: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        checkpoint = model.pop("name_or_path", None)
        if checkpoint is None:
            raise SpecError("The configuration has no model.name_or_path.")
        arch = model.pop("arch", None)
        if arch != "ideogram4":
            options["arch"] = arch
            self.note(
                f"model.arch: {arch!r} is kept as an option of this backend; the spec's families have no such model"
            )
        arguments = dict(model.pop("model_kwargs", None) or {})
        text_encoder = arguments.pop("text_encoder_path", TEXT_ENCODER)
        if "fp8" in str(text_encoder).lower():
            self.note(
                f"model.model_kwargs.text_encoder_path: {text_encoder} looks like fp8 weights, which ai-toolkit "
                f"loads without "
                f"their scales: wrong text features. It was left out; ai-toolkit's own, {TEXT_ENCODER}, is the "
                f"same in bf16"
            )
        elif text_encoder != TEXT_ENCODER:
            options["text_encoder_path"] = text_encoder
        self._max_tokens = arguments.pop("max_text_length", 3072)
        for name in arguments:
            self.note(f"model.model_kwargs.{name}: read by nothing for Ideogram 4")
        self._seed = self._process.pop("training_seed", None)
        if self._seed is None:
            self.note("training_seed: not given, so each of ai-toolkit's runs differs; the spec has a seed, 42")
        train = self._process.get("train") or {}
        dtype = train.get("dtype", "fp32")
        if "dtype" not in train:
            self.note("train.dtype: not given, so ai-toolkit computes in fp32")
        if model.pop("dtype", dtype) != dtype:
            self.note("model.dtype: ignored by ai-toolkit; train.dtype holds")
        return {"family": "ideogram4", "checkpoint": str(checkpoint), "dtype": self._dtype("train.dtype", dtype)}

    def _memory(self, model: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        quantized = model.pop("quantize", False)
        qtype, quantized_te = model.pop("qtype", "qfloat8"), model.pop("quantize_te", quantized)
        qtype_te = model.pop("qtype_te", "qfloat8")
        quantize, compute = "none", "model"
        if quantized and qtype in ("nf4", "int4", "fp8"):
            self.note(f"model.qtype: {qtype!r} ends ai-toolkit with a KeyError; fp8 (its qfloat8) was taken")
            quantize, qtype = "fp8", "qfloat8"
        elif quantized and qtype == "uint8":
            self.note("model.qtype: 'uint8' quantises nothing")
        elif quantized and qtype == INT8_COMPUTE:
            quantize, compute = "int8", "int8"
        elif quantized and qtype in _QUANTIZE:
            quantize = _QUANTIZE[qtype]
        elif quantized:
            options["qtype"] = qtype
            self.note(f"model.qtype: {qtype!r} has no name in the spec; kept as an option of this backend")
        text_encoder = _QUANTIZE.get(qtype_te) if quantized_te else "none"
        if text_encoder is None:
            options["qtype_te"] = qtype_te
        offloaded = bool(model.pop("layer_offloading", model.pop("auto_memory", False)))
        for part in ("transformer", "text_encoder"):
            name = f"layer_offloading_{part}_percent"
            share = model.pop(name, 1.0)
            if share > 1:
                self.note(f"model.{name}: {share} acts as 1.0; it is a fraction, so {share} percent is {share / 100:g}")
                share = min(1.0, share / 100)
            if offloaded and share != 1.0:
                options[name] = share
        low_vram = model.pop("low_vram", False)
        if bool(low_vram) != (quantize != "none" or "qtype" in options or offloaded):
            options["low_vram"] = bool(low_vram)
        compiled, by_block = model.pop("compile", False), model.pop("block_compile", False)
        self._leftovers("model", model)
        return {
            "storage": quantize,
            "compute": compute,
            "text_encoder": text_encoder or "none",
            "offload": "group" if offloaded else "none",
            "compile": "none" if not compiled else "regional" if by_block else "full",
            "gradient_checkpointing": self._checkpointing,
        }

    def _network(self) -> dict[str, Any]:
        network = self._section("network")
        kind = network.pop("type", "lora")
        rank = network.pop("rank", network.pop("linear", 4))
        network.pop("linear", None)
        alpha = network.pop("linear_alpha", network.pop("alpha", None))
        network.pop("alpha", None)
        if alpha is not None and alpha != rank:
            self.note(f"network.linear_alpha: {alpha} is ignored for Ideogram; alpha is the rank, {rank}")
        lora: dict[str, Any] = {"type": kind, "rank": rank, "dropout": network.pop("dropout", None) or 0.0}
        factor, full = network.pop("lokr_factor", -1), network.pop("lokr_full_rank", True)
        if kind == "lokr":
            lora["factor"] = factor
            if full:
                lora["rank"] = 1024
                self.note(
                    "network.lokr_full_rank: factors are trained whole; the spec's largest rank, 1024, comes nearest"
                )
        elif kind not in ("lora", "lokr"):
            lora["type"] = "lora"
            self.note(f"network.type: {kind!r} is not in the spec; lora was taken")
        lora["targets"] = self._targets(dict(network.pop("network_kwargs", None) or {}))
        self._leftovers("network", network)
        return lora

    def _targets(self, arguments: dict[str, Any]) -> str | list[str]:
        ignored, only = arguments.pop("ignore_if_contains", None) or [], arguments.pop("only_if_contains", None)
        for name in arguments:
            self.note(f"network.network_kwargs.{name} was not carried")
        chosen = [
            module
            for module in MODULES
            if not any(part in f"transformer.{module}" for part in ignored)
            and (only is None or any(part in f"transformer.{module}" for part in only))
        ]
        for preset, patterns in _presets().items():
            if chosen == matching_modules(patterns):
                return preset
        return [module.replace(".", r"\.") for module in chosen] or "all"

    def _train(self, options: dict[str, Any]) -> dict[str, Any]:
        train = self._section("train")
        train.pop("dtype", None)
        accumulation = train.pop("gradient_accumulation", 1)
        old = train.pop("gradient_accumulation_steps", 1)
        steps = train.pop("steps", 1000)
        if old != 1:
            self.note(
                f"train.gradient_accumulation_steps: {old} counts passes as steps, so {steps} steps are "
                f"{steps // old} of the "
                "optimizer; the spec says those"
            )
            accumulation, steps = old, max(1, steps // old)
        if "lr" not in train:
            self.note("train.lr: not given, so ai-toolkit trains with 1e-6")
        optimizer = str(train.pop("optimizer", "adamw")).lower()
        rate = float(train.pop("lr", 1e-6))
        if optimizer.startswith("prodigy") and rate < PRODIGY_LOWEST_RATE:
            self.note(f"train.lr: {rate:g} is run as 1 by ai-toolkit's Prodigy")
            rate = 1.0
        if optimizer not in _OPTIMIZERS:
            self.note(f"train.optimizer: {optimizer!r} is not in the spec; adamw8bit was taken")
        parameters = dict(train.pop("optimizer_params", None) or {})
        decay = parameters.pop("weight_decay", 0.0 if optimizer in ("adafactor", "prodigy", "lion") else 0.01)
        for name in parameters:
            self.note(f"train.optimizer_params.{name} was not carried")
        if train.get("noise_scheduler", "ddpm") != "flowmatch":
            self.note(
                f"train.noise_scheduler: {train.pop('noise_scheduler', 'ddpm')!r} is no schedule for Ideogram "
                f"4; flowmatch was taken"
            )
        norm = train.pop("max_grad_norm", 1.0)
        ema = train.pop("ema_config", None) or {}
        self._checkpointing = train.pop("gradient_checkpointing", True)
        self._no_samples = train.pop("disable_sampling", False)
        train.pop("reg_weight", None)
        self._validation = self._validate(train.pop("validation_config", None))
        timesteps = train.pop("timestep_type", "sigmoid")
        if timesteps != "sigmoid":
            options["timestep_type"] = timesteps
            self.note(
                f"train.timestep_type: {timesteps!r} is kept as an option of this backend; the spec draws a "
                f"logit-normal"
            )
        focus = train.pop("content_or_style", "balanced")
        if focus != "balanced":
            options["content_or_style"] = focus
        schedule = self._schedule(train)
        result = {
            "steps": steps,
            "batch_size": train.pop("batch_size", 1),
            "gradient_accumulation": accumulation,
            "learning_rate": rate,
            "optimizer": _OPTIMIZERS.get(optimizer, "adamw8bit"),
            "weight_decay": decay,
            **schedule,
            "max_grad_norm": 0.0 if norm >= NO_CLIPPING else norm / accumulation,
            "ema_decay": ema.get("ema_decay", 0.999) if ema.get("use_ema") else 0.0,
        }
        if self._seed is not None:
            result["seed"] = self._seed
        self._leftovers("train", train)
        return result

    def _schedule(self, train: dict[str, Any]) -> dict[str, Any]:
        name = train.pop("lr_scheduler", "constant")
        parameters = dict(train.pop("lr_scheduler_params", None) or {})
        if name == "constant_with_warmup":
            return {"lr_scheduler": "constant", "warmup_steps": parameters.get("num_warmup_steps", 1000)}
        if name == "linear" and parameters.get("end_factor") != 0.0:
            self.note("train.lr_scheduler: ai-toolkit's linear rises from a third of the rate; the spec's falls to 0")
        if name not in ("constant", "linear", "cosine", "cosine_with_restarts"):
            self.note(f"train.lr_scheduler: {name!r} is not in the spec; constant was taken")
            name = "constant"
        return {"lr_scheduler": name}

    def _validate(self, config: dict[str, Any] | None) -> dict[str, Any]:
        if not config:
            return {}
        if config.get("validation_items"):
            self.note("train.validation_config: its images are not carried; the spec holds some of the dataset out")
        return {"every": config.get("validate_every_n_steps", 10)}

    def _datasets(self) -> dict[str, Any]:
        raw = [dict(one) for one in self._process.pop("datasets", None) or [] if isinstance(one, dict)]
        own = self._own.get("dataset")
        if isinstance(own, dict):
            return dict(own)
        if all(one.get("is_reg") for one in raw):
            raise SpecError("The configuration has no dataset.")
        squares = [bool(one.pop("square_crop", False)) for one in raw]
        if len(set(squares)) > 1:
            self.note("datasets.square_crop: the spec has it for all sets or none; the first one's was taken")
        sets = [one for each in raw for one in self._sets(each)]
        self.note(
            "datasets: ai-toolkit puts a space after every comma of a caption, and writes its caches into "
            "the dataset's folder; "
            "LoraPort stages the captions so that they are read as written, and the images so that the "
            "folder stays as it is"
        )
        shared = {"aspect_buckets": not squares[0]}
        if len(sets) == 1 and sets[0].get("loss_weight", 1.0) == 1.0:
            return {**shared, **{name: value for name, value in sets[0].items() if name != "loss_weight"}}
        return {**shared, "sets": sets}

    def _sets(self, one: dict[str, Any]) -> list[dict[str, Any]]:
        """A data set at each of its resolutions."""
        regularization = bool(one.pop("is_reg", False))
        extension = str(one.pop("caption_ext", "txt")).lstrip(".")
        if extension not in ("json", "txt", "caption"):
            self.note(f"datasets.caption_ext: {extension!r} is not in the spec; txt was taken")
            extension = "txt"
        sizes = one.pop("resolution", 512)
        default = one.pop("default_caption", None)
        if default is None:
            default = ""
            self.note("datasets.default_caption: without one ai-toolkit trains images without a caption as empty ones")
        found: dict[str, Any] = {
            "path": str(one.pop("folder_path", one.pop("dataset_path", None))),
            "caption_ext": extension,
            "repeats": one.pop("num_repeats", 1),
            "caption_dropout": float(one.pop("caption_dropout_rate", 0.0)),
            "flip": bool(one.pop("flip_x", False)),
            "default_caption": default,
        }
        trigger, factor = one.pop("trigger_word", None), float(one.pop("loss_multiplier", 1.0))
        if trigger:
            found["trigger_word"] = trigger
        if regularization:
            factor *= float((self._process.get("train") or {}).get("reg_weight", 1.0))
            found["regularization"] = True
            self.note(
                "datasets.is_reg: ai-toolkit trains such a set in every other step; the spec mixes it with the others, "
                "by its repeats"
            )
        if factor != 1.0:
            found["loss_weight"] = factor
        if one.pop("shuffle_tokens", False):
            self.note(
                "datasets.shuffle_tokens: cuts captions at their commas and shuffles the parts, which destroys "
                "JSON; left out"
            )
        one.pop("cache_latents_to_disk", None)
        self._leftovers("datasets", one)
        sizes = sizes if isinstance(sizes, list) else [sizes]
        rounded = dict.fromkeys(max(16 * (int(size) // 16), 64) for size in sizes)
        return [{**found, "resolution": size} for size in rounded]

    def _save(self) -> dict[str, Any]:
        save = self._section("save")
        if "dtype" not in save:
            self.note("save.dtype: not given, so ai-toolkit writes float16")
        dtype = self._dtype("save.dtype", save.pop("dtype", "float16"))
        if dtype == "fp16":
            self.note("save.dtype: float16 also rounds what a resumed run goes on from; bf16 or fp32 keep small values")
        every = self._own.get("save_every", save.pop("save_every", 1000))
        save.pop("save_every", None)
        if not self._own and every:
            self.note(
                f"save.save_every: ai-toolkit's save {every} holds {every + 1} optimizer steps; through "
                f"LoraPort it holds {every}"
            )
        keep = save.pop("max_step_saves_to_keep", 5)
        self._leftovers("save", save)
        return {"every": every or 0, "keep": keep, "dtype": dtype}

    def _sample(self) -> dict[str, Any]:
        sample = self._section("sample")
        prompts = [one.get("prompt") for one in sample.pop("samples", None) or [] if isinstance(one, dict)]
        prompts = [str(one) for one in [*prompts, *(sample.pop("prompts", None) or [])] if one]
        every = sample.pop("sample_every", 100)
        result = {
            "every": 0 if self._no_samples or not prompts else every,
            "prompts": prompts,
            "steps": sample.pop("sample_steps", 20),
            "guidance": sample.pop("guidance_scale", 7),
            "width": _sixteenth(sample.pop("width", 512)),
            "height": _sixteenth(sample.pop("height", 512)),
            "seed": sample.pop("seed", 0),
        }
        self._leftovers("sample", sample)
        return result

    def _dtype(self, path: str, value: Any) -> str:
        if value not in _DTYPES:
            self.note(f"{path}: {value!r} is not in the spec; bf16 was taken")
        return _DTYPES.get(value, "bf16")

    def _section(self, name: str) -> dict[str, Any]:
        section = self._process.pop(name, None)
        return dict(section) if isinstance(section, dict) else {}

    def _leftovers(self, section: str, values: dict[str, Any]) -> None:
        """Note each key that is left, unless its value changes nothing."""
        harmless = HARMLESS.get(section, {})
        for key, value in values.items():
            expected = harmless.get(key, None if key in harmless else ())
            same = expected is ... or value == expected or (isinstance(expected, tuple) and value in expected)
            if not same:
                self.note(
                    f"{section + '.' if section else ''}{key}: {value!r} was not carried: no field of the spec "
                    f"says it, and keys that "
                    "ai-toolkit does not know it ignores in silence"
                )


def _sixteenth(side: Any) -> int:
    return max(64, int(side) // 16 * 16)


def _presets() -> dict[str, list[str]]:
    from loraport.ideogram4 import IDEOGRAM4

    return IDEOGRAM4.targets
