"""ai-toolkit's plugin. Nothing of ai-toolkit is imported here or anywhere in LoraPort: it runs as a process."""

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


class AiToolkit:
    """Ostris' ai-toolkit, from a checkout."""

    name = "ai-toolkit"
    version = importlib.metadata.version("loraport")
    description = "Ostris' ai-toolkit, run from a checkout"

    @property
    def environment(self) -> Recipe:
        from loraport_ai_toolkit.recipe import ENVIRONMENT

        return ENVIRONMENT

    def readiness(self, python: Path | None = None) -> Readiness:
        from loraport_ai_toolkit.launch import readiness

        return readiness(python)

    def translate(self, spec: TrainSpec, context: Context) -> Translation:
        from loraport_ai_toolkit.translate import translate

        return translate(spec, context)

    def read_line(self, line: str) -> Iterable[Event] | None:
        from loraport_ai_toolkit.progress import read_line

        return read_line(line)

    def explain_failure(self, exit_code: int, log_tail: str) -> Exception:
        from loraport_ai_toolkit.progress import explain_failure

        return explain_failure(exit_code, log_tail)

    def collect(self, spec: TrainSpec, run_dir: Path) -> Path:
        from loraport_ai_toolkit.collect import collect

        return collect(spec, run_dir)

    def import_config(self, path: Path) -> Imported:
        from loraport_ai_toolkit.importer import import_config

        return import_config(path)


@hookimpl
def register_backends(register: Callable[[Backend], None]) -> None:
    register(AiToolkit())
