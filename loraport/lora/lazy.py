"""Modules that are read from disk when asked for, so that a LoRA of any size fits in the memory of its largest
modules; and reading, or comparing, the next ones in threads meanwhile. numpy and the disk let other threads run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Self, TypeVar

from loraport.lora.canonical import LoraModule

T = TypeVar("T")

WORKERS = 2  # each holds a module or two; more would be waited for by the disk


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
        if name in self._after:
            following = self._after[name]
            self._next = {following: self._thread.submit(self._modules.__getitem__, following)}
        return module

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, name: object) -> bool:
        return name in self._modules


def side_by_side(work: Callable[[str], T], names: Iterable[str]) -> Iterator[T]:
    """`work` of each name, in order, done for `WORKERS` names at a time."""
    with ThreadPoolExecutor(WORKERS, "side-by-side") as pool:
        running: deque[Future[T]] = deque()
        try:
            for name in names:
                running.append(pool.submit(work, name))
                if len(running) > WORKERS:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
