import json
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraport.errors import DataError
from loraport.lora import ondisk, storage
from loraport.lora.bits import all_zero, same_bits
from loraport.lora.ondisk import OnDisk, Placed
from loraport.lora.storage import read_tensors, write_tensors

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


@pytest.fixture(scope="module", autouse=True)
def small_limits():
    patch = pytest.MonkeyPatch()
    patch.setattr(storage, "_LARGE", 0)
    patch.setattr(ondisk, "BLOCK", 64)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ondisk")


def stored(folder, **arrays):
    """The arrays in a file, as they are read from it some rows at a time."""
    write_tensors(folder / "x.safetensors", arrays, {})
    tensors = read_tensors(folder / "x.safetensors")
    return [tensors.on_disk(name) for name in arrays]


def noise(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([(), (1, 1), (3, 3)]), st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_blocks_of_rows_are_the_whole_array_in_order(folder, rows, columns, kernel, dtype):
    array = noise((rows, columns, *kernel), dtype)
    (lazy,) = stored(folder, a=array)
    assert isinstance(lazy, OnDisk)
    assert (lazy.shape, lazy.dtype, lazy.ndim, lazy.size, lazy.nbytes, len(lazy)) == (
        array.shape,
        array.dtype,
        array.ndim,
        array.size,
        array.nbytes,
        rows,
    )
    assert b"".join(block.tobytes() for block in lazy.blocks(checked=True)) == array.tobytes()
    first, last = rows // 3, rows // 3 + max(1, rows // 2)
    blocks = lazy.blocks(True, first, min(last, rows))
    assert b"".join(block.tobytes() for block in blocks) == array[first:last].tobytes()


def test_numpy_takes_it_for_an_array(folder):
    array = noise((30, 20))
    (lazy,) = stored(folder, a=array)
    for work in (
        lambda x: x @ np.ones((20, 2), np.float32),
        lambda x: 2 * x - 1,
        lambda x: np.concatenate([x, x]),
        lambda x: x.astype(np.float64).reshape(-1),
        lambda x: x[:, 3:5],
        lambda x: x[4:9:2],
        lambda x: x[::-1],
        lambda x: x[7],
        lambda x: x[x[:, 0] > 0],
        lambda x: x[5:5],
        lambda x: np.linalg.norm(x, axis=1),
        lambda x: x != 0,
    ):
        np.testing.assert_array_equal(work(lazy), work(array))
    assert float(np.abs(lazy).max()) == float(np.abs(array).max())


@given(st.integers(0, 29), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_some_rows_are_still_on_disk(folder, start, count):
    array = noise((30, 20), np.float16)
    (lazy,) = stored(folder, a=array)
    some = lazy[start : start + count]
    assert isinstance(some, OnDisk)
    np.testing.assert_array_equal(some, array[start : start + count])
    np.testing.assert_array_equal(some[1:], array[start : start + count][1:])


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
    st.sampled_from(DTYPES),
)
@settings(max_examples=100, deadline=None)
def test_blocks_with_zeros_around_them_are_what_numpy_makes_of_them(folder, sizes, kernel, gaps, dtype):
    shapes = [(rows, columns, 1, 1) if kernel else (rows, columns) for rows, columns in sizes]
    arrays = {str(n): noise(shape, dtype, n) for n, shape in enumerate(shapes)}
    pieces, row, column = [], 0, 0
    for (rows, columns), lazy in zip(sizes, stored(folder, **arrays), strict=True):
        pieces.append((row, column, lazy))
        row, column = row + rows + gaps, column + columns
    whole = np.zeros((row, column, *shapes[0][2:]), dtype)
    for (top, left, _), array in zip(pieces, arrays.values(), strict=True):
        whole[top : top + len(array), left : left + array.shape[1]] = array
    placed = Placed(pieces, whole.shape)
    assert (placed.dtype, placed.nbytes) == (whole.dtype, whole.nbytes)
    assert same_bits(np.asarray(placed), whole)
    assert same_bits(placed, stored(folder, w=whole)[0])


def test_one_bit_on_disk_is_a_difference(folder):
    array = noise((30, 20), ml_dtypes.bfloat16)
    for place in (0, 31, 299, 599):
        other = array.copy()
        other.reshape(-1).view(np.uint16)[place] ^= 1
        one, two, again = stored(folder, a=array, b=other, c=array)
        assert same_bits(one, again)
        assert not same_bits(one, two)
        assert not same_bits(one, other)


def test_zeros_on_disk_are_known(folder):
    zeros = np.zeros((30, 20), np.float16)
    nearly = zeros.copy()
    nearly[29, 19] = 1
    one, two = stored(folder, a=zeros, b=nearly)
    assert (all_zero(one), all_zero(two)) == (True, False)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told_wherever_it_is_read(folder, number):
    array = noise((30, 20))
    array[29, 19] = number
    (lazy,) = stored(folder, bad=array)
    for reading in (lambda: np.asarray(lazy), lambda: list(lazy.blocks(True)), lambda: lazy * 2, lambda: lazy[20:] + 0):
        with pytest.raises(DataError, match=r"x\.safetensors: tensor bad holds NaN"):
            reading()
    assert np.isfinite(lazy[:20]).all()
    placed = Placed([(0, 0, lazy)], (30, 40))
    with pytest.raises(DataError, match="tensor bad holds NaN"):
        list(placed.blocks(True))


def test_small_flat_and_endless_rows_are_read_at_once(folder, monkeypatch):
    monkeypatch.setattr(storage, "_LARGE", 100)
    monkeypatch.setattr(storage, "_LONGEST_ROW", 1000)
    arrays = {
        "small": noise((3, 3)),
        "flat": noise(900),
        "long": noise((2, 900)),
        "empty": np.zeros((0, 5), np.float32),
    }
    for array, lazy in zip(arrays.values(), stored(folder, **arrays), strict=True):
        assert isinstance(lazy, np.ndarray)
        assert same_bits(array, lazy)


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_not_the_end_of_the_process(tmp_path):
    """A mapped file would end the process with SIGBUS, so it is tried in one of its own."""
    write_tensors(tmp_path / "x.safetensors", {"a": np.ones((2000, 1000), np.float32)}, {})
    code = """
import os, sys
from loraport.errors import DataError
from loraport.lora.storage import read_tensors
tensors = read_tensors(sys.argv[1])
for array in (tensors.on_disk("a"), tensors.on_disk("a")[500:]):
    blocks = array.blocks(True)
    next(blocks)
    os.truncate(sys.argv[1], 2_400_000)
    try:
        list(blocks)
    except DataError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.safetensors")], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("tensor a is cut short; the file changed while it was being read") == 2


def test_an_array_on_disk_is_kept_when_its_file_is_replaced(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"b": np.ones((8, 8), np.float32)}, {})
    lazy = read_tensors(tmp_path / "x.safetensors").on_disk("b")
    assert lazy[0, 0] == 1
    write_tensors(tmp_path / "x.safetensors", {"b": np.zeros((8, 8), np.float32)}, {})
    assert np.all(np.asarray(lazy) == 1)


@pytest.mark.parametrize("begin", [0, 1, 4, 5])
def test_it_is_read_wherever_it_begins(tmp_path, begin):
    numbers = noise((40, 30))
    entries = {
        "a": {"dtype": "U8", "shape": [begin], "data_offsets": [0, begin]},
        "b": {"dtype": "F32", "shape": [40, 30], "data_offsets": [begin, begin + numbers.nbytes]},
    }
    text = json.dumps(entries).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * begin + numbers.tobytes())
    lazy = read_tensors(path).on_disk("b")
    assert same_bits(np.asarray(lazy), numbers)
    assert b"".join(block.tobytes() for block in lazy.blocks(True)) == numbers.tobytes()
