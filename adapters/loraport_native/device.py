"""Which device a run uses, and in which dtype."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loraport.errors import SpecError
from loraport.gpu import FP8_CAPABILITY
from loraport.spec.models import TrainSpec
from loraport_native.attention import flash_3_is_there

#: Below it bf16 is emulated, without attention that works in little memory, and is not compiled (`compile_fx.py`).
_BF16_CAPABILITY = (8, 0)
#: The first torch whose compiler reads fp8 numbers on a card that cannot multiply them (pytorch#167082, #184008).
_FP8_COMPILES_ANYWHERE = "2.13"

#: fp16 is not among them: without loss scaling most of the gradient is below its smallest number.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def choose_device(spec: TrainSpec, rank: int = 0) -> torch.device:
    """`backend.options.device`, or the best there is: CUDA, then MPS, then the CPU; with `train.gpus` above 1, the CUDA
    device of that rank. SpecError when it is not there."""
    wanted = spec.backend.options.get("device", "auto")
    if spec.train.gpus == 1 or wanted == "cpu":
        return find_device(wanted, "backend.options.device")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted not in ("auto", "cuda"):
        raise SpecError(
            f"backend.options.device: {wanted!r} is one device, and train.gpus is {spec.train.gpus}.",
            hint="Set it to cuda, or leave it out; CUDA_VISIBLE_DEVICES chooses among the cards.",
        )
    if spec.train.gpus > cards:
        raise SpecError(
            f"train.gpus: {spec.train.gpus} are asked for, and torch can use {cards} CUDA GPUs on this machine.",
            hint=f"Set train.gpus: {max(1, cards)}; train.gradient_accumulation makes up for the others.",
        )
    return torch.device("cuda", rank)


def find_device(wanted: Any, asked_in: str) -> torch.device:
    """The device of that name; `auto` is the best there is. SpecError, naming `asked_in`, when it is not there."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cuda"] * bool(cards) + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    wanted = here[0] if wanted == "auto" else wanted
    here += [f"cuda:{number}" for number in range(cards)]
    if wanted not in here:
        raise SpecError(f"{asked_in}: {wanted!r} is not on this machine. Here: {', '.join(here)}.")
    return torch.device("cuda:0" if wanted == "cuda" else wanted)  # parts of torch.cuda want a number


def limit_memory(spec: TrainSpec, device: torch.device) -> None:
    """With `backend.options.memory_limit_gib`, fail rather than take more of the card, as a smaller one would.

    It bounds what torch reserves; CUDA's context (about half a GiB) comes to it. SpecError off CUDA.
    """
    limit = spec.backend.options.get("memory_limit_gib")
    if limit is None:
        return
    if device.type != "cuda":
        raise SpecError(f"backend.options.memory_limit_gib: only a CUDA card has a limit, and this run uses {device}.")
    share = limit * 2**30 / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)


def free_memory_bytes(device: torch.device) -> int:
    """Bytes of a CUDA card that this process can still take, its limit counted, with what torch holds unused."""
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free + torch.cuda.memory_reserved(device) - used, limit - used)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory since `restart_peak`, GiB: allocated on a CUDA device; of now on MPS; else the most that was ever
    resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_reserved_gib(device: torch.device) -> float | None:
    """Most memory so far that torch's allocator held of a CUDA card, GiB; None elsewhere."""
    return torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else None


def read_later(values: Tensor) -> Callable[[], list[float]]:
    """Begin to copy a vector to the host; the function returned waits for the copy, and for nothing queued since."""
    if values.device.type != "cuda":
        return values.tolist
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return list(copy.tolist())

    return read


def restart_peak(device: torch.device) -> None:
    """Count the peak from here, where it can be counted anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def check_device(spec: TrainSpec, device: torch.device) -> None:
    """Raise SpecError for settings that this device cannot do, and BackendError for a package that does not load."""
    if device.type == "mps" and spec.memory.storage != "none":
        raise SpecError(f"memory.storage: {spec.memory.storage} needs CUDA or a CPU; on MPS use none.")
    _check_card(spec, device)
    if device.type == "cuda":
        flash_3_is_there(device.index)
    known = compilers(device.type)
    if spec.memory.compile != "none" and not any(map(shutil.which, known)):
        raise SpecError(
            f"memory.compile: {spec.memory.compile} needs a compiler, {' or '.join(known)}, and none is installed.",
            hint="Install one, or set memory.compile: none.",
        )


def _check_card(spec: TrainSpec, device: torch.device) -> None:
    """Refuse what this device has no hardware for. A CPU that was asked for by name imitates it, to try things out."""
    memory = spec.memory
    if device.type != "cuda":
        if spec.backend.options.get("device") == "cpu":
            return
        for path, value, without in (
            ("memory.offload", memory.offload, "none"),
            ("memory.compute", memory.compute, "model"),
        ):
            if value != without:
                raise SpecError(
                    f"{path}: {value} needs a CUDA card, and this run would use the {device.type.upper()}.",
                    hint=f"Set {path}: {without}, or backend.options.device: cpu to try it without its speed.",
                )
        return
    capability = torch.cuda.get_device_capability(device)
    has = f"; {torch.cuda.get_device_name(device)} has {_dotted(capability)}."
    if spec.model.dtype == "bf16" and capability < _BF16_CAPABILITY:
        raise SpecError(
            f"model.dtype: bf16 needs a card of compute capability {_dotted(_BF16_CAPABILITY)} or more{has}",
            hint="Set model.dtype: fp32.",
        )
    if capability >= FP8_CAPABILITY:
        return
    hint = "Set memory.quantize: int8, which takes the same memory; memory.profile: auto does so by itself."
    needs = f"needs a card of compute capability {_dotted(FP8_CAPABILITY)} or more"
    if memory.compute == "fp8":
        raise SpecError(f"memory.compute: fp8 {needs}{has}", hint=hint)
    if memory.storage == "fp8" and memory.compile != "none" and torch.__version__ < _FP8_COMPILES_ANYWHERE:
        raise SpecError(
            f"memory.storage: fp8 with memory.compile: {memory.compile} {needs}, or torch "
            f"{_FP8_COMPILES_ANYWHERE}{has}",
            hint="Set memory.quantize: int8, which takes the same memory.",
        )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def make_deterministic(spec: TrainSpec) -> None:
    """With `backend.options.deterministic`, have CUDA compute the same bits every time, as a CPU does anyway.

    It is not the default because attention's backward pass then takes much longer (docs/native.md). cuBLAS also needs
    CUBLAS_WORKSPACE_CONFIG set before it starts, which the plan's environment does.
    """
    if spec.backend.options.get("deterministic", False):
        torch.use_deterministic_algorithms(True)
        # Its other effect, filling fresh memory to expose reads of it, costs time and serves debugging.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def compilers(kind: str) -> list[str]:
    """Where torch.compile and Triton look, by the type of the device: Triton's launchers are C on CUDA; elsewhere the
    kernels themselves are C++."""
    if kind == "cuda":
        return [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
