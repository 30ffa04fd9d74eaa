"""`loraport profiles` and `plugins`: what is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from loraport.cli.options import AsJson

if TYPE_CHECKING:
    from loraport.footprint import Forecast
    from loraport.profiles import Measurement, Profile


def add_commands(cli: typer.Typer) -> None:
    @cli.command()
    def profiles(as_json: AsJson = False) -> None:
        """List the profiles that `memory` can name, the hardware ones with the memory they take."""
        from loraport.footprint import expected
        from loraport.plugins import plugins
        from loraport.run.api import DEFAULT_BACKEND

        known = plugins().profiles()
        found = sorted(known.values(), key=lambda profile: (profile.kind, profile.card_gib or 0, profile.name))
        backend = plugins().backend(DEFAULT_BACKEND)
        forecasts = {
            profile.name: expected(profile, backend, known)
            for profile in found
            if profile.kind == "hardware" and profile.card_gib is not None
        }
        if as_json:
            typer.echo(json.dumps([_plain(profile, forecasts) for profile in found], indent=2, ensure_ascii=False))
            return
        _show([profile for profile in found if profile.kind != "hardware"])
        _show_hardware([profile for profile in found if profile.kind == "hardware"], forecasts, _of_this_machine(known))

    @cli.command("plugins")
    def list_plugins() -> None:
        """List the installed plugins, with those that failed and why."""
        from loraport.plugins import plugins

        for name, plugin in plugins().manager.list_name_plugin():
            typer.echo(f"{name}: {getattr(plugin, '__name__', plugin)}")
        for name, reason in plugins().failures().items():
            typer.echo(f"{name}: failed: {reason}")


def _plain(profile: Profile, forecasts: dict[str, Forecast | None]) -> dict[str, Any]:
    forecast = forecasts.get(profile.name) if profile.kind == "hardware" else None
    return asdict(profile) | {"predicted": None if forecast is None else forecast.to_dict()}


def _settings(profile: Profile) -> str:
    return ", ".join(f"{name}: {value}" for name, value in profile.sets.items())


def _show(profiles: list[Profile]) -> None:
    """The profiles under the field that names them."""
    from rich.console import Console
    from rich.table import Table

    table = Table.grid("name", "description", padding=(0, 2, 0, 0))
    kind = None
    for profile in profiles:
        if profile.kind != kind:
            kind = profile.kind
            table.add_row(f"memory.{kind}:")
        settings = _settings(profile)
        table.add_row(f"  {profile.name}", profile.description + (f" ({settings})" if settings else ""))
    Console().print(table, highlight=False)


def _of_this_machine(known: Mapping[tuple[str, str], Profile]) -> str:
    """What `auto` stands for here."""
    from loraport.gpu import cards, profile_for

    found = cards()
    if not found:
        return "the one for this machine's card, which has none that can be asked"
    profile = profile_for(found[0].memory_gib, known)
    return f"the one for this machine's card: {profile.name if profile else 'none'}, for {found[0].name}"


def _show_hardware(profiles: list[Profile], forecasts: dict[str, Forecast | None], auto: str) -> None:
    """A table of the hardware profiles, with peaks in GiB, and what `auto` is."""
    from rich.console import Console
    from rich.table import Table

    from loraport.profiles import AUTO

    table = Table(show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 0))
    table.add_column("\nmemory.profile:", no_wrap=True)
    table.add_column("", ratio=1)
    for head in ("predicted\nGiB", "measured\nGiB", "\ns/step"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("\non")
    for profile in profiles:
        forecast, measured = forecasts.get(profile.name), _told(profile)
        table.add_row(
            f"  {profile.name}",
            f"{profile.description}: {_shape(profile.shape)}\n[dim]{_settings(profile)}[/]",
            "–" if forecast is None else f"{forecast.footprint.peak.gib:.1f}",
            "\n".join(_gib(row.peak_allocated_gib) for row in measured) or "–",
            "\n".join(f"{row.step_s:.2f}" for row in measured) or "–",
            "\n".join(_where(row, profile) for row in measured),
        )
    table.add_row(f"  {AUTO}", auto)
    console = Console()
    console.print(table, highlight=False)
    console.print(
        "The most that torch allocates: predicted in the fullest phase of the run that is named, measured in its "
        "training where nothing else is said, at full size with random weights."
    )


def _gib(measured: float | None) -> str:
    return "–" if measured is None else f"{measured:.1f}"


def _shape(shape: Mapping[str, int]) -> str:
    return f"{shape['resolution']} px, rank {shape['rank']}, batch {shape['batch_size']}"


def _shape_of(row: Measurement) -> dict[str, int]:
    return {"resolution": row.resolution, "batch_size": row.batch_size, "rank": row.rank}


def _told(profile: Profile) -> list[Measurement]:
    """The newest measurement of each size on each card, those that the profile's own card has no room for left out, and
    those of the training it is for first."""
    from loraport.footprint import CONTEXT_GIB

    room = float("inf") if profile.card_gib is None else profile.card_gib - CONTEXT_GIB
    fitting = [row for row in profile.measured if (row.peak_allocated_gib or 0) <= room]
    newest = {(row.card, row.gpus, *_shape_of(row).values()): row for row in sorted(fitting, key=lambda row: row.date)}
    return sorted(newest.values(), key=lambda row: (_shape_of(row) != profile.shape, row.gpus))


def _where(row: Measurement, profile: Profile) -> str:
    """The card, and the sizes where they are not those that the profile is for."""
    told = f"{row.gpus} × {row.card}" if row.gpus > 1 else row.card
    return told if _shape_of(row) == profile.shape else f"{told}, {_shape(_shape_of(row))}"
