"""The hooks: what a plugin can add to LoraPort. Documented with examples in docs/plugins.md.

A plugin is an installed package with an entry point in the group `loraport` naming a module that implements some of
these with `@hookimpl`. The built-in backends, profiles, dialects and families come in through the same door.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from loraport.backend import Backend
    from loraport.families import Family
    from loraport.listeners import ListenerFactory
    from loraport.lora.dialect import Dialect
    from loraport.profiles import Measurement, Profile
    from loraport.rules import Rule

hookspec = pluggy.HookspecMarker("loraport")
hookimpl = pluggy.HookimplMarker("loraport")


@hookspec
def register_backends(register: Callable[[Backend], None]) -> None:
    """Add trainers: call `register` with each backend object."""


@hookspec
def register_profiles(register: Callable[[Profile], None]) -> None:
    """Add named answers to "how does this fit and run fast": call `register` with each profile."""


@hookspec
def register_measurements(register: Callable[[Measurement], None]) -> None:
    """Add measured trainings, from which the time of a run is told: call `register` with each measurement."""


@hookspec
def register_dialects(register: Callable[[Dialect], None]) -> None:
    """Add ways of writing LoRA files: call `register` with each dialect object."""


@hookspec
def register_families(register: Callable[[Family], None]) -> None:
    """Add model families: call `register` with each family."""


@hookspec
def register_rules(register: Callable[[type[Rule]], None]) -> None:
    """Add rules that datasets are checked by: call `register` with each rule class."""


@hookspec
def register_commands(cli: typer.Typer) -> None:
    """Add commands to the `loraport` command line: decorate functions with `cli.command()`."""


@hookspec
def register_listeners(register: Callable[[ListenerFactory], None]) -> None:
    """Follow runs: call `register` with a factory that makes a listener for each run's events."""
