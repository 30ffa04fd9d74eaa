"""Writing files so that a crash leaves either the old content or the new, never half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from loraport.errors import RunFolderError

_synced_by_caller: ContextVar[bool] = ContextVar("synced_by_caller", default=False)


@contextmanager
def synced_by_caller() -> Iterator[None]:
    """Have files written here without waiting for the disk: the caller syncs them, perhaps while it does more."""
    token = _synced_by_caller.set(True)
    try:
        yield
    finally:
        _synced_by_caller.reset(token)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path`; on a clean exit sync it, but within `synced_by_caller`, and rename it over
    `path`.

    Raises RunFolderError when the place cannot be written (read-only, full, not a folder).
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        if not _synced_by_caller.get():
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path | str, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `path` as one step. Raises RunFolderError when it cannot."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _cannot_write(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path} cannot be written: {error.strerror or error}.",
        hint="Free some space or choose a folder you can write to with --out; what was there before is unchanged.",
    )


def cache_home() -> Path:
    """Where what can be had again is kept: $LORAPORT_CACHE, else $XDG_CACHE_HOME/loraport, else ~/.cache/loraport."""
    chosen = os.environ.get("LORAPORT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loraport"
