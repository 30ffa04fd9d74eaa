"""Several sets of images in one spec: what each holds, and how often each image comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loraport.errors import DataError
from loraport.ideogram4 import IDEOGRAM4
from loraport.sets import (
    MOST_SAMPLES,
    TOLERANCE,
    ImageSet,
    TrainedSet,
    held_out_items,
    image_sets,
    largest_resolution,
    list_sets,
    subject,
    trained_sets,
    whole_repeats,
)
from loraport.spec.models import TrainSpec


def fill(folder: Path, *names: str, caption: str | None = "a thing") -> Path:
    """Images, each with another colour, and a text caption beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (64, 48), (number, len(folder.name), 9)).save(folder / f"{name}.png")
        if caption is not None:
            (folder / f"{name}.txt").write_text(caption)
    return folder


def spec_of(*sets: dict[str, Any], validation: dict[str, Any] | None = None, **dataset: Any) -> TrainSpec:
    content = {"caption_ext": "txt", **dataset} | ({"sets": list(sets)} if sets else {})
    model = {"checkpoint": "tiny"}
    return TrainSpec.model_validate({"name": "s", "model": model, "dataset": content, "validation": validation or {}})


def trained(spec: TrainSpec) -> list[TrainedSet]:
    return trained_sets(spec, IDEOGRAM4)


def test_one_folder_is_one_set() -> None:
    (one,) = image_sets(spec_of(path="/a", repeats=3, resolution=512, trigger_word="zork", flip=True).dataset)
    assert (one.field, one.label, one.path, one.repeats) == ("dataset", "images", Path("/a"), 3)
    assert (one.resolution, one.trigger_word, one.flip, one.regularization) == (512, "zork", True, False)


def test_a_set_takes_from_the_dataset_what_it_does_not_say() -> None:
    shared = {"resolution": 768, "trigger_word": "zork", "caption_dropout": 0.1, "default_caption": "x", "flip": True}
    one, other = image_sets(
        spec_of(
            {"path": "/a"},
            {
                "path": "/b",
                "resolution": 512,
                "trigger_word": "",
                "caption_ext": "caption",
                "flip": False,
                "repeats": 4,
            },
            **shared,
        ).dataset
    )
    assert (one.resolution, one.trigger_word, one.caption_ext, one.flip, one.repeats) == (768, "zork", "txt", True, 1)
    assert (other.resolution, other.trigger_word, other.caption_ext) == (512, None, "caption")
    assert (other.flip, other.repeats, other.caption_dropout, other.default_caption) == (False, 4, 0.1, "x")
    assert [one.field, other.field] == ["dataset.sets[0]", "dataset.sets[1]"]
    assert [one.label, other.label] == ["set-0", "set-1"]


def test_regularisation_takes_no_word_caption_or_mirroring_from_the_dataset() -> None:
    shared = {"trigger_word": "zork", "default_caption": "a zork", "flip": True, "caption_dropout": 0.1}
    regular = {"path": "/r", "regularization": True, "loss_weight": 0.5}
    _, one = image_sets(spec_of({"path": "/a"}, regular, **shared).dataset)
    assert (one.trigger_word, one.default_caption, one.flip, one.caption_dropout) == (None, None, False, 0.1)
    assert (one.regularization, one.loss_weight) == (True, 0.5)


def test_the_short_form_of_a_regularisation_set_means_the_same_as_the_long_one() -> None:
    short = spec_of(path="/a", regularization={"path": "/r", "caption_ext": "txt", "repeats": 2, "weight": 0.5})
    long = spec_of({"path": "/a"}, {"path": "/r", "regularization": True, "repeats": 2, "loss_weight": 0.5})

    def plain(one: ImageSet) -> dict[str, Any]:
        return {name: value for name, value in vars(one).items() if name != "field"}

    assert [plain(one) for one in image_sets(short.dataset)] == [plain(one) for one in image_sets(long.dataset)]


def test_the_subject_and_the_largest_resolution_are_found_among_all_sets() -> None:
    regular = {"path": "/r", "regularization": True, "resolution": 1280}
    dataset = spec_of(regular, {"path": "/a", "resolution": 512}, {"path": "/b"}, resolution=768).dataset
    assert subject(dataset).path == Path("/a")
    assert largest_resolution(dataset) == 1280


def test_names_that_are_in_two_sets_are_two_images(tmp_path: Path) -> None:
    spec = spec_of({"path": fill(tmp_path / "one", "a", "b")}, {"path": fill(tmp_path / "other", "a"), "repeats": 5})
    first, second = trained(spec)
    assert [item.image for item in first.items + second.items] == [
        tmp_path / "one" / "a.png",
        tmp_path / "one" / "b.png",
        tmp_path / "other" / "a.png",
    ]
    assert (first.samples, second.samples) == (2, 5)


def test_each_set_has_its_own_captions_and_word(tmp_path: Path) -> None:
    fill(tmp_path / "json", "a", caption=None)
    (tmp_path / "json" / "a.json").write_text('{"high_level_description": "a car"}')
    spec = spec_of(
        {"path": fill(tmp_path / "text", "a")},
        {"path": tmp_path / "json", "caption_ext": "json", "trigger_word": "brak"},
        {"path": fill(tmp_path / "bare", "a", caption=None), "default_caption": "something", "trigger_word": ""},
        {"path": fill(tmp_path / "general", "a", caption="a house"), "regularization": True},
        trigger_word="zork",
    )
    captions = [one.items[0].caption for one in trained(spec)]
    assert captions == ["zork, a thing", '{"high_level_description":"brak, a car"}', "something", "a house"]


def test_captions_come_out_of_a_column_of_the_sets_metadata(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a", "x", "y", caption=None)
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "y.png", "text": "why"}\n{"file_name": "x.png", "text": {"high_level_description": "ex"}}\n'
    )
    (one,) = trained(spec_of({"path": folder, "caption_field": "text"}))
    assert [item.caption for item in one.items] == ['{"high_level_description":"ex"}', "why"]


def test_weights_are_shares_whatever_the_numbers_of_images(tmp_path: Path) -> None:
    few, many = fill(tmp_path / "few", "a", "b"), fill(tmp_path / "many", *"abcdefghij")
    sets = trained(spec_of({"path": few, "weight": 3}, {"path": many, "weight": 1}))
    assert [one.repeats for one in sets] == [15, 1]
    assert [one.samples for one in sets] == [30, 10]


def test_mirrored_images_count_towards_the_share(tmp_path: Path) -> None:
    plain, twice = fill(tmp_path / "plain", "a", "b"), fill(tmp_path / "twice", "a")
    sets = trained(spec_of({"path": plain, "weight": 1}, {"path": twice, "weight": 1, "flip": True}))
    assert [(one.repeats, one.samples) for one in sets] == [(1, 2), (1, 2)]


@given(
    st.lists(
        st.tuples(st.integers(1, 5000), st.floats(0.01, 100, allow_nan=False)),
        min_size=1,
        max_size=6,
    )
)
def test_whole_repeats_are_exact_or_come_within_a_hundredth_of_every_share(sets: list[tuple[int, float]]) -> None:
    counts, weights = [count for count, _ in sets], [weight for _, weight in sets]
    times = whole_repeats(counts, weights)
    samples = [count * each for count, each in zip(counts, times, strict=True)]
    for each, weight in zip(samples, weights, strict=True):
        assert each / sum(samples) == pytest.approx(weight / sum(weights), rel=TOLERANCE * 1.001)
    assert min(times) >= 1


@pytest.mark.parametrize(
    ("counts", "weights", "repeats"),
    [
        ([10, 10], [1, 1], [1, 1]),
        ([5, 10], [1, 1], [2, 1]),
        ([7], [0.3], [1]),
        ([2, 3], [1, 1], [3, 2]),
        ([10, 3], [3, 1], [9, 10]),
        ([10, 3], [0.3, 0.1], [9, 10]),
        ([1, 1], [1e-05, 0.01], [1, 1000]),
        ([997, 1009], [1, 1], [1, 1]),
    ],
)
def test_repeats_are_the_smallest_that_do(counts: list[int], weights: list[float], repeats: list[int]) -> None:
    assert whole_repeats(counts, weights) == repeats


def test_an_epoch_that_would_never_end_is_refused(tmp_path: Path) -> None:
    sets = [{"path": fill(tmp_path / "a", "a"), "weight": 1000}, {"path": fill(tmp_path / "b", *map(str, range(30)))}]
    with pytest.raises(DataError, match=rf"more than {MOST_SAMPLES:,} \(dataset\.sets\[0\]: 1 images [\d]+ times"):
        trained(spec_of(sets[0], {**sets[1], "weight": 0.001}))


def test_images_are_held_out_of_the_first_set_that_is_no_regularisation(tmp_path: Path) -> None:
    general, one, other = (fill(tmp_path / name, "a", "b", "c") for name in ("general", "one", "other"))
    spec = spec_of(
        {"path": general, "regularization": True}, {"path": one}, {"path": other}, validation={"every": 5, "images": 2}
    )
    assert [len(each.items) for each in trained(spec)] == [3, 1, 3]
    assert [item.image for item in held_out_items(spec, IDEOGRAM4)] == [one / "b.png", one / "c.png"]
    with pytest.raises(DataError, match=r"validation\.images holds 3 of 3 images out of"):
        trained(spec_of({"path": one}, {"path": other}, validation={"every": 5, "images": 3}))


def test_held_out_images_of_a_folder_get_the_subjects_word(tmp_path: Path) -> None:
    one, apart = fill(tmp_path / "one", "a"), fill(tmp_path / "apart", "b")
    spec = spec_of({"path": one, "trigger_word": "zork"}, validation={"every": 5, "path": apart})
    (item,) = held_out_items(spec, IDEOGRAM4)
    assert (item.image, item.caption) == (apart / "b.png", "zork, a thing")
    assert held_out_items(spec_of({"path": one}), IDEOGRAM4) == []


def test_a_set_inside_another_is_told_with_the_image_that_is_in_both(tmp_path: Path) -> None:
    outer = fill(tmp_path / "outer", "a")
    inner = fill(outer / "inner", "b")
    with pytest.raises(DataError, match=r"b\.png is in dataset\.sets\[1\] and in dataset\.sets\[0\]"):
        trained(spec_of({"path": outer}, {"path": inner}))
    two_sizes = spec_of({"path": outer}, {"path": inner, "resolution": 512})
    assert [len(each.items) for each in trained(two_sizes)] == [2, 1]


def test_an_image_linked_into_two_sets_is_found(tmp_path: Path) -> None:
    one, other = fill(tmp_path / "one", "a"), tmp_path / "other"
    other.mkdir()
    for file in one.iterdir():
        (other / f"named otherwise{file.suffix}").symlink_to(file)
    with pytest.raises(DataError, match="with the same caption and resolution"):
        trained(spec_of({"path": one}, {"path": other}))


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_or_empty_folder_of_any_set_is_named(tmp_path: Path, which: int) -> None:
    paths = [fill(tmp_path / "one", "a"), fill(tmp_path / "other", "a")]
    paths[which] = tmp_path / "not there"
    with pytest.raises(DataError, match="not there is not there"):
        trained(spec_of(*({"path": path} for path in paths)))
    paths[which].mkdir()
    with pytest.raises(DataError, match="not there has no images"):
        trained(spec_of(*({"path": path} for path in paths)))


def test_listing_opens_no_image_and_says_where_each_caption_is(tmp_path: Path) -> None:
    files, column = fill(tmp_path / "files", "a"), fill(tmp_path / "column", "a", "b", caption=None)
    (files / "broken.png").write_bytes(b"no image")
    (column / "metadata.csv").write_text("file_name,text\na.png,in a table\n")
    listed = list_sets(spec_of({"path": files}, {"path": column, "caption_field": "text"}).dataset)
    assert [one.field for one, _ in listed] == ["dataset.sets[0]", "dataset.sets[1]"]
    assert [(one.image.name, one.caption) for one in listed[0][1]] == [
        ("a.png", files / "a.txt"),
        ("broken.png", files / "broken.txt"),
    ]
    assert [one.caption for one in listed[1][1]] == ["in a table", None]


def test_a_spec_of_several_sets_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    spec = spec_of({"path": "/a", "weight": 2}, {"path": "hub:me/mine@v1", "weight": 1, "regularization": True})
    again = TrainSpec.model_validate(json.loads(spec.model_dump_json()))
    assert again == spec
    assert again.hash() == spec.hash()
