"""Stands for SimpleTuner's train.py: its files, output, signals and exit codes. STAND_IN says how it behaves."""

import array
import json
import os
import signal
import struct
import sys
import time
from pathlib import Path

mode = os.environ["STAND_IN"]
out = Path("output")
out.mkdir(exist_ok=True)
config = json.loads(Path("config/config.json").read_text())
total = config["max_train_steps"]
asked = Path(os.environ["SIMPLETUNER_ACCELERATE_SIGNAL_FILE"])
STRAY = (
    "ENV",
    "CONFIG_PATH",
    "CONFIG_BACKEND",
    "HF_HUB_OFFLINE",
    "ACCELERATE_MIXED_PRECISION",
    "PYTHONPATH",
)


def log(step, **metrics):
    with open(out / "training_metrics.jsonl", "a") as file:
        for more in ({"learning_rate": 1e-4, "seconds_per_step": 0.5} | metrics, {"system/cpu": 1.0}):
            file.write(json.dumps({"step": step, "metrics": more}) + "\n")


def write_lora(path):
    name, rank = "transformer.layers.0.attention.o", config["lora_rank"]
    header = {
        f"{name}.lora_A.weight": {"dtype": "F32", "shape": [rank, 2], "data_offsets": [0, 8 * rank]},
        f"{name}.lora_B.weight": {"dtype": "F32", "shape": [2, rank], "data_offsets": [8 * rank, 16 * rank]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + array.array("f", [0.5] * (4 * rank)).tobytes())


def checkpoint(step):
    folder = out / f"checkpoint-{step}"
    folder.mkdir(exist_ok=True)
    write_lora(folder / "pytorch_lora_weights.safetensors")
    (folder / ".guard").write_text("complete")


def finish(step):
    write_lora(out / "pytorch_lora_weights.safetensors")
    (out / "training_metrics.json").write_text(json.dumps({"status": "completed", "last_step": step}))


print(json.dumps({name: os.environ.get(name) for name in STRAY}), os.getpgid(0) == os.getpid(), flush=True)
print("Configuring text embed backend: text", flush=True)
Path("pid").write_text(str(os.getpid()))
if mode == "hang":
    time.sleep(120)
if mode == "crash":
    raise SystemError("the card is on fire")
if mode == "empty":
    sys.exit(0)
if mode == "zero":
    print("ValueError: Dataset configuration will produce zero usable batches.", flush=True)
    sys.exit(0)
if mode == "oom":
    print("Traceback (most recent call last):\ntorch.OutOfMemoryError: CUDA out of memory. Tried", flush=True)
    sys.exit(1)
if mode == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if mode == "stop":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))  # as SimpleTuner: it ends well, with nothing saved
begin = 0
if config["resume_from_checkpoint"] == "latest":
    begin = max((int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*")), default=0)
for step in range(begin + 1, total + 1):
    bar = f"{step}/{total} [00:01<00:03, 1.0it/s, lr=1e-4, step_loss=0.5]"
    print(f"\rEpoch 1/1, Steps:  25%|#### | {bar}", end="", flush=True)
    if mode != "bar":
        log(step, **({} if mode == "nan" and step == 2 else {"train_loss": 0.5}))
    time.sleep(0.05)
    if mode == "crash-later" and step == 2:
        checkpoint(step)
        time.sleep(0.3)
        raise SystemError("the card is on fire")
    if mode in ("stop", "deaf") and step == 2:
        time.sleep(0.4)
        os.kill(os.getppid(), signal.SIGINT)
        if mode == "deaf":
            time.sleep(0.6)
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(60)
        for _ in range(100):
            time.sleep(0.05)
            if json.loads(asked.read_text()).get("manual_checkpoint"):
                checkpoint(step)
                time.sleep(60)
checkpoint(total)
finish(total)
