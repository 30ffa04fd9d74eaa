"""`loraport dataset caption`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loraport.cli.options import AsJson
from loraport_dataset.options import FamilyName, Folder, TriggerWord, read_folder

if TYPE_CHECKING:
    from loraport_dataset.captioning.service import Service

_OF_SERVICES = ("key_env", "per_minute", "parallel", "timeout", "attempts", "structured")
_OF_LOCAL_MODELS = ("device",)
_LOCAL_TOKENS = 2048

Model = Annotated[
    str, typer.Option("--model", metavar="NAME", help="The service's name of the model; with --local, its folder.")
]
Endpoint = Annotated[
    str | None,
    typer.Option("--endpoint", metavar="URL", help="An OpenAI-compatible service, such as http://localhost:8000/v1."),
]
Local = Annotated[bool, typer.Option("--local", help="Run the model here, with transformers. Nothing is downloaded.")]
KeyVariable = Annotated[
    str | None,
    typer.Option("--key-env", metavar="VARIABLE", help="The environment variable that holds the service's key."),
]
CaptionsOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="OUT", help="Folder for the captions. Default: beside the images, in DIR."),
]
Again = Annotated[bool, typer.Option("--again", help="Write captions anew that are there; the old ones are lost.")]
PerMinute = Annotated[
    float | None, typer.Option("--per-minute", min=0.01, metavar="N", help="At most N requests a minute.")
]
Parallel = Annotated[int, typer.Option("--parallel", min=1, max=256, metavar="N", help="Requests at the same time.")]
MaxSide = Annotated[
    int, typer.Option("--max-side", min=64, max=8192, metavar="PIXELS", help="Larger pictures are sent smaller.")
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="The longest that one answer may take.")
]
Attempts = Annotated[
    int,
    typer.Option("--attempts", min=1, max=100, metavar="N", help="Requests for one answer while the service fails."),
]
Corrections = Annotated[
    int,
    typer.Option("--corrections", min=0, max=10, metavar="N", help="Times the model may correct a wrong caption."),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=16, metavar="N", help="Longest answer. Default: the service's; --local: 2048."),
]
StructuredOption = Annotated[
    Literal["json_schema", "json_object", "none"],
    typer.Option("--structured", help="What the service can enforce. Every answer is checked by the rules as well."),
]
BoxesOption = Annotated[
    Literal["none", "yx", "xy"],
    typer.Option(
        "--boxes",
        help="Ask for boxes: yx for models that are used to y first (Gemini), xy for x first in thousandths (Qwen-VL). "
        "They are written as the family wants them.",
    ),
]
Palettes = Annotated[bool, typer.Option("--palettes", help="Ask for colour palettes too.")]
Instructions = Annotated[
    Path | None, typer.Option("--instructions", metavar="FILE", help="Text that is added to the instructions.")
]
Extension = Annotated[
    Literal["json", "txt", "caption"] | None,
    typer.Option("--caption-ext", help="Extension of the captions. Default: the family's."),
]
Device = Annotated[
    str | None, typer.Option("--device", help="Where --local runs: cuda, cuda:1, mps or cpu. Default: the best.")
]


def add_commands(app: typer.Typer) -> None:
    @app.command()
    def caption(
        context: typer.Context,
        folder: Folder,
        model: Model,
        endpoint: Endpoint = None,
        local: Local = False,
        key_env: KeyVariable = None,
        out: CaptionsOut = None,
        again: Again = False,
        trigger_word: TriggerWord = None,
        boxes: BoxesOption = "none",
        palettes: Palettes = False,
        instructions: Instructions = None,
        per_minute: PerMinute = None,
        parallel: Parallel = 4,
        max_side: MaxSide = 1024,
        timeout: Timeout = 120,
        attempts: Attempts = 5,
        corrections: Corrections = 2,
        max_tokens: MaxTokens = None,
        structured: StructuredOption = "json_schema",
        device: Device = None,
        caption_ext: Extension = None,
        family: FamilyName = None,
        as_json: AsJson = False,
    ) -> None:
        """Have a vision model write the captions that are missing; those that are there are kept.

        Stopped at any time, the same command goes on. Ends with 4 when some pictures got no caption, with 5 when the
        service or the model can't be used.
        """
        import json

        from loraport.errors import DataError, SpecError
        from loraport_dataset.captioning import running, telling
        from loraport_dataset.captioning.form import Form
        from loraport_dataset.captioning.job import find_tasks
        from loraport_dataset.captioning.service import Service, check_service

        if local == (endpoint is not None):
            raise SpecError("Say where the model runs: either --endpoint URL, or --local with its folder as --model.")
        _refuse_unread(context, _OF_SERVICES if local else _OF_LOCAL_MODELS, "--local" if local else "--endpoint")
        if out is not None and out.exists() and not out.is_dir():
            raise SpecError(f"{out} is a file.", hint="Give a folder for the captions with -o.")
        setting = read_folder(folder, family, caption_ext, trigger_word).setting
        if setting.family.caption_schema is None and (boxes != "none" or palettes):
            raise SpecError(f"{setting.family.title} has plain-text captions, without --boxes and --palettes.")
        form = Form(setting, boxes, palettes, _text(instructions))
        extension = caption_ext or ("json" if setting.family.caption_format == "json" else "txt")
        tasks = find_tasks(folder, out, extension, again)
        effort = running.Effort(1 if local else parallel, max_side, corrections)
        if endpoint is None:
            make = running.local_model(model, max_tokens or _LOCAL_TOKENS, device)
        else:
            service = Service(endpoint, model, _key(key_env), structured, timeout, attempts, max_tokens)
            check_service(service)
            _warn(service)
            make = running.endpoint(service, per_minute)
        summary = running.run(tasks, make, form, effort, quiet=as_json)
        if as_json:
            typer.echo(json.dumps(telling.as_json(summary), indent=2))
        else:
            for line in telling.lines(summary):
                typer.echo(line)
        if summary.failed:
            raise typer.Exit(DataError.exit_code)


def _refuse_unread(context: typer.Context, names: tuple[str, ...], where: str) -> None:
    """An option that nothing would read is a misunderstanding."""
    from loraport.errors import SpecError

    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise SpecError(f"--{name.replace('_', '-')} does nothing with {where}.", hint="Leave it out.")


def _warn(service: Service) -> None:
    if service.key and service.url.lower().startswith("http:") and not service.is_here:
        message = "warning: the key travels unencrypted to another machine; use https if the service has it."
        typer.secho(message, fg=typer.colors.YELLOW, err=True)


def _text(file: Path | None) -> str | None:
    from loraport.errors import DataError

    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"The instructions {file} cannot be read: {why}.") from error


def _key(variable: str | None) -> str | None:
    """The key, from the environment alone: an option would stand in the list of processes and in the shell's history.

    What is given is shown only when it looks like a variable's name, since it may be the key itself.
    """
    import os
    import re

    from loraport.errors import SpecError

    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        name = f" ({variable})" if re.fullmatch(r"[A-Z_]{1,60}", variable) else ""
        raise SpecError(
            f"--key-env names no environment variable that is set{name}.",
            hint="Give the variable's name, not the key itself, and set it before: export NAME=...",
        )
    return key
