"""Fixed captions written: into a folder of their own with the images, or over the old ones, which are kept aside."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from loraport.errors import RunFolderError
from loraport.files import write_atomic
from loraport_dataset.fixing.dataset import FixedImage
from loraport_dataset.fixing.folders import Images, is_readable, left_out, new_dataset, place_image, write_text

ORIGINALS = ".originals"


def into_new_folder(results: Iterable[FixedImage], source: Path, out: Path, images: Images) -> Iterator[FixedImage]:
    """Write every image with its caption, changed or not, to `out`, which appears when all of them are there.

    Captions that cannot be decoded are taken over as they are; images that cannot be read are left out, with a finding.
    Raises DataError and RunFolderError; nothing stays then.
    """
    with new_dataset(source, out) as draft:
        for result in results:
            image = result.image
            if problems := left_out(image):
                yield replace(result, left=(*result.left, *problems))
                continue
            place_image(image.path, draft / image.name, images)
            if image.caption is not None and result.fixed is not None:
                write_text(draft / image.caption.name, result.fixed.text)
            elif image.caption is not None:
                caption, target = source / image.caption.name, draft / image.caption.name
                if is_readable(caption) and not target.exists():  # an image of the same name may have brought it
                    place_image(caption, target, "copy")
            yield result


def in_place(results: Iterable[FixedImage], folder: Path) -> Iterator[FixedImage]:
    """Write changed captions over the old ones, each in one step; the old one is copied to `.originals/N/` before.

    Hidden folders are no part of a dataset. N counts up, so that no original is ever written over. Raises
    RunFolderError.
    """
    aside: Path | None = None
    for result in results:
        caption, fixed = result.image.caption, result.fixed
        if caption is not None and fixed is not None and fixed.changes:
            aside = aside or _new_folder(folder / ORIGINALS)
            file = result.image.path.parent / caption.name.rpartition("/")[2]
            try:
                (aside / caption.name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, aside / caption.name)
            except OSError as error:
                raise _cannot_keep(aside, error) from error
            write_atomic(file, fixed.text)
        yield result


def _new_folder(parent: Path) -> Path:
    number = 1
    while True:
        try:
            (parent / str(number)).mkdir(parents=True)
            return parent / str(number)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise _cannot_keep(parent, error) from error


def _cannot_keep(place: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"The originals cannot be kept in {place}: {error.strerror or error}.",
        hint="Nothing more was changed. Give -o OUT to write a new folder.",
    )
