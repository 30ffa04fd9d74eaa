"""Options that several commands share, and reading a spec for a command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from loraport.spec.models import TrainSpec

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="The training spec (YAML).")]
BackendName = Annotated[
    str | None,
    typer.Option("--backend", "-b", help="Trainer to use; `loraport backends` lists them. Default: native."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Change a field of the spec, such as train.steps=10. Repeatable."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Run folder. Default: runs/<name>, numbered when taken.")]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Stop unless the backend does every field exactly and captions keep the rules."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def read_spec(path: Path, overrides: list[str] | None) -> TrainSpec:
    """Load a spec and tell, on standard error, the foreign names that were accepted."""
    from loraport.spec.load import load_spec

    loaded = load_spec(path, overrides or [])
    for notice in loaded.notices:
        typer.secho(f"note: {notice}", fg=typer.colors.CYAN, err=True)
    return loaded.spec
