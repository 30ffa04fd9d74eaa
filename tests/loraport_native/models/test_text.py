"""Our text features against the pipeline's own."""

from __future__ import annotations

import pytest
import torch
from diffusers import Ideogram4Pipeline

from loraport.errors import DataError
from loraport_native.models.checkpoint import find_checkpoint, load_text_encoder, load_tokenizer
from loraport_native.models.text import encode

CAPTIONS = ["a red ball", "two ships on a stormy sea, dramatic light, in the style of an old etching"]


@pytest.fixture(scope="module")
def parts(tiny_official):
    checkpoint = find_checkpoint(str(tiny_official))
    return load_text_encoder(checkpoint, torch.float32, "cpu"), load_tokenizer(checkpoint)


def test_features_equal_the_pipelines_without_its_padding(parts, tiny_diffusers):
    pipeline = Ideogram4Pipeline.from_pretrained(tiny_diffusers, torch_dtype=torch.float32)
    expected, *_ = pipeline.encode_prompt(CAPTIONS, 2, 2, 100, torch.device("cpu"))
    features = encode(*parts, CAPTIONS, max_tokens=100)
    assert len(features) == 2
    for row, got in zip(expected, features, strict=True):
        wanted = row[100 - len(got) : 100]
        assert not row[: 100 - len(got)].any()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_features_do_not_depend_on_the_other_captions(parts):
    together = encode(*parts, CAPTIONS, max_tokens=100)
    assert torch.equal(together[1], encode(*parts, CAPTIONS[1:], max_tokens=100)[0])


def test_encoding_leaves_no_hook_behind(parts):
    encode(*parts, CAPTIONS, max_tokens=100)
    assert not any(layer._forward_hooks for layer in parts[0].language_model.layers)


def test_a_caption_that_is_too_long_is_named_with_its_length_and_the_limit(parts):
    with pytest.raises(DataError, match=r"has \d+ tokens, the limit is 20: two ships on") as caught:
        encode(*parts, CAPTIONS, max_tokens=20)
    assert "max_text_tokens" in str(caught.value)


def test_the_vision_tower_is_not_loaded(parts):
    assert not any(name.startswith("visual") for name, _ in parts[0].named_parameters())
