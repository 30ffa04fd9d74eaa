"""What is computed once and kept: files named by a hash of everything they depend on, so none is ever stale."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraport.errors import DataError, RunFolderError
from loraport.files import atomic_path, cache_home

#: Raised whenever the code that fills the cache gives other numbers for the same input.
CODE_VERSION = 2


def cache_folder() -> Path:
    """Where features are kept."""
    return cache_home() / "features"


def key(*parts: bytes | str | int | tuple[int, ...]) -> str:
    """SHA-256, hex, of the parts in order. No two different lists of parts are joined to the same bytes."""
    digest = hashlib.sha256()
    for part in (CODE_VERSION, *parts):
        data = part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass")
        digest.update(f"{type(part).__name__}:{len(data)}:".encode() + data)
    return digest.hexdigest()


class Store:
    """A folder of safetensors files, by kind and key. Safe to share between runs: entries appear whole."""

    def __init__(self, root: Path, on_damage: Callable[[Path], None] = lambda path: None):
        """`on_damage` is told each damaged entry, which is then removed and counts as missing."""
        self.root = root
        self._on_damage = on_damage

    def path(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        """Whether the entry is there and whole: its header agrees with its length."""
        path = self.path(kind, key)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt"):
                return True
        except (SafetensorError, OSError):
            self._on_damage(path)
            path.unlink(missing_ok=True)
            return False

    def read(self, kind: str, key: str) -> dict[str, Tensor]:
        """The entry's tensors, on the CPU. Raises DataError when it is gone or damaged since `has`."""
        path = self.path(kind, key)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"The cached file {path} cannot be read: {error}.", hint="Start again: it will be computed anew."
            ) from error

    def write(self, kind: str, key: str, tensors: dict[str, Tensor]) -> None:
        """Write an entry in one step. Raises RunFolderError when the cache folder is full or not writable."""
        path = self.path(kind, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        except (OSError, SafetensorError, RunFolderError) as error:
            reason = error.message if isinstance(error, RunFolderError) else f"{path}: {error}."
            raise RunFolderError(
                f"The cache cannot be written. {reason}",
                hint="Free some space, or set LORAPORT_CACHE to a folder with room.",
            ) from error

    def hold(self, entries: Iterable[tuple[str, str]], budget: int, pinned: bool) -> dict[tuple[str, str], Tensor]:
        """Read entries (kind, key) of one tensor, named as their kind, into host memory, in order, within a budget.

        budget: bytes; what comes when they are spent is left out. pinned: in memory that a CUDA device copies from by
        itself; torch takes it in powers of two, and so it is counted. Raises DataError as `read` does.
        """
        held: dict[tuple[str, str], Tensor] = {}
        for kind, key in dict.fromkeys(entries):
            tensor = self.read(kind, key)[kind]
            budget -= 1 << (tensor.nbytes - 1).bit_length() if pinned else tensor.nbytes
            if budget < 0:
                break
            # A copy either way: what `read` gives is a view of the mapped file.
            held[kind, key] = tensor.pin_memory() if pinned else tensor.clone()
        return held

    def size(self, entries: Iterable[tuple[str, str]]) -> int:
        """Bytes on disk of the entries (kind, key) that are there; one given twice counts once."""
        paths = {self.path(kind, key) for kind, key in entries}
        return sum(path.stat().st_size for path in paths if path.exists())
