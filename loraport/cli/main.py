"""The `loraport` command. Commands come from plugins; errors become one message and a documented exit code."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from loraport.errors import LoraPortError
from loraport.plugins import plugins


class _Group(TyperGroup):
    """Turns a LoraPortError into its message on standard error and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LoraPortError as error:
            typer.secho("error: ", fg=typer.colors.RED, bold=True, nl=False, err=True)
            typer.echo(str(error), err=True)
            raise typer.Exit(error.exit_code) from None


def build_app() -> typer.Typer:
    """The command line with every plugin's commands."""
    app = typer.Typer(
        name="loraport",
        cls=_Group,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=True,
        help="One LoRA training spec for any trainer, and a LoRA that ComfyUI loads at the end.",
        epilog="Exit codes are listed in docs/exit-codes.md.",
    )

    @app.callback()
    def options(
        version: bool = typer.Option(
            False, "--version", is_eager=True, callback=_print_version, help="Show the version."
        ),
    ) -> None:
        pass

    plugins().add_commands(app)
    for name, reason in plugins().failures().items():
        typer.secho(f"warning: the plugin {name} could not be used: {reason}", fg=typer.colors.YELLOW, err=True)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"loraport {version('loraport')}")
        raise typer.Exit


def main() -> None:
    """Entry point of the console script."""
    sys.argv[0] = "loraport"
    build_app()()


if __name__ == "__main__":
    main()
