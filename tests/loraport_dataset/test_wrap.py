from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.errors import SpecError
from loraport.ideogram4 import IDEOGRAM4
from loraport.rules import Setting
from loraport_dataset.wrapping import wrap_dataset

JSON = '{"compositional_deconstruction":{"background":"a wall","elements":[]}}'


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    add(folder, "a", "A dog runs\nalong  the beach at dusk.\n")
    add(folder, "sub/b", 'A café with a "quoted" sign.')
    return folder


def add(folder: Path, name: str, caption: str | None) -> None:
    image = folder / f"{name}.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), "red").save(image)
    if caption is not None:
        image.with_suffix(".txt").write_text(caption)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(), ["dataset", "wrap", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_caption_becomes_its_own_description_and_nothing_is_invented(dataset: Path, tmp_path: Path) -> None:
    before = files(dataset)
    code, told = run(dataset, "-o", tmp_path / "out")
    assert code == 0
    assert files(dataset) == before
    assert sorted(files(tmp_path / "out")) == ["a.json", "a.png", "sub/b.json", "sub/b.png"]
    assert json.loads((tmp_path / "out/a.json").read_text()) == {
        "high_level_description": "A dog runs along the beach at dusk.",
        "compositional_deconstruction": {"background": "", "elements": []},
    }
    assert "Left out or empty" in told
    assert "style_description" in told


def test_wrapped_captions_pass_the_check(dataset: Path, tmp_path: Path) -> None:
    run(dataset, "-o", tmp_path / "out", "--trigger-word", "mp_dog")
    result = CliRunner().invoke(build_app(), ["dataset", "check", str(tmp_path / "out"), "--json"])
    rules = json.loads(result.output)["rules"]
    assert [rule for rule in rules if not rule.startswith("image-") and rule != "text-element"] == []


def test_the_trigger_word_goes_inside(dataset: Path, tmp_path: Path) -> None:
    run(dataset, "-o", tmp_path / "out", "--trigger-word", "mp_dog")
    caption = json.loads((tmp_path / "out/a.json").read_text())
    assert caption["high_level_description"] == "mp_dog, A dog runs along the beach at dusk."


def test_tags_and_quoted_writing_are_wrapped_and_pointed_out(dataset: Path, tmp_path: Path) -> None:
    add(dataset, "c", "1girl, solo, red hair, smile, looking at viewer, outdoors")
    code, told = run(dataset, "-o", tmp_path / "out")
    assert code == 0
    assert "c.json: high_level_description: warning [tags-in-description]" in told


def test_json_stays_as_it_is(dataset: Path, tmp_path: Path) -> None:
    add(dataset, "c", JSON)
    assert run(dataset, "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "out/c.json").read_text() == JSON


def test_what_cannot_be_wrapped_is_named_and_ends_with_four(dataset: Path, tmp_path: Path) -> None:
    add(dataset, "c", " \n")
    add(dataset, "d", None)
    add(dataset, "e", "mp_dog, " + JSON)
    code, told = run(dataset, "-o", tmp_path / "out", "--json")
    report = json.loads(told)
    assert (code, report["wrapped"], report["nothing"]) == (4, 2, 3)
    found = {(one["file"], one["rule"]) for one in report["problems"] if one["severity"] == "error"}
    assert found == {("c.txt", "caption-empty"), ("d.png", "caption-missing"), ("e.txt", "json")}
    assert sorted(name for name in files(tmp_path / "out") if name.endswith(".json")) == ["a.json", "sub/b.json"]


def test_in_place_writes_beside_and_over_nothing(dataset: Path) -> None:
    before = files(dataset)
    assert run(dataset, "--in-place")[0] == 0
    after = files(dataset)
    assert {name: content for name, content in after.items() if not name.endswith(".json")} == before
    assert len(after) == len(before) + 2
    add(dataset, "0", "A cat.")
    code, told = run(dataset, "--in-place")
    assert (code, (dataset / "0.json").exists()) == (4, False)
    assert "a.json and 1 more are there already; nothing was written." in told


@pytest.mark.parametrize("arguments", [[], ["--in-place", "-o", "out"], ["-o", "out", "--trigger-word", " "]])
def test_an_unclear_wish_is_refused_before_anything_is_written(dataset: Path, arguments: list[str]) -> None:
    before = files(dataset.parent)
    code, told = run(dataset, *arguments)
    assert (code, files(dataset.parent)) == (3, before)
    assert told.startswith("error: ")


def test_a_family_with_plain_captions_has_nothing_to_wrap_in(dataset: Path) -> None:
    family = replace(IDEOGRAM4, title="A plain one", caption_format="text", wrap_caption=None)
    with pytest.raises(SpecError, match="A plain one has plain-text captions"):
        next(wrap_dataset(dataset, Setting(family, caption_ext="txt")))


def test_plain_text_in_a_json_file_is_told_as_such_and_wrapped(tmp_path: Path) -> None:
    add(tmp_path / "set", "a", None)
    (tmp_path / "set" / "a.json").write_text("A dog runs, at dusk.")
    told = CliRunner().invoke(build_app(), ["dataset", "check", str(tmp_path / "set")])
    assert told.exit_code == 4
    assert "a.json: This is plain text, not JSON." in told.output
    assert "`loraport dataset wrap --caption-ext json`" in told.output
    code, _ = run(tmp_path / "set", "-o", tmp_path / "out", "--caption-ext", "json")
    assert code == 0
    assert json.loads((tmp_path / "out" / "a.json").read_text())["high_level_description"] == "A dog runs, at dusk."


def test_broken_json_is_not_wrapped_as_if_it_were_plain_text(tmp_path: Path) -> None:
    add(tmp_path / "set", "a", None)
    (tmp_path / "set" / "a.json").write_text(JSON[:-1])
    code, told = run(tmp_path / "set", "-o", tmp_path / "out", "--caption-ext", "json")
    assert code == 4
    assert "`loraport dataset fix` first" in told


def test_an_image_that_cannot_be_read_is_left_out_and_named(dataset: Path, tmp_path: Path) -> None:
    (dataset / "gone.png").symlink_to("nowhere")
    (dataset / "gone.txt").write_text("A dog.")
    code, told = run(dataset, "-o", tmp_path / "out")
    assert code == 4
    assert "gone.png: error [image-unreadable] This is a link that leads nowhere. It is left out." in told
    assert sorted(files(tmp_path / "out")) == ["a.json", "a.png", "sub/b.json", "sub/b.png"]
