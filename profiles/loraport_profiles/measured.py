"""What the hardware profiles were measured to take, from the data files in docs/benchmarks.

`python -m loraport_profiles.measured FILE...` reads such files and writes `measured.jsonl`, in this package: the native
backend's rows at full size, in one shape, so that no number is typed and none is told that was not measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from loraport.ideogram4 import IDEOGRAM4, RELEASED
from loraport.profiles import DEFAULTS, STEP_FIELDS, Measurement, Profile


def measurements() -> list[Measurement]:
    """The rows of `measured.jsonl`."""
    text = (files("loraport_profiles") / "measured.jsonl").read_text(encoding="utf-8")
    return [Measurement(**json.loads(line)) for line in text.splitlines()]


def settings(sets: Mapping[str, Any], profiles: Mapping[tuple[str, str], Profile]) -> dict[str, Any]:
    """A hardware profile's settings in the words of `Measurement.memory`."""
    whole = {**DEFAULTS, **sets}
    if "quantize" in sets:
        whole |= profiles["quantize", sets["quantize"]].sets
    return {name: whole[name] for name in STEP_FIELDS}


def native_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a data file that are the native backend's, of the released model's size, and came to their end; of
    lines for the same row of `loraport bench step` the newest."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = {(line.get("row"), line.get("seed")): line for line in lines}.values()
    return [row for row in rows if row.get("status", "ok") == "ok" and "peak_allocated_gib" in row and _is_native(row)]


def _is_native(row: Mapping[str, Any]) -> bool:
    told = row.get("settings", {})
    size = (told.get("blocks", RELEASED.blocks), told.get("width", RELEASED.width))
    return "memory" in told and size == (RELEASED.blocks, RELEASED.width)


def measurement(row: Mapping[str, Any], source: str, profiles: Mapping[tuple[str, str], Profile]) -> Measurement:
    """What is told of a native row."""
    told = row["settings"]
    return Measurement(
        family=IDEOGRAM4.name,
        backend="native",
        card=row["card"],
        date=row["date"][:10],
        resolution=told["resolution"],
        text_tokens=told["text_tokens"],
        rank=told["rank"],
        batch_size=told["batch"],
        optimizer=told["optimizer"],
        gpus=told.get("gpus", 1),
        memory=memory_of(row, profiles),
        step_s=row["step_s"]["median"],
        peak_allocated_gib=row["peak_allocated_gib"],
        peak_reserved_gib=row["peak_reserved_gib"],
        source=source,
    )


def memory_of(row: Mapping[str, Any], profiles: Mapping[tuple[str, str], Profile]) -> dict[str, Any]:
    """The settings of a row's `memory`, which names a profile, spells its fields out, or both."""
    written = row["settings"]["memory"]
    preset = written.get("profile")
    own = {name: value for name, value in written.items() if name in DEFAULTS and value is not None}
    if isinstance(own.get("gradient_checkpointing"), bool):
        own["gradient_checkpointing"] = "full" if own["gradient_checkpointing"] else "none"
    return settings((profiles["hardware", preset].sets if preset else {}) | own, profiles)


def copied(file: Path, profiles: Mapping[tuple[str, str], Profile]) -> list[Measurement]:
    """The rows of a data file that tell of speed and memory as people train: no held-out losses over seeds."""
    return [measurement(row, file.name, profiles) for row in native_rows(file) if row.get("seed") is None]


def main() -> None:
    from loraport.plugins import plugins

    known = plugins().profiles()
    rows = [row for name in sys.argv[1:] for row in copied(Path(name), known)]
    text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    (Path(__file__).parent / "measured.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
