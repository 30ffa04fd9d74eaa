"""`loraport verify`: whether two files are the same adapter, whatever they are written in."""

from __future__ import annotations

import json

import typer

from loraport.cli.options import AsJson
from loraport.errors import DifferentError
from loraport_convert.commands.options import Alpha, AssumeAlpha, Base, FamilyName, LoraPath, scale_of

_SHOWN = 10


def add_commands(cli: typer.Typer) -> None:
    @cli.command()
    def verify(
        a: LoraPath,
        b: LoraPath,
        alpha: Alpha = None,
        assume_alpha: AssumeAlpha = None,
        family: FamilyName = None,
        base: Base = None,
        as_json: AsJson = False,
    ) -> None:
        """Say whether two files are the same adapter: the same modules, each changed by the same amount.

        Each module's difference is that of the two changes, relative to A's, in float64. Ends with 8 when they differ.
        """
        from loraport.lora.proof import prove
        from loraport.plugins import plugins
        from loraport_convert.base_weights import with_base
        from loraport_convert.reading import read_lora

        scale, dialects = scale_of(alpha, assume_alpha), plugins().dialects()
        first, second = (read_lora(path, dialects, scale, family) for path in (a, b))
        files = [first.lora, second.lora]
        if base is not None:
            files = [with_base(each, base, "diff") for each in files]
        proof = prove(files[0], files[1], both_rounded=True)
        if as_json:
            text = {"a": first.dialect.name, "b": second.dialect.name} | proof.to_json()
            typer.echo(json.dumps(text, indent=2, ensure_ascii=False))
        else:
            for row in [module for module in proof.modules if not module.ok][:_SHOWN]:
                typer.echo(f"{row.name}: differs by {row.difference:.2e} of its size")
            for name in proof.missing[:_SHOWN]:
                typer.echo(f"{name}: only in {a}")
            for name in proof.extra[:_SHOWN]:
                typer.echo(f"{name}: only in {b}")
        if not proof.ok:
            raise DifferentError(f"{a} and {b} are not the same adapter: {proof.why}.")
        if not as_json:
            worst = max(module.difference for module in proof.modules)
            typer.echo(f"The same adapter: {len(proof.modules)} modules, largest difference {worst:.1e}.")
