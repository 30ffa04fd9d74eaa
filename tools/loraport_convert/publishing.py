"""The one way a converted, merged or resized LoRA gets to its place: written as a draft, read back, proven, renamed.

Nothing else of a command writes a LoRA. An input is never replaced, and until the proof holds there is no output.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from loraport.errors import DataError
from loraport.files import synced_by_caller, write_atomic
from loraport.lora.canonical import LoraFile, LoraModule
from loraport.lora.dialect import WritableDialect
from loraport.lora.lazy import LazyModules, ReadAhead
from loraport.lora.proof import ModuleProof, Proof, prove
from loraport.lora.stacked import NotExact
from loraport.lora.storage import read_tensors
from loraport.lora.streaming import replace_metadata
from loraport.lora.witness import witnessed
from loraport_convert.approximation import Loss, truncated, whole
from loraport_convert.drafts import draft_folder
from loraport_convert.reading import read_back
from loraport_convert.stopping import undivided

Approximate = Literal["svd", "diff"]
PROOF_KEY = "loraport.proof"
_PROOF_SUFFIX = ".proof.json"
_KEPT = ("modelspec.", "ss_", "loraport.family", "loraport.spec_sha256")
#: A place on the machine of whoever trained it: nothing is ever opened through it, and it is nobody's business.
_MACHINE_PATH = re.compile(r"(?:^|[\s\"'=:,\[(])(?:/(?!/)[^\s/\"']+/|~/|[A-Za-z]:[\\/]|\\\\)")


@dataclass(frozen=True)
class Target:
    """Where and how a LoRA is written. `dtype` None keeps each tensor's own.

    `approximate` is for modules that the format cannot hold, or for all with `every`; `rank` is that of an SVD. Keys
    without a meaning that match `ignore` whole are left out, and the proof names them.
    """

    path: Path
    writer: WritableDialect
    dtype: str | None = None
    overwrite: bool = False
    approximate: Approximate | None = None
    rank: int = 64
    every: bool = False
    ignore: re.Pattern[str] | None = None


@dataclass(frozen=True)
class Published:
    """A LoRA that is in its place. `approximated` modules differ by what the proof says of them; `norm` is that of
    their changes by name, `ignored` the source's keys that were left out as asked."""

    path: Path
    proof: Proof
    approximated: tuple[str, ...]
    norms: Mapping[str, float]
    ignored: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        asked = {"approximated": list(self.approximated), "ignored": list(self.ignored)}
        return {"path": str(self.path)} | asked | self.proof.to_json()


def check_target(target: Target, inputs: Collection[Path]) -> None:
    """Raise DataError when the output is one of the inputs, exists, or has no folder to go to."""
    path = target.path
    if path.suffix != ".safetensors":
        raise DataError(f"{path} must end in .safetensors.")
    for each in inputs:
        same_place = os.path.realpath(path) == os.path.realpath(each)
        if same_place or (path.exists() and each.exists() and path.samefile(each)):
            raise DataError(f"{path} is the input itself, which is never replaced.", hint="Choose another -o OUT.")
    if path.is_dir():
        raise DataError(f"{path} is a folder.", hint="Give the file to write.")
    if not path.parent.parent.is_dir() or (path.parent.exists() and not path.parent.is_dir()):
        raise DataError(f"The folder {path.parent} does not exist.", hint="Make it first, or choose another -o OUT.")
    if not target.overwrite and (path.exists() or path.is_symlink()):
        raise DataError(f"{path} exists already.", hint="Give --overwrite to replace it, or choose another -o OUT.")


def publish(source: LoraFile, target: Target, inputs: Collection[Path]) -> Published:
    """Write `source` to its place, with the proof in its metadata and in `<name>.proof.json` beside it.

    Raises DataError when the output would replace an input or another file, or when what was written does not mean
    what was asked within the dtype's rounding, and RunFolderError when it cannot be written; then there is no output.
    """
    check_target(target, inputs)
    ignored = tuple(filter(target.ignore.fullmatch, source.unread)) if target.ignore is not None else ()
    left_out = set(ignored)
    source = replace(source, unread=tuple(key for key in source.unread if key not in left_out))
    with draft_folder(target.path) as folder, ThreadPoolExecutor(1, "sync") as thread:
        draft = folder / target.path.name
        # The proof comes when the data is written: this leaves room for it in the header.
        room = " " * (400 + sum(len(name) + 30 for name in (*source.modules, *ignored)))
        with synced_by_caller(), witnessed() as witness:
            lossy = _write(source, target, draft, carried(source.metadata) | {PROOF_KEY: room})
        on_the_disk = thread.submit(_synced, draft)  # which has nothing to do while the proof is computed
        kept = source.modules.keys() - lossy.keys() if target.dtype is None else set[str]()
        proof = prove(source, read_back(target.writer, draft), kept=kept, witness=witness)
        approximated = tuple(module.name for module in proof.modules if module.name in lossy and not module.ok)
        norms = {name: each.norm for name, each in lossy.items()}
        published = Published(target.path, proof, approximated, norms, ignored)
        if reason := _refusal(proof, lossy):
            raise DataError(
                f"{target.path} was not written, because it would not mean what the source means: {reason}.",
                hint="Give --dtype fp32 where rounding is the reason."
                if proof.worst and not proof.worst.ok
                else "A key without a meaning would be lost without a word. To leave it out: --ignore 'PATTERN'.",
            )
        on_the_disk.result()
        replace_metadata(draft, read_tensors(draft).metadata | {PROOF_KEY: _in_metadata(published)})
        text = json.dumps(published.to_json(), indent=2, allow_nan=False, ensure_ascii=False)
        write_atomic(draft.with_suffix(_PROOF_SUFFIX), text + "\n")
        _move(folder, target, inputs)
    return published


def _synced(path: Path) -> None:
    with open(path, "rb") as written:
        os.fsync(written.fileno())


def _move(folder: Path, target: Target, inputs: Collection[Path]) -> None:
    """Put the draft and what a format writes beside it into their places, the LoRA last."""
    beside = [each for each in sorted(folder.iterdir()) if each.name != target.path.name]
    places = {each: target.path.parent / each.name for each in beside}
    own = {os.path.realpath(each.parent) for each in inputs}
    for place in places.values():
        taken = place.exists() or place.is_symlink()
        inputs_own = os.path.realpath(place.parent) in own and not place.name.endswith(_PROOF_SUFFIX)
        if taken and (inputs_own or not target.overwrite):
            raise DataError(
                f"{place}, which comes with {target.path.name}, exists already.", hint="Choose another -o OUT."
            )
    for each in (*beside, folder / target.path.name):
        _synced(each)
    with undivided():
        for each in beside:
            os.replace(each, places[each])
        os.replace(folder / target.path.name, target.path)


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of a source's metadata that are still true of the output: no format's own, no machine's paths."""
    return {
        key: value
        for key, value in metadata.items()
        if key.startswith(_KEPT) and key != PROOF_KEY and not _MACHINE_PATH.search(value)
    }


def _write(source: LoraFile, target: Target, draft: Path, metadata: Mapping[str, str]) -> dict[str, Loss]:
    """Write the draft, and tell what was lost in which module."""
    lossy: dict[str, Loss] = {}
    kinds: set[str] = set()
    while True:
        builders = {name: partial(_module, source, name, kinds, target, lossy) for name in source.modules}
        try:
            with ReadAhead(LazyModules(builders)) as modules:
                target.writer.write(replace(source, modules=modules), draft, target.dtype, metadata)
        except NotExact:
            # The module that was being written; the error may know it by the name of the other format.
            assert modules.given is not None
            kind = source.modules[modules.given].factors.kind
            if target.approximate is None or kind in kinds:
                raise
            kinds.add(kind)
        else:
            return lossy


def _module(
    source: LoraFile,
    name: str,
    kinds: set[str],
    target: Target,
    lossy: dict[str, Loss],
) -> LoraModule:
    module = source.modules[name]
    if not target.every and module.factors.kind not in kinds:
        return module
    made = whole(module) if target.approximate == "diff" else truncated(module, target.rank)
    lossy[name] = made.loss
    return made.module


def _refusal(proof: Proof, lossy: Mapping[str, Loss]) -> str:
    """Why the draft is not what it should be: an approximation may be as far off as was computed, and no further."""
    rest = [each for each in proof.modules if each.name not in lossy or _too_far(each, lossy[each.name])]
    return replace(proof, modules=tuple(rest)).why


def _too_far(module: ModuleProof, made: Loss) -> bool:
    return module.difference > math.hypot(made.difference, module.tolerance) * 1.001 + 1e-6


def _in_metadata(published: Published) -> str:
    proof = published.proof.to_json()
    differences = {row["name"]: row["difference"] and float(f"{row['difference']:.1e}") for row in proof["modules"]}
    short = {"exact": proof["ok"], "approximated": list(published.approximated), "differences": differences}
    if published.ignored:
        short["ignored"] = list(published.ignored)
    return json.dumps(short, separators=(",", ":"), ensure_ascii=False)
