"""When a pool has too few workers, and when too many, without clock or I/O: part of the roster's memory.

Too few: a job has waited for `grow_after`, and a worker more would be there in time. Jobs that will be done before it
has booted do not need it; if they turn out not to be, after the time of a boot, they do.

Too many: over a whole window so many workers were free at every moment. Workers are taken in turn, so under a trickle
none of them is ever idle for long; the least number of free ones tells.
"""

import math
from typing import Final

SHRINK_WINDOW: Final = 60.0
"""Seconds over which a grown pool looks for workers it has too many, where `Limits.idle_ttl` says nothing."""


class Growth:
    """What a roster has seen of its queue, and of its free workers.

    `look_at`: when to look at the queue, `window_ends`: when at the free workers. `lowest_free` is kept by the roster
    whenever a worker is not free any more.
    """

    def __init__(self) -> None:
        self.look_at = math.inf
        self.window_ends = math.inf
        self.lowest_free = 0
        self._hungry_since = math.inf
        self._seen_at = 0.0
        self._seen_served = 0

    def begin_to_watch(self, now: float, served: int, grow_after: float) -> None:
        """Jobs begin to wait; `served` is how many have been done so far."""
        self._seen_at, self._seen_served = now, served
        self._hungry_since = math.inf
        self.look_at = now + grow_after

    def stop_watching(self) -> None:
        """Nobody waits, or nothing can be done about it."""
        self.look_at = math.inf

    def look_again(self, at: float) -> None:
        """Nobody has waited for too long yet; the next to do so would have at this time."""
        self._hungry_since = math.inf
        self.look_at = at

    def wants_more(self, now: float, waiting: int, served: int, boot_took: float, grow_after: float) -> bool:
        """Somebody has waited for too long: see whether a worker more would help."""
        self.look_at = now + grow_after
        self._hungry_since = min(self._hungry_since, now)
        elapsed = now - self._seen_at
        rate = (served - self._seen_served) / elapsed if elapsed > 0 else 0.0
        self._seen_at, self._seen_served = now, served
        return waiting > rate * boot_took or now - self._hungry_since >= boot_took

    def open_window(self, now: float, idle_ttl: float | None, free: int) -> None:
        """Look at the free workers from now on."""
        self.lowest_free = free
        self.window_ends = now + (SHRINK_WINDOW if idle_ttl is None else idle_ttl)

    def close_window(self) -> None:
        """There are no workers more than were asked for."""
        self.lowest_free = 0
        self.window_ends = math.inf
