"""Our text features against the pipeline's own."""

from __future__ import annotations

import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import Ideogram4Pipeline
from safetensors.torch import load_file, save_file

from loraport.errors import DataError
from loraport_native.models import text
from loraport_native.models.checkpoint import find_checkpoint, load_text_encoder, load_tokenizer
from loraport_native.models.text import LAYERS, encode

CAPTIONS = ["a red ball", "two ships on a stormy sea, dramatic light, in the style of an old etching"]


@pytest.fixture(scope="module")
def parts(tiny_official):
    checkpoint = find_checkpoint(str(tiny_official))
    return load_text_encoder(checkpoint, torch.float32, "cpu"), load_tokenizer(checkpoint)


def test_features_equal_the_pipelines_without_its_padding(parts, tiny_diffusers):
    pipeline = Ideogram4Pipeline.from_pretrained(tiny_diffusers, torch_dtype=torch.float32)
    expected, *_ = pipeline.encode_prompt(CAPTIONS, 2, 2, 100, torch.device("cpu"))
    features = list(encode(*parts, CAPTIONS, max_tokens=100))
    assert len(features) == 2
    for row, got in zip(expected, features, strict=True):
        wanted = row[100 - len(got) : 100]
        assert not row[: 100 - len(got)].any()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_features_do_not_depend_on_the_other_captions(parts):
    _, together = encode(*parts, CAPTIONS, max_tokens=100)
    (alone,) = encode(*parts, CAPTIONS[1:], max_tokens=100)
    assert torch.equal(together, alone)


def test_a_caption_that_is_too_long_is_named_with_its_length_and_the_limit(parts):
    with pytest.raises(DataError, match=r"has \d+ tokens, the limit is 20: two ships on") as caught:
        encode(*parts, CAPTIONS, max_tokens=20)
    assert "max_text_tokens" in str(caught.value)


def test_in_several_passes_features_are_the_same_and_kept_blocks_are_read_once(parts, tiny_official, monkeypatch):
    expected = list(encode(*parts, CAPTIONS, max_tokens=100))
    monkeypatch.setattr(text, "PASS_TOKENS", 1)
    read: list[int] = []
    for room, times in ((0, 2), (1, 1)):
        encoder = load_text_encoder(find_checkpoint(str(tiny_official)), torch.float32, "cpu", "none", lambda r=room: r)
        block = encoder.block
        monkeypatch.setattr(encoder, "block", lambda number, block=block: read.append(number) or block(number))
        read.clear()
        got = list(encode(encoder, parts[1], CAPTIONS, max_tokens=100))
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
        assert read == list(range(LAYERS)) * times


def test_no_more_than_two_blocks_are_in_memory_and_never_the_embeddings(tiny_official, monkeypatch):
    encoder = load_text_encoder(find_checkpoint(str(tiny_official)), torch.float32, "cpu")
    tokenizer = load_tokenizer(find_checkpoint(str(tiny_official)))
    alive: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    most, load = [], encoder.block
    read = [threading.Event() for _ in range(LAYERS)]

    def block_that_waits_for_the_next(number: int) -> torch.nn.Module:
        def wait(*given: object) -> None:
            assert number + 1 == LAYERS or read[number + 1].wait(60)

        block = load(number)
        block.register_forward_pre_hook(wait)
        alive.add(block)
        most.append(len(alive))
        read[number].set()
        return block

    monkeypatch.setattr(encoder, "block", block_that_waits_for_the_next)
    list(encode(encoder, tokenizer, CAPTIONS, max_tokens=100))
    assert most == [1] + [2] * (LAYERS - 1)
    assert not alive
    held = (*encoder._model.parameters(), *encoder._model.buffers())
    assert all(tensor.is_meta for tensor in held if tensor.numel() > 64)


@pytest.mark.parametrize(
    ("checkpoint", "storage"),
    [("tiny_official", "fp8"), ("tiny_official", "int8"), ("tiny_official", "nf4"), ("tiny_fp8", "fp8")],
)
def test_stored_in_fewer_bits_the_features_stay_close(parts, request, checkpoint, storage):
    folder = find_checkpoint(str(request.getfixturevalue(checkpoint)))
    encoder = load_text_encoder(folder, torch.float32, "cpu", storage)
    linears = [module for module in encoder.block(0).modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 7
    assert not any(type(linear) is torch.nn.Linear for linear in linears)
    for wanted, got in zip(encode(*parts, CAPTIONS, 100), encode(encoder, parts[1], CAPTIONS, 100), strict=True):
        error = ((got - wanted).norm() / wanted.norm()).item()
        # Of features that have come through 36 random blocks, each of which adds to the error.
        assert 0 < error < {"fp8": 0.12, "int8": 0.05, "nf4": 0.35}[storage]


def test_official_fp8_rows_are_used_as_they_are(tiny_fp8):
    """The same features as with the rows widened beforehand, to the rounding of float32."""
    checkpoint = find_checkpoint(str(tiny_fp8))
    tokenizer = load_tokenizer(checkpoint)
    kept, widened = (load_text_encoder(checkpoint, torch.float32, "cpu", storage) for storage in ("fp8", "none"))
    on_disk = load_file(checkpoint.text_encoder / "model.safetensors")
    name = "self_attn.q_proj"
    rows = on_disk[f"language_model.layers.3.{name}.weight"]
    assert torch.equal(kept.block(3).get_submodule(name).rows.view(torch.uint8), rows.view(torch.uint8))
    for one, other in zip(
        encode(kept, tokenizer, CAPTIONS, 100), encode(widened, tokenizer, CAPTIONS, 100), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_text_encoder_that_holds_nan_is_named(tiny_fp8, tiny_official, tmp_path):
    name = "language_model.layers.2.mlp.up_proj.weight"
    for source in (tiny_fp8, tiny_official):
        folder = Path(shutil.copytree(source, tmp_path / source.name))
        path = folder / "text_encoder/model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        damaged = tensors[name].float()
        damaged[1, 2] = float("nan")
        save_file(tensors | {name: damaged.to(tensors[name].dtype)}, path)
        encoder = load_text_encoder(find_checkpoint(str(folder)), torch.float32, "cpu", "fp8")
        with pytest.raises(DataError, match=rf"tensor {name} holds NaN"):
            encoder.block(2)
