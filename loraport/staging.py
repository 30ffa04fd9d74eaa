"""A dataset laid out for a trainer that reads, or writes into, a folder of its own: the user's is never written to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from loraport.dataset import Item
from loraport.errors import BackendError
from loraport.files import write_atomic


def stage(items: list[Item], folder: Path, caption: Callable[[Item], str], suffix: str) -> list[tuple[Path, str]]:
    """Fill `folder` with the images as links and their captions as files `<image's stem><suffix>`.

    Images are named 00001.jpg, 00002.png, … in order, so no name of the user's can trip a trainer; where links can't be
    made they are copies. Captions must be one line, which is how every trainer reads them. Files that are right already
    stay, so caches beside them stay valid; images of an earlier layout are removed. Returns (image, caption) pairs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staged: list[tuple[Path, str]] = []
    for number, item in enumerate(items, start=1):
        target = folder / f"{number:05d}{item.image.suffix.lower()}"
        for stale in folder.glob(f"{number:05d}.*"):
            if stale != target and stale.suffix != suffix:
                stale.unlink()
        _link(item.image, target)
        text = caption(item)
        assert "\n" not in text, f"the caption of {item.image} has several lines"
        file = target.with_suffix(suffix)
        if not (file.is_file() and file.read_text(encoding="utf-8") == text):
            write_atomic(file, text)
        staged.append((target, text))
    for extra in folder.iterdir():
        if extra.stem.isdigit() and len(extra.stem) == 5 and int(extra.stem) > len(items):
            extra.unlink()
    return staged


def write_tiny_checkpoint(folder: Path) -> None:
    """A random Ideogram 4 of a few megabytes in the official layout at `folder`, unless it is there.

    By the command `loraport tiny`, which the native trainer brings; raises BackendError where it cannot.
    """
    if folder.is_dir():
        return
    command = [sys.executable, "-m", "loraport.cli.main", "tiny", "ideogram4", str(folder), "--layout", "official"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise BackendError(
            f"The tiny checkpoint could not be written: {''.join(last)}",
            hint="`loraport tiny` makes it, which needs: pip install 'loraport[native]'",
        )


def _link(source: Path, target: Path) -> None:
    source = source.resolve()
    if target.is_symlink() and Path(os.readlink(target)) == source:
        return
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(source)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
