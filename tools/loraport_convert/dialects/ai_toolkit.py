"""ai-toolkit: `diffusion_model.` or `transformer.` with PEFT's endings and without alpha, which is always the rank.

Its LoKr keeps alpha, a huge number that means nothing: LyCORIS looks at it only where a factor is itself a product.
Anything else under `diffusion_model.` is read here too: such a file is made for ComfyUI, where no alpha means 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from loraport.lora.canonical import LoraFile
from loraport_convert.codec.scale import Told, always_rank
from loraport_convert.codec.write import write_ai_toolkit
from loraport_convert.dialects.base import Reader, share


def _is_own(metadata: Mapping[str, str]) -> bool:
    return "ai-toolkit" in metadata.get("software", "")


class AiToolkit(Reader):
    name = "ai-toolkit"

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """The share of keys under its prefixes; `transformer.` counts where the metadata name ai-toolkit."""
        own = _is_own(metadata)
        prefixes = ("diffusion_model.", "transformer.") if own else ("diffusion_model.",)
        return (0.99 if own else 0.9) * share(keys, lambda key: key.startswith(prefixes))

    def told(self, path: Path, metadata: Mapping[str, str]) -> Told:
        return always_rank

    def write(self, lora: LoraFile, path: Path, dtype: str | None, metadata: Mapping[str, str]) -> None:
        """Write it with the scale multiplied into `lora_B`, since its files hold no alpha.

        Raises DataError when the family is not known, and NotExact for a DoRA or rows of several adapters.
        """
        write_ai_toolkit(lora, path, dtype, metadata)
