"""Seeds for one purpose each, from one seed."""

from __future__ import annotations

import hashlib
from typing import Any


def derived_seed(seed: int, *what: Any) -> int:
    """A 63-bit seed for one purpose, from the run's seed."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
