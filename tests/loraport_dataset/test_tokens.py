"""Where token counts come from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from loraport_dataset.tokens import ESTIMATE, token_counter


def test_the_tokenizer_of_a_local_checkpoint_counts(tmp_path: Path) -> None:
    from loraport_native.tiny import write_tiny

    checkpoint = str(write_tiny(tmp_path / "tiny", "official"))
    counter = token_counter(checkpoint)
    assert counter.exact
    assert counter.source == f"counted by the tokenizer of {checkpoint}"
    assert counter.count("a red dot") > counter.count("") > 0  # the chat message around the caption counts
    assert counter.count("half a \ud800 character") > 0


@pytest.mark.parametrize("backend", [None, SimpleNamespace(), SimpleNamespace(token_counter=lambda *_: None)])
def test_elsewhere_the_count_is_an_estimate_and_says_so(backend: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    counter = token_counter("ideogram-ai/ideogram-4-fp8", backend=backend)
    assert counter is ESTIMATE
    assert (counter.count(""), counter.count("abc"), counter.count("abcd"), counter.count("été")) == (0, 1, 2, 2)
    assert "estimated at 3 bytes a token" in counter.source
