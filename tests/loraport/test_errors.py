"""Errors say what failed and what to do, and each has the exit code that docs/exit-codes.md documents."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from loraport import errors
from loraport.errors import LoraPortError, SpecError, nearest, unknown

PAGE = Path(__file__).parents[2] / "docs" / "exit-codes.md"
KINDS = [LoraPortError, *LoraPortError.__subclasses__()]


def test_an_error_is_its_message_and_under_it_the_hint() -> None:
    assert str(SpecError("It failed.")) == "It failed."
    assert str(SpecError("It failed.", hint="Do this.")) == "It failed.\n  Do this."
    assert isinstance(SpecError("x"), ValueError)


def test_the_documented_exit_codes_are_the_real_ones() -> None:
    rows = re.findall(r"^\| (\d+) \|.*\| (?:`(\w+)`|–) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    documented = {name: int(code) for code, name in rows if name}
    assert documented == {kind.__name__: kind.exit_code for kind in KINDS if kind is not LoraPortError}
    assert [int(code) for code, _ in rows] == sorted({0, 1, 2, *documented.values()})


def test_every_kind_has_its_own_code_and_says_when_it_is_raised() -> None:
    codes = [kind.exit_code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    assert not {0, 2} & set(codes)
    assert all(kind.__doc__ for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_keep_their_hint_between_processes(kind: type[LoraPortError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("It failed.", hint="Do this.")))
    assert (type(copy), str(copy)) == (kind, "It failed.\n  Do this.")


@pytest.mark.parametrize(("name", "expected"), [("stpes", "steps"), ("rank", "rank"), ("zzz", None), ("", None)])
def test_the_nearest_name_is_close_or_none(name: str, expected: str | None) -> None:
    assert nearest(name, ["steps", "rank", "alpha"]) == expected


def test_an_unknown_name_lists_the_choices() -> None:
    assert unknown("Backend", "natve", ["native", "other"]) == (
        "Backend 'natve' is not known. Did you mean 'native'? Choices: native, other."
    )
    assert unknown("Backend", "x", []) == "Backend 'x' is not known. Choices: none."


def test_no_error_class_is_left_out_of_the_module() -> None:
    assert {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LoraPortError)
    } == set(KINDS)
