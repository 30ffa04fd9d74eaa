"""`loraport init`: a commented spec that fits a folder of images and this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraport.hookspecs import hookimpl

if TYPE_CHECKING:
    from loraport.dataset import Item
    from loraport.families import Family
    from loraport.gpu import Card
    from loraport.spec.models import TrainSpec

_STEPS_AN_IMAGE = 90
_MOST_STEPS = 5000
_LARGEST_RESOLUTION = 1024
#: What is written, in this order; everything else keeps its default, which `loraport spec schema` tells.
_FIELDS = (
    "version",
    "name",
    "model.family",
    "model.checkpoint",
    "dataset.path",
    "dataset.caption_ext",
    "dataset.default_caption",
    "dataset.trigger_word",
    "dataset.repeats",
    "dataset.resolution",
    "dataset.flip",
    "dataset.caption_dropout",
    "lora.type",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
    "train.steps",
    "train.batch_size",
    "train.gradient_accumulation",
    "train.learning_rate",
    "train.optimizer",
    "train.lr_scheduler",
    "train.warmup_steps",
    "train.seed",
    "memory.profile",
    "save.every",
    "save.keep",
    "sample.every",
    "sample.prompts",
    "validation.every",
)


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    cli.command("init")(init)


def init(
    images_dir: Annotated[Path, typer.Argument(help="Folder of images, with caption files or without.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Spec file to write.")] = Path("spec.yaml"),
    name: Annotated[str | None, typer.Option(help="Name of the run; the folder's name when left out.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented spec that fits a folder of images and this machine's GPU."""
    import shlex

    from loraport.errors import SpecError
    from loraport.files import write_atomic
    from loraport.gpu import cards

    if output.exists() and not force:
        raise SpecError(f"{output} is there already.", hint="Choose another file with -o, or replace it with --force.")
    found = cards()
    spec, notes = propose(images_dir, output, name, found[0] if found else None)
    write_atomic(output, render(spec, notes, output))

    typer.echo(f"Wrote {output}: {spec.dataset.resolution} px, {spec.train.steps} steps.")
    for path in ("dataset.path", "dataset.default_caption", "train.steps", "lora.rank", "memory.profile", "save.keep"):
        typer.echo(f"  {path}: {notes[path]}")
    typer.echo(
        f"Read it, then:\n  loraport plan {shlex.quote(str(output))}\n  loraport train {shlex.quote(str(output))}"
    )


def propose(images_dir: Path, output: Path, name: str | None, card: Card | None) -> tuple[TrainSpec, dict[str, str]]:
    """A spec for a folder of images, and a note for some of its fields (by dotted path): why this value.

    `output` is where it will be written, which relative paths start from. Raises DataError for a folder that is
    not a usable dataset; captions may be missing.
    """
    from loraport.advice import RANKS_TEXT, STEPS_TEXT
    from loraport.dataset import find_images, scan
    from loraport.plugins import plugins
    from loraport.spec.load import build_spec
    from loraport.spec.models import ModelSection

    family: Family = plugins().families()[ModelSection.model_fields["family"].default]
    images = find_images(images_dir)
    name = _valid_name(images_dir) if name is None else name
    extension, captioned = _caption_extension(images, family)
    default = None if captioned else name.replace("-", " ").replace("_", " ")
    items = scan(images_dir, extension, default if default is not None else "a caption to be written")
    steps = min(_STEPS_AN_IMAGE * len(items), _MOST_STEPS)
    profile, why_profile = _profile(card)
    missing = len(images) - captioned
    notes = {
        "dataset.path": f"{len(items)} images, {captioned} of them with a .{extension} caption.",
        "dataset.default_caption": _caption_note(extension, captioned, missing),
        "dataset.trigger_word": "Advice: a rare word, such as mp_scifi_buggy.",
        "dataset.resolution": "The median size of the images, so that few of them lose detail.",
        "lora.rank": f"{RANKS_TEXT}.",
        "train.steps": f"{STEPS_TEXT}; here {steps} for {len(items)} images.",
        "memory.profile": why_profile,
        "sample.prompts": "Write one as your captions are written.",
    }
    content = {
        "version": 1,
        "name": name,
        "model": {"family": family.name, "checkpoint": family.checkpoint},
        "dataset": {
            "path": _written_path(images_dir, output),
            "caption_ext": extension,
            "default_caption": default,
            "resolution": _resolution([width * height for width, height in (item.size for item in items)]),
        },
        "lora": {"alpha": 16},
        "train": {"steps": steps},
        "memory": {"profile": profile},
        "save": {"every": max(steps // 4, 1)},
    }
    spec = build_spec(content, base=output.absolute().parent, origin="The proposed spec").spec
    time, disk = _time_and_disk(spec, items, family)
    if card is not None:
        notes["memory.profile"] += f" {time}"
    return spec, notes | {"save.keep": disk}


def render(spec: TrainSpec, notes: dict[str, str], output: Path) -> str:
    """The spec as YAML: each field under its description and note. Reading it as `output` gives the same spec."""
    import textwrap

    from loraport.sets import subject
    from loraport.spec.load import build_spec, parse_yaml
    from loraport.spec.models import leaf_fields, value_at

    leaves = leaf_fields()
    lines = ["# A LoRA training for loraport. Every other field has a default: loraport spec schema."]
    section = ""
    for path in _FIELDS:
        *parents, key = path.split(".")
        indent = "  " * len(parents)
        if parents and parents[0] != section:
            section = parents[0]
            lines += ["", f"{section}:"]
        comment = " ".join(filter(None, (leaves[path].description, notes.get(path))))
        lines += textwrap.wrap(comment, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        value = value_at(spec, path)
        if path == "dataset.path":
            value = _written_path(subject(spec.dataset).path, output)
        lines.append(f"{indent}{key}: {_scalar(value)}")
    text = "\n".join(lines) + "\n"
    read = build_spec(parse_yaml(text, str(output)), base=output.absolute().parent, origin=str(output)).spec
    assert read == spec, "the written spec differs from the proposed one"
    return text


def _scalar(value: Any) -> str:
    """A value as the spec's reader reads it back: plain text where it can be, else JSON, which is YAML too."""
    import json

    from loraport.errors import SpecError
    from loraport.spec.load import parse_yaml

    if isinstance(value, str):
        try:
            if parse_yaml(f"key: {value}", "") == {"key": value}:
                return value
        except SpecError:
            pass  # not plain YAML; quoted below
    return json.dumps(value, ensure_ascii=False)


def _time_and_disk(spec: TrainSpec, items: list[Item], family: Family) -> tuple[str, str]:
    """Notes on what the proposed run takes on this machine, by the sizes and captions of its images."""
    from loraport.advice import SetFacts, advice_for, together
    from loraport.buckets import bucket_for
    from loraport.families import BYTES_PER_TOKEN
    from loraport.sets import subject

    one, multiple = subject(spec.dataset), family.side_multiple
    # What is too small for any bucket is told when the dataset is read for training.
    sides = [bucket_for(item.size, one.resolution, multiple, min(item.size) < multiple) for item in items]
    tokens = sum(-(-len(item.caption.encode()) // BYTES_PER_TOKEN) for item in items)
    facts = together(spec, [SetFacts(one, len(items), sum(w * h for w, h in sides), tokens)], exact=True)
    advice = advice_for(spec, facts=facts)
    return f"Time: {advice.time_line()}", f"Disk: {advice.disk_line()}"


def _valid_name(images_dir: Path) -> str:
    import re

    return re.sub(r"[^\w.\-]+", "-", images_dir.resolve().name).strip("-.")[:100] or "lora"


def _written_path(images_dir: Path, output: Path) -> str:
    """Relative to the spec where the images lie beside or below it, so that both can be moved together."""
    base, target = output.absolute().parent, images_dir.expanduser().absolute()
    return f"./{target.relative_to(base).as_posix()}" if target.is_relative_to(base) else str(target)


def _caption_extension(images: list[Path], family: Family) -> tuple[str, int]:
    """The caption extension that most images have, the family's own where equal, and how many have it."""
    preferred = ["json", "txt", "caption"] if family.caption_format == "json" else ["txt", "caption", "json"]
    counts = {
        extension: sum(image.with_suffix(f".{extension}").exists() for image in images) for extension in preferred
    }
    best = max(preferred, key=lambda extension: counts[extension])
    return best, counts[best]


def _caption_note(extension: str, captioned: int, missing: int) -> str:
    if not captioned:
        return f"No captions were found, so all images get this one; a .{extension} file beside each is better."
    if missing:
        return f"{missing} of the images have no .{extension} caption: write them, or a default here."
    return "Every image has its own."


def _resolution(areas: list[int]) -> int:
    """The square side, in multiples of 16, within the median area."""
    import math
    import statistics

    side = math.isqrt(int(statistics.median(areas))) // 16 * 16
    return max(64, min(side, _LARGEST_RESOLUTION))


def _profile(card: Card | None) -> tuple[str | None, str]:
    from loraport.gpu import settings_for
    from loraport.plugins import plugins
    from loraport.profiles import AUTO

    if card is None:
        return None, "No NVIDIA card was found on this machine."
    chosen = settings_for(card, plugins().profiles())
    if chosen is None:
        return None, f"{card.name} ({card.memory_gib:.0f} GiB) is smaller than the card of every profile."
    profile, settings = chosen
    if settings != profile.sets:
        return AUTO, f"For {card.name}: {profile.name}, in int8 as the card computes in no 8-bit floats."
    return profile.name, f"For {card.name} ({card.memory_gib:.0f} GiB)."
