"""The images and captions that all trainers of a bench read: at their final size, so that none resizes its own way."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.buckets import bucket_for, fit
from loraport.dataset import Item, load_image
from loraport.families import Family
from loraport.hub_datasets import PREFIX as HUB
from loraport.hub_datasets import on_disk
from loraport.sets import ImageSet, held_out_items, image_sets, subject, trained_sets
from loraport.spec.models import DatasetSection, TrainSpec
from loraport.staging import write_tiny_checkpoint
from loraport_bench.settings import writing

TRAINED, HELD_OUT = "images", "held-out"


@dataclass(frozen=True)
class Staged:
    """Folders of PNG files `00001.png`, … with captions beside them, and what is in them. Of several sets, `trained`
    holds a folder for each."""

    trained: Path
    held_out: Path
    checkpoint: str  #: that of the spec; for `tiny`, one folder that all use
    images: int
    held_out_images: int
    sha256: str


def planned(spec: TrainSpec, folder: Path) -> Staged:
    """Where the images under `folder` will be, with nothing known of them."""
    return Staged(folder / TRAINED, folder / HELD_OUT, _checkpoint(spec, folder), 0, 0, "")


def caption_ext(one: ImageSet) -> str:
    """The extension of a set's staged captions: its own, or txt where they came from a column, as the hub's may."""
    return "txt" if one.caption_field or str(one.path).startswith(HUB) else one.caption_ext


def place_of(one: ImageSet, spec: TrainSpec, folder: Path) -> Path:
    """Where a set of the spec is staged, under the folder of all that is trained."""
    return folder / one.label if len(image_sets(spec.dataset)) > 1 else folder


def staged_dataset(spec: TrainSpec, folder: Path) -> dict[str, Any]:
    """The fields of `dataset` by which what is staged in `folder` is read, as often and as large as the spec says."""
    gone: dict[str, Any] = {"trigger_word": None, "default_caption": None, "caption_field": None}
    sets = image_sets(spec.dataset)
    places = [{"path": str(place_of(one, spec, folder)), "caption_ext": caption_ext(one)} for one in sets]
    if spec.dataset.sets:
        said = [one.model_dump(mode="json", exclude=set(gone)) for one in spec.dataset.sets]
        return {**gone, "sets": [{**one, **place} for one, place in zip(said, places, strict=True)]}
    first, *others = places
    general = [{"regularization": {**spec.dataset.regularization.model_dump(mode="json"), **one}} for one in others]
    return {**gone, **first, **(general[0] if general else {})}


def held_out_dataset(spec: TrainSpec, folder: Path) -> dict[str, Any]:
    """The fields of `dataset` by which the held-out images are read: one set, of the subject's size."""
    one = subject(spec.dataset)
    gone: dict[str, Any] = {"trigger_word": None, "default_caption": None, "caption_field": None}
    return {
        **gone,
        "sets": [],
        "regularization": {},
        "path": str(folder),
        "caption_ext": caption_ext(one),
        "resolution": one.resolution,
    }


def stage_images(spec: TrainSpec, held_out: int, family: Family, folder: Path) -> Staged:
    """Write the spec's images under `folder`, once. The last `held_out` by name of its first set are kept from
    training, unless the spec names a folder of its own for validation; with 0 there are none of either.

    Captions get the trigger word of their set. Raises DataError for what is wrong with images or captions, or when
    none is left to train; RunFolderError when they cannot be written.
    """
    lock = folder.with_name(f".{folder.name}.lock")
    with writing(lock):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # another session of this bench may be at it
        if not folder.exists():
            _stage(spec, held_out, family, folder)
        if spec.model.checkpoint == "tiny":
            write_tiny_checkpoint(Path(_checkpoint(spec, folder)))
    files = {name: sorted((folder / name).rglob("*.png")) for name in (TRAINED, HELD_OUT)}
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


def _stage(spec: TrainSpec, held_out: int, family: Family, folder: Path) -> None:
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    kept = {"images": max(1, held_out), "every": int(bool(held_out))}
    split = spec.model_copy(update={"validation": spec.validation.model_copy(update=kept)})
    split = on_disk(split, None, lambda text: None)
    for one, each in zip(image_sets(spec.dataset), trained_sets(split, family), strict=True):
        _write(each.items, one, spec.dataset, family, place_of(one, spec, draft / TRAINED))
    _write(held_out_items(split, family), subject(spec.dataset), spec.dataset, family, draft / HELD_OUT)
    with writing(folder):
        os.replace(draft, folder)


def _checkpoint(spec: TrainSpec, folder: Path) -> str:
    given = spec.model.checkpoint
    return str(folder.with_name("tiny-checkpoint")) if given == "tiny" else given


def _write(items: Iterable[Item], one: ImageSet, dataset: DatasetSection, family: Family, folder: Path) -> None:
    with writing(folder):
        folder.mkdir(parents=True)
    for number, item in enumerate(items, start=1):
        # Trainers differ in what they do with small images, whatever the spec says: here none is left small.
        size = bucket_for(item.size, one.resolution, family.side_multiple, True, dataset.aspect_buckets)
        target = folder / f"{number:05d}.png"
        image = fit(load_image(item), size)
        with writing(target):
            image.save(target, compress_level=1)
            target.with_suffix(f".{caption_ext(one)}").write_text(item.caption, encoding="utf-8")
