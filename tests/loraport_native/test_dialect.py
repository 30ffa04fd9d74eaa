"""The trainer's own file, read without torch: every kind, and what is wrong with a damaged one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loraport.errors import DataError
from loraport.lora.canonical import LoHa, LoKr, LowRank
from loraport.lora.storage import write_tensors
from loraport_native.dialect import FORMAT, NativeDialect

NAME = "layers.0.attention.qkv"


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def write(path: Path, factors: dict[str, np.ndarray], scales: dict[str, float] | None) -> Path:
    metadata = {"loraport.format": FORMAT, "loraport.family": "ideogram4"}
    if scales is not None:
        metadata["loraport.scales"] = json.dumps(scales)
    write_tensors(path, {f"{NAME}.{name}": factor for name, factor in factors.items()}, metadata)
    return path


KINDS = {
    "lora": ({"lora_A": array(2, 6), "lora_B": array(8, 2)}, LowRank),
    "lokr": ({"lokr_w1": array(2, 2), "lokr_w2_a": array(4, 1), "lokr_w2_b": array(1, 3)}, LoKr),
    "lokr, full": ({"lokr_w1": array(2, 2), "lokr_w2": array(4, 3)}, LoKr),
    "loha": (
        {"hada_w1_a": array(8, 2), "hada_w1_b": array(2, 6), "hada_w2_a": array(8, 2), "hada_w2_b": array(2, 6)},
        LoHa,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_with_its_true_scale(tmp_path: Path, kind: str) -> None:
    factors, expected = KINDS[kind]
    file = NativeDialect().read(write(tmp_path / "a.safetensors", factors, {NAME: 0.75}))
    module = file.modules[NAME]
    assert isinstance(module.factors, expected)
    assert module.factors.shape == (8, 6)
    assert (module.scale, module.dora, file.family) == (0.75, None, "ideogram4")


def test_dora_brings_the_norms_along(tmp_path: Path) -> None:
    norms = {name: np.abs(array(8)) + 1 for name in ("magnitude", "base_norm", "merged_norm")}
    path = write(tmp_path / "a.safetensors", {**KINDS["lora"][0], **norms}, {NAME: 1.0})
    dora = NativeDialect().read(path).modules[NAME].dora
    assert dora is not None
    assert dora.divisor == "merged"
    np.testing.assert_array_equal(dora.trained, norms["magnitude"])
    np.testing.assert_array_equal(dora.merged_norm, norms["merged_norm"])


@pytest.mark.parametrize(
    ("factors", "scales"),
    [
        (KINDS["lora"][0], None),
        (KINDS["lora"][0], {"layers.1.attention.qkv": 1.0}),
        ({"lora_A": array(2, 6)}, {NAME: 1.0}),
        ({**KINDS["lora"][0], "magnitude": np.ones(8, np.float32)}, {NAME: 1.0}),
        ({"hada_w1_a": array(8, 2)}, {NAME: 1.0}),
        ({"something": array(8, 2)}, {NAME: 1.0}),
        ({"lora_A": array(2, 6), "lora_B": array(8, 3)}, {NAME: 1.0}),
        ({"lora_A": array(2, 6) * np.nan, "lora_B": array(8, 2)}, {NAME: 1.0}),
    ],
)
def test_a_damaged_file_is_an_error_that_says_where(tmp_path: Path, factors, scales) -> None:
    path = write(tmp_path / "a.safetensors", factors, scales)
    with pytest.raises(DataError, match=rf"a\.safetensors|{NAME}"):
        NativeDialect().read(path)


def test_only_its_own_files_are_claimed() -> None:
    detect = NativeDialect().detect
    assert detect([], {}, {"loraport.format": FORMAT}) == 1
    assert detect([f"{NAME}.lora_A"], {}, {}) == 0
    assert detect([], {}, {"loraport.format": "another"}) == 0


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", KINDS["lora"][0], {NAME: 1.0})
    code = (
        "import sys; from pathlib import Path; import loraport_native.plugin, loraport_native.translate, "
        "loraport_native.progress, loraport_native.collect; from loraport_native.dialect import NativeDialect; "
        f"NativeDialect().read(Path({str(path)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
