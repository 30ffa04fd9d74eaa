"""Places of this machine out of what is written down of a bench: results are made to be shared."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: An absolute path within a text: not the rest of a relative one, of a URL or of one that is shortened already.
_ABSOLUTE = re.compile(r"(?:(?<=file://)|(?<![\w./…>~)}\]*-]))/(?:[\w.@+~-]+/)*[\w.@+~-]*[\w@+~-]")
#: Fields of a spec that hold a path as a whole, whatever characters are in it.
_PATHS = ("checkpoint", "path", "python")
#: A text, or what an option or a field is given, that is an absolute path and nothing else; spaces may be in it.
_WHOLE = re.compile(r"(?:^|(?<==))/[^\n]*$")


def shortened(value: Any, folder: Path | None = None, spec: Any = None) -> Any:
    """What is recorded, with the places of this machine in it called by names.

    `folder`, the bench's, becomes `<bench>`, the user's `<home>`, this interpreter `python`; of any other absolute
    path, as of a local checkpoint, the last part is kept: `…/name`. Names of fields are shortened like values.

    Where a path ends that has spaces or commas in its name, a text does not tell: those in the fields of `spec`, or of
    a spec that is in the value, are known.
    """
    known = {str(folder): "<bench>"} if folder is not None else {}
    known |= {sys.executable: "python"}
    for path in sorted({*_named(value), *_named(spec)}, key=len, reverse=True):
        known |= {spelling: _last(path) for spelling in _spellings(path) if spelling not in known}
    known |= {str(Path.home()): "<home>"}
    return _shortened(value, {path: name for path, name in known.items() if path.strip("/")})


def _named(spec: Any) -> Iterator[str]:
    """The absolute paths in the fields of a spec."""
    if isinstance(spec, dict):
        for name, each in spec.items():
            if name in _PATHS and isinstance(each, str) and each.startswith("/"):
                yield each.rstrip("/")
            else:
                yield from _named(each)
    elif isinstance(spec, list | tuple):
        for each in spec:
            yield from _named(each)


def _spellings(path: str) -> tuple[str, ...]:
    """A path as it is, and as it stands between quotes in YAML, in JSON and on a command line."""
    return path, path.replace("'", "''"), json.dumps(path)[1:-1], path.replace("'", "'\"'\"'")


def _shortened(value: Any, known: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {_shortened(key, known): _shortened(each, known) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(each, known) for each in value]
    return _text(value, known) if isinstance(value, str) else value


def _text(text: str, known: Mapping[str, str]) -> str:
    for path, name in known.items():
        text = re.sub(rf"(?<!:/)(?<![\w.…>~]){re.escape(path)}(?![\w-]|\.\w)", name.replace("\\", r"\\"), text)
    if (whole := _WHOLE.search(text)) and not _has_prose(whole[0]):
        return text[: whole.start()] + _last(whole[0])
    return _ABSOLUTE.sub(lambda found: _last(found[0]), text)


def _has_prose(path: str) -> bool:
    """Whether a text that begins like a path goes on with something else: another path, or a sentence."""
    marks = (", ", ": ", "; ", ". ", " (", ":/", " /", '"', "'")
    return path.endswith((".", "!", "?", ")")) or any(mark in path for mark in marks)


def _last(path: str) -> str:
    return f"…/{path.rstrip('/').rpartition('/')[2]}"
