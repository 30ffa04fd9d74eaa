"""Options that several of the converter's commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loraport.errors import DataError, unknown

if TYPE_CHECKING:
    from loraport.lora.dialect import WritableDialect
    from loraport_convert.reading import Scale

Dtype = Literal["keep", "bf16", "fp16", "fp32"]

LoraPath = Annotated[Path, typer.Argument(metavar="LORA", help="A .safetensors file, or an adapter folder of PEFT's.")]
Alpha = Annotated[
    float | None, typer.Option("--alpha", help="The alpha it was trained with, for a file that does not tell.")
]
AssumeAlpha = Annotated[
    Literal["rank"] | None,
    typer.Option("--assume-alpha", help="Take alpha for the rank (scale 1) where the file does not tell it."),
]
FamilyName = Annotated[
    str | None, typer.Option("--family", metavar="NAME", help="The model's family, for a file that does not tell it.")
]
Base = Annotated[
    Path | None,
    typer.Option(metavar="MODEL", help="What a DoRA was trained on: a checkpoint, or a folder of diffusers'."),
]
To = Annotated[str, typer.Option("--to", help="What to write: comfyui, peft, diffusers, kohya or ai-toolkit.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of the written factors. keep: each tensor's own.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists (never an input).")]
OutFile = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The file to write.")]


def scale_of(alpha: float | None, assume: str | None) -> Scale | None:
    """What the person said about the scale. Raises DataError when they said two things or something impossible."""
    import math

    from loraport_convert.reading import Scale

    if alpha is not None and assume is not None:
        raise DataError("--alpha and --assume-alpha say two things about the scale: give one.")
    if alpha is not None and (not math.isfinite(alpha) or alpha == 0):
        raise DataError(f"--alpha: {alpha} would give a LoRA that does nothing, or anything.")
    return None if alpha is None and assume is None else Scale(alpha)


def dtype_of(dtype: Dtype) -> str | None:
    return None if dtype == "keep" else dtype


def writer_named(name: str) -> WritableDialect:
    """A dialect that can be written. Raises DataError with the choices."""
    from loraport.lora.dialect import WritableDialect
    from loraport.plugins import plugins

    writable = {key: each for key, each in plugins().dialects().items() if isinstance(each, WritableDialect)}
    if name not in writable:
        raise DataError(unknown("--to", name, writable))
    return writable[name]
