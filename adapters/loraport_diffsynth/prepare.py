"""What DiffSynth reads: images at their final size, rows of captions, and the files of a local checkpoint. No torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageOps

from loraport.buckets import bucket_for, fit
from loraport.dataset import Item, load_image
from loraport.errors import DataError, SpecError
from loraport.files import atomic_path, write_atomic
from loraport.ideogram4 import IDEOGRAM4
from loraport.lora.storage import read_tensors
from loraport.sets import trained_sets
from loraport.spec.models import DatasetSection, TrainSpec
from loraport.staging import write_tiny_checkpoint
from loraport_diffsynth.capabilities import METHODS
from loraport_diffsynth.translate import CHECKPOINT, TEXT_ENCODER, TOKENIZER, TRANSFORMER, VAE


@dataclass(frozen=True)
class Picture:
    """An image as it is trained. `file` is its name in DiffSynth's data set."""

    file: str
    caption: str
    repeats: int
    weight: float
    dropout: float  #: share of its turns that have an empty caption

    def row(self, dropped: bool = False) -> str:
        """Its line of metadata.jsonl; a dropped caption is empty."""
        content = {"image": self.file, "prompt": "" if dropped else self.caption, "loss_weight": self.weight}
        return json.dumps(content, ensure_ascii=False)


def write_pictures(spec: TrainSpec, folder: Path, tell: Callable[[int, int], None]) -> list[Picture]:
    """Write every image that is trained to `folder`: RGB, upright, at its final size, mirrored too if the spec says so.

    Images that are there already stay. `tell` hears how many are done, and of how many. Raises DataError for what is
    wrong with images or captions.
    """
    sources = [(each, item) for each in trained_sets(spec, IDEOGRAM4) for item in each.items]
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for done, (each, item) in enumerate(sources, start=1):
        one = each.set
        for mirrored in (False, True) if one.flip else (False,):
            file = _write(item, spec.dataset, one.resolution, mirrored, folder)
            pictures.append(Picture(file, item.caption, each.repeats, one.loss_weight, one.caption_dropout))
        tell(done, len(sources))
    return pictures


def _write(item: Item, dataset: DatasetSection, resolution: int, mirrored: bool, folder: Path) -> str:
    """Write one image unless it is there; its name tells what it was made from."""
    if min(item.size) < IDEOGRAM4.side_multiple and not dataset.upscale:
        raise DataError(f"{item.image} is smaller than 16 pixels.", hint="Take it out, or set dataset.upscale: true.")
    bucket = bucket_for(item.size, resolution, upscale=dataset.upscale, aspect_buckets=dataset.aspect_buckets)
    status = item.image.stat()
    made_from = f"{item.image.resolve()}|{status.st_mtime_ns}|{status.st_size}|{bucket}|{mirrored}"
    name = hashlib.sha256(made_from.encode()).hexdigest()[:20] + ".png"
    if not (folder / name).is_file():
        image = fit(load_image(item), bucket)
        with atomic_path(folder / name) as draft:
            (ImageOps.mirror(image) if mirrored else image).save(draft, format="PNG", compress_level=1)
    return name


def draw(pictures: list[Picture], count: int, seed: int) -> list[tuple[int, bool]]:
    """Which picture each of `count` forward passes trains, and whether without its caption.

    Whole epochs in which each picture comes `repeats` times, as far as they go, each shuffled.
    """
    chance = random.Random(seed)
    epoch = [number for number, picture in enumerate(pictures) for _ in range(picture.repeats)]
    order: list[int] = []
    while len(order) < count:
        chance.shuffle(epoch)
        order += epoch
    return [(number, chance.random() < pictures[number].dropout) for number in order[:count]]


def write_rows(pictures: list[Picture], drawn: list[tuple[int, bool]], path: Path) -> None:
    """metadata.jsonl of a training in one phase: one row for each forward pass."""
    write_atomic(path, "".join(pictures[number].row(dropped) + "\n" for number, dropped in drawn))


def write_encoding_rows(pictures: list[Picture], path: Path) -> None:
    """The rows to encode once: each picture with its caption, and then, if captions are dropped, each without."""
    variants = (False, True) if any(picture.dropout for picture in pictures) else (False,)
    write_atomic(path, "".join(picture.row(dropped) + "\n" for dropped in variants for picture in pictures))


def link_order(pictures: list[Picture], drawn: list[tuple[int, bool]], cache: Path, folder: Path) -> None:
    """A link for each forward pass to what DiffSynth has encoded, in rows as `write_encoding_rows` wrote them."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for turn, (number, dropped) in enumerate(drawn):
        row = number + (len(pictures) if dropped else 0)
        (folder / f"{turn:07d}.pth").symlink_to(cache / f"{row}.pth")


def lay_out_checkpoint(checkpoint: str, backend: Path) -> str | None:
    """Link a local checkpoint (or write a tiny one) to `backend`; how its transformer is stored: fp8, nf4, or None
    where it is plain numbers.

    Raises DataError for a folder without DiffSynth's files.
    """
    link = backend / CHECKPOINT
    if checkpoint == "tiny":
        write_tiny_checkpoint(link)
    else:
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint)
    missing = [name for name in (TRANSFORMER, TEXT_ENCODER, VAE, TOKENIZER) if not (link / name).exists()]
    if missing:
        raise DataError(
            f"The checkpoint {checkpoint} lacks {', '.join(missing)}.",
            hint="DiffSynth reads the official layout with one file for each model, as in ideogram-ai/ideogram-4-fp8.",
        )
    keys = set(read_tensors(link / TRANSFORMER))
    if "layers.0.attention.qkv.weight" not in keys:
        raise DataError(
            f"The transformer in {checkpoint} is not in the official layout (there is no layers.0.attention.qkv).",
            hint="DiffSynth cannot read diffusers' split attention: use the official files, or the native backend.",
        )
    marks = {"fp8": ".weight_scale", "nf4": ".quant_state.bitsandbytes__nf4"}
    return next((kind for kind, mark in marks.items() if any(key.endswith(mark) for key in keys)), None)


def refuse_other_storage(stored: str, arguments: list[str]) -> None:
    """Raise SpecError when a checkpoint that is stored quantised is to be quantised in another way, or computed with in
    8 bits: DiffSynth keeps such weights as they are and unpacks them, and the run would not be what its plan says.

    arguments: those of the training. A checkpoint is not looked into where the plan is made.
    """
    asked = dict(itertools.pairwise(arguments)).get("--quant_options", "")  # the last, as argparse takes it
    methods = dict(each.rsplit(":", 1) for each in asked.split(";") if ":" in each)
    method = methods.get(f"{CHECKPOINT}/{TRANSFORMER}", METHODS[stored])
    if method != METHODS[stored]:
        raise SpecError(
            f"model.checkpoint is stored in {stored}, which DiffSynth keeps; memory.storage and memory.compute ask for "
            f"its {method}.",
            hint=f"Set memory.quantize: {stored}, or give a checkpoint in bf16.",
        )
