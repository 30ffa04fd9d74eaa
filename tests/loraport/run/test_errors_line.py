"""A process's last word about its error survives the pipe, and nothing else is taken for one."""

from __future__ import annotations

from loraport.errors import DataError, OutOfMemoryError
from loraport.run.errors_line import PREFIX, encode_error, find_error


def test_an_error_is_read_back_with_its_kind_and_hint() -> None:
    log = "noise\n" + encode_error(DataError("ünreadable\nimage", hint="look")) + "\nmore noise\n"
    found = find_error(log)
    assert isinstance(found, DataError)
    assert (found.message, found.hint) == ("ünreadable\nimage", "look")


def test_the_last_error_counts() -> None:
    log = "\n".join(encode_error(error) for error in (DataError("first"), OutOfMemoryError("last")))
    assert str(find_error(log)) == "last"


def test_lines_that_are_cut_off_or_strange_are_passed_over() -> None:
    whole = encode_error(DataError("x"))
    for line in ("", "error", whole[:-5], PREFIX + "[1]", PREFIX + '{"kind":"no_such","message":"","hint":null}'):
        assert find_error(line) is None
