"""Spec files: YAML in, a checked TrainSpec out, with every problem told at once and by its path."""

from __future__ import annotations

import copy
import os
import re
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from loraport.errors import SpecError, nearest
from loraport.spec.aliases import ALIASES, SET_ALIASES
from loraport.spec.migrate import migrate
from loraport.spec.models import ImageSetSection, Section, TrainSpec, leaf_fields
from loraport.spec.yaml_text import parse_yaml

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_BYTES = 1_000_000
PATH_FIELDS = ("dataset.path", "dataset.regularization.path", "validation.path", "backend.python")

_SET = re.compile(r"dataset\.sets\[\d+\]")

# An error quotes what was written; its length must not get out of hand.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


@dataclass(frozen=True)
class LoadedSpec:
    """A checked spec and what the reader should know about how it was read."""

    spec: TrainSpec
    notices: list[str] = field(default_factory=list)


def load_spec(path: Path | str, overrides: list[str] | None = None) -> LoadedSpec:
    """Read and check a spec file. Relative paths in it are relative to its folder.

    `overrides` are `section.field=value` strings, the value read as YAML; their relative paths are relative to the
    current folder. Raises SpecError naming the file, the field's path, the nearest valid name and the choices.
    """
    path = Path(path)
    raw = _read(path)
    return build_spec(raw, overrides or [], base=path.resolve().parent, origin=str(path))


def build_spec(raw: Any, overrides: list[str] | None = None, *, base: Path, origin: str) -> LoadedSpec:
    """Check a raw mapping as `load_spec` does; `base` is what relative paths start from, `origin` names the source."""
    if not isinstance(raw, dict):
        raise SpecError(f"{origin}: a spec is a mapping of sections (model:, dataset:, …), not {_kind(raw)}.")
    notices: list[str] = []
    content = migrate(copy.deepcopy(raw))
    _rename_aliases(content, notices, origin)
    _anchor_paths(content, base, origin)
    for override in overrides or []:
        patch = _parse_override(override)
        _rename_aliases(patch, notices, f"--set {override}")
        _anchor_paths(patch, Path.cwd(), f"--set {override}")
        _merge(content, patch, f"--set {override}")
    try:
        return LoadedSpec(TrainSpec.model_validate(content), notices)
    except ValidationError as error:
        raise SpecError(_explain(error, content, origin)) from error


def _read(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except IsADirectoryError as error:
        raise SpecError(f"{path} is a folder, not a spec file.") from error
    except OSError as error:
        raise SpecError(
            f"{path} cannot be read: {error.strerror}.", hint="Write a spec with: loraport init IMAGES_DIR"
        ) from error
    if len(data) > MAX_BYTES:
        raise SpecError(f"{path} has more than {MAX_BYTES:,} bytes, which is too much for a spec.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    return parse_yaml(text, str(path))


def _rename_aliases(content: dict[str, Any], notices: list[str], origin: str) -> None:
    """Move each foreign name to the spec's own, in place. A name given both ways is an error."""
    _rename_sets(content, notices, origin)
    leaves = leaf_fields()
    sections: list[tuple[str, dict[str, Any]]] = [("", content)]
    sections += [(f"{key}.", value) for key, value in content.items() if isinstance(value, dict)]
    for prefix, mapping in sections:
        for key in [key for key in mapping if isinstance(key, str)]:
            target = ALIASES.get(key)
            at_home = target is not None and prefix in ("", target.rsplit(".", 1)[0] + ".")
            if (
                target is None
                or not at_home
                or prefix + key in leaves
                or (not prefix and key in TrainSpec.model_fields)
            ):
                continue
            section, name = target.split(".")
            home = content.setdefault(section, {})
            if not isinstance(home, dict):
                continue
            if name in home:
                raise SpecError(f"{origin}: {prefix}{key} and {target} are the same field; keep one.")
            home[name] = mapping.pop(key)
            notices.append(f"{origin}: read {prefix}{key} as {target}")


def _rename_sets(content: dict[str, Any], notices: list[str], origin: str) -> None:
    """Move a list of data sets, written where other trainers have one, to dataset.sets, and name their fields."""
    for key in ("dataset", "datasets"):
        if isinstance(content.get(key), list):
            sets = content.pop(key)
            shared = content.setdefault("dataset", {})
            if not isinstance(shared, dict) or "sets" in shared:
                raise SpecError(f"{origin}: {key} and dataset.sets are the same field; keep one.")
            shared["sets"] = sets
            notices.append(f"{origin}: read {key} as dataset.sets")
    for path, mapping in _sets(content):
        for key in [key for key in mapping if isinstance(key, str)]:
            name = SET_ALIASES.get(key, ALIASES.get(key, "").removeprefix("dataset."))
            if name not in ImageSetSection.model_fields or key in ImageSetSection.model_fields:
                continue
            if name in mapping:
                raise SpecError(f"{origin}: {path}.{key} and {path}.{name} are the same field; keep one.")
            mapping[name] = mapping.pop(key)
            notices.append(f"{origin}: read {path}.{key} as {path}.{name}")


def _sets(content: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The path of each set of images in raw content, or in a patch of it (by number), with what it says."""
    dataset = content.get("dataset")
    sets = dataset.get("sets") if isinstance(dataset, dict) else None
    numbered = enumerate(sets) if isinstance(sets, list) else sets.items() if isinstance(sets, dict) else ()
    return [(f"dataset.sets[{number}]", one) for number, one in numbered if isinstance(one, dict)]


def _anchor_paths(content: dict[str, Any], base: Path, origin: str) -> None:
    """Make relative paths absolute, in place. A checkpoint is a path when it looks like one or is there; a dataset of
    the hub stays as it is."""
    found: list[tuple[str, dict[str, Any], str]] = [(f"{path}.path", one, "path") for path, one in _sets(content)]
    for dotted in (*PATH_FIELDS, "model.checkpoint"):
        *parents, last = dotted.split(".")
        mapping: Any = content
        for part in parents:
            mapping = mapping.get(part) if isinstance(mapping, dict) else None
        if isinstance(mapping, dict):
            found.append((dotted, mapping, last))
    for dotted, mapping, last in found:
        value = mapping.get(last)
        if not isinstance(value, str):
            continue
        if not value or "\0" in value:
            raise SpecError(f"{origin}: {dotted}: {value!r} is not a path.")
        if dotted == "model.checkpoint" and not _is_path(value, base):
            continue
        if last == "path" and value.startswith("hub:"):
            continue
        mapping[last] = str((base / os.path.expanduser(value)).absolute())


def _is_path(checkpoint: str, base: Path) -> bool:
    return checkpoint.startswith((".", "/", "~")) or (checkpoint != "tiny" and os.path.exists(base / checkpoint))


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SpecError(f"--set {text!r}: write it as section.field=value, for example --set train.steps=10.")
    patch: Any = parse_yaml(value, f"--set {text}") if value.strip() else None
    for part in reversed(key.strip().split(".")):
        name, *indices = re.split(r"\[(\d{1,4})\](?=\[|$)", part)
        for index in reversed([index for index in indices if index]):
            patch = {int(index): patch}
        patch = {name: patch}
    assert isinstance(patch, dict)
    return patch


def _merge(content: dict[Any, Any], patch: dict[Any, Any], origin: str) -> None:
    for key, value in patch.items():
        old = content.get(key)
        if isinstance(value, dict) and any(isinstance(name, int) for name in value):
            content[key] = _merged_list(old, value, key, origin)
        elif isinstance(value, dict):
            content[key] = old if isinstance(old, dict) else {}
            _merge(content[key], value, origin)
        else:
            content[key] = value


def _merged_list(old: Any, patch: dict[Any, Any], key: str, origin: str) -> list[Any]:
    items = dict(enumerate(old if isinstance(old, list) else []))
    (index,) = patch
    if index not in items:
        there = f"has [0] to [{len(items) - 1}]" if items else "is no list, or has nothing in it"
        raise SpecError(f"{origin}: {key or 'spec'}[{index}] is not there: {key or 'a spec'} {there}.")
    _merge(items, patch, origin)
    return list(items.values())


def _explain(error: ValidationError, content: dict[str, Any], origin: str) -> str:
    lines = [f"{origin} is not a valid spec:"]
    for problem in error.errors():
        location: list[str] = []
        for part in problem["loc"]:
            if isinstance(part, int) and location:
                location[-1] += f"[{part}]"
            elif part not in ("str", "list[str]"):
                location.append(str(part))
        path = ".".join(location)
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {path}: no such field.{_suggest(location)}")
        elif problem["type"] == "missing":
            lines.append(f"  {path}: needed, but not there.{_describe(path)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "model_type":
                message = f"a section with fields belongs here: {', '.join(_children(path + '.'))}"
            got = f" (got {_short.repr(problem['input'])})" if not isinstance(problem["input"], dict | Section) else ""
            told = f"{message[:1].lower()}{message[1:]}{got}."
            lines.append(f"  {path or 'spec'}: {told}{_nearest_choice(problem)}{_describe(path)}")
    return "\n".join(dict.fromkeys(lines))


def _nearest_choice(problem: ErrorDetails) -> str:
    if problem["type"] != "literal_error":
        return ""
    close = nearest(str(problem["input"]), re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
    return f" Did you mean {close!r}?" if close else ""


def _suggest(location: list[str]) -> str:
    leaves = leaf_fields()
    *parents, name = location
    siblings = _children("".join(f"{part}." for part in parents))
    close = nearest(name, siblings)
    if close:
        return f" Did you mean {'.'.join([*parents, close])}?"
    if parents and _SET.fullmatch(".".join(parents)):
        return f" Choices: {', '.join(siblings)}."
    if name in ALIASES:
        return f" Did you mean {ALIASES[name]}?"
    elsewhere = nearest(name, {leaf.rsplit(".", 1)[-1] for leaf in leaves})
    found = [leaf for leaf in leaves if elsewhere and leaf.endswith(f".{elsewhere}")]
    return f" Did you mean {' or '.join(found)}?" if found else f" Choices: {', '.join(siblings)}."


def _children(prefix: str) -> list[str]:
    """The names of the fields and sections directly under a prefix, which is empty or ends in a dot."""
    if _SET.fullmatch(prefix.removesuffix(".")):
        return sorted(ImageSetSection.model_fields)
    return sorted({leaf[len(prefix) :].split(".")[0] for leaf in leaf_fields() if leaf.startswith(prefix)})


def _describe(path: str) -> str:
    parent, _, name = path.rpartition(".")
    info = ImageSetSection.model_fields.get(name) if _SET.fullmatch(parent) else leaf_fields().get(path)
    return f" {info.description}" if info is not None else ""


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"
