"""The native trainer's plugin: backend, dialect, `loraport tiny`, and the loss curve. No torch is imported here."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.hookspecs import hookimpl

if TYPE_CHECKING:
    import typer

    from loraport.backend import Backend, Readiness
    from loraport.disk import Contents, Disk
    from loraport.footprint import Footprint
    from loraport.listeners import Listener, ListenerFactory
    from loraport.lora.dialect import Dialect
    from loraport.planning import Context, Translation
    from loraport.run.events import Event
    from loraport.spec.models import TrainSpec


class Native:
    """LoraPort's own trainer: diffusers, peft, lycoris-lora, bitsandbytes."""

    name = "native"
    version = importlib.metadata.version("loraport")
    description = "LoraPort's own trainer (diffusers, peft, lycoris-lora, bitsandbytes)"

    def readiness(self, python: Path | None = None) -> Readiness:
        from loraport_native.launch import readiness

        return readiness(python)

    def translate(self, spec: TrainSpec, context: Context) -> Translation:
        from loraport_native.translate import translate

        return translate(spec, context)

    def predict_memory(self, spec: TrainSpec, room_gib: float | None) -> Footprint | None:
        from loraport.plugins import plugins
        from loraport_native.footprint import predict

        return predict(spec, plugins().families()[spec.model.family], room_gib)

    def predict_disk(self, spec: TrainSpec, contents: Contents) -> Disk | None:
        from loraport.plugins import plugins
        from loraport_native.disk import predict

        return predict(spec, plugins().families()[spec.model.family], contents)

    def token_counter(self, checkpoint: str, revision: str | None = None) -> Callable[[str], int] | None:
        from loraport_native.models.tokens import token_counter

        return token_counter(checkpoint, revision)

    def read_line(self, line: str) -> Iterable[Event] | None:
        from loraport_native.progress import read_line

        return read_line(line)

    def explain_failure(self, exit_code: int, log_tail: str) -> Exception:
        from loraport_native.progress import explain_failure

        return explain_failure(exit_code, log_tail)

    def collect(self, spec: TrainSpec, run_dir: Path) -> Path:
        from loraport_native.collect import collect

        return collect(spec, run_dir)

    def score_command(self, job: Path) -> list[str]:
        return [sys.executable, "-m", "loraport_native.evaluate", str(job)]


@hookimpl
def register_backends(register: Callable[[Backend], None]) -> None:
    register(Native())


@hookimpl
def register_dialects(register: Callable[[Dialect], None]) -> None:
    from loraport_native.dialect import NativeDialect

    register(NativeDialect())


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    from loraport_native.commands import add_commands

    add_commands(cli)


@hookimpl
def register_listeners(register: Callable[[ListenerFactory], None]) -> None:
    def loss_curve(spec: TrainSpec, backend: str, run_dir: Path) -> Listener | None:
        from loraport_native.curve import LossCurve

        return LossCurve(spec, run_dir) if backend == Native.name else None

    register(loss_curve)
