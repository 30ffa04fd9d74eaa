"""A session of measuring: the rows that the file lacks, one after the other; each is written as soon as it is known."""

from __future__ import annotations

import datetime
import os
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from loraport.errors import SpecError
from loraport_bench.data import make_dataset, read_config
from loraport_bench.floor import Dimensions, floor_gib, floor_seconds, tokens
from loraport_bench.measure import Bench, Held, rate_row, stock_row, train_row
from loraport_bench.monitor import machine
from loraport_bench.process import stops_raise
from loraport_bench.results import DataFile, versions
from loraport_bench.rows import Row, StockRow

RATE = "rate"
Tell = Callable[[str], None]


def places(gpus: int, per_gpu: int) -> list[str | None]:
    """The card of each run that goes on at once, by its index or UUID; None for the one that a run takes by itself.

    CUDA_VISIBLE_DEVICES says which cards there are. Raises SpecError when they are fewer than `gpus`.
    """
    if gpus == 1:
        return [None] * per_gpu
    named = dict.fromkeys(os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(","))
    visible = [card for card in named if card] or [str(card) for card in range(machine()["cards"] or gpus)]
    if gpus > len(visible):
        raise SpecError(f"--gpus: {gpus} are asked for, and there are {len(visible)}: {', '.join(visible)}.")
    return [card for card in visible[:gpus] for _ in range(per_gpu)]


@dataclass(frozen=True)
class Session:
    """Where rows are measured, and the file that they go to. `tell` hears what is going on."""

    bench: Bench
    file: DataFile
    tell: Tell
    again: bool = False
    options: str = ""  #: of the command, for the record

    def steps(self, rows: list[Row]) -> None:
        """Measure the rows, each after the stock recipe of its kind and the card's rate."""
        with stops_raise():
            self._measure(RATE, None, {}, lambda: rate_row(self.bench))
            for row in rows:
                if row.stock:
                    stock = StockRow(row.stock, row.resolution, row.text, row.rank, row.batch)
                    self._measure(stock.name, None, _settings(stock, self.bench), lambda: stock_row(stock, self.bench))  # noqa: B023
                self._measure(row.name, None, _settings(row, self.bench), lambda: self._step(row))  # noqa: B023

    def quality(self, rows: list[Row], seeds: list[int], cards: list[str | None]) -> None:
        """Measure the held-out loss of each row at each seed, a run on each of `cards` at once; see `places`."""
        for row in rows:  # made once, before several runs would make it
            make_dataset(self.bench.images, self.bench.work, row.resolution, row.text, self.bench.checkpoint)
        free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for card in cards:
            free.put(card)

        def measure(row: Row, seed: int) -> None:
            card = free.get()
            try:
                held = Held(seed, card, len(cards))
                self._measure(row.name, seed, _settings(row, self.bench), lambda: train_row(row, self.bench, held))
            finally:
                free.put(card)

        with stops_raise(), ThreadPoolExecutor(max_workers=len(cards)) as pool:
            jobs = [pool.submit(measure, row, seed) for seed in seeds for row in rows]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.bench.running.stop()
                raise

    def _step(self, row: Row) -> dict[str, Any]:
        numbers = train_row(row, self.bench)
        rate, length = self.file.good(RATE), tokens(row.resolution, row.text)
        if "step_s" not in numbers or rate is None:
            return numbers
        median = numbers["step_s"]["median"]
        numbers["images_per_second"] = round(row.gpus * row.batch / median, 4)
        stock = self.file.good(f"stock-{row.stock}") if row.stock else None
        if stock is not None:
            numbers["times_stock"] = round(stock["step_s"]["median"] / median, 3)
        if row.memory.get("quantize") is not None:
            numbers["floor"] = self._floor(row, length, rate["bf16_tflops"])
        return numbers

    def _floor(self, row: Row, length: int, tflops: float) -> dict[str, float]:
        dimensions, memory = Dimensions.of(read_config(self.bench.checkpoint)), row.memory
        recomputed, offload = bool(memory["gradient_checkpointing"]), memory["offload"]
        quantize = memory["quantize"]
        seconds = floor_seconds(dimensions, length, row.batch, recomputed, quantize.endswith("-dynamic"), tflops)
        gib = floor_gib(
            dimensions,
            length,
            row.batch,
            row.rank,
            quantize.removesuffix("-dynamic"),
            streamed=offload != "none",
            activations=offload == "group+activations",
        )
        return {"seconds": round(seconds, 6), **({"gib": round(gib, 3)} if recomputed else {})}

    def _measure(
        self, name: str, seed: int | None, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> None:
        """Take a row's numbers and write them down, unless they are there."""
        shown = name if seed is None else f"{name}, seed {seed}"
        if (name, seed) in self.file.rows and not self.again:
            self.tell(f"{shown}: in the file already")
            return
        self.tell(f"{shown} …")
        numbers = measure()
        self.file.append(
            {
                "row": name,
                **({} if seed is None else {"seed": seed}),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                **machine(),
                "versions": versions(),
                "settings": settings,
                "command": f"loraport bench step {self.options}".strip(),
                **numbers,
            }
        )
        seconds = f", {numbers['step_s']['median']:.3f} s a step" if "step_s" in numbers else ""
        self.tell(f"{shown}: {numbers['status']}{seconds}{' – ' + numbers['message'] if 'message' in numbers else ''}")


def _settings(row: Row | StockRow, bench: Bench) -> dict[str, Any]:
    """Everything that says what was run, and no path."""
    config = read_config(bench.checkpoint)
    common = {
        "resolution": row.resolution,
        "text_tokens": row.text,
        "rank": row.rank,
        "batch": row.batch,
        "steps": bench.steps,
        "warm_up": bench.warm_up,
        "blocks": config["num_layers"],
        "width": Dimensions.of(config).width,
    }
    if isinstance(row, StockRow):
        return {"recipe": f"diffusers {row.kind}", **common}
    more = {"optimizer": row.optimizer, "gpus": row.gpus, "limit_gib": row.limit_gib, "memory": row.memory}
    return {**common, "checkpoint": bench.checkpoint.name, **more}
