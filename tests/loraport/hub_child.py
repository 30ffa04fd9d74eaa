"""A process that downloads for several runs, one after the other: specs and run folders as JSON on standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from loraport.errors import DataError
from loraport.hub_datasets import on_disk
from loraport.spec.models import TrainSpec

results = []
for content, run_dir in json.load(sys.stdin):
    told: list[str] = []
    try:
        spec = on_disk(TrainSpec.model_validate(content), run_dir and Path(run_dir), told.append)
        results.append({"spec": spec.model_dump(mode="json"), "told": told})
    except DataError as error:
        results.append({"error": str(error)})
print(json.dumps(results))
