"""What is counted of a dataset, and that one pass over it counts and checks."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_datasets import CAPTION, write_image, write_pair
from typer.testing import CliRunner

from loraport.buckets import bucket_for, fit
from loraport.cli.main import build_app
from loraport.ideogram4 import IDEOGRAM4
from loraport.plugins import plugins
from loraport.rules import Setting
from loraport_dataset.checking import check
from loraport_dataset.sources import Source
from loraport_dataset.stats import GRID, Box, Evenly, Heat, Stats, box_of, collector, cover, spread


def caption(*elements: dict[str, Any], **style: Any) -> dict[str, Any]:
    return {
        "high_level_description": "A dog.",
        **({"style_description": style} if style else {}),
        "compositional_deconstruction": {"background": "a beach", "elements": list(elements)},
    }


def counted(folder: Path, pictures: int = 0, **setting: Any) -> Stats:
    source = Source(folder, "dataset", Setting(IDEOGRAM4, **{"resolution": 256, **setting}), tokens="estimated")
    stats = [Stats(source, Evenly(pictures))]
    report = check([source], rules=[*plugins().rules().values(), collector(stats)])
    assert report.broken_rules == {}
    return stats[0]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(build_app(), ["dataset", "stats", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_images_are_counted_in_the_buckets_that_training_puts_them_in(tmp_path: Path) -> None:
    sizes = [(512, 512), (640, 360), (640, 360), (300, 900), (120, 100), (900, 15)]
    for number, size in enumerate(sizes):
        write_image(tmp_path / f"{number}.png", size, seed=number)
    stats = counted(tmp_path)
    expected: dict[tuple[int, int], int] = {}
    for size in sizes[:-1]:
        bucket = bucket_for(size, 256)
        expected[bucket] = expected.get(bucket, 0) + 1
    assert {size: of.images for size, of in stats.buckets.items()} == expected
    assert (stats.images, stats.trainable, stats.too_small, stats.uncaptioned) == (6, 5, 1, 6)
    assert stats.pixels == sum(width * height * count for (width, height), count in expected.items())
    assert stats.sizes[640, 360] == 2


@settings(max_examples=25)
@given(st.tuples(st.integers(128, 900), st.integers(128, 900)))
def test_the_share_cut_off_is_what_fitting_the_bucket_cuts_off(size: tuple[int, int]) -> None:
    bucket = bucket_for(size, 256)
    scale, cropped = cover(size, bucket)
    down = Image.linear_gradient("L")  # from 0 at the top to 255 at the bottom
    kept = 1.0
    for ramp in (down, down.transpose(Image.Transpose.ROTATE_90)):
        darkest, lightest = fit(ramp.resize(size), bucket).getextrema()
        kept *= (lightest - darkest) / 255
    assert cropped == pytest.approx(1 - kept, abs=0.03)
    assert scale * size[0] >= bucket[0] - 1e-6
    assert scale * size[1] >= bucket[1] - 1e-6


def test_captions_are_measured_as_they_are_trained(tmp_path: Path) -> None:
    write_pair(tmp_path, "a.png")
    (tmp_path / "a.json").write_text(json.dumps(CAPTION, indent=8), encoding="utf-8")
    plain, with_trigger = counted(tmp_path), counted(tmp_path, trigger_word="mp_dog")
    compact = len(json.dumps(CAPTION, separators=(",", ":")))
    assert list(plain.tokens) == [-(-compact // 3)]
    assert list(with_trigger.tokens) == [-(-(compact + len("mp_dog, ")) // 3)]
    exact = counted(tmp_path, count_tokens=lambda text: 7)
    assert list(exact.tokens) == [7]


def test_colours_media_and_boxes_are_read_out_of_captions(tmp_path: Path) -> None:
    elements = (
        {"type": "obj", "bbox": [0, 0, 500, 500], "desc": "a dog", "color_palette": ["#aa0000", "red"]},
        {"type": "text", "bbox": [100, 200, 150, 900], "text": "HI", "desc": "a sign"},
        {"type": "obj", "bbox": [900, 100, 200, 300], "desc": "upside down"},
        {"type": "obj", "bbox": [0, 0, 5000, 5000], "desc": "in pixels"},
        {"type": "obj", "desc": "nowhere"},
    )
    write_pair(tmp_path, "a.png", caption(*elements, medium="painting", color_palette=["#00FF00", "#AA0000", 7]))
    stats = counted(tmp_path)
    assert stats.element_colours == {"#AA0000": 1}
    assert stats.style_colours == {"#00FF00": 1, "#AA0000": 1}
    assert stats.media == {"painting": 1}
    assert stats.elements == {5: 1}
    assert (stats.heat["obj"].boxes, stats.heat["text"].boxes, stats.unusable_boxes) == (1, 1, 2)


@pytest.mark.parametrize(
    "root",
    [
        [],
        7,
        {"style_description": [], "compositional_deconstruction": {"elements": {}}},
        {
            "style_description": {"medium": [], "color_palette": {}},
            "compositional_deconstruction": {"elements": [[], 5]},
        },
        {"compositional_deconstruction": {"elements": [{"bbox": "x"}, {"bbox": [True, 0, 1, 1]}, {"bbox": [0.5]}]}},
    ],
    ids=str,
)
def test_captions_of_any_shape_are_counted(tmp_path: Path, root: Any) -> None:
    write_pair(tmp_path, "a.png", root)
    stats = counted(tmp_path)
    assert stats.images == 1
    assert len(stats.tokens) == 1


def test_what_captions_invent_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraport_dataset.stats.MOST_DIFFERENT", 2)
    for number in range(3):
        colours = ["#111111", f"#00000{number}"]
        write_pair(tmp_path, f"{number}.png", caption(medium=f"medium {number}", color_palette=colours), seed=number)
    stats = counted(tmp_path)
    assert stats.style_colours == {"#111111": 3, "#000000": 1}
    assert stats.media == {"medium 0": 1, "medium 1": 1}


def test_unreadable_images_and_captions_are_counted(tmp_path: Path) -> None:
    (write_pair(tmp_path, "a.png")).write_bytes(b"no image")
    write_pair(tmp_path, "b.png")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    stats = counted(tmp_path)
    assert (stats.images, stats.unreadable, stats.uncaptioned) == (2, 1, 1)


def test_a_heat_map_counts_the_boxes_over_each_place() -> None:
    heat = Heat()
    heat.add(Box("obj", 0, 0, 1000, 500, ""))
    heat.add(Box("obj", 0, 0, 500, 1000, ""))
    rows = heat.rows()
    assert rows[0][0] == 2
    assert (rows[0][GRID - 1], rows[GRID - 1][0], rows[GRID - 1][GRID - 1]) == (1, 1, 0)
    assert sum(map(sum, rows)) == GRID * GRID
    assert heat.area == 1.0


@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4))
def test_every_box_is_somewhere_on_the_map_and_inside_it(sides: list[int]) -> None:
    top, bottom = sorted(sides[:2])
    left, right = sorted(sides[2:])
    heat = Heat()
    heat.add(Box("obj", top, left, bottom, right, ""))
    cells = sum(map(sum, heat.rows()))
    assert cells >= 1
    height, width = (bottom - top) * GRID / 1000, (right - left) * GRID / 1000
    assert cells <= (height + 1) * (width + 1)


def test_a_box_is_four_numbers_in_order_within_the_picture() -> None:
    assert box_of({"type": "text", "bbox": [1, 2, 3, 4], "text": "A", "desc": "b"}) == Box("text", 1, 2, 3, 4, "A")
    for bad in ([1, 2, 3], [3, 2, 1, 4], [0, 0, 1, 1001], ["0", 0, 1, 1], [0, 0, 1, float("nan")], None):
        assert box_of({"type": "obj", "bbox": bad}) is None


@given(st.integers(0, 400), st.integers(0, 12))
def test_the_sample_is_even_and_bounded(count: int, wanted: int) -> None:
    sample = Evenly(wanted)
    for item in range(count):
        sample.add(item)
        assert len(sample._kept) <= 2 * wanted
    found = sample.items()
    assert len(found) == min(count, wanted)
    assert found == sorted(set(found))
    if wanted > 1 and count > 4 * wanted:
        gaps = [after - before for before, after in pairwise(found)]
        assert max(gaps) <= 3 * count / wanted


def test_a_spread_names_ranks_of_the_values() -> None:
    assert spread([]) is None
    assert spread(range(1, 101)) == {"least": 1, "p10": 10, "median": 50, "p90": 90, "most": 100}
    assert spread([5]) == {"least": 5, "p10": 5, "median": 5, "p90": 5, "most": 5}


def test_the_command_tells_a_folder_in_a_few_lines_with_advice(tmp_path: Path) -> None:
    for number in range(3):
        write_pair(tmp_path, f"{number}.png", size=(512, 512), seed=number)
    code, out, _ = run(tmp_path, "--resolution", 512)
    assert code == 0
    assert "images    3, " in out
    assert "buckets   512x512: 3" in out
    assert "180 to 360 steps for a focused object (60 to 120 an image)" in out
    assert "a rank of 16 for a LoRA used alone, 8 for one stacked with others" in out
    assert "bound from above" not in out
    assert "estimated at 3 bytes a token" in out


def test_the_command_tells_every_set_of_a_spec_with_advice_from_its_images(tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 3)):
        for number in range(count):
            write_pair(tmp_path / name, f"{number}.png", size=(512, 256), seed=10 * count + number)
    spec = tmp_path / "spec.yaml"
    sets = "[{path: a, weight: 1}, {path: b, weight: 1, regularization: true, resolution: 256}]"
    spec.write_text(f"name: x\nmodel: {{checkpoint: a/b}}\ndataset: {{sets: {sets}, resolution: 512}}\n")
    code, out, _ = run(spec, "--set", "train.steps=100", "--json")
    told = json.loads(out)
    assert code == 0
    assert [(each["set"], each["images"]) for each in told["sets"]] == [("dataset.sets[0]", 2), ("dataset.sets[1]", 3)]
    assert [each["buckets"][0]["size"] for each in told["sets"]] == [[512, 256], [352, 176]]
    assert told["advice"]["images"] == 2
    assert told["advice"]["times_an_image"] == 25  # half of the samples are regularisation
    assert told["advice"]["disk"]["exact"]


def test_ten_thousand_images_are_told_without_keeping_them(tmp_path: Path) -> None:
    stats = Stats(Source(tmp_path, "dataset", Setting(IDEOGRAM4)), Evenly(48))
    stats_class = collector([stats])
    write_pair(tmp_path, "a.png")
    from loraport_dataset.scanning import scan

    (record,) = (each for each in scan(tmp_path, stats.setting))
    collect: Any = stats_class()
    for _ in range(10_000):
        collect.see(record, stats.setting)
    assert stats.images == 10_000
    assert len(stats.sample.items()) == 48
    assert len(stats.sizes) == 1


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, loraport_dataset.cli; print([m for m in ('PIL', 'jinja2', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
