"""Two things in one pass of the run loop, in every order: each job still has its one ending (promises 2 to 5).

One worker runs the job A, and the job B waits for it. Then two of these happen in one and the same pass, in a given
order:

* handover: A's task takes its reply, and the worker goes to B
* cancel: B's caller is cancelled
* deadline: B has waited for `allocate_timeout`
* exit: the worker's own task learns that its process has ended
* close: the `open_pool` block is left normally
* abort: it is left by an error

What happens is done by the very task that does it in real life; trio's scheduler is made to run them in order, and an
instrument watches that it did, within one pass. B's task, which all of them wake, runs before or after everybody else
in the pass that follows.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from trio_workers import AllocateTimeout, Config, Payload, Pool, Worker, WorkerCrashed, open_pool
from trio_workers.child import STOP_REQUEST, Job
from trio_workers.testing import MemoryFactory

pytestmark = pytest.mark.faults

Task = trio.lowlevel.Task

CLOSED = trio.ClosedResourceError
CANCELLED = trio.Cancelled
REPLY = "reply"


class InOrder:
    """Stands in for the random generator with which trio shuffles each pass: the tasks run by rank."""

    def __init__(self) -> None:
        self.ranks: dict[Task, int] = {}

    def random(self) -> float:
        return 1.0

    def shuffle(self, batch: list[Task]) -> None:
        batch.sort(key=lambda task: self.ranks.get(task, 50), reverse=True)  # trio takes from the end


class Watch(trio.abc.Instrument):
    """Notes which of some tasks ran in which pass."""

    def __init__(self) -> None:
        self.names: dict[Task, str] = {}
        self.passes = 0
        self.steps: list[tuple[int, str]] = []

    def after_io_wait(self, timeout: float) -> None:
        self.passes += 1

    def before_task_step(self, task: Task) -> None:
        if task in self.names:
            self.steps.append((self.passes, self.names[task]))


class Left(Exception):
    """What a block is left by."""


@attrs.define(eq=False)
class Scene:
    """A pool whose block another task is in, with callers in tasks of their own."""

    nursery: trio.Nursery
    order: InOrder
    watch: Watch
    pool: Pool
    owner: Task
    leave: trio.Event
    owner_scope: trio.CancelScope
    error: type[Exception] | None = None
    go: trio.Event = attrs.field(factory=trio.Event)
    tasks: dict[bytes, Task] = attrs.field(factory=dict)
    scopes: dict[bytes, trio.CancelScope] = attrs.field(factory=dict)
    endings: dict[bytes, Any] = attrs.field(factory=dict)
    runs: Counter[bytes] = attrs.field(factory=Counter)
    gates: dict[bytes, trio.Event] = attrs.field(factory=dict)

    @property
    def core(self) -> Any:
        return self.pool._core

    def call(self, name: bytes, how: str = "exec") -> None:
        self.nursery.start_soon(self._call, name, how)

    async def _call(self, name: bytes, how: str) -> None:
        self.tasks[name] = trio.lowlevel.current_task()
        self.scopes[name] = trio.CancelScope()
        job = Payload(name)
        try:
            with self.scopes[name]:
                if how == "exec":
                    reply = await self.pool.exec(job)
                elif how == "lease":
                    async with self.pool.lease() as worker:
                        reply = await worker.exec(job)
                else:
                    async with self.pool.stream(job) as parts:
                        (reply,) = [part async for part in parts]
                self.endings[name] = reply.body.decode()
        except Exception as error:
            self.endings[name] = type(error)
        if self.scopes[name].cancelled_caught:
            self.endings[name] = CANCELLED

    def hold(self, *names: bytes) -> None:
        """Let these jobs run until their gate is opened."""
        self.gates.update((name, trio.Event()) for name in names)

    def open_gates(self) -> None:
        for gate in self.gates.values():
            gate.set()

    async def actor(self, act: Callable[[], object]) -> Task:
        """Start a task that acts as soon as `go` is set."""

        async def wait(task_status: trio.TaskStatus[Task]) -> None:
            task_status.started(trio.lowlevel.current_task())
            await self.go.wait()
            act()

        task: Task = await self.nursery.start(wait)
        return task

    def time_is_up(self) -> None:
        """Keep house as if `allocate_timeout` were over for the job that waits."""
        for job in self.core.roster._waiting:
            job.late_at = self.core.roster._late_at = 0.0
        self.core._carry_out(self.core.roster.tick())

    def supervisor(self, worker: Worker) -> Task:
        """The task that lives the worker's life."""
        for task in self.core._nursery.child_tasks:
            frame = getattr(task.coro, "cr_frame", None)
            if frame is not None and frame.f_locals.get("seat") is worker.seat:
                return task
        raise AssertionError(f"{worker} has no task")

    def life(self, worker: Worker) -> Task:
        """The task that is the worker."""
        for task in self.core._nursery.child_tasks:
            if getattr(task.coro, "cr_frame", None) and task.coro.cr_frame.f_locals.get("self") is worker.process:
                return task
        raise AssertionError(f"{worker} does not live")

    async def let_happen(self, *names: str) -> None:
        """Set `go`, and see the tasks of these names run in the next pass, in this order."""
        self.go.set()
        self.watch.steps.clear()
        await trio.lowlevel.checkpoint()
        here = self.watch.passes
        await trio.lowlevel.checkpoint()
        assert [step for step in self.watch.steps if step[0] == here] == [(here, name) for name in names]

    async def settle(self) -> None:
        await trio.testing.wait_all_tasks_blocked()

    def check(self) -> None:
        now = self.pool.statistics()
        assert now.idle + now.busy + now.starting + now.leased + now.stopping == len(self.pool.workers)
        assert now.waiting == 0
        assert self.core.exchange._unflushed == []
        for name, runs in self.runs.items():
            assert runs <= 1, f"{name!r} ran {runs} times"
        for name, ending in self.endings.items():
            assert self.runs[name] == 1 or ending != name.decode()


def die(worker: Worker, returncode: int = 7) -> None:
    """End a memory worker's process at this moment: its relay is at its end, and its own task is going to be told."""
    process: Any = worker.process
    process._scope.cancel()
    process._returncode = returncode
    process._back.leave(writer=True)
    process._there.leave(writer=False)
    process._ended.set()


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> InOrder:
    order = InOrder()
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr("trio._core._run._r", order)
    return order


@pytest.fixture
def watch() -> Iterator[Watch]:
    yield Watch()


@asynccontextmanager
async def scene(order: InOrder, watch: Watch, **fields: Any) -> AsyncIterator[Scene]:
    """A scene with one worker; at its end the pool still does what it did, or is closed."""
    it: Scene
    leave, owner_scope = trio.Event(), trio.CancelScope()
    fields = {"num_workers": 1, **fields}

    async def handler(job: Job) -> bytes | None:
        it.runs[job.body] += 1
        if job.body in it.gates:
            await it.gates[job.body].wait()
        return STOP_REQUEST if job.body == b"stop" else job.body

    async def own(task_status: trio.TaskStatus[tuple[Pool, Task]]) -> None:
        config = Config(command=["any"], factory=MemoryFactory(handler), **fields)
        try:
            with owner_scope:
                async with open_pool(config) as pool:
                    task_status.started((pool, trio.lowlevel.current_task()))
                    await leave.wait()
                    if it.error is not None:
                        raise it.error
        except Left:
            pass

    trio.lowlevel.add_instrument(watch)
    try:
        async with trio.open_nursery() as nursery:
            pool, owner = await nursery.start(own)
            it = Scene(nursery, order, watch, pool, owner, leave, owner_scope)
            yield it
            await it.settle()
            it.open_gates()
            await it.settle()
            it.check()
            if not leave.is_set():
                order.ranks.clear()
                assert (await pool.exec(Payload(b"after"))).body == b"after"
                await it.settle()
                now = pool.statistics()
                assert (now.idle, now.busy, len(pool.workers)) == (now.target, 0, now.target)
                leave.set()
        with pytest.raises(trio.ClosedResourceError):
            await pool.exec(Payload(b"late"))
        assert pool.workers == ()
        it.check()
    finally:
        trio.lowlevel.remove_instrument(watch)


async def act(it: Scene, first: str, second: str, *, how: str = "exec", b_first: bool = False) -> None:
    """Let both happen in one pass, in this order."""
    (worker,) = it.pool.workers
    it.hold(b"A", b"B")
    it.call(b"A")
    await it.settle()
    it.call(b"B", how)
    await it.settle()
    assert it.pool.statistics().waiting == 1
    assert it.runs == {b"A": 1}

    b = it.tasks[b"B"]
    actors = {
        "handover": lambda: _soon(it.tasks[b"A"]),
        "cancel": lambda: it.actor(it.scopes[b"B"].cancel),
        "deadline": lambda: it.actor(it.time_is_up),
        "exit": lambda: _soon(it.supervisor(worker)),
        "close": lambda: _soon(it.owner),
        "abort": lambda: _soon(it.owner),
    }
    tasks = [await actors[name]() for name in (first, second)]
    it.order.ranks = {it.life(worker): 1, trio.lowlevel.current_task(): 2, tasks[0]: 10, tasks[1]: 20}
    it.order.ranks[b] = 0 if b_first else 99
    it.watch.names = {tasks[0]: first, tasks[1]: second}

    if "handover" in (first, second):
        it.gates[b"A"].set()
    await trio.lowlevel.checkpoint()  # now the worker writes its reply, before us
    if "exit" in (first, second):
        die(worker)
    if "abort" in (first, second):
        it.error = Left
    if {"close", "abort"} & {first, second}:
        it.leave.set()
    await it.let_happen(first, second)


async def _soon(task: Task) -> Task:
    return task


async def act_on_running(it: Scene, first: str, second: str, *, a_first: bool) -> None:
    """Let both happen in one pass to a job that runs; `reply`: its worker writes the whole reply."""
    (worker,) = it.pool.workers
    it.hold(b"A")
    it.call(b"A")
    await it.settle()
    actors = {
        "reply": lambda: _soon(it.life(worker)),
        "cancel": lambda: it.actor(it.scopes[b"A"].cancel),
        "exit": lambda: it.actor(lambda: die(worker)),
        "close": lambda: _soon(it.owner),
        "abort": lambda: _soon(it.owner),
    }
    tasks = [await actors[name]() for name in (first, second)]
    it.order.ranks = {tasks[0]: 10, tasks[1]: 20, it.tasks[b"A"]: 0 if a_first else 99}
    it.watch.names = {tasks[0]: first, tasks[1]: second}
    if "reply" in (first, second):
        it.gates[b"A"].set()
    if "abort" in (first, second):
        it.error = Left
    if {"close", "abort"} & {first, second}:
        it.leave.set()
    await it.let_happen(first, second)


# (first, second): A's ending, B's ending, how workers have ended before the pool is closed
ENDINGS: dict[tuple[str, str], tuple[Any, Any, dict[str, int]]] = {
    ("handover", "cancel"): ("A", CANCELLED, {"cancelled": 1}),
    ("handover", "deadline"): ("A", "B", {}),
    ("handover", "exit"): ("A", "B", {"crashed": 1}),
    ("handover", "close"): ("A", "B", {"closing": 1}),
    ("handover", "abort"): ("A", CLOSED, {"closing": 1}),
    ("cancel", "handover"): ("A", CANCELLED, {"cancelled": 1}),
    ("cancel", "deadline"): ("A", CANCELLED, {}),
    ("cancel", "exit"): (WorkerCrashed, CANCELLED, {"crashed": 1}),
    ("cancel", "close"): ("A", CANCELLED, {"closing": 1}),
    ("cancel", "abort"): (CLOSED, CANCELLED, {"closing": 1}),
    ("deadline", "handover"): ("A", "B", {}),
    ("deadline", "cancel"): ("A", CANCELLED, {}),
    ("deadline", "exit"): (WorkerCrashed, AllocateTimeout, {"crashed": 1}),
    ("deadline", "close"): ("A", AllocateTimeout, {"closing": 1}),
    ("deadline", "abort"): (CLOSED, CLOSED, {"closing": 1}),
    ("exit", "handover"): ("A", "B", {"crashed": 1}),
    ("exit", "cancel"): (WorkerCrashed, CANCELLED, {"crashed": 1}),
    ("exit", "deadline"): (WorkerCrashed, AllocateTimeout, {"crashed": 1}),
    ("exit", "close"): (WorkerCrashed, "B", {"crashed": 1, "closing": 1}),
    ("exit", "abort"): (WorkerCrashed, CLOSED, {"crashed": 1, "closing": 1}),
    ("close", "handover"): ("A", "B", {"closing": 1}),
    ("close", "cancel"): ("A", CANCELLED, {"closing": 1}),
    ("close", "deadline"): ("A", AllocateTimeout, {"closing": 1}),
    ("close", "exit"): (WorkerCrashed, "B", {"crashed": 1, "closing": 1}),
    ("abort", "handover"): ("A", CLOSED, {"closing": 1}),
    ("abort", "cancel"): (CLOSED, CLOSED, {"closing": 1}),
    ("abort", "deadline"): (CLOSED, CLOSED, {"closing": 1}),
    ("abort", "exit"): (CLOSED, CLOSED, {"closing": 1}),
}


# A lease that is given a worker has nothing written yet: cancelled, it gives the worker back.
ENDINGS_OF_LEASE = {
    **ENDINGS,
    ("handover", "cancel"): ("A", CANCELLED, {}),
    ("cancel", "handover"): ("A", CANCELLED, {}),
}


@pytest.mark.parametrize("b_first", [True, False], ids=["B-first", "B-last"])
@pytest.mark.parametrize("how", ["exec", "stream", "lease"])
@pytest.mark.parametrize(("first", "second"), ENDINGS, ids=["-then-".join(pair) for pair in ENDINGS])
async def test_pair(
    first: str,
    second: str,
    how: str,
    b_first: bool,
    order: InOrder,
    watch: Watch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Two things in one pass: each job has its one ending, the worker its one fate (promises 2 to 5)."""
    a, b, exits = (ENDINGS_OF_LEASE if how == "lease" else ENDINGS)[first, second]
    async with scene(order, watch) as it:
        await act(it, first, second, how=how, b_first=b_first)
        await it.settle()
        it.open_gates()
        await it.settle()
        assert it.endings == {b"A": a, b"B": b}
        assert dict(it.core.roster.exits) == exits


# What is over before the caller looks decides: a whole reply, also when the cancel came first; else the cancel.
ENDINGS_OF_RUNNING: dict[tuple[str, str], tuple[Any, dict[str, int]]] = {
    ("reply", "cancel"): ("A", {}),
    ("reply", "exit"): ("A", {"crashed": 1}),
    ("reply", "close"): ("A", {"closing": 1}),
    ("reply", "abort"): ("A", {"closing": 1}),
    ("cancel", "reply"): (CANCELLED, {}),
    ("cancel", "close"): (CANCELLED, {"cancelled": 1}),
    ("cancel", "abort"): (CANCELLED, {"closing": 1}),
    ("exit", "close"): (WorkerCrashed, {"crashed": 1}),
    ("exit", "abort"): (CLOSED, {"closing": 1}),
    ("close", "reply"): ("A", {"closing": 1}),
    ("close", "cancel"): (CANCELLED, {"cancelled": 1}),
    ("close", "exit"): (WorkerCrashed, {"crashed": 1}),
    ("abort", "reply"): (CLOSED, {"closing": 1}),
    ("abort", "cancel"): (CANCELLED, {"closing": 1}),
    ("abort", "exit"): (CLOSED, {"closing": 1}),
}


@pytest.mark.parametrize("a_first", [True, False], ids=["A-first", "A-last"])
@pytest.mark.parametrize(
    ("first", "second"), ENDINGS_OF_RUNNING, ids=["-then-".join(pair) for pair in ENDINGS_OF_RUNNING]
)
async def test_pair_on_a_running_job(
    first: str, second: str, a_first: bool, order: InOrder, watch: Watch, autojump_clock: trio.testing.MockClock
) -> None:
    """Two things in one pass to a job on the wire: its one ending; a whole reply keeps its worker (promises 2, 4)."""
    ending, exits = ENDINGS_OF_RUNNING[first, second]
    async with scene(order, watch) as it:
        await act_on_running(it, first, second, a_first=a_first)
        await it.settle()
        assert it.endings == {b"A": ending}
        assert dict(it.core.roster.exits) == exits


@pytest.mark.parametrize(
    ("a_first", "ending", "exits"),
    [(True, CANCELLED, {"cancelled": 1}), (False, CANCELLED, {"crashed": 1})],
    ids=["A-first", "A-last"],
)
async def test_cancel_then_exit_of_a_running_job(
    a_first: bool,
    ending: Any,
    exits: dict[str, int],
    order: InOrder,
    watch: Watch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Cancelled, then the worker dies: Cancelled, whoever looks first; one worker is replaced (promises 2 and 4)."""
    async with scene(order, watch) as it:
        await act_on_running(it, "cancel", "exit", a_first=a_first)
        await it.settle()
        assert it.endings == {b"A": ending}
        assert dict(it.core.roster.exits) == exits


@pytest.mark.parametrize(("a_first", "ending"), [(True, CANCELLED), (False, WorkerCrashed)], ids=["A-first", "A-last"])
async def test_exit_then_cancel_of_a_running_job(
    a_first: bool, ending: Any, order: InOrder, watch: Watch, autojump_clock: trio.testing.MockClock
) -> None:
    """The worker dies, then a cancel: the crash if it is told before the caller looks, else Cancelled (promise 2)."""
    async with scene(order, watch) as it:
        await act_on_running(it, "exit", "cancel", a_first=a_first)
        await it.settle()
        assert it.endings == {b"A": ending}
        assert dict(it.core.roster.exits) == {"crashed": 1}


async def two_running(it: Scene) -> list[Worker]:
    """Let the jobs A and B run, and C and D wait; return A's worker and B's."""
    it.hold(b"A", b"B", b"C", b"D")
    for name in (b"A", b"B", b"C", b"D"):
        it.call(name)
        await it.settle()
    assert it.pool.statistics().waiting == 2
    holders = {seat.jobs[0].frames[0][-1:]: seat.worker for seat in it.core.roster.seats}
    return [holders[b"A"], holders[b"B"]]


@pytest.mark.parametrize("names", [(b"A", b"B"), (b"B", b"A")], ids=["A-first", "B-first"])
async def test_handover_then_handover(
    names: tuple[bytes, bytes], order: InOrder, watch: Watch, autojump_clock: trio.testing.MockClock
) -> None:
    """Two workers become free in one pass: the waiting jobs get them in their order (promise 9)."""
    async with scene(order, watch, num_workers=2) as it:
        workers = dict(zip((b"A", b"B"), await two_running(it), strict=True))
        first, second = names
        order.ranks = {it.tasks[first]: 10, it.tasks[second]: 20}
        watch.names = {it.tasks[name]: name.decode() for name in names}
        it.gates[b"A"].set()
        it.gates[b"B"].set()
        await trio.lowlevel.checkpoint()
        await it.let_happen(first.decode(), second.decode())
        assert [workers[name].seat.jobs[0].frames[0][-1:] for name in names] == [b"C", b"D"]
        await it.settle()
        assert it.endings == {b"A": "A", b"B": "B"}
        it.open_gates()
        await it.settle()
        assert it.endings == {b"A": "A", b"B": "B", b"C": "C", b"D": "D"}
        assert it.core.roster.exits == {}


async def test_exit_then_exit(order: InOrder, watch: Watch, autojump_clock: trio.testing.MockClock) -> None:
    """Two workers die in one pass: each fails its own job, and the waiting ones go to those that come (promise 5)."""
    async with scene(order, watch, num_workers=2) as it:
        one, other = await two_running(it)
        tasks = it.supervisor(one), it.supervisor(other)
        order.ranks = {tasks[0]: 10, tasks[1]: 20}
        watch.names = {tasks[0]: "one", tasks[1]: "other"}
        die(one)
        die(other)
        await it.let_happen("one", "other")
        await it.settle()
        it.open_gates()
        await it.settle()
        assert it.endings == {b"A": WorkerCrashed, b"B": WorkerCrashed, b"C": "C", b"D": "D"}
        assert it.core.roster.exits == {"crashed": 2}


async def test_cancel_then_cancel(order: InOrder, watch: Watch, autojump_clock: trio.testing.MockClock) -> None:
    """Two that wait are cancelled in one pass: both leave the queue, and no worker is touched (promise 4)."""
    async with scene(order, watch, num_workers=2) as it:
        await two_running(it)
        tasks = [await it.actor(it.scopes[name].cancel) for name in (b"C", b"D")]
        order.ranks = {tasks[0]: 10, tasks[1]: 20}
        watch.names = {tasks[0]: "C", tasks[1]: "D"}
        await it.let_happen("C", "D")
        await it.settle()
        it.open_gates()
        await it.settle()
        assert it.endings == {b"A": "A", b"B": "B", b"C": CANCELLED, b"D": CANCELLED}
        assert it.core.roster.exits == {}


async def test_deadline_then_deadline(order: InOrder, watch: Watch, autojump_clock: trio.testing.MockClock) -> None:
    """Two that wait run out of time in one pass: both get AllocateTimeout, and no worker is touched (promise 2)."""
    async with scene(order, watch, num_workers=2, allocate_timeout=5) as it:
        await two_running(it)
        await trio.sleep(5)
        await it.settle()
        assert it.endings == {b"C": AllocateTimeout, b"D": AllocateTimeout}
        it.open_gates()
        await it.settle()
        assert it.endings == {b"A": "A", b"B": "B", b"C": AllocateTimeout, b"D": AllocateTimeout}
        assert it.core.roster.exits == {}


@pytest.mark.parametrize("close_first", [True, False], ids=["close-then-abort", "abort-then-close"])
async def test_close_and_abort(
    close_first: bool, order: InOrder, watch: Watch, autojump_clock: trio.testing.MockClock
) -> None:
    """The block is left and its task cancelled in one pass: the cancel decides, at once (promise 1)."""
    async with scene(order, watch) as it:
        it.hold(b"A", b"B")
        it.call(b"A")
        await it.settle()
        it.call(b"B")
        await it.settle()
        cancel = await it.actor(it.owner_scope.cancel)
        order.ranks = {it.owner: 10, cancel: 20} if close_first else {cancel: 10, it.owner: 20}
        watch.names = {it.owner: "close", cancel: "abort"}
        it.leave.set()
        await it.let_happen(*(("close", "abort") if close_first else ("abort", "close")))
        await it.settle()
        assert it.endings == {b"A": CLOSED, b"B": CLOSED}
        assert it.core.roster.exits == {"closing": 1}
        assert it.runs == {b"A": 1}


@pytest.mark.parametrize(("b_first", "ending"), [(True, CANCELLED), (False, "B")], ids=["B-first", "B-last"])
async def test_handover_then_cancel_of_a_job_answered_at_once(
    b_first: bool, ending: Any, order: InOrder, watch: Watch, autojump_clock: trio.testing.MockClock
) -> None:
    """Given a worker, then cancelled, and the reply is there when its caller looks: the worker stays (promise 4)."""
    async with scene(order, watch) as it:
        (worker,) = it.pool.workers
        it.hold(b"A")
        for name in (b"A", b"B"):
            it.call(name)
            await it.settle()
        cancel = await it.actor(it.scopes[b"B"].cancel)
        order.ranks = {it.life(worker): 1, trio.lowlevel.current_task(): 2, it.tasks[b"A"]: 10, cancel: 20}
        order.ranks[it.tasks[b"B"]] = 0 if b_first else 99
        watch.names = {it.tasks[b"A"]: "handover", cancel: "cancel"}
        it.gates[b"A"].set()
        await trio.lowlevel.checkpoint()
        await it.let_happen("handover", "cancel")
        await it.settle()
        assert it.endings == {b"A": "A", b"B": ending}
        assert it.runs[b"B"] == 1
        assert it.core.roster.exits == {}
        assert it.pool.workers == (worker,)


@pytest.mark.parametrize("b_first", [True, False], ids=["B-first", "B-last"])
async def test_handover_then_death_with_the_job_unread(
    b_first: bool, order: InOrder, watch: Watch, autojump_clock: trio.testing.MockClock
) -> None:
    """A job written to a worker that dies before it reads it is handed on, and runs once (promise 3)."""
    async with scene(order, watch) as it:
        (worker,) = it.pool.workers
        it.hold(b"A")
        for name in (b"A", b"B"):
            it.call(name)
            await it.settle()
        death = await it.actor(lambda: die(worker))
        order.ranks = {it.life(worker): 1, trio.lowlevel.current_task(): 2, it.tasks[b"A"]: 10, death: 20}
        order.ranks[it.tasks[b"B"]] = 0 if b_first else 99
        watch.names = {it.tasks[b"A"]: "handover", death: "death"}
        it.gates[b"A"].set()
        await trio.lowlevel.checkpoint()
        await it.let_happen("handover", "death")
        await it.settle()
        assert it.endings == {b"A": "A", b"B": "B"}
        assert it.runs == {b"A": 1, b"B": 1}
        assert it.core.roster.exits == {"crashed": 1}


@pytest.mark.parametrize("cancel_first", [True, False], ids=["cancel-then-stop-request", "stop-request-then-cancel"])
async def test_stop_request_and_cancel(
    cancel_first: bool, order: InOrder, watch: Watch, autojump_clock: trio.testing.MockClock
) -> None:
    """The worker asks to be replaced while the job is cancelled: the job does not go on, who waits does (promise 4)."""
    async with scene(order, watch) as it:
        (worker,) = it.pool.workers
        it.hold(b"stop", b"B")
        for name in (b"stop", b"B"):
            it.call(name)
            await it.settle()
        cancel = await it.actor(it.scopes[b"stop"].cancel)
        life = it.life(worker)
        order.ranks = {cancel: 10, life: 20} if cancel_first else {life: 10, cancel: 20}
        watch.names = {cancel: "cancel", life: "stop request"}
        it.gates[b"stop"].set()
        await it.let_happen(*(("cancel", "stop request") if cancel_first else ("stop request", "cancel")))
        await it.settle()
        assert it.endings == {b"stop": CANCELLED}
        it.open_gates()
        await trio.sleep(1)  # past the back-off of a worker that had served nobody
        assert it.endings == {b"stop": CANCELLED, b"B": "B"}
        assert it.core.roster.exits == {"stop request": 1}
