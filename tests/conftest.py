"""For all tests, and the processes that they start."""

from __future__ import annotations

import os
import signal
from collections import Counter

import pytest

# Each worker has a core: more threads of torch would only wait for one another. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Hundreds of processes import the same files. Each is compiled by the first that does, and none that nobody imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("PIP_COMPILE", "0")
# Under nohup it would be ignored here and in every process started, some of which are to end by it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with slow tests first, then those with the most tests, so that all workers end at about one time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    number = Counter(item.path for item in items)
    items.sort(key=lambda item: (-slow[item.path], -number[item.path]))
