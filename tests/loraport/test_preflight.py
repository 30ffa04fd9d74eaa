"""A caption that would be trained as plain text stops the run before it starts, whatever the trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from small_datasets import CAPTION, compact, write_image, write_pair
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.errors import DataError
from loraport.plugins import plugins
from loraport.preflight import check_captions, check_images
from loraport.run.api import train
from loraport.spec.load import build_spec
from loraport.spec.models import TrainSpec

BROKEN = compact(CAPTION)[:-1]
MISSING = "compositional_deconstruction: Required and missing"
BEFORE = "mp_dog, " + compact(CAPTION)


def spec(folder: Path, **dataset: Any) -> TrainSpec:
    model = {"checkpoint": "ideogram-ai/ideogram-4-fp8"}
    content = {"name": "dog", "model": model, "dataset": {"path": str(folder), **dataset}}
    return build_spec(content, base=folder, origin="the test").spec


def write(folder: Path, name: str, text: str) -> None:
    write_image(folder / name).with_suffix(".json").write_text(text)


def refusal(wanted: TrainSpec) -> str:
    with pytest.raises(DataError) as caught:
        check_captions(wanted)
    return str(caught.value)


@pytest.mark.parametrize("backend", list(plugins().backends()))
def test_no_trainer_is_started_on_a_broken_caption(backend: str, tmp_path: Path) -> None:
    write(tmp_path / "set", "a.png", BROKEN)
    with pytest.raises(DataError, match=r"a\.json: Not valid JSON at line 1"):
        train(spec(tmp_path / "set"), backend, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", list(plugins().backends()))
def test_no_trainer_is_started_on_an_image_that_cannot_be_read(backend: str, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write(tmp_path / "set", name, compact(CAPTION))
    (tmp_path / "set" / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png: "):
        train(spec(tmp_path / "set"), backend, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["dataset", "regularization", "validation"])
def test_folders_are_looked_for_wherever_a_spec_names_one_unless_it_is_of_the_hub(where: str, tmp_path: Path) -> None:
    write(tmp_path / "set", "a.png", compact(CAPTION))
    content: dict[str, Any] = spec(tmp_path / "set").model_dump(mode="json")
    content["validation"] |= {"every": 5, "path": str(tmp_path / "set")}
    place = content["dataset"][where] if where == "regularization" else content[where]
    check_images(TrainSpec.model_validate(content))
    place["path"] = str(tmp_path / "gone")
    with pytest.raises(DataError, match="gone is not there"):
        check_images(TrainSpec.model_validate(content))
    place["path"] = "hub:someone/photos"
    check_images(TrainSpec.model_validate(content))


def test_text_before_the_json_is_refused_in_a_text_file_too(tmp_path: Path) -> None:
    write_pair(tmp_path, "a.png", BEFORE)
    message = refusal(spec(tmp_path, caption_ext="txt", trigger_word="mp_dog"))
    assert "The trigger word stands before the JSON ('mp_dog,')" in message
    assert "`loraport check SPEC`" in message


def test_ten_captions_are_named_and_the_others_counted(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path, f"{number:02}.png", BROKEN)
    message = refusal(spec(tmp_path))
    assert message.startswith("12 captions would")
    assert "09.json" in message
    assert "10.json" not in message
    assert "and 2 more" in message


def test_every_folder_of_the_spec_is_looked_at(tmp_path: Path) -> None:
    for name in ("images", "general", "held out"):
        write_pair(tmp_path / name, "a.png")
    content = {
        "name": "dog",
        "model": {"checkpoint": "tiny"},
        "dataset": {"path": "images", "regularization": {"path": "general"}},
        "validation": {"every": 1, "path": "held out"},
    }
    wanted = build_spec(content, base=tmp_path, origin="the test").spec
    check_captions(wanted)
    for name in ("general", "held out"):
        (tmp_path / name / "a.json").write_text(BROKEN)
        assert f"{name}{os.sep}a.json" in refusal(wanted)
        (tmp_path / name / "a.json").write_text(compact(CAPTION))


def test_a_broken_default_caption_is_named_by_its_field(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    assert "dataset.default_caption: " in refusal(spec(tmp_path, default_caption=BEFORE))


def test_other_faults_stop_no_run(tmp_path: Path) -> None:
    """They are told by `loraport check`, or by the trainer that cannot read the file."""
    write(tmp_path, "keys.png", compact({"background": "a wall"}))
    write(tmp_path, "empty.png", "")
    write_image(tmp_path / "missing.png")
    write_image(tmp_path / "bytes.png").with_suffix(".json").write_bytes(b"\xff{}")
    write_image(tmp_path / "long.png").with_suffix(".json").write_bytes(b"{" * 1_000_001)
    write_image(tmp_path / "folder.png").with_suffix(".json").mkdir()
    check_captions(spec(tmp_path))


def test_captions_that_break_a_rule_of_the_model_are_trained_with_one_warning_on_all_of_them(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path, f"{number:02}.png", compact({"high_level_description": "A dog."}))
    write_pair(tmp_path, "whole.png")
    (warning,) = check_captions(spec(tmp_path))
    assert warning.startswith("12 captions break the rules of Ideogram 4 (root 12), such as ")
    assert f"00.json: {MISSING}" in warning
    assert "01.json" not in warning


def test_strict_refuses_captions_that_break_a_rule_of_the_model(tmp_path: Path) -> None:
    write(tmp_path / "set", "a.png", compact({"high_level_description": "A dog."}))
    with pytest.raises(DataError, match=rf"A caption breaks .* \(root 1\):\n  .*a\.json: {MISSING}"):
        train(spec(tmp_path / "set"), "native", out=tmp_path / "run", strict=True)
    assert not (tmp_path / "run").exists()


def test_captions_by_the_rules_are_trained_without_a_word(tmp_path: Path) -> None:
    write_pair(tmp_path, "a.png")
    assert check_captions(spec(tmp_path), strict=True) == []


def test_a_folder_that_is_not_here_is_no_matter_of_the_captions(tmp_path: Path) -> None:
    check_captions(spec(tmp_path / "gone"))


def test_plan_shows_its_table_and_then_refuses(tmp_path: Path) -> None:
    write(tmp_path / "set", "a.png", BROKEN)
    (tmp_path / "spec.yaml").write_text("name: dog\nmodel: {checkpoint: tiny}\ndataset: {path: set}\n")
    result = CliRunner().invoke(build_app(), ["plan", str(tmp_path / "spec.yaml")])
    assert result.exit_code == 4
    assert "train.learning_rate" in result.stdout
    assert "a.json" in result.stderr


def test_plan_warns_of_captions_that_break_a_rule_and_refuses_them_with_strict(tmp_path: Path) -> None:
    write(tmp_path / "set", "a.png", compact({"high_level_description": "A dog."}))
    (tmp_path / "spec.yaml").write_text("name: dog\nmodel: {checkpoint: tiny}\ndataset: {path: set}\n")
    command = ["plan", str(tmp_path / "spec.yaml")]
    warned, refused = (CliRunner().invoke(build_app(), [*command, *more]) for more in ([], ["--strict"]))
    assert (warned.exit_code, refused.exit_code) == (0, 4)
    assert "warning: A caption breaks the rules of Ideogram 4" in warned.stderr
    assert "A caption breaks the rules of Ideogram 4" in refused.stderr
