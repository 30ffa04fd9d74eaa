"""`loraport profiles` and `plugins`: what is installed."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from loraport.cli.options import AsJson

if TYPE_CHECKING:
    from loraport.footprint import Forecast
    from loraport.profiles import Measurement, Profile

#: What hardware profiles are predicted for.
_RESOLUTION, _RANK = 1024, 32


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
            profile.name: expected(profile, backend, known, _RESOLUTION, _RANK)
            for profile in found
            if profile.kind == "hardware" and profile.card_gib is not None
        }
        if as_json:
            typer.echo(json.dumps([_plain(profile, forecasts) for profile in found], indent=2, ensure_ascii=False))
            return
        _show([profile for profile in found if profile.kind != "hardware"])
        _show_hardware([profile for profile in found if profile.kind == "hardware"], forecasts)

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


def _show_hardware(profiles: list[Profile], forecasts: dict[str, Forecast | None]) -> None:
    """A table of the hardware profiles, with peaks in GiB."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 0))
    table.add_column("\nmemory.profile:", no_wrap=True)
    table.add_column("", ratio=1)
    for head in ("predicted\nGiB", "measured\nGiB", "\ns/step"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("\non")
    for profile in profiles:
        forecast = forecasts.get(profile.name)
        table.add_row(
            f"  {profile.name}",
            f"{profile.description}\n[dim]{_settings(profile)}[/]",
            "–" if forecast is None else f"{forecast.footprint.peak.gib:.1f}",
            "\n".join(_gib(row.peak_allocated_gib) for row in profile.measured) or "–",
            "\n".join(f"{row.step_s:.2f}" for row in profile.measured) or "–",
            "\n".join(_where(row) for row in profile.measured),
        )
    console = Console()
    console.print(table, highlight=False)
    console.print(
        f"The most that torch allocates, at {_RESOLUTION} px, rank {_RANK} and batch 1 where nothing else is said: "
        "predicted in the fullest phase of a run, measured in its training, at full size with random weights."
    )


def _gib(measured: float | None) -> str:
    return "–" if measured is None else f"{measured:.1f}"


def _where(row: Measurement) -> str:
    """The card, and the sizes where they are not those of the prediction."""
    usual = (row.resolution, row.rank, row.batch_size) == (_RESOLUTION, _RANK, 1)
    return row.card if usual else f"{row.card}, {row.resolution} px, rank {row.rank}, batch {row.batch_size}"
