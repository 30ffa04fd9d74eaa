"""The images that SimpleTuner reads, in a folder of the run's own: links, and mirrored copies where asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from loraport.dataset import Item, load_image, scan
from loraport.families import check_family
from loraport.plugins import plugins
from loraport.spec.models import TrainSpec
from loraport.staging import captioned_items, held_out_items, stage
from loraport_simpletuner.translate import HELD_OUT, IMAGES, REGULARIZATION


def stage_images(spec: TrainSpec, work: Path) -> list[str]:
    """Fill the data sets' folders under `work`; warnings for the user. Raises DataError for bad images or captions."""
    family = check_family(spec, plugins().families())
    items = captioned_items(spec, family)
    warnings = _enlarged(spec, items)
    if spec.dataset.flip:
        items = [*items, *(_mirrored(item, work / "dataset" / "mirrored", number) for number, item in enumerate(items))]
    stage(items, work / IMAGES, _one_line, ".txt")
    regularization = spec.dataset.regularization
    if regularization.path is not None:
        stage(scan(regularization.path, regularization.caption_ext), work / REGULARIZATION, _one_line, ".txt")
    if spec.validation.every:
        stage(held_out_items(spec, family), work / HELD_OUT, _one_line, ".txt")
    return warnings


def _one_line(item: Item) -> str:
    """SimpleTuner takes each line of a caption file for a caption of its own."""
    return " ".join(item.caption.split("\n")) if "\n" in item.caption else item.caption


def _mirrored(item: Item, folder: Path, number: int) -> Item:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:05d}.png"
    load_image(item).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    return replace(item, image=path)


def _enlarged(spec: TrainSpec, items: list[Item]) -> list[str]:
    if spec.dataset.upscale:
        return []
    small = [item.image.name for item in items if item.size[0] * item.size[1] < spec.dataset.resolution**2]
    if not small:
        return []
    some = ", ".join(small[:3]) + (" …" if len(small) > 3 else "")
    return [f"SimpleTuner enlarges {len(small)} images that are smaller than dataset.resolution: {some}"]
