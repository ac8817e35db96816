"""The roster under a hypothesis state machine: every call in every order, with no process and no trio.

The machine plays the pool, its workers and their jobs. It carries out what the roster returns as `PoolCore` does, keeps
books of its own (who waits in which order, what was begun where, which slot has to wait for how long), and holds the
roster to them after each call. Nothing is random but what hypothesis draws; the clock is a number.

`TRIO_WORKERS_ROSTER_MINUTES=30` (`nox -s roster`) goes on with fresh seeds for that long, and prints them.
"""

import functools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.roster_machines import MINUTES, SETTINGS, run_machine
from tests.roster_office import Onlooker
from trio_workers._config import Limits, Restart
from trio_workers._model import WorkerEvent
from trio_workers._roster import Roster
from trio_workers._seats import (
    ASSIGNED,
    DONE,
    GONE,
    SERVING,
    STANDBY,
    STARTING,
    STOPPING,
    WAITING,
    WRITTEN,
    Action,
    Actions,
    Begin,
    Drained,
    Emit,
    End,
    GiveUp,
    Job,
    Kill,
    Phase,
    Plan,
    Retire,
    Seat,
    Spawn,
    Wake,
)

T = TypeVar("T")


CREATED, DESTRUCT, ERROR = WorkerEvent.CREATED, WorkerEvent.DESTRUCT, WorkerEvent.ERROR
INITIAL, FACTOR, MAXIMUM, JITTER, STABLE = 0.1, 2.0, 0.3, 0.25, 10.0

# What a dead worker left of a job.
ANSWERED, UNSTARTED, BEGUN = "answered", "unstarted", "begun"
VERDICTS: Final = st.lists(st.sampled_from([ANSWERED, UNSTARTED, BEGUN]), min_size=4, max_size=4)
MOVES: Final = st.lists(st.sampled_from(["job", "reply", "boot", "job", "reply", "end"]), min_size=4, max_size=16)
LEASING: Final = st.lists(st.sampled_from(["lease", "inner", "reply", "boot", "leave", "job"]), min_size=4, max_size=16)
PICK: Final = st.integers(0, 7)


class Garbage(Exception):
    """What a relay raises that got nonsense."""


class Book:
    """What the machine knows of a seat's worker."""

    def __init__(self) -> None:
        self.events: list[WorkerEvent] = []
        self.boots = True  # the handshake may come
        self.leash = False  # a deadline runs
        self.retired = False
        self.killed = False
        self.stale: str | Garbage | None = None  # what the next write meets
        self.begun = 0
        self.served = 0
        self.worked = False
        self.ready_at: float | None = None


class Story:
    """What the machine knows of a job."""

    def __init__(self, slow: bool) -> None:
        self.slow = slow  # its task takes its time to write it
        self.started = 0  # workers that began it
        self.over: End | str | None = None
        self.wakes = 0


def trouble(possible: Callable[[Any], object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a rule that does harm: some machines get it at every step, others have time to work in between."""

    def mark(method: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(method)
        def harm(self: "RosterMachine", **drawn: Any) -> None:
            self.trouble_at = self.steps
            method(self, **drawn)

        return precondition(lambda self: self.steps - self.trouble_at >= self.calm and bool(possible(self)))(harm)

    return mark


class RosterMachine(Onlooker, RuleBasedStateMachine):
    """Drives one roster."""

    @initialize(
        size=st.integers(1, 4),
        capacity=st.integers(1, 4),
        latest_first=st.booleans(),
        limit=st.sampled_from([0, 1, 2, 5]),
        max_queue=st.sampled_from([None, 0, 2]),
        give_up_after=st.sampled_from([None, 1, 3]),
        seed=st.integers(0, 3),
        open_for=st.integers(0, SETTINGS.stateful_step_count),
        abort_after=st.integers(0, 2 * SETTINGS.stateful_step_count),
        calm=st.sampled_from([0, 1, 3, 8]),
        warm=st.booleans(),
    )
    def begin(
        self,
        size: int,
        capacity: int,
        latest_first: bool,
        limit: int,
        max_queue: int | None,
        give_up_after: int | None,
        seed: int,
        open_for: int,
        abort_after: int,
        calm: int,
        warm: bool,
    ) -> None:
        self.now = 1000.0
        self.capacity = capacity
        self.limit = limit
        self.max_queue = max_queue
        self.give_up_after = give_up_after
        self.open_for = open_for
        self.abort_after = abort_after
        self.calm = calm
        self.steps = 0
        self.trouble_at = -calm
        self.closed = 0
        self.lag = 0
        self.calls = 0
        self.books: dict[Seat, Book] = {}
        self.stories: dict[Job, Story] = {}
        self.live: list[Job] = []
        self.queue: list[Job] = []
        self.failures: Counter[int] = Counter()
        self.failed_at: dict[int, float] = {}
        self.in_a_row = 0
        self.gave_up = False
        self.drained = False
        self.wait: dict[int, tuple[float, float]] = {}
        self.at_once: deque[Action] = deque()
        self.emits: deque[Emit] = deque()
        self.ends: deque[Retire | Kill] = deque()
        self.carrying = False
        restart = Restart(
            initial=INITIAL,
            factor=FACTOR,
            maximum=MAXIMUM,
            jitter=JITTER,
            stable_after=STABLE,
            give_up_after=give_up_after,
        )
        self.roster = Roster(
            size,
            Plan(restart=restart, limits=Limits(jitter=0.0), max_executions=limit, max_queue=max_queue),
            clock=lambda: self.now,
            wall=lambda: self.now,
            capacity=capacity,
            latest_first=latest_first,
            rng=random.Random(seed),
        )
        self.tell(self.roster.open)
        assert [seat.slot for seat in self.roster.seats] == list(range(size))
        if warm:
            for seat in list(self.roster.seats):
                self.handshake(seat)

    # what the machine can see

    def has_room(self, seat: Seat) -> bool:
        return (
            seat.state is SERVING
            and seat.lease is None
            and not seat.leaving
            and len(seat.jobs) < self.capacity
            and not 0 < self.limit <= self.books[seat].begun
        )

    def pick(self, things: Sequence[T], number: int) -> T:
        return things[number % len(things)]

    # telling the roster, and what must hold after each call

    def tell(
        self,
        call: Callable[..., Actions],
        *args: Any,
        own: Job | None = None,
        handed: Iterable[Job] = (),
        new: Job | None = None,
        **kwargs: Any,
    ) -> None:
        """Call the roster, check what it did with every job and seat, and carry out what it returned.

        `own`: the job whose task calls. `new`: the one that is handed in. `handed`: those that may go on, in order.
        """
        self.calls += 1
        roster = self.roster
        before = {job: (job.state, job.seat, job.hand_ons) for job in self.live}
        was = roster.phase
        actions = call(*args, **kwargs)
        # A lease that nobody has entered goes on when its worker leaves the service, whatever the reason.
        handed = list(handed)
        for job, (state, seat, _) in before.items():
            if job.lease and state is ASSIGNED and not job.bound and job is not own and job not in handed:
                assert seat is not None
                if seat.state is not SERVING:
                    handed.append(job)
        expected = [job for job in handed if job.hand_ons > before[job][2]]
        expected += [job for job in self.queue if job is not own or job.state is WAITING]
        if new is not None and new.state is WAITING:
            expected.append(new)
        waiting = list(roster._waiting)
        woken = {action.job for action in actions if type(action) is Wake}
        begun = [action.job for action in actions if type(action) is Begin]
        if roster.phase is Phase.ABORTED:
            assert not waiting
            # None was begun that could have been left alone, and all the others know.
            for job in expected:
                assert job.state is DONE or job in begun
                assert job in woken or job in begun or was is Phase.ABORTED
                if job.state is DONE:
                    assert job.end is End.CLOSED
        else:
            # In the order in which they came, what was handed on before everything else.
            taken = len(expected) - len(waiting)
            assert expected[taken:] == waiting
            assert begun == expected[:taken]
        for job in begun:
            assert job.state is ASSIGNED
            self.note_assigned(job)
        if new is not None and new.state is ASSIGNED:
            assert not self.queue
            self.note_assigned(new)
        for job, (state, seat, hand_ons) in before.items():
            if (job.state, job.seat) != (state, seat) and job is not own:
                assert job in woken or job in begun, f"nobody told {job}"
            assert job.hand_ons <= hand_ons + 1
            assert job.hand_ons == hand_ons or job in handed
        self.queue = waiting
        for job in [job for job in self.live if job.state is DONE]:
            self.live.remove(job)
            self.stories[job].over = job.end or "ended"
        for action in actions:
            if type(action) is Spawn:
                self.note_spawned(action.seat)
        self.check()
        self.carry_out(actions)
        self.calls -= 1

    def note_assigned(self, job: Job) -> None:
        seat = job.seat
        assert seat is not None
        if job.lease:
            return
        book = self.books[seat]
        book.begun += 1
        if self.limit:
            assert book.begun <= self.limit, "one job more than max_executions"

    def note_spawned(self, seat: Seat) -> None:
        self.books[seat] = Book()
        earliest, _ = self.wait.pop(seat.slot, (0.0, 0.0))
        assert self.now >= earliest, "spawned before its back-off was over"

    def check(self) -> None:
        roster, now = self.roster, self.now
        seats = roster.seats
        # Seats and slots.
        assert len(seats) <= 2 * roster.target
        serving = [seat.slot for seat in seats if seat.state is SERVING]
        assert len(serving) == len(set(serving)) <= roster.target
        held = [seat.slot for seat in seats if not seat.vacant]
        assert len(held) == len(set(held))
        for seat in seats:
            book = self.books.get(seat)
            assert book is not None and seat.state is not GONE
            assert 0 <= seat.slot < roster.target
            assert len(seat.jobs) <= self.capacity
            assert seat.begun == book.begun and seat.served == book.served
            assert seat.announced is (book.ready_at is not None)
            if seat.state in (STARTING, STANDBY):
                assert not seat.jobs and seat.lease is None
            if seat.state is STANDBY:
                assert seat.slot in serving, "it stands by for nobody"
            if seat.lease is not None:
                assert seat.lease.seat is seat and seat.lease.lease
                assert all(job.bound for job in seat.jobs)
            if seat.state is SERVING and not seat.jobs:
                assert not seat.leaving, "it should have been stopped"
                assert seat.lease or not 0 < self.limit <= book.begun, "it should have been stopped"
            for job in seat.jobs:
                assert job.seat is seat and job.state in (ASSIGNED, WRITTEN)
        placed = [job for seat in seats for job in (*seat.jobs, seat.lease) if job is not None]
        assert len(placed) == len(set(placed)), "a job is in two places"
        assert {*placed, *self.queue} == set(self.live), "a job is nowhere"
        assert roster.failed_in_a_row == self.in_a_row
        # Nobody waits while there is room for him.
        room = [seat for seat in seats if self.has_room(seat)]
        assert set(roster._free) == set(room)
        assert roster.waiting == len(self.queue)
        assert all(job.state is WAITING and job.seat is None for job in self.queue)
        if self.queue and room:
            assert self.queue[0].lease and all(seat.jobs for seat in room), "it waits though there is room"
        # What is missing comes, or there is a reason.
        deadline = roster.next_deadline()
        if not self.is_open:  # who is to be replaced by plan, but can serve on, does
            held += [s.slot for s in seats if s.vacant and s.state is SERVING and not s.leaving and not s.spent]
        missing = [slot for slot in range(roster.target) if slot not in held]
        wanted = self.is_open or (roster.phase is Phase.CLOSING and self.queue)
        if wanted and len(seats) < 2 * roster.target:
            for slot in missing:
                assert slot in self.wait, f"nothing brings slot {slot} back"
                assert self.lag or now < self.wait[slot][1], f"slot {slot} is late"
            if missing:
                earliest, latest = (min(self.wait[slot][end] for slot in missing) for end in (0, 1))
                assert earliest <= deadline <= latest
        if not missing or len(seats) >= 2 * roster.target or not wanted:
            assert deadline == math.inf, "there is nothing to wake up for"
        # The end.
        if roster.phase is Phase.CLOSING:
            assert self.live, "there is nothing left to wait for"
            if self.queue:
                assert seats or deadline < math.inf, "nobody will ever do the jobs that wait"
        if roster.phase is Phase.ENDING:
            assert not self.live and all(seat.state is STOPPING for seat in seats)
        if roster.phase is Phase.ABORTED:
            assert not self.queue and all(seat.state is STOPPING for seat in seats)

    # carrying out, in the order of PoolCore._carry_out

    def carry_out(self, actions: Actions) -> None:
        for action in actions:
            if type(action) is Emit:
                self.emits.append(action)
            elif type(action) is Retire or type(action) is Kill:
                self.ends.append(action)
            else:
                self.at_once.append(action)
        if self.carrying:
            return
        self.carrying = True
        while self.at_once or self.emits or self.ends:
            if self.at_once:
                self.do(self.at_once.popleft())
            elif self.emits:
                self.observe(self.emits.popleft())
            else:
                self.end_worker(self.ends.popleft())
        self.carrying = False
        if self.roster.phase > Phase.CLOSING and not self.seats:
            assert self.drained, "the last worker is gone, and nobody was told"

    def do(self, action: Action) -> None:
        if type(action) is Begin:
            if action.job.state is ASSIGNED and not self.stories[action.job].slow:
                self.write(action.job)
        elif type(action) is Wake:
            self.stories[action.job].wakes += 1
        elif type(action) is GiveUp:
            self.gave_up = True
        elif type(action) is Drained:
            assert not self.seats and not self.live
            self.drained = True
        else:
            assert type(action) is Spawn

    def observe(self, emit: Emit) -> None:
        self.books[emit.seat].events.append(emit.event)

    def end_worker(self, action: Retire | Kill) -> None:
        seat, book = action.seat, self.books[action.seat]
        if type(action) is Retire:
            assert not seat.jobs and not book.retired and seat.planned and seat.vacant
            assert book.events[0] is CREATED and book.events[-1] is DESTRUCT
            book.retired = book.leash = True
        elif type(action) is Kill and action.grace:
            book.leash = True
        else:
            assert not seat.announced or book.leash or DESTRUCT in book.events, "killed before it was told"
            book.killed = True

    def write(self, job: Job) -> None:
        """Write a job that has a seat, as its own task or whoever took the reply before it."""
        seat, story = job.seat, self.stories[job]
        assert seat is not None
        if job.lease:
            job.bound = True  # it is entered
            return
        book = self.books[seat]
        if book.stale is None:
            assert not story.started, "begun twice"
            self.roster.written(job)
            assert job.state is WRITTEN
            return
        book.begun -= 1
        hand_ons = job.hand_ons
        self.tell(self.roster.refused, seat, job, book.stale, own=job, handed=[job])
        self.check_handed_on(job, hand_ons, End.CRASHED)
        assert seat.state in (STOPPING, GONE)

    def check_handed_on(self, job: Job, hand_ons: int, end: End) -> None:
        """See that a job which did not start went on, or had done so too often."""
        if self.roster.phase is Phase.ABORTED:
            assert job.state is not WAITING and (job.state is not DONE or job.end is End.CLOSED)
        elif job.bound or hand_ons == self.roster.target + 1:
            assert job.state is DONE and job.end is end
        else:
            assert job.hand_ons > hand_ons
            assert job.state is not DONE or job.hand_ons == self.roster.target + 1

    # the books on failures

    def has_served(self, seat: Seat) -> None:
        self.books[seat].served += 1
        self.has_helped(seat)

    def has_helped(self, seat: Seat) -> None:
        """The slot's failures are forgotten, unless they are those of this seat's successors."""
        ready_at = self.books[seat].ready_at
        if ready_at is not None and ready_at >= self.failed_at.get(seat.slot, 0.0):
            self.failures.pop(seat.slot, None)
        self.in_a_row = 0

    def has_failed(self, seat: Seat) -> None:
        """A worker has helped nobody: its slot waits, unless somebody else is there for it already."""
        book = self.books[seat]
        if book.ready_at is not None and self.now - book.ready_at >= STABLE:
            self.failures.pop(seat.slot, None)
            self.in_a_row = 0
        self.failures[seat.slot] += 1
        self.failed_at[seat.slot] = self.now
        if any(other.slot == seat.slot and not other.vacant for other in self.seats if other is not seat):
            return
        delay = min(INITIAL * FACTOR ** (self.failures[seat.slot] - 1), MAXIMUM)
        self.wait[seat.slot] = (self.now + delay * (1 - JITTER), self.now + delay * (1 + JITTER))

    # rules: jobs come and go

    def enter(self, job: Job, slow: bool, patient: bool) -> None:
        job.patient = patient
        self.stories[job] = Story(slow)
        self.live.append(job)
        room = [seat for seat in self.seats if self.has_room(seat) and not (job.lease and seat.jobs)]
        counted = sum(not other.patient for other in self.queue)
        self.tell(self.roster.submit, job, own=job, new=job)
        if self.roster.phase > Phase.OPEN:
            assert job.end is End.CLOSED
        elif not self.queue and room:
            assert job.state is ASSIGNED and job.seat in room
        elif self.max_queue is not None and not patient and counted >= self.max_queue:
            assert job.end is End.QUEUE_FULL
        else:
            assert job.state is WAITING
        if job.state is ASSIGNED and not slow:
            self.write(job)

    @rule(slow=st.booleans(), patient=st.booleans())
    def submit(self, slow: bool, patient: bool) -> None:
        self.enter(Job((b"",)), slow, patient)

    @precondition(lambda self: self.roster.phase < Phase.ENDING)
    @rule(moves=MOVES, number=PICK)
    def work(self, moves: list[str], number: int) -> None:
        """All goes well for a while."""
        for move in moves:
            if move == "job":
                self.enter(Job((b"",)), False, True)
            elif move == "reply" and (written := self.with_written()):
                self.answer(self.pick(written, number), number)
            elif move == "boot" and (starting := [seat for seat in self.seats_in(STARTING) if self.books[seat].boots]):
                self.handshake(self.pick(starting, number))
            elif move == "lease":
                self.enter(Job((), lease=True), False, True)
            elif move == "inner" and (leases := self.leases()):
                self.enter_inside(self.pick(leases, number), False)
            elif move == "leave" and (idle := [job for job in self.leases() if job.seat and not job.seat.jobs]):
                self.leave(self.pick(idle, number))
            elif move == "end" and (dying := self.seats_in(STOPPING)):
                self.exit(self.pick(dying, number))

    @rule(slow=st.booleans())
    def submit_lease(self, slow: bool) -> None:
        self.enter(Job((), lease=True), slow, False)

    @precondition(lambda self: any(job.state is ASSIGNED and not job.bound for job in self.live))
    @rule(number=PICK)
    def write_at_last(self, number: int) -> None:
        self.write(self.pick([job for job in self.live if job.state is ASSIGNED and not job.bound], number))

    @precondition(lambda self: self.with_written())
    @rule(number=PICK, which=st.integers(0, 3), dirt=st.sampled_from([None, None, None, Garbage()]))
    def reply(self, number: int, which: int, dirt: Garbage | None) -> None:
        self.answer(self.pick(self.with_written(), number), which, dirt)

    def answer(self, seat: Seat, which: int, dirt: Garbage | None = None) -> None:
        job = self.pick([job for job in seat.jobs if job.state is WRITTEN], which)
        self.stories[job].started += 1
        self.has_served(seat)
        self.tell(self.roster.replied, seat, job, dirt, own=job)
        assert job.state is DONE and job.end is None
        assert dirt is None or seat.state is STOPPING

    @rule(number=PICK, which=st.integers(0, 3), dirt=st.sampled_from([None, None, None, Garbage()]))
    @trouble(lambda self: self.with_written())
    def ask_for_a_stop(self, number: int, which: int, dirt: Garbage | None) -> None:
        seat = self.pick(self.with_written(), number)
        self.refuse(self.pick([job for job in seat.jobs if job.state is WRITTEN], which), dirt)

    @rule(number=PICK, which=st.integers(0, 3))
    @trouble(lambda self: self.with_written())
    def ask_again_and_again(self, number: int, which: int) -> None:
        """All workers ask to be replaced instead of running this one job."""
        seat = self.pick(self.with_written(), number)
        job = self.pick([job for job in seat.jobs if job.state is WRITTEN], which)
        for _ in range(self.roster.target + 2):
            if job.state is not WRITTEN:
                break
            self.refuse(job, None)
            for dying in self.seats_in(STOPPING):
                self.exit(dying)
            if self.now < self.roster.next_deadline() < math.inf:
                self.now = self.roster.next_deadline()
                self.lag = 0
                self.keep_house()
            for seat in self.seats_in(STARTING):
                if self.books[seat].boots:
                    self.handshake(seat)

    def refuse(self, job: Job, dirt: Garbage | None) -> None:
        seat = job.seat
        assert seat is not None
        book = self.books[seat]
        book.begun -= 1
        hand_ons, leased = job.hand_ons, seat.lease is not None
        if seat.state is SERVING and dirt is None and not book.served and not leased:
            self.has_failed(seat)
        self.tell(self.roster.stop_requested, seat, job, dirt, own=job, handed=[job])
        self.check_handed_on(job, hand_ons, End.RETIRED)
        assert seat.state is STOPPING or (seat.leaving and seat.jobs)

    @rule(number=PICK)
    @trouble(lambda self: self.live)
    def cancel(self, number: int) -> None:
        self.give_up_on(self.pick(self.live, number))

    @precondition(lambda self: self.queue)
    @rule()
    def wait_too_long(self) -> None:
        """`allocate_timeout` takes the one that has waited for longest."""
        self.give_up_on(self.queue[0])

    def give_up_on(self, job: Job) -> None:
        state, seat = job.state, job.seat
        if state is WRITTEN:
            assert seat is not None
            self.stories[job].started += 1
            self.books[seat].worked = True
        elif state is ASSIGNED and not job.lease:
            assert seat is not None
            self.books[seat].begun -= 1
        if job.lease and job.bound:
            self.leave(job)
            return
        self.tell(self.roster.cancelled, job, own=job)
        assert job.state is DONE and job.end is None
        if state is WRITTEN:
            assert seat is not None
            assert seat.state is STOPPING and self.books[seat].killed
        # Twice does nothing.
        assert not self.roster.cancelled(job)

    @precondition(lambda self: self.with_written())
    @rule(number=PICK, which=st.integers(0, 3))
    def leave_a_stream(self, number: int, which: int) -> None:
        """Nobody wants the rest of the reply: the pool reads it, and the job is not handed on any more."""
        seat = self.pick(self.with_written(), number)
        self.pick([job for job in seat.jobs if job.state is WRITTEN], which).bound = True

    @rule(number=PICK, mask=st.integers(1, 15))
    @trouble(lambda self: any(seat.lease is None for seat in self.with_written()))
    def give_back(self, number: int, mask: int) -> None:
        """The worker has not read some of its jobs, and they are taken from its relay."""
        seat = self.pick([seat for seat in self.with_written() if seat.lease is None], number)
        jobs = [job for index, job in enumerate(seat.jobs) if job.state is WRITTEN and mask >> index & 1]
        before = [job.hand_ons for job in jobs]
        self.books[seat].begun -= len(jobs)
        self.tell(self.roster.returned, seat, jobs, handed=jobs)
        for job, hand_ons in zip(jobs, before, strict=True):
            if hand_ons <= self.roster.target or job.bound:
                self.check_handed_on(job, hand_ons, End.CRASHED)
            else:  # no worker's doing: it goes on however often that happens
                assert job.hand_ons == hand_ons
                assert job.state is not DONE or self.roster.phase is Phase.ABORTED

    @precondition(lambda self: self.is_open)
    @rule(moves=LEASING, number=PICK)
    def work_in_leases(self, moves: list[str], number: int) -> None:
        self.work(moves, number)

    # rules: leases

    @precondition(lambda self: self.leases())
    @rule(number=PICK, slow=st.booleans())
    def lease_job(self, number: int, slow: bool) -> None:
        self.enter_inside(self.pick(self.leases(), number), slow)

    def enter_inside(self, lease: Job, slow: bool) -> None:
        """Hand a job in to a lease, as `PoolCore._check_held` lets it through: one at a time."""
        seat = lease.seat
        assert seat is not None
        if seat.jobs:
            return
        job = Job((b"",))
        self.stories[job] = Story(slow)
        self.live.append(job)
        serving = seat.state is SERVING
        if serving:
            self.books[seat].begun += 1
        self.tell(self.roster.submit_to, seat, job, own=job)
        assert job.bound
        assert job.state is (ASSIGNED if serving else DONE)
        if not serving:
            assert job.end is (End.CLOSED if seat.planned else End.CRASHED)
        elif not slow:
            self.write(job)

    @precondition(lambda self: self.leases())
    @rule(number=PICK)
    def release(self, number: int) -> None:
        self.leave(self.pick(self.leases(), number))

    def leave(self, job: Job) -> None:
        seat = job.seat
        assert seat is not None
        under_a_job, spent = bool(seat.jobs), 0 < self.limit <= seat.begun
        if seat.state is SERVING and not under_a_job:
            self.has_served(seat)
        self.tell(self.roster.released, job, own=job)
        assert job.state is DONE and seat.lease is not job
        assert not self.roster.released(job)
        if under_a_job or spent:
            assert seat.state is STOPPING

    # rules: the lives of workers

    def handshake(self, seat: Seat) -> None:
        book = self.books[seat]
        book.boots = False
        if seat.state is STARTING:
            book.ready_at = self.now
        self.tell(self.roster.ready, seat)

    @precondition(lambda self: any(book.boots for seat, book in self.books.items() if seat.state is not GONE))
    @rule(number=PICK)
    def ready(self, number: int) -> None:
        """Also of a worker that was killed meanwhile."""
        self.handshake(self.pick([seat for seat in self.seats if self.books[seat].boots], number))

    @rule(number=PICK)
    @trouble(lambda self: self.seats_in(STARTING))
    def fail_to_boot(self, number: int) -> None:
        self.exit(self.pick(self.seats_in(STARTING), number))

    @rule(number=PICK, times=st.integers(2, 4))
    @trouble(lambda self: self.seats_in(STARTING))
    def fail_to_boot_again(self, number: int, times: int) -> None:
        """Each time as soon as it is tried again."""
        slot = self.pick(self.seats_in(STARTING), number).slot
        for _ in range(times):
            for seat in self.seats_in(STARTING):
                if seat.slot == slot:
                    self.exit(seat)
            if self.roster.next_deadline() < math.inf:
                self.now = max(self.now, self.roster.next_deadline())
                self.lag = 0
                self.keep_house()

    @rule(number=PICK)
    @trouble(lambda self: self.seats_in(STARTING))
    def hang_at_boot(self, number: int) -> None:
        """It closed its relay before the handshake, and does not end: the deadline, then the kill."""
        seat = self.pick(self.seats_in(STARTING), number)
        self.books[seat].boots = False
        self.tell(self.roster.about_to_kill, seat)
        self.books[seat].killed = True

    @rule(number=PICK, verdicts=VERDICTS)
    @trouble(lambda self: self.seats_in(SERVING, STANDBY))
    def crash(self, number: int, verdicts: list[str]) -> None:
        self.exit(self.pick(self.seats_in(SERVING, STANDBY), number), verdicts)

    @precondition(lambda self: self.seats_in(STOPPING))
    @rule(number=PICK, verdicts=VERDICTS)
    def end(self, number: int, verdicts: list[str]) -> None:
        self.exit(self.pick(self.seats_in(STOPPING), number), verdicts)

    def exit(self, seat: Seat, verdicts: Sequence[str] = (UNSTARTED,) * 4) -> None:
        """The process is gone, by whatever way, and this is what it left."""
        book = self.books[seat]
        roster, aborted = self.roster, self.roster.phase is Phase.ABORTED
        jobs = list(seat.jobs)
        verdict = {job: UNSTARTED if job.state is ASSIGNED else what for job, what in zip(jobs, verdicts, strict=False)}
        hand_ons = {job: job.hand_ons for job in jobs}
        lease, planned = seat.lease, seat.planned
        answered = [job for job in jobs if verdict[job] == ANSWERED]
        unstarted = [job for job in jobs if verdict[job] == UNSTARTED]
        going_on = [] if aborted else [job for job in unstarted if not job.bound]
        for job in jobs:
            self.stories[job].started += verdict[job] != UNSTARTED
        for _ in answered:
            self.has_served(seat)
        book.begun -= len(going_on)
        if len(answered) + len(going_on) < len(jobs):
            book.worked = True
        early = book.ready_at is None
        if early:
            if not planned:
                self.in_a_row += 1
                self.has_failed(seat)
        elif not planned:
            if book.served or book.worked:
                self.has_helped(seat)
            else:
                self.has_failed(seat)
        give_up = not aborted and self.give_up_after is not None and self.in_a_row >= self.give_up_after
        if lease is not None and not lease.bound and not aborted:
            going_on.append(lease)
            hand_ons[lease] = lease.hand_ons
        self.tell(roster.exited, seat, "gone", answered, unstarted, handed=going_on)
        assert seat.state is GONE and not seat.jobs and seat.lease is None
        assert seat.begun == book.begun and seat.served == book.served
        assert self.gave_up is give_up or self.gave_up
        assert not give_up or roster.phase is Phase.ABORTED
        for job in jobs:
            if job in answered:
                assert job.state is DONE and job.end is None
            elif job in going_on:
                self.check_handed_on(job, hand_ons[job], End.CRASHED)
            else:
                assert job.state is DONE and job.end is (End.CLOSED if aborted else End.CRASHED)
        if lease is not None and lease in going_on:
            self.check_handed_on(lease, hand_ons[lease], End.CRASHED)
        elif lease is not None:
            assert lease.state is DONE and lease.end is (End.CLOSED if aborted else End.CRASHED)
        # What observers have seen of it.
        if planned:
            assert book.events == ([] if early else [CREATED, DESTRUCT])
        else:
            assert book.events == ([ERROR] if early else [CREATED, ERROR, DESTRUCT])
        del self.books[seat]

    @rule(number=PICK, why=st.sampled_from(["it closed its relay", Garbage()]))
    @trouble(lambda self: self.seats_in(SERVING))
    def line_goes_stale(self, number: int, why: str | Garbage) -> None:
        """Nobody looks at an idle worker's relay: the next write finds out."""
        self.books[self.pick(self.seats_in(SERVING), number)].stale = why

    @rule(number=PICK, garbage=st.booleans())
    @trouble(lambda self: any(seat.announced for seat in self.seats))
    def suspect(self, number: int, garbage: bool) -> None:
        seat = self.pick([seat for seat in self.seats if seat.announced], number)
        was = seat.state
        jobs = list(seat.jobs)
        self.tell(self.roster.suspect, seat, Garbage() if garbage else "it closed its relay", grace=not garbage)
        assert seat.state is STOPPING and list(seat.jobs) == jobs
        assert was is STOPPING or (self.books[seat].killed if garbage else self.books[seat].leash)

    @precondition(lambda self: any(self.books[seat].leash for seat in self.seats))
    @rule(number=PICK)
    def deadline(self, number: int) -> None:
        """The grace or `destroy_timeout` is over."""
        seat = self.pick([seat for seat in self.seats if self.books[seat].leash], number)
        book = self.books[seat]
        book.leash = False
        self.tell(self.roster.about_to_kill, seat)
        assert DESTRUCT in book.events
        book.killed = True

    @rule(number=PICK)
    @trouble(lambda self: self.seats)
    def stop_worker(self, number: int) -> None:
        seat = self.pick(self.seats, number)
        jobs = list(seat.jobs)
        self.tell(self.roster.retire, seat, "stopped")
        assert list(seat.jobs) == jobs
        assert seat.state is STOPPING or (seat.leaving and seat.jobs)
        assert not self.roster.retire(seat, "again")

    @rule(number=PICK)
    @trouble(lambda self: self.seats)
    def kill_worker(self, number: int) -> None:
        seat = self.pick(self.seats, number)
        self.tell(self.roster.kill, seat, "killed")
        assert seat.state is STOPPING and self.books[seat].killed

    # rules: the clock, and the end

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.3, 1.0, STABLE]), lag=st.booleans())
    def advance(self, seconds: float, lag: bool) -> None:
        """Time passes; the housekeeper (`keep_house`) wakes up now, or only after what comes next."""
        self.lag = 2 if lag else 0
        self.now += seconds

    @precondition(lambda self: self.now < self.roster.next_deadline() < math.inf)
    @rule()
    def advance_to_deadline(self) -> None:
        self.now = self.roster.next_deadline()

    @rule()
    def tick_early(self) -> None:
        """Waking up for nothing does nothing."""
        if self.now < self.roster.next_deadline():
            assert not self.roster.tick()

    @precondition(lambda self: self.steps >= self.open_for and self.closed < 2)
    @rule()
    def close(self) -> None:
        self.closed += 1
        busy, was = bool(self.live), self.roster.phase
        self.tell(self.roster.close)
        assert self.roster.phase is (Phase.CLOSING if busy else Phase.ENDING) or was > Phase.CLOSING

    @precondition(lambda self: self.steps >= self.abort_after and self.roster.phase < Phase.ABORTED)
    @rule()
    def abort(self) -> None:
        self.tell(self.roster.abort)
        assert self.roster.phase is Phase.ABORTED
        assert not self.queue and all(self.books[seat].killed for seat in self.seats)

    # what is done after each rule

    @invariant()
    def keep_house(self) -> None:
        """Wake up at the deadline, as the pool's housekeeper does: there is something to do then, once."""
        self.steps += 1
        if self.lag:
            self.lag -= 1
        if self.lag:
            return
        if self.roster.next_deadline() <= self.now:
            seats = len(self.seats)
            self.tell(self.roster.tick)
            assert len(self.seats) > seats, "the housekeeper spins"
            assert self.roster.next_deadline() > self.now, "the housekeeper spins"
            self.check()

    def teardown(self) -> None:
        """From wherever it is, the pool ends, and each of its jobs had one ending."""
        if not hasattr(self, "roster"):
            return
        if self.calls:
            return  # it has failed already
        self.lag = 0
        self.keep_house()
        if self.is_open:
            self.tell(self.roster.close)
        for _ in range(5000):
            if self.drained:
                break
            self.take_a_step_to_the_end()
        assert self.drained, "it never ends"
        assert not self.seats and not self.live and not self.queue and not self.books
        assert self.roster.phase > Phase.CLOSING
        for job, story in self.stories.items():
            assert job.state is DONE and story.over == (job.end or "ended")
            assert story.started <= 1, "run twice"
            assert job.hand_ons <= self.roster.target + 1
        assert self.roster.exits.total() == self.roster.starts.total()

    def take_a_step_to_the_end(self) -> None:
        if dying := self.seats_in(STOPPING):
            self.exit(dying[0])
        elif assigned := [job for job in self.live if job.state is ASSIGNED and not job.bound]:
            self.write(assigned[0])
        elif inner := [job for job in self.live if job.state is ASSIGNED and not job.lease]:
            self.write(inner[0])
        elif written := self.with_written():
            self.answer(written[0], 0)
        elif leases := self.leases():
            self.leave(leases[0])
        elif starting := self.seats_in(STARTING):
            if self.books[starting[0]].boots:
                self.handshake(starting[0])
            else:
                self.exit(starting[0])
        else:
            assert self.roster.next_deadline() < math.inf, "it never ends"
            self.now = max(self.now, self.roster.next_deadline())
            self.keep_house()


@pytest.mark.limit(MINUTES * 60 + 600)
def test_roster_machine() -> None:
    """In whatever order things happen, what `design.md` promises of the roster holds (promises 2, 3, 4, 5, 6, 9)."""
    run_machine(RosterMachine)
