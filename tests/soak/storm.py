"""A storm over one kind of pool, round by round. Each round is the life of one pool:

1. many callers and trouble from outside, side by side;
2. the callers are done: the pool comes to rest, is as large as it was asked to be, and serves;
3. callers and trouble again, and in the midst of it the block is left, by one of the ways there are;
4. nothing is left of it.

At the end the ledger is read.
"""

import logging
import math
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import attrs
import trio

from tests.soak import host, kinds
from tests.soak.audit import audit
from tests.soak.callers import Caller, Handed, shown
from tests.soak.kinds import Environment
from tests.soak.ledger import Ledger
from tests.soak.plan import AHEAD, COMMANDS, FUNCTIONS, Planner
from tests.soak.targets import Target
from tests.soak.trouble import Trouble
from trio_workers import JobRecord, Pool, PythonPool, SpawnError, Worker, WorkerEvent, _roster

CALLERS: Final = 24
CROWD: Final = 64
FEWER: Final = 4
"""In the kinds that have crowds: so many callers of tiny jobs, and of all others so many instead of `CALLERS`."""

IDS: Final = 1_000_000
"""Numbers that each caller has for its jobs in a round."""

MUCH_PATIENCE: Final = 0.02
"""Seconds."""

ROUND: Final = 5.0
"""Seconds that a round takes, about. In a short storm they are shorter, so that there are three: see `growth`."""

CALM: Final = 1.0
"""Seconds of a round in which a pool comes to rest, or to its end, about."""

LAST_WAVE: Final = 0.25
"""The share of a round's time that is left for the wave in which the block is left."""

STUCK: Final = 40.0
"""Seconds after which what should end by itself counts as stuck, on a loaded machine."""

MOST_GROWTH: Final = 32 * 1024 * 1024
"""Bytes that may be in use at the end and were not after the first third. A kept payload is 8 MiB, and there are
hundreds of them; four of them might be pages that the allocator could not give back."""

WAYS_OUT: Final = ("return", "return", "raise", "cancel")


class Leaving(Exception):
    """What a round's block is left by."""


class Stuck(Exception):
    """Something does not come to its end; the complaint has been noted."""


@attrs.define(kw_only=True)
class Result:
    """What became of a storm over one kind."""

    kind: str
    seed: int
    seconds: float
    """For how long it was to be."""
    took: float = 0.0
    rounds: int = 0
    jobs: int = 0
    growth: int = 0
    ahead: int = 0
    """Jobs that lay ahead of their turn, summed over all moments at which somebody looked."""
    endings: Counter[str] = attrs.Factory(Counter[str])
    deeds: Counter[str] = attrs.Factory(Counter[str])
    troubles: Counter[str] = attrs.Factory(Counter[str])
    exits: Counter[str] = attrs.Factory(Counter[str])
    complaints: list[str] = attrs.Factory(list[str])


class Round:
    """The life of one pool. It is the weather that callers and trouble see."""

    target: Target
    pool: Pool | PythonPool

    def __init__(self, result: Result, number: int, directory: str, ledger: Ledger, rng: random.Random) -> None:
        self._result = result
        self._number = number
        self._directory = directory
        self._rng = rng
        self._mark = f"SOAK_MARK={os.getpid()}-{rng.getrandbits(64):x}"
        self._environments: list[Environment] = []
        self._calls = self._broken_call = self._good_call = self._release = 0
        self._there: set[Worker] = set()
        self.has_crowds = kinds.has_crowds(result.kind)
        self.reads_ahead = kinds.reads_ahead(result.kind)
        callers = FEWER if self.has_crowds else CALLERS
        self._callers = [self._make_caller(caller) for caller in range(callers)]
        self._crowd = [self._make_caller(CALLERS + caller) for caller in range(CROWD if self.has_crowds else 0)]
        # Each task draws from a source of its own, or who comes first would decide what happens.
        self._trouble = Trouble(self, random.Random(rng.random()))
        self._change_rng = random.Random(rng.random())
        self._watch_rng = random.Random(rng.random())
        self.ledger = ledger
        self.over = False
        self.workers_are_killed = number % 3 != 2
        self.has_debugged = False
        self.floor = 0
        self.running: dict[int, Handed] = {}
        self.troubles = result.troubles

    def _make_caller(self, caller: int) -> Caller:
        functions = self._result.kind.startswith(kinds.FUNCTIONS)
        acts = FUNCTIONS if functions else AHEAD if self.reads_ahead else COMMANDS
        streams = functions or self._result.kind.startswith("goridge-3")
        rng = random.Random(self._rng.random())
        first_id = (self._number * (CALLERS + CROWD) + caller) * IDS + 1
        return Caller(self, Planner(rng, acts, first_id, streams), rng)

    def _make_environment(self, release: int) -> Environment:
        environment = Environment(self.ledger.path, self._mark, release)
        self._environments.append(environment)
        return environment

    def complain(self, text: str) -> None:
        """Note that a promise was broken."""
        self._result.complaints.append(f"round {self._number}: {text}")

    # the round

    async def run(self, seconds: float) -> None:
        """Live through a pool's life."""
        before = host.look()
        with self._limit("the pool", seconds + 3 * STUCK):
            await self._live(seconds, self._rng.choice(WAYS_OUT))
        self._look_behind(before)

    async def _live(self, seconds: float, way_out: str) -> None:
        async with trio.open_nursery() as strangers:  # callers of another task tree than the pool's
            with trio.CancelScope() as block:
                try:
                    async with self._open():
                        await self._storm(seconds * (1 - LAST_WAVE))
                        await self._rest()
                        await self._raise_another_storm(seconds * LAST_WAVE, strangers)
                        if way_out == "raise":
                            raise Leaving
                        if way_out == "cancel":
                            block.cancel()
                            await trio.lowlevel.checkpoint()
                except Leaving:
                    pass
            self.ledger.note("closed", 0)
            strangers.cancel_scope.deadline = trio.current_time() + STUCK
        if strangers.cancel_scope.cancelled_caught:
            self.complain(f"calls to a closed pool have not come back: {self._still_running()}")

    @asynccontextmanager
    async def _open(self) -> AsyncGenerator[None]:
        settings = kinds.draw_settings(self._rng, self._result.kind)
        environment = self._make_environment(0)
        config = None
        if not self._result.kind.startswith(kinds.FUNCTIONS):
            config = kinds.draw_config(self._rng, self._result.kind, self._directory, settings, environment)
        self.has_debugged = settings.debug
        # With the patience that there is few jobs lie ahead of their turn where the machine has other work to do.
        patience = self._rng.choice((_roster.PATIENCE, MUCH_PATIENCE)) if self.has_crowds else _roster.PATIENCE
        opened = kinds.open_target(
            config, settings, environment, observer=self._observe, job_observer=self._note_record
        )
        with _have(patience):
            async with opened as (self.pool, self.target):
                yield

    async def _storm(self, seconds: float) -> None:
        """Let callers and trouble loose for so long; then the callers come to the end of what they are at."""
        until = trio.current_time() + seconds
        async with trio.open_nursery() as helpers:
            helpers.start_soon(self._watch)
            helpers.start_soon(self._trouble.run, until)
            with self._limit("the callers", seconds + STUCK):
                async with trio.open_nursery() as nursery:
                    self._let_loose(nursery, until)
            helpers.cancel_scope.cancel()

    def _let_loose(self, nursery: trio.Nursery, until: float) -> None:
        for caller in self._callers:
            nursery.start_soon(caller.run, until)
        for caller in self._crowd:
            nursery.start_soon(caller.run_in_a_crowd, until)

    async def _rest(self) -> None:
        """See that the pool still does what it is asked to, has all its workers, and serves."""
        killed = self.workers_are_killed
        with self._limit("coming to rest", STUCK):
            await self._reset_for_certain()
            self.workers_are_killed = False  # those that were are gone
            size = self._rng.randint(1, 4)
            await self.resize(size)
            while not self._is_at_rest(size):  # noqa: ASYNC110 - no event tells of all that
                await trio.sleep(0.005)
            async with trio.open_nursery() as nursery:
                for caller in self._callers[:size]:
                    nursery.start_soon(self._be_served, caller)
        self.workers_are_killed = killed

    async def _reset_for_certain(self) -> None:
        """Reset the pool; a reset to what can't boot, that is still under way, may fail with this one."""
        while True:
            try:
                await self.reset("same")
                return
            except SpawnError:
                pass  # `reset` has complained if that was not it

    def _is_at_rest(self, size: int) -> bool:
        now = self.pool.statistics()
        if self.pool.config.debug if isinstance(self.pool, Pool) else self.has_debugged:
            return not self.pool.workers  # nobody stands by
        return now.idle == now.target == size and not now.waiting  # the next one may be starting: `ttl` is short

    async def _be_served(self, caller: Caller) -> None:
        """Get replies. With a short `allocate_timeout` and limits that replace each worker, not at the first try."""
        replies = 0
        while replies < 3:
            replies += await caller.call_quickly() == "replied"

    async def _raise_another_storm(self, seconds: float, strangers: trio.Nursery) -> None:
        """Let callers and trouble loose in another task tree, to be left in the middle of it."""
        self._let_loose(strangers, math.inf)
        strangers.start_soon(self._trouble.run, math.inf)
        strangers.start_soon(self._watch)
        await trio.sleep(seconds)
        strangers.start_soon(self._call_it_a_day)

    async def _call_it_a_day(self) -> None:
        """End the storm a little later than the block is left: some shall come to a closed door."""
        await trio.sleep(0.01)
        self.over = True

    async def _watch(self) -> None:
        """Look at the sums, at moments nobody expects."""
        while not self.over:
            await trio.sleep(self._watch_rng.uniform(0, 0.03))
            self._check_sum()
            core = self.pool._core  # pyright: ignore[reportPrivateUsage]
            self._result.ahead += sum(len(seat.ahead) for seat in core.roster.seats)

    def _look_behind(self, before: host.Look) -> None:
        """See that nothing is left."""
        for text in host.what_is_left(before, host.look()):
            self.complain(f"left behind: {text}")
        until = time.monotonic() + 5.0
        while (left := host.processes_of(self._mark)) and time.monotonic() < until:
            time.sleep(0.01)  # it has been killed, and is not dead yet
        for pid, what in left.items():
            self.complain(f"left behind: process {pid}: {what}")
        host.kill(left)
        for worker in self._there:
            self.complain(f"{worker} was CREATED, and there was no DESTRUCT")
        self._result.exits.update(self.pool.statistics().exits)

    @contextmanager
    def _limit(self, what: str, seconds: float) -> Generator[None]:
        """Complain if something does not come to its end, and end the round."""
        with trio.move_on_after(seconds) as scope:
            yield
        if scope.cancelled_caught:
            self.complain(f"{what}: not over after {seconds:.0f} s; {self.pool!r}; {self._still_running()}")
            raise Stuck

    def _still_running(self) -> str:
        now = trio.current_time()
        return "; ".join(f"{handed.job}, for {now - handed.since:.1f} s" for handed in self.running.values())

    # what the pool tells

    def _observe(self, event: WorkerEvent, worker: Worker | None, context: object) -> None:
        if event is WorkerEvent.CREATED and worker is not None:
            self._there.add(worker)
        elif event is WorkerEvent.DESTRUCT and worker in self._there:
            self._there.remove(worker)
        elif event is WorkerEvent.DESTRUCT:
            self.complain(f"{worker}: DESTRUCT without CREATED, or twice ({context})")
        if hasattr(self, "pool"):
            self._check_sum()

    def _note_record(self, record: JobRecord) -> None:
        if record.label is not None and record.label.isdecimal():
            self.ledger.note("record", int(record.label), record.outcome)

    def _check_sum(self) -> None:
        now = self.pool.statistics()
        there = now.idle + now.busy + now.starting + now.leased + now.stopping
        if there != len(self.pool.workers):
            self.complain(f"the sum of {now} is {there}, and there are {len(self.pool.workers)} workers")

    # what trouble does to the pool

    async def resize(self, size: int) -> None:
        """Have another number of workers."""
        with self._change():
            await self.pool.resize(size)

    async def reset(self, how: str) -> None:
        """Have other workers: "same" as they are, of "another" config, or "broken", of one that can't boot."""
        with self._change(broken=how == "broken"):
            self._release += 1
            release = self._release
            if how == "same" or isinstance(self.pool, PythonPool):
                for environment in self._environments:
                    environment.release = release
                await self.pool.reset()
            else:
                environment = self._make_environment(release)
                config = kinds.draw_another(self._change_rng, self._result.kind, self._directory, environment)
                self.has_debugged = self.has_debugged or config.debug
                await self.pool.reset(kinds.break_config(config) if how == "broken" else config)
            self.floor = max(self.floor, release)

    @contextmanager
    def _change(self, *, broken: bool = False) -> Generator[None]:
        """Make a change, and complain where it fails without a reason.

        Changes that overlap end as one. So each of them may fail for one to what can't boot, until one has succeeded
        that was called later; and for a worker that was killed as it came up.
        """
        self._calls += 1
        call, good_before = self._calls, self._good_call
        if broken:
            self._broken_call = call
        try:
            yield
        except SpawnError as error:
            if not self.workers_are_killed and self._broken_call <= good_before:
                self.complain(f"a change failed without a reason: {error!r}{shown(error)}")
            raise
        if broken and call == self._calls:
            self.complain("a reset to what can't boot has returned")
        self._good_call = max(self._good_call, call)


@contextmanager
def _have(patience: float) -> Generator[None]:
    """Let jobs of functions lie behind one that takes so long, and no longer."""
    usual = _roster.PATIENCE
    _roster.PATIENCE = patience  # type: ignore[misc]  # pyright: ignore[reportConstantRedefinition]
    try:
        yield
    finally:
        _roster.PATIENCE = usual  # type: ignore[misc]  # pyright: ignore[reportConstantRedefinition]


async def run_storm(kind: str, seed: int, seconds: float) -> Result:
    """Let a storm loose on one kind of pool for about so long, and return what became of it."""
    result = Result(kind=kind, seed=seed, seconds=seconds)
    rounds = max(3, round(seconds / ROUND))
    wave = max(0.5, seconds / rounds - CALM)
    rng = random.Random(f"{kind} {seed}")
    await trio.to_thread.run_sync(int)  # trio's own descriptors and helpers are there before anybody counts
    start = trio.current_time()
    with tempfile.TemporaryDirectory() as directory, _errors_of_ours(result):
        ledger = Ledger(f"{directory}/ledger")
        memory: list[int] = []
        try:
            for number in range(rounds):
                await Round(result, number, directory, ledger, random.Random(rng.random())).run(wave)
                memory.append(host.kept_memory())
                result.rounds += 1
        except* Stuck:
            pass  # the complaint says what
        except* Exception as group:
            result.complaints.append(f"round {result.rounds} has failed{shown(group)}")
        ledger.close()
        if memory:
            result.growth = memory[-1] - memory[(len(memory) - 1) // 3]
        if result.growth > MOST_GROWTH:
            result.complaints.append(f"memory has grown by {result.growth / 2**20:.1f} MiB after the first third")
        reads_ahead = kinds.reads_ahead(kind)
        findings = audit(ledger.path, read_out=kinds.LONGEST_DESTROY_TIMEOUT, reads_ahead=reads_ahead)
    result.endings, result.deeds, result.jobs = findings.endings, findings.deeds, findings.endings.total()
    result.complaints += findings.complaints
    result.took = trio.current_time() - start
    return result


@contextmanager
def _errors_of_ours(result: Result) -> Generator[None]:
    """Take what the package logs: crashes are meant, but an error that it logs is a complaint."""
    logger = logging.getLogger("trio_workers")
    handler = _Complaints(result)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class _Complaints(logging.Handler):
    def __init__(self, result: Result) -> None:
        super().__init__(logging.ERROR)
        self._result = result

    def emit(self, record: logging.LogRecord) -> None:
        """Note a record of the log."""
        self._result.complaints.append(f"logged: {self.format(record)}")
