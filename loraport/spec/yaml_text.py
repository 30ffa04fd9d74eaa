"""The YAML of specs: the numbers people write, and nothing that can surprise or grow.

1e-4 and 1_000 are numbers; 16:9, `on` and 2024-05-01 are text. No aliases, no tags, no duplicate keys, no infinity;
keys are text.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from loraport.errors import SpecError

#: Levels of nesting; the deepest spec has four, and backend options may nest on.
MAX_DEPTH = 50

_STRING = "tag:yaml.org,2002:str"


def parse_yaml(text: str, origin: str) -> Any:
    """The content of a YAML text; `origin` names it. Raises SpecError with line and column where it is broken."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SpecError(
            f"{origin}: line {line} is not valid YAML: a character that is no text (#x{error.character:02x})."
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not readable"
        if "'\\t'" in problem:
            problem = "a tab; YAML is indented with spaces"
        elif "found another document" in problem:
            problem = "a second document; a spec is one"
        raise SpecError(f"{origin}:{where} is not valid YAML: {problem}.") from error


def dump_yaml(content: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back as it was."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars, and none of what the module's docstring excludes."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _problem(event, "aliases (*name) are not allowed in a spec", yaml.composer.ComposerError)
        if event.tag is not None:
            raise _problem(event, f"tags ({event.tag}) are not allowed in a spec", yaml.composer.ComposerError)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _problem(event, f"nested more than {MAX_DEPTH} levels deep", yaml.composer.ComposerError)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key_node.tag != _STRING:
                shown = key if isinstance(key, str) else "this one"
                raise _problem(key_node, f"keys are text, so put {shown} in quotes", yaml.constructor.ConstructorError)
            if key in seen:
                raise _problem(key_node, f"the key {key!r} is there twice", yaml.constructor.ConstructorError)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise _problem(node, "half a character (a lone surrogate)", yaml.constructor.ConstructorError)
        return value

    def construct_number(self, node: Any) -> int | float:
        construct = self.construct_yaml_int if node.tag.endswith("int") else self.construct_yaml_float
        try:
            number: int | float = construct(node)
        except ValueError as error:  # 0x_, or thousands of digits
            raise _problem(node, "not a number that can be read", yaml.constructor.ConstructorError) from error
        if isinstance(number, float) and not math.isfinite(number):
            raise _problem(node, "a number must be finite", yaml.constructor.ConstructorError)
        return number


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever text `_Loader` would take for a number, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> Any:
        # PyYAML takes these for line breaks and folds them into blanks unless they are escaped.
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar(_STRING, data, style=style)


def _problem(at: Any, what: str, kind: type[yaml.MarkedYAMLError]) -> yaml.MarkedYAMLError:
    return kind(None, None, what, at.start_mark)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.inf|\.Inf|\.INF|\.nan|\.NaN|\.NAN)$",
        list("-+0123456789."),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)
_Dumper.add_representer(str, _Dumper.represent_text)
