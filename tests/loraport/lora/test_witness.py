import os
import shutil

import numpy as np
import pytest

from loraport.lora import ondisk, proof, storage, streaming
from loraport.lora.canonical import LoraFile, LoraModule, LowRank
from loraport.lora.ondisk import Placed
from loraport.lora.proof import prove
from loraport.lora.storage import read_tensors, write_tensors
from loraport.lora.streaming import replace_metadata, stream_tensors
from loraport.lora.witness import witnessed


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(storage, "_LARGE", 0)
    monkeypatch.setattr(ondisk, "BLOCK", 64)
    monkeypatch.setattr(streaming, "_PIECE", 256)
    monkeypatch.setattr(streaming, "_SMALL", 32)
    monkeypatch.setattr(streaming, "_MOST_SPACES", 0)  # or the data of small files is moved


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "in.safetensors"
    write_tensors(path, {name: rng.standard_normal((30, 20)).astype(np.float32) for name in "abc"}, {})
    return read_tensors(path)


@pytest.fixture
def copied(tmp_path, source):
    """(witness, path, tensors as they lie in the source) of a file with a, b, and a block of b and c."""
    out = tmp_path / "out.safetensors"
    placed = Placed([(0, 0, source.on_disk("b")), (30, 20, source.on_disk("c"))], (60, 40))
    tensors = {"x": source.on_disk("a"), "y": source.on_disk("b"), "z": placed}
    with witnessed() as witness:
        stream_tensors(out, tensors.items(), {"k": " " * 9})
    return witness, out, tensors


def test_it_knows_which_array_each_tensor_is_a_copy_of_and_of_no_other(copied, source):
    witness, out, tensors = copied
    back = {name: read_tensors(out).on_disk(name) for name in tensors}
    for name, array in tensors.items():
        assert [other for other in back if witness.knows(array, back[other])] == [name]
        assert np.array_equal(array, back[name])
    again = read_tensors(source.path).on_disk("a")  # of which nobody knows that it is the same file still
    assert not witness.knows(again, back["x"])
    assert not witness.knows(source.on_disk("a")[1:], back["x"])
    assert not witness.knows(source.on_disk("a"), back["x"][1:])
    assert not witness.knows(source["a"], back["x"])
    assert not witness.knows(source.on_disk("a"), np.asarray(back["x"]))


def test_whoever_is_not_asked_for_sees_nothing_and_the_file_keeps_its_time(tmp_path, source):
    out = tmp_path / "plain.safetensors"
    stream_tensors(out, [("x", source.on_disk("a"))], {})
    assert abs(os.stat(out).st_mtime - os.stat(source.path).st_mtime) < 3600


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes()),
        lambda path: os.utime(path),
        lambda path: replace_metadata(path, {"k": "v"}),
        lambda path: shutil.move(shutil.copyfile(path, f"{path}.2"), path),
    ],
    ids=["written", "touched", "other metadata", "another file"],
)
def test_it_knows_nothing_of_a_file_that_has_changed_since(copied, change):
    witness, out, tensors = copied
    change(out)
    assert not any(witness.knows(array, read_tensors(out).on_disk(name)) for name, array in tensors.items())


def test_moving_the_data_for_a_longer_header_is_noticed(tmp_path, source):
    out = tmp_path / "long.safetensors"
    with witnessed() as witness:
        stream_tensors(out, [("x", source.on_disk("a"))], {"k": " " * 9000}, room=16)
    assert np.array_equal(read_tensors(out)["x"], source["a"])
    assert not witness.knows(source.on_disk("a"), read_tensors(out).on_disk("x"))


@pytest.mark.parametrize("fault", [lambda data: b"\0" * len(data), lambda data: bytes([data[0] ^ 1]) + bytes(data[1:])])
def test_a_block_that_comes_back_otherwise_than_it_was_written_is_an_error(tmp_path, source, monkeypatch, fault):
    write = streaming._write

    def wrongly(descriptor, data, offset):
        write(descriptor, fault(memoryview(data).cast("B")) if offset > 5000 else data, offset)

    monkeypatch.setattr(streaming, "_write", wrongly)
    with pytest.raises(Exception, match="what was read back is not what was written"), witnessed():
        stream_tensors(tmp_path / "out.safetensors", [(name, source.on_disk(name)) for name in "abc"], {})
    assert not (tmp_path / "out.safetensors").exists()


def test_the_proof_reads_again_what_was_not_seen_and_catches_factors_that_changed_places(tmp_path, source, monkeypatch):
    def modules(tensors, down, up):
        parts = {"m": (down, up), "n": (up, down)}
        return LoraFile(
            None,
            {
                name: LoraModule(name, LowRank(down=tensors.on_disk(a)[:20], up=tensors.on_disk(b)), 1.0)
                for name, (a, b) in parts.items()
            },
        )

    out = tmp_path / "out.safetensors"
    rows = {"x": source.on_disk("a")[:20], "y": source.on_disk("b"), "x2": source.on_disk("b")[:20]}
    with witnessed() as witness:
        stream_tensors(out, [*rows.items(), ("y2", source.on_disk("a"))], {})
    reads = []
    same = proof.same_bits
    monkeypatch.setattr(proof, "same_bits", lambda one, other: reads.append(1) or same(one, other))
    written = read_tensors(out)

    def back(m, n):
        pairs = {"m": m, "n": n}
        return LoraFile(
            None,
            {
                name: LoraModule(name, LowRank(down=written.on_disk(d), up=written.on_disk(u)), 1.0)
                for name, (d, u) in pairs.items()
            },
        )

    lora = modules(source, "a", "b")
    assert prove(lora, back(("x", "y"), ("x2", "y2")), witness=witness).ok
    assert reads == []
    swapped = prove(lora, back(("x2", "y2"), ("x", "y")), witness=witness)
    assert reads
    assert not any(module.ok for module in swapped.modules)
