"""A DoRA goes unchanged between layouts that keep the trained magnitude; nothing of the base weights is needed."""

import numpy as np
import pytest

from loraport.lora.canonical import LoraFile, LoraModule, LowRank, RowScale
from loraport.lora.proof import prove
from loraport.plugins import plugins
from loraport_convert.reading import read_lora

H, MODULE = 24, "layers.0.attention.qkv"


@pytest.mark.parametrize("dtype", [None, "fp32"])
@pytest.mark.parametrize("target", ["kohya", "diffusers", "peft"])
def test_the_magnitude_arrives_as_it_was_trained(tmp_path, target, dtype):
    rng, dialects = np.random.default_rng(0), plugins().dialects()
    down, up, magnitude = (rng.random(size).astype(np.float32) for size in ((2, H), (3 * H, 2), (3 * H,)))
    dora = RowScale(magnitude + 1)
    lora = LoraFile("ideogram4", {MODULE: LoraModule(MODULE, LowRank(down=down, up=up), 1.5, dora)})
    path = tmp_path / "adapter_model.safetensors"
    dialects[target].write(lora, path, dtype, {})
    found = read_lora(path, dialects).lora
    assert prove(lora, found).ok
    np.testing.assert_array_equal(found.modules[MODULE].dora.trained, dora.trained)
