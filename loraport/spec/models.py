"""The training spec: what a person wants, in words LoRA people know. Every field says its meaning, unit and bounds.

The spec names no backend's key. What a backend does with each field is its verdict (see `loraport.planning`).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

SPEC_VERSION: Final = 1
#: File systems allow 255 bytes, and suffixes and numbers come to it.
_LONGEST_NAME = 200


def _is_number(annotation: Any) -> bool:
    return annotation in (int, float) or bool({int, float} & set(get_args(annotation)))


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _checkpointing_word(value: Any) -> Any:
    """Other trainers' switch: true is full, false is none."""
    return ("full" if value else "none") if isinstance(value, bool) else value


class Section(BaseModel):
    """A part of the spec: immutable, and with no room for a key nobody reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_all_defaults(cls, value: Any) -> Any:
        """A section whose every line is commented out is null in YAML."""
        return {} if value is None else value

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes True for 1; a person who writes it mistook the field."""
        if isinstance(value, bool) and _is_number(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("a number belongs here")
        return value


class ModelSection(Section):
    """The base model the LoRA is trained on."""

    family: str = Field("ideogram4", description="Model family; `loraport plan` lists those installed.")
    checkpoint: str = Field(
        description="Hub id (org/name), local folder, or `tiny`: a random checkpoint of a few MB for trying things out."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub checkpoint.")
    dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="Number format the model computes in.")


CaptionExtension = Literal["json", "txt", "caption"]

#: A dataset of the Hugging Face hub, where a path may also be one.
HUB_ID = re.compile(r"hub:(?P<repo>[\w.\-]+/[\w.\-]+)(?:@(?P<revision>[\w.\-/]+))?")


def _folder_or_hub_id(path: Path | None) -> Path | None:
    if path is not None and str(path).startswith("hub:") and not HUB_ID.fullmatch(str(path)):
        raise ValueError("a dataset of the hub is hub:owner/name, or hub:owner/name@revision")
    return path


#: A folder, or a dataset of the hub as `HUB_ID` says it, which is downloaded when the run starts.
ImageFolder = Annotated[Path, AfterValidator(_folder_or_hub_id)]


class RegularizationSection(Section):
    """Images of the general class, trained beside the subject so that the class does not drift. Short for a set with
    `regularization: true` beside `dataset.path`; with `dataset.sets`, write that set instead."""

    path: ImageFolder | None = Field(None, description="Folder of regularisation images; none when left out.")
    caption_ext: CaptionExtension = Field("json", description="Extension of its caption files.")
    repeats: int = Field(1, ge=1, le=10_000, description="Times each regularisation image is seen in an epoch.")
    weight: float = Field(1.0, ge=0, le=100, description="Factor on the loss of regularisation images.")


class ImageSetSection(Section):
    """One of several sets of images. What it leaves out (the dashes) is what `dataset` says, or its default; of that, a
    regularisation set takes no trigger word, default caption or mirroring.

    An epoch holds each image of a set `repeats` times. With `weight` instead, which all sets must then have, the share
    of an epoch's samples that come from a set is its weight over the sum of all weights, however many images the sets
    have: each image is repeated a whole number of times, the smallest that give the shares, or within 1 % of them
    where one would be above 1000.
    """

    path: ImageFolder = Field(
        description="Folder of images, searched with its subfolders; or a hub dataset: hub:owner/name[@revision]."
    )
    caption_ext: CaptionExtension | None = Field(None, description="Extension of the caption file beside each image.")
    caption_field: str | None = Field(
        None, max_length=200, description="Column of metadata.jsonl or metadata.csv that holds the captions, instead."
    )
    default_caption: str | None = Field(None, description="Caption for images without one.")
    trigger_word: str | None = Field(
        None, max_length=200, description="Word placed in the captions of this set; '' for none."
    )
    resolution: int | None = Field(
        None, ge=64, le=4096, multiple_of=16, description="Side in pixels of the square whose area is the pixel budget."
    )
    repeats: int | None = Field(None, ge=1, le=10_000, description="Times each image is seen in an epoch.")
    weight: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="Share of the samples that come from this set, relative to other sets' weights; without repeats.",
    )
    flip: bool | None = Field(None, description="Also train each image mirrored left to right.")
    caption_dropout: float | None = Field(
        None, ge=0, le=1, description="Share of samples trained with an empty caption, 0 to 1."
    )
    regularization: bool = Field(
        False, description="Images of the general class, so that the class does not drift; none is held out."
    )
    loss_weight: float = Field(1.0, gt=0, le=100, description="Factor on the loss of this set's images.")


class DatasetSection(Section):
    """Images and their captions: one folder (`path`), or several sets (`sets`), which take from here what they don't
    say themselves."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["path"]}, {"required": ["sets"]}]})

    path: ImageFolder | None = Field(
        None,
        description="Folder of images, searched with its subfolders; or a hub dataset: hub:owner/name[@revision].",
    )
    sets: list[ImageSetSection] = Field([], description="Several sets of images, instead of path.")
    caption_ext: CaptionExtension = Field("json", description="Extension of the caption file beside each image.")
    caption_field: str | None = Field(
        None,
        max_length=200,
        description="Column of metadata.jsonl or metadata.csv that holds the captions, instead of caption files. Of a "
        "hub dataset with such a file or parquet files the default is text.",
    )
    default_caption: str | None = Field(
        None,
        description="Caption for images without a caption file; without it a missing caption is an error.",
    )
    trigger_word: str | None = Field(
        None,
        max_length=200,
        description="Word that calls the LoRA. Put inside a JSON caption (never before it) where it is missing.",
    )
    repeats: int = Field(1, ge=1, le=10_000, description="Times each image is seen in an epoch.")
    resolution: int = Field(
        1024,
        ge=64,
        le=4096,
        multiple_of=16,
        description="Side in pixels of the square whose area is the pixel budget.",
    )
    aspect_buckets: bool = Field(
        True, description="Keep each image's shape (sides in multiples of 16 px); false crops to squares."
    )
    upscale: bool = Field(False, description="Enlarge images that are smaller than the resolution.")
    flip: bool = Field(False, description="Also train each image mirrored left to right.")
    caption_dropout: float = Field(
        0.0, ge=0, le=1, description="Share of samples trained with an empty caption, 0 to 1."
    )
    max_text_tokens: int = Field(
        2048, ge=16, le=8192, description="Longest caption in tokens; a longer one is an error."
    )
    regularization: RegularizationSection = Field(
        default_factory=RegularizationSection, description="Optional regularisation set."
    )

    @model_validator(mode="after")
    def _one_folder_or_several_sets(self) -> Self:
        if (self.path is None) != bool(self.sets):
            raise ValueError(
                "give path (one folder) or sets (several), not both"
                if self.sets
                else "needs path (one folder of images) or sets (several)"
            )
        if not self.sets:
            return self
        if self.regularization.path is not None:
            raise ValueError("beside sets, write regularization.path as a set with regularization: true")
        if all(one.regularization for one in self.sets):
            raise ValueError("every set is regularisation, so there is nothing to learn: one must not be")
        self._check_weights()
        seen: dict[tuple[Any, ...], int] = {}
        for number, one in enumerate(self.sets):
            captions = one.caption_field or one.caption_ext or self.caption_field or self.caption_ext
            first = seen.setdefault((str(one.path), one.resolution or self.resolution, captions), number)
            if first != number:
                raise ValueError(
                    f"sets[{number}] is sets[{first}] once more, with the same path, captions and resolution: keep "
                    "one, and give it repeats or a weight"
                )
        return self

    def _check_weights(self) -> None:
        if not any(one.weight for one in self.sets):
            return
        for number, one in enumerate(self.sets):
            if one.weight is None:
                raise ValueError(f"sets[{number}].weight is needed, for other sets have one")
            if (one.repeats or self.repeats) != 1:
                raise ValueError(
                    f"sets[{number}] has a weight and repeats, which both say how often it is seen: keep one"
                )


class LoraSection(Section):
    """The adapter that is trained."""

    type: Literal["lora", "lokr", "loha"] = Field("lora", description="LoRA, or LyCORIS LoKr or LoHa.")
    rank: int = Field(16, ge=1, le=1024, description="Rank of the low-rank factors.")
    alpha: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Scale numerator: the update is alpha/rank times the factors. Default: the rank.",
    )
    rslora: bool = Field(False, description="Scale by alpha/sqrt(rank) instead of alpha/rank (rank-stabilised LoRA).")
    dora: bool = Field(False, description="Train a magnitude per output row as well (DoRA).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input, 0 to 1.")
    targets: Annotated[str | list[str], Field(union_mode="left_to_right")] = Field(
        "attention+mlp",
        description="Preset (`attention`, `attention+mlp`, `all`) or a list of regular expressions over module names.",
    )
    factor: int = Field(
        -1,
        ge=-1,
        le=4096,
        description="LoKr: size of the smaller Kronecker factor; -1 takes the most even split.",
    )

    @field_validator("targets")
    @classmethod
    def _patterns_compile(cls, targets: str | list[str]) -> str | list[str]:
        for pattern in targets if isinstance(targets, list) else []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        if targets == []:
            raise ValueError("give at least one pattern")
        return targets

    @model_validator(mode="after")
    def _only_lora_has_variants(self) -> Self:
        if self.type != "lora":
            for name in ("dora", "rslora"):
                if getattr(self, name):
                    raise ValueError(f"lora.{name} needs lora.type: lora, not {self.type}")
        return self

    @property
    def effective_alpha(self) -> float:
        """Alpha with its default (the rank) filled in."""
        return float(self.rank if self.alpha is None else self.alpha)


class TrainSection(Section):
    """The optimisation."""

    steps: int = Field(1000, ge=1, le=10_000_000, description="Optimizer steps in all.")
    gpus: int = Field(
        1, ge=1, le=64, description="GPUs of this machine that train together; each takes a batch of its own."
    )
    batch_size: int = Field(1, ge=1, le=1024, description="Images in one forward pass.")
    gradient_accumulation: int = Field(1, ge=1, le=4096, description="Forward passes summed into one optimizer step.")
    learning_rate: float = Field(1e-4, gt=0, le=10, description="Peak learning rate.")
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "lion"] = Field(
        "adamw8bit", description="Optimizer. For prodigy set learning_rate to 1."
    )
    weight_decay: float = Field(0.01, ge=0, le=10, description="Decoupled weight decay.")
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_restarts"] = Field(
        "constant", description="Shape of the learning rate after warm-up."
    )
    lr_cycles: int = Field(1, ge=1, le=1000, description="Restarts of cosine_with_restarts.")
    warmup_steps: int = Field(0, ge=0, le=1_000_000, description="Optimizer steps over which the rate rises from 0.")
    max_grad_norm: float = Field(1.0, ge=0, le=1e6, description="Largest gradient norm; 0 turns clipping off.")
    seed: int = Field(42, ge=0, lt=2**63, description="Seed of everything random.")
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of an averaged copy of the adapter, which is then what is saved; 0 is off.",
    )
    timestep_mean: float = Field(
        0.0,
        ge=-10,
        le=10,
        description="Mean of the logit-normal noise level, before the shift for resolution.",
    )
    timestep_std: float = Field(1.5, gt=0, le=10, description="Deviation of the logit-normal noise level.")


Storage = Literal["none", "fp8", "int8", "nf4"]
Compute = Literal["model", "fp8", "int8"]
Checkpointing = Literal["none", "selective", "full", "auto"]


class MemorySection(Section):
    """How the model fits and runs fast. A profile fills what is left out."""

    profile: str | None = Field(
        None,
        description="Hardware preset, such as `12gb`, or `auto`, which reads the card; `loraport profiles` lists them.",
    )
    quantize: str | None = Field(
        None,
        description="Quantisation of the frozen weights: none, fp8, fp8-dynamic, int8, int8-dynamic or nf4; it fills "
        "the next two.",
    )
    storage: Storage | None = Field(None, description="How the frozen weights are stored; none keeps model.dtype.")
    compute: Compute | None = Field(
        None, description="What the matrix products of the frozen weights run in; model is model.dtype."
    )
    text_encoder: Storage | None = Field(
        None, description="How the text encoder's weights are stored while captions are encoded."
    )
    offload: str | None = Field(
        None,
        description="What waits outside the GPU: none, group (blocks, in host memory), group+activations, or disk "
        "(blocks, in the checkpoint's file).",
    )
    compile: str | None = Field(None, description="torch.compile: none, regional (each block), or full.")
    gradient_checkpointing: Annotated[
        Checkpointing | None, BeforeValidator(_checkpointing_word, json_schema_input_type=Checkpointing | bool | None)
    ] = Field(
        None,
        description="Activations recomputed in the backward pass, for less memory and more time: none, selective (all "
        "but the dearest), full, or auto (by the memory there is). true is full, false none.",
    )


class SaveSection(Section):
    """What is written, and when."""

    every: int = Field(250, ge=0, description="Optimizer steps between checkpoints; 0 writes only the last.")
    keep: int = Field(4, ge=1, le=10_000, description="Checkpoints kept; older ones are removed.")
    dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="Number format of the final LoRA file.")


class SampleSection(Section):
    """Images drawn with the adapter while it is trained."""

    every: int = Field(0, ge=0, description="Optimizer steps between samples; 0 draws none.")
    prompts: Annotated[list[str], BeforeValidator(_one_or_many, json_schema_input_type=str | list[str])] = Field(
        [], description="Prompts to draw."
    )
    steps: int = Field(28, ge=1, le=1000, description="Denoising steps.")
    guidance: float = Field(7.0, ge=0, le=100, description="Classifier-free guidance scale.")
    width: int = Field(1024, ge=64, le=4096, multiple_of=16, description="Width in pixels.")
    height: int = Field(1024, ge=64, le=4096, multiple_of=16, description="Height in pixels.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the starting noise.")

    @model_validator(mode="after")
    def _something_to_draw(self) -> Self:
        if self.every and not self.prompts:
            raise ValueError("sample.every is set, so sample.prompts needs at least one prompt")
        return self


class ValidationSection(Section):
    """The loss on images that are not trained, at fixed noise and times: the number to judge a run by."""

    every: int = Field(0, ge=0, description="Optimizer steps between measurements; 0 measures none.")
    images: int = Field(
        1,
        ge=1,
        le=10_000,
        description="Images held out of the dataset when no path is given: the last by file name, of the first set "
        "that is no regularisation.",
    )
    path: ImageFolder | None = Field(None, description="Folder of held-out images with captions, instead.")


class BackendSection(Section):
    """Which trainer, and what only that trainer understands."""

    name: str | None = Field(None, description="Backend to use when --backend is not given.")
    python: Path | None = Field(None, description="Python interpreter of the backend's own environment.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Passed to the backend as they are; recorded as not portable."
    )


class TrainSpec(Section):
    """One LoRA training, for any backend."""

    version: Literal[1] = Field(SPEC_VERSION, description="Version of this format.")
    name: str = Field(
        description="Name of the run and of the LoRA file: letters, digits, dot, dash, underscore.",
        pattern=r"^[\w][\w.\-]{0,99}$",
    )
    model: ModelSection = Field(description="The base model.")
    dataset: DatasetSection = Field(description="Images and captions.")
    lora: LoraSection = Field(default_factory=LoraSection, description="The adapter.")
    train: TrainSection = Field(default_factory=TrainSection, description="The optimisation.")
    memory: MemorySection = Field(default_factory=MemorySection, description="Fit and speed.")
    save: SaveSection = Field(default_factory=SaveSection, description="Checkpoints and the final file.")
    sample: SampleSection = Field(default_factory=SampleSection, description="Images while training.")
    validation: ValidationSection = Field(default_factory=ValidationSection, description="Held-out loss.")
    backend: BackendSection = Field(default_factory=BackendSection, description="The trainer.")

    @field_validator("name")
    @classmethod
    def _name_fits_a_file_system(cls, name: str) -> str:
        if len(name.encode()) > _LONGEST_NAME:
            raise ValueError(f"at most {_LONGEST_NAME} bytes in UTF-8, so that files can be named after it")
        return name

    @classmethod
    def load(cls, path: Path | str, overrides: list[str] | None = None) -> Self:
        """Read a spec file; see `loraport.spec.load.load_spec`, which also returns the notices."""
        from loraport.spec.load import load_spec

        spec = load_spec(path, overrides or []).spec
        assert isinstance(spec, cls)
        return spec

    def hash(self) -> str:
        """SHA-256 of the spec's content, hex. Equal specs have equal hashes whatever their files looked like."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The spec as YAML with every field written out."""
        from loraport.spec.yaml_text import dump_yaml

        return dump_yaml(self.model_dump(mode="json"))


def leaf_fields(section: type[BaseModel] = TrainSpec, prefix: str = "") -> dict[str, Any]:
    """Every field of the spec that holds a value, by dotted path, with its pydantic FieldInfo, in order."""
    leaves: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            leaves |= leaf_fields(annotation, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = info
    return leaves


def set_fields(spec: TrainSpec) -> list[str]:
    """The path of every field that a set of the spec says itself, as `dataset.sets[1].weight`, in order."""
    return [
        f"dataset.sets[{number}].{name}"
        for number, one in enumerate(spec.dataset.sets)
        for name, info in ImageSetSection.model_fields.items()
        if info.is_required() or getattr(one, name) != info.default
    ]


def value_at(spec: TrainSpec, path: str) -> Any:
    """The value at a dotted path of the spec, where [n] counts into a list."""
    value: Any = spec
    for part in path.split("."):
        name, *indices = part.rstrip("]").split("[")
        value = getattr(value, name)
        for index in indices:
            value = value[int(index)]
    return value
