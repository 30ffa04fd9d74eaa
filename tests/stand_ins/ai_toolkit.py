"""Stands for ai-toolkit's run.py: its files, output, database and exit codes. STAND_IN says how it behaves."""

import array
import json
import os
import re
import sqlite3
import struct
import sys
import time

with open(sys.argv[1]) as file:
    job = json.load(file)["config"]
process, name = job["process"][0], job["name"]
folder = os.path.join(process["training_folder"], name)
os.makedirs(folder, exist_ok=True)
database = sqlite3.connect(process["sqlite_db_path"], isolation_level=None)
mode, steps, rank = os.environ["STAND_IN"], process["train"]["steps"], process["network"]["linear"]


def save(step, tail):
    module = "diffusion_model.layers.0.attention.o"
    header = {
        f"{module}.lora_A.weight": {"dtype": "F32", "shape": [rank, 2], "data_offsets": [0, 8 * rank]},
        f"{module}.lora_B.weight": {"dtype": "F32", "shape": [2, rank], "data_offsets": [8 * rank, 16 * rank]},
        "__metadata__": {"training_info": json.dumps({"step": step, "epoch": 0})},
    }
    text = json.dumps(header).encode()
    path = os.path.join(folder, name + tail + ".safetensors")
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + array.array("f", [0.5] * (4 * rank)).tobytes())
    print("Saved checkpoint to", path)
    time.sleep(0.02)
    print("Saved optimizer to", os.path.join(folder, "optimizer.pt"))


def asked(column):
    found = database.execute(f"SELECT {column} FROM Job WHERE id = ?", (os.environ["AITK_JOB_ID"],)).fetchone()
    return found[0] == 1


def step_done(step):
    database.execute("UPDATE Job SET step = ?, status = 'running', info = 'Training'", (str(step),))
    if asked("stop"):
        sys.exit(1)
    if asked("save_now"):
        database.execute("UPDATE Job SET save_now = '0'")
        save(step, f"_{step:09d}")
        if asked("stop"):
            sys.exit(1)


with open("backend/pid", "w") as file:
    file.write(str(os.getpid()))
if mode == "hang":
    print("Loading", flush=True)
    time.sleep(120)
if mode == "crash":
    raise SystemError("the card is on fire")
if mode == "environment":
    print("ENV", json.dumps(dict(os.environ)))
    print("WITH", json.dumps(process["sample"]["samples"]))
if mode == "no-file":
    sys.exit(0)
if mode == "gated":
    print("huggingface_hub.errors.GatedRepoError: 403 Client Error.", file=sys.stderr)
    sys.exit(1)
begin = max((int(found[1]) for path in os.listdir(folder) if (found := re.search(r"_(\d{9})\.", path))), default=0)
if begin:
    print(f"Found step {begin} in metadata, starting from there")
for step in range(begin + 1, steps + 1):
    if mode == "nan":
        print("loss is nan")
    loss = "0.000e+00" if mode == "nan" else f"{step}.000e+00"
    bar = f"{step - 1}/{steps} [00:00<00:00, 1.00it/s, lr: 1.0e-0{step % 9} loss: {loss}]"
    sys.stderr.write(f"\rx:  1%| | {bar}")
    step_done(step)
    time.sleep(0.05 if mode in ("slow", "nan") else 0)
    if mode == "crash-later" and step == 3:
        time.sleep(0.5)
        raise SystemError("the card is on fire")
save(steps, "")
