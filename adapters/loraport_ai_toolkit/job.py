"""What must be on disk before ai-toolkit starts: staged images and captions, the checkpoint's files, the final job."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from loraport.dataset import Item, load_image
from loraport.errors import DataError
from loraport.families import Family
from loraport.files import atomic_path, write_atomic
from loraport.sets import TrainedSet, held_out_items
from loraport.spec.load import parse_yaml
from loraport.spec.models import TrainSpec
from loraport.staging import stage, write_tiny_checkpoint
from loraport_ai_toolkit import layout
from loraport_ai_toolkit.captions import staged
from loraport_ai_toolkit.translate import OWN, TEXT_ENCODER, caption_extension

_READ = (".jpg", ".jpeg", ".png", ".webp")
_TOLD = 3  # captions named in a warning

#: Runs in ai-toolkit's interpreter: its own caption rules, loaded by file, over captions given on standard input.
_READ_CAPTIONS = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("captions", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
def read(text):
    text = ", ".join(text.split(",")).replace("[name]", "").replace("[trigger]", "")
    return module.digest_caption_string(text)
json.dump([read(text) for text in json.load(sys.stdin)], sys.stdout)
"""


def stage_images(sets: list[TrainedSet], run_dir: Path) -> list[tuple[Item, str]]:
    """Fill the sets' staged folders; returns each trained item with the caption written for it.

    Raises DataError for images that cannot be read.
    """
    found: list[tuple[Item, str]] = []
    for each in sets:
        folder = layout.set_folder(each.set.label)
        converted = run_dir / layout.CONVERTED / Path(folder).name
        readable = [_readable(item, converted, number) for number, item in enumerate(each.items, 1)]
        suffix = f".{caption_extension(each.set)}"
        done = stage(readable, run_dir / folder, lambda item: staged(item.caption), suffix)
        found += [(item, text) for item, (_, text) in zip(each.items, done, strict=True)]
    return found


def captions_read_otherwise(captions: list[tuple[Item, str]], python: Path, checkout: Path) -> list[str]:
    """The names of images whose caption ai-toolkit will read as something else than it is, by its own code."""
    command = [str(python), "-I", "-c", _READ_CAPTIONS, str(checkout / "toolkit" / "ideogram_caption.py")]
    texts = json.dumps([text for _, text in captions])
    done = subprocess.run(command, input=texts, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"ai-toolkit's caption rules cannot be asked what they make of the captions: {last}")
    read = json.loads(done.stdout)
    return [item.image.name for (item, _), text in zip(captions, read, strict=True) if text != item.caption]


def warning_about_captions(names: list[str], extension: str) -> str:
    """One sentence for captions that are read otherwise."""
    some = ", ".join(names[:_TOLD]) + (" …" if len(names) > _TOLD else "")
    how = (
        "ai-toolkit rewrites them after Ideogram's rules, or puts a space after each comma where they are no "
        "captions by "
        "these; `loraport dataset check` says what is wrong"
        if extension == "json"
        else "a comma without a space after it gains one"
    )
    return f"{len(names)} of the captions are read otherwise than written ({some}): {how}."


def write_job(
    spec: TrainSpec, sets: list[TrainedSet], run_dir: Path, family: Family, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Complete the configuration with what only the disk knows, and write it as ai-toolkit will read it.

    `tell` hears what a person should know. Raises DataError when the checkpoint cannot be what ai-toolkit reads.
    """
    config = parse_yaml((run_dir / layout.CONFIG).read_text(encoding="utf-8"), layout.CONFIG)
    config.pop(OWN)
    process = config["config"]["process"][0]
    for entry, each in zip(process["datasets"], sets, strict=True):
        entry["num_repeats"] = each.repeats
    model = process["model"]
    if model["name_or_path"] == "tiny":
        model["name_or_path"] = layout.TINY
        write_tiny_checkpoint(run_dir / layout.TINY)
    base = run_dir / model["name_or_path"]
    if base.is_dir():
        _check_checkpoint(base)
        local = _local_text_encoder(base, run_dir)
        if model["model_kwargs"]["text_encoder_path"] == TEXT_ENCODER:
            if local is None:
                tell(f"{base} holds no text encoder in bf16; ai-toolkit takes {TEXT_ENCODER} from the hub (17 GB).")
            else:
                model["model_kwargs"]["text_encoder_path"] = local
    if spec.validation.every:
        process["train"]["validation_config"]["validation_items"] = _validation_items(spec, run_dir, family)
    # ai-toolkit puts environment variables where a configuration says ${NAME}; JSON can say it otherwise.
    text = json.dumps(config, indent=2, ensure_ascii=False).replace("${", "\\u0024{")
    write_atomic(run_dir / layout.JOB, text + "\n")
    return model


def is_local(model: dict[str, Any], run_dir: Path) -> bool:
    """Whether nothing of the model has to come from the hub."""
    text_encoder = Path(model["model_kwargs"]["text_encoder_path"])
    return (run_dir / model["name_or_path"]).is_dir() and (run_dir / text_encoder).is_dir()


def _readable(item: Item, folder: Path, number: int) -> Item:
    """The item, or a copy of its image that ai-toolkit sees as LoraPort does: 8 bits, transparency on white."""
    with Image.open(item.image) as image:
        same = image.mode in ("RGB", "L") and not image.has_transparency_data
    if same and item.image.suffix.lower() in _READ:
        return item
    target = folder / f"{number:05d}.png"
    if not target.is_file() or target.stat().st_mtime < item.image.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as draft:
            load_image(item).save(draft, format="PNG")
    return replace(item, image=target)


def _validation_items(spec: TrainSpec, run_dir: Path, family: Family) -> list[dict[str, str]]:
    items = held_out_items(spec, family)
    readable = [_readable(item, run_dir / layout.CONVERTED / "validation", n) for n, item in enumerate(items, 1)]
    done = stage(readable, run_dir / layout.VALIDATION, lambda item: staged(item.caption), ".txt")
    return [
        {"image_path": str(path.relative_to(run_dir)), "prompt": item.caption}
        for item, (path, _) in zip(items, done, strict=True)
    ]


def _check_checkpoint(base: Path) -> None:
    """Raise DataError unless a folder holds the official layout's transformer and VAE."""
    for part in ("transformer", "vae"):
        files = [base / part / f"diffusion_pytorch_model.safetensors{end}" for end in ("", ".index.json")]
        if not any(file.is_file() for file in files):
            raise DataError(
                f"The checkpoint {base} lacks {part}/diffusion_pytorch_model.safetensors.",
                hint="ai-toolkit needs the official layout, such as a download of ideogram-ai/ideogram-4-fp8.",
            )
    if any(".to_q." in name for name in _tensor_names(base / "transformer")):
        raise DataError(
            f"The checkpoint {base} is in diffusers' layout, with q, k and v apart; ai-toolkit reads the "
            f"official one only.",
            hint="Give the official checkpoint, or train this one with the native backend.",
        )


def _local_text_encoder(base: Path, run_dir: Path) -> str | None:
    """Lay a folder's text encoder and tokenizer out as one, as ai-toolkit loads them; None where it cannot load it.

    It would take fp8 rows for the weights themselves and leave their scales aside.
    """
    source = base / "text_encoder"
    if not source.is_dir() or any(name.endswith("_scale") for name in _tensor_names(source)):
        return None
    folder = run_dir / layout.TEXT_ENCODER
    folder.mkdir(parents=True, exist_ok=True)
    for file in [*sorted(source.iterdir()), *sorted((base / "tokenizer").glob("*"))]:
        link = folder / file.name
        if not link.is_symlink():
            link.symlink_to(file.resolve())
    return str(layout.TEXT_ENCODER)


def _tensor_names(folder: Path) -> list[str]:
    """The names of all tensors in a folder's safetensors files."""
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                names += json.loads(file.read(min(length, os.path.getsize(path))))
        except (OSError, struct.error, ValueError) as error:
            raise DataError(f"{path} is damaged or cannot be read.") from error
    return names
