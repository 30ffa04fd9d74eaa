"""What the rows train on: the quickstart's photographs at the row's resolution, and the checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from loraport.errors import BackendError, DataError

_PHOTOGRAPHS = Path("examples", "quickstart", "images")


def work_folder() -> Path:
    """Where checkpoint, data and runs lie: $LORAPORT_CACHE/bench, else $XDG_CACHE_HOME or ~/.cache, loraport/bench."""
    chosen = os.environ.get("LORAPORT_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "bench"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loraport" / "bench"


def photographs(given: Path | None) -> Path:
    """The folder of photographs with JSON captions: the one given, else the quickstart's of this source tree."""
    places = [given] if given else [Path.cwd() / _PHOTOGRAPHS, Path(__file__).parents[2] / _PHOTOGRAPHS]
    for place in places:
        if any(place.glob("*.jpg")):
            return place
    raise DataError(
        f"{places[0]} holds no .jpg with captions to measure with.",
        hint="Run this in LoraPort's source tree, or name a folder with --images.",
    )


def make_dataset(source: Path, work: Path, resolution: int, text: int, checkpoint: Path) -> Path:
    """The photographs as squares of `resolution`, their captions exactly `text` tokens long; made once."""
    from PIL import Image, ImageOps

    folder = work / f"images-{checkpoint.name}-{resolution}-{text}"
    if folder.exists():
        return folder
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in sorted(source.glob("*.jpg")):
        with Image.open(file) as image:
            square = ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS)
        square.save(unfinished / f"{file.stem}.png")
        # Prose: a caption of JSON cut to a length would be a broken one.
        caption = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        words = str(caption["high_level_description"])
        (unfinished / f"{file.stem}.txt").write_text(words, encoding="utf-8")
    child([sys.executable, "-m", "loraport_native.lengthen", str(checkpoint), str(text), str(unfinished)])
    os.replace(unfinished, folder)
    return folder


def make_checkpoint(folder: Path) -> Path:
    """A random checkpoint of the real dimensions in the official fp8 layout, made once."""
    if not folder.exists():
        options = ["--size", "full", "--layout", "official", "--fp8", "--no-unconditional", "--device", "auto"]
        child([sys.executable, "-m", "loraport.cli.main", "tiny", "ideogram4", str(folder), *options])
    return folder


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The transformer's config.json. Raises DataError when there is none."""
    file = checkpoint / "transformer" / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}.", hint="It says the dimensions to measure at.") from error


def child(command: list[str], environment: dict[str, str] | None = None) -> str:
    """What a helper process of ours prints. Raises the error that it told, else BackendError with its last lines."""
    from loraport.run.errors_line import find_error

    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = done.stdout + done.stderr
        last = "\n".join([line for line in said.splitlines() if line.strip()][-6:])
        raise find_error(done.stdout) or BackendError(f"{' '.join(command[1:4])} failed ({done.returncode}):\n{last}")
    return done.stdout
