"""A run's events become phases without gaps, steps without pauses, and what was trained."""

from __future__ import annotations

import pytest

from loraport.run import events
from loraport_bench.told import sort_out, thinned


def step(number: int, time: float, seconds: float | None = 1.0, total: int = 6, images: int | None = 2) -> events.Step:
    pace = images / seconds if images and seconds else None
    return events.Step(step=number, total=total, loss=number / 10, seconds=seconds, images_per_second=pace, time=time)


TOLD = [
    events.Started(backend="x", spec_hash="", resume=False, time=101),
    events.PhaseStarted(phase="load", time=103),
    events.PhaseStarted(phase="cache", time=110),
    events.PhaseStarted(phase="load", detail="transformer", time=115),
    events.PhaseStarted(phase="train", time=120),
    step(1, 125),
    step(2, 126),
    step(3, 127),
    events.Checkpoint(step=3, path="x", time=130),
    step(4, 131.5),
    step(4, 131.6),  # told twice
    events.PhaseStarted(phase="validate", time=132),
    events.PhaseStarted(phase="train", time=140),
    step(5, 142),
    step(6, 143),
    events.Warn(message="hot", time=143),
    events.PhaseStarted(phase="convert", time=150),
    events.Finished(step=6, lora="a", proof="b", worst_difference=0.0, time=152),
]


def test_phases_follow_one_another_from_the_start_of_the_process_to_its_end() -> None:
    told = sort_out(TOLD, 100, 155)
    assert told.spans[0] == ("start", 100, 103)
    assert told.spans[-1] == ("convert", 150, 155)
    for (_, _, end), (_, start, _) in zip(told.spans, told.spans[1:], strict=False):
        assert end == start
    assert told.phases() == {
        "start": 3,
        "load_quantise": 12,
        "cache": 5,
        "train": 7 + 2 + 3,  # up to the last step
        "save": 3 + 7,  # the checkpoint, and what the trainer did after its last step
        "validate": 8,
        "convert": 5,
    }
    assert told.trained_until(131.5) == 8.5
    assert told.warnings == ["hot"]


def test_a_checkpoint_that_is_told_while_training_goes_on_is_of_its_own_step_and_no_pause() -> None:
    steps = [step(number, 120.0 + number) for number in range(1, 7)]
    saved = events.Checkpoint(step=2, path="x", time=124.0)
    told = sort_out([events.PhaseStarted(phase="train", time=120), *steps[:4], saved, *steps[4:]], 119, 130)
    assert told.trained_at(saved) == 2
    assert told.phases() == {"start": 1, "train": 6, "save": 4}, "which is what the trainer did after its last step"
    measured = told.measured(1)
    assert measured is not None
    assert measured.wall_mean == 1


def test_a_step_lasts_from_the_end_of_the_one_before_and_pauses_are_not_its_own() -> None:
    measured = sort_out(TOLD, 100, 155).measured(1)
    assert measured is not None
    assert measured.measured == "trainer"
    assert measured.each == [1, 1, 1, 1, 1]
    # 2 and 3 after their predecessors, 4 after the checkpoint, 6 after 5; 5 comes after a pause.
    assert measured.wall_mean == pytest.approx((1 + 1 + 1.5 + 1) / 4)


def test_what_is_measured_begins_after_the_warm_up_and_leaves_pauses_out() -> None:
    told = sort_out(TOLD, 100, 155)
    assert told.measured_spans(1) == [(125, 127), (130, 132), (140, 143)]
    assert told.measured_spans(0) == [(120, 127), (130, 132), (140, 143)]
    assert told.measured_spans(6) == []


def test_the_arrival_of_events_counts_for_a_trainer_that_times_few_of_its_steps() -> None:
    told = [events.PhaseStarted(phase="train", time=0), *(step(n, 2 * n, 1.0 if n == 3 else None) for n in range(1, 7))]
    measured = sort_out(told, 0, 13).measured(2)
    assert measured is not None
    assert (measured.measured, measured.each) == ("outside", [2, 2, 2, 2])
    assert sort_out(told, 0, 13).measured(6) is None


def test_a_trainer_that_tells_when_it_saves_is_believed() -> None:
    told = [
        events.PhaseStarted(phase="train", time=0),
        step(1, 1),
        events.PhaseStarted(phase="save", time=2),
        events.Checkpoint(step=1, path="x", time=5),
        events.PhaseStarted(phase="train", time=6),
        step(2, 7),
    ]
    assert sort_out(told, 0, 8).phases() == {"train": 4, "save": 4}


def test_a_run_that_broke_ends_in_the_phase_in_which_it_did() -> None:
    told = [*TOLD[:6], events.Failed(message="on fire", exit_code=5, time=126)]
    found = sort_out(told, 100, 127)
    assert found.spans[-1] == ("train", 120, 127)
    assert found.failure is not None
    assert found.failure.message == "on fire"


def test_images_are_those_that_the_trainer_told_of_each_step() -> None:
    assert sort_out(TOLD, 100, 155).images() == 12
    first_untold = [step(1, 1, None), *(step(n, n) for n in (2, 3))]
    assert sort_out(first_untold, 0, 4).images() == 6
    uneven = [step(1, 1, None), step(2, 2), step(3, 3, images=1)]
    assert sort_out(uneven, 0, 4).images() is None


def test_the_loss_curve_is_over_images_and_over_time_of_training() -> None:
    curve = sort_out(TOLD, 100, 155).losses(images_a_step=2)
    assert [(point.step, point.images, point.loss) for point in curve] == [(n, 2 * n, n / 10) for n in range(1, 7)]
    assert [point.train_s for point in curve] == [5, 6, 7, 8.5, 11, 12]


def test_a_long_list_is_thinned_with_its_ends_kept() -> None:
    assert thinned(range(10), 4) == [0, 3, 6, 9]
    assert thinned(range(3), 4) == [0, 1, 2]


def test_steps_that_are_told_late_count_from_when_they_were_done() -> None:
    told = sort_out(
        [
            events.PhaseStarted(phase="train", time=101),
            step(1, 104.2, seconds=None),  # read from a bar, after the second was done
            step(2, 104, seconds=None),
            step(3, 106, seconds=2),
            events.PhaseStarted(phase="save", time=108.5),
            events.PhaseStarted(phase="train", time=109),
            step(4, 108, seconds=2, total=4),
        ],
        100,
        110,
    )
    assert told.gaps == {3: 2}
    assert told.phases() == {"start": 1, "train": 7, "save": 2}
