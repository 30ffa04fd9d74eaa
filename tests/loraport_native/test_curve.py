"""The loss curve: every loss that was told, once, with those from before a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from loraport.run.events import Event, Failed, Finished, Interrupted, PhaseStarted, Resumed, Step, Validation
from loraport_native.curve import LossCurve, smoothed

ENDS = {
    "finished": Finished(step=3, lora="a", proof="b", worst_difference=0.0),
    "failed": Failed(message="a", exit_code=5),
    "interrupted": Interrupted(step=3),
}


def step(number: int, loss: float | None) -> Step:
    return Step(step=number, total=10, loss=loss)


@pytest.fixture
def curve(make_spec, tmp_path: Path) -> LossCurve:
    return LossCurve(make_spec(), tmp_path)


def tell(curve: LossCurve, *events: Event) -> None:
    """As a run does: first in events.jsonl, then to the listener."""
    for event in events:
        with open(curve.run_dir / "events.jsonl", "a") as file:
            file.write(event.model_dump_json() + "\n")
        curve.handle(event)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("held_out", [False, True])
def test_a_run_that_ends_is_drawn(curve: LossCurve, tmp_path: Path, end: str, held_out: bool) -> None:
    tell(curve, *(step(number, 1 / number) for number in range(1, 30)))
    if held_out:
        tell(curve, Validation(step=0, loss=2.0), Validation(step=20, loss=1.0))
    assert not (tmp_path / "loss.png").exists()
    tell(curve, ENDS[end])
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG"
        assert image.width > 600
        colours = {colour for _, colour in image.convert("RGB").getcolors(image.width * image.height) or []}
    assert ((0xD1, 0x49, 0x5B) in colours) == held_out


def test_a_run_without_a_step_draws_nothing(curve: LossCurve, tmp_path: Path) -> None:
    tell(curve, PhaseStarted(phase="load"), ENDS["failed"])
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]


def test_a_run_that_only_had_its_lora_converted_after_a_crash_is_drawn(make_spec, tmp_path: Path) -> None:
    tell(LossCurve(make_spec(), tmp_path), step(1, 1.0), step(2, 0.5))
    tell(LossCurve(make_spec(), tmp_path), ENDS["finished"])
    assert (tmp_path / "loss.png").exists()


def test_resuming_forgets_what_was_told_after_the_checkpoint(curve: LossCurve) -> None:
    tell(curve, step(1, 1.0), Validation(step=2, loss=9.0), step(2, 0.9), step(3, None), step(4, 0.1), step(5, 0.2))
    tell(curve, Validation(step=5, loss=8.0), Resumed(step=3), step(4, 0.7))
    assert curve.losses() == ({1: 1.0, 2: 0.9, 4: 0.7}, {2: 9.0})


def test_the_running_mean_starts_unbiased() -> None:
    assert smoothed({1: 2.0, 2: 2.0, 5: 2.0}) == pytest.approx({1: 2, 2: 2, 5: 2})
    assert smoothed({1: 1.0, 2: 3.0})[2] == pytest.approx((0.95 * 1 + 3) / 1.95)
