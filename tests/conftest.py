"""For all tests, and the processes that they start."""

from __future__ import annotations

import os

# Each worker has a core: more threads of torch would only wait for one another. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
