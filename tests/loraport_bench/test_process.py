"""Processes that a bench starts and nobody watches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

CHILD = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
PARENT = f"""
import os, sys
from loraport_bench.process import run_to_end
run_to_end([sys.executable, "-c", {CHILD!r}, sys.argv[1]], os.environ)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_goes_with_the_process_that_waits_for_it(tmp_path: Path, number: signal.Signals) -> None:
    told = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(told)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (told.exists() and told.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    child = int(told.read_text())
    os.kill(parent.pid, number)
    _, said = parent.communicate(timeout=60)
    assert number == signal.SIGKILL or "Interrupted: Stopped." in said
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not psutil.pid_exists(child)
