"""What was changed in a caption, told in words."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Change:
    """One thing that was put right: the rule it belongs to, where, and what was done."""

    rule: str  #: the id of the rule that finds fault with it
    json_path: str
    what: str


@dataclass
class Changes:
    """The changes of one caption, in the order they were made."""

    made: list[Change] = field(default_factory=list)

    def add(self, rule: str, json_path: str, what: str) -> None:
        self.made.append(Change(rule, json_path, what))
