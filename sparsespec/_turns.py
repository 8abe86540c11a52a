"""Turns at something that only so many threads may do at once, in the order of asking."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class BusyError(RuntimeError):
    """As many callers as allowed are waiting already."""


class _Ticket:
    """One caller's claim: ``new``, perhaps ``waiting`` until its gate opens, ``served``, ``left`` and ``done``."""

    __slots__ = ("gate", "state")

    def __init__(self) -> None:
        self.state = "new"
        self.gate = threading.Lock()


class Turns:
    """So many turns at once, first come, first served.

    Parameters
    ----------
    at_once
        Turns at the same time.
    most_waiting
        Callers that may wait; None for any number.
    """

    def __init__(self, at_once: int, most_waiting: int | None = None) -> None:
        self.at_once = at_once
        self.most_waiting = most_waiting
        # One that its holder can take again: an interrupt can lead from inside to another ticket's return.
        self._lock = threading.RLock()
        self._served = 0
        self._waiting: deque[_Ticket] = deque()

    @property
    def served(self) -> int:
        """Callers whose turn it is."""
        return self._served

    @property
    def waiting(self) -> int:
        """Callers that wait."""
        return len(self._waiting)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and have it.

        Raises
        ------
        BusyError
            At once, when ``most_waiting`` callers wait already.
        """
        ticket = _Ticket()
        try:
            self._ask(ticket)
            yield
        finally:
            # Ctrl-C can come at any moment in the main thread, here too.
            interrupt: KeyboardInterrupt | None = None
            while ticket.state != "done":
                try:
                    self._give_back(ticket)
                except KeyboardInterrupt as error:
                    interrupt = error
            if interrupt is not None:
                raise interrupt

    def _ask(self, ticket: _Ticket) -> None:
        with self._lock:
            if self._served < self.at_once and not self._waiting:
                self._serve(ticket)
                return
            if self.most_waiting is not None and len(self._waiting) >= self.most_waiting:
                raise BusyError(
                    f"{self._served} of {self.at_once} turns are taken and {len(self._waiting)} callers are waiting,"
                    f" of at most {self.most_waiting} (max_waiting): try again later"
                )
            ticket.gate.acquire()
            ticket.state = "waiting"
            self._waiting.append(ticket)
        ticket.gate.acquire()

    def _serve(self, ticket: _Ticket) -> None:
        # No interrupt comes between the two: they are heeded at calls and at jumps back only. What is done in several
        # steps, below, can be done again from any of them.
        ticket.state = "served"
        self._served += 1

    def _give_back(self, ticket: _Ticket) -> None:
        with self._lock:
            if ticket.state == "served":
                self._served -= 1
            ticket.state = "left"
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            while self._waiting:
                following = self._waiting[0]
                if following.state == "waiting":
                    if self._served >= self.at_once:
                        break
                    self._serve(following)
                if following.gate.locked():
                    following.gate.release()
                if following in self._waiting:
                    self._waiting.remove(following)
            ticket.state = "done"
