from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from sparsespec._turns import BusyError, Turns


def wait_until(condition: object, seconds: float = 10.0) -> None:
    """Give other threads the time they need."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def test_no_more_than_so_many_at_once() -> None:
    turns, inside, most = Turns(3), [0], [0]
    counting = threading.Lock()

    def work() -> None:
        for _ in range(50):
            with turns.turn():
                with counting:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0)
                with counting:
                    inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 3
    assert (turns.served, turns.waiting) == (0, 0)


def test_first_come_first_served() -> None:
    turns, order = Turns(1), []

    def work(number: int) -> None:
        with turns.turn():
            order.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    with turns.turn():
        for number, thread in enumerate(threads, start=1):
            thread.start()
            wait_until(lambda number=number: turns.waiting == number)
    for thread in threads:
        thread.join()
    assert order == list(range(6))


def test_one_too_many_is_told_at_once() -> None:
    turns = Turns(1, most_waiting=1)
    waiter = threading.Thread(target=lambda: turns.turn().__enter__())
    with turns.turn():
        waiter.start()
        wait_until(lambda: turns.waiting == 1)
        with (
            pytest.raises(BusyError, match=r"1 of 1 turns are taken and 1 callers are waiting, of at most 1"),
            turns.turn(),
        ):
            pass
        assert (turns.served, turns.waiting) == (1, 1)
    waiter.join()


def test_nobody_waits_where_nobody_may() -> None:
    turns = Turns(2, most_waiting=0)
    with turns.turn(), turns.turn(), pytest.raises(BusyError), turns.turn():
        pass
    with turns.turn():
        assert turns.served == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_turn_that_fails_is_given_back(error: type[BaseException]) -> None:
    turns = Turns(1)
    for _ in range(3):
        with pytest.raises(error), turns.turn():
            raise error
    assert turns.served == 0


_INTERRUPTED = """
import random, signal, threading
from sparsespec._turns import Turns

turns, going, rounds = Turns(1), True, [0]

def work():
    while going:
        with turns.turn():
            rounds[0] += 1

def armed():
    signal.setitimer(signal.ITIMER_REAL, random.random() * 3e-4)

signal.signal(signal.SIGALRM, signal.default_int_handler)
random.seed(0)
thread = threading.Thread(target=work)
thread.start()
interrupts = 0
for _ in range(3000):
    try:
        armed()
        for _ in range(50):
            with turns.turn():
                pass
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupts += 1
going = False
thread.join(20)
assert not thread.is_alive(), "the other thread waits for a turn that nobody has"
assert interrupts > 100, interrupts
assert (turns.served, turns.waiting) == (0, 0), (turns.served, turns.waiting)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer that interrupts")
def test_no_turn_is_lost_whenever_an_interrupt_comes() -> None:
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
