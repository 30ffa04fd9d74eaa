"""Predicted disk space against what real runs wrote."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraport.buckets import bucket_for
from loraport.dataset import scan
from loraport.disk import Contents
from loraport.ideogram4 import IDEOGRAM4
from loraport_native.disk import predict
from loraport_native.models.checkpoint import find_checkpoint, load_tokenizer
from loraport_native.models.tokens import tokenize
from loraport_native.placement import load_placed

NOTHING = Contents(pixels=0, caption_tokens=0)
#: Headers of the files, and names of the tensors, are not predicted.
HEADERS = 0.03


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"train": {"ema_decay": 0.9}},
        {"lora": {"dora": True}},
        {"lora": {"type": "loha"}},
        {"train": {"optimizer": "lion"}},
        {"train": {"optimizer": "adafactor"}},
    ],
    ids=str,
)
def test_a_checkpoint_is_as_large_as_predicted(
    make_spec: Callable[..., Any], make_trainer: Callable[..., Any], tmp_path: Path, sections: dict[str, Any]
) -> None:
    train = {"steps": 1} | sections.get("train", {})
    spec = make_spec(train=train, lora={"rank": 96} | sections.get("lora", {}))
    make_trainer(spec).fit()
    predicted = predict(spec, IDEOGRAM4, NOTHING)
    assert predicted is not None
    assert predicted.cache == 0
    assert predicted.checkpoints == pytest.approx(size(tmp_path / "run" / "checkpoints"), rel=HEADERS)


def test_the_cache_grows_by_what_is_predicted(
    make_spec: Callable[..., Any],
    make_trainer: Callable[..., Any],
    photos: Path,
    tiny_official: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORAPORT_CACHE", str(tmp_path / "cache"))
    spec = make_spec(dataset={"flip": True})
    make_trainer(spec)
    items = scan(photos, "txt")
    tokenizer = load_tokenizer(find_checkpoint(str(tiny_official)))
    sides = [bucket_for(item.size, 64) for item in items]
    tokens = sum(len(tokenize(tokenizer, caption, 10_000)) for caption in ["", *(item.caption for item in items)])
    predicted = predict(spec, IDEOGRAM4, Contents(2 * sum(width * height for width, height in sides), tokens))
    assert predicted is not None
    files = [file for file in (tmp_path / "cache").rglob("*.safetensors")]
    assert len(files) == 2 * len(items) + len(items) + 1
    headers = 100 * len(files)
    assert predicted.cache < size(tmp_path / "cache") < predicted.cache + headers


def test_the_checkpoints_that_are_kept_and_the_one_being_written_count(make_spec: Callable[..., Any]) -> None:
    def checkpoints(steps: int, every: int, keep: int) -> int:
        spec = make_spec(train={"steps": steps}, save={"every": every, "keep": keep})
        predicted = predict(spec, IDEOGRAM4, NOTHING)
        assert predicted is not None
        return predicted.checkpoints

    one = checkpoints(steps=10, every=0, keep=4)
    assert checkpoints(steps=10, every=4, keep=4) == pytest.approx(3 * one, abs=3)  # steps 4, 8 and 10
    assert checkpoints(steps=1000, every=100, keep=4) == pytest.approx(5 * one, abs=5)


def test_the_result_follows_the_dtype_it_is_saved_in(make_spec: Callable[..., Any]) -> None:
    half, whole = (predict(make_spec(save={"dtype": dtype}), IDEOGRAM4, NOTHING) for dtype in ("bf16", "fp32"))
    assert half is not None
    assert whole is not None
    assert whole.result == 2 * half.result > 0


@pytest.mark.parametrize("quantize", ["none", "fp8", "int8", "nf4"])
def test_the_file_of_blocks_that_wait_on_disk_counts(
    make_spec: Callable[..., Any],
    tiny_official: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantize: str,
) -> None:
    monkeypatch.setenv("LORAPORT_CACHE", str(tmp_path))
    streamed = make_spec(memory={"quantize": quantize, "offload": "disk"})
    _, stream = load_placed(find_checkpoint(str(tiny_official)), streamed.memory, torch.float32, torch.device("cpu"))
    assert stream is not None
    predicted = predict(streamed, IDEOGRAM4, NOTHING)
    resident = predict(make_spec(memory={"quantize": quantize}), IDEOGRAM4, NOTHING)
    assert predicted is not None
    assert resident is not None
    assert (resident.weights, predicted.total - resident.total) == (0, predicted.weights)
    # The tiny blocks are so small that what is between their tensors counts.
    assert predicted.weights == pytest.approx(os.fstat(stream.source.file.fileno()).st_size, rel=0.1)


def test_nothing_is_said_of_the_tiny_checkpoint(make_spec: Callable[..., Any]) -> None:
    assert predict(make_spec(model={"checkpoint": "tiny"}), IDEOGRAM4, NOTHING) is None
