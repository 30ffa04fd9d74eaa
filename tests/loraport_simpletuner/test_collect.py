"""The final LoRA gets its alpha back, and is not believed in without reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraport.errors import BackendError, DataError
from loraport.lora.canonical import LoHa, LoKr, LowRank
from loraport.lora.storage import write_tensors
from loraport_simpletuner.collect import collect
from loraport_simpletuner.dialect import SimpleTunerDialect

MODULE = "layers.0.attention.qkv"


def write(path: Path, rank: int, metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ones = np.ones((rank, 8), np.float32)
    tensors = {f"transformer.{MODULE}.lora_A.weight": ones, f"transformer.{MODULE}.lora_B.weight": ones.T.copy()}
    write_tensors(path, tensors, {"format": "pt", **(metadata or {})})


def finished(run_dir: Path, rank: int = 4, steps: int = 10, status: str = "completed") -> Path:
    output = run_dir / "backend" / "output"
    write(output / "pytorch_lora_weights.safetensors", rank)
    (output / "training_metrics.json").write_text(json.dumps({"status": status, "last_step": steps}))
    return output


def told(alpha: float) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": alpha, "transformer.r": 4})}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_the_final_file_is_read_with_the_specs_scale(make_spec, tmp_path: Path, rslora: bool, scale: float) -> None:
    finished(tmp_path)
    path = collect(make_spec(lora={"rank": 4, "alpha": 8, "rslora": rslora}, train={"steps": 10}), tmp_path)
    lora = SimpleTunerDialect().read(path)
    assert lora.modules[MODULE].scale == pytest.approx(scale)
    assert isinstance(lora.modules[MODULE].factors, LowRank)
    assert lora.unread == ()
    assert math.isclose(lora.modules[MODULE].factors.product()(0, 1)[0, 0], 4.0)


def test_the_last_checkpoint_must_agree_on_alpha(make_spec, tmp_path: Path) -> None:
    spec = make_spec(lora={"rank": 4, "alpha": 8}, train={"steps": 10})
    checkpoint = finished(tmp_path) / "checkpoint-10"
    write(checkpoint / "pytorch_lora_weights.safetensors", 4, told(8))
    (checkpoint / ".guard").write_text("complete")
    collect(spec, tmp_path)
    write(checkpoint / "pytorch_lora_weights.safetensors", 4, told(16))
    with pytest.raises(BackendError, match=r"alpha 16\.0, where the spec asks for 8\.0"):
        collect(spec, tmp_path)


def test_another_rank_status_or_step_is_no_success(make_spec, tmp_path: Path) -> None:
    spec = make_spec(lora={"rank": 4}, train={"steps": 10})
    with pytest.raises(BackendError, match="is missing; there is no checkpoint"):
        collect(spec, tmp_path)
    finished(tmp_path, status="running")
    with pytest.raises(BackendError, match="'running', not 'completed'"):
        collect(spec, tmp_path)
    finished(tmp_path, steps=9)
    with pytest.raises(BackendError, match="last step is 9, not 10"):
        collect(spec, tmp_path)
    finished(tmp_path, rank=8)
    with pytest.raises(BackendError, match=r"ranks \[8\]"):
        collect(spec, tmp_path)


def test_a_file_without_alpha_is_not_guessed_at(tmp_path: Path) -> None:
    write(tmp_path / "lora.safetensors", 4)
    with pytest.raises(DataError, match="does not tell its alpha"):
        SimpleTunerDialect().read(tmp_path / "lora.safetensors")


def test_a_checkpoint_tells_its_own_alpha(tmp_path: Path) -> None:
    write(tmp_path / "lora.safetensors", 4, told(2))
    assert SimpleTunerDialect().read(tmp_path / "lora.safetensors").modules[MODULE].scale == 0.5


def lycoris(path: Path, **factors: Any) -> Any:
    tensors = {f"lycoris_layers_3_feed_forward_w1.{name}": value for name, value in factors.items()}
    write_tensors(path, tensors, {})
    return SimpleTunerDialect().read(path).modules["layers.3.feed_forward.w1"]


def test_lycoris_files_hold_their_scale(tmp_path: Path) -> None:
    two, alpha = np.ones((2, 2), np.float32), np.array(1.0, np.float32)
    path = tmp_path / "lora.safetensors"
    factored = lycoris(path, lokr_w1=two, lokr_w2_a=two, lokr_w2_b=two, alpha=alpha)
    assert isinstance(factored.factors, LoKr)
    assert factored.scale == 0.5
    assert lycoris(path, lokr_w1=two, lokr_w2=two, alpha=alpha).scale == 1.0
    hada = lycoris(path, hada_w1_a=two, hada_w1_b=two, hada_w2_a=two, hada_w2_b=two, alpha=alpha)
    assert isinstance(hada.factors, LoHa)
    assert hada.scale == 0.5


def test_its_files_are_known_from_others() -> None:
    detect = SimpleTunerDialect().detect
    assert detect(["transformer.layers.0.attention.qkv.lora_A.weight"], {}, {}) > 0.5
    assert detect(["lycoris_layers_0_attention_qkv.lokr_w1"], {}, {}) > 0.5
    assert detect(["transformer.layers.0.attention.to_q.lora_A.weight"], {}, {}) == 0.0
    assert detect(["diffusion_model.layers.0.attention.qkv.lora_A.weight"], {}, {}) == 0.0
    assert detect([], {}, {}) == 0.0
