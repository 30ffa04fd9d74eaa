"""Fetching the parts of a checkpoint from the Hugging Face hub, with its refusals in plain words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loraport.errors import DataError

_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja")


def download(repo: str, revision: str | None, parts: Iterable[str]) -> tuple[Path, str]:
    """Fetch the folders `parts` of a model repository into the hub's cache; return its path and commit.

    Raises DataError when the repository or revision does not exist, asks for a licence not yet accepted, or
    cannot be reached.
    """
    try:
        root = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=[f"{part}/{files}" for part in parts for files in _FILES]
        )
    except GatedRepoError as error:  # before RepositoryNotFoundError, which it is a kind of
        raise DataError(
            f"The checkpoint {repo} is gated and this account has no access to it.",
            hint=f"Accept its licence at https://huggingface.co/{repo}, then run `hf auth login`.",
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(f"The checkpoint {repo} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"The hub has no model {repo}, or it is private.",
            hint="Check the spelling; for a private one run `hf auth login`; a folder must exist.",
        ) from error
    except LocalEntryNotFoundError as error:
        raise DataError(
            f"The checkpoint {repo} is not in the hub's cache and the hub cannot be reached.",
            hint="Unset HF_HUB_OFFLINE or fix the connection; or give the folder of a copy you already have.",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise DataError(f"The checkpoint {repo} could not be downloaded: {error}") from error
    return Path(root), Path(root).name
