"""A local checkpoint folder in the only form SimpleTuner loads one: a repository in a hub cache, made of links."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from loraport.errors import DataError
from loraport.lora.storage import read_tensors
from loraport_simpletuner.mapping import LOCAL_ID

_TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
#: What SimpleTuner asks the repository for; weights may be in one file or in parts with an index.
_NEEDED = {
    "the transformer": (_TRANSFORMER, f"{_TRANSFORMER}.index.json"),
    "the VAE": ("vae/diffusion_pytorch_model.safetensors",),
    "the text encoder": ("text_encoder/config.json",),
    "the tokenizer": ("tokenizer/tokenizer_config.json",),
}
#: What libraries ask for and may not be there. Offline, only a note in the cache tells them so; else they give up.
_OPTIONAL = (
    "tokenizer/added_tokens.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/chat_template.jinja",
    "text_encoder/generation_config.json",
    "text_encoder/adapter_config.json",
    f"{_TRANSFORMER}.index.json",
)


def link_checkpoint(folder: Path, home: Path) -> dict[str, str]:
    """Lay `folder` out under `home` as a hub cache, and return the environment that makes SimpleTuner read it there.

    Raises DataError when the folder is not a whole checkpoint in the official layout.
    """
    _check(folder)
    # A commit that changes with the folder, so that nothing stale is read.
    commit = hashlib.sha1(str(folder.resolve()).encode()).hexdigest()
    repository = home / "hub" / f"models--{LOCAL_ID.replace('/', '--')}"
    shutil.rmtree(repository, ignore_errors=True)
    snapshot = repository / "snapshots" / commit
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        _link(path.resolve(), link)
    config = snapshot / "tokenizer" / "config.json"
    if not config.exists():
        # transformers 5 opens it before it looks into tokenizer_config.json, and offline it may not be missing.
        config.write_text("{}")
    for name in _OPTIONAL:
        if not (folder / name).exists():
            note = repository / ".no_exist" / commit / name
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"The checkpoint {folder} is not a folder.", hint="Check model.checkpoint.")
    for what, names in _NEEDED.items():
        if not any((folder / name).is_file() for name in names):
            raise DataError(f"The checkpoint {folder} lacks {what}: {names[0]}.")
    if any(".to_q." in name for name in _transformer_keys(folder)):
        raise DataError(
            f"The checkpoint {folder} has attention split into to_q, to_k and to_v; SimpleTuner reads only the "
            "official layout, with qkv in one.",
            hint="Give a checkpoint in the official layout, or train with the native backend, which reads both.",
        )


def _transformer_keys(folder: Path) -> list[str]:
    index = folder / f"{_TRANSFORMER}.index.json"
    if index.is_file():
        try:
            return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{index} cannot be read: {error}.") from error
    return list(read_tensors(folder / _TRANSFORMER))


def _link(source: Path, link: Path) -> None:
    try:
        link.symlink_to(source)
    except OSError:  # a file system without symbolic links: weights are too large to copy
        os.link(source, link)
