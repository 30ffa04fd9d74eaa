"""Modules that are read from disk when asked for, so that a LoRA of any size fits in the memory of its largest
module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from loraport.lora.canonical import LoraModule


class LazyModules(Mapping[str, LoraModule]):
    """Builds a module each time it is asked for and keeps none. What is wrong with its numbers is raised then."""

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
