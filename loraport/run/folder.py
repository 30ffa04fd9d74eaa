"""The run folder: where everything about one run lies, who may write there, and how to find runs again."""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from loraport.errors import RunFolderError
from loraport.files import write_atomic
from loraport.planning import Plan
from loraport.run.state import State, Status
from loraport.spec.models import TrainSpec

DEFAULT_ROOT = Path("runs")

#: A run whose state says running although no process holds its lock was killed.
SeenStatus = Status | Literal["died", "unreadable"]

# The guard of a killed run holds the lock until the last child is gone; somebody who asks "who runs here?" holds it for
# an instant.
_WAIT_FOR_DYING = 30.0
_WAIT_FOR_GLANCE = 0.3


class RunFolder:
    """The files of one run. `create` makes the folder and holds its lock; `open` finds one that is there.

    spec.yaml            the resolved spec
    plan.json            verdicts, files, command, environment
    log.txt              all that the trainer printed
    events.jsonl         what happened, one JSON object a line (docs/events.md)
    state.json           how the run stands (`loraport.run.state.State`)
    checkpoints/         made by the trainer, one folder or file each
    samples/             images the trainer drew
    <name>.safetensors   the LoRA for ComfyUI
    proof.json           per module, how far the written update is from the trained one
    loss.png             the loss curve

    As a context manager it gives the lock back at the end.
    """

    def __init__(self, path: Path):
        self.path = path
        self.spec_file = path / "spec.yaml"
        self.plan_file = path / "plan.json"
        self.log_file = path / "log.txt"
        self.events_file = path / "events.jsonl"
        self.state_file = path / "state.json"
        self.lock_file = path / ".lock"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.proof_file = path / "proof.json"
        self.loss_plot = path / "loss.png"
        self._lock: int | None = None

    def lora_file(self, name: str) -> Path:
        """Where the LoRA for ComfyUI is published; `name` is the spec's."""
        return self.path / f"{name}.safetensors"

    @classmethod
    def create(cls, path: Path, plan: Plan) -> Self:
        """Make the folder of a new run, take its lock and write spec, plan and state.

        Raises RunFolderError when `path` is a file, holds anything already, is being used, or cannot be written;
        nothing that was there is touched.
        """
        folder = cls(path.absolute())
        assert plan.run_dir.absolute() == folder.path, "the plan is for another folder"
        made = not folder.path.exists()
        folder._refuse_content(allow=set())
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(folder.path, error) from error
        folder.lock()
        try:
            folder._refuse_content(allow={folder.lock_file.name})  # somebody may have been quicker
        except RunFolderError:
            folder.release()
            raise
        now = time.time()
        state = State(
            "planned", backend=plan.backend, name=plan.spec.name, total=plan.spec.train.steps, created=now, updated=now
        )
        try:
            write_atomic(folder.spec_file, plan.spec.to_yaml())
            folder.write_plan(plan)
            folder.write_state(state)
        except RunFolderError:
            folder._remove(made)
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> Self:
        """The folder of an existing run, without its lock.

        Raises RunFolderError naming what is missing and the runs that are near.
        """
        folder = cls(path.absolute())
        if not folder.path.is_dir():
            what = "is a file, not a run folder" if folder.path.exists() else "is not there"
            raise RunFolderError(f"{path} {what}.", hint=_near_runs(folder.path))
        needed = (folder.spec_file, folder.plan_file, folder.state_file)
        missing = [file.name for file in needed if not file.is_file()]
        if missing:
            raise RunFolderError(
                f"{path} is not a run folder: {', '.join(missing)} missing.", hint=_near_runs(folder.path)
            )
        return folder

    def lock(self) -> None:
        """Take the folder for this process and those that inherit `lock_fd`; the system gives it back when they end.

        Raises RunFolderError naming the process that has it.
        """
        assert self._lock is None, "this object already holds the lock"
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unusable(self.path, error) from error
        try:
            self._wait_for_lock(descriptor)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        except OSError as error:
            os.close(descriptor)
            raise _unusable(self.path, error) from error
        except BaseException:
            os.close(descriptor)
            raise
        self._lock = descriptor

    @property
    def lock_fd(self) -> int:
        """Descriptor of the held lock. A child that is given it keeps the folder taken until it ends too."""
        assert self._lock is not None, "take the lock first"
        return self._lock

    def release(self) -> None:
        """Give the lock back, if it is held here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def in_use(self) -> bool:
        """Whether a process holds the lock now."""
        if self._lock is not None:
            return True
        try:
            descriptor = os.open(self.lock_file, os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _unusable(self.path, error) from error
        try:
            return not _try_lock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)

    def read_spec(self) -> TrainSpec:
        """The resolved spec of the run. Raises SpecError when somebody broke it."""
        return TrainSpec.load(self.spec_file)

    def read_state(self) -> State:
        """The content of state.json. Raises RunFolderError when it cannot be read."""
        try:
            return State.from_json(self.state_file.read_bytes())
        except OSError as error:
            raise RunFolderError(f"{self.state_file} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise RunFolderError(f"{self.state_file} is damaged: it is not the state of a run.") from error

    def write_plan(self, plan: Plan) -> None:
        """Replace plan.json in one step. Raises RunFolderError when it cannot be written."""
        write_atomic(self.plan_file, json.dumps(plan.to_dict(), indent=2, ensure_ascii=False) + "\n")

    def write_state(self, state: State) -> None:
        """Replace state.json in one step. Raises RunFolderError when it cannot be written."""
        write_atomic(self.state_file, state.to_json())

    def status(self) -> SeenStatus:
        """The status in state.json, or "died" when it says running but nobody runs it."""
        status = self.read_state().status
        return "died" if status == "running" and not self.in_use() else status

    def _refuse_content(self, allow: set[str]) -> None:
        try:
            content = sorted(set(os.listdir(self.path)) - allow)
        except FileNotFoundError:
            return
        except NotADirectoryError as error:
            raise RunFolderError(
                f"{self.path} is a file or lies under one; a run needs a folder.", hint="Choose another with --out."
            ) from error
        except OSError as error:
            raise _unusable(self.path, error) from error
        if self.state_file.name in content:
            raise RunFolderError(
                f"{self.path} already holds a run; nothing there was changed.",
                hint=f"Go on with it: loraport resume {self.path}. Or choose another folder with --out.",
            )
        if content:
            raise RunFolderError(
                f"{self.path} is not empty (it holds {content[0]}); nothing there was changed.",
                hint="Choose an empty or new folder with --out.",
            )

    def _wait_for_lock(self, descriptor: int) -> None:
        started = time.monotonic()
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            holder = _read_pid(descriptor)
            dying = holder is not None and not _alive(holder)
            waited = time.monotonic() - started
            if waited > (_WAIT_FOR_DYING if dying else _WAIT_FOR_GLANCE):
                who = "another process" if holder is None else f"process {holder}"
                if dying:
                    raise RunFolderError(
                        f"{self.path} is still used by the trainer of {who}, which was killed.",
                        hint="Wait until its last process has ended, or end it yourself.",
                    )
                raise RunFolderError(
                    f"{self.path} is in use by {who}.",
                    hint="Wait for it, stop it with Ctrl-C, or choose another folder with --out.",
                )
            time.sleep(0.05)

    def _remove(self, folder_too: bool) -> None:
        """Take back a half-made folder, which held nothing before."""
        for name in os.listdir(self.path):
            os.unlink(self.path / name)
        if folder_too:
            os.rmdir(self.path)
        self.release()


@dataclass(frozen=True)
class RunEntry:
    """One line of a list of runs. `state` is None when it cannot be read; `problem` then says why."""

    path: Path
    status: SeenStatus
    state: State | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain data for JSON: the state's fields, with the status as seen now, and the path."""
        state = asdict(self.state) if self.state else {}
        return {"path": str(self.path), **state, "status": self.status, "problem": self.problem}

    def cells(self) -> tuple[str, str, str, str, str]:
        """Run, backend, status, steps and result, as a person reads them."""
        if self.state is None:
            return self.path.name, "", self.status, "", self.problem or ""
        state = self.state
        result = state.message or ""
        if state.status == "finished":
            result = f"{state.lora} (largest difference {state.worst_difference:.1e})"
        elif self.status != "running":
            result = f"{result} Go on with: loraport resume {self.path}".strip()
        return self.path.name, state.backend, self.status, f"{state.step}/{state.total}", result


def list_runs(root: Path) -> list[RunEntry]:
    """The runs in `root` (or `root` itself when it is one), newest first; none when there is no such folder.

    Folders that are no runs are left out; a damaged run is listed with its problem. Raises RunFolderError when `root`
    is a file or cannot be read.
    """
    try:
        candidates = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunFolderError(f"{root} cannot be listed: {error.strerror}.") from error
    entries = [_entry(RunFolder(path.absolute())) for path in candidates if _looks_like_run(path)]
    return sorted(entries, key=lambda entry: entry.state.created if entry.state else 0.0, reverse=True)


def free_path(name: str, root: Path = DEFAULT_ROOT) -> Path:
    """Where a new run called `name` goes by default: root/name, or root/name-2, root/name-3 … when that is taken."""
    number, path = 1, root / name
    while path.exists() and not (path.is_dir() and not any(path.iterdir())):
        number += 1
        path = root / f"{name}-{number}"
    return path.absolute()


def _entry(folder: RunFolder) -> RunEntry:
    try:
        return RunEntry(folder.path, folder.status(), folder.read_state())
    except RunFolderError as error:
        return RunEntry(folder.path, "unreadable", problem=error.message)


def _looks_like_run(path: Path) -> bool:
    folder = RunFolder(path)
    return folder.state_file.exists() or (folder.plan_file.exists() and folder.spec_file.exists())


def _near_runs(path: Path) -> str:
    known: list[Path] = []
    for root in dict.fromkeys((path.parent, DEFAULT_ROOT.absolute())):
        if root.is_dir():
            known += [entry.path for entry in list_runs(root) if entry.path != root]
    names = {entry.name: entry for entry in reversed(known)}
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.3) or list(names)[-3:]
    if not near:
        return "There are no runs nearby; start one with: loraport train SPEC"
    return "Runs nearby: " + ", ".join(str(names[name]) for name in near)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_pid(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0)
    return int(text) if text.isdigit() else None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _unusable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path} cannot be used as a run folder: {error.strerror or error}.",
        hint="Choose a folder you can write to with --out.",
    )
