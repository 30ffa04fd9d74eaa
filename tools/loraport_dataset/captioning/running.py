"""A captioning run as a process: from the first picture to the last, or to the signal that ends it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from loraport.errors import BackendError, Interrupted
from loraport_dataset.captioning.answers import Describer
from loraport_dataset.captioning.form import Form
from loraport_dataset.captioning.job import Captioner, Summary, Tasks, caption_all
from loraport_dataset.captioning.service import Service
from loraport_dataset.captioning.telling import followed

#: Makes a describer within the event loop that it will live in.
Maker = Callable[[], Awaitable[Describer]]
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Effort:
    """How pictures are sent: workers at a time, the longer side in pixels, and how often a caption may be corrected."""

    workers: int = 1
    max_side: int = 1024
    corrections: int = 2


def endpoint(service: Service, per_minute: float | None) -> Maker:
    """A maker of a service's describer. Raises BackendError where the HTTP client is not installed."""

    async def make() -> Describer:
        try:
            from loraport_dataset.captioning.endpoint import Endpoint
            from loraport_dataset.captioning.pace import Pace
        except ImportError as error:
            raise _missing(error, "caption") from error
        return Endpoint(service, Pace(per_minute))

    return make


def local_model(checkpoint: str, max_tokens: int, device: str | None) -> Maker:
    """A maker of a model on this machine. Raises BackendError where what it needs is not installed."""

    def load() -> Describer:
        try:
            from loraport_dataset.captioning.local import LocalModel
        except ImportError as error:
            raise _missing(error, "caption-local") from error
        return LocalModel(checkpoint, max_tokens, device)

    async def make() -> Describer:
        return await asyncio.to_thread(load)

    return make


def _missing(error: ImportError, extra: str) -> BackendError:
    package = error.name or str(error)
    return BackendError(f"A package is not installed: {package}.", hint=f"pip install 'loraport[{extra}]'")


def run(tasks: Tasks, make: Maker, form: Form, effort: Effort, quiet: bool) -> Summary:
    """Caption all pictures of `tasks`. Raises Interrupted after SIGINT, SIGTERM or SIGHUP, with what was done, and what
    `caption_all` and the describer raise."""
    summary = Summary(kept=tasks.kept)
    if not tasks.todo:
        return summary
    try:
        asyncio.run(_run(tasks, make, form, effort, quiet, summary))
    except asyncio.CancelledError:
        left = len(tasks.todo) - summary.written
        raise Interrupted(
            f"Stopped: {summary.written:,} captions written, {left:,} pictures left.",
            hint="The same command goes on; captions that are written are kept.",
        ) from None
    return summary


async def _run(tasks: Tasks, make: Maker, form: Form, effort: Effort, quiet: bool, summary: Summary) -> None:
    _end_on_signals()
    describer = await make()
    try:
        captioner = Captioner(describer, form, effort.max_side, effort.corrections)
        with followed(len(tasks.todo), quiet) as tell:
            await caption_all(tasks, captioner, effort.workers, tell, summary)
    finally:
        await describer.close()


def _end_on_signals() -> None:
    """The first signal ends the run in good order, a second one at once. One that is ignored (by nohup) stays so."""
    loop, run_itself = asyncio.get_running_loop(), asyncio.current_task()
    assert run_itself is not None
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]

    def end() -> None:
        for number in heard:
            loop.remove_signal_handler(number)
        run_itself.cancel()

    for number in heard:
        loop.add_signal_handler(number, end)
