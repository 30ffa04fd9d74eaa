"""The report on a bench: `report.md`, and `report.html` that needs nothing else, no network and no scripts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraport_bench.records import Results

PAGE, MARKDOWN = "report.html", "report.md"


def write_reports(results: Results, folder: Path) -> list[Path]:
    """Write both reports into the bench's folder. Raises RunFolderError when one cannot be written."""
    from loraport.files import write_atomic
    from loraport_bench.report.markdown import markdown
    from loraport_bench.report.page import page

    written = []
    for name, text in ((MARKDOWN, markdown(results)), (PAGE, page(results))):
        write_atomic(folder / name, text)
        written.append(folder / name)
    return written
