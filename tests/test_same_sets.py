"""Every backend trains the same images with the same captions, as often: what each one lays out for a spec of several
sets, held against the others'."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loraport.ideogram4 import IDEOGRAM4
from loraport.planning import make_plan
from loraport.plugins import plugins
from loraport.profiles import resolve_memory
from loraport.sets import trained_sets
from loraport.spec.models import TrainSpec

WEIGHTS = {"weights": True, "repeats": False}


def picture(path: Path, number: int, size: tuple[int, int]) -> Path:
    """An image like no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(params=WEIGHTS.values(), ids=WEIGHTS)
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> TrainSpec:
    """Text, JSON and a column of metadata; own sizes; mirrored images; the same names in each set; regularisation."""
    for number, size in enumerate([(160, 128), (128, 160), (200, 96)]):
        picture(tmp_path / "photos" / f"{number}.png", number, size).with_suffix(".txt").write_text(f"photo {number}")
    for number in range(2):
        described = {"high_level_description": f"drawing {number}", "compositional_deconstruction": {}}
        file = picture(tmp_path / "drawings" / f"{number}.png", 10 + number, (128, 128))
        file.with_suffix(".json").write_text(json.dumps(described, indent=2))
    rows = [{"file_name": f"{number}.png", "caption": f"car {number}"} for number in range(4)]
    for row in rows:
        picture(tmp_path / "cars" / row["file_name"], 20 + int(row["file_name"][0]), (96, 96))
    (tmp_path / "cars" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def often(weight: int, repeats: int) -> dict[str, int]:
        return {"weight": weight} if request.param else {"repeats": repeats}

    sets = [
        {"path": tmp_path / "photos", "caption_ext": "txt", **often(2, 3)},
        {"path": tmp_path / "drawings", "resolution": 64, "flip": True, "trigger_word": "", **often(1, 1)},
        {"path": tmp_path / "cars", "caption_field": "caption", "regularization": True, **often(1, 2)},
    ]
    content = {
        "name": "sets",
        "model": {"checkpoint": "/models/ideogram-4"},
        "dataset": {"sets": sets, "resolution": 128, "trigger_word": "zork"},
        "validation": {"every": 5, "images": 1},
    }
    return resolve_memory(TrainSpec.model_validate(content), plugins().profiles())


def pixels(image: Image.Image) -> str:
    return hashlib.sha256(repr(image.size).encode() + np.asarray(image.convert("RGB")).tobytes()).hexdigest()


def test_diffsynth_trains_the_native_trainers_pixels_captions_and_counts(spec: TrainSpec, tmp_path: Path) -> None:
    from loraport_diffsynth.prepare import write_pictures
    from loraport_native.data import entries_of
    from loraport_native.features import pixels_of

    ours: Counter[tuple[str, str, float]] = Counter()
    for entry in entries_of(spec, IDEOGRAM4)[0]:
        seen = pixels_of(entry.picture)[0].permute(1, 2, 0).numpy()
        image = Image.fromarray(((seen + 1) * 127.5).round().astype(np.uint8))
        ours[pixels(image), entry.caption, entry.weight] += entry.repeats
    theirs: Counter[tuple[str, str, float]] = Counter()
    for one in write_pictures(spec, tmp_path / "out", lambda done, total: None):
        theirs[pixels(Image.open(tmp_path / "out" / one.file)), one.caption, one.weight] += one.repeats
    assert theirs == ours
    assert sum(ours.values()) == sum(one.samples for one in trained_sets(spec, IDEOGRAM4))
    assert {caption.partition(" ")[0] for _, caption, _ in ours} == {
        "zork,",
        '{"high_level_description":"drawing',
        "car",
    }


def wanted(spec: TrainSpec) -> list[Counter[tuple[str, str]]]:
    """The images and captions of each set."""
    return [
        Counter((pixels(Image.open(item.image)), item.caption) for item in one.items)
        for one in trained_sets(spec, IDEOGRAM4)
    ]


def staged(folder: Path, suffix: str, as_read: Callable[[str], str] = lambda text: text) -> Counter[tuple[str, str]]:
    """The images and captions that lie in a folder, as the trainer reads them."""
    images = [file for file in folder.iterdir() if file.suffix in (".png", ".jpg")]
    return Counter((pixels(Image.open(file)), as_read(file.with_suffix(suffix).read_text())) for file in images)


def as_ai_toolkit_reads(text: str) -> str:
    from loraport_ai_toolkit.captions import cut_and_joined

    read = cut_and_joined(text)
    return json.dumps(json.loads(read), separators=(",", ":")) if read.startswith("{") else read


def test_ai_toolkit_gets_each_set_as_it_is_and_as_often(spec: TrainSpec, tmp_path: Path) -> None:
    from loraport.run.supervisor import write_files
    from loraport_ai_toolkit import layout
    from loraport_ai_toolkit.job import stage_images, write_job

    write_files(make_plan(spec, plugins().backend("ai-toolkit"), tmp_path / "run"), tmp_path / "run")
    sets = trained_sets(spec, IDEOGRAM4)
    stage_images(sets, tmp_path / "run")
    write_job(spec, sets, tmp_path / "run", IDEOGRAM4, lambda message: None)
    process = json.loads((tmp_path / "run" / layout.JOB).read_text())["config"]["process"][0]
    found = [
        staged(tmp_path / "run" / entry["folder_path"], f".{entry['caption_ext']}", as_ai_toolkit_reads)
        for entry in process["datasets"]
    ]
    assert found == wanted(spec)
    assert [entry["num_repeats"] for entry in process["datasets"]] == [one.repeats for one in sets]
    assert [entry["flip_x"] for entry in process["datasets"]] == [False, True, False]
    assert [entry["resolution"] for entry in process["datasets"]] == [128, 64, 128]


def test_simpletuner_gets_each_set_as_it_is(spec: TrainSpec, tmp_path: Path) -> None:
    from loraport_simpletuner.staging import stage_images
    from loraport_simpletuner.translate import DATA

    files = make_plan(spec, plugins().backend("simpletuner"), tmp_path / "run").files
    stage_images(spec, tmp_path / "work")
    backends: list[dict[str, Any]] = json.loads(files[f"backend/{DATA}"])[:3]
    found = [staged(tmp_path / "work" / one["instance_data_dir"], ".txt") for one in backends]
    expected = wanted(spec)
    mirrored = trained_sets(spec, IDEOGRAM4)[1].items
    for item in mirrored:  # SimpleTuner mirrors nothing itself
        expected[1][pixels(Image.open(item.image).transpose(Image.Transpose.FLIP_LEFT_RIGHT)), item.caption] += 1
    assert found == expected
    sets = trained_sets(spec, IDEOGRAM4)
    if sets[0].set.weight is None:
        assert [one["repeats"] + 1 for one in backends] == [one.repeats for one in sets]
    else:
        samples = [one.samples for one in sets]
        shares = pytest.approx([count / sum(samples) for count in samples], rel=0.01)
        assert [one["probability"] for one in backends] == shares
