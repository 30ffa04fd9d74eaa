"""Streamed blocks compute what resident ones do, to the bit, forward and backward. On a CPU copies are immediate; the
order of copies and slots is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_steps import CPU, PATTERNS, model_with, step

from loraport_native.lora import Adapter, write_adapter
from loraport_native.models.ideogram4 import Ideogram4
from loraport_native.stream import Disk, Host, HostMemory, Stream


@pytest.mark.parametrize("storage", ["none", "fp8", "int8", "nf4"])
@pytest.mark.parametrize("offload", ["group", "group+activations", "disk"])
def test_a_streamed_model_computes_what_a_resident_one_does(
    tiny_official: Path, offload: str, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPORT_CACHE", str(tmp_path))
    wanted = step(*model_with(tiny_official, storage=storage))
    model, adapter = model_with(tiny_official, storage=storage, offload=offload)
    for _ in range(2):  # the second pass begins with what the first left in the slots
        for one, other in zip(step(model, adapter), wanted, strict=True):
            assert torch.equal(one, other)
    with torch.no_grad():
        model.velocity(torch.ones(1, 16, 128), torch.ones(1, 5, 128), None, torch.tensor([0.3]), (4, 4))
    for one, other in zip(step(model, adapter), wanted, strict=True):
        assert torch.equal(one, other), "an evaluation in between changes nothing"


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_streaming_does_not_need_recomputation(tiny_official: Path, checkpointing: str) -> None:
    wanted = step(*model_with(tiny_official, gradient_checkpointing=checkpointing))
    got = step(*model_with(tiny_official, gradient_checkpointing=checkpointing, offload="group"))
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("kind", ["lora", "lokr", "loha"])
def test_inputs_kept_on_the_host_change_nothing_for_any_adapter(tiny_official: Path, kind: str) -> None:
    dropout = 0.3 if kind == "lora" else 0.0
    wanted = step(*model_with(tiny_official, kind, dropout))
    got = step(*model_with(tiny_official, kind, dropout, offload="group+activations"))
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("offload", ["group", "group+activations"])
def test_what_is_trained_before_the_blocks_gets_its_gradient_from_all_of_them(
    tiny_official: Path, offload: str
) -> None:
    patterns = [*PATTERNS, r"adaln_proj", r"t_embedding\..*"]
    wanted = step(*model_with(tiny_official, patterns=patterns))
    model, adapter = model_with(tiny_official, patterns=patterns, offload=offload)
    assert any("adaln_proj" in name for name in adapter.factors)
    for one, other in zip(step(model, adapter), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # summed over the blocks in another order


def test_inputs_on_the_host_may_be_larger_and_smaller_from_step_to_step(tiny_official: Path) -> None:
    streamed, resident = (model_with(tiny_official, offload=name) for name in ("group+activations", "none"))
    for tokens in (5, 9, 3, 12):
        for one, other in zip(step(*streamed, tokens=tokens), step(*resident, tokens=tokens), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("size", "pieces", "taken"),
    [  # of the real model: a block in fp8, in nf4 and in bf16, and the input of one at 1024 px
        (264_555_008, 34, 34 * 2**28),
        (136_454_144, 34, 5 * 2**30),
        (528_482_304, 34, 34 * 2**29),
        (42_467_328, 33, 11 * 2**27),
        (3_000, 10, 2 * 2**14),
        (2**31 + 1, 2, 2 * 2**32),
    ],
)
def test_pinned_memory_is_cut_where_a_power_of_two_for_each_piece_would_waste_it(
    monkeypatch: pytest.MonkeyPatch, size: int, pieces: int, taken: int
) -> None:
    made: list[int] = []

    def empty(count: int, **options: object) -> torch.Tensor:
        assert options == {"dtype": torch.uint8, "pin_memory": True}
        assert count & (count - 1) == 0, "what torch takes anyway"
        made.append(count)
        return real(count, dtype=torch.uint8, device="meta")

    real = torch.empty
    memory = HostMemory(size, pinned=True)
    monkeypatch.setattr(torch, "empty", empty)
    cut = [memory.piece() for _ in range(pieces)]
    assert all(size <= len(piece) < size + 256 for piece in cut)
    assert sum(made) == taken


@pytest.mark.parametrize(
    ("offload", "storage"),
    [("group", "none"), ("group", "fp8"), ("group+activations", "none"), ("disk", "none"), ("disk", "nf4")],
)
def test_dora_measures_and_is_saved_with_the_weights_of_blocks_that_wait(
    tiny_official: Path, offload: str, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPORT_CACHE", str(tmp_path))
    (model, adapter), (other, resident) = (
        model_with(tiny_official, dora=True, storage=storage, offload=name) for name in (offload, "none")
    )
    for one, wanted in zip(step(model, adapter), step(other, resident), strict=True):
        assert torch.equal(one, wanted)
    for number, each in enumerate((adapter, resident)):
        weights = {name: factor.detach() for name, factor in each.factors.items()}
        write_adapter(tmp_path / f"{number}.safetensors", each, weights, "ideogram4", 1)
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    for one, wanted in zip(step(model, adapter), step(other, resident), strict=True):
        assert torch.equal(one, wanted), "and saving in between changes nothing"


def streamed(checkpoint: Path, **settings: int) -> tuple[Stream, Ideogram4, Adapter, list[int]]:
    """A model with its stream, and the list that notes which blocks are copied."""
    model, adapter = model_with(checkpoint)
    copies: list[int] = []

    class Noted(Host):
        def copy(self, number: int, slot: torch.Tensor) -> None:
            copies.append(number)
            super().copy(number, slot)

    stream = Stream(Noted(CPU), CPU, **settings)
    for number, block in enumerate(model.layers):
        stream.take(number, block)
    stream.attach(model)
    return stream, model, adapter, copies


def test_each_block_is_copied_once_a_pass_and_not_at_the_turn(tiny_official: Path) -> None:
    _, model, adapter, copies = streamed(tiny_official, slots=2, states_upwards=0)
    step(model, adapter)
    assert copies == [0, 1, 2, 0], "of three blocks, 2 and 1 are still there when the backward pass begins"
    copies.clear()
    step(model, adapter)
    assert copies == [2, 0], "and 0 and 1 when the next step does"


def test_the_device_holds_as_many_blocks_as_there_is_room_for_at_each_moment(
    tiny_official: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, model, adapter, copies = streamed(tiny_official, slots=1, states_upwards=2)
    seen: list[tuple[int, bool, int]] = []
    arrive = stream.arrive

    def note(number: int, upwards: bool) -> None:
        # as if what is kept of two blocks took the place of one
        stream.kept_bytes = stream.size // 2
        arrive(number, upwards)
        assert number in stream.held
        frozen = [*model.layers.buffers(), *(one for one in model.layers.parameters() if not one.requires_grad)]
        alive = {one.untyped_storage().data_ptr() for one in frozen if one.untyped_storage().nbytes() == stream.size}
        assert len(alive) == len(stream.held), "a block that went keeps no memory"
        seen.append((number, upwards, len(stream.held) + len(stream.spare)))

    monkeypatch.setattr(stream, "arrive", note)
    for _ in range(2):
        seen.clear()
        copies.clear()
        step(model, adapter)
        # Three blocks: room for 1 + (3 - number) // 2, and one more upwards.
        assert [count <= 1 + (3 - number) // 2 + up for number, up, count in seen] == [True] * 6
    assert copies == [2, 1, 0], "with one slot and no more room they would be 1, 2, 1, 0"


def test_more_blocks_are_ahead_upwards_until_few_are_left() -> None:
    copies: list[int] = []

    class Noted(Host):
        def copy(self, number: int, slot: torch.Tensor) -> None:
            copies.append(number)
            super().copy(number, slot)

    stream = Stream(Noted(CPU), CPU, slots=2, states_upwards=13)
    for number in range(8):
        stream.take(number, torch.nn.Linear(64, 64).requires_grad_(False))
    stream.kept_bytes = stream.size // 6  # so that 13 states are two blocks, and what is kept of seven is one

    def held(number: int, upwards: bool) -> list[int]:
        stream.arrive(number, upwards)
        assert not stream.spare, "what is not needed has no memory"
        return sorted(stream.held)

    upwards = [held(number, True) for number in range(8)]
    assert [len(blocks) for blocks in upwards] == [5, 5, 4, 4, 4, 3, 2, 2]
    assert upwards[-1] == [6, 7], "the backward pass has room for two when it begins"
    downwards = [held(number, False) for number in reversed(range(8))]
    assert [len(blocks) for blocks in downwards] == [2, 2, 2, 2, 2, 2, 3, 3]
    assert copies == [0, 1, 2, 3, 4, 5, 6, 7, 5, 4, 3, 2, 1, 0], "each once a pass, and none twice at the turn"


def test_blocks_come_whole_from_disk_where_a_backward_pass_ends_before_it_reaches_the_first(tmp_path: Path) -> None:
    stream = Stream(Disk(CPU, tmp_path), CPU)
    blocks = [torch.nn.Linear(8, 8).requires_grad_(False) for _ in range(8)]
    weights = [block.weight.clone() for block in blocks]
    for number, block in enumerate(blocks):
        stream.take(number, block)
    trained = range(5, 8)  # with an adapter on the last blocks alone nothing asks for the others' gradients
    for _ in range(2):
        for upwards, passed in ((True, range(8)), (False, reversed(trained))):
            for number in passed:
                stream.arrive(number, upwards)
                assert torch.equal(blocks[number].weight, weights[number])


def test_a_block_that_waits_at_the_source_takes_no_memory_of_the_device(tiny_official: Path) -> None:
    model, _ = model_with(tiny_official, offload="group", storage="none")
    frozen = [parameter for parameter in model.layers.parameters() if not parameter.requires_grad]
    assert sum(one.untyped_storage().nbytes() for one in frozen) <= 4 * len(frozen)
