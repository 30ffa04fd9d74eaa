"""The images and captions that all trainers of a bench read: at their final size, so that none resizes its own way."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loraport.buckets import bucket_for, fit
from loraport.dataset import Item, load_image
from loraport.errors import SpecError
from loraport.families import Family
from loraport.hub_datasets import on_disk
from loraport.sets import held_out_items, trained_sets
from loraport.spec.models import TrainSpec
from loraport.staging import write_tiny_checkpoint

TRAINED, HELD_OUT = "images", "held-out"


@dataclass(frozen=True)
class Staged:
    """Folders of PNG files `00001.png`, … with captions beside them, and what is in them."""

    trained: Path
    held_out: Path
    checkpoint: str  #: that of the spec; for `tiny`, one folder that all use
    images: int
    held_out_images: int
    sha256: str


def planned(spec: TrainSpec, folder: Path) -> Staged:
    """Where the images under `folder` will be, with nothing known of them."""
    return Staged(folder / TRAINED, folder / HELD_OUT, _checkpoint(spec, folder), 0, 0, "")


def caption_ext(spec: TrainSpec) -> str:
    """The extension of staged captions: the spec's, or txt where it has them in a column of metadata."""
    return "txt" if spec.dataset.caption_field else spec.dataset.caption_ext


def stage_images(spec: TrainSpec, held_out: int, family: Family, folder: Path) -> Staged:
    """Write the spec's images under `folder`, once. The last `held_out` by name are kept from training, unless the spec
    names a folder of its own for validation.

    Captions get the spec's trigger word. Raises DataError for what is wrong with images or captions, or when none is
    left to train, and SpecError for a spec of several sets.
    """
    if not folder.exists():
        draft = folder.with_name(f".{folder.name}")
        shutil.rmtree(draft, ignore_errors=True)
        kept = {"images": max(1, held_out), "every": int(bool(held_out or spec.validation.path))}
        split = spec.model_copy(update={"validation": spec.validation.model_copy(update=kept)})
        split = on_disk(split, None, lambda text: None)
        trained = trained_sets(split, family)
        if len(trained) > 1:
            raise SpecError(
                f"A bench trains one set of images; this spec has {len(trained)}.",
                hint="Give one folder with dataset.path, and no regularisation.",
            )
        items, others = trained[0].items, held_out_items(split, family)
        _write(items, spec, family, draft / TRAINED)
        _write(others, spec, family, draft / HELD_OUT)
        os.replace(draft, folder)
    if spec.model.checkpoint == "tiny":
        write_tiny_checkpoint(Path(_checkpoint(spec, folder)))
    files = {name: sorted((folder / name).glob("*.png")) for name in (TRAINED, HELD_OUT)}
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return Staged(
        folder / TRAINED,
        folder / HELD_OUT,
        _checkpoint(spec, folder),
        len(files[TRAINED]),
        len(files[HELD_OUT]),
        digest.hexdigest(),
    )


def _checkpoint(spec: TrainSpec, folder: Path) -> str:
    given = spec.model.checkpoint
    return str(folder.with_name("tiny-checkpoint")) if given == "tiny" else given


def _write(items: Iterable[Item], spec: TrainSpec, family: Family, folder: Path) -> None:
    dataset = spec.dataset
    folder.mkdir(parents=True)
    for number, item in enumerate(items, start=1):
        size = bucket_for(item.size, dataset.resolution, family.side_multiple, dataset.upscale, dataset.aspect_buckets)
        target = folder / f"{number:05d}.png"
        fit(load_image(item), size).save(target, compress_level=1)
        target.with_suffix(f".{caption_ext(spec)}").write_text(item.caption, encoding="utf-8")
