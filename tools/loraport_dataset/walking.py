"""The files of a dataset folder, one subfolder at a time: however many there are, one folder's names are in memory.

The same files as `loraport.dataset` finds: hidden ones are skipped, links are followed, a folder is searched once.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loraport.images import IMAGE_EXTENSIONS

CAPTION_EXTENSIONS = ("json", "txt", "caption")
#: Images of formats that no trainer here reads. A person who has them in the folder takes them for a part of the set.
OTHER_IMAGES = ("svg", "svgz", "heic", "heif", "avif", "gif", "jxl", "psd", "xcf", "raw", "cr2", "nef", "dng", "ico")


@dataclass
class FolderListing:
    """What one folder holds. Names are as the file system has them."""

    path: Path
    prefix: str  #: the folder's name within the dataset, with `/` at its end; empty for the dataset itself
    images: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  #: images of formats that are not read
    faults: list[tuple[str, str]] = field(default_factory=list)  #: (name, why it cannot be looked at)


@dataclass
class FileCounts:
    """How many files a dataset has, by names alone."""

    images: int = 0
    captions: Counter[str] = field(default_factory=Counter)  #: by extension; those of an image's name


def walk(root: Path) -> Iterator[FolderListing]:
    """Each folder that can be read, parents first, in the order of names; `root` must be a folder."""
    visited: set[tuple[int, int]] = set()
    waiting: list[tuple[Path, str]] = [(root, "")]
    while waiting:
        path, prefix = waiting.pop()
        listing = FolderListing(path, prefix)
        subfolders: list[str] = []
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    _sort_in(entry, listing, subfolders)
        except OSError as error:
            listing.faults.append(("", error.strerror or str(error)))
        for names in (listing.images, listing.captions, listing.others):
            names.sort()
        yield listing
        waiting += [(path / name, f"{prefix}{name}/") for name in sorted(subfolders, reverse=True)]


def _sort_in(entry: os.DirEntry[str], listing: FolderListing, subfolders: list[str]) -> None:
    if entry.name.startswith("."):
        return
    try:
        if entry.is_dir():
            subfolders.append(entry.name)
            return
    except OSError as error:  # a link that leads to itself
        listing.faults.append((entry.name, error.strerror or str(error)))
        return
    extension = entry.name.rpartition(".")[2].lower() if "." in entry.name else ""
    if extension in IMAGE_EXTENSIONS:
        listing.images.append(entry.name)
    elif extension in CAPTION_EXTENSIONS:
        listing.captions.append(entry.name)
    elif extension in OTHER_IMAGES:
        listing.others.append(entry.name)


def count_files(root: Path) -> FileCounts:
    """Images, and captions with the name of an image, by extension. Looks at names alone."""
    counts = FileCounts()
    for listing in walk(root):
        counts.images += len(listing.images)
        stems = {stem(name) for name in listing.images}
        counts.captions.update(extension(name) for name in listing.captions if stem(name) in stems)
    return counts


def stem(name: str) -> str:
    """A file's name without its extension, as trainers cut it."""
    return name.rpartition(".")[0]


def extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def alike(name: str) -> str:
    """What names that a person takes for the same have in common: whatever their letter case or Unicode form."""
    return unicodedata.normalize("NFC", name).casefold()
