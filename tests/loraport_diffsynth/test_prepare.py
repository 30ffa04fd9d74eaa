"""The images, rows and checkpoint that DiffSynth reads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loraport.errors import DataError, SpecError
from loraport.plugins import plugins
from loraport.profiles import resolve_memory
from loraport.spec.models import TrainSpec
from loraport_diffsynth import prepare
from loraport_diffsynth.prepare import Picture, draw
from loraport_diffsynth.translate import job

MakeSpec = Callable[..., TrainSpec]
Write = Callable[..., Path]


def quiet(done: int, total: int) -> None:
    """Hears the progress."""


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_images_get_their_final_size_and_the_users_folder_is_left_alone(
    make_spec: MakeSpec, pictures: Path, tmp_path: Path
) -> None:
    before = sorted((path.name, path.read_bytes()) for path in pictures.iterdir())
    spec = make_spec(dataset={"path": str(pictures), "resolution": 128, "flip": True, "trigger_word": "zork"})
    found = prepare.write_pictures(spec, tmp_path / "out", quiet)
    assert sorted((path.name, path.read_bytes()) for path in pictures.iterdir()) == before
    assert len(found) == 6
    plain, mirrored = (np.asarray(Image.open(tmp_path / "out" / picture.file)) for picture in found[:2])
    assert (plain == mirrored[:, ::-1]).all()
    for picture in found:
        width, height = Image.open(tmp_path / "out" / picture.file).size
        assert width % 16 == height % 16 == 0
        assert width * height <= 128 * 128
        assert json.loads(picture.caption)["high_level_description"].startswith("zork, ")


def test_an_image_that_changed_is_written_anew_and_one_that_did_not_is_kept(
    make_spec: MakeSpec, pictures: Path, tmp_path: Path
) -> None:
    spec = make_spec(dataset={"path": str(pictures), "resolution": 128})
    first = [picture.file for picture in prepare.write_pictures(spec, tmp_path / "out", quiet)]
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in first}
    Image.new("RGB", (128, 128), "red").save(pictures / "1.png")
    second = [picture.file for picture in prepare.write_pictures(spec, tmp_path / "out", quiet)]
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True]
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == times[name] for name in (first[0], first[2]))


def test_regularisation_images_keep_their_captions_and_carry_their_weight(
    make_spec: MakeSpec, pictures: Path, tmp_path: Path
) -> None:
    regular = {"path": str(pictures), "repeats": 2, "weight": 0.5}
    dataset = {"path": str(pictures), "resolution": 128, "trigger_word": "zork", "regularization": regular}
    found = prepare.write_pictures(make_spec(dataset=dataset), tmp_path / "out", quiet)
    assert [(picture.repeats, picture.weight) for picture in found] == [(1, 1.0)] * 3 + [(2, 0.5)] * 3
    assert "zork" not in found[-1].caption
    assert json.loads(found[-1].row())["loss_weight"] == 0.5


def test_an_image_too_small_to_train_is_named(make_spec: MakeSpec, pictures: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 200)).save(pictures / "0.png")
    with pytest.raises(DataError, match=r"0\.png is smaller"):
        prepare.write_pictures(make_spec(dataset={"path": str(pictures)}), tmp_path / "out", quiet)


PICTURES = [Picture("a.png", "A", 3, 1.0, 0.0), Picture("b.png", "B", 1, 1.0, 0.0)]
HALF = [replace(picture, dropout=0.5) for picture in PICTURES]


def test_each_picture_is_drawn_as_often_as_its_repeats_say_and_the_count_is_exact() -> None:
    assert Counter(number for number, _ in draw(PICTURES, 40, seed=1)) == {0: 30, 1: 10}
    assert len(draw(PICTURES, 7, seed=1)) == 7
    assert draw(HALF, 7, seed=1) == draw(HALF, 7, seed=1) != draw(HALF, 7, seed=2)


def test_that_share_of_each_pictures_captions_is_empty() -> None:
    pictures = [replace(PICTURES[0], dropout=0.25), PICTURES[1]]
    dropped = Counter(number for number, dropped in draw(pictures, 10_000, seed=3) if dropped)
    assert 0.23 * 7500 < dropped[0] < 0.27 * 7500
    assert dropped[1] == 0


def test_a_row_is_one_forward_pass_and_its_caption_a_string(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    prepare.write_rows([Picture("a.png", '{"x":"ü"}', 1, 1.0, 0.5)], [(0, False), (0, True)], path)
    assert [row["prompt"] for row in rows_of(path)] == ['{"x":"ü"}', ""]
    assert "ü" in path.read_text(encoding="utf-8")


def test_encoded_rows_are_linked_in_the_order_drawn_and_old_links_go(tmp_path: Path) -> None:
    prepare.write_encoding_rows(HALF, tmp_path / "encode.jsonl")
    assert [row["prompt"] for row in rows_of(tmp_path / "encode.jsonl")] == ["A", "B", "", ""]
    cache, order = tmp_path / "cache", tmp_path / "order"
    prepare.link_order(PICTURES, [(0, False)] * 9, cache, order)
    prepare.link_order(PICTURES, [(1, False), (0, True)], cache, order)
    assert [path.readlink().name for path in sorted(order.iterdir())] == ["1.pth", "2.pth"]


def test_a_checkpoint_folder_is_linked_and_its_quantisation_seen(tmp_path: Path, write_checkpoint: Write) -> None:
    plain = write_checkpoint(tmp_path / "plain, one", "layers.0.attention.qkv.weight")
    assert prepare.lay_out_checkpoint(str(plain), tmp_path) is None
    stored = write_checkpoint(tmp_path / "fp8", "layers.0.attention.qkv.weight", "layers.0.attention.qkv.weight_scale")
    assert prepare.lay_out_checkpoint(str(stored), tmp_path) == "fp8"
    assert (tmp_path / "checkpoint").resolve() == stored


def test_weights_that_are_stored_quantised_are_not_quantised_otherwise_in_silence() -> None:
    def asked(**memory: str) -> list[str]:
        content = {"name": "a", "model": {"checkpoint": "/stored"}, "dataset": {"path": "/p"}, "memory": memory}
        spec = resolve_memory(TrainSpec.model_validate(content), plugins().profiles())
        return list(job(spec)["phases"][-1]["arguments"])

    prepare.refuse_other_storage("fp8", asked())
    prepare.refuse_other_storage("fp8", asked(quantize="fp8"))
    prepare.refuse_other_storage("nf4", asked(quantize="nf4"))
    for stored, other in (("fp8", "nf4"), ("nf4", "fp8"), ("fp8", "fp8-dynamic")):
        with pytest.raises(SpecError, match=f"stored in {stored}, which DiffSynth keeps"):
            prepare.refuse_other_storage(stored, asked(quantize=other))


def test_a_checkpoint_that_diffsynth_cannot_read_is_refused_before_it_starts(
    tmp_path: Path, write_checkpoint: Write
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="lacks transformer"):
        prepare.lay_out_checkpoint(str(tmp_path / "empty"), tmp_path)
    with pytest.raises(DataError, match="not in the official layout"):
        prepare.lay_out_checkpoint(str(write_checkpoint(tmp_path / "d", "layers.0.attention.to_q.weight")), tmp_path)
