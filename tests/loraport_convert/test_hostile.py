"""No file crashes the converter, hangs it, or leaves half an output. LORAPORT_FUZZ_INPUTS says how many are tried, and
with LORAPORT_BENCH_FILE a row of what became of them is recorded."""

import contextlib
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from loraport.errors import DataError, LoraPortError
from loraport.lora import storage
from loraport.lora.proof import prove
from loraport.lora.storage import read_tensors
from loraport.plugins import plugins
from loraport_convert.inspection import inspect
from loraport_convert.publishing import PROOF_KEY, Target, publish
from loraport_convert.reading import Scale, read_lora

from .hostile import FAULTS, file_of

INPUTS = int(os.environ.get("LORAPORT_FUZZ_INPUTS", "150"))
SECONDS = 10  # for one file; a whole one takes milliseconds


@pytest.fixture(scope="module")
def folder():
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def dialects():
    return plugins().dialects()


@pytest.fixture(scope="module")
def outcome():
    counts = {"inputs": 0, "refused": 0, "converted": 0}
    start = time.perf_counter()
    yield counts
    if path := os.environ.get("LORAPORT_BENCH_FILE"):
        with open(path, "a", encoding="utf-8") as file:
            row = {"what": "hostile files", **counts, "minutes": round((time.perf_counter() - start) / 60, 1)}
            file.write(json.dumps(row) + "\n")


@pytest.fixture(autouse=True)
def no_hang():
    def stop(signum, frame):
        raise AssertionError(f"one file took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.timeout(0)  # each file has its own limit
@given(
    st.integers(0, 2**32),
    st.sets(st.sampled_from(FAULTS), max_size=3),
    st.sampled_from([None, "bf16", "fp16"]),
    st.sampled_from([None, None, None, "kohya", "diffusers", "peft", "ai-toolkit"]),
    st.booleans(),
)
@settings(
    max_examples=INPUTS,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_a_file_is_converted_whole_or_refused_with_a_reason(
    folder, dialects, outcome, monkeypatch, seed, faults, dtype, to, by_rows
):
    source, out = folder / "in.safetensors", folder / "out.safetensors"
    source.write_bytes(file_of(seed, faults))
    monkeypatch.setattr(
        storage, "_LARGE", 0 if by_rows else 1 << 16
    )  # as tensors of real size are read, or all at once
    signal.alarm(SECONDS)
    outcome["inputs"] += 1
    with contextlib.suppress(DataError):
        json.dumps(inspect(source, dialects).to_json(), allow_nan=False)
    failure = None
    try:
        lora = read_lora(source, dialects, Scale(None)).lora
        published = publish(lora, Target(out, dialects[to or "comfyui"], dtype), [source])
    except LoraPortError as error:
        failure = error
    finally:
        signal.alarm(0)
    if failure is not None:
        outcome["refused"] += 1
        assert isinstance(failure, DataError)
        assert str(failure)
        assert {each.name for each in folder.iterdir()} == {source.name}
    else:
        outcome["converted"] += 1
        assert published.proof.ok
        assert json.loads(read_tensors(out).metadata[PROOF_KEY])["exact"]
        if to is None:
            assert prove(lora, dialects["comfyui"].read(out)).ok
        for each in folder.iterdir():
            if each != source:
                each.unlink()
