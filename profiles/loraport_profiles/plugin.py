"""Registers the built-in profiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loraport.hookspecs import hookimpl

if TYPE_CHECKING:
    from loraport.profiles import Profile


@hookimpl
def register_profiles(register: Callable[[Profile], None]) -> None:
    from importlib.resources import files

    from loraport.profiles import read_profiles

    for profile in read_profiles(files("loraport_profiles")):
        register(profile)
