"""The trainer's process: `python -m loraport_native.train RUN_DIR` trains the spec in that folder.

With `train.gpus` above 1 it starts itself once for each GPU (see `ranks.py`), with a place as two more arguments.

Events go to standard output (see `loraport.run.events`). SIGINT or SIGTERM once: write a checkpoint and exit with 130.
A failure is told as one line of `loraport.run.errors_line`, and its exit code.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from loraport.errors import Interrupted, LoraPortError, OutOfMemoryError, RunFolderError
from loraport.run.errors_line import encode_error
from loraport.run.events import Event, PhaseStarted, encode
from loraport.spec.models import TrainSpec
from loraport_native.ranks import Place, end_as_rank, run_ranks

if TYPE_CHECKING:
    from loraport_native.distributed import Group
    from loraport_native.trainer import Trainer

#: Libraries whose first words are about parts of theirs that are not used here, or about what holds here.
_CHATTY = (
    "bitsandbytes",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "torch._higher_order_ops.wrap",  # that a recomputed block must change nothing in place, which the compiler sees to
    "torch.utils._pytree",
    "torchao",
)

#: How torch says that memory ran out; its class for that is for CUDA's own allocator alone.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def main() -> int:
    run_dir, *place = sys.argv[1:]
    signal.signal(signal.SIGINT, _stop_before_training)
    signal.signal(signal.SIGTERM, _stop_before_training)
    # Libraries must not phone home or write beside the run; a hub id still downloads.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return run(Path(run_dir), Place.read(place) if place else None)
    except LoraPortError as error:
        print(encode_error(error), flush=True)
        return error.exit_code


def _stop_before_training(number: int, frame: FrameType | None) -> None:
    """End at once. An exception raised in the middle of a library's import may be lost, or end the process by itself;
    and there is nothing to save yet: what is in the cache was put there whole.
    """
    os.write(sys.stdout.fileno(), f"{encode_error(Interrupted('Stopped before training began.'))}\n".encode())
    os._exit(Interrupted.exit_code)


def emit(event: Event) -> None:
    print(encode(event), flush=True)


def run(run_dir: Path, place: Place | None) -> int:
    """Train the run in `run_dir` to its end, here or in processes of its own; their exit code. Raises LoraPortError for
    everything a user can act on."""
    spec = TrainSpec.load(run_dir / "spec.yaml")
    if place is None:
        emit(PhaseStarted(phase="load", detail="libraries"))
        if spec.train.gpus > 1:
            return run_ranks(run_dir, spec.train.gpus)
    try:
        _train(spec, run_dir, place)
    except MemoryError as error:
        raise _out_of_memory(spec, error) from error
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if any(words in str(error) for words in _OUT_OF_MEMORY):
            raise _out_of_memory(spec, error) from error
        raise
    except OSError as error:
        raise RunFolderError(f"{error.filename or run_dir}: {error.strerror or error}.") from error
    return 0


def _train(spec: TrainSpec, run_dir: Path, place: Place | None) -> None:
    from loraport_native.device import choose_device
    from loraport_native.distributed import ALONE, join
    from loraport_native.trainer import Stopped

    group = ALONE if place is None else join(place, spec.train.gpus, choose_device(spec, place.rank))
    trainer = make_trainer(spec, run_dir, emit if group.leads else lambda event: None, group)

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        trainer.stop_requested = True

    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)
    try:
        trainer.fit()
    except Stopped as error:
        group.leave()
        raise Interrupted(f"Stopped after step {trainer.step} of {spec.train.steps}.") from error
    group.leave()


def make_trainer(spec: TrainSpec, run_dir: Path, emit: Callable[[Event], None], group: Group | None = None) -> Trainer:
    """Everything up to the first step: the data prepared, the model loaded, the adapter in it."""
    import torch

    from loraport.hub_datasets import on_disk
    from loraport.plugins import plugins
    from loraport_native.compile import compile_model
    from loraport_native.data import prepare
    from loraport_native.device import DTYPES, check_device, choose_device, limit_memory, make_deterministic
    from loraport_native.distributed import ALONE
    from loraport_native.lora import inject
    from loraport_native.models.checkpoint import find_checkpoint
    from loraport_native.placement import load_placed, set_passes
    from loraport_native.sample import Sampler, check_sampling, is_guided
    from loraport_native.trainer import Trainer, derived_seed

    group = group or ALONE
    device = choose_device(spec, group.rank)
    check_device(spec, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events, streams and counters of torch.cuda mean the current one
    limit_memory(spec, device)
    make_deterministic(spec)
    dtype = DTYPES[spec.model.dtype]
    family = plugins().families()[spec.model.family]
    with group.leader_first():  # it may download, or write the tiny checkpoint
        name = _checkpoint_name(spec, run_dir)
        checkpoint = find_checkpoint(name, spec.model.revision, unconditional=is_guided(spec))
        on_this_disk = on_disk(spec, run_dir)
    check_sampling(spec, checkpoint)
    prompts = spec.sample.prompts if spec.sample.every else []
    data = prepare(on_this_disk, checkpoint, device, dtype, emit, extra_captions=prompts, group=group)

    emit(PhaseStarted(phase="load", detail="transformer"))
    model, stream = load_placed(checkpoint, spec.memory, dtype, device)
    model.drop_text_projection()
    adapter = inject(model, spec.lora, family.target_patterns(spec.lora.targets), derived_seed(spec.train.seed, "init"))
    compile_model(model, model.layers, spec.memory.compile or "none")
    set_passes(model, spec.memory, stream)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    sampler = Sampler(spec, run_dir, checkpoint, model, data, emit)
    return Trainer(spec, run_dir, model, adapter, data, emit, sampler.draw, group)


def _checkpoint_name(spec: TrainSpec, run_dir: Path) -> str:
    """The checkpoint to load; for `tiny`, a random one written into the run folder."""
    if spec.model.checkpoint != "tiny":
        return spec.model.checkpoint
    from loraport_native.tiny import write_tiny

    folder = run_dir / "tiny-checkpoint"
    if not folder.exists():
        write_tiny(folder, layout="official")
    return str(folder)


def _out_of_memory(spec: TrainSpec, error: Exception) -> OutOfMemoryError:
    """What ran out, and the profile of this machine's card unless that is the one in use."""
    from loraport.gpu import cards_for, profile_for
    from loraport.plugins import plugins

    detail = (str(error) or "the host has no memory left").splitlines()[0]
    cards = cards_for(spec)
    fitting = profile_for(cards[0].memory_gib, plugins().profiles()) if cards else None
    if fitting is not None and fitting.name != spec.memory.profile:
        advice = (
            f"This card is one for the profile {fitting.name}: start again with --set memory.profile={fitting.name}"
        )
    else:
        advice = "Lower dataset.resolution or train.batch_size, or set memory.quantize: nf4, and start again"
    return OutOfMemoryError(f"Out of memory: {detail}", hint=f"{advice}.")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        end_as_rank(main)
    sys.exit(main())
