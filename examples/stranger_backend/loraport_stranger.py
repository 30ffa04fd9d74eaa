"""A whole backend for LoraPort in one file: the plugin, and the trainer that it starts as a process of its own.

The trainer is a toy: it looks at no images, and fits a LoRA to random matrices. All around that is as it should be.
"""

import signal
import sys
from pathlib import Path

from loraport.errors import BackendError
from loraport.hookspecs import hookimpl  # the rest is imported where it is used, so that `loraport` starts at once

SHAPES = {"layers.0.attention.qkv": (96, 32), "layers.0.attention.o": (32, 32)}  # (out, in) of what is trained
EXACT = ["version", "name", "lora.rank", "lora.alpha", "train.steps", "train.learning_rate", "train.seed"]
EXACT += ["save.every", "save.dtype", "backend.name", "backend.python"]


class Stranger:
    name, version, description = "stranger", "1.0", "A toy: fits a LoRA to random matrices with numpy"

    def readiness(self, python=None):
        from loraport.backend import Readiness

        return Readiness(True, "needs nothing but numpy")

    def translate(self, spec, context):
        from loraport.planning import Translation, VerdictTable
        from loraport.spec.models import leaf_fields

        table = VerdictTable(spec)
        table.exact(*EXACT, reason="read from the spec")
        table.choose("model.family", ["ideogram4"], "under its official module names", "choose another backend")
        table.choose("lora.type", ["lora"], "plain low-rank factors", "set lora.type: lora")
        table.defaulted("lora.targets", reason="always the attention of layer 0")
        others = set(leaf_fields()) - {*EXACT, "model.family", "lora.type", "lora.targets"}
        table.ignored(*others, reason="a toy knows nothing of it")
        python = str(spec.backend.python or sys.executable)
        return Translation(table.finish(), {}, [python, __file__, str(context.run_dir)])

    def read_line(self, line):
        from loraport.run.events import decode_line

        event = decode_line(line)  # this trainer prints LoraPort's own events; another one's lines are parsed here
        return event and [event]

    def explain_failure(self, exit_code, log_tail):
        return BackendError(f"The toy broke with exit code {exit_code}: {log_tail.strip()[-500:]}")

    def collect(self, spec, run_dir):
        path = run_dir / "checkpoints" / f"step-{spec.train.steps:08}.safetensors"
        if not path.is_file():
            raise BackendError(f"The toy ended without {path}.")
        return path


class StrangerDialect:
    """`<module>/up` (out, r) and `<module>/down` (r, in); the scale is in the header under `stranger.scale`."""

    name = "stranger"

    def detect(self, keys, shapes, metadata):
        return float("stranger.scale" in metadata)

    def read(self, path):
        from loraport.lora.canonical import LoraFile, LoraModule, LowRank
        from loraport.lora.storage import read_tensors

        file = read_tensors(path)
        factors = {name: LowRank(down=file[f"{name}/down"], up=file[f"{name}/up"]) for name in SHAPES}
        scale = float(file.metadata["stranger.scale"])
        return LoraFile("ideogram4", {name: LoraModule(name, pair, scale) for name, pair in factors.items()})


@hookimpl
def register_backends(register):
    register(Stranger())


@hookimpl
def register_dialects(register):
    register(StrangerDialect())


def train(run_dir):
    """The trainer: from its newest checkpoint, or from zero, to the last step or until it is asked to stop."""
    import numpy as np

    from loraport.lora.storage import read_tensors, write_tensors
    from loraport.run import events
    from loraport.spec.models import TrainSpec

    spec, stop, first = TrainSpec.load(run_dir / "spec.yaml"), [], 0
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    rank, rate, scale = spec.lora.rank, spec.train.learning_rate, spec.lora.effective_alpha / spec.lora.rank
    random = np.random.default_rng(spec.train.seed)
    goals = {name: random.normal(size=shape).astype("f4") for name, shape in SHAPES.items()}
    weights = {f"{name}/down": random.normal(size=(rank, shape[1])).astype("f4") / 8 for name, shape in SHAPES.items()}
    weights |= {f"{name}/up": np.zeros((shape[0], rank), "f4") for name, shape in SHAPES.items()}
    (folder := run_dir / "checkpoints").mkdir(exist_ok=True)
    for newest in sorted(folder.glob("step-*.safetensors"))[-1:]:
        weights, first = dict(read_tensors(newest)), int(newest.stem[5:])
        print(events.encode(events.Resumed(step=first)), flush=True)
    for step in range(first + 1, spec.train.steps + 1):
        for name, goal in goals.items():
            up, down = weights[f"{name}/up"], weights[f"{name}/down"]
            slope = rate * scale * (scale * up @ down - goal)
            weights |= {f"{name}/up": up - slope @ down.T, f"{name}/down": down - up.T @ slope}
        loss = np.mean([((scale * weights[f"{n}/up"] @ weights[f"{n}/down"] - goals[n]) ** 2).mean() for n in SHAPES])
        print(events.encode(events.Step(step=step, total=spec.train.steps, loss=loss, lr=rate)), flush=True)
        if stop or step == spec.train.steps or (spec.save.every and step % spec.save.every == 0):
            path = folder / f"step-{step:08}.safetensors"
            write_tensors(path, weights, {"stranger.scale": repr(scale)})  # in one step: whole, or not there
            print(events.encode(events.Checkpoint(step=step, path=f"checkpoints/{path.name}")), flush=True)
        if stop and step < spec.train.steps:
            sys.exit(130)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
