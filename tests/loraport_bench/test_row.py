"""What a row tells of the card is of its measured steps."""

from __future__ import annotations

import pytest

from loraport.run import events
from loraport_bench.process import Ended
from loraport_bench.row import _energy
from loraport_bench.sampling import CardSample, Samples
from loraport_bench.told import Told, sort_out


def card(*told: tuple[float, float | None]) -> list[CardSample]:
    return [CardSample(time, 1800, None, 300, None, None, joules, 0) for time, joules in told]


@pytest.fixture
def told() -> Told:
    """Two steps of ten seconds in which a trainer compiles, then two of one second."""
    ends = [20, 30, 31, 32]
    steps = [events.Step(step=n, total=4, loss=1.0, seconds=1.0, time=end) for n, end in enumerate(ends, start=1)]
    return sort_out([events.PhaseStarted(phase="train", time=10), *steps], 0, 40)


def test_energy_an_image_is_that_of_the_measured_steps_without_compiling(told: Told) -> None:
    one = card((0, 0), (10, 100), (30, 500), (32, 1700), (40, 1800))
    found = _energy([one, one], Ended(0, 0, 40, Samples()), told, warm_up=2, a_step=4)
    assert found is not None
    assert (found.joules, found.train_joules, found.steps_joules) == (3600, 3200, 2400)
    assert found.joules_per_image == 2400 / (2 * 4)


def test_energy_of_a_card_without_a_counter_is_not_told(told: Told) -> None:
    whole = card((0, 0), (40, 1800))
    assert _energy([whole, card((0, None), (40, None))], Ended(0, 0, 40, Samples()), told, 2, 1) is None
    nothing_measured = _energy([whole], Ended(0, 0, 40, Samples()), told, warm_up=4, a_step=1)
    assert nothing_measured is not None
    assert (nothing_measured.joules, nothing_measured.steps_joules, nothing_measured.joules_per_image) == (
        1800,
        None,
        None,
    )
