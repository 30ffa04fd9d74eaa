"""Public reports of LoRA files that failed, each told at the test that reproduces its file; docs/lora-reports.md lists
them."""

from dataclasses import dataclass
from pathlib import Path

HEAD = """# Reports of LoRA files that failed

Each row stands at a test that makes a file of the reported shape and shows what becomes of it: {threads} public threads
in {rows} tests. The page is made from those tests, by
`LORAPORT_RECORD=1 pytest tests/loraport_convert/test_reports_page.py`.

| reported | what went wrong | what `loraport convert` does |
|---|---|---|
"""


@dataclass(frozen=True)
class Report:
    """`threads` are `owner/repository#number`; `wrong` is what people saw, `now` what becomes of such a file."""

    threads: tuple[str, ...]
    wrong: str
    now: str

    @property
    def row(self):
        return f"| {', '.join(map(_link, self.threads))} | {self.wrong} | {self.now} |\n"


def _link(thread):
    repository, _, number = thread.partition("#")
    return f"[{repository.partition('/')[2]}#{number}](https://github.com/{repository}/issues/{number})"


REPORTS: dict[str, Report] = {}


def report(*threads, wrong, now):
    """Marks a test as that of these threads."""

    def mark(test):
        REPORTS[f"{Path(test.__code__.co_filename).stem}.{test.__name__}"] = Report(threads, wrong, now)
        return test

    return mark


def page():
    """The page of every report whose test has been imported."""
    rows = [REPORTS[name] for name in sorted(REPORTS)]
    threads = {thread for each in rows for thread in each.threads}
    return HEAD.format(threads=len(threads), rows=len(rows)) + "".join(each.row for each in rows)
