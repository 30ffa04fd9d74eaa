"""What DiffSynth-Studio 2.1 does with every field of the spec. No torch.

Read and tried in 2.1.12. What can be said in its own arguments is said there; what only its public classes can do
(alpha, seed, the mean and deviation of the noise levels, the weight of an image) our entry asks of them, so with the
option `script`, which runs a checkout's own training script instead, those fall back to DiffSynth's fixed values.
"""

from __future__ import annotations

from typing import Any, Literal

from loraport.planning import SETS, Verdict, VerdictTable
from loraport.spec.models import TrainSpec, leaf_fields, set_fields, value_at

OPTIONS = {
    "script": "path of a checkout's examples/ideogram4/model_training/train.py, to run instead of LoraPort's entry",
    "split": "true or false: encode images and captions first, then train with the transformer alone in memory",
    "arguments": "list of further arguments for DiffSynth, put after all others",
}

#: spec's optimizer → the dotted class that DiffSynth makes with a learning rate and a weight decay.
OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "torch.optim.Adafactor",
    "prodigy": "prodigyopt.Prodigy",
    "lion": "lion_pytorch.Lion",
}

#: spec's storage → DiffSynth's method, for weights that are unpacked for each product.
METHODS = {"fp8": "torchao_fp8_w8a16", "int8": "torchao_int8_w8a16", "nf4": "bitsandbytes_nf4"}
#: The same for products in 8 bits, by storage and compute.
COMPUTED = {("fp8", "fp8"): "comfy_kitchen_fp8_w8a8", ("int8", "int8"): "comfy_kitchen_int8_w8a8"}

#: Hub checkpoints whose weights are stored so already, which DiffSynth then keeps whatever it is told.
PREQUANTIZED = {"ideogram-ai/ideogram-4-fp8": "fp8", "ideogram-ai/ideogram-4-nf4": "nf4"}

MAX_TEXT_TOKENS = 2048  #: DiffSynth's own limit


_NO_WEIGHTS = "a checkout's script knows no weights: set it to 1"


def is_local(spec: TrainSpec) -> bool:
    """Whether a resolved spec's checkpoint is a folder (by then an absolute path) or made on the spot, not a hub id."""
    return spec.model.checkpoint.startswith("/") or spec.model.checkpoint == "tiny"


def is_split(spec: TrainSpec) -> bool:
    """Whether encoding and training are two phases, so that the text encoder and the transformer never meet in memory:
    as the option says, else wherever the spec saves memory and it can be done."""
    chosen = spec.backend.options.get("split")
    if isinstance(chosen, bool):
        return chosen
    memory = spec.memory
    saves = (memory.storage, memory.text_encoder, memory.offload) != ("none", "none", "none")
    return saves and not _cannot_split(spec)


def _cannot_split(spec: TrainSpec) -> bool:
    """A checkout's script keeps the transformer on disk while it encodes, which fails for one stored quantised."""
    return own_script(spec) is not None and spec.model.checkpoint in PREQUANTIZED


def method_of(spec: TrainSpec, part: Literal["transformer", "text_encoder"]) -> str | None:
    """DiffSynth's method of quantising a part, or None where it stays as it is stored."""
    memory = spec.memory
    if spec.model.checkpoint in PREQUANTIZED:
        return None
    if part == "text_encoder":
        return METHODS.get(memory.text_encoder or "none")
    return COMPUTED.get((memory.storage or "none", memory.compute or "model"), METHODS.get(memory.storage or "none"))


def own_script(spec: TrainSpec) -> str | None:
    """The training script of a checkout that is to be run instead of our entry, or None."""
    script = spec.backend.options.get("script")
    return script if isinstance(script, str) else None


def verdicts(spec: TrainSpec, resume: bool = False) -> list[Verdict]:
    """One verdict for each field."""
    table = VerdictTable(spec)
    table.exact("version", "name", reason="names the run and its files")
    _model(table)
    _dataset(table)
    _lora(table)
    _train(table, resume)
    _memory(table)
    _outputs(table)
    table.exact("backend.name", reason="this backend")
    table.exact("backend.python", reason="interpreter that runs DiffSynth; when left out, its environment's")
    _options(table)
    return table.finish()


def _model(table: VerdictTable) -> None:
    model = table.spec.model
    table.choose("model.family", ["ideogram4"], "DiffSynth's Ideogram 4 pipeline", "choose another backend")
    table.exact("model.checkpoint", reason="official layout, as a folder or a Hugging Face id; or tiny")
    if model.revision is None:
        table.exact("model.revision", reason="none asked for")
    elif is_local(table.spec):
        table.ignored("model.revision", reason="a folder has no revisions")
    else:
        table.refused(
            "model.revision",
            reason="DiffSynth downloads the newest only; download that revision and set model.checkpoint to its folder",
        )
    if model.dtype == "bf16":
        table.exact("model.dtype", reason="fixed in DiffSynth, for the LoRA's weights too (no float32 masters)")
    else:
        table.defaulted("model.dtype", reason="bf16: fixed in DiffSynth, for the LoRA's weights too")


def _dataset(table: VerdictTable) -> None:
    spec = table.spec
    table.exact(
        "dataset.path",
        "dataset.caption_ext",
        "dataset.caption_field",
        "dataset.default_caption",
        reason="read in place; DiffSynth gets copies in the run folder and captions as strings in metadata.jsonl",
    )
    table.exact("dataset.trigger_word", reason="placed inside a JSON caption, in front of a plain one")
    table.exact(
        "dataset.repeats",
        "dataset.regularization.path",
        "dataset.regularization.caption_ext",
        "dataset.regularization.repeats",
        reason="one row of metadata.jsonl for each time an image is trained; DiffSynth shuffles all of them together",
    )
    table.exact(
        "dataset.resolution",
        "dataset.aspect_buckets",
        "dataset.upscale",
        "dataset.flip",
        reason="the copies have their final size, so DiffSynth neither scales nor crops them",
    )
    table.exact("dataset.caption_dropout", reason="that share of the rows has an empty caption")
    limit = spec.dataset.max_text_tokens
    if limit == MAX_TEXT_TOKENS or (limit < MAX_TEXT_TOKENS and not own_script(spec)):
        table.exact("dataset.max_text_tokens", reason="a longer caption stops the run, by name")
    else:
        table.defaulted("dataset.max_text_tokens", reason=f"{MAX_TEXT_TOKENS}: fixed in DiffSynth")
    weights = [path for path in set_fields(spec) if path.endswith(".loss_weight")]
    table.exact(SETS, reason="rows of one metadata.jsonl, each image at its set's size and as often as its set says")
    table.exact(*(path for path in set_fields(spec) if path not in weights), reason="for the rows of this set")
    if not own_script(spec) or spec.dataset.regularization.weight == 1:
        table.exact("dataset.regularization.weight", reason="factor on the loss of those rows")
    else:
        table.refused("dataset.regularization.weight", reason=_NO_WEIGHTS)
    if own_script(spec):
        table.refused(*weights, reason=_NO_WEIGHTS)
    else:
        table.exact(*weights, reason="factor on the loss of those rows")


def _lora(table: VerdictTable) -> None:
    lora, script = table.spec.lora, own_script(table.spec)
    table.choose("lora.type", ["lora"], "trained by peft", "DiffSynth trains nothing else: choose lora, or native")
    table.exact("lora.rank", reason="--lora_rank")
    plain = not lora.rslora and lora.effective_alpha == lora.rank
    if script and not plain:
        table.defaulted("lora.alpha", "lora.rslora", reason="alpha = rank: fixed in a checkout's script")
    elif script:
        table.exact("lora.alpha", "lora.rslora", reason="alpha = rank, as DiffSynth fixes it")
    else:
        table.exact("lora.alpha", "lora.rslora", reason="given to DiffSynth's add_lora_to_model as its lora_alpha")
    if lora.dora:
        table.refused("lora.dora", reason="DiffSynth trains no DoRA: set it to false, or choose native")
    else:
        table.exact("lora.dora", reason="not asked for")
    if lora.dropout:
        table.defaulted("lora.dropout", reason="0: DiffSynth has no dropout on the adapter's input")
    else:
        table.exact("lora.dropout", reason="none, as in DiffSynth")
    if script and isinstance(lora.targets, list) and any("," in pattern for pattern in lora.targets):
        table.refused("lora.targets", reason="a checkout's script splits them at commas: write patterns without")
    else:
        table.exact("lora.targets", reason="one regular expression over whole module names; q, k and v are one module")
    if lora.factor == -1:
        table.exact("lora.factor", reason="only for lokr; left at its default")
    else:
        table.ignored("lora.factor", reason="only for lokr")


def _train(table: VerdictTable, resume: bool) -> None:
    spec = table.spec
    train, script = spec.train, own_script(spec)
    table.exact("train.steps", reason="as many rows of metadata.jsonl as are trained, in one epoch")
    if train.batch_size == 1:
        table.exact("train.batch_size", "train.gradient_accumulation", reason="DiffSynth takes image by image")
    else:
        table.approximated(
            "train.batch_size",
            "train.gradient_accumulation",
            reason=f"DiffSynth's batch is always 1: {train.batch_size * train.gradient_accumulation} images are "
            "accumulated one by one, which gives the same mean gradient",
        )
    table.exact("train.learning_rate", reason="--learning_rate")
    if train.optimizer == "adafactor":
        table.approximated("train.optimizer", reason="torch's Adafactor, which scales its rate by each factor's size")
    elif resume:
        table.approximated("train.optimizer", reason="DiffSynth keeps weights only: its state begins anew on resume")
    else:
        table.exact("train.optimizer", reason=f"--customized_optimizer {OPTIMIZERS[train.optimizer]}")
    table.exact("train.weight_decay", reason="--weight_decay")
    if train.lr_scheduler == "constant":
        table.exact("train.lr_scheduler", reason="constant after DiffSynth's own warm-up")
    else:
        table.defaulted("train.lr_scheduler", reason="constant: DiffSynth has no other")
    if train.lr_cycles == 1:
        table.exact("train.lr_cycles", reason="none asked for")
    else:
        table.ignored("train.lr_cycles", reason="only for lr_scheduler: cosine_with_restarts")
    table.defaulted("train.warmup_steps", reason="DiffSynth's first five steps run at a third of the learning rate")
    if train.max_grad_norm:
        table.defaulted("train.max_grad_norm", reason="0: DiffSynth does not clip")
    else:
        table.exact("train.max_grad_norm", reason="no clipping, as in DiffSynth")
    table.exact("train.seed", reason="set before DiffSynth starts: same seed and machine, same LoRA")
    if train.ema_decay:
        table.defaulted("train.ema_decay", reason="0: DiffSynth averages nothing")
    else:
        table.exact("train.ema_decay", reason="off, as in DiffSynth")
    if script:
        table.defaulted(
            "train.timestep_mean",
            "train.timestep_std",
            reason="0 and 1.5, at 1024x1024 for every image, weighted by a Gaussian: fixed in a checkout's script",
        )
    else:
        table.approximated(
            "train.timestep_mean",
            "train.timestep_std",
            reason="a thousand levels of that distribution, shifted for each image's size; DiffSynth's Gaussian weight "
            "in the loss favours those in the middle",
        )


def _memory(table: VerdictTable) -> None:
    spec = table.spec
    memory, stored = spec.memory, PREQUANTIZED.get(spec.model.checkpoint)
    table.exact("memory.profile", "memory.quantize", reason="already filled into the fields below")
    split = "; encoding and training are two phases" if is_split(spec) else ""
    for path, wanted in (("memory.storage", memory.storage), ("memory.text_encoder", memory.text_encoder)):
        if stored and wanted != stored:
            other = next((name for name, kind in PREQUANTIZED.items() if kind == wanted), None)
            table.defaulted(
                path,
                reason=f"{stored}: DiffSynth keeps that checkpoint's weights as they are stored"
                + (f"; for {wanted} train on {other}" if other else "")
                + split,
            )
        elif stored:
            table.exact(path, reason=f"the checkpoint is stored so{split}")
        else:
            how = "--quant_options" if wanted != "none" else "stored as it is"
            table.choose(path, ["none", *METHODS], how + split, "choose one of these")
    _compute(table)
    _offload(table)
    if memory.compile == "none":
        table.exact("memory.compile", reason="no compilation, as in DiffSynth")
    else:
        table.defaulted("memory.compile", reason="none: DiffSynth does not compile")
    if memory.gradient_checkpointing in ("none", "full"):
        table.exact("memory.gradient_checkpointing", reason="--use_gradient_checkpointing, or without it")
    else:
        table.approximated("memory.gradient_checkpointing", reason="full: DiffSynth has no dial")
    if spec.train.gpus == 1:
        table.exact("train.gpus", reason="one process")
    else:
        table.refused(
            "train.gpus",
            reason="DiffSynth's rows, steps and saves are laid out for one process here: set it to 1, or choose native",
        )


def _compute(table: VerdictTable) -> None:
    memory = table.spec.memory
    stored = PREQUANTIZED.get(table.spec.model.checkpoint)
    if memory.compute == "model":
        table.exact("memory.compute", reason="weights are unpacked to bf16 for each product")
    elif stored:
        table.defaulted("memory.compute", reason=f"model: a checkpoint that is stored in {stored} is unpacked to bf16")
    elif (memory.storage, memory.compute) in COMPUTED:
        method = COMPUTED[memory.storage or "", memory.compute or ""]
        table.approximated(
            "memory.compute",
            reason=f"--quant_options {method}: forward, with one scale for all of an activation; backward in bf16",
        )
    else:
        table.refused(
            "memory.compute",
            reason=f"DiffSynth computes in {memory.compute} with weights stored so alone: set memory.storage: "
            f"{memory.compute}, or memory.compute: model",
        )


def _offload(table: VerdictTable) -> None:
    memory = table.spec.memory
    if memory.offload == "none":
        table.exact("memory.offload", reason="everything stays on the device")
    elif memory.offload == "group":
        table.approximated(
            "memory.offload", reason="--enable_model_cpu_offload: single layers visit the device; CUDA only"
        )
    elif memory.offload != "group+activations":
        table.refused("memory.offload", reason="DiffSynth streams from host memory only: set it to group, or none")
    elif memory.gradient_checkpointing == "none":
        table.refused(
            "memory.offload",
            reason="DiffSynth moves only what checkpointing saves: set memory.gradient_checkpointing: full",
        )
    else:
        table.approximated(
            "memory.offload", reason="--enable_model_cpu_offload and --use_gradient_checkpointing_offload; CUDA only"
        )


def _outputs(table: VerdictTable) -> None:
    table.exact("save.every", "save.keep", reason="LoRA weights alone, which is all that DiffSynth saves")
    table.exact("save.dtype", reason="number format of the ComfyUI file; training is in bf16")
    for section, what in (("sample", "draws no samples"), ("validation", "measures no held-out loss")):
        used = bool(value_at(table.spec, f"{section}.every"))
        for path, field in leaf_fields().items():
            if path.startswith(f"{section}."):
                if not used and value_at(table.spec, path) == field.get_default(call_default_factory=True):
                    table.exact(path, reason="not asked for")
                else:
                    table.ignored(path, reason=f"DiffSynth {what} while it trains")


def _options(table: VerdictTable) -> None:
    options = table.spec.backend.options
    unknown = sorted(set(options) - set(OPTIONS))
    wrong = [name for name, right in _TYPES.items() if name in options and not right(options[name])]
    if unknown or wrong:
        known = "; ".join(f"{name}: {what}" for name, what in OPTIONS.items())
        table.refused("backend.options", reason=f"not usable: {', '.join(unknown + wrong)}. Known: {known}")
    elif fixed := [one for one in options.get("arguments", []) if one.partition("=")[0] in _PLACES]:
        table.refused(
            "backend.options",
            reason=f"{', '.join(fixed)}: a run keeps its files together, choose its folder with --out",
        )
    elif is_split(table.spec) and _cannot_split(table.spec):
        table.refused("backend.options", reason="a checkout's script cannot split this checkpoint: leave split out")
    else:
        table.exact("backend.options", reason="only this backend reads them: not portable" if options else "none given")


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


#: Arguments that say where a run's files are, which is not for options to change.
_PLACES = ("--output_path", "--dataset_base_path", "--dataset_metadata_path")
_TYPES = {
    "script": lambda value: isinstance(value, str) and value.startswith("/"),
    "split": lambda value: isinstance(value, bool),
    "arguments": _strings,
}
