"""Blocks streamed through a few device slots, so that a model larger than the card's memory trains on it.

A block's frozen tensors are one flat piece of memory at the source, and in a slot. While one block computes, the next
are copied, a block at a time on a stream of its own, in the order of the pass: upwards in the forward pass, downwards
in the backward pass. Where a pass turns, the blocks it needs first are still there. Nothing is copied back: frozen
weights don't change.

Memory that a pass does not need yet holds more blocks: what recomputation keeps of each block is not there at the
start of a step, and the forward pass works in less memory than the backward pass. So a forward pass, in which copying
takes longer than computing on a fast card, starts with blocks that the backward pass before it left behind, and has
more ahead until it comes to the last ones.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from loraport_native.models.ideogram4 import Ideogram4

SLOTS = 2  #: one block computes while the next is copied
#: Forward, hidden states (one tensor of a block's input each) whose memory more slots may take: about what a backward
#: pass needs besides.
STATES_UPWARDS = 13
_LARGEST = 2**30  # bytes of pinned memory that pieces are cut from
_ALIGNMENT = 256  # bytes; tensor cores want 16, and 256 keeps every copy on whole cache lines


def slots_upwards(state: float, block: float, states: int = STATES_UPWARDS) -> int:
    """Slots that the forward pass has besides: a hidden state takes `state` bytes, a block `block`."""
    return int(states * state // block)


class Source(Protocol):
    """Where blocks come from."""

    def put(self, number: int, flat: Tensor) -> None:
        """Take in a block's bytes (any device), once."""

    def copy(self, number: int, slot: Tensor) -> None:
        """Copy a block into a slot, on the current stream."""

    def expect(self, number: int) -> None:
        """This block will be copied soon."""

    def read(self, number: int) -> Tensor:
        """A block's bytes on the CPU, out of turn. Not to be written to."""


class HostMemory:
    """Host memory in pieces of one size, pinned for CUDA, which lets copies run while the device computes.

    torch takes pinned memory in powers of two, so several pieces are cut from one where that wastes less.
    """

    def __init__(self, size: int, pinned: bool) -> None:
        self.size, self.pinned = math.ceil(size / _ALIGNMENT) * _ALIGNMENT, pinned
        self.rest = torch.empty(0, dtype=torch.uint8)

    def piece(self) -> Tensor:
        """The next piece (size,), uint8."""
        if len(self.rest) < self.size:
            self.rest = torch.empty(_taken_at_once(self.size), dtype=torch.uint8, pin_memory=self.pinned)
        piece, self.rest = self.rest.split((self.size, len(self.rest) - self.size))
        return piece


def _taken_at_once(size: int) -> int:
    """The smallest power of two, of at most `_LARGEST` bytes, of which pieces of a size leave an eighth at most; else
    the one that a piece alone takes."""
    alone = 1 << (size - 1).bit_length()
    wholes = (1 << power for power in range(alone.bit_length() - 1, _LARGEST.bit_length()))
    return next((whole for whole in wholes if whole % size <= whole / 8), alone)


class Host:
    """A permanent copy in host memory."""

    def __init__(self, device: torch.device) -> None:
        self.pinned = device.type == "cuda"
        self.memory = HostMemory(0, self.pinned)
        self.blocks: dict[int, Tensor] = {}

    def put(self, number: int, flat: Tensor) -> None:
        if not self.blocks:
            self.memory = HostMemory(len(flat), self.pinned)
        self.blocks[number] = self.memory.piece().copy_(flat)

    def copy(self, number: int, slot: Tensor) -> None:
        slot.copy_(self.blocks[number], non_blocking=True)

    def expect(self, number: int) -> None:
        pass

    def read(self, number: int) -> Tensor:
        return self.blocks[number]


class Disk:
    """A file of packed blocks, read by a thread of its own into a small ring of pinned memory.

    folder: where the file is made. It has no name, so it goes when the process ends.
    """

    def __init__(self, device: torch.device, folder: Path, ring: int = SLOTS + 1) -> None:
        self.pinned, self.ring = device.type == "cuda", ring
        self.size = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (as long as blocks are streamed)
        self.staging: list[Tensor] = []
        self.busy: list[torch.cuda.Event | None] = [None] * ring
        self.reading: dict[int, Future[Tensor]] = {}
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="blocks")

    def put(self, number: int, flat: Tensor) -> None:
        self.size = flat.numel()
        self.file.seek(number * self.size)
        rest = memoryview(flat.cpu().numpy().data)
        while rest:
            rest = rest[self.file.write(rest) :]

    def expect(self, number: int) -> None:
        if number not in self.reading:
            # One that was expected in a pass that ended before it loses its place; should it come, it is read anew.
            for other in [other for other in self.reading if other % self.ring == number % self.ring]:
                del self.reading[other]
            self.reading[number] = self.reader.submit(self._read, number)

    def read(self, number: int) -> Tensor:
        content = torch.empty(self.size, dtype=torch.uint8)
        view, read = memoryview(content.numpy().data), 0
        while read < self.size:  # by place, so that the reader's own is left alone
            got = os.preadv(self.file.fileno(), [view[read:]], number * self.size + read)
            assert got, "the file of blocks ends early"
            read += got
        return content

    def copy(self, number: int, slot: Tensor) -> None:
        self.expect(number)
        staged = self.reading.pop(number).result()
        slot.copy_(staged, non_blocking=True)
        if self.pinned:
            event = torch.cuda.Event()
            event.record()
            self.busy[number % self.ring] = event

    def _read(self, number: int) -> Tensor:
        while len(self.staging) < self.ring:
            self.staging.append(torch.empty(self.size, dtype=torch.uint8, pin_memory=self.pinned))
        place = number % self.ring
        if (event := self.busy[place]) is not None:
            event.synchronize()  # its last content is on the device
        self.file.seek(number * self.size)
        view, read = memoryview(self.staging[place].numpy().data), 0
        while read < self.size:
            got = self.file.readinto(view[read:])
            assert got, "the file of blocks ends early"
            read += got
        return self.staging[place]


class Slot:
    """Device memory for one block, with the views that are the block's tensors while it is there."""

    def __init__(self, size: int, device: torch.device, views: list[tuple[int, Tensor]]) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.views = [
            self.memory[offset : offset + like.numel() * like.element_size()].view(like.dtype).view(like.shape)
            for offset, like in views
        ]
        self.filled: Any = torch.cuda.Event() if device.type == "cuda" else None


class Stream:
    """Streams the blocks of one model. `take` each block once it is loaded, then `attach` to the model."""

    def __init__(
        self, source: Source, device: torch.device, slots: int = SLOTS, states_upwards: int = STATES_UPWARDS
    ) -> None:
        self.source, self.device = source, device
        self.base, self.states_upwards = slots, states_upwards
        self.tensors: list[list[Tensor]] = []
        self.size = 0  #: bytes of a block
        self.layout: list[tuple[int, Tensor]] = []  #: offset and an example of each of a block's tensors
        self.nowhere: list[Tensor] = []  #: what a block's tensors are while it is not on the device: one number each
        self.held: dict[int, Slot] = {}
        self.spare: list[Slot] = []
        self.kept_bytes = 0  #: what stays on the device of each block between the passes, at least
        self.fetching = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(self, number: int, block: nn.Module) -> None:
        """Move the frozen tensors of a block to the source; from now on they are views into a slot."""
        assert number == len(self.tensors), "blocks come in their order"
        tensors = _frozen_tensors(block)
        offsets, size = _layout(tensors)
        if not self.size:
            self.size = size
            self.layout = [
                (offset, tensor.detach().to("meta")) for offset, tensor in zip(offsets, tensors, strict=True)
            ]
            self.nowhere = [
                torch.empty(1, dtype=tensor.dtype, device=self.device).expand(tensor.shape) for tensor in tensors
            ]
        assert size == self.size, "blocks of one model are alike"
        flat = torch.zeros(size, dtype=torch.uint8, device=tensors[0].device)
        for tensor, offset in zip(tensors, offsets, strict=True):
            content = tensor.detach().contiguous().flatten().view(torch.uint8)
            flat[offset : offset + content.numel()] = content
        self.source.put(number, flat)
        self.tensors.append(tensors)
        self._bind(number, self.nowhere)
        block.lend = partial(self.lend, number)  # type: ignore[assignment]  # see `at_hand`

    def attach(self, model: Ideogram4, keeps_inputs: bool = True) -> None:
        """Have every block of the model fetched before it runs, forward and backward.

        keeps_inputs: the inputs of the blocks stay on the device between the passes.
        """
        inner = model.run_block

        def run_block(number: int, block: nn.Module, hidden: Tensor, *inputs: Any) -> Tensor:
            trains = torch.is_grad_enabled()
            self.kept_bytes = hidden.numel() * hidden.element_size() if trains and keeps_inputs else 0
            self.arrive(number, upwards=True)
            result = inner(number, block, hidden, *inputs)
            return _BeforeBackward.apply(result, self, number) if trains else result

        model.run_block = run_block

    @contextlib.contextmanager
    def lend(self, number: int) -> Iterator[None]:
        """Within it the frozen tensors of a block are on the device, between passes."""
        if number in self.held:
            if self.fetching is not None:
                torch.cuda.current_stream(self.device).wait_event(self.held[number].filled)
            yield
            return
        slot = Slot(self.size, self.device, self.layout)
        slot.memory.copy_(self.source.read(number))
        self._bind(number, slot.views)
        try:
            yield
        finally:
            self._bind(number, self.nowhere)

    def arrive(self, number: int, upwards: bool) -> None:
        """Make the device wait for a block, and fetch those that come next in this direction."""
        count = len(self.tensors)
        ahead, behind = list(range(number, count)), list(range(number - 1, -1, -1))
        if not upwards:
            ahead, behind = [number, *behind], ahead[1:]
        room = self._room(number, upwards)
        if upwards:  # of what is behind only that stays which the backward pass, with less room, begins with
            room = max(min(room, len(ahead)), self._room(count - 1, upwards=False))
        self._release(set([*ahead, *behind][:room]), room)
        for coming in ahead[:room]:
            if coming not in self.held:
                self._fetch(coming)
        for later in ahead[room : room + SLOTS]:
            self.source.expect(later)
        if self.fetching is not None:
            torch.cuda.current_stream(self.device).wait_event(self.held[number].filled)

    def _room(self, number: int, upwards: bool) -> int:
        """Blocks that may be on the device while this one computes."""
        free = (len(self.tensors) - number) * self.kept_bytes // self.size
        return self.base + free + (slots_upwards(self.kept_bytes, self.size, self.states_upwards) if upwards else 0)

    def _release(self, needed: set[int], room: int) -> None:
        for number in [number for number in self.held if number not in needed]:
            self.spare.append(self.held.pop(number))
            self._bind(number, self.nowhere)  # else its tensors would keep the slot's memory
        while self.spare and len(self.held) + len(self.spare) > room:
            slot = self.spare.pop()
            if self.fetching is not None:  # a copy into it that nobody waited for must not outlive it
                torch.cuda.current_stream(self.device).wait_event(slot.filled)

    def _fetch(self, number: int) -> None:
        slot = self.spare.pop() if self.spare else Slot(self.size, self.device, self.layout)
        self.held[number] = slot
        self._bind(number, slot.views)
        if self.fetching is None:
            self.source.copy(number, slot.memory)
            return
        # What used the slot before has been queued by now, so the copy may start when the queue has come this far.
        self.fetching.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.fetching):
            self.source.copy(number, slot.memory)
            slot.filled.record(self.fetching)

    def _bind(self, number: int, views: list[Tensor]) -> None:
        for tensor, view in zip(self.tensors[number], views, strict=True):
            tensor.data = view


class _BeforeBackward(torch.autograd.Function):
    """Passes a block's result on, and fetches the block again when its backward pass is about to begin."""

    @staticmethod
    def forward(ctx, result: Tensor, stream: Stream, number: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.stream, ctx.number = stream, number
        return result.view_as(result)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        ctx.stream.arrive(ctx.number, upwards=False)
        return gradient, None, None


def at_hand(model: nn.Module, module: str) -> contextlib.AbstractContextManager[None]:
    """Within it the frozen weights of a module are on the device, also those of a block that waits elsewhere."""
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        part: Any = model.get_submodule(".".join(parts[:count]))
        if hasattr(part, "lend"):
            lent: contextlib.AbstractContextManager[None] = part.lend()
            return lent
    return contextlib.nullcontext()


def _frozen_tensors(block: nn.Module) -> list[Tensor]:
    return [*(parameter for parameter in block.parameters() if not parameter.requires_grad), *block.buffers()]


def _layout(tensors: list[Tensor]) -> tuple[list[int], int]:
    """Each tensor's offset in a block's flat memory, and its size, bytes."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end = math.ceil((end + tensor.numel() * tensor.element_size()) / _ALIGNMENT) * _ALIGNMENT
    return offsets, end


class HostActivations:
    """Keeps the inputs of recomputed blocks in host memory between the passes; each comes back while the block above it
    computes its backward pass.

    It does the recomputing too, so it takes the place of `recompute`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = HostMemory(0, device.type == "cuda")
        self.host: list[Tensor] = []  # pieces of it, as many as there are blocks
        self.kept: list[Tensor] = []  # host memory of the blocks passed so far, in their order
        self.coming: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}
        cuda = device.type == "cuda"
        self.leaving, self.returning = ((torch.cuda.Stream(device) if cuda else None) for _ in range(2))

    def pack(self, tensor: Tensor) -> int:
        """Send a block's input to the host; its number."""
        number = len(self.kept)
        if tensor.nbytes > self.memory.size:  # a larger batch than any before
            self.memory, self.host = HostMemory(tensor.nbytes, self.memory.pinned), []
        if number >= len(self.host):
            self.host.append(self.memory.piece())
        place = self.host[number][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.kept.append(place)
        if self.leaving is None:
            place.copy_(tensor)
            return number
        self.leaving.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.leaving):
            place.copy_(tensor, non_blocking=True)
        return number

    def packed(self) -> None:
        """From here on the device may use the memory of the packed input for other things.

        `record_stream` would not do: the host queues far ahead of the device, and until the device has caught up the
        allocator would take new memory for each block.
        """
        if self.leaving is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.leaving)

    def unpack(self, number: int) -> Tensor:
        """The input on the device; the one needed next begins to come back."""
        tensor, event = self.coming.pop(number) if number in self.coming else self._bring(number)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        self.kept.pop()
        if number:
            self.coming[number - 1] = self._bring(number - 1)
        return tensor

    def _bring(self, number: int) -> tuple[Tensor, torch.cuda.Event | None]:
        if self.returning is None or self.leaving is None:
            return self.kept[number].clone(), None
        self.returning.wait_stream(self.leaving)
        kept = self.kept[number]
        # Memory of the stream that uses and frees it; so the copy may start when the queue has come as far as now.
        tensor = torch.empty(kept.shape, dtype=kept.dtype, device=self.device)
        self.returning.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.returning):
            tensor.copy_(kept, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.returning)
        return tensor, event

    def attach(self, model: Ideogram4) -> None:
        """Recompute every block of the model but the last, whose backward pass comes next, from an input that waits on
        the host."""
        # What makes autograd come by even where a block's input needs no gradient.
        anchor = torch.empty(0, requires_grad=True)
        last = len(model.layers) - 1

        def run_block(number: int, block: nn.Module, hidden: Tensor, *inputs: Any) -> Tensor:
            if number == last or not torch.is_grad_enabled():
                return block(hidden, *inputs)
            return _Recomputed.apply(hidden, anchor, self, block, *inputs)

        model.run_block = run_block


class _Recomputed(torch.autograd.Function):
    """A block recomputed in its backward pass from an input kept by `HostActivations`; the gradients of its parameters
    are added to them there.

    torch's own checkpoint holds its inputs where no hook reaches them, or reaches all of them alike.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden: Tensor, anchor: Tensor, store: HostActivations, block: nn.Module, *inputs: Any
    ) -> Tensor:
        ctx.store, ctx.block = store, block
        ctx.inputs = [each.detach() if isinstance(each, Tensor) else each for each in inputs]
        ctx.random = _random_state(hidden.device)
        ctx.number = store.pack(hidden)  # it leaves while the block computes
        with torch.no_grad():
            result: Tensor = block(hidden, *inputs)
        store.packed()
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        hidden = ctx.store.unpack(ctx.number).detach().requires_grad_()
        for each, needs_gradient in zip(ctx.inputs, ctx.needs_input_grad[4:], strict=True):
            if needs_gradient:
                each.requires_grad_()
        now = _random_state(hidden.device)
        _set_random_state(hidden.device, ctx.random)
        with torch.enable_grad():
            result = ctx.block(hidden, *ctx.inputs)
        _set_random_state(hidden.device, now)
        torch.autograd.backward(result, gradient)
        to_inputs = (each.grad if isinstance(each, Tensor) else None for each in ctx.inputs)
        return hidden.grad, None, None, None, *to_inputs


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
