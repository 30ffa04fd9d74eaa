"""The machine before a run: what it is, that its card is idle, and that nobody else measures on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from loraport.errors import BackendError, RunFolderError
from loraport_bench import nvml
from loraport_bench.records import Idle, Machine

#: A card with less in use than this, and that was busy for less of the time, is idle.
IDLE_BYTES = 600 * 2**20
IDLE_PERCENT = 5
_POLL = 1.0


def machine(idle: Idle | None = None) -> Machine:
    """This machine, with the first card that a run would use."""
    import pynvml

    known: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "idle": idle,
    }
    with nvml.driver() as there:
        handles = nvml.handles(nvml.visible_cards(1)) if there else []
        if not handles:
            return Machine(**known)
        return Machine(
            **known,
            card=nvml.ask(pynvml.nvmlDeviceGetName, handles[0]) or "unnamed card",
            cards=nvml.ask(pynvml.nvmlDeviceGetCount) or 1,
            card_bytes=nvml.total_bytes(handles[0]),
            compute_capability=nvml.ask(pynvml.nvmlDeviceGetCudaComputeCapability, handles[0]),
            driver=nvml.ask(pynvml.nvmlSystemGetDriverVersion),
        )


def wait_until_idle(cards: int, patience: float, insist: bool = True) -> Idle | None:
    """Wait until the first `cards` cards that a run would use are idle; None on a machine without any.

    After `patience` seconds it raises BackendError, or, without `insist`, tells how busy they are.
    """
    started = time.monotonic()
    with nvml.driver() as there:
        handles = nvml.handles(nvml.visible_cards(cards)) if there else []
        while handles:
            seen = [_seen(handle, time.monotonic() - started) for handle in handles]
            busiest = max(seen, key=lambda one: (one.utilisation_percent or 0, one.used_bytes or 0))
            if all(is_idle(one) for one in seen):
                return busiest
            if time.monotonic() - started >= patience:
                if not insist:
                    return busiest
                raise BackendError(
                    f"The card is not idle: {_told(busiest)}.",
                    hint="End what uses it, wait longer with --wait SECONDS, or measure all the same with --busy.",
                )
            time.sleep(_POLL)
        return None


@contextlib.contextmanager
def alone_on_machine(what: str, wait: bool) -> Iterator[None]:
    """Hold the machine's lock, so that one run at a time is measured: $LORAPORT_BENCH_LOCK, else a file in the folder
    for temporary files, which all users of the machine share.

    Raises RunFolderError telling who has it, unless it is waited for.
    """
    given = os.environ.get("LORAPORT_BENCH_LOCK")
    path = Path(given) if given else Path(tempfile.gettempdir()) / "loraport-bench.lock"
    try:
        try:
            # Not O_CREAT at once: where all may write but each only removes their own, as in /tmp, Linux refuses that
            # for somebody else's file (fs.protected_regular).
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunFolderError(
            f"The machine's lock {path} cannot be opened: {error.strerror}.",
            hint="Name another file for it in $LORAPORT_BENCH_LOCK, the same for everybody who measures here.",
        ) from error
    try:
        with contextlib.suppress(OSError):  # somebody else's
            os.fchmod(descriptor, 0o666)
        _take(descriptor, path, wait)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()}, {what}".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path, wait: bool) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if not wait:
                holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace") or "another process"
                raise RunFolderError(
                    f"This machine is measuring already ({holder}); two runs at once would disturb each other.",
                    hint=f"Wait for it with --queue. The lock is {path}.",
                ) from error
        time.sleep(0.2)


def _seen(handle: Any, waited: float) -> Idle:
    import pynvml

    use, processes = nvml.ask(pynvml.nvmlDeviceGetUtilizationRates, handle), nvml.process_bytes(handle)
    return Idle(
        waited_s=round(waited, 2),
        utilisation_percent=None if use is None else use.gpu,
        used_bytes=nvml.used_bytes(handle),
        processes=None if processes is None else len(processes),
    )


def _told(seen: Idle) -> str:
    """What is known of a busy card, in words."""
    parts = []
    if seen.utilisation_percent is not None:
        parts.append(f"{seen.utilisation_percent:.0f} % in use")
    if seen.used_bytes is not None:
        parts.append(f"{seen.used_bytes / 2**30:.1f} GiB taken")
    if seen.processes:
        parts.append("by 1 process" if seen.processes == 1 else f"by {seen.processes} processes")
    return ", ".join(parts)


def is_idle(seen: Idle) -> bool:
    """Whether nothing uses a card: what it does not tell counts for nothing."""
    used, busy = seen.used_bytes or 0, seen.utilisation_percent or 0
    return used < IDLE_BYTES and busy < IDLE_PERCENT and not seen.processes


def _processor() -> str:
    """The processor's name, which Linux tells in a file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
