"""Options that the commands which write captions share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from loraport_dataset.sources import Source

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder with the images, searched with its subfolders.")
]
OutFolder = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="OUT", help="The new folder: images with their captions.")
]
TriggerWord = Annotated[
    str | None, typer.Option("--trigger-word", metavar="WORD", help="Put it into the captions that lack it.")
]
CaptionExt = Annotated[
    Literal["json", "txt", "caption"] | None,
    typer.Option("--caption-ext", help="Extension of the caption files; that of most when left out."),
]
FamilyName = Annotated[
    str | None, typer.Option("--family", metavar="NAME", help="Model family of the captions; ideogram4 when left out.")
]
ImagesOption = Annotated[
    Literal["copy", "hardlink", "symlink"], typer.Option("--images", help="How the images come into OUT.")
]


def read_folder(folder: Path, family: str | None, caption_ext: str | None, trigger_word: str | None) -> Source:
    """The folder with what it is for; without `caption_ext`, captions have the extension that most of them have.

    Raises DataError for what is no folder of images, SpecError for an unknown family or an empty trigger word.
    """
    from loraport_dataset.sources import Said, folder_source

    said = Said(family=family, caption_ext=caption_ext, trigger_word=trigger_word)
    return folder_source(folder, said)
