"""What converting costs beside copying: memory always, and with LORAPORT_BENCH_FILE, time and memory at full size.

Only ratios and differences are recorded: they say something about other machines too.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
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


ROUNDS = int(os.environ.get("LORAPORT_BENCH_ROUNDS", "5"))

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


def copied(source, target):
    """(seconds, processor seconds) for a copy that is as safe on the disk as a converted file."""
    start, processor = time.perf_counter(), time.process_time()
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start, time.process_time() - processor


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
    copies, conversions, larger = [], [], []
    for _ in range(ROUNDS):
        copies.append(copied(path, twin))
        twin.unlink()
        conversions.append(measured("convert", path, "-o", out, "--assume-alpha", "rank", "--overwrite"))
        larger.append(copied(out, twin))
        twin.unlink()
        if len(larger) < ROUNDS:
            out.unlink()  # freeing an old output is not converting
    wall, cpu, peaks = zip(*conversions, strict=True)
    row = {
        "layout": {
            "kohya": "Ideogram 4, kohya's names",
            "peft": "Ideogram 4, PEFT's names",
            "apart": "Ideogram 4, diffusers' names, q k v apart",
            "flux1": "FLUX.1, diffusers' names, q k v apart",
        }[layout],
        "dtype": dtype,
        "gigabytes": round(path.stat().st_size / 1e9, 2),
        "output_gigabytes": round(out.stat().st_size / 1e9, 2),
        # The best of each: what else the machine did only ever adds.
        "time_over_copying": round(min(wall) / min(copies)[0], 2),
        "time_over_copying_the_output": round(min(wall) / min(larger)[0], 2),
        "median_over_median": round(statistics.median(wall) / statistics.median(each for each, _ in copies), 2),
        "processor_time_over_copying": round(min(cpu) / min(each for _, each in copies), 2),
        "memory_above_base_mb": round((max(peaks) - base) / 1e6),
        "rounds": len(copies),
        "cores": os.cpu_count(),
        "load": [round(each, 1) for each in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d"),
    }
    with Path(os.environ["LORAPORT_BENCH_FILE"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    assert row["memory_above_base_mb"] < 300
