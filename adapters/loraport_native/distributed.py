"""The processes that train together, one for each GPU of a machine (`ranks.py` starts them).

Each runs its share of a step's forward passes; the adapter's gradients are summed once a step, and every process then
takes the same optimizer step. torch's DistributedDataParallel is not used: it owns the model, whose blocks may be
compiled, streamed and recomputed here, and reduces in hooks to hide the traffic of whole models. An adapter has a few
hundred megabytes of gradients, milliseconds of a step over NVLink.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from loraport_native.ranks import PeerLost, Place

T = TypeVar("T")

#: One process may draw samples or prepare data for hours while the others wait. A process that died is noticed by the
#: one that started it, and a run that hangs by the supervisor, so a time-out here could only end what goes well.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Group:
    """This process among those that train together. Alone, it has everything and nothing is sent."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that tells events, writes checkpoints and draws samples."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of the items: every one whose index is its rank, modulo the number of processes."""
        return items[self.rank :: self.size]

    def sum(self, values: Tensor) -> None:
        """Replace `values`, on the training device, by their sum over all processes."""
        if self.size > 1:
            with _peers():
                dist.all_reduce(values)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))  # on the CPU: the device goes on with what is queued there
        self.sum(flags)
        return bool(flags)

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.any(False)

    def from_leader(self, compute: Callable[[], T]) -> T:
        """What the first process computes, sent to all."""
        values = [compute() if self.leads else None]
        if self.size > 1:
            with _peers():
                dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return cast(T, values[0])

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """The first process goes through the block alone, and the others after it."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def leave(self) -> None:
        """Wait for all others and part."""
        if self.size > 1:
            self.wait()
            dist.destroy_process_group()


#: The group of a run on one device.
ALONE = Group()


def join(place: Place, size: int, device: torch.device) -> Group:
    """Meet the other processes: NCCL between CUDA devices, gloo between CPUs and for what is decided on the CPU.

    They find each other by a file: a port might be taken meanwhile, and be reached from outside.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    with _peers():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"file://{place.meeting_point}",
            rank=place.rank,
            world_size=size,
            timeout=_PATIENCE,
            device_id=device if cuda else None,
        )
    return Group(place.rank, size)


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """What fails in talking to the others is most often that one of them is gone."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
        if "out of memory" in str(error):  # NCCL takes buffers of its own
            raise
        raise PeerLost(str(error).splitlines()[0]) from error
