"""Captioning a folder: which pictures are left, several at a time, each caption written whole or not at all."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loraport.errors import BackendError, DataError, RunFolderError
from loraport.files import write_atomic
from loraport.images import FileProblem
from loraport_dataset.captioning.answers import Answer, Describer, Refused, Unanswered
from loraport_dataset.captioning.form import Form
from loraport_dataset.captioning.pictures import as_jpeg
from loraport_dataset.walking import stem, walk

#: So many failures in a row, with nothing between them, are the service's or the model's and not the pictures'.
MOST_FAILURES_IN_A_ROW = 3
_TOO_LONG = "The answer was cut off before its end. Write a shorter caption."


@dataclass(frozen=True)
class Task:
    """A picture without a caption, and where its caption goes."""

    picture: Path
    name: str  #: within the dataset
    caption: Path


@dataclass(frozen=True)
class Tasks:
    """What is to be done in a folder, and what is done already."""

    todo: list[Task]
    kept: int


@dataclass(frozen=True)
class Outcome:
    """What became of one picture. `problem` is empty when its caption was written; `doubt` is what to look at in it."""

    task: Task
    problem: str = ""
    doubt: str = ""


@dataclass
class Summary:
    """What a run came to; tokens as the service counted them."""

    written: int = 0
    kept: int = 0
    failed: list[Outcome] = field(default_factory=list)
    doubtful: list[Outcome] = field(default_factory=list)
    prompt_tokens: int = 0
    answer_tokens: int = 0


def find_tasks(root: Path, out: Path | None, extension: str, again: bool) -> Tasks:
    """The pictures under `root` whose caption is missing or empty; with `again`, all of them.

    out: the folder of the captions, with the same subfolders; beside the pictures when None. Raises DataError when two
    pictures would share a caption.
    """
    todo: list[Task] = []
    kept = 0
    for listing in walk(root):
        pictures: dict[str, str] = {}
        for name in listing.images:
            other = pictures.setdefault(stem(name), name)
            if other != name:
                both = f"{listing.prefix}{other} and {listing.prefix}{name}"
                raise DataError(f"{both} would share {stem(name)}.{extension}.", hint="Rename one of them.")
            place = (listing.path if out is None else out / listing.prefix) / f"{stem(name)}.{extension}"
            if not again and _has_text(place):
                kept += 1
            else:
                todo.append(Task(listing.path / name, listing.prefix + name, place))
    return Tasks(todo, kept)


def _has_text(file: Path) -> bool:
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return True  # it is there, whatever it is: not ours to write over
        with file.open("rb") as content:
            return bool(content.read(1000).strip())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


@dataclass(frozen=True)
class Captioned:
    """A caption, and the warning that it still deserves, if any."""

    text: str
    doubt: str = ""


class Captioner:
    """Asks for one caption: the question, then corrections until the answer keeps the rules."""

    def __init__(self, describer: Describer, form: Form, max_side: int, corrections: int):
        self._describer, self._form = describer, form
        self._max_side, self._corrections = max_side, corrections

    async def caption(self, picture: Path, count: Callable[[Answer], None]) -> Captioned:
        """Raises FileProblem for a picture that does not open, Refused when every answer breaks the rules, and what the
        describer raises."""
        jpeg = await asyncio.to_thread(as_jpeg, picture, self._max_side)
        messages = self._form.question(jpeg)
        usable: Captioned | None = None
        problems: tuple[str, ...] = ()
        for _ in range(1 + self._corrections):
            answer = await self._describer.answer(messages, self._form.schema)
            count(answer)
            reading = self._form.read(answer.text)
            problems = (_TOO_LONG,) if answer.cut_off else reading.problems
            if not problems and reading.caption is not None:
                return Captioned(reading.caption)
            if reading.caption is not None and not answer.cut_off:
                usable = Captioned(reading.caption, problems[0])
            messages = self._form.question(jpeg) + self._form.correction(answer.text, problems)
        if usable is not None:
            return usable
        asked = f"{1 + self._corrections} answers" if self._corrections else "the answer"
        raise Refused(f"{asked} without a caption that keeps the rules: {problems[0]}")


async def caption_all(
    tasks: Tasks, captioner: Captioner, workers: int, tell: Callable[[Outcome], None], summary: Summary
) -> None:
    """Caption every picture of `tasks`, `workers` at a time, and fill in `summary` as it goes.

    One picture's failure is told and the others go on. Raises BackendError when the service or the model fails for all,
    and RunFolderError when captions cannot be written; what was written stays.
    """
    watch = _Watch()
    queue = iter(tasks.todo)
    running = [asyncio.create_task(_work(queue, captioner, tell, summary, watch)) for _ in range(workers)]
    try:
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _work(
    queue: Iterator[Task], captioner: Captioner, tell: Callable[[Outcome], None], summary: Summary, watch: _Watch
) -> None:
    def count(answer: Answer) -> None:
        summary.prompt_tokens += answer.prompt_tokens
        summary.answer_tokens += answer.answer_tokens

    for task in queue:
        outcome, kind = Outcome(task), "written"
        try:
            captioned = await captioner.caption(task.picture, count)
        except FileProblem as problem:
            outcome, kind = Outcome(task, str(problem)), "picture"
        except Refused as refusal:
            outcome, kind = Outcome(task, str(refusal)), "refused"
        except Unanswered as failure:
            outcome, kind = Outcome(task, str(failure)), "unanswered"
        else:
            _write(task.caption, captioned.text)
            summary.written += 1
            outcome = Outcome(task, doubt=captioned.doubt)
        if outcome.problem:
            summary.failed.append(outcome)
        if outcome.doubt:
            summary.doubtful.append(outcome)
        tell(outcome)
        watch.see(kind, outcome)


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"{file.parent} cannot be made: {error.strerror or error}.", hint="Give -o a folder you can write to."
        ) from error
    write_atomic(file, text)


class _Watch:
    """Ends a run that comes to nothing, before it is paid for ten thousand times."""

    def __init__(self) -> None:
        self._unanswered = self._failed = 0
        self._has_written = False

    def see(self, kind: str, outcome: Outcome) -> None:
        if kind == "written":
            self._has_written, self._unanswered = True, 0
        elif kind == "unanswered":
            self._unanswered += 1
        if kind in ("refused", "unanswered"):
            self._failed += 1
        hopeless = not self._has_written and self._failed >= MOST_FAILURES_IN_A_ROW
        if hopeless or self._unanswered >= MOST_FAILURES_IN_A_ROW:
            raise BackendError(
                f"{MOST_FAILURES_IN_A_ROW} pictures in a row got no caption, the last one as {outcome.problem}.",
                hint="Put that right and run the same command again: captions that are written are kept.",
            )
