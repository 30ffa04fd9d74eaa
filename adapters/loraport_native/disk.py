"""What a run writes to disk, predicted from shapes alone. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraport.disk import Contents, Disk, checkpoints_at_once
from loraport_native.footprint import BYTES, OPTIMIZER_BYTES, blocks_bytes, dimensions_of, trained_parameters

if TYPE_CHECKING:
    from loraport.families import Family
    from loraport.spec.models import TrainSpec


def predict(spec: TrainSpec, family: Family, contents: Contents) -> Disk | None:
    """The bytes that a resolved spec takes; None for the tiny checkpoint and one of unknown dimensions.

    A checkpoint holds the adapter and the masters in float32 (the EMA too, when there is one) and the optimizer's state
    (`trainer._save`); the rows of norms that DoRA adds are left out, a thousandth of it.
    """
    dimensions = dimensions_of(spec, family)
    if dimensions is None:
        return None
    trained = trained_parameters(spec.lora, dimensions.matched(family.target_patterns(spec.lora.targets)))
    copies = 3 if spec.train.ema_decay else 2
    checkpoint = (4 * copies + OPTIMIZER_BYTES[spec.train.optimizer]) * trained
    image_tokens = contents.pixels // family.side_multiple**2
    channels = dimensions.other_linears["input_proj"][1]
    number = BYTES[spec.model.dtype]
    return Disk(
        cache=cache_bytes(image_tokens, channels, contents.caption_tokens, dimensions.width, number),
        checkpoints=round(checkpoint * checkpoints_at_once(spec.train.steps, spec.save)),
        result=BYTES[spec.save.dtype] * trained,
        weights=spec.train.gpus * blocks_bytes(spec, family, dimensions) if spec.memory.offload == "disk" else 0,
    )


def cache_bytes(image_tokens: int, channels: int, text_tokens: int, width: int, number: int) -> int:
    """Bytes of latents, in float32, and of projected text features of `number` bytes each."""
    return 4 * image_tokens * channels + number * text_tokens * width
