"""How much memory of the whole card is in use, asked from the driver while something else runs."""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType
from typing import Any, Self

from loraport_bench.nvml import ask, card_handle, driver

INTERVAL = 0.05  #: seconds between two questions


class DeviceMonitor:
    """Samples (time, bytes in use on the card) until the block ends. Without an NVIDIA driver there are none.

    The card is the first that CUDA_VISIBLE_DEVICES names, or the machine's first.
    """

    def __init__(self, card: str | None = None) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        self._card = card or visible.split(",")[0].strip() or "0"
        self.samples: list[tuple[float, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def peak_gib(self, start: float = 0.0, end: float = float("inf")) -> float | None:
        """Most in use from `start` to `end` (seconds since 1970), GiB; None when nothing was sampled then."""
        seen = [used for moment, used in self.samples if start <= moment <= end]
        return round(max(seen) / 2**30, 3) if seen else None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        import pynvml

        with driver() as there:
            handle = ask(card_handle, self._card) if there else None
            while handle is not None and not self._over.is_set():
                memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
                if memory is not None:
                    self.samples.append((time.time(), int(memory.used)))
                self._over.wait(INTERVAL)


def machine() -> dict[str, Any]:
    """The card's name, memory and driver, or what the processor is."""
    import platform

    import pynvml

    with driver() as there:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
        handle = ask(card_handle, first) if there else None
        if handle is None:
            return {"card": f"CPU ({platform.machine()})", "driver": None, "cards": 0}
        memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
        return {
            "card": ask(pynvml.nvmlDeviceGetName, handle),
            "card_gib": None if memory is None else round(memory.total / 2**30, 1),
            "driver": ask(pynvml.nvmlSystemGetDriverVersion),
            "cards": ask(pynvml.nvmlDeviceGetCount),
        }
