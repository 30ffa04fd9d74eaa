"""`loraport inspect`: what a LoRA file is, without reading its numbers."""

from __future__ import annotations

import gc
import json
import os
from typing import TYPE_CHECKING, Any

import typer

from loraport.cli.options import AsJson
from loraport_convert.commands.options import LoraPath

if TYPE_CHECKING:
    from loraport_convert.inspection import Facts

_SHOWN = 4
_LONGEST = 90


def add_commands(cli: typer.Typer) -> None:
    @cli.command()
    def inspect(path: LoraPath, as_json: AsJson = False) -> None:
        """Explain a LoRA file: who wrote it, for which model, how strong, and what ComfyUI would do with it."""
        # Nothing is multiplied here, and starting numpy's threads takes as long as the rest of numpy.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        gc.disable()  # nor is anything made that would have to be collected before the end
        try:
            from loraport.plugins import plugins
            from loraport_convert.inspection import inspect

            facts = inspect(path, plugins().dialects())
        finally:
            gc.enable()
        typer.echo(json.dumps(facts.to_json(), indent=2, ensure_ascii=False) if as_json else "\n".join(_lines(facts)))


def _lines(facts: Facts) -> list[str]:
    dialects = ", ".join(f"{name} ({confidence:.0%})" for name, confidence in facts.dialects) or "none that is known"
    kinds = [(f"DoRA on {kind}" if dora else kind) for kind, dora in ((m.kind, m.dora) for m in facts.modules)]
    lines = [
        f"{facts.path}: {len(facts.modules)} modules, {facts.size / 1e6:.1f} MB",
        f"dialect   {dialects}",
        f"family    {facts.family or 'not known'}",
        f"kind      {', '.join(sorted(set(kinds)))}",
        f"rank      {_counted(facts, 'rank')}",
        f"scale     {_scales(facts)}",
        f"dtype     {_counted(facts, 'dtype')}",
        f"modules   {_some([module.name for module in facts.modules])}",
    ]
    lines += [f"damaged   {each}" for each in facts.damaged]
    if facts.unknown:
        lines.append(f"unknown   {len(facts.unknown)} keys: {_some(list(facts.unknown))}")
    lines += [f"metadata  {key}: {_short(value)}" for key, value in sorted(facts.metadata.items())]
    verdict = facts.comfyui
    lines.append("")
    if verdict.fine and not facts.unknown:
        lines.append("ComfyUI loads all of it at the right strength.")
    else:
        total = verdict.loads + len(verdict.skips) if not verdict.aborts else len(facts.modules) + len(facts.damaged)
        lines.append(f"ComfyUI loads {verdict.loads} of {total} modules.")
        if verdict.skips:
            lines.append(f"  not found by ComfyUI: {_some(list(verdict.skips))}")
        lines += [f"  {problem}" for problem in verdict.problems]
        lines.append("  `loraport convert` writes a file that it loads completely.")
    return lines


def _counted(facts: Facts, field: str) -> str:
    counts = facts.counts(field)
    shown = ", ".join(f"{_plain(value)} ({count})" for value, count in counts[:_SHOWN])
    return shown + (", …" if len(counts) > _SHOWN else "")


def _scales(facts: Facts) -> str:
    origins = ", ".join(f"{origin} ({count})" for origin, count in facts.counts("scale_from"))
    return f"{_counted(facts, 'scale')}; from: {origins}"


def _plain(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", … ({len(names)})" if len(names) > _SHOWN else "")


def _short(value: str) -> str:
    line = " ".join(value.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}… ({len(value)} characters)"
