"""The rules as a page of the documentation (docs/dataset-rules.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loraport.rules import CaptionRule, ImageRule, Rule, SetRule, StrayRule

_WHAT: dict[type[Rule], str] = {
    CaptionRule: "each caption",
    ImageRule: "each image",
    StrayRule: "other files",
    SetRule: "the whole set",
}
_SEVERITIES = {
    "error": "what would not be trained, or not as it is meant; exit code 4",
    "warning": "what is most likely a mistake; exit code 4 with `--strict`",
    "advice": "what is worth knowing; never changes the exit code",
}
_HEAD = """# The rules for datasets

`loraport dataset check` and `loraport check` go by these ([how to use them](dataset.md)). This page is written by
`loraport dataset rules --page` from the rules themselves. Plugins can add rules: [plugins.md](plugins.md).

| severity | meaning |
|---|---|
"""


def table(rules: Iterable[type[Rule]]) -> list[dict[str, Any]]:
    """The rules as JSON."""
    return [
        {
            "id": rule.id,
            "severity": rule.severity,
            "family": rule.family,
            "looks_at": _what(rule),
            "needs_pixels": getattr(rule, "needs_pixels", False),
            "stops_training": rule.stops_training,
            "explanation": rule.explanation,
            "fix": rule.fix,
        }
        for rule in rules
    ]


def page(rules: Iterable[type[Rule]]) -> str:
    """The page in Markdown, in the order that the rules are registered."""
    rules = list(rules)
    lines = [_HEAD + "\n".join(f"| {name} | {meaning} |" for name, meaning in _SEVERITIES.items())]
    for family in (None, *sorted({rule.family for rule in rules if rule.family})):
        lines.append(f"## {'For every family' if family is None else f'For captions of {_title(family)}'}")
        lines += [_section(rule) for rule in rules if rule.family == family]
    return "\n\n".join(lines) + "\n"


def _section(rule: type[Rule]) -> str:
    notes = [rule.severity, f"looks at {_what(rule)}"]
    notes += ["needs `--pixels`"] if getattr(rule, "needs_pixels", False) else []
    notes += ["`loraport train` refuses to start"] if rule.stops_training else []
    return f"### `{rule.id}`\n\n*{', '.join(notes)}*. {rule.explanation}\n\n**Fix:** {rule.fix}"


def _what(rule: type[Rule]) -> str:
    return next(what for kind, what in _WHAT.items() if issubclass(rule, kind))


def _title(family: str) -> str:
    from loraport.plugins import plugins

    known = plugins().families().get(family)
    return known.title if known else family
