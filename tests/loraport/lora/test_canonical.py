import ml_dtypes
import numpy as np
import pytest

from loraport.errors import DataError
from loraport.lora.canonical import LoHa, LoKr, LoraFile, LoraModule, LowRank, RowScale

RNG = np.random.default_rng(0)


def random(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def rows_of(factors):
    return factors.product()(0, factors.shape[0])


def test_low_rank_of_a_convolution_is_up_times_flattened_down():
    factors = LowRank(down=random(2, 5, 3, 3), up=random(4, 2, 1, 1))
    expected = factors.up.astype(np.float64).reshape(4, 2) @ factors.down.astype(np.float64).reshape(2, 45)
    assert factors.shape == (4, 45)
    np.testing.assert_array_equal(rows_of(factors), expected)


def test_loha_is_the_elementwise_product_of_two_low_rank_ones():
    factors = LoHa(random(6, 2), random(2, 5), random(6, 3), random(3, 5))
    w1_a, w1_b, w2_a, w2_b = (array.astype(np.float64) for array in factors.arrays().values())
    np.testing.assert_allclose(rows_of(factors), (w1_a @ w1_b) * (w2_a @ w2_b), rtol=1e-14)


@pytest.mark.parametrize(
    "factors",
    [
        LoKr(w1=random(2, 3), w2=random(4, 5)),
        LoKr(w1=random(2, 3), w2_a=random(4, 2), w2_b=random(2, 5)),
        LoKr(w1_a=random(2, 1), w1_b=random(1, 3), w2_a=random(4, 2), w2_b=random(2, 5)),
    ],
)
def test_lokr_is_the_kronecker_product_of_its_sides(factors):
    stored = {name: array.astype(np.float64) for name, array in factors.arrays().items()}
    w1 = stored["w1"] if "w1" in stored else stored["w1_a"] @ stored["w1_b"]
    w2 = stored["w2"] if "w2" in stored else stored["w2_a"] @ stored["w2_b"]
    assert factors.shape == (8, 15)
    np.testing.assert_allclose(rows_of(factors), np.kron(w1, w2), rtol=1e-14)


def test_rows_can_be_asked_for_in_pieces():
    factors = LoKr(w1=random(3, 2), w2=random(5, 4))
    product = factors.product()
    pieces = [product(start, min(start + 4, 15)) for start in range(0, 15, 4)]
    np.testing.assert_array_equal(np.concatenate(pieces), rows_of(factors))


def test_a_tucker_convolution_sums_its_core():
    factors = LoKr(w1=random(2, 2), w2_a=random(2, 3), w2_b=random(4, 5), t2=random(2, 4, 3, 3))
    w2 = np.zeros((3, 5, 3, 3))
    for i in range(2):
        for j in range(4):
            outer = np.outer(factors.w2_a[i].astype(np.float64), factors.w2_b[j])
            w2 += outer[:, :, None, None] * factors.t2[i, j]
    w1 = factors.w1.astype(np.float64)[:, :, None, None]
    assert factors.shape == (6, 90)
    np.testing.assert_allclose(rows_of(factors), np.kron(w1, w2).reshape(6, 90), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_a_nan_names_its_module_and_factor(dtype):
    up = np.ones((4, 2), dtype)
    up[3, 1] = np.nan
    with pytest.raises(DataError, match=r"layers\.3\.attention\.o: up holds NaN"):
        LoraModule("layers.3.attention.o", LowRank(down=np.ones((2, 4), dtype), up=up), 1.0)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (LowRank(down=random(3, 4), up=random(5, 2)), "disagree on the rank"),
        (LowRank(down=random(4), up=random(5, 2)), r"up \(5, 2\)"),
        (LowRank(down=random(0, 4), up=random(5, 0)), "down is empty"),
        (LoHa(random(6, 2), random(2, 5), random(7, 2), random(2, 5)), "different shapes"),
        (LoHa(random(6, 3), random(2, 5), random(6, 2), random(2, 5)), "disagree on the rank"),
        (LoKr(w1=random(2, 2)), "give either w2"),
        (LoKr(w1=random(2, 2), w2=random(2, 2), w2_a=random(2, 1), w2_b=random(1, 2)), "give either w2"),
        (LoKr(w1=random(2, 2), w2_a=random(2, 1)), "one is missing"),
        (LoKr(w1=random(2, 2), w2_a=random(2, 3), w2_b=random(1, 2)), "disagree on the rank"),
        (LoKr(w1=random(2, 2), w2=random(2, 2), t2=random(1, 1, 3, 3)), "t2 needs"),
    ],
)
def test_factors_that_cannot_be_multiplied_are_refused(factors, message):
    with pytest.raises(DataError, match=message):
        LoraModule("a.b", factors, 1.0)


def test_a_scale_that_is_not_a_number_is_refused():
    with pytest.raises(DataError, match="the scale is inf"):
        LoraModule("a.b", LowRank(down=random(1, 2), up=random(2, 1)), float("inf"))


@pytest.mark.parametrize(
    ("dora", "message"),
    [
        (RowScale(np.ones(3)), r"trained must be \(2,\)"),
        (RowScale(np.array([1, np.inf])), "trained holds NaN"),
        (RowScale(np.ones(2), base_norm=np.array([1.0, 0.0])), "base_norm has a row that is not positive"),
    ],
)
def test_a_dora_part_must_fit_its_module(dora, message):
    with pytest.raises(DataError, match=message):
        LoraModule("a.b", LowRank(down=random(1, 2), up=random(2, 1)), 1.0, dora)


def test_a_dora_gain_without_norms_asks_for_the_base_model():
    with pytest.raises(DataError, match="base model"):
        RowScale(np.ones(2)).gain()


def test_a_file_without_modules_shows_the_keys_it_has():
    with pytest.raises(DataError, match=r"img_in\.weight"):
        LoraFile(None, {}, unread=("img_in.weight",))
