"""The store of features: keys that mean one thing, entries that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from loraport.errors import DataError, RunFolderError
from loraport_native import cache
from loraport_native.cache import Store, cache_folder, key

parts = st.lists(st.one_of(st.binary(max_size=8), st.text(max_size=8), st.integers(), st.booleans()), max_size=4)


def same(left: list, right: list) -> bool:
    return [(type(part), part) for part in left] == [(type(part), part) for part in right]


@given(parts, parts)
def test_keys_are_equal_only_for_equal_parts(left: list, right: list) -> None:
    assert (key(*left) == key(*right)) == same(left, right)


def test_parts_are_not_joined() -> None:
    assert len({key("ab", "c"), key("a", "bc"), key("abc"), key(b"abc"), key("abc", ""), key("1"), key(1)}) == 7


def test_another_code_version_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key("a")
    monkeypatch.setattr(cache, "CODE_VERSION", cache.CODE_VERSION + 1)
    assert key("a") != before


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "cache")
    assert not store.has("text", key("a"))
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3).t()  # not contiguous
    store.write("text", key("a"), {"text": tensor})
    assert store.has("text", key("a"))
    assert not store.has("latents", key("a"))
    read = store.read("text", key("a"))["text"]
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, tensor)
    assert [path.name for path in store.path("text", key("a")).parent.iterdir()] == [f"{key('a')}.safetensors"]


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_a_damaged_entry_is_told_removed_and_missing(tmp_path: Path, content: bytes | None) -> None:
    told: list[Path] = []
    store = Store(tmp_path, told.append)
    store.write("text", key("a"), {"text": torch.ones(100)})
    path = store.path("text", key("a"))
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(DataError, match=path.name):
        store.read("text", key("a"))
    assert not store.has("text", key("a"))
    assert told == [path]
    assert not path.exists()


def test_a_write_that_fails_keeps_the_old_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.write("text", key("a"), {"text": torch.ones(3)})

    def fill_the_disk(tensors: dict, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", fill_the_disk)
    with pytest.raises(RunFolderError, match="No space left") as caught:
        store.write("text", key("a"), {"text": torch.zeros(3)})
    assert "LORAPORT_CACHE" in str(caught.value)
    assert torch.equal(load_file(store.path("text", key("a")))["text"], torch.ones(3))
    assert len(list(store.path("text", key("a")).parent.iterdir())) == 1


def test_a_cache_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(RunFolderError, match="cache"):
        Store(tmp_path / "cache").write("text", key("a"), {"text": torch.ones(1)})


def test_entries_are_held_in_order_within_a_budget_and_apart_from_the_disk(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in "abc":
        store.write("text", key(name), {"text": torch.full((250,), float(ord(name)))})
    entries = [("text", key(name)) for name in "aabc"]
    held = store.hold(entries, budget=2500, pinned=False)
    assert list(held) == [("text", key("a")), ("text", key("b"))]
    for name in "ab":
        store.path("text", key(name)).write_bytes(b"")
        assert (held["text", key(name)] == ord(name)).all()


def test_the_size_counts_each_entry_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("text", key("a"), {"text": torch.ones(1000)})
    one = store.size([("text", key("a"))])
    assert 4000 < one < 4200
    assert store.size([("text", key("a")), ("text", key("a")), ("text", key("gone"))]) == one


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPORT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "features"
    monkeypatch.delenv("LORAPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "loraport" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "loraport" / "features"
