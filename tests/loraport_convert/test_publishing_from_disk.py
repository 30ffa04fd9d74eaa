"""The negative controls once more, with factors that are copied from disk and seen while they are written."""

import os
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from loraport.errors import DataError
from loraport.lora import ondisk, proof, storage, streaming
from loraport.lora.ondisk import OnDisk
from loraport.lora.storage import read_tensors, write_tensors
from loraport.plugins import plugins
from loraport_convert import publishing
from loraport_convert.comfyui import ComfyUI
from loraport_convert.publishing import Target, publish
from loraport_convert.reading import Scale, read_lora

from .test_publishing import FAULTS, Faulty, Flipping

NAME = "layers.0.attention.qkv"
RANK, HIDDEN = 2, 32


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(storage, "_LARGE", 0)
    monkeypatch.setattr(ondisk, "BLOCK", 256)
    monkeypatch.setattr(streaming, "_PIECE", 1000)
    monkeypatch.setattr(streaming, "_SMALL", 32)
    monkeypatch.setattr(streaming, "_MOST_SPACES", 0)  # or the data of small files is moved


@pytest.fixture(params=[np.float32, np.float16, ml_dtypes.bfloat16])
def path(tmp_path, request):
    """A LoRA as diffusers writes it for Ideogram 4, with q, k and v apart."""
    rng = np.random.default_rng(0)
    tensors = {}
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        for end, shape in (("A", (RANK, HIDDEN)), ("B", (HIDDEN, RANK))):
            array = rng.standard_normal(shape).astype(request.param)
            tensors[f"transformer.layers.0.attention.{part}.lora_{end}.weight"] = array
    folder = tmp_path / "in"
    folder.mkdir()
    write_tensors(folder / "in.safetensors", tensors, {"loraport.family": "ideogram4"})
    return folder / "in.safetensors"


def read(path):
    return read_lora(path, plugins().dialects(), Scale(3.0)).lora


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "out.safetensors"


@pytest.fixture
def compared(monkeypatch):
    """How often the proof has read two factors to compare them."""
    calls = []
    same = proof.same_bits
    monkeypatch.setattr(proof, "same_bits", lambda one, other: calls.append(1) or same(one, other))
    return calls


def test_what_was_seen_while_it_was_written_is_not_read_again(path, out, compared):
    lora = read(path)
    assert all(isinstance(array, OnDisk) for array in lora.modules[NAME].factors.arrays().values())
    published = publish(lora, Target(out, ComfyUI()), [path])
    assert published.proof.ok
    assert {module.method for module in published.proof.modules} == {"identical bytes"}
    assert compared == []
    up, down = (read_tensors(out)[f"diffusion_model.{NAME}.lora_{end}.weight"] for end in ("up", "down"))
    source = read_tensors(path)
    change = np.concatenate(
        [
            source[f"transformer.layers.0.attention.to_{part}.lora_B.weight"].astype(np.float64)
            @ source[f"transformer.layers.0.attention.to_{part}.lora_A.weight"].astype(np.float64)
            for part in "qkv"
        ]
    )
    np.testing.assert_allclose(up.astype(np.float64) @ down.astype(np.float64), change)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_writer_that_does_this_is_caught_and_leaves_no_output(path, out, fault):
    with pytest.raises(DataError, match=r"not written.*attention\.qkv"):
        publish(read(path), Target(out, Faulty(FAULTS[fault])), [path])
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("end", ["lora_up.weight", "lora_down.weight"])
@pytest.mark.parametrize("module", [NAME, "layers.0.attention.o"])
def test_a_bit_that_flips_after_it_was_seen_is_caught(path, out, module, end, compared):
    with pytest.raises(DataError, match=r"not written.*differs"):
        publish(read(path), Target(out, Flipping(f"diffusion_model.{module}.{end}")), [path])
    assert compared
    assert list(out.parent.iterdir()) == []


class Renaming(ComfyUI):
    """A writer that puts the factors of one module under the name of another of their shape, all of them seen."""

    def write(self, lora, path, dtype, metadata):
        one, other = "layers.0.attention.o", "layers.0.feed_forward.w1"
        modules = {
            **lora.modules,
            one: replace(lora.modules[other], name=one),
            other: replace(lora.modules[one], name=other),
        }
        super().write(replace(lora, modules=modules), path, dtype, metadata)


def test_factors_of_another_module_are_caught_although_all_of_them_were_seen(path, out):
    tensors = dict(read_tensors(path))
    rng = np.random.default_rng(1)
    for end, shape in (("A", (RANK, HIDDEN)), ("B", (HIDDEN, RANK))):
        key = f"transformer.layers.0.feed_forward.w1.lora_{end}.weight"
        tensors[key] = rng.standard_normal(shape).astype(next(iter(tensors.values())).dtype)
    write_tensors(path, tensors, {"loraport.family": "ideogram4"})
    assert publish(read(path), Target(out, ComfyUI()), [path]).proof.ok
    with pytest.raises(DataError, match=r"not written.*(attention\.o|w1) differs"):
        publish(read(path), Target(out.with_name("x.safetensors"), Renaming()), [path])


def test_another_dtype_is_proven_by_products(path, out):
    dtype = "fp32" if read_tensors(path).dtypes[f"transformer.{NAME[:-3]}to_q.lora_A.weight"] != "F32" else "bf16"
    published = publish(read(path), Target(out, ComfyUI(), dtype=dtype), [path])
    assert {module.method for module in published.proof.modules} == {"products in fp64"}
    assert published.proof.ok


def test_every_file_is_on_the_disk_before_it_takes_its_place(path, out, monkeypatch):
    synced = {}
    fsync, move = os.fsync, os.replace

    def syncing(descriptor):
        fsync(descriptor)
        stat = os.fstat(descriptor)
        synced[stat.st_ino] = stat.st_mtime_ns

    def moving(old, new):
        stat = os.stat(old)
        if Path(new).parent == out.parent:
            assert synced[stat.st_ino] == stat.st_mtime_ns
        move(old, new)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", moving)
    target = Target(out.with_name("adapter_model.safetensors"), plugins().dialects()["peft"])
    publish(read(path), target, [path])
    assert {each.name for each in out.parent.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.proof.json",
    }
    assert publishing.PROOF_KEY in read_tensors(target.path).metadata
