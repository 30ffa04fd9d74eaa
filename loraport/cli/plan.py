"""`loraport plan`: what a backend will do with every field, before anything runs."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraport.cli.options import AsJson, BackendName, Out, Overrides, SpecFile, Strict, read_spec

if TYPE_CHECKING:
    from loraport.advice import Advice
    from loraport.epoch import Epoch
    from loraport.planning import Plan, Verdict

_COLOURS = {
    "exact": "green",
    "approximated": "yellow",
    "defaulted": "yellow",
    "ignored": "magenta",
    "refused": "red",
}


def add_commands(cli: typer.Typer) -> None:
    @cli.command()
    def plan(
        spec: SpecFile,
        backend: BackendName = None,
        against: Annotated[str | None, typer.Option(help="Show this backend's verdicts beside the first's.")] = None,
        out: Out = None,
        strict: Strict = False,
        as_json: AsJson = False,
        overrides: Overrides = None,
    ) -> None:
        """Show what a backend would do with every field of SPEC. Writes and starts nothing."""
        from loraport.preflight import check_captions
        from loraport.run.api import plan as make

        wanted = read_spec(spec, overrides)
        first = make(wanted, backend, out)
        plans = [first] if against is None else [first, make(wanted, against, out)]
        if as_json:
            content: Any = [
                plan.to_dict() | {"epoch": _epoch(plan).to_dict(), "advice": _advice(plan).to_dict()} for plan in plans
            ]
            typer.echo(json.dumps(content[0] if against is None else content, indent=2, ensure_ascii=False))
        elif against is None:
            _show(first)
        else:
            _show_both(*plans)
        for each in plans:
            for warning in filter(None, (each.lacking, each.memory.warning() if each.memory else None)):
                typer.secho(f"warning: {each.backend}: {warning}", fg=typer.colors.YELLOW, err=True)
        for each in plans:
            each.check(strict)
        for warning in check_captions(first.spec, strict):
            typer.secho(f"warning: {warning}", fg=typer.colors.YELLOW, err=True)


def _show(plan: Plan) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print(_table(f"{plan.spec.name} with {plan.backend} {plan.backend_version}", [plan]))
    counts: dict[str, int] = {}
    for verdict in plan.verdicts:
        counts[str(verdict.kind)] = counts.get(str(verdict.kind), 0) + 1
    console.print(", ".join(f"[{_COLOURS[kind]}]{count} {kind}[/]" for kind, count in counts.items()))
    console.print(f"\n[bold]Memory[/] {escape(_memory(plan))}", highlight=False)
    images = "\n  ".join(_epoch(plan).lines())
    console.print(f"[bold]Images[/] {escape(images)}", highlight=False)
    for heading, text in _advice(plan).lines():
        console.print(f"[bold]{heading}[/] {escape(text)}", highlight=False)
    for path, text in plan.files.items():
        console.rule(escape(path), align="left")
        console.print(escape(text), highlight=False)
    environment = " ".join(f"{name}={shlex.quote(value)}" for name, value in plan.env.items())
    console.print(
        f"\n[bold]Command[/] {escape((environment + ' ' + shlex.join(plan.command)).strip())}", soft_wrap=True
    )


def _show_both(first: Plan, second: Plan) -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(f"{first.spec.name}: {first.backend} against {second.backend}", [first, second]))
    differing = sum(a.kind != b.kind for a, b in zip(first.verdicts, second.verdicts, strict=True))
    console.print(f"{differing} of {len(first.verdicts)} fields are treated differently.")


def _epoch(plan: Plan) -> Epoch:
    from loraport.epoch import epoch_of

    return epoch_of(plan.spec)


def _advice(plan: Plan) -> Advice:
    from loraport.advice import advice_for

    return advice_for(plan.spec, plan.backend)


def _memory(plan: Plan) -> str:
    """The predicted memory of the fullest phase, by what it is for, and of the others."""
    if plan.memory is None:
        return f"not predicted by {plan.backend} for this spec"
    footprint, card = plan.memory.footprint, plan.memory.card
    peak = footprint.peak
    text = f"{peak.gib:.1f} GiB allocated while {peak.name}, predicted"
    if card is not None:
        text += f"; {card.name} has {card.memory_gib:.1f} GiB: it {'fits' if footprint.fits else 'does not fit'}"
    text += "\n  " + ", ".join(f"{name} {gib:.2f}" for name, gib in peak.terms.items())
    others = [f"{phase.name} {phase.gib:.1f}" for phase in footprint.phases if phase is not peak]
    assumed = ", ".join(f"{name}: {value}" for name, value in footprint.assumes.items())
    return f"{text}\n  {', '.join(others)} GiB; for {assumed}"


def _table(title: str, plans: list[Plan]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("field", no_wrap=True)
    table.add_column("value", overflow="fold", max_width=28)
    for plan in plans:
        table.add_column(plan.backend, overflow="fold")
    for verdicts in zip(*(plan.verdicts for plan in plans), strict=True):
        first = verdicts[0]
        table.add_row(first.path, escape(_value(first.value)), *(_cell(verdict) for verdict in verdicts))
    return table


def _cell(verdict: Verdict) -> str:
    from rich.markup import escape

    return f"[{_COLOURS[verdict.kind]}]{verdict.kind}[/] [dim]{escape(verdict.reason)}[/]"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value)
