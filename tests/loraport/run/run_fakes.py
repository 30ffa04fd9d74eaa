"""A fake backend over `fake_trainer.py`, and the plugins that make a run with it whole. As a script: one run.

`python run_fakes.py train SPEC OUT` or `python run_fakes.py resume DIR` prints events as JSON and exits as the command
line would.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

import loraport.plugins
from loraport.backend import Backend, Readiness
from loraport.errors import BackendError, LoraPortError
from loraport.hookspecs import hookimpl
from loraport.ideogram4 import IDEOGRAM4
from loraport.listeners import ListenerFactory
from loraport.lora.canonical import LoraFile, LoraModule, LowRank
from loraport.planning import Context, Kind, Translation, Verdict
from loraport.plugins import Plugins
from loraport.profiles import Profile
from loraport.run.display import JsonLines
from loraport.run.events import Event, decode_line
from loraport.spec.models import TrainSpec, leaf_fields, value_at
from loraport_convert.comfyui import ComfyUI

TRAINER = Path(__file__).with_name("fake_trainer.py")


class FakeBackend:
    """Runs `fake_trainer.py` in the mode and pace that `backend.options` say."""

    name = "fake"
    version = "1.0"
    description = "for tests"
    ready = True

    def readiness(self, python: Path | None = None) -> Readiness:
        return Readiness(self.ready, "fakes are always ready" if self.ready else "pip install fake")

    def translate(self, spec: TrainSpec, context: Context) -> Translation:
        options = spec.backend.options
        return Translation(
            verdicts=[
                Verdict(path, value_at(spec, path), Kind(options.get("verdict", {}).get(path, "exact")), "fake")
                for path in leaf_fields()
            ],
            files=options.get("files", {}),
            command=[
                options.get("program", sys.executable),
                *("-I", "-S", str(TRAINER), options.get("mode", "train"), str(context.run_dir)),
                *(str(spec.train.steps), str(options.get("seconds", 0.0))),
                *(["resume"] if context.resume else []),
            ],
            env={"FAKE_LORA": options.get("lora", ""), "PLANNED": "by the plan"},
        )

    def read_line(self, line: str) -> Iterable[Event] | None:
        if "%|" in line:
            raise ValueError(f"cannot read {line.strip()}")
        event = decode_line(line)
        return None if event is None else [event]

    def explain_failure(self, exit_code: int, log_tail: str) -> Exception:
        if "RuntimeError" in log_tail:
            return BackendError(f"code {exit_code}: {log_tail.splitlines()[-1]}")
        return RuntimeError("not an error of ours")

    def collect(self, spec: TrainSpec, run_dir: Path) -> Path:
        path = run_dir / "trained.safetensors"
        if not path.exists():
            raise BackendError("The trainer ended without a LoRA.")
        return path


class FakePlugin:
    """Everything a run needs, for one plugin manager."""

    def __init__(self, backend: Backend, listeners: list[ListenerFactory]):
        self.backend = backend
        self.listeners = listeners
        self.dialects: list[Any] = [ComfyUI()]

    @hookimpl
    def register_backends(self, register: Callable[[Backend], None]) -> None:
        register(self.backend)

    @hookimpl
    def register_families(self, register: Callable[[Any], None]) -> None:
        register(IDEOGRAM4)

    @hookimpl
    def register_dialects(self, register: Callable[[Any], None]) -> None:
        for dialect in self.dialects:
            register(dialect)

    @hookimpl
    def register_profiles(self, register: Callable[[Profile], None]) -> None:
        register(Profile("quantize", "none", "nothing", {"storage": "none", "compute": "model"}))
        register(Profile("offload", "none", "nothing"))
        register(Profile("compile", "none", "nothing"))

    @hookimpl
    def register_listeners(self, register: Callable[[ListenerFactory], None]) -> None:
        for factory in self.listeners:
            register(factory)


def fake_plugins(plugin: FakePlugin) -> Plugins:
    found = Plugins([])
    found.manager.register(plugin, "fake")
    return found


def write_lora(path: Path) -> None:
    """A LoRA of one module, as the fake trainer leaves it."""
    random = np.random.default_rng(0)
    module = LoraModule(
        "layers.0.attention.qkv",
        LowRank(down=random.normal(size=(2, 8)).astype(np.float32), up=random.normal(size=(24, 2)).astype(np.float32)),
        scale=0.5,
    )
    ComfyUI().write(LoraFile("ideogram4", {module.name: module}), path, "fp32", {})


def main() -> int:
    plugins = fake_plugins(FakePlugin(FakeBackend(), []))
    loraport.plugins.plugins = lambda: plugins  # type: ignore[assignment]
    from loraport.run import api, supervisor

    supervisor.GRACE = float(os.environ.get("LORAPORT_TEST_GRACE", "10"))
    try:
        if sys.argv[1] == "train":
            api.train(TrainSpec.load(sys.argv[2]), out=Path(sys.argv[3]), on_event=JsonLines(sys.stdout))
        else:
            api.resume(Path(sys.argv[2]), on_event=JsonLines(sys.stdout))
    except LoraPortError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.stdout = os.fdopen(sys.stdout.fileno(), "w", buffering=1)
    sys.exit(main())
