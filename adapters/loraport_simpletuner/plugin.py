"""The SimpleTuner adapter's plugin: backend and dialect. Nothing of SimpleTuner and no torch is imported here."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.hookspecs import hookimpl

if TYPE_CHECKING:
    from loraport.backend import Backend, Readiness
    from loraport.envs import Recipe
    from loraport.importing import Imported
    from loraport.lora.dialect import Dialect
    from loraport.planning import Context, Translation
    from loraport.run.events import Event
    from loraport.spec.models import TrainSpec


class SimpleTuner:
    """SimpleTuner, as a program in an environment of its own."""

    name = "simpletuner"
    version = importlib.metadata.version("loraport")
    description = "SimpleTuner 4.8 to 4.10 (AGPL-3.0), in an environment of its own"

    @cached_property
    def environment(self) -> Recipe:
        from loraport_simpletuner.recipe import recipe

        return recipe()

    def readiness(self, python: Path | None = None) -> Readiness:
        """Whether SimpleTuner can run; `python` is the spec's own interpreter, where it names one."""
        from loraport_simpletuner.launch import readiness

        return readiness(python)

    def translate(self, spec: TrainSpec, context: Context) -> Translation:
        from loraport_simpletuner.translate import translate

        return translate(spec, context)

    def read_line(self, line: str) -> Iterable[Event] | None:
        from loraport_simpletuner.progress import read_line

        return read_line(line)

    def explain_failure(self, exit_code: int, log_tail: str) -> Exception:
        from loraport_simpletuner.progress import explain_failure

        return explain_failure(exit_code, log_tail)

    def collect(self, spec: TrainSpec, run_dir: Path) -> Path:
        from loraport_simpletuner.collect import collect

        return collect(spec, run_dir)

    def import_config(self, path: Path) -> Imported:
        from loraport_simpletuner.importer import import_config

        return import_config(path)


@hookimpl
def register_backends(register: Callable[[Backend], None]) -> None:
    register(SimpleTuner())


@hookimpl
def register_dialects(register: Callable[[Dialect], None]) -> None:
    from loraport_simpletuner.dialect import SimpleTunerDialect

    register(SimpleTunerDialect())
