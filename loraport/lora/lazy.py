"""Modules that are read from disk when asked for, so that a LoRA of any size fits in the memory of its largest
modules; and reading, or comparing, the next ones in threads meanwhile. numpy and the disk let other threads run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Self, TypeVar

from loraport.lora.canonical import LoraModule

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")

WORKERS = 2  # each holds a module or two; more would wait for the disk
_WORTH_A_THREAD = 1 << 20  # bytes; handing over less takes longer than it saves
_AT_ONCE = 16  # names that a worker takes at a time


class LazyModules(Mapping[str, LoraModule]):
    """Builds a module each time it is asked for and keeps none. What is wrong with its numbers is raised then.

    Builders may be called by several threads at once.
    """

    def __init__(self, builders: Mapping[str, Callable[[], LoraModule]]):
        self._builders = builders

    def __getitem__(self, name: str) -> LoraModule:
        module = self._builders[name]()
        assert module.name == name
        return module

    def __iter__(self) -> Iterator[str]:
        return iter(self._builders)

    def __len__(self) -> int:
        return len(self._builders)

    def __contains__(self, name: object) -> bool:
        return name in self._builders


class ReadAhead(Mapping[str, LoraModule]):
    """The same modules, where the next one is built in a thread while the one before is used. `given` is the name of
    the one that was asked for last. To be used as a context manager, by one thread."""

    def __init__(self, modules: Mapping[str, LoraModule]):
        from concurrent.futures import ThreadPoolExecutor  # slow to import, and `loraport inspect` needs none

        self.given: str | None = None
        self._modules = modules
        self._after = dict(pairwise(modules))
        self._next: dict[str, Future[LoraModule]] = {}
        self._thread = ThreadPoolExecutor(1, "read-ahead")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __getitem__(self, name: str) -> LoraModule:
        self.given = name
        built = self._next.pop(name, None)
        module = self._modules[name] if built is None else built.result()
        if name in self._after and _size(module) > _WORTH_A_THREAD:
            following = self._after[name]
            self._next = {following: self._thread.submit(self._modules.__getitem__, following)}
        return module

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, name: object) -> bool:
        return name in self._modules


def side_by_side(work: Callable[[str], T], names: Sequence[str]) -> Iterator[T]:
    """`work` of each name, in order, done for `WORKERS` names at a time."""
    from concurrent.futures import ThreadPoolExecutor

    def some(start: int) -> list[T]:
        return [work(name) for name in names[start : start + at_once]]

    at_once = max(1, min(_AT_ONCE, len(names) // (4 * WORKERS)))
    with ThreadPoolExecutor(WORKERS, "side-by-side") as pool:
        try:
            for done in pool.map(some, range(0, len(names), at_once)):
                yield from done
        finally:
            pool.shutdown(cancel_futures=True)


def _size(module: LoraModule) -> int:
    return sum(array.nbytes for array in module.factors.arrays().values())
