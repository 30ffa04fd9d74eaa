"""What was seen to be in a file while it was written, so that the proof need not read all of it once more."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from loraport.lora.ondisk import OnDisk
from loraport.lora.storage import Stored

# A time of change, in ns, that no later write to a file gives it unless the clock is wrong by decades.
_STAMP = 1_000_000_001


class Witness:
    """Of the last file that was written, which arrays on disk were copied to which place, every block of them having
    been read back and compared right after it was written. Any later change to the file makes it know nothing."""

    def __init__(self) -> None:
        self._file: tuple[int, int, int] | None = None
        self._copied: Mapping[int, OnDisk] = {}

    def saw(self, descriptor: int, copied: Mapping[int, OnDisk]) -> None:
        """Remember what begins at which byte of an open file that is whole now, and mark the file."""
        os.utime(descriptor, ns=(_STAMP, _STAMP))
        self._file, self._copied = _identity(descriptor), copied

    def knows(self, source: object, written: object) -> bool:
        """Whether `written` is a tensor of that file to which `source`, as a whole, was copied."""
        if not isinstance(source, OnDisk) or not isinstance(written, Stored):
            return False
        copied = self._copied.get(written.start)
        return (
            copied is not None
            and (copied.dtype, copied.shape) == (written.dtype, written.shape)
            and copied.place == source.place
            and _identity(written.file.descriptor) == self._file
        )


_present: ContextVar[Witness | None] = ContextVar("witness", default=None)


@contextmanager
def witnessed() -> Iterator[Witness]:
    """Have what is written here be seen by a witness."""
    token = _present.set(Witness())
    try:
        witness = _present.get()
        assert witness is not None
        yield witness
    finally:
        _present.reset(token)


def witness_present() -> Witness | None:
    """The witness of what is being written, if there is one."""
    return _present.get()


def _identity(descriptor: int) -> tuple[int, int, int]:
    stat = os.fstat(descriptor)
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns
