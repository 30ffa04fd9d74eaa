import threading
import time

import numpy as np
import pytest

from loraport.lora import lazy
from loraport.lora.canonical import LoraModule, LowRank
from loraport.lora.lazy import WORKERS, LazyModules, ReadAhead, side_by_side

NAMES = [f"layers.{n}" for n in range(6)]


def module(name):
    return LoraModule(name, LowRank(down=np.ones((1, 2), np.float32), up=np.ones((2, 1), np.float32)), 1.0)


class Counting:
    """Builders of modules that remember which were called."""

    def __init__(self):
        self.built = []
        self.modules = LazyModules({name: lambda name=name: self.build(name) for name in NAMES})

    def build(self, name):
        self.built.append(name)
        return module(name)


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def small_modules_are_worth_a_thread(monkeypatch):
    monkeypatch.setattr(lazy, "_WORTH_A_THREAD", 0)


def test_the_next_module_and_no_more_is_built_while_one_is_used():
    counting = Counting()
    with ReadAhead(counting.modules) as ahead:
        for number, (name, each) in enumerate(ahead.items()):
            assert each.name == name == ahead.given
            until(lambda number=number: counting.built == NAMES[: number + 2])
    assert counting.built == NAMES


def test_small_modules_are_not_built_ahead(monkeypatch):
    monkeypatch.setattr(lazy, "_WORTH_A_THREAD", 1 << 20)
    counting = Counting()
    with ReadAhead(counting.modules) as ahead:
        for number, _ in enumerate(ahead.items()):
            assert counting.built == NAMES[: number + 1]


def test_modules_asked_for_in_another_order_are_the_right_ones():
    with ReadAhead(Counting().modules) as ahead:
        for name in (*reversed(NAMES), NAMES[2], NAMES[2]):
            assert ahead[name].name == name
    assert (len(ahead), list(ahead), "layers.1" in ahead, "x" in ahead) == (6, NAMES, True, False)


def test_what_is_wrong_with_a_module_is_raised_when_that_one_is_asked_for():
    def damaged():
        raise ValueError("damaged")

    modules = LazyModules({"a": lambda: module("a"), "b": damaged})
    with ReadAhead(modules) as ahead:
        assert ahead["a"].name == "a"
        with pytest.raises(ValueError, match="damaged"):
            ahead["b"]


def test_work_side_by_side_comes_out_in_order_and_never_more_of_it_than_there_are_workers():
    running, most, lock = 0, 0, threading.Lock()

    def work(name):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002 * (len(NAMES) - NAMES.index(name)))
        with lock:
            running -= 1
        return name

    assert list(side_by_side(work, NAMES)) == NAMES
    assert most == WORKERS


def test_an_error_side_by_side_ends_the_work():
    begun = []

    def work(name):
        begun.append(name)
        raise ValueError(name)

    others = set(threading.enumerate())  # of tests that ran before in this process
    with pytest.raises(ValueError, match=NAMES[0]):
        list(side_by_side(work, NAMES * 100))
    assert not set(threading.enumerate()) - others
    assert len(begun) < len(NAMES * 100)
