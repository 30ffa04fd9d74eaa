"""Old specs become new ones step by step; specs from the future are refused."""

from __future__ import annotations

from typing import Any

import pytest

from loraport.errors import SpecError
from loraport.spec.migrate import STEPS, migrate
from loraport.spec.models import SPEC_VERSION


def test_a_chain_of_steps_runs_in_order() -> None:
    order = []

    def first(raw: dict[str, Any]) -> dict[str, Any]:
        order.append(1)
        return {**raw, "b": raw["a"] + 1}

    def second(raw: dict[str, Any]) -> dict[str, Any]:
        order.append(2)
        return {"c": raw["b"] + 1}

    old = {"version": 1, "a": 1}
    assert migrate(old, {1: first, 2: second}, current=3) == {"version": 3, "c": 3}
    assert order == [1, 2]
    assert old == {"version": 1, "a": 1}


def test_a_chain_starts_at_the_version_that_is_written() -> None:
    def never(raw: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError

    assert migrate({"version": 2}, {1: never, 2: lambda raw: raw}, current=3) == {"version": 3}


def test_a_spec_without_a_version_is_current() -> None:
    assert migrate({"name": "a"}) == {"name": "a"}


def test_every_older_version_has_its_step() -> None:
    assert sorted(STEPS) == list(range(1, SPEC_VERSION))


def test_a_version_from_the_future_says_how_to_update() -> None:
    with pytest.raises(SpecError, match=rf"version: {SPEC_VERSION + 1} is newer") as caught:
        migrate({"version": SPEC_VERSION + 1})
    assert "pip install -U loraport" in str(caught.value)


@pytest.mark.parametrize("version", [0, -1, "1", 1.5, True, None, [1]])
def test_what_is_no_version_is_refused(version: Any) -> None:
    with pytest.raises(SpecError, match=f"Write version: {SPEC_VERSION}"):
        migrate({"version": version})
