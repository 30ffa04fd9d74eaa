"""Datasets of the hub, with a hub of our own on this machine and the real client in a process of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from stand_ins.hub import Hub, serve

from loraport.dataset import scan
from loraport.hub_datasets import on_disk
from loraport.spec.models import TrainSpec

CHILD = Path(__file__).with_name("hub_child.py")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


def png(colour: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 32), colour).save(data, format="PNG")
    return data.getvalue()


def rows(*rows: dict[str, Any]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def content(*sets: dict[str, Any] | str, **dataset: Any) -> dict[str, Any]:
    entries = [{"path": one} if isinstance(one, str) else one for one in sets]
    return {"name": "s", "model": {"checkpoint": "tiny"}, "dataset": {"sets": entries, **dataset}}


def run(
    hub: Hub | None, home: Path, *jobs: tuple[dict[str, Any], Path | None], **environment: str
) -> list[dict[str, Any]]:
    """What a process of its own makes of specs and run folders, with its cache under `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    kept |= {"HF_HOME": str(home / "hf"), "LORAPORT_CACHE": str(home / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    kept |= {"HF_ENDPOINT": hub.address} if hub else {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(CHILD)],
        input=json.dumps([(spec, run_dir and str(run_dir)) for spec, run_dir in jobs]),
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def captions(place: dict[str, Any]) -> dict[str, str]:
    items = scan(place["path"], place["caption_ext"] or "txt", None, place["caption_field"])
    return {item.image.name: item.caption for item in items}


def test_each_layout_becomes_a_folder_with_its_captions(hub: Hub, tmp_path: Path) -> None:
    hub.publish("me/files", {"a.PNG": png(), "a.txt": b"in a file", "README.md": b"not wanted"})
    table = rows({"file_name": "b.png", "text": "in a table", "tags": "t"})
    hub.publish("me/table", {"data/train/b.png": png(), "data/train/metadata.jsonl": table, "data/test/c.png": png()})
    hub.publish("me/labels", {"d.png": png(), "d.txt": b"a file", "metadata.csv": b"file_name,label\nd.png,7\n"})
    hub.publish("me/both", {"e.png": png(), "e.txt": b"chosen", "metadata.csv": b"file_name,text\ne.png,not this\n"})
    both = {"path": "hub:me/both", "caption_ext": "txt"}
    tags = {"path": "hub:me/table", "caption_field": "tags"}
    spec = content("hub:me/files", "hub:me/table", tags, "hub:me/labels", both)
    (result,) = run(hub, tmp_path, (spec | {"dataset": {**spec["dataset"], "caption_ext": "txt"}}, None))
    found = result["spec"]["dataset"]["sets"]
    assert [captions(one) for one in found] == [
        {"a.PNG": "in a file"},
        {"b.png": "in a table"},
        {"b.png": "t"},
        {"d.png": "a file"},
        {"e.png": "chosen"},
    ]
    assert not any("README" in path for path in hub.asked)


def test_a_run_keeps_the_commit_it_began_with(hub: Hub, tmp_path: Path) -> None:
    first = hub.publish("me/set", {"a.png": png(), "a.txt": b"old"})
    tagged = hub.publish("me/set", {"a.png": png(), "a.txt": b"tagged"}, revision="v1")
    begun, again = tmp_path / "begun", tmp_path / "new"
    for folder in (begun, again):
        folder.mkdir()
    single = {"name": "s", "model": {"checkpoint": "tiny"}, "dataset": {"path": "hub:me/set", "caption_ext": "txt"}}
    (result,) = run(hub, tmp_path, (single, begun))
    assert json.loads((begun / "datasets.json").read_text()) == {"hub:me/set": first}
    assert result["told"] == [f"hub:me/set is at commit {first}, in {result['spec']['dataset']['path']}"]

    second = hub.publish("me/set", {"a.png": png("blue"), "a.txt": b"new"})
    tag = {**single, "dataset": {**single["dataset"], "path": "hub:me/set@v1"}}
    results = run(hub, tmp_path, (single, begun), (single, again), (tag, None))
    assert [captions(one["spec"]["dataset"])["a.png"] for one in results] == ["old", "new", "tagged"]
    assert json.loads((again / "datasets.json").read_text()) == {"hub:me/set": second}
    assert tagged in results[2]["told"][0]


def test_what_was_downloaded_once_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    hub.publish("me/set", {"a.png": png(), "a.txt": b"kept"})
    spec = content("hub:me/set", caption_ext="txt")
    online = run(hub, tmp_path, (spec, None))
    assert run(None, tmp_path, (spec, None)) == online


def test_what_the_hub_refuses_is_said_plainly(hub: Hub, tmp_path: Path) -> None:
    hub.gated.add("me/gated")
    hub.commits["me/gated", "main"] = "0" * 40
    hub.publish("me/set", {"a.png": png()})
    hub.publish("me/archive", {"images.tar": b"x"})
    names = ("hub:me/gated", "hub:me/absent", "hub:me/set@v9", "hub:me/archive")
    errors = [result["error"] for result in run(hub, tmp_path, *((content(name), None) for name in names))]
    for error, says in zip(
        errors,
        (
            ("hub:me/gated is gated", "https://huggingface.co/datasets/me/gated", "hf auth login"),
            ("The hub has no dataset me/absent, or it is private", "Check the spelling"),
            ("hub:me/set has no revision 'v9'",),
            ("hub:me/archive holds neither images nor parquet files", "unpack it"),
        ),
        strict=True,
    ):
        assert all(words in error for words in says), error


def test_two_names_of_one_commit_are_one_dataset(hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish("me/set", {"a.png": png(), "a.txt": b"x"})
    (result,) = run(hub, tmp_path, (content("hub:me/set", f"hub:me/set@{commit}", caption_ext="txt"), None))
    assert "do not go together as they are on the hub now: sets[1] is sets[0] once more" in result["error"]


def test_without_a_connection_that_is_what_is_said(tmp_path: Path) -> None:
    (result,) = run(None, tmp_path, (content("hub:me/set"), None))
    assert "not in the hub's cache and the hub cannot be reached" in result["error"]
    assert "HF_HUB_OFFLINE" in result["error"]


def test_without_the_hubs_library_the_extra_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "huggingface_hub.py").write_text("raise ImportError('not here')\n")
    (result,) = run(None, tmp_path, (content("hub:me/set"), None), PYTHONPATH=str(absent))
    assert "huggingface_hub" in result["error"]
    assert "pip install 'loraport[hub]'" in result["error"]


def test_parquet_files_are_unpacked_once(hub: Hub, tmp_path: Path) -> None:
    def packed(*captions: str) -> bytes:
        data = io.BytesIO()
        image = [{"bytes": png(), "path": None} for _ in captions]
        parquet.write_table(pyarrow.table({"image": image, "prompt": list(captions)}), data)
        return data.getvalue()

    train, test = "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"
    hub.publish("me/packed", {train: packed("one", "two"), test: packed("three")})
    wanted, wrong = content({"path": "hub:me/packed", "caption_field": "prompt"}), content("hub:me/packed")
    one, again, other = run(hub, tmp_path, (wanted, None), (wanted, None), (wrong, None))
    place = one["spec"]["dataset"]["sets"][0]
    assert one == again
    assert captions(place) == {"0000000.png": "one", "0000001.png": "two"}
    assert Path(place["path"]).is_relative_to(tmp_path / "cache" / "datasets" / "me--packed")
    assert "The column 'text' is not known" in other["error"]
    assert "prompt" in other["error"]


def test_a_spec_of_folders_stays_as_it_is_and_asks_nobody(tmp_path: Path) -> None:
    spec = TrainSpec.model_validate(content("/a", "/b"))
    assert on_disk(spec, tmp_path) is spec
    assert list(tmp_path.iterdir()) == []


def test_a_caption_that_would_be_trained_as_plain_text_ends_a_run_and_is_left_to_the_check_elsewhere(
    hub: Hub, tmp_path: Path
) -> None:
    before = b'rex, {"compositional_deconstruction":{"background":"a wall","elements":[]}}'
    hub.publish("me/broken", {"a.png": png(), "a.txt": before})
    spec = content({"path": "hub:me/broken", "caption_ext": "txt"})
    (tmp_path / "run").mkdir()
    checked, trained = run(hub, tmp_path, (spec, None), (spec, tmp_path / "run"))
    assert "spec" in checked
    assert "stands before the JSON ('rex,')" in trained["error"]
