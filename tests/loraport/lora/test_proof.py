import json
import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraport.errors import DataError
from loraport.lora import proof as proof_module
from loraport.lora.canonical import LoHa, LoKr, LoraFile, LoraModule, LowRank, RowScale
from loraport.lora.proof import prove

OUT, IN = 12, 10


def make(kind, rng, rank=3, dtype=np.float64, out=OUT, columns=IN):
    def random(*shape):
        return rng.standard_normal(shape).astype(dtype)

    if kind == "lora":
        return LowRank(down=random(rank, columns), up=random(out, rank))
    if kind == "loha":
        return LoHa(random(out, rank), random(rank, columns), random(out, rank), random(rank, columns))
    if kind == "lokr":
        return LoKr(w1=random(3, 2), w2=random(out // 3, columns // 2))
    return LoKr(w1=random(3, 2), w2_a=random(out // 3, rank), w2_b=random(rank, columns // 2))


def lora(*modules, unread=()):
    return LoraFile("ideogram4", {module.name: module for module in modules}, unread=unread)


def dense(module):
    return module.scale * module.factors.product()(0, module.factors.shape[0])


def only(proof):
    (row,) = proof.modules
    return row


KINDS = st.sampled_from(["lora", "loha", "lokr", "factored"])


@given(KINDS, KINDS, st.integers(0, 2**32), st.integers(1, 5), st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_the_difference_is_that_of_the_whole_matrices(kind_a, kind_b, seed, rank, scale):
    rng = np.random.default_rng(seed)
    a = LoraModule("m", make(kind_a, rng, rank), scale)
    b = LoraModule("m", make(kind_b, rng, rank + 1), 0.7)
    expected = np.linalg.norm(dense(a) - dense(b)) / np.linalg.norm(dense(a))
    row = only(prove(lora(a), lora(b)))
    assert row.norm == pytest.approx(np.linalg.norm(dense(a)), rel=1e-12)
    assert row.difference == pytest.approx(expected, rel=1e-9)


@given(KINDS, st.integers(0, 2**32), st.floats(1e-8, 1e8), st.sampled_from([np.float32, ml_dtypes.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_a_file_equals_itself_far_below_the_precision_of_squared_norms(kind, seed, scale, dtype):
    module = LoraModule("m", make(kind, np.random.default_rng(seed), dtype=dtype), scale)
    row = only(prove(lora(module), lora(module)))
    assert row.difference < 1e-13
    assert row.ok


@given(st.integers(0, 2**32), st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_moving_scale_between_the_factors_changes_nothing(seed, moved):
    rng = np.random.default_rng(seed)
    low = make("lora", rng)
    kron = make("lokr", rng)
    source = lora(LoraModule("a", low, 2.0), LoraModule("b", kron, 2.0))
    written = lora(
        LoraModule("a", LowRank(down=low.down * moved, up=low.up / moved), 2.0),
        LoraModule("b", LoKr(w1=kron.w1 * moved, w2=kron.w2), 2.0 / moved),
    )
    assert all(row.difference < 1e-13 for row in prove(source, written).modules)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "factored"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rounding_is_within_tolerance_and_one_percent_of_scale_is_not(kind, dtype):
    rng = np.random.default_rng(3)
    for _ in range(20):
        exact_module = LoraModule("m", make(kind, rng, 8, out=60, columns=40), 0.5)
        rounded = replace(exact_module, factors=exact_module.factors.map(lambda _, array: array.astype(dtype)))
        assert prove(lora(exact_module), lora(rounded)).ok
        stronger = replace(rounded, scale=0.505)
        assert not prove(lora(rounded), lora(stronger)).ok


def test_blocks_of_rows_give_what_one_block_gives(monkeypatch):
    rng = np.random.default_rng(4)
    a, b = (lora(LoraModule("m", make("loha", rng), 1.0)) for _ in range(2))
    whole = only(prove(a, b))
    monkeypatch.setattr(proof_module, "_BLOCK_NUMBERS", 5 * IN)
    assert only(prove(a, b)).difference == pytest.approx(whole.difference, rel=1e-14)


def test_swapped_modules_are_caught():
    rng = np.random.default_rng(5)
    q, o = make("lora", rng), make("lora", rng)
    source = lora(LoraModule("q", q, 1.0), LoraModule("o", o, 1.0))
    swapped = lora(LoraModule("q", o, 1.0), LoraModule("o", q, 1.0))
    assert not any(row.ok for row in prove(source, swapped).modules)


@pytest.mark.parametrize("name", ["up", "down"])
def test_one_perturbed_number_is_caught(name):
    factors = make("lora", np.random.default_rng(6), dtype=np.float32)
    array = getattr(factors, name).copy()
    array[1, 2] += 0.1
    source = lora(LoraModule("m", factors, 1.0))
    assert not prove(source, lora(LoraModule("m", replace(factors, **{name: array}), 1.0))).ok


def test_modules_on_one_side_only_are_named():
    factors = make("lora", np.random.default_rng(7))
    one, two = LoraModule("one", factors, 1.0), LoraModule("two", factors, 1.0)
    proof = prove(lora(one, two), lora(two))
    assert (proof.missing, proof.extra, proof.ok) == (("one",), (), False)
    proof = prove(lora(two), lora(one, two))
    assert (proof.missing, proof.extra, proof.ok) == ((), ("one",), False)


def test_keys_that_nobody_read_spoil_the_proof():
    module = LoraModule("m", make("lora", np.random.default_rng(8)), 1.0)
    assert not prove(lora(module), lora(module, unread=("m.lora_magnitude_vector",))).ok
    proof = prove(lora(module, unread=("m.diff_b",)), lora(module))
    assert proof.unread_source == ("m.diff_b",)
    assert not proof.ok


def test_an_untrained_lora_equals_itself_and_is_flagged():
    factors = replace(make("lora", np.random.default_rng(9)), up=np.zeros((OUT, 3)))
    proof = prove(lora(LoraModule("m", factors, 1.0)), lora(LoraModule("m", factors, 1.0)))
    assert proof.ok
    assert proof.zeros == ("m",)
    assert only(proof).difference == 0.0


def test_something_out_of_nothing_is_an_infinite_difference():
    factors = make("lora", np.random.default_rng(10))
    source = lora(LoraModule("m", replace(factors, up=np.zeros((OUT, 3))), 1.0))
    proof = prove(source, lora(LoraModule("m", factors, 1.0)))
    assert only(proof).difference == math.inf
    assert not proof.ok
    assert json.loads(json.dumps(proof.to_json(), allow_nan=False))["modules"][0]["difference"] is None


def test_a_change_of_another_shape_is_not_equal():
    rng = np.random.default_rng(11)
    source = lora(LoraModule("m", make("lora", rng), 1.0))
    proof = prove(source, lora(LoraModule("m", make("lora", rng, out=OUT + 1), 1.0)))
    assert not proof.ok
    json.dumps(proof.to_json(), allow_nan=False)


def test_the_worst_module_is_the_one_nearest_to_its_own_limit():
    rng = np.random.default_rng(12)
    coarse = make("lora", rng).map(lambda _, array: array.astype(ml_dtypes.bfloat16))
    fine = make("lora", rng).map(lambda _, array: array.astype(np.float32))
    source = lora(LoraModule("coarse", coarse, 1.0), LoraModule("fine", fine, 1.0))
    written = lora(LoraModule("coarse", coarse, 1.004), LoraModule("fine", fine, 1.001))
    assert prove(source, written).worst.name == "fine"


def with_dora(kind, rng, weight):
    """A DoRA module as trained on `weight`, with norms in fp64 and a magnitude that has moved a little."""
    plain = LoraModule("m", make(kind, rng), 0.05)
    base = np.linalg.norm(weight, axis=1)
    merged = np.linalg.norm(weight + dense(plain), axis=1)
    return replace(plain, dora=RowScale(base * (1 + 0.02 * rng.standard_normal(OUT)), base, merged))


def dora_change(module, weight):
    return module.dora.gain()[:, None] * (weight + dense(module)) - weight


@given(KINDS, st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_dora_is_measured_without_the_weights(kind, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((OUT, IN))
    a, b = with_dora(kind, rng, weight), with_dora(kind, rng, weight)
    row = only(prove(lora(a), lora(b)))
    apart = np.linalg.norm(dora_change(a, weight) - dora_change(b, weight))
    assert row.norm == pytest.approx(np.linalg.norm(dora_change(a, weight)), rel=1e-9)
    assert row.difference * row.norm >= apart * (1 - 1e-9)
    alone = np.linalg.norm(dense(a) - dense(b)) / np.linalg.norm(dense(a))
    assert row.difference <= max(alone * (1 + 1e-9), 4 * apart / row.norm)


def test_a_dora_read_without_norms_borrows_those_of_the_source():
    rng = np.random.default_rng(13)
    source = with_dora("lora", rng, rng.standard_normal((OUT, IN)))
    scale = source.dora.gain() * source.dora.base_norm
    written = replace(source, dora=RowScale(scale, divisor="base"))
    assert only(prove(lora(source), lora(written))).difference < 1e-13
    off = replace(source, dora=RowScale(source.dora.trained, divisor="base"))
    assert not prove(lora(source), lora(off)).ok


def test_a_changed_product_is_caught_under_a_large_row_scale():
    rng = np.random.default_rng(16)
    source = with_dora("lora", rng, rng.standard_normal((OUT, IN)))
    source = replace(source, dora=replace(source.dora, trained=source.dora.trained * 3))
    assert not prove(lora(source), lora(replace(source, scale=source.scale * 1.01))).ok


def test_a_lost_dora_part_is_caught():
    rng = np.random.default_rng(14)
    source = with_dora("lora", rng, rng.standard_normal((OUT, IN)))
    assert not prove(lora(source), lora(replace(source, dora=None))).ok
    assert not prove(lora(replace(source, dora=None)), lora(source)).ok


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "factored"])
def test_where_the_factors_are_the_same_bits_only_the_scales_are_compared(kind, monkeypatch):
    monkeypatch.setattr(proof_module, "exact", None)  # nothing may be multiplied
    factors = make(kind, np.random.default_rng(20), dtype=ml_dtypes.bfloat16)
    again = factors.map(lambda _, array: array.copy())
    row = only(prove(lora(LoraModule("m", factors, 0.5)), lora(LoraModule("m", again, 0.505))))
    assert (row.norm, row.difference, row.ok) == (None, pytest.approx(0.01), False)
    assert only(prove(lora(LoraModule("m", factors, 0.5)), lora(LoraModule("m", again, 0.5)))).ok
    empty = factors.map(lambda _, array: np.zeros_like(array))
    assert only(prove(lora(LoraModule("m", empty, 0.5)), lora(LoraModule("m", empty, 0.7)))).zero


@given(st.integers(0, 2**32), st.floats(0.01, 100), st.sampled_from([np.float16, ml_dtypes.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_after_rounding_the_gram_matrices_give_what_the_whole_matrices_give(seed, scale, dtype):
    factors = make("lora", np.random.default_rng(seed), 4)
    a = LoraModule("m", factors, scale)
    b = LoraModule("m", factors.map(lambda _, array: array.astype(dtype)), scale * 1.001)
    row = only(prove(lora(a), lora(b)))
    assert row.difference == pytest.approx(np.linalg.norm(dense(a) - dense(b)) / np.linalg.norm(dense(a)), rel=1e-6)
    assert row.norm == pytest.approx(np.linalg.norm(dense(a)))


def test_a_dora_of_unknown_norms_equals_itself_and_no_other():
    factors = make("lora", np.random.default_rng(21), dtype=np.float32)
    module = LoraModule("m", factors, 0.5, RowScale(np.ones(OUT), divisor="base"))
    assert only(prove(lora(module), lora(module))).ok
    for other in (replace(module, scale=0.6), replace(module, dora=RowScale(np.full(OUT, 2.0), divisor="base"))):
        with pytest.raises(DataError, match="base model"):
            prove(lora(module), lora(other))
