"""How long a command takes, as little disturbed by other work on the machine as possible."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile


def least_seconds(arguments: list[str], runs: int) -> float:
    """Processor seconds of `loraport ARGUMENTS` as a process, the least of `runs` after one more. It has one thread and
    waits for nothing, so on a machine without other work that is the time one waits for it."""
    command = [sys.executable, "-m", "loraport.cli.main", *arguments]
    taken = []
    with tempfile.TemporaryDirectory() as compiled:
        # As where it is installed: Python's files are compiled once.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": compiled}
        for _ in range(runs + 1):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0
            taken.append(usage.ru_utime + usage.ru_stime)
    return min(taken[1:])
