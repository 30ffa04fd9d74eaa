"""What a spec becomes in SimpleTuner's words: the choices that verdicts, generated files and import share. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from loraport.families import matches
from loraport.ideogram4 import IDEOGRAM4
from loraport.sets import image_sets
from loraport.spec.models import TrainSpec
from loraport_simpletuner.recipe import PINNED

OFFICIAL = {"fp8": "ideogram-ai/ideogram-4-fp8", "nf4": "ideogram-ai/ideogram-4-nf4"}
#: The hub id a local checkpoint folder is linked under.
LOCAL_ID = "loraport/local-checkpoint"

#: Blocks of Ideogram 4.
LAYERS = 34
_LEAVES = ("attention.qkv", "attention.o", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaln_modulation")
#: Also the name of a layer after the blocks, so it must be written out block by block.
_AMBIGUOUS = "adaln_modulation"

OPTIMIZERS = {
    "adamw": "torch-adamw",
    "adamw8bit": "bnb-adamw8bit",
    "lion": "bnb-lion",
    "adafactor": "torch-adafactor",
    "prodigy": "prodigy",
}
#: `base_model_precision` for weights that SimpleTuner quantises itself, by storage and compute.
PRECISIONS: dict[tuple[str, str], str] = {
    ("fp8", "model"): "fp8wo-torchao",
    ("fp8", "fp8"): "fp8-torchao",
    ("int8", "model"): "int8-torchao",
    ("int8", "int8"): "int8dq-torchao",
}
MIXED_PRECISION = {"bf16": "bf16", "fp32": "no"}
#: Keys of config.json that say where a run's files are, which is not for options to change.
PLACES = ("output_dir", "data_backend_config", "resume_from_checkpoint", "lycoris_config", "report_to")
#: Options of backend.options.
OPTIONS = {"version": "version of SimpleTuner to write keys for", "config": "further keys of its config.json"}

#: SimpleTuner takes an area in megapixels within 0.05 of these for the square of that side.
_REMAPPED = {0.25: 512, 0.5: 768, 1.0: 1024, 2.0: 1536, 4.0: 2048}
MAX_SEED = 2**32 - 1
#: Prompt of guidance's unconditional half. SimpleTuner keeps no text features of an empty one, and then draws nothing.
NEGATIVE = "."
#: Noise levels at which SimpleTuner measures the loss of each held-out image, in equal steps.
VALIDATION_LEVELS = 8
TOKENS = 2048


def version_of(spec: TrainSpec) -> str:
    """The SimpleTuner version that keys are written for."""
    return str(spec.backend.options.get("version", PINNED))


@dataclass(frozen=True)
class Base:
    """How the frozen weights are had: a checkpoint and SimpleTuner's own keys for it."""

    checkpoint: str
    flavour: str
    precision: str
    upcast: bool  #: whether fp8 weights of the checkpoint become the compute dtype


def is_local(checkpoint: str) -> bool:
    """Whether a checkpoint is a folder; a spec's paths are absolute by the time a backend sees them."""
    return checkpoint.startswith("/")


def base_of(spec: TrainSpec) -> Base | str:
    """The base model for `memory.storage`, or why SimpleTuner cannot have it."""
    checkpoint, storage = spec.model.checkpoint, spec.memory.storage
    if checkpoint == OFFICIAL["fp8"] and storage == "nf4":
        checkpoint = OFFICIAL["nf4"]
    nf4, fp8 = checkpoint.endswith("nf4"), checkpoint.endswith("fp8")
    if is_local(checkpoint):
        nf4, fp8 = False, False
        checkpoint = LOCAL_ID
    flavour = "nf4" if nf4 else "fp8"
    if storage == "nf4":
        return (
            Base(checkpoint, flavour, "no_change", False)
            if nf4
            else (
                f"SimpleTuner quantises Ideogram to nf4 in no way of its own: set model.checkpoint: {OFFICIAL['nf4']}"
            )
        )
    if nf4:
        return f"{checkpoint} is nf4 already: set memory.storage: nf4, or model.checkpoint: {OFFICIAL['fp8']}"
    if storage in (None, "none") or (storage == "fp8" and fp8):
        return Base(checkpoint, flavour, "no_change", upcast=storage != "fp8")
    precision = PRECISIONS.get((storage, spec.memory.compute or "model"), PRECISIONS[storage, "model"])
    return Base(checkpoint, flavour, precision, upcast=False)


def alpha_of(spec: TrainSpec) -> float:
    """The alpha that gives the spec's scale as alpha / rank, which is all SimpleTuner knows."""
    alpha = spec.lora.effective_alpha
    return alpha * math.sqrt(spec.lora.rank) if spec.lora.rslora else alpha


def modules(patterns: list[str]) -> list[str]:
    """The modules of Ideogram 4's blocks that some pattern matches, in order."""
    every = [f"layers.{layer}.{leaf}" for layer in range(LAYERS) for leaf in _LEAVES]
    return [name for name in every if matches(patterns, name)]


def peft_targets(patterns: list[str]) -> list[str]:
    """Names for PEFT, which matches a module's whole name or its end: short where that hits nothing else."""
    chosen = modules(patterns)
    targets: list[str] = []
    for leaf in _LEAVES:
        names = [name for name in chosen if name.endswith(f".{leaf}")]
        targets += [leaf] if len(names) == LAYERS and leaf != _AMBIGUOUS else names
    return targets


def lycoris_targets(patterns: list[str]) -> list[str]:
    """Patterns for LyCORIS, which matches the start of a name."""
    return [f"(?:{pattern})$" for pattern in patterns]


def spec_targets(names: list[str], whole: bool = False) -> str | list[str]:
    """`lora.targets` for PEFT's names: a preset where one means the same, else patterns."""
    patterns = names if whole else [rf"(.*\.)?{re.escape(name)}" for name in names]
    chosen = modules(patterns)
    for preset, known in IDEOGRAM4.targets.items():
        if modules(known) == chosen:
            return preset
    return patterns


def repeats_of(spec: TrainSpec, repeats: int) -> int:
    """How often an image is seen in an epoch, at least.

    SimpleTuner ends when some shape has fewer images, repeats counted, than one optimizer step takes. One image of a
    shape is always enough when it is repeated that often.
    """
    return max(repeats, spec.train.batch_size * spec.train.gradient_accumulation * spec.train.gpus)


def caption_dropout(spec: TrainSpec) -> float:
    """The one share of empty captions that SimpleTuner has for all sets: theirs where they agree, else dataset's."""
    said = {one.caption_dropout for one in image_sets(spec.dataset)}
    return said.pop() if len(said) == 1 else spec.dataset.caption_dropout


def square_side(resolution: int) -> int:
    """The side that SimpleTuner gives square images when it keeps shapes, in pixels."""
    area = resolution**2 / 1e6
    for known, side in _REMAPPED.items():
        if abs(area - known) < 0.05:
            return side
    return resolution


@dataclass(frozen=True)
class Schedule:
    """SimpleTuner's learning-rate keys. Its cosine takes the warm-up steps for the length of the half wave."""

    name: str
    warmup: int
    cycles: int


def schedule_of(spec: TrainSpec) -> Schedule:
    """The schedule's keys for a spec."""
    train = spec.train
    if train.lr_scheduler == "cosine_with_restarts":
        return Schedule("cosine_with_restarts", max(train.steps // train.lr_cycles, 1), train.lr_cycles)
    if train.lr_scheduler == "cosine":
        return Schedule("cosine", train.steps, train.lr_cycles)
    if train.lr_scheduler == "constant" and train.warmup_steps:
        return Schedule("constant_with_warmup", train.warmup_steps, train.lr_cycles)
    return Schedule(train.lr_scheduler, train.warmup_steps, train.lr_cycles)


def number(value: float) -> str:
    """A number as SimpleTuner's optimizer options read it: whole ones without a dot are integers there too."""
    text = repr(float(value))
    return text if "." in text or "e-" in text else f"{value:.17f}"
