"""Tokens are counted as training counts them, and only where the tokenizer is on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loraport.errors import DataError
from loraport_native.models.checkpoint import find_checkpoint, load_tokenizer
from loraport_native.models.tokens import token_counter, tokenize

CAPTIONS = ["", "a red dot", '{"high_level_description":"été 漢字 🙂"}', "<|im_end|> in the middle", "line\nbreak"]


def test_the_count_is_the_trainers_own(tiny_official: Path) -> None:
    count = token_counter(str(tiny_official))
    assert count is not None
    tokenizer = load_tokenizer(find_checkpoint(str(tiny_official)))
    for caption in CAPTIONS:
        assert count(caption) == len(tokenize(tokenizer, caption, 1000))


def test_a_hub_checkpoint_in_the_cache_is_found_and_another_is_not_fetched(
    tiny_official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "a" * 40
    repo = tmp_path / "models--some--model"
    shutil.copytree(tiny_official / "tokenizer", repo / "snapshots" / commit / "tokenizer")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    count = token_counter("some/model")
    assert count is not None
    assert count("a red dot") > 3
    assert token_counter("some/other") is None


@pytest.mark.parametrize("checkpoint", ["tiny", "./gone", "/nowhere/at/all", "a/b/c"])
def test_without_a_checkpoint_there_is_no_count(checkpoint: str) -> None:
    assert token_counter(checkpoint) is None


def test_a_broken_tokenizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="the tokenizer cannot be read"):
        token_counter(str(tmp_path))
