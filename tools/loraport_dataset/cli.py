"""`loraport dataset ...`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from loraport_dataset.folder import CheckedCaption

app = typer.Typer(help="Look after a dataset.", no_args_is_help=True)


@app.callback()
def _dataset() -> None:
    """Look after a dataset."""


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder with the captions.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check the JSON captions of a folder against the rules of Ideogram 4; exit code 4 on errors."""
    import json

    from loraport.errors import DataError
    from loraport_dataset.folder import check_folder

    checked = check_folder(folder)
    report = _report(checked)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    if report["errors"]:
        raise typer.Exit(DataError.exit_code)


def _report(checked: list[CheckedCaption]) -> dict[str, Any]:
    findings = [{"file": one.file.name, **asdict(finding)} for one in checked for finding in one.findings]
    counts = {
        f"{severity}s": sum(finding["severity"] == severity for finding in findings)
        for severity in ("error", "warning")
    }
    return {"captions": len(checked), **counts, "findings": findings}


def _print(report: dict[str, Any]) -> None:
    for finding in report["findings"]:
        place = finding["json_path"] or "the caption"
        kind = f"{finding['severity']} [{finding['rule']}]"
        typer.echo(f"{finding['file']}: {place}: {kind} {finding['message']}")
    typer.echo(f"{report['captions']} captions, {report['errors']} errors, {report['warnings']} warnings.")
