from __future__ import annotations

import pytest

from loraport.run.eta import Eta, Smoothed, duration


def fed(times: list[float], total: int = 100) -> Eta:
    eta = Eta()
    for step, seconds in enumerate(times, 1):
        eta.add(step, total, now=0.0, seconds=seconds)
    return eta


def test_nothing_is_promised_during_the_warm_up() -> None:
    assert fed([60.0, 5.0, 2.0]).remaining is None


def test_warm_up_steps_do_not_count() -> None:
    assert fed([60.0, 30.0, 20.0, 1.0]).remaining == 96.0


def test_one_slow_step_does_not_move_the_estimate() -> None:
    assert fed([9.0, 9.0, 9.0, 1.0, 1.0, 40.0, 1.0, 1.0]).remaining == 92.0


def test_a_lasting_change_of_pace_is_followed() -> None:
    assert fed([1.0] * 50 + [3.0] * 20, total=80).seconds_a_step == 3.0


def test_after_a_restart_warm_up_begins_again() -> None:
    eta = fed([1.0] * 10)
    eta.restart()
    eta.add(11, 100, now=0.0, seconds=50.0)
    assert eta.remaining is None


def test_without_step_times_the_clock_between_events_counts() -> None:
    eta = Eta()
    for count in range(6):
        eta.add(10 * (count + 1), 100, now=20.0 * count, seconds=None)
    assert eta.seconds_a_step == 2.0
    assert eta.remaining == 80.0


def test_the_first_smoothed_value_is_the_value_itself() -> None:
    smoothed = Smoothed()
    assert smoothed.value is None
    smoothed.add(0.7)
    assert smoothed.value == pytest.approx(0.7)


def test_smoothing_lies_between_old_and_new() -> None:
    smoothed = Smoothed(keep=0.9)
    for value in [1.0] * 20 + [0.0]:
        smoothed.add(value)
    assert smoothed.value is not None
    assert 0.8 < smoothed.value < 0.95


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (89.4 * 60, "89 min"),
        (3 * 3600 + 300, "3 h 05 min"),
        (190_000, "2 d 4 h"),
    ],
)
def test_durations_read_well(seconds: float, said: str) -> None:
    assert duration(seconds) == said
