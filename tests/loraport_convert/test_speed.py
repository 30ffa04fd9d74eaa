"""What converting costs beside copying: memory always, and with LORAPORT_BENCH_FILE, time and memory at full size.

A copy is `shutil.copyfile`, as `cp` makes it, and once more with its fsync, which is what a converted file has had.
Both follow each other in every round with the input in the page cache, and each ratio is the median over the rounds.
Only ratios and differences are recorded: they say something about other machines too.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from loraport.lora.streaming import stream_tensors

HIDDEN, FFN = 4608, 12288
#: Ideogram 4's modules as (out, in), 34 times, and those of FLUX.1's two kinds of blocks, 19 and 38 times.
IDEOGRAM4 = {
    "attention.qkv": (3 * HIDDEN, HIDDEN),
    "attention.o": (HIDDEN, HIDDEN),
    "feed_forward.w1": (FFN, HIDDEN),
    "feed_forward.w2": (HIDDEN, FFN),
    "feed_forward.w3": (FFN, HIDDEN),
}
IDEOGRAM4_APART = {
    **{f"attention.to_{part}": (HIDDEN, HIDDEN) for part in "qkv"},
    "attention.to_out.0": (HIDDEN, HIDDEN),
    **{name: shape for name, shape in IDEOGRAM4.items() if "feed" in name},
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FLUX_DOUBLE = {
    **{f"attn.{name}": (3072, 3072) for name in ATTENTION},
    **{f"{ff}.net.0.proj": (12288, 3072) for ff in ("ff", "ff_context")},
    **{f"{ff}.net.2": (3072, 12288) for ff in ("ff", "ff_context")},
}
FLUX_SINGLE = {
    **{f"attn.to_{part}": (3072, 3072) for part in "qkv"},
    "proj_mlp": (12288, 3072),
    "proj_out": (3072, 15360),
}


def modules(layout, layers=None):
    """Module → (out, in) of a whole model, or of its first layers."""
    stacks = {
        "flux1": {"transformer_blocks": (19, FLUX_DOUBLE), "single_transformer_blocks": (38, FLUX_SINGLE)},
        "apart": {"layers": (34, IDEOGRAM4_APART)},
    }.get(layout, {"layers": (34, IDEOGRAM4)})
    return {
        f"{stack}.{number}.{name}": shape
        for stack, (count, each) in stacks.items()
        for number in range(layers or count)
        for name, shape in each.items()
    }


def lora(layout, rank, dtype=ml_dtypes.bfloat16, layers=None):
    """Tensors with the names that `layout` stands for: kohya's, PEFT's, or diffusers' with q, k and v apart."""
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32).astype(dtype)
    for number, (name, (out, columns)) in enumerate(modules(layout, layers).items()):
        own = noise[number:]  # no two modules share a factor
        key = f"lora_unet_{name.replace('.', '_')}" if layout == "kohya" else f"transformer.{name}"
        down, up = (".lora_down", ".lora_up") if layout == "kohya" else (".lora_A", ".lora_B")
        yield f"{key}{down}.weight", np.resize(own, (rank, columns))
        yield f"{key}{up}.weight", np.resize(own, (out, rank))
        if layout == "kohya":
            yield f"{key}.alpha", np.array(rank / 2, np.float32)


ROUNDS = int(os.environ.get("LORAPORT_BENCH_ROUNDS", "7"))

#: Small, because a process counts as its own what the one that started it had in memory.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
print(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, status, file=sys.stderr)
"""


def measured(*arguments):
    """(seconds, processor seconds, most memory in bytes) of a `loraport` command."""
    command = [sys.executable, "-m", "loraport.cli.main", *map(str, arguments)]
    done = subprocess.run([sys.executable, "-IS", "-c", LAUNCHER, *command], capture_output=True, text=True, check=True)
    wall, processor, memory, status = map(float, done.stderr.splitlines()[-1].split())
    assert status == 0, done.stderr
    return wall, processor, memory * (1 if sys.platform == "darwin" else 1024)


#: Has the host of a virtual machine back as much free memory as the next command needs. Many take back what is free for
#: two seconds, and the first to use it again would wait for the host, five times as long as copying takes.
BACKED = "import mmap, sys; mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | getattr(mmap, 'MAP_POPULATE', 0))"


def prepared(source):
    """The same state of the machine before each command: nothing waits for the disk, there is as much free memory as it
    takes, and the source is in the page cache."""
    os.sync()
    subprocess.run([sys.executable, "-IS", "-c", BACKED, str(source.stat().st_size + (3 << 29))], check=True)
    block = bytearray(1 << 20)
    with open(source, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def copied(source, target, synced):
    """(seconds, processor seconds) for a copy, which is then taken away."""
    prepared(source)
    start, processor = time.perf_counter(), time.process_time()
    shutil.copyfile(source, target)
    if synced:
        with open(target, "rb") as file:
            os.fsync(file.fileno())
    taken = time.perf_counter() - start, time.process_time() - processor
    target.unlink()
    return taken


def file_system(path):
    """What the folder of a file lies on, where `findmnt` is there to tell."""
    found = shutil.which("findmnt") and subprocess.run(["findmnt", "-no", "FSTYPE", "-T", path], capture_output=True)
    return found.stdout.decode().strip() if found else "unknown file system"


def median_ratio(some, others):
    return round(statistics.median(a / b for a, b in zip(some, others, strict=True)), 2)


@pytest.mark.parametrize("layout", ["kohya", "apart"])
def test_memory_does_not_grow_with_the_file(tmp_path, layout):
    most = []
    for layers in (16, 32):
        path = tmp_path / f"{layers}.safetensors"
        stream_tensors(path, lora(layout, 16, layers=layers), {})
        arguments = ("-o", tmp_path / f"{layers}.out.safetensors", "--assume-alpha", "rank")
        most.append(measured("convert", path, *arguments)[2])
    assert (tmp_path / "32.safetensors").stat().st_size > 75e6
    assert most[1] - most[0] < 6e6


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif("LORAPORT_BENCH_FILE" not in os.environ, reason="writes 2 GB files: set LORAPORT_BENCH_FILE")
@pytest.mark.parametrize(
    ("layout", "rank", "dtype"),
    [
        ("kohya", 384, "bfloat16"),
        ("peft", 384, "bfloat16"),
        ("peft", 384, "float16"),
        ("peft", 192, "float32"),
        ("apart", 344, "bfloat16"),
        ("apart", 344, "float16"),
        ("apart", 172, "float32"),
        ("flux1", 248, "bfloat16"),
    ],
)
def test_two_gigabytes_are_converted_in_little_memory_and_the_time_is_recorded(tmp_path, layout, rank, dtype):
    path, out, twin = (tmp_path / f"{name}.safetensors" for name in ("in", "out", "copy"))
    stream_tensors(path, lora(layout, rank, np.dtype(getattr(ml_dtypes, dtype, dtype))), {})
    base = measured("inspect", path)[2]
    arguments = ("convert", path, "-o", out, "--assume-alpha", "rank", "--overwrite")
    taken = {name: [] for name in ("copy", "synced copy", "convert", "copy of the output", "synced copy of the output")}
    for number in range(ROUNDS + 1):
        row = [copied(path, twin, False), copied(path, twin, True)]
        prepared(path)
        row += [measured(*arguments), copied(out, twin, False), copied(out, twin, True)]
        size = out.stat().st_size
        if number:  # the first is for warming up
            for name, each in zip(taken, row, strict=True):
                taken[name].append(each)
        out.unlink()  # freeing an old output is not converting
    wall = {name: [each[0] for each in several] for name, several in taken.items()}
    cpu, peaks = ([each[at] for each in taken["convert"]] for at in (1, 2))
    row = {
        "layout": {
            "kohya": "Ideogram 4, kohya's names",
            "peft": "Ideogram 4, PEFT's names",
            "apart": "Ideogram 4, diffusers' names, q k v apart",
            "flux1": "FLUX.1, diffusers' names, q k v apart",
        }[layout],
        "dtype": dtype,
        "command": "loraport convert in.safetensors -o out.safetensors --assume-alpha rank --overwrite",
        "gigabytes": round(path.stat().st_size / 1e9, 2),
        "output_gigabytes": round(size / 1e9, 2),
        "time_over_synced_copy": median_ratio(wall["convert"], wall["synced copy"]),
        "time_over_plain_copy": median_ratio(wall["convert"], wall["copy"]),
        "time_over_synced_copy_of_the_output": median_ratio(wall["convert"], wall["synced copy of the output"]),
        "time_over_plain_copy_of_the_output": median_ratio(wall["convert"], wall["copy of the output"]),
        # What else the machine did only ever adds.
        "best_over_best_synced": round(min(wall["convert"]) / min(wall["synced copy"]), 2),
        "best_over_best_plain": round(min(wall["convert"]) / min(wall["copy"]), 2),
        "processor_time_over_copying": median_ratio(cpu, [each for _, each in taken["copy"]]),
        "memory_above_base_mb": round((max(peaks) - base) / 1e6),
        "rounds": ROUNDS,
        "page_cache": "warm",
        "cores": os.cpu_count(),
        "machine": f"{platform.system()} {platform.release().split('-')[0]}, {platform.machine()}, {file_system(path)}",
        "versions": {"python": platform.python_version(), **{each: version(each) for each in ("numpy", "safetensors")}},
        "load": [round(each, 1) for each in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d"),
    }
    with Path(os.environ["LORAPORT_BENCH_FILE"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    assert row["memory_above_base_mb"] < 300
