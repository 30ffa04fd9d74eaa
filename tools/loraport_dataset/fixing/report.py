"""What fixing a dataset came to: counted and told."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from loraport.rules import Finding
from loraport_dataset.findings import printable
from loraport_dataset.fixing.dataset import FixedImage, Recognised, is_plain

_TOLD = 20
_KEPT = 10_000


@dataclass
class Report:
    """Counts of captions, what was changed by rule, and what is left. The first 10,000 of each are kept one by one."""

    captions: int = 0
    changed: int = 0
    plain: int = 0
    errors: int = 0
    warnings: int = 0
    by_rule: Counter[str] = field(default_factory=Counter)
    changes: list[dict[str, str]] = field(default_factory=list)
    left: list[Finding] = field(default_factory=list)
    boxes: str = ""  #: the convention that boxes were read in, and why

    def add(self, fixed: FixedImage) -> None:
        self.captions += fixed.fixed is not None
        self.changed += fixed.changed
        self.plain += fixed.fixed is not None and is_plain(fixed)
        for finding in fixed.left:
            self.errors += finding.severity == "error"
            self.warnings += finding.severity == "warning"
            if finding.severity != "advice" and len(self.left) < _KEPT:
                self.left.append(finding)
        if fixed.fixed is not None and fixed.image.caption is not None:
            self.by_rule.update(change.rule for change in fixed.fixed.changes)
            for change in fixed.fixed.changes[: _KEPT - len(self.changes)]:
                self.changes.append({"file": fixed.image.caption.name, **asdict(change)})

    def add_undecided_boxes(self, found: Recognised) -> None:
        """Boxes of another convention that stay, as it is not certain which one it is."""
        rest = f"{found.convention.form}-{found.convention.unit}"
        message = f"All boxes seem to be {found.convention} ({found.evidence}), but that is not certain."
        fix = f"They stay as they are; say it: --boxes xy-{rest}, --boxes yx-{rest}, or --boxes official."
        self.errors += 1
        self.left.append(Finding("", "", "bbox-convention", "error", message, fix))

    def as_json(self) -> dict[str, Any]:
        return {
            "captions": self.captions,
            "changed": self.changed,
            "plain_text": self.plain,
            "errors_left": self.errors,
            "warnings_left": self.warnings,
            "boxes_read_as": self.boxes or None,
            "changes": self.changes,
            "left": [asdict(finding) for finding in self.left],
        }

    def lines(self) -> list[str]:
        """One screen for people: what was put right, then what is left."""
        lines = [
            f"{self.captions:,} captions: {self.changed:,} changed, {self.captions - self.changed:,} as they were."
        ]
        if self.by_rule:
            counted = (f"{rule} {count:,}" for rule, count in sorted(self.by_rule.items()))
            lines.append(f"  put right: {', '.join(counted)}")
        if self.plain:
            lines.append(f"  plain text: {self.plain:,}; `loraport dataset wrap` makes JSON of it")
        total = self.errors + self.warnings
        if total:
            lines.append(f"Left for you, as it cannot be known what is meant: {total:,}")
            for finding in self.left[:_TOLD]:
                place = f" {finding.json_path}:" if finding.json_path else ""
                said = f"{finding.severity} [{finding.rule}] {finding.message} {finding.fix}"
                lines.append(printable(f"  {finding.file or 'the whole set'}:{place} {said}"))
            if total > _TOLD:
                lines.append(f"  and {total - _TOLD:,} more; --json has them.")
        return lines
