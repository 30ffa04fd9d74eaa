"""What the native trainer does with every field of the spec. No torch."""

from __future__ import annotations

from loraport.planning import SETS, Verdict, VerdictTable
from loraport.spec.models import TrainSpec, set_fields, value_at

OPTIONS = {
    "device": "auto, cpu, mps, cuda or cuda:N",
    "deterministic": "true for equal bits on CUDA too, at a cost in speed; a CPU always gives them",
    "memory_limit_gib": "GiB of a CUDA card that torch may take at most, as if the card were smaller",
    "ignore_memory_prediction": "true to start a run that is predicted not to fit the card",
}


_SWITCHES = ("deterministic", "ignore_memory_prediction")
_COMPUTE = {
    "model": "weights are unpacked to model.dtype for each product",
    "fp8": "products of 8-bit floats, forward and backward, of activations scaled as they come",
    "int8": "products of 8-bit integers, forward and backward, of activations scaled as they come",
}
#: What can be computed with weights that are stored so.
_COMPUTES = {"none": ["model"], "fp8": ["model", "fp8"], "int8": ["model", "int8"], "nf4": ["model", "fp8", "int8"]}
_OFFLOAD = {
    "none": "every block stays on the device",
    "group": "blocks are streamed from pinned host memory, ahead of their use, in both directions",
    "group+activations": "blocks are streamed from pinned host memory, and saved activations go there and back",
    "disk": "blocks are streamed from a file that is made of them in the cache folder, read ahead of their use",
}
_COMPILE = {
    "none": "nothing is compiled",
    "regional": "one compilation for all blocks",
    "full": "the whole model in one compilation",
}
_CHECKPOINTING = {
    "none": "no activation is recomputed",
    "selective": "blocks are recomputed in the backward pass, but for what is dear to compute",
    "full": "each block is recomputed in the backward pass",
    "auto": "as many blocks are recomputed as the memory there is asks for",
}


def verdicts(spec: TrainSpec) -> list[Verdict]:
    """One verdict for each field."""
    table = VerdictTable(spec)
    table.exact("version", "name", reason="read as written")
    _model(table)
    _dataset(table)
    _lora(table)
    _train(table)
    _memory(table)
    table.exact("save.every", "save.keep", reason="whole checkpoints under checkpoints/")
    table.exact("save.dtype", reason="number format of the ComfyUI file; training state stays float32")
    table.exact(
        "sample.every",
        "sample.prompts",
        "sample.steps",
        "sample.guidance",
        "sample.width",
        "sample.height",
        "sample.seed",
        reason="drawn by diffusers' Ideogram 4 pipeline into samples/; with guidance other than 1 the unconditional "
        "transformer is loaded for the drawing",
    )
    table.exact(
        "validation.every",
        "validation.images",
        "validation.path",
        reason="loss on held-out images at fixed noise and times, independent of the seed",
    )
    table.exact("backend.name", reason="this backend")
    table.exact("backend.python", reason="interpreter that runs the trainer; this one when left out")
    _options(table)
    return table.finish()


def _model(table: VerdictTable) -> None:
    table.choose(
        "model.family",
        ["ideogram4"],
        "diffusers' Ideogram 4 under the official names",
        "choose another backend",
    )
    table.exact("model.checkpoint", reason="diffusers or official layout, hub id or folder; tiny is made on the spot")
    table.exact("model.revision", reason="passed to the hub")
    table.choose(
        "model.dtype",
        ["bf16", "fp32"],
        "weights and activations; the adapter's masters, RoPE and the loss stay float32",
        "small gradients are lost in fp16, so choose bf16",
    )


def _dataset(table: VerdictTable) -> None:
    table.exact(
        "dataset.path",
        "dataset.caption_ext",
        "dataset.caption_field",
        "dataset.default_caption",
        reason="read in place, never written to",
    )
    table.exact(SETS, reason="mixed in every epoch, each with its own settings and buckets")
    table.exact(*set_fields(table.spec), reason="for the images of this set")
    table.exact("dataset.trigger_word", reason="placed inside a JSON caption, in front of a plain one")
    table.exact("dataset.repeats", reason="each epoch holds every image this many times")
    table.exact(
        "dataset.resolution",
        "dataset.aspect_buckets",
        "dataset.upscale",
        reason="sides in multiples of 16 within the pixel budget",
    )
    table.exact("dataset.flip", reason="mirrored copies are trained beside the originals")
    table.exact("dataset.caption_dropout", reason="an empty caption in that share of samples")
    table.exact("dataset.max_text_tokens", reason="a longer caption stops the run, by name")
    table.exact(
        "dataset.regularization.path",
        "dataset.regularization.caption_ext",
        "dataset.regularization.repeats",
        "dataset.regularization.weight",
        reason="mixed into every epoch, its loss weighted",
    )


def _lora(table: VerdictTable) -> None:
    lora = table.spec.lora
    library = "peft" if lora.type == "lora" else "lycoris-lora"
    table.exact("lora.type", "lora.rslora", reason=f"trained by {library}")
    # LyCORIS does so by itself, and then knows no rank to divide alpha by.
    whole = "; where the rank is half of a factor's side or more, that factor is whole and alpha counts for nothing"
    table.exact("lora.rank", "lora.alpha", reason=f"trained by {library}{whole if lora.type == 'lokr' else ''}")
    table.exact("lora.dora", reason="trained by peft; written so that ComfyUI computes the same weights")
    if lora.dropout and lora.type != "lora":
        table.refused("lora.dropout", reason=f"lycoris-lora has no input dropout for {lora.type}: set it to 0")
    else:
        table.exact("lora.dropout", reason="on the adapter's input")
    table.exact("lora.targets", reason="q, k and v are one fused module, as in the official checkpoint and ComfyUI")
    if lora.type == "lokr":
        table.exact("lora.factor", reason="passed to lycoris-lora")
    elif lora.factor == -1:
        table.exact("lora.factor", reason="only for lokr; left at its default")
    else:
        table.ignored("lora.factor", reason=f"only for lokr, and lora.type is {lora.type}")


def _train(table: VerdictTable) -> None:
    table.exact(
        "train.gpus",
        reason="one process a GPU; a step takes batch_size × gradient_accumulation × gpus images, as on one GPU that "
        "accumulates gpus times as much",
    )
    table.exact("train.steps", "train.batch_size", "train.gradient_accumulation", reason="steps are optimizer steps")
    table.exact("train.learning_rate", "train.weight_decay", reason="passed to the optimizer")
    libraries = {
        "adamw": "torch",
        "adamw8bit": "bitsandbytes",
        "adafactor": "transformers, with a given rate",
        "prodigy": "prodigyopt",
        "lion": "lion-pytorch",
    }
    table.exact("train.optimizer", reason=f"from {libraries[table.spec.train.optimizer]}; float32 master weights")
    if table.spec.train.lr_scheduler == "cosine_with_restarts" or table.spec.train.lr_cycles == 1:
        table.exact("train.lr_cycles", reason="restarts of cosine_with_restarts")
    else:
        table.ignored("train.lr_cycles", reason="only for lr_scheduler: cosine_with_restarts")
    table.exact("train.lr_scheduler", "train.warmup_steps", reason="diffusers' schedules, over optimizer steps")
    table.exact("train.max_grad_norm", reason="global norm over the adapter")
    table.exact(
        "train.seed",
        reason="same seed and machine, same LoRA: bit for bit on a CPU, and on CUDA with backend.options.deterministic",
    )
    table.exact("train.ema_decay", reason="the average is what is validated, sampled and saved")
    table.exact("train.timestep_mean", "train.timestep_std", reason="logit-normal, shifted for each image's size")


def _memory(table: VerdictTable) -> None:
    memory, on_mps = table.spec.memory, table.spec.backend.options.get("device") == "mps"
    table.exact("memory.profile", "memory.quantize", reason="already filled into the fields below")
    if on_mps and memory.storage != "none":
        table.refused("memory.storage", reason="quantised weights need CUDA or a CPU: on MPS set it to none")
    else:
        table.exact("memory.storage", reason="the blocks' frozen weights; the layers around them keep model.dtype")
    _choose(table, "memory.compute", {name: _COMPUTE[name] for name in _COMPUTES[memory.storage or "none"]})
    table.exact("memory.text_encoder", reason="the text encoder's blocks, while captions are encoded; then it is freed")
    if on_mps and memory.offload != "none":
        table.refused("memory.offload", reason="blocks are streamed to a CUDA card only: on MPS set it to none")
    else:
        _choose(table, "memory.offload", _OFFLOAD)
    if memory.compile == "full" and memory.offload != "none":
        table.refused(
            "memory.compile",
            reason=f"memory.offload: {memory.offload} fetches blocks one by one, for which the graph of a whole model "
            "has no place: set it to regional",
        )
    else:
        _choose(table, "memory.compile", _COMPILE)
    checkpointing = memory.gradient_checkpointing or "none"
    if memory.offload != "group+activations":
        table.exact("memory.gradient_checkpointing", reason=_CHECKPOINTING[checkpointing])
    elif checkpointing in ("full", "auto"):
        table.exact("memory.gradient_checkpointing", reason="from each block's input, which waits in host memory")
    else:
        table.defaulted(
            "memory.gradient_checkpointing",
            reason="full: of activations, each block's input waits in host memory, and the rest is recomputed from it",
        )


def _choose(table: VerdictTable, path: str, reasons: dict[str, str]) -> None:
    """Exact with the value's reason where there is one, else refused with the values that have one."""
    table.choose(path, reasons, reasons.get(value_at(table.spec, path), ""), "choose one of these")


def _options(table: VerdictTable) -> None:
    unknown = sorted(set(table.spec.backend.options) - set(OPTIONS))
    if unknown:
        known = "; ".join(f"{name}: {values}" for name, values in OPTIONS.items())
        table.refused("backend.options", reason=f"not known here: {', '.join(unknown)}. Known: {known}")
    elif wrong := [name for name in _SWITCHES if not isinstance(table.spec.backend.options.get(name, False), bool)]:
        table.refused("backend.options", reason=f"{' and '.join(wrong)}: true or false")
    elif not _is_positive(table.spec.backend.options.get("memory_limit_gib", 1)):
        table.refused("backend.options", reason="memory_limit_gib is a number above 0")
    elif table.spec.backend.options:
        table.exact("backend.options", reason="only this backend reads them: not portable")
    else:
        table.exact("backend.options", reason="none given")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
