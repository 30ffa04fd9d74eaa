"""diffusers before PEFT: `lora.up` and `lora.down`, `processor.to_q_lora.up`, `lora_linear_layer.up`.

Its layers knew no alpha, so without an alpha tensor the scale is 1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from loraport_convert.codec.scale import Told, always_rank
from loraport_convert.dialects.base import Reader, share

_KEY = re.compile(r".*(?:[._]lora|\.lora_linear_layer)\.(?:up|down)\.weight$|.*\.alpha$")


class OldDiffusers(Reader):
    name = "old-diffusers"

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """The share of keys with the old endings."""
        factors = any(not key.endswith(".alpha") and _KEY.match(key) for key in keys)
        return 0.94 * share(keys, lambda key: _KEY.match(key) is not None) if factors else 0.0

    def told(self, path: Path, metadata: Mapping[str, str]) -> Told:
        return always_rank
