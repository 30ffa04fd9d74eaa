"""Registers the built-in profiles and what was measured of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loraport.hookspecs import hookimpl

if TYPE_CHECKING:
    from loraport.profiles import Measurement, Profile


@hookimpl
def register_profiles(register: Callable[[Profile], None]) -> None:
    from dataclasses import replace
    from importlib.resources import files

    from loraport.profiles import read_profiles
    from loraport_profiles.measured import measurements, settings

    built_in = read_profiles(files("loraport_profiles"))
    found: dict[tuple[str, str], Profile] = {(profile.kind, profile.name): profile for profile in built_in}
    rows = measurements()
    for (kind, _), profile in found.items():
        if kind == "hardware":
            memory = settings(profile.sets, found)
            profile = replace(profile, measured=tuple(row for row in rows if row.memory == memory))
        register(profile)


@hookimpl
def register_measurements(register: Callable[[Measurement], None]) -> None:
    from loraport_profiles.measured import measurements

    for row in measurements():
        register(row)
