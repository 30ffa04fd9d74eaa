"""Stands for pynvml: cards whose numbers a test sets, and processes on the first."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any


class Driver:
    """What the functions of pynvml answer. Everything may be changed while somebody asks; a function that is named in
    `unsupported` fails as the driver's do on cards that lack what it tells."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    nvmlMemory_v2 = 2

    class NVMLError(Exception):
        pass

    def __init__(self, cards: int = 1) -> None:
        self.cards, self.used, self.reserved = cards, 5 * 2**20, 0
        self.processes, self.percent = dict[int, int | None](), 0
        self.throttle, self.old = 0, False
        self.unsupported: set[str] = {"nvmlDeviceGetTemperature"}
        self.born = time.time()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvmlDevice") and name in self.unsupported:
            return self._refuse
        return super().__getattribute__(name)

    def _refuse(self, *arguments: Any) -> Any:
        raise self.NVMLError("Not Supported")

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return self.cards

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index >= self.cards:
            raise self.NVMLError("Invalid Argument")
        return f"card {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        raise self.NVMLError("Not Found")

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "Fake Card"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "999.1"

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return 9, 0

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> Any:
        """What is reserved counts as used in the first version of the answer."""
        if version and self.old:
            raise self.NVMLError("Function Not Found")
        used = self.used if version == self.nvmlMemory_v2 else self.used + self.reserved
        return SimpleNamespace(used=used, total=8 * 2**30)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        found = self.processes if handle == "card 0" else {}
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in found.items()]

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=self.percent, memory=0)

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {self.NVML_CLOCK_SM: 1800, self.NVML_CLOCK_MEM: 3200}[kind]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 250_000

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 60

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return int(250_000 * (time.time() - self.born))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.throttle
