"""The quality of what was trained: every LoRA's held-out loss, by one evaluator on the same triples."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraport import scoring
from loraport.backend import Backend
from loraport.errors import BackendError, DataError, LoraPortError
from loraport.files import write_atomic
from loraport.gpu import cards, settings_for
from loraport.plugins import plugins
from loraport.profiles import DEFAULTS, resolve_memory
from loraport.run.api import DEFAULT_BACKEND
from loraport.run.errors_line import find_error
from loraport.scoring import Score, Scorer
from loraport.spec.load import build_spec
from loraport.spec.models import TrainSpec
from loraport_bench import records as r
from loraport_bench.images import Staged, held_out_dataset
from loraport_bench.process import run_to_end
from loraport_bench.row import LORA, RECORD, TO_SCORE, read_row
from loraport_bench.settings import Settings


def score_rows(folders: list[Path], settings: Settings, staged: Staged) -> list[str]:
    """Score what these rows left to be scored, and write it into their records. Returns what could not be done.

    One process loads the model once, for all of them. Raises BackendError when there is no evaluator or it fails.
    """
    todo = {place: json.loads((place / TO_SCORE).read_text()) for place in folders if (place / TO_SCORE).exists()}
    if not todo or not staged.held_out_images:
        return []
    scorer = evaluator()
    spec = _spec(settings, staged, scorer)
    files = [place / point["file"] for place, points in todo.items() for point in points]
    scores = _run(scorer, spec, files)
    alone = scores[None]
    if not math.isfinite(statistics.fmean(alone.losses)):
        raise DataError("The held-out loss is not a number without any LoRA.", hint="Look at the checkpoint.")
    problems = []
    for place, points in todo.items():
        run = read_row(place)
        assert run is not None, "what is to be scored has a record"
        quality, notes = _quality(place, points, scores, alone, spec, scorer)
        problems += [f"{run.key}: {note}" for note in notes]
        done = run.model_copy(update={"quality": quality, "notes": [*run.notes, *notes]})
        write_atomic(place / RECORD, done.model_dump_json() + "\n")
        for point in points:
            if point["file"] != LORA:
                (place / point["file"]).unlink(missing_ok=True)
        (place / TO_SCORE).unlink()
    return problems


def evaluator() -> Scorer:
    """The backend that scores: the default one, if it can, else the first that can. BackendError when none can here."""
    found: Mapping[str, Backend] = plugins().backends()
    names = sorted(found, key=lambda name: name != DEFAULT_BACKEND)
    for name in names:
        backend: Any = found[name]
        if isinstance(backend, Scorer) and backend.readiness().ready:  # type: ignore[attr-defined]
            return backend
    raise BackendError(
        "No backend that scores LoRAs is ready here.",
        hint="Install the native one: pip install 'loraport[native]'. Or give --held-out 0 to score nothing.",
    )


def _spec(settings: Settings, staged: Staged, scorer: Scorer) -> TrainSpec:
    """The evaluator's spec: the given one on the held-out images alone, with the memory settings for this card."""
    card = next(iter(cards()), None)
    chosen = settings_for(card, plugins().profiles()) if card else None
    memory = DEFAULTS | (chosen[1] if chosen else {})
    memory |= {"compile": "none", "gradient_checkpointing": "none"}
    content = {
        **settings.given,
        "model": {**settings.given["model"], "checkpoint": staged.checkpoint},
        "memory": memory,
        "backend": {"name": scorer.name},
        "sample": {},
        "validation": {"every": 1, "path": str(staged.held_out)},
    }
    given = TrainSpec.model_validate(settings.given)
    content["dataset"] = {**settings.given["dataset"], **held_out_dataset(given, staged.held_out)}
    spec = build_spec(content, base=Path.cwd(), origin="the evaluator's spec").spec
    return resolve_memory(spec, plugins().profiles())


def _run(scorer: Scorer, spec: TrainSpec, files: list[Path]) -> dict[str | None, Score]:
    with tempfile.TemporaryDirectory(prefix="loraport-score-") as place:
        scoring.write_job(Path(place) / "job.json", spec, files)
        command = scorer.score_command(Path(place) / "job.json")
        environment = {**os.environ, "LORAPORT_CACHE": place}  # what a trainer cached is its own
        code, output, said = run_to_end(command, environment)
    if code:
        told: LoraPortError | None = find_error(output)
        last = "\n".join((said or output).strip().splitlines()[-3:])
        raise told or BackendError(f"The evaluator {scorer.name} failed ({code}): {last}")
    scores = {score.lora: score for line in output.splitlines() if (score := scoring.read_line(line))}
    missing = {None, *map(str, files)} - scores.keys()
    if missing:
        raise DataError(f"The evaluator {scorer.name} told no score of {len(missing)} of {len(files) + 1} models.")
    return scores


def _quality(
    place: Path,
    points: list[dict[str, Any]],
    scores: Mapping[str | None, Score],
    alone: Score,
    spec: TrainSpec,
    scorer: Scorer,
) -> tuple[r.Quality | None, list[str]]:
    notes, curve = [], []
    for point in points:
        score = scores[str(place / point["file"])]
        if score.problem is not None:
            notes.append(f"The LoRA of step {point['step']} could not be scored: {score.problem}")
            continue
        loss = statistics.fmean(score.losses)
        if not math.isfinite(loss):
            notes.append(f"The held-out loss of the LoRA of step {point['step']} is not a number.")
            continue
        curve.append(r.QualityPoint(step=point["step"], images=point["images"], train_s=point["train_s"], loss=loss))
    end = scores[str(place / LORA)]
    if end.problem is not None or not math.isfinite(statistics.fmean(end.losses)):
        return None, notes
    memory = spec.memory
    numbers = spec.model.dtype if memory.storage == "none" else f"{spec.model.dtype}, weights in {memory.storage}"
    computing = "" if memory.compute == "model" else f", computing in {memory.compute}"
    images = len(list(Path(spec.validation.path or "").glob("*.png")))
    quality = r.Quality(
        evaluator=f"{scorer.name} {scorer.version}, {numbers}{computing}",
        triples=len(end.losses),
        images=images,
        without=statistics.fmean(alone.losses),
        loss=statistics.fmean(end.losses),
        each=end.losses,
        without_each=alone.losses,
        curve=curve,
    )
    return quality, notes
