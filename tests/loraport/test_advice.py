"""What is told before a run, as advice: ranges with their source, and time and disk from what is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from loraport.advice import STEPS, DatasetFacts, advice_for, advise, look_at, many_images
from loraport.cli.main import build_app
from loraport.disk import Contents, Disk, checkpoints_at_once, size_text
from loraport.gpu import Card
from loraport.plugins import plugins
from loraport.profiles import resolve_memory
from loraport.spec.models import SaveSection, TrainSpec

BACKEND = plugins().backend("native")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return folder(tmp_path / "images", 4)


def folder(path: Path, count: int, caption: str = "x" * 30) -> Path:
    path.mkdir()
    for number in range(count):
        Image.new("RGB", (64, 64)).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(caption)
    return path


def spec(dataset: dict[str, Any], **sections: dict[str, Any]) -> TrainSpec:
    content = {"name": "a", "model": {"checkpoint": "a/b"}, "dataset": {"caption_ext": "txt", **dataset}, **sections}
    return resolve_memory(TrainSpec.model_validate(content), plugins().profiles())


def looked_at(wanted: TrainSpec) -> DatasetFacts:
    facts = look_at(wanted)
    assert facts is not None
    return facts


def test_a_folder_is_counted_without_its_images_being_opened(images: Path) -> None:
    (images / "0.png").write_bytes(b"no image")
    facts = looked_at(spec({"path": str(images), "resolution": 512, "flip": True}))
    assert (facts.images, facts.encoded, facts.exact) == (4, 4, False)
    assert facts.contents == Contents(pixels=2 * 4 * 512**2, caption_tokens=4 * 10)
    assert facts.sample is not None
    assert (facts.sample.pixels, facts.sample.text_tokens) == (512**2, 10)


def test_missing_captions_count_as_the_default_one(images: Path) -> None:
    (images / "0.txt").unlink()
    facts = looked_at(spec({"path": str(images), "default_caption": "y" * 60}))
    assert facts.contents.caption_tokens == 3 * 10 + 20


def test_how_often_an_image_is_trained_leaves_out_regularisation_and_what_is_held_out(
    images: Path, tmp_path: Path
) -> None:
    general = folder(tmp_path / "general", 6)
    train = {"steps": 300, "batch_size": 2}
    alone = spec({"path": str(images)}, train=train, validation={"every": 10, "images": 1})
    assert advice_for(alone).times_an_image == pytest.approx(300 * 2 / 3)
    beside = {"path": str(images), "repeats": 3, "regularization": {"path": str(general), "caption_ext": "txt"}}
    assert advice_for(spec(beside, train=train)).times_an_image == pytest.approx(300 * 2 * (12 / 18) / 4)
    sets = [{"path": str(images), "weight": 3}, {"path": str(general), "weight": 1, "regularization": True}]
    assert advice_for(spec({"sets": sets}, train=train)).times_an_image == pytest.approx(300 * 2 * (3 / 4) / 4)


@pytest.mark.parametrize(("images", "warned"), [(199, False), (200, True), (10_000, True)])
def test_steps_for_very_many_images_are_told_to_be_a_bound_from_above(images: int, warned: bool) -> None:
    assert (f"For {images:,} images, take these as a bound from above" in many_images(images)) is warned


@pytest.mark.parametrize("path", ["/nowhere", "hub:some/dataset"])
def test_a_dataset_that_is_not_there_leaves_the_other_advice(path: str) -> None:
    advice = advice_for(spec({"path": path}))
    lines = dict(advice.lines())
    assert advice.facts is None
    assert lines["Steps"].startswith("1,000 steps. Advice (public guides, at batch size 1): 60 to 120 an image")
    assert "and the cache: checkpoints" in lines["Disk"]
    json.dumps(advice.to_dict())


def test_steps_and_rank_are_told_as_advice_with_their_source(images: Path) -> None:
    lines = dict(advice_for(spec({"path": str(images)}, train={"steps": 320})).lines())
    assert lines["Steps"].startswith("320 steps train each of 4 images 80 times. Advice (public guides")
    for wanted in ("60 to 120 an image for a focused object", "15 to 30 an image for a style", "50 to 250 in all"):
        assert wanted in lines["Steps"]
    assert lines["Rank"].startswith("16. Advice")
    assert "8 for one stacked with others" in lines["Rank"]


def test_ranges_for_a_number_of_images() -> None:
    assert [each.for_images(10) for each in STEPS] == [(600, 1200), (150, 300), (50, 250)]


def test_the_time_says_what_was_measured_and_what_was_scaled(images: Path) -> None:
    wanted = spec({"path": str(images), "resolution": 512}, memory={"profile": "80gb"}, train={"steps": 100})
    row = next(row for row in plugins().measurements() if row.memory["storage"] == "none")
    advice = advise(wanted, BACKEND, look_at(wanted), Card(row.card, 140, (9, 0)), [row])
    assert advice.seconds == pytest.approx(100 * row.step_s * (32**2 + 10) / (64**2 + 512))
    line = advice.time_line()
    assert f"from {row.step_s:.3g} s a step measured there ({row.date}, 1024 px, 512 text tokens)" in line
    assert "times 0.22 as that many tokens pass here, though it had rank 32" in line
    own = replace(row, source="runs/one", dataset="another")
    assert "(in runs/one, " in advise(wanted, BACKEND, look_at(wanted), Card(row.card, 140, (9, 0)), [own]).time_line()
    told = advice.to_dict()["time"]
    assert told["measured"]["source"] == row.source
    assert told["seconds"] == pytest.approx(advice.seconds, abs=0.1)


def test_without_a_measurement_the_time_line_says_so_and_gives_no_number(images: Path) -> None:
    wanted = spec({"path": str(images)})
    advice = advise(wanted, BACKEND, look_at(wanted), None, plugins().measurements())
    assert advice.time_line().startswith("not known: ")
    assert advice.time_line().endswith("A run tells it after its first steps.")
    helped = advise(wanted, BACKEND, look_at(wanted), Card("New", 24, (8, 9)), plugins().measurements())
    assert helped.time_line().endswith("A run tells it after its first steps, and plans after it do too.")
    assert advice.seconds is None
    assert advice.to_dict()["time"]["seconds"] is None


def test_the_disk_line_sums_cache_checkpoints_and_result(images: Path) -> None:
    backend = SimpleNamespace(name="other", predict_disk=lambda spec, contents: Disk(10_000_000, 3_000_000_000, 2_000))
    wanted = spec({"path": str(images)})
    line = advise(wanted, backend, look_at(wanted), None, []).disk_line()
    assert line == "at most about 3.0 GB: cache 10 MB, checkpoints 3.0 GB, LoRA 2 kB."
    streaming = SimpleNamespace(name="other", predict_disk=lambda spec, contents: Disk(0, 10**9, 2_000, 5 * 10**9))
    line = advise(wanted, streaming, look_at(wanted), None, []).disk_line()
    assert line.endswith(
        "about 6.0 GB: cache 0 kB, checkpoints 1.0 GB, LoRA 2 kB, the model's blocks while it trains 5.0 GB."
    )
    silent = SimpleNamespace(name="other")
    assert advise(wanted, silent, None, None, []).disk_line().startswith("not known")


@pytest.mark.parametrize(
    ("steps", "every", "keep", "most"), [(10, 0, 4, 1), (10, 20, 4, 1), (10, 5, 4, 2), (10, 4, 4, 3), (99, 1, 2, 3)]
)
def test_checkpoints_that_lie_on_disk_together(steps: int, every: int, keep: int, most: int) -> None:
    assert checkpoints_at_once(steps, SaveSection(every=every, keep=keep)) == most


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 kB"), (12_300, "12 kB"), (600_000, "0.6 MB"), (9_900_000, "9.9 MB"), (340e6, "340 MB"), (4.11e9, "4.1 GB")],
)
def test_sizes_as_people_say_them(size: float, text: str) -> None:
    assert size_text(size) == text


def test_check_ends_with_advice_that_changes_no_exit_code(tmp_path: Path) -> None:
    folder(tmp_path / "images", 3)
    (tmp_path / "spec.yaml").write_text(
        "name: a\nmodel: {checkpoint: a/b}\ndataset: {path: images, caption_ext: txt, resolution: 64}\n"
    )
    result = CliRunner().invoke(build_app(), ["check", str(tmp_path / "spec.yaml")])
    assert result.exit_code == 0
    assert "Steps: 1,000 steps train each of 3 images 333 times. Advice (public guides" in result.stdout
    assert "Disk: at most about " in result.stdout
