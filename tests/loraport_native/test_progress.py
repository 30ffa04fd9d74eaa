"""What the process says, read back by the run."""

from __future__ import annotations

import pytest

from loraport.errors import BackendError, DataError, Interrupted, OutOfMemoryError, RunFolderError, SpecError
from loraport.run.errors_line import encode_error
from loraport.run.events import Step, encode
from loraport_native.progress import explain_failure, read_line


@pytest.mark.parametrize("kind", [SpecError, DataError, BackendError, OutOfMemoryError, RunFolderError, Interrupted])
@pytest.mark.parametrize("hint", [None, "do\nthis – ünïcode"])
def test_an_error_comes_back_as_it_was_raised(kind, hint) -> None:
    line = encode_error(kind("what\nfailed", hint))
    assert "\n" not in line
    error = explain_failure(1, f"something\n{line}\nlast words of a library\n")
    assert type(error) is kind
    assert (error.message, error.hint) == ("what\nfailed", hint)


def test_events_are_read_and_other_output_is_not() -> None:
    event = Step(step=1, total=2, loss=0.5)
    assert list(read_line(encode(event)) or []) == [event]
    assert read_line("loss 0.5") is None
    assert read_line("@loraport {broken") is None


@pytest.mark.parametrize("code", [-9, 137])
def test_a_silent_kill_is_taken_for_memory(code: int) -> None:
    assert isinstance(explain_failure(code, "step 1\n"), OutOfMemoryError)


def test_a_crash_shows_its_exception_or_else_the_last_lines() -> None:
    log = "\n".join(f"line {number}" for number in range(100))
    error = explain_failure(1, log + "\nTraceback (most recent call last):\nZeroDivisionError: division by zero\n\n")
    assert isinstance(error, BackendError)
    assert "exit code 1" in str(error)
    assert "ZeroDivisionError" in str(error)
    assert "Traceback" not in str(error)
    assert "line 95" in str(explain_failure(1, log))
    assert "line 50" not in str(explain_failure(1, log))


@pytest.mark.parametrize("rest", ['{"kind": "Sp', '{"kind": "NoSuchError", "message": "a", "hint": null}', "[]"])
def test_a_told_error_that_is_cut_off_is_shown_as_it_is(rest: str) -> None:
    error = explain_failure(3, f"@loraport-error {rest}")
    assert isinstance(error, BackendError)
    assert rest in str(error)
