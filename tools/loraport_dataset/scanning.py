"""From a folder to its images with their captions: streamed, nothing raised for one file, nothing written.

Headers and captions are read, pixels are not. What is wrong with a file is part of its record, for the rules to tell.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.caption_json import make_caption
from loraport.dataset import MAX_CAPTION_BYTES
from loraport.images import FileProblem, open_image, orientation
from loraport.rules import Caption, ScannedImage, Setting, StrayFile
from loraport_dataset.walking import FolderListing, alike, extension, stem, walk

if TYPE_CHECKING:
    from PIL import Image

_UNICODE_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def scan(root: Path, setting: Setting, texts: Mapping[Path, str] | None = None) -> Iterator[ScannedImage | StrayFile]:
    """Every image under `root` with its caption, then what else of each folder is of interest, in the order of names.

    texts: captions by image, where they are out of metadata and not in files.
    """
    for listing in walk(root):
        captions = set(listing.captions)
        similar: dict[str, list[str]] = {}
        for name in listing.captions if texts is None else ():
            similar.setdefault(alike(stem(name)), []).append(name)
        for name in listing.images:
            path, own, wanted = listing.path / name, listing.prefix + name, f"{stem(name)}.{setting.caption_ext}"
            caption: Caption | None = None
            meant: tuple[str, ...] = ()
            if texts is not None and path in texts:
                caption = make_caption(own, texts[path], setting.family.caption_format)
            elif texts is None and wanted in captions:
                caption = read_caption(listing.path / wanted, listing.prefix + wanted, setting)
            else:
                meant = tuple(similar.get(alike(stem(name)), ()))
                if setting.default_caption is not None:
                    caption = make_caption("", setting.default_caption, setting.family.caption_format)
            yield read_header(path, own, caption, meant)
        yield from _strays(listing, orphans=texts is None)


def _strays(listing: FolderListing, orphans: bool) -> Iterator[StrayFile]:
    stems = {alike(stem(name)) for name in listing.images}
    for name in listing.captions if orphans else ():
        if alike(stem(name)) not in stems:
            yield StrayFile(listing.path / name, listing.prefix + name, "caption")
    for name in listing.others:
        yield StrayFile(listing.path / name, listing.prefix + name, "image", extension(name))
    for name, why in listing.faults:
        yield StrayFile(listing.path / name, (listing.prefix + name).rstrip("/") or ".", "unreadable", why)


def read_header(path: Path, name: str, caption: Caption | None = None, meant: tuple[str, ...] = ()) -> ScannedImage:
    """An image's record from its header. `meant`: names of captions that are almost the one it should have."""
    size_on_disk = 0
    try:
        status = path.stat()
        size_on_disk = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise FileProblem("this is no ordinary file")
        with open_image(path) as image:
            turn = orientation(image)
            width, height = image.size
            return ScannedImage(
                path,
                name,
                size_on_disk,
                size=(height, width) if turn >= 5 else (width, height),
                stored=(width, height),
                format=image.format or "",
                mode=image.mode,
                orientation=turn,
                transparent=image.has_transparency_data,
                frames=2 if _is_animated(image) else 1,
                caption=caption,
                similar_captions=meant,
            )
    except FileProblem as problem:
        why = str(problem)
    except FileNotFoundError:
        why = "this is a link that leads nowhere"
    except OSError as error:
        why = f"the file cannot be read: {error.strerror or error}"
    except Exception as error:  # decoders raise many types over damaged files
        why = f"the image's header is damaged ({error})"
    return ScannedImage(
        path,
        name,
        size_on_disk,
        unreadable=(f"{why[0].upper()}{why[1:]}.", "Save the image anew, or take it out of the folder."),
        caption=caption,
        similar_captions=meant,
    )


def _is_animated(image: Image.Image) -> bool:
    if image.format in ("TIFF", "MPO"):  # pages and previews: the first is the picture
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # decoders raise many types over damaged files; the pixels will tell
        return False


def read_caption(path: Path, name: str, setting: Setting) -> Caption:
    """A caption file's record. At most `loraport.dataset.MAX_CAPTION_BYTES` are read; nothing is raised."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return _unreadable(name, "This is no ordinary file.", "Put a text file in its place.")
        if status.st_size > MAX_CAPTION_BYTES:
            message = f"The caption has {status.st_size:,} bytes; at most {MAX_CAPTION_BYTES:,} are read."
            return _unreadable(name, message, "Shorten it; even a long caption has but a few thousand.")
        data = path.read_bytes()
    except OSError as error:
        why = "a link that leads nowhere" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        return _unreadable(name, f"The caption cannot be read: {why}.", "Check its permissions, or write it anew.")
    seen = next((encoding for mark, encoding in _UNICODE_MARKS.items() if data.startswith(mark)), None)
    if seen is not None:
        return _unreadable(name, f"The caption is {seen.upper()}, not UTF-8.", "Save the file as UTF-8.", seen)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"The caption is not UTF-8: byte {error.start + 1} does not fit."
        return _unreadable(name, message, "Save the file as UTF-8.", "unknown")
    mark = "utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8"
    return make_caption(name, text, setting.family.caption_format, mark)


def _unreadable(name: str, message: str, fix: str, encoding: str = "") -> Caption:
    return Caption(name, "", encoding=encoding, unreadable=(message, fix))
