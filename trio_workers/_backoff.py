"""How long a slot waits whose workers fail, without clock or I/O: part of the roster's memory."""

import math
import random
from collections.abc import Collection, Set
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._config import Restart


class BackOff:
    """Failures by slot, those in a row in the whole pool (`in_a_row`), and when each slot may try again."""

    def __init__(self, rng: random.Random) -> None:
        self.in_a_row = 0
        self._rng = rng
        self._failures: dict[int, int] = {}
        self._failed_at: dict[int, float] = {}
        self._retry_at: dict[int, float] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to forget when a worker has helped somebody."""
        return bool(self._failures) or self.in_a_row > 0

    @property
    def waits(self) -> bool:
        """Whether some slot must wait for its next try."""
        return bool(self._retry_at)

    @property
    def failed(self) -> Set[int]:
        """The slots whose last worker has failed, and no other has helped there since."""
        return self._failures.keys()

    def has_helped(self, slot: int, ready_at: float | None) -> None:
        """Forget a slot's failures: unless they are those of successors, that fail while this worker serves on."""
        if ready_at is not None and ready_at >= self._failed_at.get(slot, 0.0):
            self._failures.pop(slot, None)
        self.in_a_row = 0

    def has_lived(self, slot: int) -> None:
        """Forget a slot's failures: its worker had lived for long enough."""
        self._failures.pop(slot, None)
        self.in_a_row = 0

    def has_failed(self, slot: int, now: float) -> None:
        """Count a worker of this slot that has helped nobody."""
        self._failed_at[slot] = now
        self._failures[slot] = self._failures.get(slot, 0) + 1

    def wait(self, slot: int, now: float, restart: "Restart") -> None:
        """Make the slot's next try wait: longer after each failure."""
        try:
            delay = min(restart.initial * restart.factor ** (self._failures[slot] - 1), restart.maximum)
        except OverflowError:
            delay = restart.maximum
        self._retry_at[slot] = now + delay * (1 + restart.jitter * self._rng.uniform(-1, 1))

    def may_try(self, slot: int, now: float) -> bool:
        """Whether a slot need not wait (any more)."""
        return self._retry_at.get(slot, now) <= now

    def tries(self, slot: int) -> None:
        """Note that a slot's next worker is started."""
        self._retry_at.pop(slot, None)

    def next_try(self, held: Collection[int]) -> float:
        """When the first of the slots that nobody holds may try again."""
        return min((at for slot, at in self._retry_at.items() if slot not in held), default=math.inf)

    def forget(self, first: int = 0) -> None:
        """Forget all about slots from this number on; from 0 on also how many failed in a row."""
        for slots in (self._failures, self._failed_at, self._retry_at):
            for slot in [slot for slot in slots if slot >= first]:
                del slots[slot]
        if first == 0:
            self.in_a_row = 0
