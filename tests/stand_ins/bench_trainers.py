"""Backends for the tests of `loraport bench`, each with its own way to behave. They train nothing, and need no torch.

swift, steady: as they should be. greedy: runs out of memory. broken: crashes. endless: never ends, and leaves a child.
lazy: tells one step too few. wide: trains another module too. inexact: approximates the batch size. setless: takes no
sets of images. absent: not ready.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from loraport.hookspecs import hookimpl

NAMES = ("swift", "steady", "greedy", "broken", "endless", "lazy", "wide", "inexact", "setless", "absent")


class StandIn:
    version, description = "1.0", "stands in for a trainer"

    def __init__(self, name):
        self.name = name

    def readiness(self, python=None):
        from loraport.backend import Readiness

        return Readiness(self.name != "absent", "is not installed: pip install absent")

    def translate(self, spec, context):
        from loraport.planning import Translation, VerdictTable
        from loraport.spec.models import leaf_fields, set_fields

        table = VerdictTable(spec)
        paths = set(leaf_fields()) - {"train.batch_size", "train.max_grad_norm", "train.warmup_steps", "memory.compute"}
        if self.name == "setless" and spec.dataset.sets:
            paths.remove("dataset.sets")
            table.refused("dataset.sets", reason="one folder only")
        else:
            paths.update(set_fields(spec))
        table.exact(*paths, reason="as written")
        exact = self.name != "inexact"
        (table.exact if exact else table.approximated)("train.batch_size", reason="in parts")
        if self.name == "steady" and spec.train.max_grad_norm:
            table.ignored("train.max_grad_norm", reason="it does not clip")
        else:
            table.exact("train.max_grad_norm", reason="as written")
        (table.defaulted if self.name == "steady" else table.exact)("train.warmup_steps", reason="always 5")
        table.choose("memory.compute", ["model"], "as written", "set memory.compute: model")
        command = [sys.executable, __file__, self.name, str(context.run_dir)]
        return Translation(table.finish(), {"backend/settings.txt": f"steps {spec.train.steps}\n"}, command)

    def read_line(self, line):
        from loraport.run.events import decode_line

        event = decode_line(line)
        return event and [event]

    def explain_failure(self, exit_code, log_tail):
        from loraport.errors import BackendError
        from loraport.run.errors_line import find_error

        return find_error(log_tail) or BackendError(f"The stand-in broke: {log_tail.strip()[-300:]}")

    def collect(self, spec, run_dir):
        return run_dir / "last.safetensors"

    def score_command(self, job):
        return [sys.executable, __file__, "score", str(job)]


@hookimpl
def register_backends(register):
    for name in NAMES:
        register(StandIn(name))


def train(name, run_dir):
    import numpy as np

    from loraport.errors import OutOfMemoryError
    from loraport.lora.storage import write_tensors
    from loraport.run import events
    from loraport.run.errors_line import encode_error
    from loraport.spec.models import TrainSpec

    def tell(event):
        print(events.encode(event), flush=True)

    spec = TrainSpec.load(run_dir / "spec.yaml")
    print("cards", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    tell(events.PhaseStarted(phase="load"))
    if name == "greedy":
        print(encode_error(OutOfMemoryError("The stand-in ran out of memory.")), flush=True)
        sys.exit(6)
    held = np.ones(40_000_000 // 8) if name == "steady" else None  # 40 MB, to be seen from outside
    if name == "endless":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        (run_dir.parent / "child.pid").write_text(str(child.pid))
        time.sleep(300)
    tell(events.PhaseStarted(phase="cache"))
    (run_dir / "cached.bin").write_bytes(b"0" * 100_000)
    time.sleep(0.6)  # long enough for the size on disk to be looked at
    steps, images = spec.train.steps, spec.train.batch_size * spec.train.gradient_accumulation
    tell(events.PhaseStarted(phase="train"))
    began = time.time()
    for step in range(1, steps + 1 - (name == "lazy")):
        time.sleep(0.01)
        if name == "broken" and step == 3:
            raise SystemExit("the card is on fire")
        now = time.time()
        pace = {"seconds": now - began, "images_per_second": images / (now - began)}
        tell(events.Step(step=step, total=steps, loss=1 / step, time=now, **pace))
        if spec.save.every and step % spec.save.every == 0:
            write(run_dir / f"step-{step}.safetensors", name, spec, step, write_tensors)
            tell(events.Checkpoint(step=step, path=f"step-{step}.safetensors"))
        began = time.time()
    write(run_dir / "last.safetensors", name, spec, steps, write_tensors)
    del held


def write(path, name, spec, step, write_tensors):
    """In the native trainer's form. The factors hold the step, which is what the score is made of."""
    import json

    import numpy as np

    modules = ["layers.0.attention.o", *(["layers.1.attention.o"] if name == "wide" else [])]
    factors = {"lora_A": (spec.lora.rank, 8), "lora_B": (8, spec.lora.rank)}
    tensors = {
        f"{module}.{factor}": np.full(shape, step, "f4") for module in modules for factor, shape in factors.items()
    }
    scales = json.dumps(dict.fromkeys(modules, spec.lora.effective_alpha / spec.lora.rank))
    write_tensors(path, tensors, {"loraport.format": "loraport-native-1", "loraport.scales": scales})


def score(job):
    """1 − step/1000 for each of two images, by the step in the file."""
    from loraport.lora.storage import read_tensors
    from loraport.scoring import Score, read_job

    spec, loras = read_job(job)
    images = len(list(Path(spec.validation.path).glob("*.png")))
    print(Score(None, [1.0] * images).encode())
    for path in loras:
        tensors = read_tensors(path)
        step = next(float(tensors[key].ravel()[0]) for key in tensors if not key.endswith(".alpha"))
        print(Score(str(path), [1 - step / 1000] * images).encode())


if __name__ == "__main__":
    mode, place = sys.argv[1:]
    score(Path(place)) if mode == "score" else train(mode, Path(place))
