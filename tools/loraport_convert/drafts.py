"""The hidden folder in which an output is written until it is proven, and the end of it, whatever happens."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loraport.errors import RunFolderError
from loraport_convert.stopping import undivided

_LONGEST_NAME = 40
_SUFFIX = ".tmp"


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside the output, which goes with all that is in it. The output's own folder is made for it.

    It is locked for as long as this process lives, so that the folder of one that was killed is known and taken away by
    the next that writes the same output. Raises RunFolderError for whatever cannot be written until its end.
    """
    made, folder, lock = False, None, None
    try:
        with undivided():
            made = not path.parent.exists()
            path.parent.mkdir(exist_ok=True)
            _take_away_the_killed(path)
            folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=_SUFFIX))
            lock = _locked(folder)
        yield folder
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be written: {error.strerror or error}.",
            hint="Free some space or choose another -o OUT; what was there before is unchanged.",
        ) from error
    finally:
        with undivided():
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)
            if made:
                with suppress(OSError):  # it holds the output
                    path.parent.rmdir()


def _prefix(path: Path) -> str:
    return f".{path.name[:_LONGEST_NAME]}."


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the lock of a folder, None where another process does or the file system has no locks.

    Symbolic links are not followed. The kernel gives the lock back when the process ends, however it does.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _take_away_the_killed(path: Path) -> None:
    """Remove the drafts of this output whose process is gone. An empty folder may be about to be locked and stays."""
    prefix = _prefix(path)
    drafts = [each for each in path.parent.iterdir() if each.name.startswith(prefix) and each.name.endswith(_SUFFIX)]
    for draft in drafts:
        lock = _locked(draft)
        if lock is None:
            continue
        try:
            if os.listdir(lock):
                shutil.rmtree(draft, ignore_errors=True)
        finally:
            os.close(lock)
