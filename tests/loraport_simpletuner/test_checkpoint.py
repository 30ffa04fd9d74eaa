"""A checkpoint folder as a hub cache of links."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loraport.errors import DataError
from loraport.lora.storage import write_tensors
from loraport_simpletuner.checkpoint import link_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "mein Modell ü"
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        (root / part).mkdir(parents=True)
    for part in ("transformer", "vae"):
        write_tensors(root / part / WEIGHTS, {"layers.0.attention.qkv.weight": np.zeros(1, np.float32)}, {})
    (root / "text_encoder" / "config.json").write_text("{}")
    (root / "tokenizer" / "tokenizer_config.json").write_text("{}")
    return root


def test_every_file_is_linked_under_one_commit_and_read_offline(folder: Path, tmp_path: Path) -> None:
    environment = link_checkpoint(folder, tmp_path / "home")
    repository = Path(environment["HF_HUB_CACHE"]) / "models--loraport--local-checkpoint"
    commit = (repository / "refs" / "main").read_text()
    snapshot = repository / "snapshots" / commit
    assert (snapshot / "vae" / WEIGHTS).resolve() == (folder / "vae" / WEIGHTS).resolve()
    assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"
    assert not (folder / "tokenizer" / "config.json").exists()
    assert (snapshot / "tokenizer" / "config.json").is_file()
    assert link_checkpoint(folder, tmp_path / "home") == environment


@pytest.mark.parametrize(
    ("part", "told"),
    [("transformer", "the transformer"), ("vae", "the VAE"), ("text_encoder", "text encoder"), ("tokenizer", "tok")],
)
def test_a_missing_part_is_named(folder: Path, tmp_path: Path, part: str, told: str) -> None:
    for path in (folder / part).iterdir():
        path.unlink()
    with pytest.raises(DataError, match=told):
        link_checkpoint(folder, tmp_path / "home")


def test_split_attention_is_refused_in_one_file_and_in_parts(folder: Path, tmp_path: Path) -> None:
    name = "layers.0.attention.to_q.weight"
    write_tensors(folder / "transformer" / WEIGHTS, {name: np.zeros(1, np.float32)}, {})
    with pytest.raises(DataError, match="official layout"):
        link_checkpoint(folder, tmp_path / "home")
    index = folder / "transformer" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {name: "a.safetensors"}}))
    with pytest.raises(DataError, match="official layout"):
        link_checkpoint(folder, tmp_path / "home")
    index.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        link_checkpoint(folder, tmp_path / "home")


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        link_checkpoint(tmp_path / "nothing", tmp_path / "home")
