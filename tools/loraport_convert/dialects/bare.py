"""Modules without any prefix that ComfyUI or a trainer would know: the last resort, by endings alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from loraport_convert.codec.keys import split
from loraport_convert.dialects.base import Reader, share


class Bare(Reader):
    name = "bare"

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """The share of keys that end as those of some LoRA do."""
        return 0.5 * share(keys, lambda key: split(key) is not None)
