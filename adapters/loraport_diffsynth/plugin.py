"""The DiffSynth-Studio plugin: the backend. Neither torch nor DiffSynth is imported here."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.hookspecs import hookimpl

if TYPE_CHECKING:
    from loraport.backend import Backend, Readiness
    from loraport.envs import Recipe
    from loraport.importing import Imported
    from loraport.planning import Context, Translation
    from loraport.run.events import Event
    from loraport.spec.models import TrainSpec


class DiffSynth:
    """DiffSynth-Studio, run in its own interpreter."""

    name = "diffsynth"
    version = importlib.metadata.version("loraport")
    description = "DiffSynth-Studio 2.1, in its own environment"

    @property
    def environment(self) -> Recipe:
        from loraport_diffsynth.recipe import RECIPE

        return RECIPE

    def readiness(self, python: Path | None = None) -> Readiness:
        from loraport_diffsynth.recipe import readiness

        return readiness(python)

    def translate(self, spec: TrainSpec, context: Context) -> Translation:
        from loraport_diffsynth.translate import translate

        return translate(spec, context)

    def read_line(self, line: str) -> Iterable[Event] | None:
        from loraport_diffsynth.progress import read_line

        return read_line(line)

    def explain_failure(self, exit_code: int, log_tail: str) -> Exception:
        from loraport_diffsynth.progress import explain_failure

        return explain_failure(exit_code, log_tail)

    def collect(self, spec: TrainSpec, run_dir: Path) -> Path:
        from loraport_diffsynth.collect import collect

        return collect(spec, run_dir)

    def import_config(self, path: Path) -> Imported:
        from loraport_diffsynth.importer import import_config

        return import_config(path)


@hookimpl
def register_backends(register: Callable[[Backend], None]) -> None:
    register(DiffSynth())
