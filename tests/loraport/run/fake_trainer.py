"""A trainer for tests, standard library only: `fake_trainer.py MODE RUN_DIR STEPS SECONDS [resume]`."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

mode, run_dir, steps, seconds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
stop = False


def tell(kind: str, **fields: object) -> None:
    print("@loraport " + json.dumps({"type": kind, **fields}), flush=True)


def ask_to_stop(number: int, frame: object) -> None:
    global stop
    stop = True


def ignore_everything() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def note_pid(name: str) -> None:
    draft = run_dir / f"{name}.tmp"
    draft.write_text(str(os.getpid()))
    draft.rename(run_dir / f"{name}.pid")


def save(step: int) -> None:
    folder = run_dir / "checkpoints"
    folder.mkdir(exist_ok=True)
    (folder / f"step-{step}").write_text(str(step))
    tell("checkpoint", step=step, path=f"checkpoints/step-{step}")


def train(first: int) -> None:
    tell("phase", phase="train")
    for step in range(first + 1, steps + 1):
        time.sleep(seconds)
        tell("step", step=step, total=steps, loss=1.0 / step, seconds=seconds)
        if stop:
            save(step)
            print("stopped as asked", flush=True)
            sys.exit(130)
        if step % 2 == 0:
            save(step)
    time.sleep(seconds)
    shutil.copyfile(os.environ["FAKE_LORA"], run_dir / "trained.safetensors")


def hang() -> None:
    note_pid("trainer")
    tell("phase", phase="train")
    while True:
        time.sleep(60)


def grandchild(how: str) -> None:
    """Leave a process behind that ignores signals, in a session of its own when `how` says so."""
    if os.fork() == 0:
        if how == "setsid":
            os.setsid()
        if os.fork() == 0:  # its parent ends at once, so nothing ties it to the trainer any more
            ignore_everything()
            note_pid("grandchild")
            while True:
                time.sleep(60)
        os._exit(0)
    while not (run_dir / "grandchild.pid").exists():
        time.sleep(0.01)


if mode == "train":
    signal.signal(signal.SIGINT, ask_to_stop)
    note_pid("trainer")
    first = 0
    if "resume" in sys.argv and (run_dir / "checkpoints").exists():
        first = max(int(path.name.split("-")[1]) for path in (run_dir / "checkpoints").iterdir())
        tell("resumed", step=first)
    train(first)
elif mode == "stubborn":
    ignore_everything()
    hang()
elif mode in ("setsid", "orphan"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    grandchild(mode)
    hang()
elif mode == "leaves-orphan":
    grandchild("setsid")
    train(0)
elif mode == "crash":
    print("loading", flush=True)
    print("RuntimeError: the fake broke", file=sys.stderr, flush=True)
    sys.exit(3)
elif mode == "segfault":
    os.kill(os.getpid(), signal.SIGSEGV)
elif mode == "no-file":
    tell("phase", phase="train")
elif mode == "spam":
    sys.stdout.buffer.write(b"\xff" * 300_000 + b"\r 50%|#####     |\r100%|##########|\r\n")
    tell("warning", message="after the noise")
    sys.stdout.write("no newline at the end")
    sys.stdout.flush()
    train(0)
elif mode == "lies":
    tell("finished", step=1, lora="x", proof="y", worst_difference=0)
    tell("failed", message="not for you to say", exit_code=1)
    train(0)
elif mode == "environment":
    print("seen:", os.environ["PLANNED"], os.environ["PYTHONUNBUFFERED"], Path.cwd(), flush=True)
    print("generated:", Path("config/fake.json").read_text(), flush=True)
    print("stdin:", repr(sys.stdin.read()), flush=True)
    print("descriptors:", sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else "", flush=True)
    train(0)
elif mode == "exits-0-on-ctrl-c":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    hang()
elif mode == "closes-output":
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    time.sleep(0.5)
    shutil.copyfile(os.environ["FAKE_LORA"], run_dir / "trained.safetensors")
elif mode == "sigterm-saves":

    def saved(number: int, frame: object) -> None:
        (run_dir / "got-sigterm").write_text("")
        sys.exit(0)

    signal.signal(signal.SIGTERM, saved)
    hang()
