"""What SimpleTuner does with every field of the spec. Read at 4.8.0 and 4.10.1."""

from __future__ import annotations

from loraport.ideogram4 import IDEOGRAM4
from loraport.planning import SETS, Verdict, VerdictTable
from loraport.sets import image_sets
from loraport.spec.models import TrainSpec, set_fields
from loraport_simpletuner import mapping, memory
from loraport_simpletuner.recipe import SUPPORTED


def verdicts(spec: TrainSpec) -> list[Verdict]:
    """One verdict for each field."""
    table = VerdictTable(spec)
    table.exact("version", "name", reason="LoraPort's own; the run folder is SimpleTuner's output folder")
    _model(table)
    _dataset(table)
    _regularization(table)
    _sets(table)
    _lora(table)
    _train(table)
    memory.judge(table)
    _save(table)
    _sample(table)
    _validation(table)
    table.exact("backend.name", reason="this backend")
    table.exact("backend.python", reason="SimpleTuner's interpreter; its own environment's when left out")
    _options(table)
    return table.finish()


def _model(table: VerdictTable) -> None:
    model = table.spec.model
    table.choose("model.family", ["ideogram4"], "model_family: ideogram", "choose another backend")
    base = mapping.base_of(table.spec)
    if model.checkpoint == "tiny":
        table.refused(
            "model.checkpoint",
            reason="SimpleTuner's Ideogram has its sizes in its code, which only code under its licence (AGPL) could "
            "change: give a real checkpoint, or choose native",
        )
    elif mapping.is_local(model.checkpoint):
        table.exact(
            "model.checkpoint",
            reason="the folder is linked into a hub cache of the run's own, read offline; it must have the official "
            "layout (fused qkv)",
        )
    elif isinstance(base, mapping.Base) and base.checkpoint != model.checkpoint:
        table.approximated("model.checkpoint", reason=f"{base.checkpoint}, the official weights in nf4, instead")
    else:
        table.exact("model.checkpoint", reason="pretrained_model_name_or_path")
    if model.revision is None:
        table.exact("model.revision", reason="the main branch")
    else:
        table.refused(
            "model.revision",
            reason="SimpleTuner's Ideogram always loads the main branch: download the revision and give its folder",
        )
    table.choose(
        "model.dtype", ["bf16", "fp32"], "mixed_precision: bf16, or no", "small gradients are lost in fp16, choose bf16"
    )


def _dataset(table: VerdictTable) -> None:
    dataset = table.spec.dataset
    table.exact(
        "dataset.path",
        "dataset.caption_ext",
        "dataset.caption_field",
        "dataset.default_caption",
        reason="staged as links, each caption one line of text beside its image; the folder is never written to",
    )
    table.exact("dataset.trigger_word", reason="placed while staging: inside a JSON caption, in front of a plain one")
    _repeats(table, "dataset.repeats", dataset.repeats)
    _resolution(table, "dataset.resolution", dataset.resolution)
    table.exact("dataset.aspect_buckets", reason="crop_aspect: preserve, or square; sides in multiples of 16")
    if dataset.upscale:
        table.exact("dataset.upscale", reason="SimpleTuner enlarges small images")
    else:
        table.approximated("dataset.upscale", reason="smaller images are enlarged all the same; the run warns of them")
    table.exact("dataset.flip", reason="mirrored copies are staged beside the originals")
    table.exact("dataset.caption_dropout", reason="caption_dropout_probability, unless all sets say another one")
    if dataset.max_text_tokens == mapping.TOKENS:
        table.exact("dataset.max_text_tokens", reason="a longer caption ends the run")
    else:
        table.defaulted("dataset.max_text_tokens", reason=f"always {mapping.TOKENS}; a longer caption ends the run")


def _resolution(table: VerdictTable, path: str, resolution: int) -> None:
    side = mapping.square_side(resolution)
    if table.spec.dataset.aspect_buckets and side != resolution:
        table.approximated(path, reason=f"square images are trained at {side} px, near a megapixel step of SimpleTuner")
    else:
        table.exact(path, reason="resolution, in pixels")


def _repeats(table: VerdictTable, path: str, asked: int) -> None:
    train = table.spec.train
    given = mapping.repeats_of(table.spec, asked)
    if given == asked:
        table.exact(path, reason="repeats, which counts the times after the first")
    else:
        table.approximated(
            path,
            reason=f"{given} times, so that every image shape fills a step of {train.batch_size} × "
            f"{train.gradient_accumulation} images; SimpleTuner ends without a batch otherwise",
        )


def _regularization(table: VerdictTable) -> None:
    prefix = "dataset.regularization"
    regularization = table.spec.dataset.regularization
    if regularization.path is None:
        table.exact(
            f"{prefix}.path", f"{prefix}.caption_ext", f"{prefix}.repeats", f"{prefix}.weight", reason="none given"
        )
        return
    table.approximated(
        f"{prefix}.path",
        reason="a second data set, drawn from in proportion to its size; no step mixes both sets",
    )
    table.exact(f"{prefix}.caption_ext", reason="staged as the other captions are")
    _repeats(table, f"{prefix}.repeats", regularization.repeats)
    if regularization.weight == 1:
        table.exact(f"{prefix}.weight", reason="all losses weigh the same")
    else:
        table.refused(f"{prefix}.weight", reason="SimpleTuner weighs all losses the same: set it to 1")


def _sets(table: VerdictTable) -> None:
    """What each set says itself; how it is staged and drawn."""
    spec = table.spec
    if not spec.dataset.sets:
        table.exact(SETS, reason="one folder")
        return
    table.approximated(
        SETS,
        reason="a data set each, drawn from in proportion to its size or by its weight; no step mixes sets",
    )
    sets = {one.field: one for one in image_sets(spec.dataset)}
    for path in set_fields(spec):
        field, _, name = path.rpartition(".")
        one = sets[field]
        if name == "resolution":
            _resolution(table, path, one.resolution)
        elif name == "repeats":
            _repeats(table, path, one.repeats)
        elif name == "weight":
            table.approximated(path, reason="probability: the set of each batch is drawn at random with these weights")
        elif name == "caption_dropout" and one.caption_dropout != mapping.caption_dropout(spec):
            table.defaulted(path, reason=f"{mapping.caption_dropout(spec):g}: SimpleTuner has one share for all sets")
        elif name == "caption_dropout":
            table.exact(path, reason="caption_dropout_probability")
        elif name == "loss_weight":
            table.refused(path, reason="SimpleTuner weighs all losses the same: set it to 1")
        elif name == "regularization":
            table.exact(path, reason="trained as it is; not is_regularisation_data, whose target is the base model's")
        else:
            table.exact(path, reason="staged so")


def _lora(table: VerdictTable) -> None:
    lora = table.spec.lora
    lycoris = lora.type != "lora"
    library = "lycoris-lora" if lycoris else "peft"
    table.exact("lora.type", reason=f"lora_type: {'lycoris' if lycoris else 'standard'}, by {library}")
    whole = "; where the rank is half of a factor's side or more, that factor is whole and alpha counts for nothing"
    table.exact("lora.rank", reason=f"by {library}{whole if lora.type == 'lokr' else ''}")
    if lycoris and not lora.effective_alpha.is_integer():
        table.refused("lora.alpha", reason="SimpleTuner cuts LyCORIS alphas to whole numbers: give one")
    elif lora.rslora:
        table.approximated("lora.alpha", reason="multiplied by √rank, which is the same scale")
    else:
        table.exact("lora.alpha", reason="written out; the final file loses it, and gets it back from this run's spec")
    if lora.rslora:
        table.approximated("lora.rslora", reason="through alpha, to the same scale")
    else:
        table.exact("lora.rslora", reason="the scale is alpha / rank")
    if lora.dora:
        table.refused(
            "lora.dora",
            reason="SimpleTuner's DoRA cannot be converted without the base weights' norms: set it to false, or choose "
            "native",
        )
    else:
        table.exact("lora.dora", reason="use_dora: false")
    if lora.dropout and lycoris:
        table.refused("lora.dropout", reason=f"lycoris-lora has no input dropout for {lora.type}: set it to 0")
    else:
        table.exact("lora.dropout", reason="lora_dropout")
    if mapping.modules(IDEOGRAM4.target_patterns(lora.targets)):
        table.exact("lora.targets", reason="q, k and v are one fused module, as in the official checkpoint and ComfyUI")
    else:
        table.refused("lora.targets", reason="no module of Ideogram 4's blocks matches")
    if lora.type == "lokr":
        table.exact("lora.factor", reason="factor of the LyCORIS file")
    elif lora.factor == -1:
        table.exact("lora.factor", reason="only for lokr; left at its default")
    else:
        table.ignored("lora.factor", reason=f"only for lokr, and lora.type is {lora.type}")


def _train(table: VerdictTable) -> None:
    train = table.spec.train
    table.exact("train.steps", reason="max_train_steps; they are optimizer steps")
    table.exact("train.batch_size", "train.gradient_accumulation", reason="passed on")
    table.exact("train.learning_rate", reason="passed on")
    table.exact("train.weight_decay", reason="in optimizer_config")
    if train.optimizer == "adafactor":
        table.approximated("train.optimizer", reason="torch's Adafactor, which lowers the rate with the step's number")
    elif train.optimizer == "prodigy":
        table.approximated("train.optimizer", reason="the schedule-free Prodigy of prodigy-plus")
    else:
        table.exact("train.optimizer", reason=mapping.OPTIMIZERS[train.optimizer])
    _schedule(table)
    table.exact("train.max_grad_norm", reason="with grad_clip_method: norm; SimpleTuner's own default clips by value")
    if not 0 < train.seed <= mapping.MAX_SEED:
        why = "0 means the clock to SimpleTuner" if train.seed == 0 else "SimpleTuner's seeds have 32 bits"
        table.approximated("train.seed", reason=f"{train.seed % 2**32 or mapping.MAX_SEED} instead: {why}")
    else:
        table.exact("train.seed", reason="seed")
    if train.ema_decay:
        table.refused(
            "train.ema_decay", reason="SimpleTuner's final LoRA holds the plain weights, not the average: set it to 0"
        )
    else:
        table.exact("train.ema_decay", reason="use_ema: false")
    table.exact(
        "train.timestep_mean",
        "train.timestep_std",
        reason="ideogram_schedule_mu and _std, logit-normal, shifted for each image's size",
    )


def _schedule(table: VerdictTable) -> None:
    train = table.spec.train
    waves = train.lr_scheduler.startswith("cosine")
    if train.lr_scheduler == "cosine_with_restarts":
        table.approximated(
            "train.lr_scheduler", "train.lr_cycles", reason="SimpleTuner warns that its restarts may misbehave"
        )
    else:
        table.exact("train.lr_scheduler", reason="over optimizer steps, down to 0")
        if train.lr_cycles == 1:
            table.exact("train.lr_cycles", reason="only for cosine_with_restarts")
        else:
            table.ignored("train.lr_cycles", reason="only for lr_scheduler: cosine_with_restarts")
    if waves and train.warmup_steps:
        table.ignored("train.warmup_steps", reason="SimpleTuner's cosine takes lr_warmup_steps for its own length")
    else:
        table.exact("train.warmup_steps", reason="lr_warmup_steps")


def _save(table: VerdictTable) -> None:
    table.exact("save.every", "save.keep", reason="checkpoints under backend/output")
    table.exact("save.dtype", reason="number format of the ComfyUI file; SimpleTuner's own checkpoints keep theirs")


def _sample(table: VerdictTable) -> None:
    sample = table.spec.sample
    if sample.every == 0:
        fields = ("every", "prompts", "steps", "guidance", "width", "height", "seed")
        table.exact(*(f"sample.{name}" for name in fields), reason="none are drawn")
        return
    table.approximated(
        "sample.every",
        reason="validation_step_interval. The text encoder is loaded again for the first image and stays in memory, "
        "17 GB in bf16; drawing takes random numbers from the steps after it; with train.gradient_accumulation some "
        "images are drawn twice and the last one may be left out",
    )
    if len(sample.prompts) == 1:
        table.exact("sample.prompts", reason="validation_prompt")
    else:
        table.approximated(
            "sample.prompts",
            reason="only the first one is drawn: of more prompts SimpleTuner cannot find the text features it made",
        )
    table.exact("sample.steps", reason="validation_num_inference_steps")
    if sample.guidance <= 1:
        table.exact("sample.guidance", reason="no guidance")
    else:
        table.approximated(
            "sample.guidance",
            reason=f"validation_guidance, with the trained transformer and the prompt {mapping.NEGATIVE!r} for the "
            "unconditional half",
        )
    table.approximated("sample.width", "sample.height", reason="as asked, with a band under the image that labels it")
    if sample.seed > mapping.MAX_SEED:
        table.approximated("sample.seed", reason=f"{sample.seed % 2**32} instead: SimpleTuner's seeds have 32 bits")
    else:
        table.exact("sample.seed", reason="validation_seed")


def _validation(table: VerdictTable) -> None:
    validation = table.spec.validation
    if validation.every == 0:
        table.exact("validation.every", "validation.images", "validation.path", reason="none is measured")
        return
    table.approximated(
        "validation.every",
        reason=f"SimpleTuner's own evaluation: fixed noise at {mapping.VALIDATION_LEVELS} levels in equal steps, so "
        "not to be compared with another backend's",
    )
    table.exact("validation.images", "validation.path", reason="held-out images stay out of training")


def _options(table: VerdictTable) -> None:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    options = table.spec.backend.options
    unknown = sorted(set(options) - set(mapping.OPTIONS))
    config = options.get("config", {})
    try:
        supported = SpecifierSet(SUPPORTED).contains(mapping.version_of(table.spec), prereleases=True)
    except InvalidVersion:
        supported = False
    if unknown:
        known = "; ".join(f"{name}: {what}" for name, what in mapping.OPTIONS.items())
        table.refused("backend.options", reason=f"not known here: {', '.join(unknown)}. Known: {known}")
    elif not supported:
        table.refused("backend.options", reason=f"version {options['version']!r} is not in {SUPPORTED}")
    elif not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        table.refused("backend.options", reason="config is a mapping of SimpleTuner's keys")
    elif memory.conflict(table.spec) is not None:
        table.refused("backend.options", reason=f"config: {memory.conflict(table.spec)}")
    elif fixed := sorted(set(config) & set(mapping.PLACES)):
        table.refused(
            "backend.options",
            reason=f"{', '.join(fixed)}: a run keeps its files together, choose its folder with --out",
        )
    elif config:
        table.approximated(
            "backend.options",
            reason=f"{', '.join(config)} win over the generated keys, whatever is said of other fields",
        )
    elif options:
        table.exact("backend.options", reason="only this backend reads them: not portable")
    else:
        table.exact("backend.options", reason="none given")
