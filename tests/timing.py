"""How long a command takes, as little disturbed by other work on the machine as possible."""

from __future__ import annotations

import os
import subprocess
import sys


def least_seconds(arguments: list[str], runs: int) -> float:
    """Processor seconds of `loraport ARGUMENTS` as a process, the least of `runs`. It has one thread and waits for
    nothing, so on a machine without other work that is the time one waits for it."""
    taken = []
    for _ in range(runs):
        process = subprocess.Popen([sys.executable, "-m", "loraport.cli.main", *arguments], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        taken.append(usage.ru_utime + usage.ru_stime)
    return min(taken)
