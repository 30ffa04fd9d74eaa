"""The folder of a bench: what it keeps of its settings, and the images that it stages."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loraport.errors import RunFolderError
from loraport.families import check_family
from loraport.plugins import plugins
from loraport.spec.models import TrainSpec
from loraport_bench import images
from loraport_bench.images import Staged


def stage(spec: TrainSpec, held_out: int, folder: Path) -> Staged:
    return images.stage_images(spec, held_out, check_family(spec, plugins().families()), folder / "data")


def test_two_sessions_that_begin_at_once_stage_the_images_once(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, written, write = TrainSpec.load(spec_file), [], images._write

    def slow(*given: Any) -> None:
        written.append(given)
        time.sleep(0.2)
        write(*given)

    monkeypatch.setattr(images, "_write", slow)
    with ThreadPoolExecutor(2) as both:
        first, second = both.map(lambda _: stage(spec, 2, tmp_path / "new" / "out"), range(2))
    assert first == second
    assert (first.images, first.held_out_images) == (3, 2)
    assert len(written) == 2, "what is trained, and what is held out, once each"


def test_nothing_is_held_out_where_nothing_is_to_be_scored(spec_file: Path, tmp_path: Path) -> None:
    spec = TrainSpec.load(spec_file, [f"validation.path={tmp_path / 'images'}", "validation.every=5"])
    assert stage(spec, 0, tmp_path / "none").held_out_images == 0
    assert stage(spec, 2, tmp_path / "some").held_out_images == 5


def test_a_full_disk_while_staging_is_told_with_the_file(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(RunFolderError, match=r"00001\.png cannot be written: No space left on device") as caught:
        stage(TrainSpec.load(spec_file), 2, tmp_path / "out")
    assert "Free some space" in (caught.value.hint or "")


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("spec.yaml", "is a file, not a folder"),
        ("spec.yaml/x", "cannot be written: Not a directory"),
        ("/proc/no/such", "cannot be written"),
    ],
)
def test_a_folder_that_cannot_be_made_is_told(bench: Any, tmp_path: Path, place: str, said: str) -> None:
    code, told = bench("--backends", "swift", "--seeds", "0", "-o", str(tmp_path / place))
    assert code == RunFolderError.exit_code, told
    assert said in " ".join(told.split())
    assert "--out" in told
