"""What is to be checked: a folder with what is said of it on the command line, or every dataset of a spec."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.errors import DataError, SpecError, unknown
from loraport.rules import Setting
from loraport_dataset.walking import CAPTION_EXTENSIONS, FileCounts, count_files

if TYPE_CHECKING:
    from loraport.families import Family
    from loraport.sets import ImageSet
    from loraport.spec.models import TrainSpec
    from loraport_dataset.tokens import TokenCounter

_STEP = 16  #: pixels, of `dataset.resolution` in a spec


@dataclass(frozen=True)
class Source:
    """A folder of images, where it is named, and what it is to be used for."""

    folder: Path
    title: str  #: `dataset`, or its place in the spec
    setting: Setting
    images: int = 0  #: files that are images by their names
    tokens: str = ""  #: how captions are counted
    texts: Mapping[Path, str] | None = None  #: captions by image, where they are out of metadata


@dataclass(frozen=True)
class Said:
    """What the command line says of a folder; a spec says it by itself."""

    family: str | None = None
    checkpoint: str | None = None
    caption_ext: str | None = None
    resolution: int | None = None
    trigger_word: str | None = None


def folder_source(folder: Path, said: Said | None = None) -> Source:
    """A folder as a source: what is not said is as in a spec, and captions have the extension that most of them have.

    Raises DataError for a folder that is not there or has no images, SpecError for a family that is not installed, an
    empty trigger word, and a resolution that no spec takes.
    """
    from loraport.spec.models import DatasetSection, ModelSection

    said = said or Said()
    if said.trigger_word is not None and not said.trigger_word.strip():
        raise SpecError("--trigger-word is empty.", hint="Leave it out, or give the word.")
    if said.resolution is not None and said.resolution % _STEP:
        nearest = max(1, round(said.resolution / _STEP)) * _STEP
        raise SpecError(f"--resolution {said.resolution} is no multiple of {_STEP}.", hint=f"The nearest is {nearest}.")
    family = find_family(said.family or ModelSection.model_fields["family"].default)
    fields = DatasetSection.model_fields
    counts = _counted(folder)
    counter = _counter(said.checkpoint or family.checkpoint, None)
    setting = Setting(
        family,
        caption_ext=said.caption_ext or _usual_extension(counts, family),
        resolution=said.resolution or fields["resolution"].default,
        trigger_word=said.trigger_word,
        max_text_tokens=fields["max_text_tokens"].default,
        count_tokens=counter.count if counter.exact else None,
    )
    return Source(folder, "dataset", setting, counts.images, counter.source)


def spec_sources(spec: TrainSpec) -> list[Source]:
    """Every dataset of a spec: those that are trained, and the folder of held-out images.

    Raises what `loraport.families.check_family` and `loraport.hub_datasets` raise, and DataError for a folder that is
    not there or has no images.
    """
    from loraport.families import check_family
    from loraport.plugins import plugins
    from loraport.sets import image_sets, subject

    family = check_family(spec, plugins().families())
    counter = _counter(spec.model.checkpoint, spec.model.revision)
    sets = image_sets(spec.dataset)
    if spec.validation.every and spec.validation.path is not None:
        sets.append(replace(subject(spec.dataset), field="validation", path=spec.validation.path))
    words = tuple(dict.fromkeys(one.trigger_word for one in sets if one.trigger_word and not one.regularization))
    return [_set_source(one, spec, family, counter, words if one.regularization else ()) for one in sets]


def _set_source(
    one: ImageSet, spec: TrainSpec, family: Family, counter: TokenCounter, foreign_words: tuple[str, ...]
) -> Source:
    from loraport.caption_sources import read_column

    counts = _counted(one.path, f" ({one.field})")
    setting = Setting(
        family,
        caption_ext=one.caption_ext,
        resolution=one.resolution,
        upscale=spec.dataset.upscale,
        aspect_buckets=spec.dataset.aspect_buckets,
        trigger_word=one.trigger_word,
        default_caption=one.default_caption,
        max_text_tokens=spec.dataset.max_text_tokens,
        count_tokens=counter.count if counter.exact else None,
        foreign_words=foreign_words,
    )
    texts = None if one.caption_field is None else read_column(one.path, one.caption_field)
    return Source(one.path, one.field, setting, counts.images, counter.source, texts)


def _counted(folder: Path, place: str = "") -> FileCounts:
    if not folder.exists():
        raise DataError(f"The dataset {folder}{place} is not there.", hint="Name a folder of images, or a spec.")
    if not folder.is_dir():
        of_a_spec = folder.suffix.lower() in (".yaml", ".yml") and not place
        raise DataError(
            f"The dataset {folder}{place} is a file, not a folder of images.",
            hint="This command takes one folder at a time: name one that the spec names."
            if of_a_spec
            else "Name the folder that the images are in.",
        )
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DataError(f"The dataset {folder}{place} cannot be read: no permission.")
    counts = count_files(folder)
    if not counts.images:
        raise DataError(
            f"The dataset {folder}{place} has no images.",
            hint="Looked for JPEG, PNG, WebP, BMP and TIFF files, in subfolders too.",
        )
    return counts


def _usual_extension(counts: FileCounts, family: Family) -> str:
    """The extension that most captions have; the family's own where equal."""
    own = "json" if family.caption_format == "json" else "txt"
    return max(sorted(CAPTION_EXTENSIONS, key=lambda name: name != own), key=lambda name: counts.captions[name])


def find_family(name: str) -> Family:
    """The installed family of that name. Raises SpecError with the choices."""
    from loraport.plugins import plugins

    families = plugins().families()
    if name not in families:
        raise SpecError(unknown("The family", name, families))
    return families[name]


def _counter(checkpoint: str, revision: str | None) -> TokenCounter:
    from loraport_dataset.tokens import token_counter

    return token_counter(checkpoint, revision)
