import numpy as np
import pytest

from loraport.errors import DataError
from loraport.lora import dora
from loraport.lora.canonical import LoraModule, LowRank, RowScale

RNG = np.random.default_rng(0)
FACTORS = LowRank(down=RNG.standard_normal((2, 5)), up=RNG.standard_normal((7, 2)))


def test_norms_are_those_of_the_base_rows_and_of_the_changed_rows(monkeypatch):
    monkeypatch.setattr(dora, "_BLOCK_NUMBERS", 15)  # three rows at a time
    weight = RNG.standard_normal((7, 5)).astype(np.float32)
    part = dora.with_norms(LoraModule("m", FACTORS, 0.5, RowScale(np.ones(7))), weight).dora
    np.testing.assert_allclose(part.base_norm, np.linalg.norm(weight.astype(np.float64), axis=1), rtol=1e-14)
    changed = weight + 0.5 * FACTORS.up @ FACTORS.down
    np.testing.assert_allclose(part.merged_norm, np.linalg.norm(changed, axis=1), rtol=1e-14)


def test_a_plain_module_needs_no_norms():
    module = LoraModule("m", FACTORS, 0.5)
    assert dora.with_norms(module, np.ones((7, 5))) is module


def test_a_base_weight_of_another_shape_is_refused():
    with pytest.raises(DataError, match=r"m changes a weight of 7 rows and 5 columns"):
        dora.with_norms(LoraModule("m", FACTORS, 0.5, RowScale(np.ones(7))), np.ones((5, 7)))
