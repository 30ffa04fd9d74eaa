from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.ideogram4 import IDEOGRAM4
from loraport.rules import Setting
from loraport_dataset.boxes import Convention
from loraport_dataset.fixing.dataset import recognise_boxes

GOOD = '{"high_level_description":"A dog.","compositional_deconstruction":{"background":"a wall","elements":[]}}'
SPACED = json.dumps(json.loads(GOOD), indent=2)
UNFIXABLE = '{"high_level_description":5,"compositional_deconstruction":{"background":"a wall","elements":[]}}'


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    add(folder, "a", GOOD)
    add(folder, "sub/b", SPACED)
    return folder


def add(folder: Path, name: str, caption: str | bytes | None, size: tuple[int, int] = (64, 48)) -> None:
    image = folder / f"{name}.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(image)
    if caption is not None:
        image.with_suffix(".json").write_bytes(caption.encode() if isinstance(caption, str) else caption)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(), ["dataset", "fix", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def with_box(box: list[float], desc: str = "a thing") -> str:
    element = {"type": "obj", "bbox": box, "desc": desc}
    return json.dumps(
        {"compositional_deconstruction": {"background": "", "elements": [element]}}, separators=(",", ":")
    )


def box(file: Path) -> Any:
    return json.loads(file.read_text())["compositional_deconstruction"]["elements"][0]["bbox"]


def test_the_new_folder_has_every_image_and_caption_and_the_old_one_is_untouched(dataset: Path, tmp_path: Path) -> None:
    before, out = files(dataset), tmp_path / "out"
    code, told = run(dataset, "-o", out)
    assert code == 0
    assert files(dataset) == before
    assert files(out) == before | {"sub/b.json": GOOD.encode()}
    assert "2 captions: 1 changed, 1 as they were." in told
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_the_fixed_folder_passes_the_check(dataset: Path, tmp_path: Path) -> None:
    add(dataset, "a", f"mp_dog, {GOOD.replace('A dog', 'A dog that runs')}")
    assert run(dataset, "-o", tmp_path / "out", "--trigger-word", "mp_dog")[0] == 0
    result = CliRunner().invoke(build_app(), ["dataset", "check", str(tmp_path / "out"), "--json"])
    report = json.loads(result.output)
    captions = {rule for rule in report["rules"] if not rule.startswith("image-")}
    assert captions == set()


def test_fixing_what_is_fixed_changes_nothing(dataset: Path, tmp_path: Path) -> None:
    run(dataset, "-o", tmp_path / "once", "--trigger-word", "mp_dog")
    code, told = run(tmp_path / "once", "-o", tmp_path / "twice", "--trigger-word", "mp_dog")
    assert code == 0
    assert "2 captions: 0 changed" in told
    assert files(tmp_path / "once") == files(tmp_path / "twice")


def test_a_dry_run_shows_a_unified_diff_and_writes_nothing(dataset: Path, tmp_path: Path) -> None:
    add(dataset, "c", GOOD.replace('"elements":[]', '"elements":[{"type":"object","desc":"a dog"}]'))
    before = files(tmp_path)
    code, told = run(dataset, "--dry-run")
    assert code == 0
    assert files(tmp_path) == before
    assert "--- a/c.json\n+++ b/c.json\n" in told
    assert '-    "type": "object",\n' in told
    assert '+    "type": "obj",\n' in told
    assert "sub/b.json: it is written compactly, as UTF-8\n" in told
    assert told.endswith("Nothing was written.\n")


def test_without_being_told_where_nothing_is_written(dataset: Path) -> None:
    before = files(dataset)
    code, told = run(dataset)
    assert (code, files(dataset)) == (3, before)
    assert "--in-place" in told


def test_in_place_keeps_each_original_aside(dataset: Path) -> None:
    before = files(dataset)
    assert run(dataset, "--in-place")[0] == 0
    assert files(dataset) == before | {"sub/b.json": GOOD.encode(), ".originals/1/sub/b.json": SPACED.encode()}
    add(dataset, "a", SPACED)
    assert run(dataset, "--in-place")[0] == 0
    assert (dataset / ".originals/1/sub/b.json").read_text() == SPACED
    assert (dataset / ".originals/2/a.json").read_text() == SPACED
    assert (dataset / "a.json").read_text() == GOOD


def test_what_is_left_is_listed_with_its_place_and_ends_with_four(dataset: Path, tmp_path: Path) -> None:
    add(dataset, "c", UNFIXABLE)
    code, told = run(dataset, "-o", tmp_path / "out")
    assert code == 4
    assert "c.json: high_level_description: error [high-level-description]" in told
    assert (tmp_path / "out/c.json").read_text() == UNFIXABLE


def test_json_output_has_each_change_and_all_that_is_left(dataset: Path, tmp_path: Path) -> None:
    add(dataset, "c", UNFIXABLE)
    code, told = run(dataset, "-o", tmp_path / "out", "--json")
    report = json.loads(told)
    assert (code, report["captions"], report["changed"], report["errors_left"]) == (4, 3, 1, 1)
    assert [(one["file"], one["rule"]) for one in report["changes"]] == [("sub/b.json", "serialisation")]
    assert [(one["file"], one["rule"]) for one in report["left"]] == [("c.json", "high-level-description")]
    assert report["out"] == str(tmp_path / "out")


def test_boxes_in_pixels_with_x_first_are_recognised_from_the_whole_set(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    add(folder, "a", with_box([1600, 100, 2000, 1000]), (2000, 1000))
    add(folder, "b", with_box([0, 0, 1900, 500]), (2000, 1000))
    add(folder, "c", with_box([100, 200, 300, 400]), (2000, 1000))
    code, told = run(folder, "-o", tmp_path / "out")
    assert code == 0, told
    assert "All boxes are read as [xmin, ymin, xmax, ymax] in pixels" in told
    assert box(tmp_path / "out/a.json") == [100, 800, 1000, 1000]
    assert box(tmp_path / "out/c.json") == [200, 50, 400, 150]
    again, _ = run(tmp_path / "out", "-o", tmp_path / "again")
    assert again == 0
    assert files(tmp_path / "again") == files(tmp_path / "out")


def test_boxes_that_could_be_x_or_y_first_stay_until_it_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for number in range(6):
        add(folder, str(number), with_box([100 * number, 100 * number, 2000, 1900]), (2000, 2000))
    code, told = run(folder, "-o", tmp_path / "out")
    assert code == 4
    assert "the whole set: error [bbox-convention]" in told
    assert "--boxes xy-corners-pixels, --boxes yx-corners-pixels, or --boxes official" in told
    assert files(tmp_path / "out") == files(folder)
    code, told = run(folder, "-o", tmp_path / "other", "--boxes", "yx-corners-pixels")
    assert (code, box(tmp_path / "other/1.json")) == (0, [50, 50, 1000, 950])


def test_boxes_that_would_be_taken_for_yet_another_convention_once_converted_stay(tmp_path: Path) -> None:
    """Shares of small pictures, x first as their captions say, all in the upper left half: in thousandths they would
    keep within the pictures' 512 pixels and use them all."""
    folder = tmp_path / "set"
    for number in range(60):
        add(folder, f"{number:02d}", with_box([0.05, 0.42, 0.1 + number / 1000, 0.5], "a lamp on the left"), (512, 512))
    found = recognise_boxes(folder, Setting(IDEOGRAM4))
    assert found is not None
    assert found.convention == Convention("xy", "corners", "fraction")
    code, told = run(folder, "-o", tmp_path / "out")
    assert code == 4
    assert "All boxes seem to be [xmin, ymin, xmax, ymax] in shares from 0 to 1" in told
    assert files(tmp_path / "out") == files(folder)


def test_a_convention_that_is_named_is_taken(tmp_path: Path) -> None:
    add(tmp_path / "set", "a", with_box([100, 200, 300, 400]))
    assert run(tmp_path / "set", "-o", tmp_path / "out", "--boxes", "xy-corners-thousandths")[0] == 0
    assert box(tmp_path / "out/a.json") == [200, 100, 400, 300]
    code, told = run(tmp_path / "set", "-o", tmp_path / "other", "--boxes", "xy-corner-pixels")
    assert (code, (tmp_path / "other").exists()) == (3, False)
    assert "xy-corners-pixels" in told


def test_a_caption_in_utf_16_becomes_utf_8(dataset: Path, tmp_path: Path) -> None:
    add(dataset, "c", GOOD.replace("dog", "café").encode("utf-16"))
    assert run(dataset, "-o", tmp_path / "out")[0] == 0
    assert "café" in (tmp_path / "out/c.json").read_text(encoding="utf-8")


def test_what_cannot_be_read_is_taken_over_as_it_is_and_named(dataset: Path, tmp_path: Path) -> None:
    latin = GOOD.replace("dog", "café").encode("latin-1")
    add(dataset, "c", latin)
    add(dataset, "d", None)
    (dataset / "e.png").write_bytes(b"no image")
    (dataset / "e.json").write_text(GOOD)
    code, told = run(dataset, "-o", tmp_path / "out")
    assert code == 4
    assert "c.json: error [caption-unreadable]" in told
    assert "d.png: error [caption-missing] There is no d.json." in told
    assert files(tmp_path / "out")["c.json"] == latin
    assert files(tmp_path / "out")["e.png"] == b"no image"


@pytest.mark.parametrize("how", ["hardlink", "symlink"])
def test_images_can_be_linked(dataset: Path, tmp_path: Path, how: str) -> None:
    assert run(dataset, "-o", tmp_path / "out", "--images", how)[0] == 0
    image = tmp_path / "out/sub/b.png"
    assert image.is_symlink() == (how == "symlink")
    assert os.path.samefile(image, dataset / "sub/b.png")


@pytest.mark.parametrize("place", ["set/out", "set", "full", "file"])
def test_a_place_that_is_taken_or_within_the_dataset_is_refused(dataset: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/something").touch()
    (tmp_path / "file").touch()
    before = files(tmp_path)
    code, told = run(dataset, "-o", tmp_path / place)
    assert (code, files(tmp_path)) == (4, before)
    assert told.startswith("error: ")


def test_a_failure_midway_leaves_no_half_folder(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(dataset, "z", GOOD)
    copy = shutil.copy2

    def full(source: Path, target: Path) -> None:
        if source.name == "z.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(shutil, "copy2", full)
    code, told = run(dataset, "-o", tmp_path / "out")
    assert code == 4
    assert "z.png" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_a_caption_of_ten_megabytes_and_a_loop_of_links_do_no_harm(dataset: Path, tmp_path: Path) -> None:
    add(dataset, "c", "{" + " " * 10_000_000)
    (dataset / "sub/loop").symlink_to(dataset)
    code, told = run(dataset, "-o", tmp_path / "out")
    assert code == 4
    assert "c.json: error [caption-unreadable] The caption has 10,000,001 bytes" in told
    assert (tmp_path / "out/c.json").stat().st_size == 10_000_001
    assert not (tmp_path / "out/sub/loop").exists()


def test_names_that_would_move_the_cursor_are_shown_harmless(dataset: Path, tmp_path: Path) -> None:
    add(dataset, "c\x1b[2J\n", UNFIXABLE)
    _, told = run(dataset, "-o", tmp_path / "out")
    assert "\x1b" not in told
    assert "c\\x1b[2J\\n.json" in told
    assert (tmp_path / "out" / "c\x1b[2J\n.json").is_file()


def test_two_images_of_one_name_share_their_caption(dataset: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(dataset / "sub/b.jpg")
    code, told = run(dataset, "-o", tmp_path / "out")
    assert code == 0
    assert "2 captions: 1 changed" in told
    assert (tmp_path / "out/sub/b.json").read_text() == GOOD


def test_what_cannot_be_read_is_left_out_and_named_and_the_rest_is_written(dataset: Path, tmp_path: Path) -> None:
    (dataset / "gone.png").symlink_to("nowhere")
    add(dataset, "pipe", None)
    os.mkfifo(dataset / "pipe.json")
    (dataset / "damaged.png").write_bytes(b"no image")
    (dataset / "damaged.json").write_text(GOOD)
    code, told = run(dataset, "-o", tmp_path / "out")
    assert code == 4
    assert "gone.png: error [image-unreadable] This is a link that leads nowhere. It is left out." in told
    assert "pipe.json: error [caption-unreadable] This is no ordinary file." in told
    pairs = {"a.json", "a.png", "sub/b.json", "sub/b.png", "damaged.json", "damaged.png"}
    assert set(files(tmp_path / "out")) == pairs | {"pipe.png"}


def test_an_empty_caption_is_not_told_to_be_plain_text(tmp_path: Path) -> None:
    add(tmp_path / "set", "a", "")
    code, told = run(tmp_path / "set", "-o", tmp_path / "out")
    assert code == 4
    assert "plain text" not in told
