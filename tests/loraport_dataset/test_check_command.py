"""`loraport dataset check`, `loraport check` and `loraport dataset rules`, as a person or a script meets them."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
from small_datasets import CAPTION, compact, write_image, write_pair
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.plugins import GROUP, Plugins
from loraport_dataset.tokens import token_counter

BROKEN = {"high_level_description": "A dog."}
SMALL = ("--resolution", "64")


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(build_app(), list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def write_spec(folder: Path, dataset: str, rest: str = "") -> Path:
    spec = folder / "spec.yaml"
    spec.write_text(f"name: dog\nmodel: {{checkpoint: tiny}}\ndataset: {dataset}\n{rest}")
    return spec


def test_a_sound_folder_ends_with_zero_and_one_line_of_numbers(tmp_path: Path) -> None:
    write_pair(tmp_path, "a.png")
    code, out, _ = run("dataset", "check", tmp_path, *SMALL)
    assert code == 0
    assert f"{tmp_path}: 1 image, 1 caption (.json), for Ideogram 4 at 64 px\n0 errors, 0 warnings, 0 advice." in out


def test_errors_end_with_four_after_a_summary_and_then_the_details(tmp_path: Path) -> None:
    write_pair(tmp_path, "a.png")
    write_pair(tmp_path, "b.png", BROKEN, seed=1)
    code, out, _ = run("dataset", "check", tmp_path, *SMALL)
    assert code == 4
    summary, details = out.split("\nerror root", 1)
    assert "1 error, 0 warnings, 0 advice." in summary
    assert "b.json: Required and missing." in summary
    assert "b.json compositional_deconstruction: Required and missing." in details
    assert 'Write at least {"background":"...","elements":[]}.' in details


def test_warnings_end_with_zero_and_with_strict_with_four(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_pair(tmp_path, name)
    assert run("dataset", "check", tmp_path, *SMALL)[0] == 0
    assert run("dataset", "check", tmp_path, *SMALL, "--strict")[0] == 4


def test_advice_never_changes_the_exit_code(tmp_path: Path) -> None:
    write_pair(tmp_path, "a.png")
    code, out, _ = run("dataset", "check", tmp_path, "--resolution", "80", "--strict")
    assert (code, "1 advice" in out) == (0, True)


def test_json_holds_every_finding_and_the_same_as_the_findings_file(tmp_path: Path) -> None:
    for number in range(30):
        write_pair(tmp_path / "set", f"{number}.png", BROKEN, seed=number)
    code, out, _ = run("dataset", "check", tmp_path / "set", *SMALL, "--json", "-o", tmp_path / "findings.json")
    report = json.loads(out)
    assert json.loads((tmp_path / "findings.json").read_text()) == report
    assert (code, report["version"], report["errors"], report["warnings"]) == (4, 1, 30, 0)
    assert report["rules"] == {
        "root": {"severity": "error", "count": 30},
        "caption-repeated": {"severity": "advice", "count": 29},
    }
    assert report["datasets"][0] | {"folder": ""} == {
        "title": "dataset",
        "folder": "",
        "family": "Ideogram 4",
        "resolution": 64,
        "caption_ext": "json",
        "images": 30,
        "captions": 30,
        "tokens": report["datasets"][0]["tokens"],
    }
    assert "estimated at 3 bytes a token" in report["datasets"][0]["tokens"]
    first = next(finding for finding in report["findings"] if finding["rule"] == "root")
    assert first == {
        "dataset": "dataset",
        "file": "0.json",
        "json_path": "compositional_deconstruction",
        "rule": "root",
        "severity": "error",
        "message": "Required and missing.",
        "fix": 'Write at least {"background":"...","elements":[]}.',
    }


def test_the_screen_shows_ten_findings_of_a_rule_and_says_how_to_get_all(tmp_path: Path) -> None:
    for number in range(30):
        write_pair(tmp_path, f"{number:02}.png", BROKEN, seed=number)
    _, out, _ = run("dataset", "check", tmp_path, *SMALL)
    details = out.split("\nerror root", 1)[1].split("\nadvice", 1)[0]
    assert len(re.findall(r"^  \d\d\.json", details, re.MULTILINE)) == 10
    assert "… and 20 more" in details
    assert "Every finding: -o findings.json" in out


def test_one_file_does_not_fill_the_screen(tmp_path: Path) -> None:
    elements = [{"type": "thing", "desc": "x"}] * 50
    write_pair(tmp_path, "a.png", {"compositional_deconstruction": {"background": "", "elements": elements}})
    write_pair(
        tmp_path, "b.png", {"compositional_deconstruction": {"background": "b", "elements": elements[:1]}}, seed=1
    )
    _, out, _ = run("dataset", "check", tmp_path, *SMALL)
    assert out.count("a.json compositional_deconstruction") == 3
    assert out.count("b.json compositional_deconstruction") == 1


def test_the_findings_file_is_never_written_into_the_dataset(tmp_path: Path) -> None:
    write_pair(tmp_path, "a.png")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run("dataset", "check", tmp_path, "-o", tmp_path / "findings.json")
    assert (code, "never written to" in err) == (7, True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["gone", "empty", "a.txt"])
def test_what_is_no_folder_of_images_is_one_message(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a dog")
    code, _, err = run("dataset", "check", tmp_path / name)
    assert code in (3, 4)
    assert err.startswith("error: ")
    assert name in err


def test_the_extension_of_captions_is_the_one_that_most_images_have(tmp_path: Path) -> None:
    for number in range(3):
        write_pair(tmp_path, f"{number}.png", "A dog runs.", seed=number)
    write_pair(tmp_path, "3.png", seed=3)
    (tmp_path / "orphan.json").write_text("{}")
    _, out, _ = run("dataset", "check", tmp_path, *SMALL)
    assert "3 captions (.txt)" in out
    _, out, _ = run("dataset", "check", tmp_path, *SMALL, "--caption-ext", "json")
    assert "1 caption (.json)" in out


def test_a_folders_options_are_refused_for_a_spec_and_set_for_a_folder(tmp_path: Path) -> None:
    write_pair(tmp_path / "images", "a.png")
    spec = write_spec(tmp_path, "{path: images, resolution: 64}")
    assert run("dataset", "check", spec, *SMALL)[0] == 3
    assert run("dataset", "check", tmp_path / "images", "--set", "train.steps=1")[0] == 3
    assert run("dataset", "check", tmp_path / "images", "--family", "ideogramm4")[0] == 3
    assert run("dataset", "check", spec)[0] == 0


def test_what_a_folder_is_told_of_a_spec_is_answered_with_the_fields(tmp_path: Path) -> None:
    write_pair(tmp_path / "images", "a.png")
    spec = write_spec(tmp_path, "{path: images, resolution: 64}")
    _, _, err = run("dataset", "check", spec, "--trigger-word", "mp_dog", *SMALL)
    assert "--resolution, --trigger-word: for a folder" in err
    assert "--set dataset.resolution=... --set dataset.trigger_word=..." in err


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("--trigger-word", " ", "--trigger-word is empty."), ("--resolution", "1000", "The nearest is 992.")],
)
@pytest.mark.parametrize("name", ["check", "stats"])
def test_values_that_no_spec_takes_are_refused(name: str, option: str, value: str, says: str, tmp_path: Path) -> None:
    write_pair(tmp_path, "a.png")
    code, _, err = run("dataset", name, tmp_path, option, value)
    assert code == 3
    assert says in err


@pytest.mark.parametrize("name", ["check", "stats"])
def test_a_file_in_a_folder_that_is_not_there_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    write_pair(tmp_path / "set", "a.png")
    code, out, err = run("dataset", name, tmp_path / "set", "-o", tmp_path / "gone" / "file")
    assert (code, out) == (7, "")
    assert f"the folder {tmp_path / 'gone'} is not there." in err


def test_a_spec_given_to_a_command_for_folders_is_told_what_to_name(tmp_path: Path) -> None:
    write_pair(tmp_path / "images", "a.png")
    code, _, err = run("dataset", "fix", write_spec(tmp_path, "{path: images}"), "-o", tmp_path / "out")
    assert code == 4
    assert "name one that the spec names" in err


def test_a_spec_says_what_its_images_are_checked_for(tmp_path: Path) -> None:
    write_pair(tmp_path / "images", "a.png", size=(200, 100))
    spec = write_spec(tmp_path, "{path: images, resolution: 256, aspect_buckets: false, trigger_word: mp_dog}")
    code, out, _ = run("check", spec)
    assert code == 0
    assert "55% of the resolution 256" in out
    assert "is lost" in out
    assert "No caption has the trigger word 'mp_dog'" in out
    _, out, _ = run("check", spec, "--set", "dataset.resolution=64")
    assert "55%" not in out


def test_every_dataset_of_a_spec_is_checked_and_named(tmp_path: Path) -> None:
    write_pair(tmp_path / "images", "a.png")
    write_pair(tmp_path / "general", "b.png", "A dog.")
    write_image(tmp_path / "held" / "c.png")
    dataset = "{path: images, resolution: 64, regularization: {path: general, caption_ext: txt}}"
    spec = write_spec(tmp_path, dataset, "validation: {every: 10, path: held}\n")
    code, out, _ = run("check", spec)
    assert code == 4
    assert "(dataset): 1 image," in out
    assert "(dataset.regularization): 1 image," in out
    assert "dataset.regularization b.txt: Plain text" in out
    assert "validation c.png: There is no c.json." in out


def test_the_trigger_word_in_captions_of_a_regularisation_set_is_told(tmp_path: Path) -> None:
    write_pair(tmp_path / "images", "a.png", "A mp_dog runs.")
    write_pair(tmp_path / "general", "b.png", "A mp_dog sits.", seed=1)
    write_pair(tmp_path / "general", "c.png", "A dog sits.", seed=2)
    dataset = (
        "{path: images, caption_ext: txt, trigger_word: mp_dog, regularization: {path: general, caption_ext: txt}}"
    )
    _, out, _ = run("check", write_spec(tmp_path, dataset), "--json")
    told = [one for one in json.loads(out)["findings"] if one["rule"] == "trigger-in-regularization"]
    assert [(one["dataset"], one["file"]) for one in told] == [("dataset.regularization", "b.txt")]


def test_sets_have_their_own_resolution_captions_and_trigger_word(tmp_path: Path) -> None:
    write_pair(tmp_path / "one", "a.png", size=(128, 128))
    write_pair(tmp_path / "two", "b.png", "A mp_dog runs.", size=(128, 128), seed=1)
    sets = "[{path: one, resolution: 128}, {path: two, resolution: 512, caption_ext: txt, trigger_word: mp_dog}]"
    code, out, _ = run("check", write_spec(tmp_path, f"{{sets: {sets}}}"), "--json")
    report = json.loads(out)
    assert code == 0
    assert [one["title"] for one in report["datasets"]] == ["dataset.sets[0]", "dataset.sets[1]"]
    found = {(one["dataset"], one["rule"]) for one in report["findings"]}
    assert found == {("dataset.sets[1]", "image-small"), ("dataset.sets[1]", "caption-plain")}


def test_captions_out_of_metadata_are_checked_by_the_name_of_their_image(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "images" / name, seed=ord(name[0]))
    rows = [{"file_name": "a.png", "text": compact(CAPTION)[:-1]}, {"file_name": "b.png", "text": compact(BROKEN)}]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = write_spec(tmp_path, "{path: images, resolution: 64, caption_field: text}")
    report = json.loads(run("check", spec, "--json")[1])
    assert [(one["file"], one["rule"]) for one in report["findings"]] == [("a.png", "json"), ("b.png", "root")]


def test_the_rules_are_listed_and_as_json(tmp_path: Path) -> None:
    code, out, _ = run("dataset", "rules")
    assert code == 0
    assert re.search(r"^error +bbox-convention +ideogram4 ", out, re.MULTILINE)
    rules = {rule["id"]: rule for rule in json.loads(run("dataset", "rules", "--json")[1])}
    assert rules["json"]["stops_training"]
    assert rules["image-near-duplicate"]["needs_pixels"]
    assert rules["bbox"]["family"] == "ideogram4"
    assert rules["caption-orphaned"]["looks_at"] == "other files"


def test_names_cannot_move_the_cursor_and_json_holds_them_as_they_are(tmp_path: Path) -> None:
    write_pair(tmp_path, "a\x1b[2J\n.png", BROKEN)
    _, out, _ = run("dataset", "check", tmp_path, *SMALL)
    assert "\x1b[2J" not in out
    assert r"a\x1b[2J\n.json" in out
    found = json.loads(run("dataset", "check", tmp_path, *SMALL, "--json")[1])["findings"]
    assert "a\x1b[2J\n.json" in [one["file"] for one in found]


def test_rules_that_could_not_be_registered_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_a_plugin.py").write_text(
        "from loraport.hookspecs import hookimpl\n@hookimpl\ndef register_rules(register):\n    register(object)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    installed = Plugins([*entry_points(group=GROUP), EntryPoint("half", "half_a_plugin", GROUP)])
    monkeypatch.setattr("loraport.plugins.plugins", lambda: installed)
    write_pair(tmp_path / "set", "a.png")
    code, out, _ = run("dataset", "check", tmp_path / "set", *SMALL)
    assert code == 4
    assert "The rule of the plugin half failed and was left out: register_rules: TypeError" in out


def test_the_rules_of_a_family_come_by_a_plugin_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = Plugins([point for point in entry_points(group=GROUP) if point.name != "ideogram4_rules"])
    monkeypatch.setattr("loraport.plugins.plugins", lambda: installed)
    write_pair(tmp_path, "a.png", BROKEN)
    assert run("dataset", "check", tmp_path, *SMALL)[0] == 0


def test_captions_are_counted_by_the_tokenizer_of_a_local_checkpoint(tmp_path: Path) -> None:
    from loraport_native.tiny import write_tiny

    checkpoint = write_tiny(tmp_path / "tiny", "official")
    write_pair(tmp_path / "set", "a.png", {**CAPTION, "high_level_description": "A dog runs in the rain. " * 100})
    spec = write_spec(tmp_path, "{path: set, resolution: 64, max_text_tokens: 100}")
    code, out, _ = run("check", spec, "--set", f"model.checkpoint={checkpoint}")
    assert code == 4
    found = re.search(r"a\.json: ([\d,]+) tokens; the limit is 100\.", out)
    assert found
    count = token_counter(str(checkpoint)).count((tmp_path / "set" / "a.json").read_text())
    assert int(found[1].replace(",", "")) == count
    assert f"Caption lengths: counted by the tokenizer of {checkpoint}." in out


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "loraport.cli.main", *map(str, arguments)]


@pytest.mark.parametrize(
    "arguments", [("check", *SMALL), ("fix", "--dry-run"), ("wrap", "--caption-ext", "json", "-o", "out")]
)
def test_a_bar_is_shown_where_a_person_watches_and_nothing_elsewhere(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    for number in range(60):
        write_image(folder / f"{number}.png", seed=number)
        (folder / f"{number}.json").write_text(json.dumps(CAPTION, indent=1))
    name, *options = arguments
    call = command("dataset", name, folder, *(tmp_path / one if one == "out" else one for one in options))
    leader, follower = pty.openpty()
    environment: dict[str, Any] = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with (
        open(tmp_path / "told", "wb") as told,
        subprocess.Popen(call, stdout=told, stderr=follower, env=environment) as process,
    ):
        os.close(follower)
        shown = b""
        while True:
            try:
                data = os.read(leader, 4096)
            except OSError:  # the other end is closed
                break
            shown += data
    os.close(leader)
    assert process.returncode == 0
    assert b"60/60" in shown
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    quiet = subprocess.run(call, capture_output=True, check=True, env=environment)
    assert quiet.stderr == b""
    assert quiet.stdout == (tmp_path / "told").read_bytes()  # the bar takes nothing from the output


def test_loading_the_plugin_imports_nothing_heavy() -> None:
    probe = (
        "import sys, typer\n"
        "from loraport_dataset import plugin\n"
        "from loraport_dataset.rules import ideogram4\n"
        "assert 'loraport_dataset.cli' not in sys.modules\n"
        "plugin.register_commands(typer.Typer())\n"
        "heavy = {'torch', 'numpy', 'PIL', 'rich', 'imagehash', 'loraport_dataset.checking'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", probe], check=True, env=environment)


def test_what_concerns_the_whole_set_comes_before_its_many_consequences(tmp_path: Path) -> None:
    for number in range(8):
        box = [0, 0, 1280, 700 - number]  # pixels, x first
        elements = [{"type": "obj", "bbox": box, "desc": "a wall"}]
        content = {"compositional_deconstruction": {"background": f"{number}", "elements": elements}}
        write_pair(tmp_path, f"{number}.png", content, (1280, 720), seed=number)
    _, out, _ = run("dataset", "check", tmp_path, "--resolution", "512")
    assert re.findall(r"^  error +(\S+)", out, re.MULTILINE) == ["bbox-convention", "bbox"]


def test_without_imagehash_pixels_are_refused_before_anything_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(tmp_path, "a.png")
    monkeypatch.setitem(sys.modules, "imagehash", None)
    code, out, err = run("dataset", "check", tmp_path, "--pixels", "--json")
    assert (code, out) == (3, "")
    assert "pip install 'loraport[dataset]'" in err
    assert run("dataset", "check", tmp_path, "--json", *SMALL)[0] == 0
