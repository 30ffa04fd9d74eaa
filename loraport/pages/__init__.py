"""What reports in HTML share: one file each, which asks for nothing, runs no script, and escapes every text."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from markupsafe import Markup

#: Nothing is loaded from anywhere but the page itself.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(package: str, template: str, style: str, **values: Any) -> str:
    """A page from a package's template and style sheet, which comes after the common one. Every value is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sheet = Markup(text_of("loraport.pages", "base.css") + text_of(package, style))
    return environment.from_string(text_of(package, template)).render(style=sheet, policy=POLICY, **values)


def text_of(package: str, name: str) -> str:
    """A file that is installed with a package."""
    return (files(package) / name).read_text(encoding="utf-8")
