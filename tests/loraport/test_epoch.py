"""What an epoch is made of, counted by names alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraport.epoch import epoch_of
from loraport.spec.models import TrainSpec


def fill(folder: Path, count: int) -> Path:
    """Files that are named as images; nothing opens them."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").touch()
    return folder


def spec_of(dataset: dict[str, Any], **sections: Any) -> TrainSpec:
    return TrainSpec.model_validate({"name": "s", "model": {"checkpoint": "tiny"}, "dataset": dataset, **sections})


def test_one_folder_is_one_line(tmp_path: Path) -> None:
    found = epoch_of(spec_of({"path": fill(tmp_path / "a", 10), "repeats": 3, "flip": True}, train={"steps": 90}))
    assert (found.samples, found.epochs) == (60, 1.5)
    assert found.lines() == ["10 images, 60 samples an epoch, 1.5 epochs"]


def test_several_sets_have_their_shares(tmp_path: Path) -> None:
    sets = [
        {"path": fill(tmp_path / "a", 4), "weight": 3},
        {"path": fill(tmp_path / "b", 12), "weight": 1, "regularization": True},
    ]
    train = {"steps": 48, "batch_size": 2, "gradient_accumulation": 2, "gpus": 2}
    found = epoch_of(spec_of({"sets": sets}, train=train))
    assert found.lines() == [
        "16 images in 2 sets, 48 samples an epoch, 8 epochs",
        f"dataset.sets[0]: 4 of {tmp_path}/a, 9 times each: 75 % of the samples",
        f"dataset.sets[1]: 12 of {tmp_path}/b, regularisation, 1 times each: 25 % of the samples",
    ]
    assert found.to_dict() == {
        "samples": 48,
        "epochs": 8.0,
        "sets": [
            {"field": "dataset.sets[0]", "path": f"{tmp_path}/a", "images": 4, "repeats": 9, "samples": 36},
            {"field": "dataset.sets[1]", "path": f"{tmp_path}/b", "images": 12, "repeats": 1, "samples": 12},
        ],
    }


def test_images_that_are_held_out_are_not_counted(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a", 5)
    held = epoch_of(spec_of({"path": folder}, validation={"every": 5, "images": 2}))
    assert held.samples == 3
    none = epoch_of(spec_of({"path": folder}, validation={"every": 5, "images": 5}))
    assert none.lines() == ["not counted: validation.images holds every image out"]


def test_what_cannot_be_counted_says_why(tmp_path: Path) -> None:
    fill(tmp_path / "a", 1)
    for path, why in (
        (str(tmp_path / "missing"), f"The dataset folder {tmp_path}/missing is not there"),
        ("hub:me/mine", "hub:me/mine is downloaded when the run starts"),
    ):
        found = epoch_of(spec_of({"sets": [{"path": tmp_path / "a"}, {"path": path}]}))
        assert found.lines() == [f"not counted: {why}"]
        assert found.to_dict() == {"samples": None, "epochs": None, "sets": None}


@pytest.mark.parametrize("count", [1, 2])
def test_one_image_is_one_image(tmp_path: Path, count: int) -> None:
    (line,) = epoch_of(spec_of({"path": fill(tmp_path / "a", count)}, train={"steps": 1})).lines()
    assert line.startswith("1 image, " if count == 1 else "2 images, ")
