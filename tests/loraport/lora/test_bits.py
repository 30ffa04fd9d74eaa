import ml_dtypes
import numpy as np
import pytest

from loraport.lora import bits
from loraport.lora.bits import all_finite, all_zero, same_bits

FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn])
def test_every_bit_pattern_of_a_narrow_float_is_judged_as_numpy_does(dtype):
    size = np.dtype(dtype).itemsize
    patterns = np.arange(256**size, dtype=f"u{size}").view(dtype)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(patterns)
    assert all_finite(patterns[finite])
    assert not any(all_finite(np.array([0, each], dtype)) for each in patterns[~finite])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_ends_of_a_wide_float_are_judged_as_numpy_does(dtype):
    info = np.finfo(dtype)
    assert all_finite(np.array([info.max, info.min, info.tiny, -0.0], dtype))
    for odd in (np.inf, -np.inf, np.nan, -np.nan):
        assert not all_finite(np.array([0, odd], dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [0, 6, 7, 999])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype, place, monkeypatch):
    monkeypatch.setattr(bits, "_BLOCK", 64)
    numbers = np.ones(1000, dtype)
    assert all_finite(numbers)
    assert all_finite(numbers[::2])
    numbers[place] = np.nan
    assert not all_finite(numbers)


def test_whole_numbers_are_finite():
    assert all_finite(np.array([-1, 2**31 - 1], np.int32))


@pytest.mark.parametrize("dtype", [*FLOATS, np.uint8])
@pytest.mark.parametrize("count", [1000, 1001])
def test_one_flipped_bit_anywhere_makes_two_arrays_differ(dtype, count, monkeypatch):
    monkeypatch.setattr(bits, "_BLOCK", 64)
    array = np.ones(count, dtype)
    assert same_bits(array, array.copy())
    raw = array.copy().view(np.uint8)
    for byte in (0, 7, 8, 63, 64, len(raw) // 2, len(raw) - 1):
        for bit in range(8):
            changed = raw.copy()
            changed[byte] ^= 1 << bit
            assert not same_bits(array, changed.view(dtype))


def test_a_shape_a_dtype_and_the_sign_of_zero_count_too():
    zeros = np.zeros((4, 6), np.float32)
    for other in (zeros.reshape(6, 4), zeros.astype(np.float16), zeros.view(np.int32), -zeros, zeros[:2]):
        assert not same_bits(zeros, other)
    assert same_bits(np.arange(24).reshape(4, 6).T, np.arange(24).reshape(4, 6).T.copy())


@pytest.mark.parametrize("count", [1, 7, 8, 100])
def test_one_bit_anywhere_makes_an_array_other_than_zeros(count, monkeypatch):
    monkeypatch.setattr(bits, "_BLOCK", 16)
    zeros = np.zeros(count, ml_dtypes.bfloat16)
    assert all_zero(zeros)
    for place in range(count):
        flipped = zeros.copy()
        flipped.view(np.uint16)[place] = 1
        assert not all_zero(flipped)
