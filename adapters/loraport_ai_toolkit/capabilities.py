"""What ai-toolkit does with every field of the spec. No torch."""

from __future__ import annotations

import re
from itertools import product

from loraport.planning import SETS, Verdict, VerdictTable
from loraport.sets import image_sets
from loraport.spec.models import TrainSpec, leaf_fields, set_fields, value_at

#: Below this rate ai-toolkit runs Prodigy at 1.
PRODIGY_LOWEST_RATE = 0.1

#: Ways that ai-toolkit stores frozen weights, by the spec's name, to be unpacked for each product.
QTYPES = {"fp8": "qfloat8", "int8": "int8"}
#: Its int8 with products in int8: weights and activations are rotated first, so that one scale a row is enough.
INT8_COMPUTE = "convrot8"

_FRACTION = "0 to 1"
OPTIONS = {
    "device": "auto, cpu or cuda:N",
    "arch": "ai-toolkit's name of the architecture, for an extension of your own",
    "text_encoder_path": "hub id or folder of the text encoder with its tokenizer",
    "qtype": "ai-toolkit's quantisation of the transformer, such as uint4 or orbit4, instead of memory.storage's",
    "qtype_te": "the same for the text encoder",
    "layer_offloading_transformer_percent": f"share of its layers that wait in host memory, {_FRACTION}",
    "layer_offloading_text_encoder_percent": f"share of its layers that wait in host memory, {_FRACTION}",
    "low_vram": "true or false",
    "timestep_type": "sigmoid, linear, weighted, shift, lognorm_blend …",
    "content_or_style": "balanced, content or style",
    "cache_latents_to_disk": "true or false",
}

#: Linear layers that a LoRA can be on, in Ideogram 4's 34 blocks.
MODULES = tuple(
    f"layers.{layer}.{part}"
    for layer, part in product(
        range(34),
        (
            "attention.qkv",
            "attention.o",
            "feed_forward.w1",
            "feed_forward.w2",
            "feed_forward.w3",
            "adaln_modulation",
        ),
    )
)


#: ai-toolkit's key in a data set for what the spec's says.
_OF_SETS = {
    "resolution": "resolution",
    "repeats": "num_repeats",
    "flip": "flip_x",
    "caption_dropout": "caption_dropout_rate",
    "loss_weight": "loss_multiplier",
}
_COMMAS = (
    "ai-toolkit puts a space after every comma; staged so that only commas without one gain it, and the run names "
    "those captions"
)
#: What happens to captions, by the extension of their files.
_CAPTIONS = {
    "json": "staged with commas escaped, so that a caption after Ideogram's rules is read as it is; ai-toolkit "
    "rewrites others after those rules, and the run names them",
    "txt": _COMMAS,
    "caption": _COMMAS,
}


def matching_modules(patterns: list[str]) -> list[str]:
    """The modules of the blocks that any of some patterns matches whole."""
    return [module for module in MODULES if any(re.fullmatch(pattern, module) for pattern in patterns)]


def verdicts(spec: TrainSpec) -> list[Verdict]:
    """One verdict for each field."""
    table = VerdictTable(spec)
    table.exact("version", "name", reason="read as written")
    _model(table)
    _dataset(table)
    _lora(table)
    _train(table)
    _memory(table)
    _outputs(table)
    table.exact("backend.name", reason="this backend")
    table.exact("backend.python", reason="interpreter that runs ai-toolkit; its own environment's when left out")
    _options(table)
    return table.finish()


def _model(table: VerdictTable) -> None:
    model = table.spec.model
    table.choose("model.family", ["ideogram4"], "ai-toolkit's arch ideogram4", "choose another backend")
    if model.checkpoint == "tiny":
        table.exact("model.checkpoint", reason="written into the run folder; ai-toolkit is started with its sizes")
    elif "nf4" in model.checkpoint.lower():
        table.refused("model.checkpoint", reason="nf4 weights cannot be read: use ideogram-ai/ideogram-4-fp8")
    else:
        table.exact(
            "model.checkpoint",
            reason="official layout, bf16 or fp8 (unpacked to model.dtype); the text encoder is "
            "Qwen/Qwen3-VL-8B-Instruct "
            "unless the folder holds one in bf16 or options.text_encoder_path names one",
        )
    if model.revision is None:
        table.exact("model.revision", reason="none given")
    else:
        table.refused(
            "model.revision",
            reason="ai-toolkit takes the newest revision: download the one you want and give its folder as "
            "model.checkpoint",
        )
    table.choose(
        "model.dtype",
        ["bf16", "fp32"],
        "weights and activations; the adapter is trained in float32",
        "small gradients are lost in fp16, which is not scaled here, so choose bf16",
    )


def _dataset(table: VerdictTable) -> None:
    dataset = table.spec.dataset
    table.exact("dataset.path", reason="staged as links in the run folder; ai-toolkit's caches come to lie there")
    table.approximated("dataset.caption_ext", reason=_CAPTIONS[dataset.caption_ext])
    if dataset.caption_field is None:
        table.exact("dataset.caption_field", reason="captions are in files")
    else:
        table.approximated("dataset.caption_field", reason=_CAPTIONS["txt"])
    table.exact("dataset.default_caption", reason="staged as the image's caption")
    table.exact(
        "dataset.trigger_word",
        reason="placed inside a JSON caption, in front of a plain one; ai-toolkit, which would put it before the JSON, "
        "is not told it",
    )
    table.exact("dataset.repeats", reason="each epoch holds every image this many times")
    table.exact("dataset.resolution", reason="the pixel budget, sides in multiples of 16")
    if dataset.aspect_buckets:
        table.approximated(
            "dataset.aspect_buckets",
            reason="sizes are chosen by area first and shape second, so a size may differ by 16 pixels from native's",
        )
    else:
        table.exact("dataset.aspect_buckets", reason="square_crop, around the centre")
    if dataset.upscale != dataset.aspect_buckets:
        kept = "small images keep their size" if dataset.aspect_buckets else "squares are always filled"
        table.exact("dataset.upscale", reason=kept)
    elif dataset.upscale:
        table.ignored("dataset.upscale", reason="with aspect buckets a small image is never enlarged")
    else:
        table.ignored("dataset.upscale", reason="squares are always filled, so small images are enlarged")
    table.exact("dataset.flip", reason="mirrored copies are trained beside the originals")
    table.exact("dataset.caption_dropout", reason="an empty caption in that share of samples")
    table.exact(
        "dataset.max_text_tokens", reason="a longer caption ends the run before ai-toolkit, which cuts it, starts"
    )
    _regularization(table)
    _sets(table)


def _regularization(table: VerdictTable) -> None:
    used = table.spec.dataset.regularization
    if used.path is None:
        table.exact("dataset.regularization.path", reason="no regularisation set")
        for name in ("caption_ext", "repeats", "weight"):
            _unused(table, f"dataset.regularization.{name}", "there is no regularisation set")
        return
    table.exact("dataset.regularization.path", reason="staged like the dataset, and mixed with it")
    table.approximated("dataset.regularization.caption_ext", reason=_CAPTIONS[used.caption_ext])
    table.exact("dataset.regularization.repeats", reason="each epoch holds every image this many times")
    table.exact("dataset.regularization.weight", reason="loss_multiplier")


def _sets(table: VerdictTable) -> None:
    """What each set of images says itself."""
    table.exact(SETS, reason="a list of data sets, of which every epoch is mixed; a batch is of one set and one size")
    spec = table.spec
    for path in set_fields(spec):
        name = path.rpartition(".")[2]
        if name in ("caption_ext", "caption_field"):
            table.approximated(path, reason=_CAPTIONS[value_at(spec, path) if name == "caption_ext" else "txt"])
        elif name == "weight":
            table.exact(path, reason="num_repeats, filled in when the run has counted the images")
        elif name == "regularization":
            table.exact(path, reason="trained as it is, beside the others; not is_reg, which takes every other step")
        else:
            table.exact(path, reason=_OF_SETS.get(name, "staged so"))


def _unused(table: VerdictTable, path: str, why: str) -> None:
    """The verdict on a field without effect: exact at its default, else ignored."""
    if value_at(table.spec, path) == leaf_fields()[path].default:
        table.exact(path, reason=f"left at its default; {why}")
    else:
        table.ignored(path, reason=why)


def _lora(table: VerdictTable) -> None:
    lora = table.spec.lora
    table.choose("lora.type", ["lora", "lokr"], "ai-toolkit's own modules", "ai-toolkit has no LoHa for Ideogram")
    whole = "; a factor whose side is at most twice the rank is whole" if lora.type == "lokr" else ""
    table.exact("lora.rank", reason=f"network.linear{whole}")
    if lora.effective_alpha == lora.rank:
        table.exact("lora.alpha", reason="equal to the rank, which is what ai-toolkit always takes for Ideogram")
    else:
        table.defaulted(
            "lora.alpha",
            reason=f"ai-toolkit ignores it for Ideogram: alpha = rank = {lora.rank}, so the scale is 1 instead of "
            f"{lora.effective_alpha / lora.rank:g}. That learns differently: set it to {lora.rank}, or use "
            f"another backend",
        )
    for path in ("lora.rslora", "lora.dora"):
        on = lora.rslora if path == "lora.rslora" else lora.dora
        if on:
            table.refused(path, reason="ai-toolkit has none for Ideogram: set it to false, or use native")
        else:
            table.exact(path, reason="off")
    if not lora.dropout:
        table.exact("lora.dropout", reason="none")
    elif lora.type == "lora":
        table.approximated("lora.dropout", reason="on the low-rank values between the factors, not on the input")
    else:
        table.refused("lora.dropout", reason="ai-toolkit's LoKr has none: set it to 0")
    if isinstance(lora.targets, list) and not matching_modules(lora.targets):
        table.refused(
            "lora.targets", reason="no pattern matches a layer of the blocks, which are all ai-toolkit trains"
        )
    else:
        table.exact("lora.targets", reason="q, k and v are one fused module, as in the official checkpoint and ComfyUI")
    if lora.type == "lokr":
        table.exact("lora.factor", reason="network.lokr_factor")
    else:
        _unused(table, "lora.factor", f"only for lokr, and lora.type is {lora.type}")


def _train(table: VerdictTable) -> None:
    train = table.spec.train
    table.choose("train.gpus", [1], "one process", "ai-toolkit trains on one GPU: set it to 1, or choose native")
    table.exact("train.steps", reason="optimizer steps; a step that ran out of memory is skipped, counted and told")
    if train.batch_size == 1:
        table.exact("train.batch_size", reason="one image a step")
    elif all(each.repeats % train.batch_size == 0 for each in image_sets(table.spec.dataset)):
        table.exact("train.batch_size", reason="every size of image fills its batches, by the repeats")
    else:
        table.approximated(
            "train.batch_size",
            reason="a size with too few images repeats some to fill the batch, unless repeats is a multiple of it",
        )
    if train.gradient_accumulation == 1:
        table.exact("train.gradient_accumulation", reason="each step is one pass")
    else:
        table.approximated(
            "train.gradient_accumulation",
            reason="gradients are summed, not averaged; the clipping norm is written "
            f"{train.gradient_accumulation} times as large to make up for it, and only Adam's epsilon weighs less",
        )
    if train.optimizer == "prodigy" and train.learning_rate < PRODIGY_LOWEST_RATE:
        table.defaulted("train.learning_rate", reason=f"below {PRODIGY_LOWEST_RATE} ai-toolkit runs Prodigy at 1")
    else:
        table.exact("train.learning_rate", reason="train.lr")
    table.exact("train.optimizer", reason="same algorithm; ai-toolkit fixes Adam's and Prodigy's epsilon at 1e-6")
    table.exact("train.weight_decay", reason="train.optimizer_params.weight_decay")
    restarts = train.lr_scheduler == "cosine_with_restarts" and train.lr_cycles > 1
    if restarts:
        table.approximated("train.lr_scheduler", reason="one cosine over all steps")
        table.defaulted("train.lr_cycles", reason="1: ai-toolkit's cycle is as long as the training")
    else:
        table.exact("train.lr_scheduler", reason="same curve over optimizer steps")
        if train.lr_cycles == 1:
            table.exact("train.lr_cycles", reason="one")
        else:
            table.ignored("train.lr_cycles", reason="only for lr_scheduler: cosine_with_restarts")
    if not train.warmup_steps:
        table.exact("train.warmup_steps", reason="none")
    elif train.lr_scheduler == "constant":
        table.exact("train.warmup_steps", reason="constant_with_warmup")
    else:
        table.ignored(
            "train.warmup_steps", reason=f"ai-toolkit warms up a constant rate only, not {train.lr_scheduler}"
        )
    if train.optimizer == "adafactor" and train.max_grad_norm:
        table.ignored("train.max_grad_norm", reason="ai-toolkit leaves clipping to Adafactor itself")
    else:
        table.exact(
            "train.max_grad_norm", reason="global norm over the adapter; 0 becomes a norm that is never reached"
        )
    table.exact("train.seed", reason="training_seed; the order of images depends on the machine's worker processes too")
    table.exact("train.ema_decay", reason="the average is what is saved; a resumed run goes on from the average")
    table.defaulted(
        "train.timestep_mean",
        "train.timestep_std",
        reason=f"ai-toolkit's {timestep_type(table.spec)} instead"
        + (
            ": logit-normal with mean 0 and deviation 1, not shifted for the image's size"
            if timestep_type(table.spec) == "sigmoid"
            else ""
        ),
    )


def timestep_type(spec: TrainSpec) -> str:
    """How ai-toolkit is to draw noise levels."""
    return str(spec.backend.options.get("timestep_type", "sigmoid"))


def _memory(table: VerdictTable) -> None:
    memory = table.spec.memory
    table.exact("memory.profile", "memory.quantize", reason="already filled into the fields below")
    if "qtype" in table.spec.backend.options:
        table.defaulted("memory.storage", reason=f"options.qtype: {table.spec.backend.options['qtype']}")
    elif memory.storage == "none":
        table.exact("memory.storage", reason="weights in model.dtype")
    elif memory.storage == "nf4":
        table.refused(
            "memory.storage",
            reason="ai-toolkit has no nf4: set memory.quantize: fp8 with memory.offload: group, or int8, or one of its "
            "own 4-bit kinds with backend.options.qtype: uint4",
        )
    else:
        table.choose(
            "memory.storage",
            list(QTYPES),
            "fp8 is quanto's qfloat8, or torchao's float8 while layers are offloaded",
            "choose one of these",
        )
    if memory.compute == "model":
        table.exact("memory.compute", reason="weights are unpacked for each product")
    elif (memory.storage, memory.compute) == ("int8", "int8"):
        table.approximated(
            "memory.compute", reason=f"qtype: {INT8_COMPUTE}, rotated weights and activations; backward in model.dtype"
        )
    else:
        table.refused(
            "memory.compute",
            reason="ai-toolkit computes in 8 bits with int8 alone: set memory.compute: model, or storage and compute "
            "to int8",
        )
    if "qtype_te" in table.spec.backend.options:
        table.defaulted("memory.text_encoder", reason=f"options.qtype_te: {table.spec.backend.options['qtype_te']}")
    else:
        table.choose(
            "memory.text_encoder", ["none", *QTYPES], "quantize_te and qtype_te", "ai-toolkit has no nf4: choose fp8"
        )
    table.choose(
        "memory.offload",
        ["none", "group"],
        "layer_offloading; options.layer_offloading_transformer_percent says for how many layers (all)",
        "ai-toolkit moves neither activations nor from disk: set memory.offload: none or group",
    )
    table.choose(
        "memory.compile",
        ["none", "regional", "full"],
        "compile, with block_compile for regional; where compiling fails ai-toolkit goes on without it, and the run "
        "says so",
        "choose one of these",
    )
    if memory.gradient_checkpointing in ("none", "full"):
        table.exact("memory.gradient_checkpointing", reason="every block is recomputed in the backward pass, or none")
    else:
        table.approximated("memory.gradient_checkpointing", reason="full: ai-toolkit has no dial")


def _outputs(table: VerdictTable) -> None:
    spec = table.spec
    table.exact(
        "save.every",
        reason="asked for through ai-toolkit's job database, since its own save_every saves a step late; never at the "
        "last step, which is saved anyway",
    )
    table.exact("save.keep", reason="max_step_saves_to_keep")
    table.exact("save.dtype", reason="save.dtype; checkpoints are rounded to it as well, and resumed from so")
    if spec.sample.every:
        table.approximated(
            "sample.every",
            "sample.prompts",
            "sample.steps",
            "sample.guidance",
            "sample.width",
            "sample.height",
            "sample.seed",
            reason="drawn by ai-toolkit one step late and at the end, with the trained transformer for the "
            "unconditional "
            "half too; ` --x` in a prompt is taken for an option",
        )
    else:
        table.exact("sample.every", reason="no samples")
        table.exact(
            "sample.prompts",
            "sample.steps",
            "sample.guidance",
            "sample.width",
            "sample.height",
            "sample.seed",
            reason="no samples are drawn",
        )
    if spec.validation.every:
        table.approximated(
            "validation.every",
            "validation.images",
            "validation.path",
            reason="ai-toolkit's own: fixed noise at the four levels 1, 0.75, 0.5 and 0.25, one step late",
        )
    else:
        table.exact("validation.every", reason="no validation")
        for name in ("images", "path"):
            _unused(table, f"validation.{name}", "validation.every is 0")


def _options(table: VerdictTable) -> None:
    options = table.spec.backend.options
    unknown = sorted(set(options) - set(OPTIONS))
    beyond = [name for name in sorted(options) if name.endswith("_percent") and not _is_fraction(options[name])]
    if unknown:
        known = "; ".join(f"{name}: {values}" for name, values in OPTIONS.items())
        table.refused("backend.options", reason=f"not known here: {', '.join(unknown)}. Known: {known}")
    elif beyond:
        table.refused("backend.options", reason=f"{', '.join(beyond)}: a fraction from 0 to 1, so 0.95 for 95 percent")
    elif options.get("qtype") in ("nf4", "int4", "fp8", "uint8"):
        table.refused("backend.options", reason=f"qtype {options['qtype']} does nothing in ai-toolkit, or ends it")
    elif options:
        table.exact("backend.options", reason="only this backend reads them: not portable")
    else:
        table.exact("backend.options", reason="none given")


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
