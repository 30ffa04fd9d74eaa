"""What fixing changes in a caption, for people: a unified diff of the JSON spread over lines."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator

from loraport.caption_json import CaptionSyntaxError, parse
from loraport_dataset.findings import printable

#: Comparing takes the square of it, and nobody reads more.
_MOST_LINES = 3000


def diff(name: str, old: str, new: str) -> Iterator[str]:
    """Lines of a unified diff. A caption is one line of a file, so both sides are spread over lines first: only what
    is said differs then, not how it is written. Without such a difference nothing is yielded."""
    before, after = _lines(old), _lines(new)
    if max(len(before), len(after)) > _MOST_LINES:
        yield f"{printable(name)}: more than {_MOST_LINES:,} lines, not shown"
        return
    yield from (printable(line) for line in difflib.unified_diff(before, after, f"a/{name}", f"b/{name}", lineterm=""))


def _lines(text: str) -> list[str]:
    try:
        return json.dumps(parse(text), ensure_ascii=False, indent=1).splitlines()
    except (CaptionSyntaxError, RecursionError):
        return text.splitlines()
