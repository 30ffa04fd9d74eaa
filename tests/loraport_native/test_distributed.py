"""Training by several processes: what one process that accumulates would train, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from loraport.errors import Interrupted, OutOfMemoryError
from loraport.run.events import Checkpoint, Event, PhaseStarted, Progress, Resumed, Step, Validation, decode_line
from loraport.spec.models import TrainSpec
from loraport_native.checkpoints import whole_checkpoints
from loraport_native.distributed import ALONE, Group
from loraport_native.progress import explain_failure

STEPS = 8
#: Everything that is drawn at random, and everything that one process does for all.
SECTIONS: dict[str, dict[str, Any]] = {
    "dataset": {"caption_dropout": 0.4, "flip": True},
    "lora": {"dropout": 0.3},
    "save": {"every": 2, "keep": 9},
    "validation": {"every": 4, "images": 1},
}
TRAIN = {"steps": STEPS, "ema_decay": 0.9, "lr_scheduler": "cosine", "warmup_steps": 2}


def start(run_dir: Path, spec: TrainSpec) -> subprocess.Popen[str]:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "spec.yaml").write_text(spec.to_yaml())
    return subprocess.Popen(
        [sys.executable, "-m", "loraport_native.train", str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )


def follow(
    process: subprocess.Popen[str], step: int = 0, act: Callable[[], None] = lambda: None
) -> tuple[list[Any], str]:
    """The events and the other output of a run until its end; `act` is called at the step."""
    events: list[Event] = []
    rest = ""
    assert process.stdout is not None
    for line in process.stdout:
        event = decode_line(line)
        if event is None:
            rest += line
            continue
        events.append(event)
        if isinstance(event, Step) and event.step == step:
            act()
    process.wait()
    return events, rest


def of(kind: type, events: list[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def trained(run_dir: Path, step: int = STEPS) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}" / "adapter.safetensors"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as the processes have, so that sums are taken in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_processes_train_what_one_that_accumulates_does_through_kill_stop_and_resume(
    make_spec, make_trainer, one_thread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the two is killed, then both are stopped by SIGINT, then they train to the end: the same bytes as one
    process gives that was left alone, and that goes on from where the two were stopped. (A sum of two has no order.)
    """
    alone = make_trainer(make_spec(**SECTIONS, train={**TRAIN, "gradient_accumulation": 2}), tmp_path / "alone")
    alone.fit()
    losses = {event.step: (event.loss, event.grad_norm) for event in of(Step, alone.events)}
    held_out = {event.step: event.loss for event in of(Validation, alone.events)}

    monkeypatch.setenv("LORAPORT_CACHE", str(tmp_path / "cache"))
    spec, run_dir = make_spec(**SECTIONS, train={**TRAIN, "gpus": 2}), tmp_path / "run"
    process = start(run_dir, spec)

    def kill_the_second() -> None:
        second = [one for one in psutil.Process(process.pid).children() if one.cmdline()[-2] == "1"]
        assert len(second) == 1
        second[0].kill()

    events, output = follow(process, 3, kill_the_second)
    assert process.returncode == 137
    assert isinstance(explain_failure(137, output), OutOfMemoryError)
    assert "process of GPU 1 ended by SIGKILL" in output
    assert "Traceback" not in output
    told = [event.detail for event in of(PhaseStarted, events) if event.phase == "cache"]
    assert told[0].startswith("7 of 7 images"), "each is told once and encoded once"
    assert [event.done for event in of(Progress, events) if event.total == 7] == [2, 4, 6, 7]

    before = events
    process = start(run_dir, spec)
    events, output = follow(process, 4, lambda: process.send_signal(signal.SIGINT))
    assert process.returncode == 130
    assert isinstance(explain_failure(130, output), Interrupted)
    assert [event.step for event in of(Resumed, events)] == [2]
    stopped = of(Step, events)[-1].step
    assert stopped in (4, 5)
    assert max(whole_checkpoints(run_dir)) == stopped, "SIGINT writes a checkpoint first"

    shutil.copytree(run_dir, tmp_path / "elsewhere")
    events, output = follow(start(run_dir, spec))
    assert [event.step for event in of(Resumed, events)] == [stopped]
    assert [line.split()[:3] for line in output.splitlines()] == [["The", "cache", "holds"]], "nothing is said twice"
    assert {event.step: (event.loss, event.grad_norm) for event in of(Step, before + events)} == {
        step: losses[step] for step in [*(e.step for e in of(Step, before)), *range(stopped + 1, STEPS + 1)]
    }
    assert {event.step: event.loss for event in of(Validation, events)}.items() <= held_out.items()
    assert [event.step for event in of(Checkpoint, events)] == [*range(stopped + 2 - stopped % 2, STEPS + 1, 2)]
    assert trained(run_dir).read_bytes() == trained(tmp_path / "alone").read_bytes()

    fewer = make_trainer(alone.spec, tmp_path / "elsewhere")
    fewer.fit()
    assert [event.step for event in of(Resumed, fewer.events)] == [stopped]
    assert trained(tmp_path / "elsewhere").read_bytes() == trained(tmp_path / "alone").read_bytes()


class Half(Group):
    """One of two processes that do not exist: it adds nothing, and keeps its part of the sums."""

    part: tuple[torch.Tensor, ...] = ()

    def sum(self, values: torch.Tensor) -> None:
        object.__setattr__(self, "part", (*self.part, values.clone()))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_each_process_has_its_passes_of_the_same_step(make_spec, make_trainer, tmp_path: Path, dtype: str) -> None:
    """Two processes with three passes each: their gradients and losses add up to those of six passes in one."""

    def parts(group: Half, passes: int) -> tuple[torch.Tensor, ...]:
        sections = {"model": {"dtype": dtype}, "dataset": {"caption_dropout": 0.4}, "lora": {"dropout": 0.3}}
        spec = make_spec(**sections, train={"gradient_accumulation": passes})
        trainer = make_trainer(spec, tmp_path / f"{group.rank} of {group.size}")
        for live in trainer.masters.live:  # none is zero, or half of the gradients would be
            live.data.copy_(torch.randn(live.shape, generator=torch.Generator().manual_seed(1)) / 10)
        trainer.group, trainer.step = group, 5
        trainer._one_step()
        return group.part

    wanted, losses = parts(Half(0, 1), 6)
    (first, of_first), (second, of_second) = (parts(Half(rank, 2), 3) for rank in (0, 1))
    assert [bool(loss) for loss in of_first] == [True, False] * 3
    torch.testing.assert_close(of_first + of_second, losses)
    torch.testing.assert_close(first + second, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_a_process_alone_has_everything_and_sends_nothing() -> None:
    values = torch.arange(4.0)
    ALONE.sum(values)
    assert ALONE.leads
    assert ALONE.share("abc") == "abc"
    assert [ALONE.any(flag) for flag in (False, True)] == [False, True]
    assert ALONE.from_leader(lambda: "mine") == "mine"
    assert values.tolist() == [0, 1, 2, 3]
    with ALONE.leader_first():
        ALONE.wait()
    ALONE.leave()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_shares_of_all_processes_are_everything_once(size: int) -> None:
    shares = [Group(rank, size).share(range(7)) for rank in range(size)]
    assert sorted(number for share in shares for number in share) == list(range(7))
    assert len(shares[0]) == max(map(len, shares)), "the one that tells the progress is never idle before the others"


PEERS = """
import json, sys, torch
from pathlib import Path
from loraport_native.distributed import join
from loraport_native.ranks import Place
group = join(Place(int(sys.argv[1]), Path(sys.argv[2])), 3, torch.device("cpu"))
gradients = torch.full((3,), 10.0 ** group.rank)
gradients[2] = float("nan") if group.rank == 2 else 1.0
losses = torch.zeros(3)
losses[group.rank] = float("inf") if group.rank == 1 else 1.0
for values in (gradients, losses):
    group.sum(values)
with group.leader_first():
    order = Path(sys.argv[2] + "-order")
    with order.open("a") as file:  # the others come at once
        file.write("leader" if group.leads else ".")
group.wait()
told = [*map(str, [*gradients.tolist(), *losses.tolist()])]
told += [group.any(group.rank == 1), group.any(False), group.from_leader(lambda: {"rank": group.rank})]
group.leave()
print(json.dumps([*told, order.read_text()]))
"""


@pytest.mark.slow
def test_processes_agree_on_what_was_summed_and_asked(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", PEERS, str(rank), str(tmp_path / "meeting-point")] for rank in range(3)]
    peers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
    told = [peer.communicate(timeout=120)[0].decode() for peer in peers]
    assert told[0] == told[1] == told[2]
    assert json.loads(told[0]) == [
        *("111.0", "111.0", "nan"),
        *("1.0", "inf", "1.0"),
        True,
        False,
        {"rank": 0},
        "leader..",
    ]


def on_two_cards(test: Callable[..., None]) -> Callable[..., None]:
    for mark in (
        pytest.mark.gpu,
        pytest.mark.timeout(900),
        pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA cards"),
    ):
        test = mark(test)
    return test


@on_two_cards
@pytest.mark.parametrize("memory", [{}, {"quantize": "fp8", "offload": "group", "compile": "regional"}], ids=str)
def test_two_cards_train_what_one_that_accumulates_does(make_spec, tmp_path: Path, memory: dict[str, str]) -> None:
    """Through NCCL and in bf16: the losses agree as far as bf16 allows for another order of sums."""
    losses = []
    for changes in ({"gpus": 2}, {"gradient_accumulation": 2}):
        spec = make_spec(
            **SECTIONS,
            model={"dtype": "bf16"},
            memory=memory,
            train={**TRAIN, **changes},
            backend={"options": {"device": "cuda"}},
        )
        process = start(tmp_path / next(iter(changes)), spec)
        events, output = follow(process)
        assert process.returncode == 0, output
        losses.append([event.loss for event in events if isinstance(event, Step | Validation)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@on_two_cards
def test_two_cards_stop_together_and_end_when_one_is_killed(make_spec, tmp_path: Path) -> None:
    """NCCL itself would wait for the dead one."""
    spec = make_spec(train={"steps": 100_000, "gpus": 2}, backend={"options": {"device": "cuda"}})
    process = start(tmp_path / "run", spec)
    events, output = follow(process, 5, lambda: process.send_signal(signal.SIGINT))
    assert process.returncode == 130, output
    stopped = of(Step, events)[-1].step
    assert max(whole_checkpoints(tmp_path / "run")) == stopped

    killed: list[float] = []

    def kill_the_second() -> None:
        killed.append(time.monotonic())
        next(one for one in psutil.Process(process.pid).children() if one.cmdline()[-2] == "1").kill()

    process = start(tmp_path / "run", spec)
    events, output = follow(process, stopped + 5, kill_the_second)
    assert time.monotonic() - killed[0] < 30
    assert process.returncode == 137, output
    assert [event.step for event in of(Resumed, events)] == [stopped]
