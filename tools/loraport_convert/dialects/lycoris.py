"""LyCORIS files under its own prefix, `lycoris_`, as SimpleTuner writes them: LoKr, LoHa and LoRA with alpha."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from loraport_convert.dialects.base import Reader, share


class Lycoris(Reader):
    name = "lycoris"

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """The share of keys under LyCORIS' prefix."""
        return 0.96 * share(keys, lambda key: key.startswith("lycoris_"))
