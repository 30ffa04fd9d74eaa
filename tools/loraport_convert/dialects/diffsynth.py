"""DiffSynth-Studio: modules without a prefix, PEFT's endings with `.default.`, and no alpha.

It writes its arguments to `training_args.json` beside the LoRA; its own scripts train with alpha = rank, LoraPort's
entry adds `lora_alpha` there when it asks for another. Its FLUX.1 has names of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from loraport.errors import DataError
from loraport.lora.storage import parse_json
from loraport_convert.codec.keys import Module
from loraport_convert.codec.scale import Told, nothing
from loraport_convert.dialects.base import Reader, share

ARGUMENTS = "training_args.json"
_ENDINGS = (".lora_A.default.weight", ".lora_B.default.weight")
_OTHERS = ("base_model.", "diffusion_model.", "transformer.", "unet.", "text_encoder")


class DiffSynth(Reader):
    name = "diffsynth"
    hint = f"DiffSynth writes {ARGUMENTS} into the folder of its LoRA files: put the two beside each other."

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """The share of keys that end as DiffSynth's do, under no prefix of another trainer's."""
        return 0.97 * share(keys, lambda key: key.endswith(_ENDINGS) and not key.startswith(_OTHERS))

    def told(self, path: Path, metadata: Mapping[str, str]) -> Told:
        """Raises DataError when the arguments beside the file are damaged or tell of another rank."""
        arguments = path.with_name(ARGUMENTS)
        if not arguments.is_file():
            return nothing
        try:
            content = parse_json(arguments.read_text(encoding="utf-8"))
            rank = int(content["lora_rank"])
            alpha = float(content.get("lora_alpha", rank))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path} does not tell its scale, and {arguments} cannot be read ({type(error).__name__}: {error})."
            ) from error

        def told(module: Module, actual: int) -> float:
            if actual != rank:
                raise DataError(
                    f"{path}: LoRA module {module.name} has rank {actual}, but {ARGUMENTS} beside it tells of {rank}.",
                    hint=f"Put the {ARGUMENTS} of the training that wrote this file beside it.",
                )
            return alpha / rank

        return told
