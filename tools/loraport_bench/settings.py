"""What a bench is to do, kept in its folder as `bench.json`: the same command goes on, another one is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError

from loraport.errors import DataError, RunFolderError, SpecError
from loraport.files import write_atomic
from loraport_bench.records import Data, Tier

FILE = "bench.json"
#: The profile that stands for the spec's own memory section.
OF_SPEC = "spec"


class Settings(Data):
    """All that a bench depends on. `given` is the spec as it was read, with absolute paths."""

    given: dict[str, Any]
    changes: dict[str, list[str]] = Field(default_factory=dict)  #: by backend: FIELD=VALUE for it alone
    backends: list[str]
    profiles: list[str]
    batches: list[int]  #: of train.batch_size
    tiers: list[Tier]
    card: str | None  #: hardware profile for best effort; None: that of the machine's card
    repeats: int
    seeds: list[int]
    steps: int
    warm_up: int
    checkpoints: int  #: of a run that are scored, the end among them
    held_out: int
    time_limit_s: float
    sampling_s: float
    overhead_pairs: int

    @property
    def spec_sha256(self) -> str:
        content = json.dumps(self.given, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def keep_in(self, folder: Path) -> None:
        """Write to a bench's folder; into an old one if it was for the same, or had another limit, which measures
        nothing else. Raises SpecError naming what differs, RunFolderError when the folder cannot be made."""
        path = folder / FILE
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            begun = path.exists()
        if begun:
            old = self.read_from(folder)
            names = [name for name in type(self).model_fields if getattr(old, name) != getattr(self, name)]
            told = [
                _difference(name, getattr(old, name), getattr(self, name)) for name in names if name != "time_limit_s"
            ]
            if told:
                raise SpecError(
                    f"{folder} holds a bench with other settings: {', '.join(told)}.",
                    hint="Give the options it was begun with to go on with it, or another folder with --out.",
                )
            if not names:
                return
        write_atomic(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read_from(cls, folder: Path) -> Self:
        """The settings of a bench's folder. Raises DataError when they are not there or damaged."""
        try:
            return cls.model_validate_json((folder / FILE).read_bytes())
        except (OSError, ValidationError) as error:
            raise DataError(
                f"{folder} is not the folder of a bench: its {FILE} is missing or damaged.",
                hint="`loraport bench SPEC -o FOLDER` makes one.",
            ) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises RunFolderError, naming the path, for what the system says against writing it."""
    try:
        yield
    except FileExistsError as error:
        raise RunFolderError(f"{path} is a file, not a folder.", hint="Name another folder with --out.") from error
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be written: {error.strerror or error}.",
            hint="Free some space, or name a folder with --out that you can write to; the same command goes on there.",
        ) from error


def _difference(name: str, old: Any, new: Any) -> str:
    if name == "given":
        fields = sorted(path for path in _flat(old) | _flat(new) if _flat(old).get(path) != _flat(new).get(path))
        return f"the spec's {', '.join(fields)}"
    return f"{name.replace('_', '-')} was {old!r} and is {new!r} now"


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
