"""Those who hand in jobs: each draws jobs from its own seed, hands them in by every way there is, and cancels some.

Each job is noted in the ledger when it is handed in ("submit") and when its caller has its end ("over"), and the answer
is looked at when it comes.
"""

import random
import traceback
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, Protocol

import attrs
import trio

from tests.soak.jobs import Told
from tests.soak.kinds import SHORTEST_EXEC_TTL
from tests.soak.ledger import Ledger
from tests.soak.plan import Job, Planner
from tests.soak.targets import Answer, Target
from trio_workers import (
    AllocateTimeout,
    JobError,
    JobTimeout,
    QueueFull,
    RelayError,
    SpawnError,
    WorkerCrashed,
    WorkerError,
)

PROMPT: Final = 3.0
"""Seconds that a cancelled call may take to come back, on a loaded machine."""

PATIENCE: Final = 15.0
"""Seconds that no job waits for a worker, as fast as workers come back here. Some pools allow for more."""

PROMISED: Final[dict[type[BaseException], str]] = {
    JobError: "failed",
    Told: "failed",
    WorkerCrashed: "crashed",
    RelayError: "relay_error",
    WorkerError: "retired",
    AllocateTimeout: "allocate_timeout",
    QueueFull: "queue_full",
    JobTimeout: "job_timeout",
    SpawnError: "boot_failed",
    trio.ClosedResourceError: "closed",
}
"""The exceptions a job may end with. A subclass is another exception."""

FROM_OUTSIDE: Final = frozenset({"crashed"})
"""How any job may end while workers are killed from outside."""

WITH_DEBUG: Final = frozenset({"boot_failed"})
"""How any job may end besides, where its worker was started for it and killed before it was ready."""

IN_A_LINE: Final = frozenset({"crashed", "relay_error", "memory"})
"""How any job may end besides that lay in the line of a command worker: nobody can know whether it had begun."""

BREATHER: Final = 0.4
"""Seconds between two jobs of a caller beside a crowd, at most: nothing gets ahead of its turn where each job hangs."""

MANY: Final = 50
"""Items from which on a map is a long one."""

IN_A_SPOILED_LEASE: Final = frozenset({"crashed", "relay_error", "retired", "memory", "closed"})
"""How any job may end on a leased worker that has not simply answered the one before."""

WRONG_WAY: Final = b"take it with stream()"
"""What a job error says where a streamed reply was asked for as a whole."""


@attrs.frozen
class Handed:
    """A job that was handed in: `floor` is the oldest release that may answer it, `also` how it may end besides."""

    job: Job
    floor: int
    also: frozenset[str]
    since: float


class Weather(Protocol):
    """What callers see of the storm that they are in."""

    ledger: Ledger
    target: Target
    over: bool
    workers_are_killed: bool
    has_debugged: bool
    reads_ahead: bool
    has_crowds: bool
    floor: int
    running: dict[int, Handed]

    def complain(self, text: str) -> None:
        """Note that a promise was broken."""
        ...


class Caller:
    """One caller, a task."""

    _helpers: trio.Nursery

    def __init__(self, weather: Weather, planner: Planner, rng: random.Random) -> None:
        self._weather = weather
        self._planner = planner
        self._rng = rng

    async def run(self, until: float) -> None:
        """Hand in one job after the other until then, or until the pool has been closed."""
        async with trio.open_nursery() as self._helpers:
            while trio.current_time() < until and not self._weather.over:
                await self._call()
                if self._weather.has_crowds:
                    await trio.sleep(self._rng.uniform(0, BREATHER))

    async def run_in_a_crowd(self, until: float) -> None:
        """Hand in one tiny job after the other, and cancel some of them."""
        async with trio.open_nursery() as self._helpers:
            while trio.current_time() < until and not self._weather.over:
                if await self._exec(self._planner.draw_tiny()) == "queue_full":
                    await trio.sleep(self._rng.uniform(0, 0.02))

    async def call_quickly(self) -> str:
        """Hand in a small job that nobody disturbs, and return how it ended."""
        job = self._planner.draw_quick()

        async def call() -> str:
            self._check(job, await self._weather.target.run(job))
            return "replied"

        self._submit(job, "quick")
        return await self._see(job, call, trio.CancelScope())

    # the ways

    async def _call(self) -> None:
        (way,) = self._rng.choices(("exec", "stream", "lease", "map"), (60, 15, 15, 10))
        match way:
            case "exec":
                if await self._exec(self._draw()) == "queue_full":
                    await trio.sleep(self._rng.uniform(0, 0.02))  # or nothing else would be done
            case "stream":
                await self._stream()
            case "lease":
                await self._lease()
            case _:
                await self._map()

    def _draw(self) -> Job:
        """Draw a job; one of a few streams its answer, and is asked for the wrong way."""
        return self._planner.draw_stream() if self._rng.random() < 0.02 else self._planner.draw()

    async def _exec(self, job: Job, **lease: Any) -> str:
        worker = lease.get("worker")

        async def call() -> str:
            self._check(job, await self._weather.target.run(job, worker))
            return "replied"

        self._submit(job, "exec", **lease)
        outcome = await self._see(job, call, self._plan_cancel(job))
        if job.instruction.do == "stream" and outcome == "failed":
            return "left"  # it was asked for the wrong way: what its worker does behind the second part is to come
        return "answered twice" if job.instruction.do == "twice" else outcome

    async def _stream(self, **lease: Any) -> str:
        job = self._planner.draw_stream() if self._rng.random() < 0.8 else self._planner.draw()
        enough = self._rng.choice((0, 1, 2, 5, 10_000))
        pause = self._rng.choice((0.0, 0.0, 0.002))
        worker = lease.get("worker")

        async def call() -> str:
            async with self._weather.target.stream(job, worker) as parts:
                for part in range(enough):
                    try:
                        reply = await anext(parts)
                    except StopAsyncIteration:
                        return "replied"
                    self._check(job, self._weather.target.read(reply), part)
                    await trio.sleep(pause)
            return "left"

        self._submit(job, "stream", **lease)
        outcome = await self._see(job, call, self._plan_cancel(job))
        return "answered twice" if job.instruction.do == "twice" else outcome

    async def _lease(self) -> None:
        """Have a worker to oneself for some jobs."""
        lease = self._planner.draw_lease()
        number = self._rng.randrange(5)

        async def call() -> str:
            async with self._weather.target.lease(lease) as worker:
                also: frozenset[str] = frozenset()
                for _ in range(number):
                    since = trio.current_time()
                    if self._rng.random() < 0.8:
                        outcome = await self._exec(self._draw(), worker=worker, floor=floor, also=also)
                    else:
                        outcome = await self._stream(worker=worker, floor=floor, also=also)
                    # An answer that came as exec_ttl passed is an answer, from a worker that is killed for it.
                    if outcome not in ("replied", "failed") or trio.current_time() - since >= SHORTEST_EXEC_TTL:
                        also = IN_A_SPOILED_LEASE
            return "leased"

        self._submit(lease, "lease")
        floor = self._weather.running[lease.id].floor
        await self._see(lease, call, self._plan_cancel(lease))

    async def _map(self) -> None:
        hangs = self._rng.random() < 0.2
        if self._weather.has_crowds and self._rng.random() < 0.7:
            drawn = [self._planner.draw_tiny(quiet=not hangs) for _ in range(self._rng.randrange(MANY, 800))]
        else:
            drawn = [self._planner.draw(quiet=not hangs) for _ in range(self._rng.randrange(1, 12))]
        ordered, return_exceptions = self._rng.random() < 0.7, self._rng.random() < 0.7
        window, enough = self._rng.choice((None, 1, 20)), self._rng.choice((1, 3, 100, 100))
        in_batches = False
        if len(drawn) >= MANY:
            window, enough = self._rng.choice((None, None, 400)), self._rng.choice((100, 500, 10_000))
            in_batches = self._rng.random() < 0.4
        taken: dict[int, Job] = {}

        def source() -> Iterator[Job]:
            for job in drawn:
                self._submit(job, "map" if ordered else "map in any order")
                taken[job.id] = job
                yield job

        async def take_batches(results: Any) -> None:
            nonlocal enough
            while enough > 0:
                try:
                    batch = await anext(results.batches())
                except StopAsyncIteration:
                    return
                enough -= len(batch)
                for result in batch:
                    self._end_in_map(taken, result, ordered)

        async def call() -> None:
            mapped = self._weather.target.map(
                source(), ordered=ordered, return_exceptions=return_exceptions, window=window
            )
            async with mapped as results:
                if in_batches:
                    await take_batches(results)
                for _ in range(enough):
                    try:
                        result = await anext(results)
                    except StopAsyncIteration:
                        return
                    self._end_in_map(taken, result, ordered)

        scope = trio.CancelScope()
        if any(job.hangs for job in drawn) or self._rng.random() < 0.2:
            scope.deadline = trio.current_time() + self._rng.uniform(0, 0.5)
        with scope:
            try:
                await call()
            except Exception as error:
                self._end_in_map(taken, error, ordered)
        self._check_promptness("a map", scope)
        for job in list(taken.values()):
            self._end(job, "cancelled" if scope.cancelled_caught else "undelivered" if ordered else "unordered")

    def _end_in_map(self, taken: dict[int, Job], result: object, ordered: bool) -> None:
        """Note the end of the job that this is the result of: in order that is the one taken first."""
        if not taken:
            self._weather.complain(f"a map that has no job under way gave {_describe(result)}")
            return
        job = next(iter(taken.values()))
        error: Exception | None = None
        if isinstance(result, Exception):
            if not ordered:
                # Whose it is, nobody can say; the jobs that are left over at the end are those.
                if type(result) not in PROMISED:
                    self._weather.complain(f"a job of a map in any order ended with {_describe(result)}")
                return
            error = result
            outcome = self._outcome_of(job, result)
        else:
            answer = self._weather.target.read(result)
            if not ordered:
                job = taken.get(answer.id, job)
            self._check(job, answer)
            outcome = "replied"
        del taken[job.id]
        self._end(job, outcome, error)

    # cancels

    def _plan_cancel(self, job: Job) -> trio.CancelScope:
        """Draw whether a job is cancelled, and when: before it, with it, under way, or just when it should end."""
        scope = trio.CancelScope()
        now = trio.current_time()
        (when,) = self._rng.choices(("never", "before", "with it", "under way", "at its end"), (70, 4, 6, 10, 10))
        if job.hangs and self._rng.random() < (0.2 if job.instruction.do == "fat" else 0.8):  # else a limit ends it
            scope.deadline = now + self._rng.uniform(0, 0.5)
        match when:
            case "before":
                scope.cancel()
            case "with it":
                self._helpers.start_soon(_cancel_after, scope, self._rng.randrange(5))
            case "under way":
                scope.deadline = now + self._rng.uniform(0, 0.1)
            case "at its end":
                scope.deadline = now + job.instruction.pause + self._rng.uniform(-0.002, 0.005)
            case _:
                pass
        return scope

    def _check_promptness(self, what: object, scope: trio.CancelScope) -> None:
        late = trio.current_time() - scope.deadline
        if late > PROMPT:
            self._weather.complain(f"{what}: its cancel took {late:.1f} s")

    # a job

    def _submit(
        self,
        job: Job,
        way: str,
        *,
        worker: object = None,
        floor: int | None = None,
        also: frozenset[str] = frozenset(),
    ) -> None:
        """Note that a job is handed in. In a lease it may be answered by whatever release the worker is of."""
        weather = self._weather
        weather.running[job.id] = Handed(job, weather.floor if floor is None else floor, also, trio.current_time())
        weather.ledger.note("submit", job.id, f"{job.instruction.do} {way}{'' if worker is None else ' in a lease'}")

    async def _see(self, job: Job, call: Callable[[], Awaitable[str]], scope: trio.CancelScope) -> str:
        """See a job to its end, note it, and return it."""
        error: Exception | None = None
        outcome = "cancelled"
        try:
            with scope:
                try:
                    outcome = await call()
                except Exception as caught:
                    error = caught
        except trio.Cancelled:
            self._end(job, outcome)  # with the lease that it is in
            raise
        if error is not None:
            outcome = self._outcome_of(job, error)
        self._check_promptness(job, scope)
        self._end(job, outcome, error)
        return outcome

    def _end(self, job: Job, outcome: str, error: Exception | None = None) -> None:
        """Note how a job ended, and whether that was one of its ways."""
        weather = self._weather
        handed = weather.running.pop(job.id)
        allowed = job.may | handed.also
        if weather.reads_ahead and getattr(error, "started", False) is None:
            allowed |= IN_A_LINE
        if weather.workers_are_killed:
            allowed |= FROM_OUTSIDE | (WITH_DEBUG if weather.has_debugged else frozenset[str]())
        if outcome not in allowed and outcome != "broken":
            weather.complain(f"{job}: ended as {outcome}, and may only as {', '.join(sorted(allowed))}{shown(error)}")
        age = trio.current_time() - handed.since
        if outcome == "allocate_timeout" and age > PATIENCE:
            weather.complain(f"{job}: waited for {age:.1f} s{shown(error)}")
        if outcome == "job_timeout" and age < SHORTEST_EXEC_TTL:
            weather.complain(f"{job}: timed out before exec_ttl had passed{shown(error)}")
        weather.ledger.note("over", job.id, f"{outcome} {getattr(error, 'started', '-')}")

    def _outcome_of(self, job: Job, error: Exception) -> str:
        """Name the end of a job; complain of one that was not promised, or is not its own."""
        outcome = PROMISED.get(type(error))
        if outcome is None:
            self._weather.complain(f"{job}: ended with what is not promised, {_describe(error)}")
            return "broken"
        if outcome == "retired" and getattr(error, "phase", "") == "memory":
            return "memory"
        if isinstance(error, Told):
            own = error.args == (job.id,)
        elif isinstance(error, JobError):
            asked_wrongly = job.instruction.do == "stream" and WRONG_WAY in error.message
            own = b"failed %d" % job.id in error.message or asked_wrongly
        else:
            own = True
        if not own:
            self._weather.complain(f"{job}: has the error of another job, {_describe(error)}")
        return outcome

    def _check(self, job: Job, answer: Answer, part: int = 0) -> None:
        """Hold an answer against what the job was to give."""
        handed, instruction = self._weather.running[job.id], job.instruction
        for what, is_, should in (
            ("the job", answer.id, job.id),
            ("the part", answer.part, part),
            ("the checksum of what came there", answer.checksum, job.checksum),
            ("the context", answer.context, job.context if answer.context is not None else None),
            ("the size", len(answer.payload), instruction.back),
        ):
            if is_ != should:
                self._weather.complain(f"{job}: the answer is not its own, {what} is {is_!r} and not {should!r}")
        if answer.payload != job.expected:
            self._weather.complain(f"{job}: the answer carries another payload, {answer.payload[:40]!r}...")
        if answer.release < handed.floor:
            self._weather.complain(
                f"{job}: answered by release {answer.release} after reset had returned for {handed.floor}"
            )


async def _cancel_after(scope: trio.CancelScope, passes: int) -> None:
    """Cancel after some passes of the run loop."""
    for _ in range(passes):
        await trio.lowlevel.checkpoint()
    scope.cancel()


def _describe(result: object) -> str:
    return repr(result) + shown(result if isinstance(result, Exception) else None)


def shown(error: Exception | None) -> str:
    """Return a traceback, to go behind a complaint."""
    return "" if error is None else "\n" + "".join(traceback.format_exception(error))
