import json
import struct
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from loraport.errors import RunFolderError
from loraport.lora import streaming
from loraport.lora.storage import read_tensors
from loraport.lora.streaming import replace_metadata, stream_tensors

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)
arrays = st.tuples(shapes, st.sampled_from(DTYPES))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("stream") / "x.safetensors"


@pytest.fixture(scope="module", autouse=True)
def small_limits():
    patch = pytest.MonkeyPatch()
    patch.setattr(streaming, "_SMALL", 32)
    patch.setattr(streaming, "_CHUNK", 64)
    yield
    patch.undo()


def made(described):
    rng = np.random.default_rng(0)
    return {
        f"layers.{n}": rng.standard_normal(shape).astype(dtype).reshape(shape)
        for n, (shape, dtype) in enumerate(described)
    }


def starts(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    return {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def assert_holds(path, tensors, metadata):
    with safe_open(path, framework="numpy") as file:
        assert (file.metadata() or {}) == metadata
    back = read_tensors(path)
    assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in back.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in tensors.items()
    }
    assert all(starts(path)[name] % array.itemsize == 0 for name, array in tensors.items())


@given(st.lists(arrays, min_size=1, max_size=12), st.integers(0, 9000), st.text(max_size=40), st.text(max_size=9000))
@settings(max_examples=150, deadline=None)
def test_whatever_comes_in_whatever_order_is_written_aligned_and_its_metadata_can_grow(
    path, described, room, first, second
):
    tensors = made(described)
    stream_tensors(path, iter(tensors.items()), {"k": first}, room)
    assert_holds(path, tensors, {"k": first})
    replace_metadata(path, {"k": second})
    assert_holds(path, tensors, {"k": second})


def test_a_source_that_fails_half_way_leaves_the_old_file_and_no_draft(tmp_path):
    target = tmp_path / "x.safetensors"
    stream_tensors(target, [("a", np.ones((4, 4), np.float32))], {})
    before = target.read_bytes()

    def failing():
        yield "b", np.ones((40, 40), np.float32)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        stream_tensors(target, failing(), {})
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("numbers", [0, 100, 40_000])
def test_room_that_is_not_needed_takes_no_more_than_a_hundredth_of_the_file(tmp_path, numbers):
    path = tmp_path / "x.safetensors"
    tensors = {"a": np.arange(numbers, dtype=np.float32), "b": np.ones((), np.float64)}
    stream_tensors(path, tensors.items(), {}, room=9000)
    assert_holds(path, tensors, {})
    assert path.stat().st_size <= 4 * numbers * 1.01 + 300


@pytest.mark.parametrize("failing", [0, 1, -1])
def test_a_disk_that_fails_once_while_more_is_written_is_told(tmp_path, monkeypatch, failing):
    count = 4
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) - 1 == failing % count:
            raise OSError(5, "Input/output error")

    def slowly():
        for number in range(count):
            while len(calls) < number:
                time.sleep(0.001)
            time.sleep(0.01)
            yield str(number), np.ones(999, np.float32)

    monkeypatch.setattr(streaming, "_SYNCED", 1000)
    monkeypatch.setattr(streaming, "_MOST_WAITING", 0)
    monkeypatch.setattr(streaming.os, "fsync", fsync)
    with pytest.raises(RunFolderError, match=r"x\.safetensors cannot be written: Input/output error"):
        stream_tensors(tmp_path / "x.safetensors", slowly(), {})
    assert list(tmp_path.iterdir()) == []
    assert len(calls) == failing % count + 1
