"""`loraport backends`: the trainers, their environments, and whether they work."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraport.cli.options import AsJson

if TYPE_CHECKING:
    from loraport.envs import Recipe

Name = Annotated[str, typer.Argument(help="Backend, as `loraport backends` lists it.")]


def add_commands(cli: typer.Typer) -> None:
    backends = typer.Typer(help="List the trainers and whether each can run here; install and examine them.")
    cli.add_typer(backends, name="backends", invoke_without_command=True)

    @backends.callback()
    def list_backends(context: typer.Context, as_json: AsJson = False) -> None:
        if context.invoked_subcommand is not None:
            return
        from loraport.plugins import plugins

        rows = [
            {"name": each.name, "version": each.version, "description": each.description, **asdict(each.readiness())}
            for each in plugins().backends().values()
        ]
        if as_json:
            typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
            return
        for row in rows:
            state = "ready" if row["ready"] else "not ready"
            typer.echo(f"{row['name']} {row['version']}: {row['description']}\n  {state}: {row['detail']}")

    @backends.command()
    def install(
        name: Name,
        source: Annotated[Path | None, typer.Option("--from", help="Checkout to install instead of a release.")] = None,
    ) -> None:
        """Make an isolated environment for a backend, with pinned requirements. Safe to repeat."""
        from loraport.envs import install as make

        make(name, _recipe(name), typer.echo, source)

    @backends.command()
    def doctor(
        name: Name,
        import_only: Annotated[bool, typer.Option("--import-only", help="Leave the two-step training out.")] = False,
    ) -> None:
        """Examine a backend: its version, a real import, and a training of two steps on the tiny checkpoint."""
        from loraport.errors import BackendError
        from loraport.plugins import plugins

        backend = plugins().backend(name)
        recipe: Recipe | None = getattr(backend, "environment", None)
        if recipe is not None:
            from loraport import envs

            python = envs.find_interpreter(name)
            typer.echo(f"interpreter: {python}")
            problem = envs.problem_with(python, recipe) or envs.import_problem(python, recipe.module)
            if problem:
                raise BackendError(f"{name}: {problem}.", hint=f"Install it with: loraport backends install {name}")
            typer.echo(f"{recipe.package} {envs.package_version(python, recipe.package)} imports")
        readiness = backend.readiness()
        if not readiness.ready:
            raise BackendError(f"{name} cannot train here: {readiness.detail}")
        typer.echo(f"ready: {readiness.detail}")
        if not import_only:
            from loraport.cli.doctor import train_two_steps

            train_two_steps(name, typer.echo)


def _recipe(name: str) -> Recipe:
    from loraport.errors import SpecError
    from loraport.plugins import plugins

    recipe: Recipe | None = getattr(plugins().backend(name), "environment", None)
    if recipe is None:
        raise SpecError(f"{name} has no environment of its own; it runs in this one.")
    return recipe
