"""Datasets of the Hugging Face hub, `hub:owner/name[@revision]`, as folders of images on this disk.

A repository is read as an image folder (images, with caption files or metadata beside them) or, where it has none, as
parquet files with images in them. Of several splits, `train` alone is trained. A run keeps the commit it began with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loraport.caption_sources import METADATA, read_columns
from loraport.errors import DataError
from loraport.files import cache_home, write_atomic
from loraport.images import IMAGE_EXTENSIONS
from loraport.preflight import check_captions
from loraport.spec.models import HUB_ID, TrainSpec

PREFIX = "hub:"
PINS = "datasets.json"  #: in the run folder: the commit of each dataset of the hub
TEXT = "text"  #: the column of captions when the spec names none, as in the hub's own image folders

_CAPTIONS = ("txt", "caption", "json")
_SPLITS = ("train", "data/train")


@dataclass(frozen=True)
class Fetched:
    """A dataset of the hub on this disk: its folder, its commit, and the column of its captions, if they are in one."""

    folder: Path
    commit: str
    caption_field: str | None


def on_disk(spec: TrainSpec, run_dir: Path | None, tell: Callable[[str], None] = print) -> TrainSpec:
    """The spec with every dataset of the hub downloaded, and its folder in place of its id.

    In `run_dir`, `datasets.json` keeps each one's commit, and a resumed run takes that one again. `tell` hears what was
    found. Raises DataError for a dataset that does not exist, is gated, cannot be reached, or holds no images; of a run
    also what `loraport.preflight.check_captions` raises, which could not read these before.
    """
    content = spec.model_dump(mode="json")
    dataset = content["dataset"]
    places: list[dict[str, Any]] = [dataset, *dataset["sets"], dataset["regularization"], content["validation"]]
    places = [place for place in places if str(place["path"]).startswith(PREFIX)]
    if not places:
        return spec
    pins = _read_pins(run_dir)
    for place in places:
        name = place["path"]
        in_files = place in dataset["sets"] and place["caption_ext"] is not None and place["caption_field"] is None
        field = None if in_files else place.get("caption_field") or dataset["caption_field"]
        fetched = fetch(name, pins.get(name), field, in_files)
        if pins.get(name) != fetched.commit:
            pins[name] = fetched.commit
            if run_dir is not None:
                write_atomic(run_dir / PINS, json.dumps(pins, indent=2) + "\n")
        tell(f"{name} is at commit {fetched.commit}, in {fetched.folder}")
        place["path"] = str(fetched.folder)
        if "caption_field" in place:
            place["caption_field"] = fetched.caption_field
    try:
        here = TrainSpec.model_validate(content)
    except ValidationError as error:  # two names may turn out to be one commit
        told = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise DataError(f"The datasets do not go together as they are on the hub now: {told}.") from error
    if run_dir is not None:
        for warning in check_captions(here):
            tell(f"warning: {warning}")
    return here


def fetch(
    name: str, commit: str | None = None, caption_field: str | None = None, caption_files: bool = False
) -> Fetched:
    """Download a dataset (`hub:owner/name[@revision]`) into the hub's cache, or find it there.

    commit: the one to take instead of the name's revision. caption_field: the column of captions, by default `text`
    where there is one, unless `caption_files` are wanted and there are images that these can be beside. Raises
    DataError as `on_disk` does.
    """
    match = HUB_ID.fullmatch(name)
    assert match is not None, f"{name} is no dataset of the hub"
    repo, revision = match["repo"], commit or match["revision"]
    root = _download(repo, revision)
    folder = next((root / split for split in _SPLITS if _has_images(root / split)), root)
    if _has_images(folder):
        if caption_field is None and not caption_files and TEXT in read_columns(folder):
            caption_field = TEXT
        return Fetched(folder, root.name, caption_field)
    parquet = _parquet_files(root)
    if not parquet:
        raise DataError(
            f"The dataset {name} holds neither images nor parquet files.",
            hint="Download and unpack it, and give its folder as the path.",
        )
    from loraport.parquet_images import unpack

    field = caption_field or TEXT
    target = cache_home() / "datasets" / repo.replace("/", "--") / root.name / field
    return Fetched(unpack(parquet, field, target, name), root.name, field)


def _download(repo: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise DataError(
            f"hub:{repo} needs huggingface_hub, which is not installed.", hint="pip install 'loraport[hub]'"
        ) from error
    extensions = [*IMAGE_EXTENSIONS, *(one.upper() for one in IMAGE_EXTENSIONS), *_CAPTIONS, "parquet"]
    wanted = [*(f"*.{extension}" for extension in extensions), *(f"*{name}" for name in METADATA)]
    with _explained(repo, revision):
        return Path(
            huggingface_hub.snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=wanted)
        )


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """What the hub refuses, as DataError in plain words."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:  # before RepositoryNotFoundError, which it is a kind of
        raise DataError(
            f"The dataset hub:{repo} is gated and this account has no access to it.",
            hint=f"Accept its terms at https://huggingface.co/datasets/{repo}, then run `hf auth login`.",
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(f"The dataset hub:{repo} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"The hub has no dataset {repo}, or it is private.",
            hint="Check the spelling; for a private one run `hf auth login`.",
        ) from error
    except LocalEntryNotFoundError as error:
        raise DataError(
            f"The dataset hub:{repo} is not in the hub's cache and the hub cannot be reached.",
            hint="Unset HF_HUB_OFFLINE or fix the connection; or give the folder of a copy you already have.",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise DataError(f"The dataset hub:{repo} could not be downloaded: {error}") from error


def _has_images(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return any(Path(file).suffix[1:].lower() in IMAGE_EXTENSIONS for _, _, files in os.walk(folder) for file in files)


def _parquet_files(root: Path) -> list[Path]:
    """The files of the train split; of a dataset without one, all."""
    files = sorted(root.rglob("*.parquet"))
    train = [file for file in files if file.name.startswith("train") or file.parent.name == "train"]
    return train or files


def _read_pins(run_dir: Path | None) -> dict[str, str]:
    if run_dir is None or not (run_dir / PINS).is_file():
        return {}
    try:
        pins = json.loads((run_dir / PINS).read_text(encoding="utf-8"))
        return {str(name): str(commit) for name, commit in pins.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{run_dir / PINS} is damaged, which says what data the run began with: {error}",
            hint="Take the file away to train on the datasets as they are now.",
        ) from error
