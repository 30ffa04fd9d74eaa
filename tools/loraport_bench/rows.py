"""The rows of `loraport bench step`: what is trained in each, and the bar it is held to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from loraport.errors import SpecError, unknown

Stock = Literal["bf16", "fp8", "nf4"]


@dataclass(frozen=True)
class Bar:
    """What a row has to reach on an H200; None where nothing is asked. `times` is the most seconds a step may take as a
    multiple of the row `of`; `throughput` the least images a second as a multiple of that row's."""

    seconds: float | None = None
    ratio: float | None = None  #: to the stock recipe: times as fast
    gib: float | None = None  #: peak allocated
    of: str | None = None
    times: float | None = None
    throughput: float | None = None


@dataclass(frozen=True)
class Row:
    """One measurement of the native trainer, or with `stock` alone of the recipe it is compared with."""

    name: str
    memory: dict[str, Any]  #: the spec's section
    resolution: int = 1024
    text: int = 512  #: tokens of every caption
    rank: int = 32
    batch: int = 1
    optimizer: str = "adamw8bit"
    gpus: int = 1
    limit_gib: float | None = None  #: of the card that the process may take
    stock: Stock | None = None  #: the recipe of its kind
    bar: Bar = field(default_factory=Bar)


@dataclass(frozen=True)
class StockRow:
    """The stock recipe on what a row trains; rows that name the same one are of the same size."""

    kind: Stock
    resolution: int
    text: int
    rank: int
    batch: int

    @property
    def name(self) -> str:
        return f"stock-{self.kind}"


def _memory(quantize: str, checkpointing: bool, offload: str = "none") -> dict[str, Any]:
    return {
        "quantize": quantize,
        "offload": offload,
        "compile": "regional",
        "gradient_checkpointing": checkpointing,
    }


_DYNAMIC = "fp8-dynamic-checkpointing"

ROWS = (
    Row("bf16", _memory("none", False), optimizer="adamw", stock="bf16", bar=Bar(seconds=0.38, ratio=2.7)),
    Row("fp8-dynamic", _memory("fp8-dynamic", False), optimizer="adamw", stock="fp8", bar=Bar(seconds=0.30, ratio=3.4)),
    Row(_DYNAMIC, _memory("fp8-dynamic", True), stock="fp8", bar=Bar(seconds=0.40, ratio=2.7, gib=11.5)),
    Row("fp8-dynamic-streamed", _memory("fp8-dynamic", True, "group"), bar=Bar(of=_DYNAMIC, times=1.08, gib=4.0)),
    Row(
        "fp8-dynamic-streamed-activations",
        _memory("fp8-dynamic", True, "group+activations"),
        bar=Bar(of=_DYNAMIC, times=1.15, gib=3.0),
    ),
    Row("nf4-checkpointing", _memory("nf4", True), stock="nf4", bar=Bar(seconds=0.58, ratio=1.8, gib=7.8)),
    Row(
        "fp8-dynamic-streamed-768",
        _memory("fp8-dynamic", True, "group"),
        resolution=768,
        rank=16,
        bar=Bar(gib=2.7),
    ),
    Row("fp8-dynamic-batch-4", _memory("fp8-dynamic", True), batch=4, bar=Bar(of=_DYNAMIC, throughput=1.1)),
    # A batch shares the copying of streamed blocks, and the unpacking of weights.
    Row(
        "fp8-dynamic-streamed-batch-4",
        _memory("fp8-dynamic", True, "group"),
        batch=4,
        bar=Bar(of="fp8-dynamic-streamed", throughput=1.1),
    ),
    Row("nf4-batch-4", _memory("nf4", True), batch=4, bar=Bar(of="nf4-checkpointing", throughput=1.1)),
    Row("fp8-dynamic-two-gpus", _memory("fp8-dynamic", True), gpus=2, bar=Bar(of=_DYNAMIC, throughput=1.9)),
    Row("fp8-checkpointing", _memory("fp8", True), stock="fp8"),
    Row("int8-checkpointing", _memory("int8", True)),
    Row("int8-dynamic-checkpointing", _memory("int8-dynamic", True)),
    # A whole run of each preset, caching included, in a process that cannot take more than the card has. CUDA's
    # context, which the limit does not count, takes the last half GiB.
    Row("preset-6gb", {"profile": "6gb"}, resolution=768, rank=16, limit_gib=5.5),
    Row("preset-8gb", {"profile": "8gb"}, rank=16, limit_gib=7.5),
    Row("preset-12gb", {"profile": "12gb"}, limit_gib=11.5),
    Row("preset-16gb", {"profile": "16gb"}, limit_gib=15.5),
    Row("preset-24gb", {"profile": "24gb"}, limit_gib=23.5),
    Row("preset-48gb", {"profile": "48gb"}, limit_gib=47.5),
    Row("preset-80gb", {"profile": "80gb"}, limit_gib=79.5),
)

#: Held-out loss: the same training under each of these, at a size where 200 steps are quick. The first is what the
#: others are compared with.
QUALITY_ROWS = tuple(
    Row(f"quality-{name}", _memory(quantize, False, offload), resolution=512, rank=16)
    for name, quantize, offload in (
        ("bf16", "none", "none"),
        ("fp8", "fp8", "none"),
        ("fp8-dynamic", "fp8-dynamic", "none"),
        ("int8", "int8", "none"),
        ("nf4", "nf4", "none"),
    )
)


def select(rows: tuple[Row, ...], names: list[str] | None) -> list[Row]:
    """The rows of these names in the table's order, or all. SpecError for a name that is not there."""
    known = [row.name for row in rows]
    for name in names or []:
        if name not in known:
            raise SpecError(unknown("--rows:", name, known))
    return [row for row in rows if not names or row.name in names]
