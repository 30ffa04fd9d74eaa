"""The images that SimpleTuner reads, in a folder of the run's own: links, and mirrored copies where asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from loraport.dataset import Item, load_image
from loraport.families import check_family
from loraport.plugins import plugins
from loraport.sets import TrainedSet, held_out_items, trained_sets
from loraport.spec.models import TrainSpec
from loraport.staging import stage
from loraport_simpletuner.translate import HELD_OUT_ID, folder_of


def stage_images(spec: TrainSpec, work: Path) -> list[str]:
    """Fill the data sets' folders under `work`; warnings for the user. Raises DataError for bad images or captions.

    The spec's paths are folders (see `loraport.hub_datasets.on_disk`).
    """
    family = check_family(spec, plugins().families())
    sets = trained_sets(spec, family)
    for one in sets:
        items = one.items
        if one.set.flip:
            mirrored = work / folder_of("mirrored") / one.set.label
            items = [*items, *(_mirrored(item, mirrored, number) for number, item in enumerate(items))]
        stage(items, work / folder_of(one.set.label), _one_line, ".txt")
    if spec.validation.every:
        stage(held_out_items(spec, family), work / folder_of(HELD_OUT_ID), _one_line, ".txt")
    return [] if spec.dataset.upscale else _enlarged(sets)


def _one_line(item: Item) -> str:
    """SimpleTuner takes each line of a caption file for a caption of its own."""
    return " ".join(item.caption.split("\n")) if "\n" in item.caption else item.caption


def _mirrored(item: Item, folder: Path, number: int) -> Item:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:05d}.png"
    load_image(item).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    return replace(item, image=path)


def _enlarged(sets: list[TrainedSet]) -> list[str]:
    small = [
        item.image.name
        for one in sets
        for item in one.items
        if not one.set.regularization and item.size[0] * item.size[1] < one.set.resolution**2
    ]
    if not small:
        return []
    some = ", ".join(small[:3]) + (" …" if len(small) > 3 else "")
    return [f"SimpleTuner enlarges {len(small)} images that are smaller than the resolution: {some}"]
