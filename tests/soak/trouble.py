"""What happens to a pool from outside while jobs run: kills, stops, resizes, resets."""

import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import trio

from tests.soak.callers import shown
from trio_workers import Pool, SpawnError, Worker

PAUSE: Final = 0.1
"""Seconds that a worker is stopped by SIGSTOP: longer than most jobs take."""

KILLS: Final = {
    "killed by SIGKILL": signal.SIGKILL,
    "killed by SIGTERM": signal.SIGTERM,
    "killed by SIGSEGV": signal.SIGSEGV,
}


class Changeable(Protocol):
    """What trouble needs to know of a pool, and how it changes it."""

    pool: Any
    over: bool
    workers_are_killed: bool
    troubles: Counter[str]

    def complain(self, text: str) -> None:
        """Note that a promise was broken."""
        ...

    async def resize(self, size: int) -> None:
        """Have another number of workers."""
        ...

    async def reset(self, how: str) -> None:
        """Have other workers: "same" as they are, of "another" config, or "broken", of one that can't boot."""
        ...


class Trouble:
    """A task that makes trouble, one thing after the other."""

    def __init__(self, weather: Changeable, rng: random.Random) -> None:
        self._weather = weather
        self._rng = rng

    async def run(self, until: float) -> None:
        """Make trouble until then, or until the pool has been closed. What takes long goes on beside what is next."""
        kinds = {"pause": 2, "stop": 4, "resize": 4, "reset": 2}
        if isinstance(self._weather.pool, Pool):
            kinds |= {"reset to another": 2, "reset to a broken": 1}  # functions have no config
        if self._weather.workers_are_killed:
            kinds |= {**dict.fromkeys(KILLS, 3), "killed": 3}
        async with trio.open_nursery() as nursery:
            while trio.current_time() < until and not self._weather.over:
                await trio.sleep(self._rng.uniform(0.01, 0.2))
                (kind,) = self._rng.choices(list(kinds), list(kinds.values()))
                self._make(kind, nursery)

    def _make(self, kind: str, nursery: trio.Nursery) -> None:
        weather, rng = self._weather, self._rng
        # Those with a pid: until they are reaped, which takes them out of the pool, nobody else can have it.
        workers = [worker for worker in weather.pool.workers if worker.pid is not None]
        if kind == "resize":
            nursery.start_soon(self._change, kind, weather.resize, rng.randint(1, 6))
        elif kind.startswith("reset"):
            how = {"reset": "same", "reset to another": "another", "reset to a broken": "broken"}[kind]
            nursery.start_soon(self._change, kind, weather.reset, how)
        elif workers:
            worker = rng.choice(workers)
            if kind in KILLS:
                os.kill(worker.pid, KILLS[kind])
                weather.troubles[kind] += 1
            elif kind == "pause":
                nursery.start_soon(self._pause, worker)
            else:
                nursery.start_soon(self._change, kind, worker.kill if kind == "killed" else worker.stop)

    async def _pause(self, worker: Worker) -> None:
        """Let a worker stand still for a moment."""
        if worker not in self._weather.pool.workers:
            return
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
        self._weather.troubles["paused"] += 1
        try:
            await trio.sleep(PAUSE)
        finally:
            if worker in self._weather.pool.workers:
                os.kill(worker.pid, signal.SIGCONT)

    async def _change(self, kind: str, change: Callable[..., Awaitable[object]], *args: object) -> None:
        """Make a change, and now and then give up the wait for it, before it or on the way."""
        weather = self._weather
        outcome = ""
        with trio.CancelScope() as scope:
            if self._rng.random() < 0.3:
                scope.deadline = trio.current_time() + self._rng.choice((0.0, 0.001, self._rng.uniform(0, 0.2)))
            try:
                await change(*args)
            except trio.ClosedResourceError:
                outcome = "closed"
            except SpawnError:
                outcome = "failed"  # whether it may, knows who keeps the count of changes
            except Exception as error:
                outcome = "broken"
                weather.complain(f"{kind} {args}: {error!r}{shown(error)}")
        if scope.cancelled_caught:
            outcome = "cancelled"
        weather.troubles[f"{kind}: {outcome}" if outcome else kind] += 1
