"""The supervised process: `python -m loraport_diffsynth.launch RUN_DIR` prepares what DiffSynth reads and runs it.

DiffSynth runs in its own interpreter and its own process group; its output is ours. SIGINT or SIGTERM once: it is asked
to save and stop, and this exits with 130; twice: its group is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from loraport.envs import find_interpreter, home
from loraport.errors import Interrupted, LoraPortError, RunFolderError, SpecError
from loraport.files import write_atomic
from loraport.hub_datasets import on_disk
from loraport.run.errors_line import encode_error
from loraport.run.events import Event, PhaseStarted, Progress, Resumed, Warn, encode
from loraport.spec.models import TrainSpec
from loraport_diffsynth import prepare
from loraport_diffsynth.collect import whole_saves
from loraport_diffsynth.recipe import NAME
from loraport_diffsynth.translate import CACHE, CHECKPOINT, DATASET, JOB, ORDER, OUTPUT, is_local

ENTRY = Path(__file__).with_name("entry.py")

#: What other programs leave in the environment that would change how DiffSynth, accelerate or Python start.
STRAY = ("ACCELERATE_", "FSDP_", "DEEPSPEED_", "DIFFSYNTH_SKIP_", "DIFFSYNTH_DOWNLOAD_", "MASTER_", "PYTHONHOME")
STRAY_NAMES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ENV", "CONFIG_PATH", "PYTHONPATH"}


class Trainer:
    """The process of the phase that runs now, if any, and requests to stop it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.stops = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.stops += 1
        if self._process is None:
            raise KeyboardInterrupt
        self._signal(signal.SIGINT if self.stops == 1 else signal.SIGKILL)

    def run(self, command: list[str], environment: dict[str, str], folder: Path) -> int:
        """Run one phase to its end; its exit code, 128 + n when signal n ended it."""
        self._process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
        try:
            code = self._process.wait()
            self._signal(signal.SIGKILL)  # whoever is left of its group
        finally:
            self._process = None
        return 128 - code if code < 0 else code

    def _signal(self, number: int) -> None:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            return  # nobody is left


def main() -> int:
    run_dir = Path(sys.argv[1])
    trainer = Trainer()
    signal.signal(signal.SIGINT, trainer.handle)
    signal.signal(signal.SIGTERM, trainer.handle)
    try:
        code = run(run_dir, trainer)
    except LoraPortError as error:
        print(encode_error(error), flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        code = Interrupted.exit_code
    except OSError as error:
        failure = RunFolderError(f"{error.filename or run_dir}: {error.strerror or error}.")
        print(encode_error(failure), flush=True)
        return failure.exit_code
    return Interrupted.exit_code if trainer.stops and code else code


def tell(event: Event) -> None:
    print(encode(event), flush=True)


def run(run_dir: Path, trainer: Trainer) -> int:
    """Run what is left of a job. Raises LoraPortError for what is wrong before DiffSynth starts."""
    job = json.loads((run_dir / JOB).read_text(encoding="utf-8"))
    spec = on_disk(TrainSpec.model_validate(job["spec"]), run_dir)
    backend = run_dir / "backend"
    python = find_interpreter(NAME, spec.backend.python)
    script = job["entry"]["script"]
    if script and not Path(script).is_file():
        raise SpecError(f"backend.options.script: {script} is not there.")

    for draft in (backend / OUTPUT).glob(".step-*"):  # of a session that was killed while it saved
        draft.unlink()
    saves = whole_saves(run_dir)
    start = max(saves, default=0)
    if start >= spec.train.steps:
        return 0
    if start:
        tell(Resumed(step=start))
        tell(Warn(message="DiffSynth saves weights only: the optimizer and the order of the images begin anew."))

    tell(PhaseStarted(phase="cache", detail="images at their final size"))
    if is_local(spec):
        stored = prepare.lay_out_checkpoint(spec.model.checkpoint, backend)
        if stored:
            prepare.refuse_other_storage(stored, job["phases"][-1]["arguments"])
    pictures = prepare.write_pictures(
        spec, backend / DATASET, lambda done, total: tell(Progress(done=done, total=total))
    )
    images_a_step = int(value_of(job["phases"][-1]["arguments"], "--gradient_accumulation_steps"))
    drawn = prepare.draw(pictures, (spec.train.steps - start) * images_a_step, spec.train.seed + start)

    settings = {**job["entry"], "start": start, "checkpoint": CHECKPOINT if is_local(spec) else None}
    write_json(backend / "entry.json", settings)
    environment = child_environment(job["environment"])
    for phase in job["phases"]:
        arguments = list(phase["arguments"])
        marker = backend / CACHE / "done.json"
        if phase["task"] == "sft:data_process":
            prepare.write_encoding_rows(pictures, backend / DATASET / "encode.jsonl")
            made_from = fingerprint(arguments, backend / DATASET / "encode.jsonl")
            if marker.is_file() and json.loads(marker.read_text()) == made_from:
                continue
            marker.unlink(missing_ok=True)
        else:
            if phase["task"] == "sft:train":
                prepare.link_order(pictures, drawn, (backend / CACHE / "0").absolute(), backend / ORDER)
            else:
                prepare.write_rows(pictures, drawn, backend / DATASET / "metadata.jsonl")
            if start:
                arguments += ["--lora_checkpoint", f"{OUTPUT}/{saves[start].name}"]
        code = trainer.run([str(python), str(ENTRY), "entry.json", *arguments], environment, backend)
        if code:
            return code
        if phase["task"] == "sft:data_process":
            write_json(marker, made_from)
    for encoded in (CACHE, ORDER):  # half a gigabyte an image, of no use any more
        shutil.rmtree(backend / encoded, ignore_errors=True)
    return 0


def child_environment(given: dict[str, str]) -> dict[str, str]:
    """Ours without what would leak into DiffSynth, then the plan's. Downloads go where every run finds them."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(STRAY) and name not in STRAY_NAMES}
    return {"DIFFSYNTH_MODEL_BASE_PATH": str(home() / "models" / NAME), **kept, **given}


def value_of(arguments: list[str], option: str) -> str:
    """The value an option ends up with: argparse takes the last."""
    return arguments[len(arguments) - 1 - arguments[::-1].index(option) + 1]


def fingerprint(arguments: list[str], rows: Path) -> dict[str, Any]:
    """What the encoded images depend on. The names of the image files tell their content."""
    return {"arguments": arguments, "rows": hashlib.sha256(rows.read_bytes()).hexdigest()}


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
