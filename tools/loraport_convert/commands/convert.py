"""`loraport convert`: what any trainer wrote, as a file that ComfyUI (or another program) loads completely."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loraport.cli.options import AsJson
from loraport.errors import DataError
from loraport_convert.commands.options import (
    Alpha,
    AssumeAlpha,
    Base,
    DtypeOption,
    FamilyName,
    Overwrite,
    To,
    dtype_of,
    scale_of,
    writer_named,
)
from loraport_convert.stopping import stoppable

if TYPE_CHECKING:
    from loraport_convert.publishing import Published
    from loraport_convert.reading import Found

Files = Annotated[
    list[Path], typer.Argument(metavar="FILE...", help="LoRA files, folders of them, or adapter folders of PEFT's.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="OUT",
        help="The file to write, or a folder. Default: <name>.<to>.safetensors beside FILE.",
    ),
]
Approximation = Annotated[
    Literal["svd", "diff"] | None,
    typer.Option(help="For modules that OUT's format cannot hold exactly: closest LoRA, or the whole change."),
]
Rank = Annotated[int, typer.Option("--rank", min=1, help="The rank of --approximate svd.")]
Only = Annotated[
    str | None, typer.Option("--only", metavar="PATTERN", help="Only modules whose whole name matches this expression.")
]
Ignore = Annotated[
    str | None,
    typer.Option("--ignore", metavar="PATTERN", help="Leave out keys that match whole and that no module is made of."),
]
DoraAs = Annotated[
    Literal["rescale", "diff"],
    typer.Option(
        "--dora",
        help="With --base. rescale: a DoRA by ComfyUI's rule. diff: its whole change; large, for any version.",
    ),
]


def add_commands(cli: typer.Typer) -> None:
    @cli.command()
    @stoppable()
    def convert(
        files: Files,
        out: Out = None,
        to: To = "comfyui",
        alpha: Alpha = None,
        assume_alpha: AssumeAlpha = None,
        family: FamilyName = None,
        base: Base = None,
        dora: DoraAs = "rescale",
        dtype: DtypeOption = "keep",
        only: Only = None,
        ignore: Ignore = None,
        approximate: Approximation = None,
        rank: Rank = 64,
        overwrite: Overwrite = False,
        as_json: AsJson = False,
    ) -> None:
        """Convert LoRA files, each with a proof that it still means the same. No input is ever changed."""
        from loraport.plugins import plugins
        from loraport_convert.base_weights import with_base
        from loraport_convert.publishing import Target, check_target, publish
        from loraport_convert.reading import expression_of, lora_file, lora_files, read_lora
        from loraport_convert.reading import only as only_modules

        scale, writer = scale_of(alpha, assume_alpha), writer_named(to)
        if dora == "diff" and base is None:
            raise DataError("--dora diff needs the base weights.", hint="Give them with --base MODEL.")
        left_out = None if ignore is None else expression_of("--ignore", ignore)
        dialects = plugins().dialects()
        folder = len(files) > 1 or lora_file(files[0]).is_dir()
        sources = [
            source
            for path in files
            for source in lora_files(path)
            if source == lora_file(path) or not source.stem.endswith(f".{to}")  # what an earlier go wrote
        ]
        jobs = _targets(files, sources, out, to, folder)
        rows: list[dict[str, Any]] = []
        failed = 0
        for source, place in jobs.items():
            try:
                target = Target(place, writer, dtype_of(dtype), overwrite, approximate, rank, ignore=left_out)
                check_target(target, sources)
                found = read_lora(source, dialects, scale, family)
                lora = found.lora if only is None else only_modules(found.lora, only)
                if base is not None:
                    lora = with_base(lora, base, dora)
                published = publish(lora, target, sources)
            except DataError as error:
                if len(jobs) == 1:
                    raise
                failed += 1
                rows.append({"source": str(source), "error": error.message})
                typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
                continue
            rows.append(_row(found, published))
            _tell(found, published, scale is not None, as_json)
        if as_json:
            typer.echo(json.dumps(rows if len(jobs) > 1 else rows[0], indent=2, ensure_ascii=False))
        if failed:
            raise DataError(f"{failed} of {len(jobs)} files were not converted; the others were.")


def _targets(files: list[Path], sources: list[Path], out: Path | None, to: str, folder: bool) -> dict[Path, Path]:
    """Source → output. Raises DataError where two would be written to one place."""
    from loraport_convert.reading import PEFT_WEIGHTS

    if out is not None and not folder and not out.is_dir():
        return {sources[0]: out if to != "peft" or out.suffix else out / PEFT_WEIGHTS}
    if out is not None:
        _make_folder(out)
    jobs: dict[Path, Path] = {}
    for source in sources:
        name = source.parent.name if source.name == PEFT_WEIGHTS and source.parent.name else source.stem
        root = next((path for path in files if path.is_dir() and path in source.parents), None)
        if out is not None and root is not None and source.parent != root:
            name = "-".join([*source.relative_to(root).parent.parts, source.stem])
        beside = source.parent.parent if source.name == PEFT_WEIGHTS else source.parent
        # PEFT's adapters are folders.
        file = Path(f"{name}.{to}", PEFT_WEIGHTS) if to == "peft" else Path(f"{name}.{to}.safetensors")
        place = (out or beside) / file
        if place in jobs.values():
            other = next(key for key, each in jobs.items() if each == place)
            raise DataError(f"{other} and {source} would both be written to {place}.", hint="Convert them apart.")
        jobs[source] = place
    return jobs


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out} cannot be made a folder: {error.strerror}.", hint="Give -o a folder.") from error


def _row(found: Found, published: Published) -> dict[str, Any]:
    return {
        "source": str(found.path),
        "dialect": found.dialect.name,
        "family": found.lora.family,
        "scale_from_command_line": found.asked,
    } | published.to_json()


def _tell(found: Found, published: Published, said: bool, as_json: bool) -> None:
    """The result on standard output; what a person should know besides on standard error."""
    if not as_json:
        worst = max((module.difference for module in published.proof.modules), default=0.0)
        exact = "exact" if not published.approximated else f"{len(published.approximated)} of them approximated"
        family = found.lora.family or "an unknown family"
        modules = f"{len(published.proof.modules)} modules of {family} from {found.dialect.name}"
        typer.echo(f"{published.path}: {modules}, {exact}; largest difference {worst:.1e}")
        for module in published.proof.modules:
            if module.name in published.approximated:
                typer.echo(f"  {module.name} differs by {module.difference:.1e} of its size")
    notes = []
    if found.spec is not None:
        notes.append(f"the alpha of {found.path} is that of {found.spec}")
    if said and not found.asked:
        notes.append(f"{found.path} tells its scale itself, so --alpha was not needed")
    if found.lora.family is None:
        notes.append(f"{found.path} is of a family that LoraPort does not know: its module names were kept as they are")
    if ignored := published.ignored:
        notes.append(f"{len(ignored)} keys were left out as asked, such as {ignored[0]}")
    if zeros := published.proof.zeros:
        notes.append(f"{len(zeros)} modules change nothing, such as {zeros[0]}")
    for note in notes:
        typer.secho(f"note: {note}", fg=typer.colors.CYAN, err=True)
