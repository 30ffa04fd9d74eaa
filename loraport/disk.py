"""Disk space before a run: what a backend predicts that a spec will write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraport.spec.models import SaveSection, TrainSpec


@dataclass(frozen=True)
class Contents:
    """What a dataset gives a trainer to compute ahead and keep."""

    pixels: int  #: of all images at the sizes they are trained at, mirrored ones counted beside the others
    caption_tokens: int  #: of all captions


@dataclass(frozen=True)
class Disk:
    """Bytes that a run takes: shared by runs in the cache, and in its own folder at its fullest."""

    cache: int
    checkpoints: int
    result: int  #: the LoRA for ComfyUI
    weights: int = 0  #: of the model, which wait on disk while it trains

    @property
    def total(self) -> int:
        return self.cache + self.checkpoints + self.result + self.weights


#: A backend's optional `predict_disk`: (resolved spec, its dataset) → what it writes, or None when nothing can be said.
PredictDisk = Callable[["TrainSpec", Contents], Disk | None]


def checkpoints_at_once(steps: int, save: SaveSection) -> int:
    """The most checkpoints of a run that are on disk together: one more than are kept while the newest is written."""
    written = -(-steps // save.every) if save.every else 1
    return min(written, save.keep + 1)


def size_text(count: float) -> str:
    """Bytes as people say them: 12 kB, 0.6 MB, 340 MB, 4.1 GB."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    if count < 1e5:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"
