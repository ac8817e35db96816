"""How many calls of a map go to a worker together: decided by how long they took. No clock inside; times are given.

A message to a worker and back costs some 50 µs, whatever it carries. So calls that take microseconds go together, as
many as take about `TARGET`, and calls that take milliseconds go alone: together they would only wait for each other.
"""

from typing import Final

from ._region import MOST_ITEMS

TARGET: Final = 0.002
"""Seconds that a chunk shall take: many times what its message costs, and no wait that anybody sees."""

QUICK: Final = 0.001
"""A call that was alone, and took less than these seconds with its way there and back, may be of a quick function."""

ALONE: Final = 64
"""Quick calls before any go together. Shorter maps gain nothing: so many take a few milliseconds."""

SLOW_COSTS: Final = 8
"""Quick calls that one slow call undoes. On a busy machine some calls of a quick function are slow."""

GROWTH: Final = 8
"""A chunk may have at most so many times the calls of the one before it."""


class Pace:
    """The size of a map's chunks, from 1 up to `MOST_ITEMS`."""

    def __init__(self) -> None:
        self.size = 1
        self._quick = 0

    def __repr__(self) -> str:
        return f"<Pace: {self.size}>"

    def ran_alone(self, seconds: float, *, awaited: bool) -> None:
        """Take note of a call that was alone: how long it took in all, and whether somebody had to wait."""
        if self.size > 1:
            return  # the end of a source, or of a window: chunks tell more
        if seconds < QUICK:
            self._quick += 1
        else:
            self._quick = max(0, self._quick - SLOW_COSTS)
        if self._quick >= ALONE and awaited:
            self.size = 2

    def ran(self, count: int, seconds: float, *, awaited: bool) -> None:
        """Take note of a chunk: how many calls were run, and how long the worker was at it.

        Chunks grow only where somebody had to wait for results: what comes quickly enough need not come more quickly,
        and the larger the chunks, the more of the source has been taken ahead.
        """
        fits = MOST_ITEMS if seconds * MOST_ITEMS <= TARGET * count else int(TARGET * count / seconds)
        if fits < 2:
            self.alone()
        elif fits < self.size:
            self.size = fits
        elif awaited and 2 * count >= self.size:
            self.size = min(fits, GROWTH * self.size)

    def alone(self) -> None:
        """Begin anew with calls alone: they have become slow, or large."""
        self.size = 1
        self._quick = 0
