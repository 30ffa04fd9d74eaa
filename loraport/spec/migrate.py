"""Older versions of the spec become the current one, one small pure step at a time.

A step takes the raw mapping of version N and returns that of version N+1; `STEPS[N]` is that function. Version 1 is
the first, so there is none yet. A spec from the future is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loraport.errors import SpecError
from loraport.spec.models import SPEC_VERSION

STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def migrate(
    raw: dict[str, Any],
    steps: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = STEPS,
    current: int = SPEC_VERSION,
) -> dict[str, Any]:
    """Bring a raw spec to version `current`. Raises SpecError for a version that is not a number or is too new."""
    version = raw.get("version", current)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise SpecError(f"version: {version!r} is not a spec version. Write version: {current}.")
    if version > current:
        raise SpecError(
            f"version: {version} is newer than this LoraPort reads ({current}).",
            hint="Update with: pip install -U loraport",
        )
    for number in range(version, current):
        raw = {**steps[number](raw), "version": number + 1}
    return raw
