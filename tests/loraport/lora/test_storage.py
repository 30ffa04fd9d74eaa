import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from loraport.errors import DataError
from loraport.lora.storage import read_tensors, write_tensors

DTYPES = [
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    np.int64,
]


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.safetensors"
    write_tensors(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}, {"k": "v"})
    return path


def lying(path, header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    array = np.random.default_rng(1).standard_normal((3, 5)).astype(dtype)
    write_tensors(tmp_path / "x.safetensors", {"x": array}, {})
    back = read_tensors(tmp_path / "x.safetensors")["x"]
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


def test_scalars_slices_and_transposes_are_written_as_what_they_show(tmp_path):
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    shown = {"scalar": np.array(2.5, np.float32), "transposed": matrix.T, "strided": matrix[:, ::2]}
    write_tensors(tmp_path / "x.safetensors", shown, {})
    back = read_tensors(tmp_path / "x.safetensors")
    for name, array in shown.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].shape == array.shape


def test_the_safetensors_library_agrees_with_what_was_written(good):
    with safe_open(good, framework="numpy") as file:
        assert file.metadata() == {"k": "v"}
        assert set(file.keys()) == {"a", "b"}
        np.testing.assert_array_equal(file.get_tensor("a"), np.arange(6, dtype=np.float32).reshape(2, 3))


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    arrays = {"odd": np.ones(3, ml_dtypes.float8_e5m2), "half": np.ones(3, np.float16), "wide": np.ones(3)}
    write_tensors(tmp_path / "x.safetensors", arrays, {})
    raw = (tmp_path / "x.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % array.itemsize == 0 for name, array in arrays.items())


def test_shapes_and_metadata_are_known_without_reading_data(good):
    tensors = read_tensors(good)
    assert tensors.shapes == {"a": (2, 3), "b": (4,)}
    assert tensors.metadata == {"k": "v"}
    assert len(tensors) == 2


@pytest.mark.parametrize("kept", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_named_in_the_error(good, kept):
    whole = good.read_bytes()
    good.write_bytes(whole[:kept])
    with pytest.raises(DataError, match=r"good\.safetensors"):
        read_tensors(good)


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"[1, 2]",
        b"\xff\xfe",
        {"a": entry(0, 800, (200,))},
        {"a": entry(0, 4)},
        {"a": entry(0, 8), "b": entry(4, 12)},
        {"a": entry(8, 0)},
        {"a": entry(0, 8, dtype="F99")},
        {"a": {"shape": [2]}},
        {"a": entry(0, 8, (-2,))},
        {"a": entry(0, 8), "b": entry(8, 8, (0, 2**62))},
        {"a": entry(0, 8, (2, *([1] * 40)))},
    ],
    ids=[
        "garbage",
        "list",
        "bytes",
        "beyond",
        "length",
        "overlap",
        "backwards",
        "dtype",
        "no-offsets",
        "negative",
        "empty but huge",
        "many axes",
    ],
)
def test_a_header_that_lies_is_refused_with_the_path(tmp_path, header):
    path = lying(tmp_path / "liar.safetensors", header)
    with pytest.raises(DataError, match=r"liar\.safetensors"):
        read_tensors(path)


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(DataError, match=r"huge\.safetensors"):
        read_tensors(path)


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        read_tensors(tmp_path / "nowhere.safetensors")


def test_a_file_cut_after_opening_is_noticed(good):
    tensors = read_tensors(good)
    good.write_bytes(good.read_bytes()[:-30])
    with pytest.raises(DataError, match="cut short"):
        tensors["a"]


@pytest.fixture
def large(tmp_path):
    """A file with a tensor of 2 MiB, which is mapped where the system can, and a small one before it."""
    path = tmp_path / "large.safetensors"
    write_tensors(path, {"a": np.ones(2), "b": np.arange(1 << 19, dtype=np.float32)}, {})
    return path


@pytest.mark.parametrize("kept", [0, 4096, (1 << 20) + 1, (1 << 21) - 4096])
def test_a_large_tensor_cut_after_opening_is_noticed(large, kept):
    tensors = read_tensors(large)
    large.write_bytes(large.read_bytes()[:kept])
    with pytest.raises(DataError, match="cut short"):
        tensors["b"]


def test_changing_a_large_tensor_in_memory_leaves_its_file_alone(large):
    before = large.read_bytes()
    tensors = read_tensors(large)
    tensors["b"][:] = 0
    assert large.read_bytes() == before
    assert np.array_equal(tensors["b"], np.arange(1 << 19))


def test_a_large_tensor_is_kept_when_its_file_is_replaced(large):
    array = read_tensors(large)["b"]
    write_tensors(large, {"b": np.zeros(1 << 19, np.float32)}, {})
    assert np.array_equal(array, np.arange(1 << 19))


@pytest.mark.parametrize("begin", [0, 1, 4, 8, 4092])
def test_a_large_tensor_is_read_wherever_it_begins(tmp_path, begin):
    numbers = np.arange(1 << 19, dtype=np.float32)
    header = {"a": entry(0, begin, (begin,), "U8"), "b": entry(begin, begin + numbers.nbytes, numbers.shape)}
    path = lying(tmp_path / "odd.safetensors", header, b"\0" * begin + numbers.tobytes())
    assert np.array_equal(read_tensors(path)["b"], numbers)


def test_a_failed_write_leaves_the_old_file(good):
    before = good.read_bytes()
    with pytest.raises(KeyError):
        write_tensors(good, {"a": np.ones(2, np.complex64)}, {})
    assert good.read_bytes() == before
    assert [each.name for each in good.parent.iterdir()] == [good.name]
