from __future__ import annotations

from loraport.run.log_lines import indented, lines_that_matter

TRACE = """\
Loading weights:  80%|####  | 4/5 [00:01<00:00]
before
Traceback (most recent call last):
  File "/x/run.py", line 3, in <module>
    main()
  File "/x/toolkit/thing.py", line 9, in load
    raise ValueError("no such thing:\\n  a\\n  b")
ValueError: no such thing:
  a
@loraport {"type": "x"}
"""


def test_an_exception_is_told_with_its_place_and_without_its_traceback() -> None:
    assert lines_that_matter(TRACE) == [
        'File "/x/toolkit/thing.py", line 9, in load',
        "ValueError: no such thing:",
        "a",
    ]


def test_the_last_of_two_exceptions_counts() -> None:
    assert lines_that_matter(TRACE + "\nDuring handling …\n\nTraceback (most recent call last):\nRuntimeError: two\n")[
        -1:
    ] == ["RuntimeError: two"]


def test_without_an_exception_the_last_lines_are_told_without_progress_bars() -> None:
    log = "".join(f"line {number}\r\n" for number in range(9)) + "x: 10%|# | 1/10\n\n"
    assert lines_that_matter(log, most=2) == ["line 7", "line 8"]


def test_a_traceback_that_was_cut_off_leaves_what_came_before_it() -> None:
    assert lines_that_matter(TRACE.partition("ValueError: no")[0]) == ["before"]


def test_a_line_without_end_is_shortened() -> None:
    assert indented(lines_that_matter("x" * 1000)) == "\n    " + "x" * 400 + " …"
