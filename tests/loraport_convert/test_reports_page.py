"""docs/lora-reports.md is what the tests of reports say."""

import importlib.util
import os
import re
from pathlib import Path

from lora_reports import REPORTS, page

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "lora-reports.md"
NAMES = ("test_reports", "test_more_reports", "test_biases_and_norms", "test_oft")


def imported(name):
    spec = importlib.util.spec_from_file_location(f"reports_of_{name}", HERE / "dialects" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TESTS = [imported(name) for name in NAMES]


def test_the_page_is_made_from_the_tests():
    if "LORAPORT_RECORD" in os.environ:
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_report_names_real_threads_and_stands_at_a_test_that_runs():
    threads = [thread for each in REPORTS.values() for thread in each.threads]
    assert len(threads) == len(set(threads)) > 30
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", thread) for thread in threads)
    for name in REPORTS:
        file, _, test = name.partition(".")
        assert callable(getattr(TESTS[NAMES.index(file)], test))
        assert test.startswith("test_")


def test_every_file_whose_tests_are_marked_is_among_them():
    marked = {path.stem for path in HERE.rglob("test_*.py") if "\n@report(" in path.read_text(encoding="utf-8")}
    assert marked == set(NAMES)
