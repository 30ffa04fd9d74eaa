"""Writes example_results.json: what a bench of four trainers on one card looks like, with INVENTED numbers.

For tests of reports and of comparing; no number of it was measured. `python tests/bench_example.py` writes it anew.
"""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from loraport_bench import records as r

FILE = Path(__file__).with_name("loraport_bench") / "example_results.json"
BACKENDS = ["native", "diffsynth", "simpletuner", "ai-toolkit"]
STEP = {"native": 0.46, "diffsynth": 1.08, "simpletuner": 1.05, "ai-toolkit": 1.21}  # invented, seconds
PEAK = {"native": 12.1, "diffsynth": 24.0, "simpletuner": 14.1, "ai-toolkit": 14.2}  # invented, GiB
START = datetime(2026, 11, 20, 9, tzinfo=UTC)
STEPS, WARM_UP, SEEDS, PROFILES = 60, 10, [0, 1, 2], ["fp8", "nf4"]
WITHOUT = [0.412, 0.655, 0.871, 1.204, 0.398, 0.640, 0.902, 1.171]
GIB = 2**30


def example() -> r.Results:
    """The same every time."""
    chance = random.Random(7)
    order = [
        (tier, profile, backend, repeat)
        for repeat in range(len(SEEDS))
        for tier in ("matched", "best-effort")
        for profile in PROFILES
        for backend in (BACKENDS if repeat % 2 == 0 else BACKENDS[::-1])
    ]
    runs = [_run(position, *place, chance) for position, place in enumerate(order)]
    return r.Results(
        name="example-invented",
        command="loraport bench example.yaml --backends native,diffsynth,simpletuner,ai-toolkit --profiles fp8,nf4",
        created=START,
        updated=START + timedelta(hours=3),
        complete=True,
        spec_sha256="0" * 64,
        spec={"name": "example-invented", "lora": {"rank": 32}, "train": {"steps": STEPS}},
        protocol=r.Protocol(
            backends=BACKENDS,
            profiles=PROFILES,
            batches=[1],
            tiers=["matched", "best-effort"],
            repeats=len(SEEDS),
            seeds=SEEDS,
            steps=STEPS,
            warm_up=WARM_UP,
            images=8,
            held_out=2,
            images_sha256="0" * 64,
            resolution=1024,
            images_a_step=[1],
            text_tokens="the captions as they are: 412 to 655 tokens",
            sampling_s=0.05,
            time_limit_s=3600,
            matched_fields=["lora.rank", "train.optimizer", "train.batch_size", "memory.storage"],
            changed={"train.max_grad_norm": "0: some trainers do not clip", "sample.every": "0: nothing is drawn"},
        ),
        inequalities={
            "matched/fp8": [
                r.Inequality(
                    path="train.warmup_steps",
                    value=0,
                    backends={
                        "native": "exact",
                        "diffsynth": "defaulted: its first five steps run at a third of the learning rate",
                        "simpletuner": "exact",
                        "ai-toolkit": "exact",
                    },
                )
            ]
        },
        runs=runs,
    )


def _run(position: int, tier: Any, profile: str, backend: str, repeat: int, chance: random.Random) -> r.Run:
    seed = SEEDS[repeat]
    started = START + timedelta(minutes=4 * position)
    common: dict[str, Any] = {
        "key": f"{tier}/{profile}/{backend}/{seed}/{repeat}",
        "position": position,
        "tier": tier,
        "profile": profile,
        "backend": backend,
        "repeat": repeat,
        "seed": seed,
        "started": started,
        "versions": {"loraport": "0.1.0", "python": "3.11.9", "torch": "2.11.0"},
        "verdicts": [
            r.Judgement(path="train.optimizer", value="adamw", kind="exact", reason="an invented reason"),
            r.Judgement(path="memory.compile", value="regional", kind="defaulted", reason="none: another one"),
        ],
    }
    if profile == "nf4" and backend == "ai-toolkit":
        message = "memory.storage = 'nf4': refused: ai-toolkit has no nf4; set memory.quantize: fp8 or int8."
        return r.Run(**common, status="refused", failure=r.Failure(reason="refused", message=message), total_s=0)
    common["machine"] = _machine()
    common["configuration"] = r.Configuration(
        spec={"train": {"steps": STEPS, "seed": seed}},
        files={"backend/config.json": '{"invented": true}\n'},
        command=["python", "-m", "trainer", "<work>/run"],
        env={"PYTHONUNBUFFERED": "1"},
    )
    if tier == "best-effort" and profile == "nf4" and backend == "diffsynth":
        message = "CUDA out of memory. Tried to allocate 2.00 GiB."
        failure = r.Failure(reason="out-of-memory", message=message, exit_code=6)
        return r.Run(
            **common, status="failed", failure=failure, total_s=41.5, phases={"start": 4.0, "load_quantise": 37}
        )
    if tier == "best-effort" and profile == "fp8" and backend == "ai-toolkit" and repeat == 1:
        failure = r.Failure(reason="time-out", message="Ended after 3600 s, the limit of a run.", exit_code=130)
        return r.Run(**common, status="failed", failure=failure, total_s=3600, phases={"start": 5, "load_quantise": 60})
    step = STEP[backend] * (0.8 if tier == "best-effort" and backend == "native" else 1.0) * chance.gauss(1, 0.006)
    each = [round(step * chance.gauss(1, 0.012), 4) for _ in range(STEPS - WARM_UP)]
    phases: dict[Any, float] = {
        "start": 4.0 + chance.random(),
        "load_quantise": 22.0 + 6 * chance.random(),
        "cache": 31.0,
        "compile": 38.0 if backend == "native" and tier == "best-effort" else 0.0,
        "train": step * STEPS,
        "save": 0.8,
        "convert": 1.6,
    }
    total = sum(phases.values())
    train_from = phases["start"] + phases["load_quantise"] + phases["cache"] + phases["compile"]
    return r.Run(
        **common,
        status="ok",
        total_s=round(total, 2),
        phases={name: round(seconds, 2) for name, seconds in phases.items() if seconds},
        timeline=_timeline(phases),
        steps=r.Steps(warm_up=WARM_UP, seconds=_spread(each), measured="trainer", wall_mean=step * 1.004, each=each),
        images_per_second=round(1 / _spread(each).median, 4),
        device_memory=_trace(PEAK[backend] * GIB * (0.7 if profile == "nf4" else 1), total, train_from, chance),
        host_memory=_trace(9.5 * GIB, total, train_from, chance),
        torch_peaks=r.TorchPeaks(allocated_bytes=11 * GIB, reserved_bytes=12 * GIB) if backend == "native" else None,
        disk=r.Disk(
            written_bytes=900_000_000,
            read_bytes=9_400_000_000,
            cache_bytes=160_000_000,
            run_folder_bytes=680_000_000,
            lora_bytes=170_500_000,
        ),
        cards=[
            r.Card(
                samples=round(2 * step * (STEPS - WARM_UP)),
                clock_mhz=r.Range(low=1830, median=1965, high=1980),
                memory_clock_mhz=r.Range(low=3201, median=3201, high=3201),
                power_w=r.Range(low=210, median=655, high=698),
                temperature_c=r.Range(low=34, median=61, high=66),
                utilisation_percent=r.Range(low=40, median=99, high=100),
                throttled=[],
            )
        ],
        energy=r.Energy(
            joules=total * 480,
            train_joules=phases["train"] * 640,
            steps_joules=step * (STEPS - WARM_UP) * 650,
            joules_per_image=step * 650,
        ),
        work=r.Work(
            steps=STEPS,
            images=STEPS,
            modules=238,
            parameters=85_229_568,
            expected_steps=STEPS,
            expected_images=STEPS,
            differs=[],
        ),
        losses=[
            r.Loss(
                step=s,
                images=s,
                train_s=round(s * step, 3),
                loss=round(0.4 + 0.5 * math.exp(-s / 25) * chance.random(), 4),
            )
            for s in range(1, STEPS + 1, 2)
        ],
        quality=_quality(step, chance),
        overhead=r.Overhead(
            step_median_s=step * 0.997,
            step_share=0.003,
            step_shares=[-0.002, 0.003, 0.006],
            run_s=total - 3,
            run_extra_s=1.3,
            run_extras_s=[0.9, 1.3, 1.4],
            pairs=3,
            phase_extras_s={"start": 0.6, "load_quantise": 0.5, "train": -0.02, "save": 0.2},
        )
        if repeat == 0 and tier == "matched"
        else None,
        notes=["The step time is DiffSynth's own clock."] if backend == "diffsynth" else [],
    )


def _timeline(phases: dict[Any, float]) -> list[tuple[Any, float, float]]:
    spans, moment = [], 0.0
    for name, seconds in phases.items():
        if seconds:
            spans.append((name, round(moment, 2), round(moment + seconds, 2)))
            moment += seconds
    return spans


def _spread(values: list[float]) -> r.Spread:
    from loraport_bench.measure import spread

    return r.Spread(count=len(values), **spread(values))


def _trace(peak: float, total: float, train_from: float, chance: random.Random) -> r.Trace:
    def used(moment: float) -> int:
        share = min(1.0, moment / train_from) * 0.85 if moment < train_from else 0.97 + 0.03 * chance.random()
        return int(share * peak)

    samples = [(round(total * n / 40, 2), used(total * n / 40)) for n in range(41)]
    by_phase: dict[Any, int] = {"load_quantise": int(0.8 * peak), "train": max(size for _, size in samples)}
    most = max(size for _, size in samples)
    return r.Trace(
        scope="processes", interval_s=0.052, longest_gap_s=0.11, peak_bytes=most, by_phase=by_phase, samples=samples
    )


def _quality(step: float, chance: random.Random) -> r.Quality:
    drop = 0.16 + 0.01 * chance.gauss(0, 1)
    each = [round(loss * (1 - drop), 6) for loss in WITHOUT]
    mean = sum(WITHOUT) / len(WITHOUT)
    curve = [
        r.QualityPoint(
            step=s, images=s, train_s=s * step, loss=mean * (1 - drop * (1 - math.exp(-3 * s / STEPS)) / 0.9502)
        )
        for s in (15, 30, 45, 60)
    ]
    return r.Quality(
        evaluator="native 0.1.0, bf16",
        triples=8,
        images=2,
        without=mean,
        loss=sum(each) / len(each),
        each=each,
        without_each=WITHOUT,
        curve=curve,
    )


def _machine() -> r.Machine:
    return r.Machine(
        system="Linux-6.1 x86_64",
        processor="an invented processor",
        cores=16,
        memory_bytes=128 * GIB,
        card="Invented GPU",
        cards=1,
        card_bytes=139 * GIB,
        compute_capability=(9, 0),
        driver="580.00",
        idle=r.Idle(waited_s=0, utilisation_percent=0, used_bytes=4 * 2**20, processes=0),
    )


if __name__ == "__main__":
    example().write(FILE)
