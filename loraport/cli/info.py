"""`loraport profiles` and `plugins`: what is installed."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from loraport.cli.options import AsJson


def add_commands(cli: typer.Typer) -> None:
    @cli.command()
    def profiles(as_json: AsJson = False) -> None:
        """List the profiles that `memory` can name."""
        from loraport.plugins import plugins

        found = sorted(
            plugins().profiles().values(),
            key=lambda profile: (profile.kind, profile.card_gib or 0, profile.name),
        )
        if as_json:
            typer.echo(json.dumps([asdict(profile) for profile in found], indent=2, ensure_ascii=False))
            return
        kind = None
        for profile in found:
            if profile.kind != kind:
                kind = profile.kind
                typer.echo(f"memory.{'profile' if kind == 'hardware' else kind}:")
            settings = ", ".join(f"{name}: {_plain(value)}" for name, value in profile.sets.items())
            typer.echo(f"  {profile.name:<9} {profile.description}" + (f" ({settings})" if settings else ""))

    @cli.command("plugins")
    def list_plugins() -> None:
        """List the installed plugins, with those that failed and why."""
        from loraport.plugins import plugins

        for name, plugin in plugins().manager.list_name_plugin():
            typer.echo(f"{name}: {getattr(plugin, '__name__', plugin)}")
        for name, reason in plugins().failures().items():
            typer.echo(f"{name}: failed: {reason}")


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
