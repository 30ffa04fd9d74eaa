"""What was found: counted by rule with a few examples, and written to a file finding by finding."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from loraport.rules import SEVERITIES, Finding, Rule

FORMAT_VERSION = 1
#: Examples of a rule that are of the same file, at most: others show more.
_OF_ONE_FILE = 3
#: Takes each finding as it is found, with the title of its dataset.
Sink = Callable[[str, Finding], None]


@dataclass
class RuleCount:
    """How often a rule was broken, and the first times."""

    rule: type[Rule]
    count: int = 0
    examples: list[tuple[str, Finding]] = field(default_factory=list)  #: with the title of the dataset


@dataclass
class Checked:
    """A dataset that was checked, in numbers."""

    title: str  #: where the spec says so, such as `dataset.sets[1]`; `dataset` for a folder
    folder: str
    family: str
    resolution: int
    caption_ext: str
    images: int = 0
    captions: int = 0  #: images with a caption of their own
    tokens: str = ""  #: how captions were counted


@dataclass
class Report:
    """Everything that a check tells. Of each rule only `keep` findings are kept, so its size is bounded."""

    keep: int = 10
    datasets: list[Checked] = field(default_factory=list)
    rules: dict[str, RuleCount] = field(default_factory=dict)
    broken_rules: dict[str, str] = field(default_factory=dict)  #: rules that raised an exception, and which

    def add(self, dataset: str, finding: Finding, rule: type[Rule]) -> None:
        counted = self.rules.setdefault(finding.rule, RuleCount(rule))
        counted.count += 1
        if len(counted.examples) < self.keep:
            same = sum(one.file == finding.file for _, one in counted.examples)
            if same < _OF_ONE_FILE or not finding.file:
                counted.examples.append((dataset, finding))

    @property
    def counts(self) -> Counter[str]:
        """Findings by severity."""
        counts: Counter[str] = Counter()
        for counted in self.rules.values():
            counts[counted.rule.severity] += counted.count
        return counts

    def ordered(self) -> list[RuleCount]:
        """The rules that are broken: errors first, of these what concerns a whole set, then the most frequent."""
        return sorted(
            self.rules.values(),
            key=lambda one: (
                SEVERITIES.index(one.rule.severity),
                any(finding.file for _, finding in one.examples),
                -one.count,
                one.rule.id,
            ),
        )

    def fails(self, strict: bool) -> bool:
        """Whether there are errors, or with `strict` warnings."""
        return bool(self.counts["error"] or self.broken_rules or (strict and self.counts["warning"]))

    def summary(self) -> dict[str, Any]:
        """The report as JSON without the findings."""
        counts = self.counts
        return {
            "datasets": [asdict(dataset) for dataset in self.datasets],
            **{"errors": counts["error"], "warnings": counts["warning"], "advice": counts["advice"]},
            "rules": {one.rule.id: {"severity": one.rule.severity, "count": one.count} for one in self.ordered()},
            "broken_rules": self.broken_rules,
        }


class FindingsWriter:
    """Writes the findings file as a stream: one JSON document, a finding a line, the summary at its end."""

    def __init__(self, file: TextIO):
        self._file = file
        self._before = f'{{"version": {FORMAT_VERSION},\n"findings": [\n'

    def __call__(self, dataset: str, finding: Finding) -> None:
        content = {"dataset": dataset, **asdict(finding)}
        self._file.write(self._before + json.dumps(content, ensure_ascii=False))
        self._before = ",\n"

    def finish(self, report: Report) -> None:
        """Write what is left; without this call nothing whole is there."""
        self._file.write("" if self._before == ",\n" else self._before)
        self._file.write("\n],\n")
        self._file.write(json.dumps(report.summary(), ensure_ascii=False, indent=2)[1:].lstrip("\n") + "\n")


def tellable(text: str) -> str:
    """A text that every file can hold: half characters and bytes of names that are not Unicode become `\\\\udc80`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def printable(text: str) -> str:
    """A text on one line of a terminal: control characters as escapes, so that no file name can move the cursor."""
    return "".join(
        character if character.isprintable() or character == " " else character.encode("unicode_escape").decode()
        for character in tellable(text)
    )
