"""What is to be run, and how long it will take."""

from __future__ import annotations

from bench_example import example

from loraport_bench import records as r
from loraport_bench.schedule import expected_seconds, schedule


def test_what_broke_off_tells_nothing_of_how_long_a_training_takes() -> None:
    job = next(each for each in schedule(example().protocol) if each.backend == "native")
    (done,) = (run for run in example().runs if run.key == job.key)
    good = done.model_copy(update={"status": "ok", "failure": None, "total_s": 100.0})

    def failed(reason: r.Reason, seconds: float) -> r.Run:
        failure = r.Failure(reason=reason, message="")
        return good.model_copy(update={"status": "failed", "failure": failure, "total_s": seconds})

    early = [failed("error", 1.0), failed("out-of-memory", 2.0), failed("not-ready", 0.0)]
    assert expected_seconds(job, [good, *early]) == 100
    assert expected_seconds(job, early) is None
    assert expected_seconds(job, [*early, failed("time-out", 300.0)]) == 300
