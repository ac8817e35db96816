"""The pool's life without a process or a clock: `python -m tests.roster_life STEPS [SEED]`.

`Life` drives one `Roster` with all its calls. It plays the pool, which carries out what the roster returns in the order
of `PoolCore._carry_out`, its workers, their jobs and whoever asks for changes; every choice is made by a function it is
given, so a seeded `random.Random` drives it as well as hypothesis (`test_roster_life.py`). It keeps its own books, and
holds the roster to what `design.md` promises after each call, before what the call asked for is carried out.

The plain driver runs lives of some hundred events, one after the other. One that fails names its seed, and
`python -m tests.roster_life --seed SEED` lives it again and shows its last events.
"""

import math
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Protocol, TypeVar, cast

import attrs

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.roster_office import Onlooker
from trio_workers._config import Limits, Restart
from trio_workers._core import PoolCore
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
    Change,
    Drained,
    Emit,
    End,
    Excess,
    GiveUp,
    Job,
    Kill,
    Lend,
    Phase,
    Plan,
    Recall,
    Retire,
    Seat,
    Settled,
    Spawn,
    TakeBack,
    Wake,
    Watch,
)

T = TypeVar("T")

CREATED, DESTRUCT, ERROR = WorkerEvent.CREATED, WorkerEvent.DESTRUCT, WorkerEvent.ERROR

RELIEVED: Final = frozenset({"ttl", "idle_ttl", "max_memory", "reset"})
"""Why a worker goes that serves on until its successor is ready."""
PLANNED: Final = RELIEVED | {"resize", "shrink"}
"""Why a worker goes that costs the pool nothing it should have."""
SHRINK_WINDOW: Final = 60.0
LONGEST_GROW_AFTER: Final = 0.1
"""Seconds: what was armed under one plan stays so under the next."""
SOFT, HARD = 100, 200
"""Bytes: the bounds to a worker's memory."""
ANSWERED, UNSTARTED, BEGUN, ASKED = "answered", "unstarted", "begun", "asked to be stopped"
"""What a dead worker left of a job."""
CALM_ROUNDS: Final = 400
"""How many deadlines a pool may need to be whole again: as many as it has slots to back off, and then some."""


class Choose(Protocol):
    """Chooses one of several."""

    def __call__(self, options: Sequence[T], /) -> T: ...


class Garbage(Exception):
    """What a relay raises that got nonsense."""


class Book:
    """What is known of a seat's worker."""

    def __init__(self, number: int, call: int) -> None:
        self.number = number
        self.spawned_by = call
        self.events: list[WorkerEvent] = []
        self.boots = True  # the handshake may come
        self.leash = False  # a deadline runs
        self.retired = False
        self.killed = False
        self.stale: str | Garbage | None = None  # what the next write meets
        self.above = 0  # readings in a row above max_memory
        self.begun = 0
        self.idle_since = math.inf
        self.used = False  # with `debug`: it has had its job


class Story:
    """What is known of a job."""

    def __init__(self, call: int) -> None:
        self.handed_in_by = call
        self.started = 0  # workers that began it
        self.given_at = math.inf
        self.over: End | str | None = None


class Before:
    """What there was before a call."""

    def __init__(self, life: "Life", what: str) -> None:
        roster = life.roster
        self.what = what
        self.phase = roster.phase
        self.plan = roster.plan
        self.size = roster.size
        self.target = roster.target
        self.change = roster.change
        self.slots: set[int] = set() if roster.change is None else set(roster.change.slots)
        self.jobs = {job: (job.state, job.seat, job.hand_ons) for job in life.live}
        self.seats = {seat: (seat.state, seat.leaving, seat.relief, seat.due) for seat in roster.seats}
        self.rows = [list(seat.jobs) for seat in roster.seats if len(seat.jobs) > 1]
        self.serving = {seat.slot: seat for seat in roster.seats if seat.state is SERVING}
        self.starting = sum(seat.state is STARTING for seat in roster.seats)


class ChangeStory:
    """What is known of a change: what to go back to, and the slots that must have had a worker of the new plan."""

    def __init__(self, change: Change, before: Before) -> None:
        self.change = change
        self.plan = before.plan
        self.size = before.size
        self.target = before.target
        self.required: set[int] = set()
        self.came: set[int] = set()
        self.settled = False


class Life(Onlooker):
    """One pool's life. `choose` makes every choice; `step` lets something happen, until `over`."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.now: float = 1000.0
        self.log: deque[str] = deque(maxlen=60)
        self.lag = 0
        self.calls = 0
        self.depth = 0
        self.over = False
        self.menu = choose(MENUS)
        self.sound = False  # nothing that happened was wrong
        self.books: dict[Seat, Book] = {}
        self.stories: dict[Job, Story] = {}
        self.live: dict[Job, None] = {}
        self.queue: list[Job] = []
        self.coming_back: list[Job] = []  # from a worker that has not read them
        self.excused: set[int] = set()
        self.not_before: dict[int, float] = {}
        self.changes: dict[int, ChangeStory] = {}
        self.failed = False  # some worker has helped nobody
        self.hungry_since = math.inf
        self.longest_boot = 0.0
        self.of_one_plan = True
        self.nap = math.inf
        self.at_once: deque[Action] = deque()
        self.emits: deque[Action] = deque()
        self.ends: deque[Retire | Kill] = deque()
        self.carrying = False
        self.gave_up = False
        self.drained = False
        self.most = choose((2, 1, 3, 4, 4, 16))
        size = choose(range(1, self.most + 1)) if self.most < 16 else 16
        self.capacity = choose((1, 1, 2, 3))
        self.lends = self.capacity == 1 and choose((True, False))
        latest_first = choose((False, True))
        self.plan_number = 0
        plan = self.draw_plan(size)
        self.roster = Roster(
            size,
            plan,
            clock=lambda: self.now,
            wall=lambda: self.now,
            capacity=self.capacity,
            latest_first=latest_first,
            rng=random.Random(choose(range(8))),
        )
        self.shell = cast("Any", SimpleNamespace(roster=self.roster))
        self.note("%d seats of capacity %d, %s first: %s", size, self.capacity, latest_first, plan)
        self.tell(self.roster.open)
        if choose((True, False)):
            self.note("all are ready")
            for seat in list(self.seats):
                self.handshake(seat)
        self.sound = True

    def note(self, text: str, *args: object) -> None:
        self.log.append(f"{self.now - 1000:8.3f}  " + text % args)

    def draw_plan(self, size: int) -> Plan:
        choose = self.choose
        max_memory, hard_memory = choose(((None, None), (None, None), (SOFT, None), (None, HARD), (SOFT, HARD)))
        self.plan_number += 1
        return Plan(
            restart=Restart(
                initial=0.1,
                maximum=choose((0.4, 3.0)),
                jitter=choose((0.0, 0.25)),
                stable_after=choose((10.0, 1.0)),
                give_up_after=choose((None, None, None, 1, 3)),
            ),
            limits=Limits(
                ttl=choose((None, None, 0.5, 5.0)),
                idle_ttl=choose((None, None, 0.3, 2.0)),
                exec_ttl=choose((None, None, 0.2, 1.0)),
                max_memory=max_memory,
                hard_memory=hard_memory,
                jitter=choose((0.0, 0.1, 1.0)),
            ),
            max_executions=choose((0, 0, 1, 2, 5, 50)),
            max_queue=choose((None, None, None, 0, 2)),
            max_workers=choose((None, size, size + 1, size + 3)),
            grow_after=choose((0.1, 0.01)),
            allocate_timeout=choose((math.inf, 60.0, 0.3)),
            debug=choose((False, False, False, False, False, True)),
            read_ahead=choose((1, 2, 5)) if self.lends else 1,
            recalls=choose((True, False)) if self.lends else False,
            source=self.plan_number,
        )

    # what can be seen

    def has_room(self, seat: Seat) -> bool:
        return (
            seat.state is SERVING
            and seat.lease is None
            and not seat.leaving
            and not seat.plan.debug
            and len(seat.jobs) < self.capacity
            and not 0 < seat.limit <= self.books[seat].begun
        )

    def name(self, job: Job) -> str:
        return f"{'lease' if job.lease else 'job'} {job.label}"

    def show(self, seat: Seat) -> str:
        jobs = ", ".join(self.name(job) for job in (*seat.jobs, seat.lease) if job is not None)
        return f"worker {self.books[seat].number} (slot {seat.slot}, {seat.state.name}{', ' * bool(jobs)}{jobs})"

    # telling the roster, and what must hold after each call

    def tell(
        self, call: Callable[..., Any], *args: Any, own: Job | None = None, new: Job | None = None, **kwargs: Any
    ) -> None:
        """Call the roster, check what it did with every job and seat, and carry out what it returned.

        `own`: the job whose task calls. `new`: the one that is handed in.
        """
        roster = self.roster
        self.calls += 1
        self.depth += 1
        before = Before(self, call.__name__)
        result = call(*args, **kwargs)
        actions: Actions = result
        if before.what in ("reset", "resize"):
            change, actions = result
            self.note_change(before, change)
        self.note_spawns(before, actions)
        self.check_order(before, actions, own, new)
        self.check_lives(before)
        self.check_capacity(before)
        self.check_growth(before)
        self.check_relief(before)
        self.check_changes(before, actions)
        # The exchange carries nothing out where there is nothing to be done.
        if actions or before.what not in ("submit", "submit_to", "written", "replied", "stop_requested"):
            self.nap = roster.next_deadline()
        assert self.nap <= roster.next_deadline(), "the housekeeper sleeps for too long"
        self.check()
        self.carry_out(actions)
        self.depth -= 1
        if not self.depth:
            self.check()
            now = PoolCore.statistics(self.shell)
            assert len(roster.seats) == now.idle + now.busy + now.starting + now.leased + now.stopping

    def note_spawns(self, before: "Before", actions: Actions) -> None:
        """No worker is spawned too early, none of an old plan, and not too many."""
        roster = self.roster
        for action in actions:
            if type(action) is Settled and action.change.plan is roster.plan:
                self.not_before.clear()  # the delays are forgotten with the plan that is given up
            elif type(action) is Spawn:
                seat = action.seat
                self.books[seat] = Book(roster.starts.total(), self.calls)
                assert seat.state in (STARTING, STOPPING)
                assert seat.plan is roster.plan or seat.state is STOPPING, "a worker of an old plan"
                assert self.now >= self.not_before.pop(seat.slot, 0.0), "spawned before its back-off was over"
                if roster.plan.debug:
                    assert len(roster.seats) <= roster.target, "more processes than num_workers"
                else:
                    # The target may have been lowered after the spawn, in the same call.
                    assert any(
                        sum(other.slot < target for other in roster.seats) <= 2 * target
                        for target in (roster.target, before.target)
                    ), "more than twice as many workers"
        for slot in [slot for slot in self.not_before if slot >= roster.target]:
            del self.not_before[slot]

    def check_order(self, before: "Before", actions: Actions, own: Job | None, new: Job | None) -> None:
        """Each job is told what becomes of it; they begin in the order in which they came, hand-ons first."""
        roster = self.roster
        waiting = list(roster._waiting)
        begun = [action.job for action in actions if type(action) is Begin]
        told = {action.job for action in actions if type(action) is Wake}
        told.update(begun)
        if before.what == "replied" and own is not None and own.seat is not None:
            told.update(own.seat.jobs)  # woken by who told the outcome
        handed_on: set[Job] = set()
        for job, (state, seat, hand_ons) in before.jobs.items():
            if state is WAITING and job.state is WRITTEN:
                self.note_given(job)  # it lay in its worker's line, and its turn has come
            assert hand_ons <= job.hand_ons <= hand_ons + 1
            if job.hand_ons > hand_ons:
                assert not job.bound and state in (ASSIGNED, WRITTEN)
                assert job.hand_ons <= max(roster.target, before.target) + 1
                handed_on.add(job)
            elif before.what == "returned" and job in self.coming_back and job.state is not DONE:
                assert hand_ons > roster.target
                handed_on.add(job)
            if (job.state, job.seat) != (state, seat):
                assert job in told or job is own, f"nobody told {job}"
            if job.state is DONE:
                story = self.stories[job]
                assert story.over is None, "over twice"
                story.over = job.end or "ended"
                del self.live[job]
        if waiting != self.queue or begun:
            then = set(self.queue)
            order = [job for job in begun if job.seat is not None and not job.seat.plan.debug]
            order += [job for job in waiting if job.ahead is None]
            here = set(order)
            assert [job for job in order if job in then] == [job for job in self.queue if job in here], "out of turn"
            ranks = [0 if job in handed_on else 1 if job in then else 2 for job in order]
            for row in before.rows:
                back = [job for job in row if job in handed_on]
                assert [job for job in order if job in back] == [job for job in back if job in here], "out of turn"
            # Where the clock or a reading ends several workers in a row, jobs may begin in between.
            assert before.what in ("tick", "measured") or ranks == sorted(ranks), "who is handed on goes first"
            assert all(job is new for job, rank in zip(order, ranks, strict=True) if rank == 2)
        for job in begun:
            assert job.state is ASSIGNED and job.seat is not None
            assert job.seat.state is SERVING, "begun on a worker that is killed"
            assert not job.seat.plan.debug or before.what == "ready"
            self.note_given(job)
        if new is not None and new.state is ASSIGNED:
            assert all(job.ahead is not None for job in self.queue)
            self.note_given(new)
        if roster.phase is Phase.ABORTED and before.phase is not Phase.ABORTED:
            for job in self.queue:
                assert (job.state is DONE and job.end is not None) or job in begun or job.ahead is not None
        self.queue = waiting

    def note_given(self, job: Job) -> None:
        """A job has got a seat."""
        seat = job.seat
        assert seat is not None
        book, story = self.books[seat], self.stories[job]
        assert job.started == self.now
        story.given_at = self.now
        if seat.plan.debug:
            assert not book.used or job.bound, "a second job for a process of one"
            assert book.spawned_by > story.handed_in_by, "its process is older than the job"
            book.used = True
        if not job.lease:
            book.begun += 1
            if (most := seat.plan.max_executions) and not job.bound:
                assert seat.limit <= most
                assert book.begun <= most, "one job more than max_executions"

    def check_lives(self, before: "Before") -> None:
        """Whoever stops has a reason that fits what has happened."""
        what = before.what
        for seat, (state, leaving, _, due) in before.seats.items():
            if seat.state is not state and seat.state in (STOPPING, GONE) and state in (SERVING, STANDBY):
                assert seat.state is STOPPING or what == "exited"
                assert self.is_a_reason(seat, leaving, what), f"{seat} stops because of {seat.reason}"
                if state is SERVING and (seat.reason not in PLANNED or what in ("stop_requested", "refused")):
                    self.excused.add(seat.slot)
            if seat.due == "max_memory" and due != seat.due:
                assert what == "measured" and self.books[seat].above > 0, "it was above only once"
            if state is SERVING and seat.leaving in RELIEVED and not leaving:
                assert self.may_leave(seat), "it leaves before its successor is ready"
            if seat.leaving in ("resize", "shrink") and not leaving:
                assert seat.slot >= self.roster.target, "only the highest go"

    def is_a_reason(self, seat: Seat, leaving: str, what: str) -> bool:
        match seat.reason:
            case "max_executions":
                return 0 < seat.limit <= seat.begun
            case "debug":
                return seat.plan.debug
            case "closing":
                return self.roster.phase > Phase.CLOSING
            case "exec_ttl":
                return what == "tick" and isinstance(seat.fault, Excess) and seat.fault.job in seat.jobs
            case "hard_memory":
                return what == "measured" and isinstance(seat.fault, Excess)
            case "cancelled":
                return what == "cancelled"
            case "its lease ended under a job":
                return what in ("cancelled", "released")
            case "stop request" | "stopped":
                return bool(leaving) or what in ("stop_requested", "retire")
            case "killed":
                return what == "kill"
            case "broke the protocol" | "":  # the latter: it closed its relay, and may end by itself
                return what in ("suspect", "replied", "stop_requested", "refused")
            case "crashed":
                return what == "exited"
            case reason:
                return reason in PLANNED

    def may_leave(self, seat: Seat) -> bool:
        """Whether a worker that goes by plan has a successor that is ready."""
        if seat.plan.debug or self.roster.plan.debug:
            return True
        return any(
            other.slot == seat.slot and other is not seat and other.state in (STANDBY, SERVING) for other in self.seats
        )

    def check_capacity(self, before: "Before") -> None:
        """What is replaced by plan serves on until its successor is ready: no slot that was served is not.

        Excused are slots that lost their worker in another way, or which the target was below, until one serves again.
        """
        roster = self.roster
        if roster.plan.debug:
            self.excused.update(before.serving)
        elif roster.phase is Phase.OPEN:
            serving = {seat.slot for seat in self.seats if seat.state is SERVING}
            for slot, seat in before.serving.items():
                if slot < roster.target and slot not in serving and slot not in self.excused:
                    asked = seat.at_once or 0 < seat.limit <= seat.begun  # by the user, or by max_executions
                    assert asked or seat.plan.debug, f"planned work ({seat.reason}) has lowered capacity"
        for seat in roster.seats:
            if seat.slot >= roster.target:
                self.excused.add(seat.slot)
            elif seat.state is SERVING and not seat.leaving and not 0 < seat.limit <= seat.begun:
                self.excused.discard(seat.slot)

    def check_growth(self, before: "Before") -> None:
        """A pool grows by one, for jobs that wait, and no higher than it may."""
        roster = self.roster
        self.check_hunger(before)
        if roster.target <= before.target or before.what in ("reset", "resize") or roster.change is not before.change:
            return
        assert before.what == "tick"
        assert roster.phase is Phase.OPEN and not roster.plan.debug
        assert roster.target == before.target + 1
        assert roster.target <= max(roster.size, roster.plan.max_workers or 0)
        assert before.starting < len(self.queue), "more come up than can be of use"
        waits = [job.waited + self.now - job.queued for job in self.queue]
        assert max(waits) >= roster.plan.grow_after - 1e-9, "nobody has waited for so long"

    def check_hunger(self, before: "Before") -> None:
        """Where a worker more can be of help, it comes within the time of a boot."""
        roster, plan = self.roster, self.roster.plan
        starting = sum(seat.state is STARTING for seat in self.seats)
        hungry = (
            roster.phase is Phase.OPEN
            and roster.target == before.target < max(roster.size, plan.max_workers or 0)
            and starting < len(self.queue)
            and self.now - self.queue[0].queued + self.queue[0].waited >= plan.grow_after
            and plan is before.plan
            and not plan.debug
            and not self.failed
        )
        if not hungry:
            self.hungry_since = math.inf
        elif before.what == "tick":
            self.hungry_since = min(self.hungry_since, self.now)
            assert self.now - self.hungry_since <= self.longest_boot + 2 * LONGEST_GROW_AFTER, "it does not grow"

    def check_relief(self, before: "Before") -> None:
        """One at a time is relieved by plan, in a large pool a share."""
        fresh = [seat for seat, (_, _, relief, _) in before.seats.items() if seat.relief and not relief]
        if fresh:
            change = self.roster.change
            to_come = change.new_size if change is not None and change.sized else self.roster.target
            assert all(seat.slot < to_come for seat in fresh), "it goes anyway"
            assert not any(seat.due == "idle_ttl" and seat.jobs for seat in fresh), "it is not idle"
            under_way = sum(
                seat.relief and (seat.state is STOPPING or (seat.state is SERVING and not self.waits_for_a_try(seat)))
                for seat in self.seats
                if not (seat.leaving and seat.state is SERVING)
            )
            assert under_way <= max(1, self.roster.target // 8), "too many are relieved at a time"

    def note_change(self, before: "Before", change: Change) -> None:
        """A change has been asked for: which slots must have had a worker of the plan before it is done?"""
        roster = self.roster
        assert before.change is None or change is before.change, "the second joins the first"
        story = self.changes.setdefault(id(change), ChangeStory(change, before))
        if before.what == "reset":
            if roster.phase is Phase.OPEN and not roster.plan.debug and roster.change is not None:
                below = sum(seat.slot < roster.target for seat in self.seats)
                held = {seat.slot for seat in self.seats if not seat.vacant}
                assert below >= 2 * roster.target or held >= set(range(roster.target)), "a new plan need not wait"
            story.came.clear()
            story.required = set(range(change.new_size))
        else:
            first = story.size if story.plan is roster.plan else 0
            story.required |= set(range(first, change.new_size))
            story.required &= set(range(change.new_size))
        if roster.plan.debug:
            story.required.clear()
        story.came.update(
            seat.slot for seat in self.seats if seat.state in (SERVING, STANDBY) and seat.plan is roster.plan
        )

    def waits_for_a_try(self, seat: Seat) -> bool:
        """Whether the slot of a worker to be relieved has failed, and nobody comes up there."""
        coming = any(other.slot == seat.slot and other.state in (STARTING, STANDBY) for other in self.seats)
        return not coming and not self.roster._backoff.may_try(seat.slot, self.now)

    def check_changes(self, before: "Before", actions: Actions) -> None:
        """A change settles once: done, failed, or because the pool is closed."""
        roster = self.roster
        change = roster.change or before.change
        if change is not None:
            story = self.changes[id(change)]
            if before.what == "ready":
                story.came.update(seat.slot for seat in self.seats if seat.announced and seat.plan is roster.plan)
            for seat, (state, leaving, _, _) in before.seats.items():
                if (seat.leaving == "resize" and not leaving) or (seat.reason == "resize" and state is STARTING):
                    story.came.discard(seat.slot)
                    assert before.what in ("reset", "resize") or before.slots, "what has grown is thrown away again"
        settled = [action.change for action in actions if type(action) is Settled]
        assert len(settled) <= 1
        for change in settled:
            story = self.changes[id(change)]
            assert not story.settled, "settled twice"
            story.settled = True
            assert roster.change is None
            if change.closed:
                assert roster.phase is not Phase.OPEN and change.failed is None
            elif change.failed is not None:
                assert before.what == "exited" and change.failed.state is GONE and not change.failed.announced
                assert roster.plan is story.plan, "it does not go back to what was"
                assert (roster.size, roster.target) == (story.size, story.target)
                self.of_one_plan = False
                self.check_what_stays(before)
            else:
                assert all(seat.plan is roster.plan for seat in self.seats), "a worker of an old plan is there"
                assert all(seat.slot < roster.target for seat in self.seats)
                assert roster.size == change.new_size <= roster.target
                assert story.came >= story.required, "some never came"
                self.of_one_plan = True
        if not settled and before.change is not None:
            assert roster.change is before.change, "it ended without a word"

    def check_what_stays(self, before: "Before") -> None:
        """A change has failed: who was there before it stays."""
        roster = self.roster
        for seat, (state, _, _, _) in before.seats.items():
            if seat.plan is roster.plan and seat.slot < roster.target and not roster.plan.debug:
                if state is STARTING:
                    assert seat.state is not STOPPING, "it would have been as good as another"
                elif state is SERVING and not seat.due and not seat.at_once and not 0 < seat.limit <= seat.begun:
                    others = [other for other in self.seats if other.slot == seat.slot and other is not seat]
                    goes = seat.relief or seat.leaving in RELIEVED
                    assert not goes or any(not other.vacant for other in others), "the old stay"

    def check(self) -> None:
        """What holds at any moment."""
        self.check_seats()
        self.check_jobs()
        self.check_deadline()
        self.check_phase()

    def check_seats(self) -> None:
        """One serves in a slot, at most one is to come, and each is what it says."""
        roster = self.roster
        serving: set[int] = set()
        held: set[int] = set()
        for seat in roster.seats:
            state, vacant = seat.state, seat.vacant
            assert state is not GONE
            assert seat.slot >= 0 and len(seat.jobs) <= self.capacity
            assert seat.begun == self.books[seat].begun
            assert all(job.seat is seat and job.state in (ASSIGNED, WRITTEN) for job in seat.jobs)
            assert all(job.ahead is seat and job.state is WAITING for job in seat.ahead)
            assert len(seat.ahead) < max(2, 16 if seat.plan.recalls else seat.plan.read_ahead)
            assert not seat.ahead or not seat.limit or seat.begun + len(seat.ahead) <= seat.limit
            if state is SERVING:
                assert not seat.ahead or (len(seat.jobs) == 1 and seat.jobs[0].state is WRITTEN), "behind nothing"
                assert seat.slot not in serving, "two serve in one slot"
                serving.add(seat.slot)
                if seat.lease is not None:
                    assert seat.lease.seat is seat and seat.lease.lease
                    assert all(job.bound for job in seat.jobs)
                else:
                    idle = not seat.jobs
                    assert not idle or not (seat.leaving or seat.spent or seat.plan.debug), "it should have stopped"
                    assert vacant or not seat.spent or seat.plan.debug, "its successor should start"
            elif state is not STOPPING:
                assert not seat.jobs and not seat.ahead and seat.lease is None
            if state is not STOPPING:
                assert seat.leaving or seat.plan.debug or seat.slot < roster.target, "above the target"
                if (job := seat.reserved) is not None:
                    assert state is STARTING and job.state is WAITING and job.reserved is seat
            if not vacant:
                assert seat.slot not in held, "two workers for one slot"
                held.add(seat.slot)
        assert all(seat.slot in serving for seat in roster.seats if seat.state is STANDBY), "it stands by for nobody"

    def check_jobs(self) -> None:
        """Each job is in one place, and nobody waits while there is room."""
        roster, seats, queue = self.roster, self.seats, self.queue
        placed = [job for seat in seats for job in (*seat.jobs, seat.lease) if job is not None]
        assert len(placed) == len(set(placed)), "a job is in two places"
        assert self.live.keys() == {*placed, *queue} and len(placed) + len(queue) == len(self.live), "a job is nowhere"
        assert all(job.state is WAITING and job.seat is None for job in queue)
        lent = {job for seat in seats for job in seat.ahead}
        assert list(roster._queue) == [job for job in queue if job not in lent], "lent, and not lent"
        queue = [job for job in queue if job not in lent]
        room = [seat for seat in seats if self.has_room(seat)]
        assert set(roster._free) == set(room)
        if queue and room:
            assert queue[0].lease and all(seat.jobs for seat in room), "it waits though there is room"
        if roster.plan.debug:
            for job in queue:
                if (seat := job.reserved) is None:
                    assert len(seats) >= roster.target, "it waits though there is a place"
                else:
                    assert seat.reserved is job and seat.state in (STARTING, STOPPING)

    def check_deadline(self) -> None:
        """The clock is looked at no later than when something is due."""
        roster, now, plan = self.roster, self.now, self.roster.plan
        if roster.phase is Phase.ABORTED:
            return
        due = math.inf
        for seat in roster.seats:
            limits, book = seat.plan.limits, self.books[seat]
            if seat.state is SERVING and limits.exec_ttl is not None and seat.jobs:
                due = min(due, *(self.stories[job].given_at + limits.exec_ttl for job in seat.jobs))
            if seat.state in (SERVING, STANDBY) and limits.ttl is not None and not seat.due:
                assert seat.ready_at is not None and seat.expires_at <= seat.ready_at + limits.ttl
                due = min(due, seat.expires_at)
            idle = bool(seat.begun) and not seat.jobs and self.has_room(seat)
            book.idle_since = min(book.idle_since, now) if idle else math.inf
            if limits.idle_ttl is not None and not seat.due and roster.target == roster.size:
                due = min(due, book.idle_since + limits.idle_ttl)
        if roster.phase is Phase.OPEN and not plan.debug:
            held = {seat.slot for seat in roster.seats if not seat.vacant}
            below = sum(seat.slot < roster.target for seat in roster.seats)
            if below < 2 * roster.target and not held.issuperset(range(roster.target)):
                due = min(due, now + plan.restart.maximum * (1 + plan.restart.jitter))
            if self.queue and roster.target < max(roster.size, plan.max_workers or 0):
                due = min(due, now + LONGEST_GROW_AFTER)
            if roster.target > roster.size and roster.change is None:
                due = min(due, now + SHRINK_WINDOW)
        assert roster.next_deadline() <= due, "what is due will be missed"

    def check_phase(self) -> None:
        """A change is under way while there is reason for it, and the end has its order."""
        roster = self.roster
        if (change := roster.change) is not None:
            assert roster.phase is Phase.OPEN
            assert change.slots or any(
                seat.plan is not roster.plan or seat.slot >= roster.target for seat in self.seats
            ), "it is done"
        elif roster.phase is Phase.OPEN:
            assert roster.target >= roster.size
            old = [seat for seat in self.seats if seat.plan is not roster.plan]
            assert not (old and self.of_one_plan), "a worker of an old plan is there"
            assert all(seat.state in (SERVING, STOPPING) for seat in old), "of a plan that has failed"
            self.of_one_plan = not old
        limit = roster.plan.restart.give_up_after
        assert limit is None or roster.failed_in_a_row < limit or roster.phase is Phase.ABORTED, "it should give up"
        if roster.phase is Phase.CLOSING:
            assert self.live, "there is nothing left to wait for"
            if self.queue:
                assert self.seats or roster.next_deadline() < math.inf, "nobody will ever do the jobs that wait"
        if roster.phase > Phase.CLOSING:
            assert all(job.ahead is not None for job in self.queue)  # their worker is being killed
            assert all(seat.state is STOPPING for seat in self.seats)

    # carrying out, in the order of PoolCore._carry_out

    def carry_out(self, actions: Actions) -> None:
        for action in actions:
            if type(action) is Emit or type(action) is GiveUp:
                self.emits.append(action)
            elif type(action) is Retire or type(action) is Kill:
                self.ends.append(action)
            elif type(action) is not Watch:
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
        if actions:
            self.nap = self.roster.next_deadline()
        if self.roster.phase > Phase.CLOSING and not self.seats:
            assert self.drained, "the last worker is gone, and nobody was told"

    def do(self, action: Action) -> None:
        if type(action) is Lend:
            while (job := self.roster.lend()) is not None:
                assert job.ahead is not None
                if self.choose((False, False, False, False, False, True)):
                    self.tell(self.roster.taken_back, job.ahead, [job])  # the line is full
        elif type(action) is TakeBack or type(action) is Recall:
            self.take_back(action.seat)
        elif type(action) is Begin:
            if action.job.state is ASSIGNED and not action.job.lease:
                self.write(action.job)
        elif type(action) is Drained:
            assert not self.seats and not self.live
            self.drained = True

    def observe(self, action: Action) -> None:
        if type(action) is GiveUp:
            assert not self.gave_up
            self.gave_up = True
            limit = self.roster.plan.restart.give_up_after
            assert limit is not None and self.roster.failed_in_a_row >= limit
            assert self.roster.phase is Phase.ABORTED
            self.tell(self.roster.abort)
            return
        assert type(action) is Emit
        events = self.books[action.seat].events
        if action.event is CREATED:
            assert not events
        elif action.event is DESTRUCT:
            assert events[0] is CREATED and DESTRUCT not in events
        else:
            assert ERROR not in events and DESTRUCT not in events
        events.append(action.event)

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

    # jobs ahead of their turn

    def take_back(self, seat: Seat) -> None:
        """Take back what the worker has not read; of the others all but the last have been answered."""
        if not seat.plan.recalls or not seat.ahead:
            return
        unread = self.choose((0, 1, len(seat.ahead), len(seat.ahead)))
        back = list(seat.ahead)[len(seat.ahead) - unread :] if unread else []
        self.tell(self.roster.taken_back, seat, back)

    def withdraw(self, job: Job) -> None:
        """As the exchange does: take back, and where the worker has it already, see what was answered before it."""
        seat = job.ahead
        assert seat is not None
        self.take_back(seat)
        while job.ahead is seat and seat.plan.recalls and seat.jobs and seat.state is SERVING:
            self.answer(seat.jobs[0])

    def runs_on(self, job: Job) -> bool:
        """Whether a job whose caller has gone is left to its worker, for others' sake."""
        if job.ahead is not None:
            self.withdraw(job)
        seat = job.seat
        if job.state is WRITTEN and seat is not None and seat.ahead:
            self.take_back(seat)
            if seat.plan.recalls and seat.ahead:
                self.answer(job)  # the next one has been read, so the answer is there
        if job.ahead is None and (job.state is not WRITTEN or seat is None or not seat.ahead or job.bound):
            return False
        job.bound = True
        return True

    # jobs

    def write(self, job: Job) -> None:
        """Write a job that has a seat, as its own task or whoever took the reply before it."""
        seat, story = job.seat, self.stories[job]
        assert seat is not None
        if job.lease:
            job.bound = True  # it is entered
            return
        stale = self.books[seat].stale
        if stale is None:
            assert not story.started, "begun twice"
            self.tell(self.roster.written, job, own=job)
            return
        self.books[seat].begun -= 1
        self.tell(self.roster.refused, seat, job, stale)
        assert seat.state in (STOPPING, GONE)

    def enter(self, job: Job, slow: bool) -> None:
        roster = self.roster
        self.stories[job] = Story(self.calls)
        self.live[job] = None
        room = [seat for seat in self.seats if self.has_room(seat) and not (job.lease and seat.jobs)]
        bound = roster.plan.max_queue
        place = roster.plan.debug and len(self.seats) < roster.target
        counted = sum(not other.patient and other.reserved is None for other in self.queue)
        waited = len(roster._queue)
        self.tell(roster.submit, job, own=job, new=job)
        if roster.phase > Phase.OPEN:
            assert job.end is End.CLOSED
        elif not waited and room:
            assert job.seat in room
        elif bound is not None and not job.patient and counted >= bound and not place:
            assert job.end is End.QUEUE_FULL
        else:
            assert job.state is WAITING
        if job.state is ASSIGNED and not slow:
            self.write(job)

    def answer(self, job: Job, dirt: Garbage | None = None) -> None:
        seat = job.seat
        assert seat is not None
        self.begin_for_good(job)
        self.tell(self.roster.replied, seat, job, dirt, own=job)
        assert job.state is DONE and job.end is None
        assert dirt is None or seat.state is STOPPING

    def begin_for_good(self, job: Job) -> None:
        story = self.stories[job]
        story.started += 1
        assert story.started == 1, "begun twice"

    def give_up_on(self, job: Job) -> None:
        if job.lease and job.bound:
            self.leave(job)
            return
        if self.runs_on(job) or job.state is DONE:
            return
        state, seat = job.state, job.seat
        if state is WRITTEN:
            self.begin_for_good(job)
        elif state is ASSIGNED and not job.lease:
            assert seat is not None
            self.books[seat].begun -= 1
        reserved = job.reserved
        self.tell(self.roster.cancelled, job, own=job)
        assert job.state is DONE and job.end is None
        if state is WRITTEN:
            assert seat is not None and seat.state is STOPPING and self.books[seat].killed
        if reserved is not None:
            assert reserved.state is STOPPING
        assert not self.roster.cancelled(job)

    def leave(self, job: Job) -> None:
        seat = job.seat
        assert seat is not None
        must_end = bool(seat.jobs) or 0 < seat.limit <= seat.begun
        self.tell(self.roster.released, job, own=job)
        assert job.state is DONE and seat.lease is not job
        assert not self.roster.released(job)
        if must_end:
            assert seat.state in (STOPPING, GONE)

    def ask_for_stop(self, job: Job, dirt: Garbage | None = None) -> None:
        seat = job.seat
        assert seat is not None
        self.failed = True
        self.books[seat].begun -= 1
        self.tell(self.roster.stop_requested, seat, job, dirt, own=job)
        assert seat.state in (STOPPING, GONE) or (seat.leaving and seat.jobs)

    # workers

    def handshake(self, seat: Seat) -> None:
        self.books[seat].boots = False
        self.longest_boot = max(self.longest_boot, self.now - seat.spawned_at)
        self.tell(self.roster.ready, seat)

    def exit(self, seat: Seat, verdicts: Sequence[str] = ()) -> None:
        """The process is gone, by whatever way, and this is what it left."""
        book, roster = self.books[seat], self.roster
        early, was_planned = not seat.announced, seat.planned
        self.take_back(seat)
        jobs = list(seat.jobs)
        lent = list(seat.ahead)
        answered: list[Job] = []
        unstarted: list[Job] = []
        verdict = list(verdicts) + [UNSTARTED] * len(jobs)
        for job, what in zip(jobs, verdict, strict=False):
            if job.state is ASSIGNED or what == UNSTARTED:
                unstarted.append(job)
            elif lent and seat.plan.recalls:
                self.begin_for_good(job)
                answered.append(job)
            elif what == ASKED and job is jobs[0]:
                self.ask_for_stop(job)
            else:
                self.begin_for_good(job)
                if what == ANSWERED:
                    answered.append(job)
        self.judge_lent(seat, lent, answered, unstarted)
        in_change = roster.change is not None and seat.slot in roster.change.slots
        delayed = early and not was_planned and seat.plan is roster.plan and not in_change and not roster.plan.debug
        if delayed and not any(o.slot == seat.slot and not o.vacant for o in self.seats if o is not seat):
            restart = roster.plan.restart
            self.not_before[seat.slot] = self.now + restart.initial * (1 - restart.jitter)
        in_a_row = roster.failed_in_a_row
        self.failed = self.failed or not was_planned
        back = sum(not job.bound for job in unstarted if job.ahead is None)
        book.begun -= back if roster.phase is not Phase.ABORTED else 0
        book.begun += sum(
            job not in unstarted or job.bound or roster.phase is Phase.ABORTED for job in lent if job.ahead is seat
        )
        self.tell(roster.exited, seat, "gone", answered, unstarted)
        assert seat.state is GONE and not seat.jobs and seat.lease is None
        assert seat.begun == book.begun
        assert roster.failed_in_a_row <= in_a_row or delayed, "no boot of the plan has failed"
        for job in answered:
            assert job.state is DONE and job.end is None
        if early:
            assert book.events == [] if was_planned else [ERROR]
        else:
            assert [event for event in book.events if event is not ERROR] == [CREATED, DESTRUCT]
        del self.books[seat]

    def judge_lent(self, seat: Seat, lent: list[Job], answered: list[Job], unstarted: list[Job]) -> None:
        """Choose what a dead worker left of the jobs that lay in its line: some answered, some read, some unread."""
        if seat.plan.recalls:
            unread = len(lent)  # by what was taken back, all that are left have been read
            done = self.choose((len(lent), len(lent) - 1)) if lent else 0
        else:
            unread = self.choose(range(len(lent) + 1))
            heads_done = all(job in answered for job in seat.jobs)
            done = self.choose(range(unread + 1)) if heads_done else 0
        for place, job in enumerate(lent):
            if place >= unread:
                unstarted.append(job)
                continue
            self.begin_for_good(job)
            if place < done:
                answered.append(job)

    # what may happen: each returns whether it could

    def submit(self) -> bool:
        kind = self.choose(("job", "job", "job", "lease"))
        slow, patient = self.choose((False, False, False, True)), self.choose((True, False))
        job = Job((b"",), str(len(self.stories)), lease=kind == "lease")
        job.patient = patient
        self.note("submit %s%s%s", self.name(job), ", slow" if slow else "", ", patient" if patient else "")
        self.enter(job, slow)
        return True

    def submit_many(self) -> bool:
        count = self.choose((2, 4, 8))
        self.note("submit %d jobs", count)
        for _ in range(count):
            job = Job((b"",), str(len(self.stories)))
            job.patient = True
            self.enter(job, False)
        return True

    def write_at_last(self) -> bool:
        jobs = [job for job in self.live if job.state is ASSIGNED and not (job.lease and job.bound)]
        if not jobs:
            return False
        job = self.choose(jobs)
        self.note("write %s", self.name(job))
        self.write(job)
        return True

    def pick_written(self) -> Job | None:
        jobs = [job for seat in self.seats for job in seat.jobs if job.state is WRITTEN]
        return self.choose(jobs) if jobs else None

    def reply(self) -> bool:
        job = self.pick_written()
        if job is None:
            return False
        self.note("reply %s", self.name(job))
        self.answer(job)
        return True

    def reply_all(self) -> bool:
        jobs = [job for seat in self.seats for job in seat.jobs if job.state is WRITTEN]
        self.note("reply to all %d", len(jobs))
        for job in jobs:
            if job.state is WRITTEN:
                self.answer(job)
        return bool(jobs)

    def reply_dirty(self) -> bool:
        job = self.pick_written()
        if job is None:
            return False
        self.note("reply %s, dirty", self.name(job))
        self.answer(job, Garbage())
        return True

    def stop_request(self) -> bool:
        job = self.pick_written()
        if job is None:
            return False
        dirt = self.choose((None, None, None, Garbage()))
        self.note("stop request instead of %s%s", self.name(job), ", dirty" if dirt else "")
        self.ask_for_stop(job, dirt)
        return True

    def go_stale(self) -> bool:
        seats = self.seats_in(SERVING)
        if not seats:
            return False
        seat = self.choose(seats)
        self.note("%s will refuse", self.show(seat))
        stale: tuple[str | Garbage, ...] = ("it closed its relay", Garbage())
        self.books[seat].stale = self.choose(stale)
        return True

    def cancel(self) -> bool:
        if not self.live:
            return False
        job = self.choose(list(self.live))
        self.note("cancel %s: %s", self.name(job), job.state.value)
        self.give_up_on(job)
        return True

    def leave_stream(self) -> bool:
        job = self.pick_written()
        if job is None:
            return False
        self.note("leave the stream of %s", self.name(job))
        job.bound = True
        return True

    def give_back(self) -> bool:
        seats = [seat for seat in self.with_written() if seat.lease is None]
        if not seats:
            return False
        seat = self.choose(seats)
        jobs = [job for job in seat.jobs if job.state is WRITTEN]
        jobs = jobs[self.choose(range(len(jobs))) :]
        self.note("%s gives back %s", self.show(seat), [self.name(job) for job in jobs])
        self.books[seat].begun -= len(jobs)
        self.coming_back = jobs
        self.tell(self.roster.returned, seat, jobs)
        self.coming_back = []
        return True

    def work_inside(self) -> bool:
        leases = [job for job in self.leases() if job.seat is not None and not job.seat.jobs]
        if not leases:
            return False
        lease = self.choose(leases)
        seat = lease.seat
        assert seat is not None
        job, serving = Job((b"",), str(len(self.stories))), seat.state is SERVING
        slow = self.choose((False, False, True))
        self.note("%s inside %s", self.name(job), self.name(lease))
        self.stories[job] = Story(self.calls)
        self.stories[job].given_at = self.now
        self.live[job] = None
        if serving:
            self.books[seat].begun += 1
        self.tell(self.roster.submit_to, seat, job, own=job)
        assert job.bound
        assert job.state is (ASSIGNED if serving else DONE)
        if serving and not slow:
            self.write(job)
        return True

    def release(self) -> bool:
        leases = self.leases()
        if not leases:
            return False
        lease = self.choose(leases)
        self.note("release %s", self.name(lease))
        self.leave(lease)
        return True

    def boot(self) -> bool:
        seats = [seat for seat in self.seats if self.books[seat].boots and seat.state in (STARTING, STOPPING)]
        if not seats:
            return False
        seat = self.choose(seats)
        self.note("ready %s", self.show(seat))
        self.handshake(seat)
        return True

    def fail_boot(self) -> bool:
        seats = self.seats_in(STARTING)
        if not seats:
            return False
        seat = self.choose(seats)
        self.note("fails to boot %s", self.show(seat))
        self.exit(seat)
        return True

    def hang_boot(self) -> bool:
        seats = self.seats_in(STARTING)
        if not seats:
            return False
        seat = self.choose(seats)
        self.note("hangs at boot %s", self.show(seat))
        self.books[seat].boots = False
        self.tell(self.roster.about_to_kill, seat)
        self.books[seat].killed = True
        return True

    def verdicts(self) -> list[str]:
        return [self.choose((UNSTARTED, BEGUN, ANSWERED, ASKED)) for _ in range(self.capacity)]

    def crash(self) -> bool:
        seats = self.seats_in(SERVING, STANDBY)
        if not seats:
            return False
        seat, verdicts = self.choose(seats), self.verdicts()
        self.note("crash %s: %s", self.show(seat), verdicts)
        self.exit(seat, verdicts)
        return True

    def end(self) -> bool:
        seats = self.seats_in(STOPPING)
        if not seats:
            return False
        seat, verdicts = self.choose(seats), self.verdicts()
        self.note("exit %s: %s", self.show(seat), verdicts)
        self.exit(seat, verdicts)
        return True

    def suspect(self) -> bool:
        seats = [seat for seat in self.seats if seat.announced]
        if not seats:
            return False
        seat, garbage = self.choose(seats), self.choose((True, False))
        self.note("suspect %s%s", self.show(seat), ", garbage" if garbage else "")
        self.tell(self.roster.suspect, seat, Garbage() if garbage else "it closed its relay", grace=not garbage)
        assert seat.state is STOPPING
        return True

    def deadline(self) -> bool:
        seats = [seat for seat in self.seats if self.books[seat].leash]
        if not seats:
            return False
        seat = self.choose(seats)
        self.note("the leash ends of %s", self.show(seat))
        book = self.books[seat]
        book.leash = False
        self.tell(self.roster.about_to_kill, seat)
        assert DESTRUCT in book.events
        book.killed = True
        return True

    def stop_worker(self) -> bool:
        if not self.seats:
            return False
        seat = self.choose(self.seats)
        self.note("stop %s", self.show(seat))
        self.tell(self.roster.retire, seat, "stopped" if seat.state is not STARTING else "killed")
        assert seat.state in (STOPPING, GONE) or (seat.leaving and seat.jobs)
        return True

    def kill_worker(self) -> bool:
        if not self.seats:
            return False
        seat = self.choose(self.seats)
        self.note("kill %s", self.show(seat))
        self.tell(self.roster.kill, seat, "killed")
        assert seat.state is STOPPING and self.books[seat].killed
        return True

    def measure(self) -> bool:
        seats = [seat for seat in self.seats if seat.announced and seat.plan.limits.bounds_memory]
        if not seats:
            return False
        figures = self.choose(((10,), (10, SOFT + 1), (SOFT + 1,), (10, SOFT + 1, HARD + 1)))
        memory = {seat: self.choose(figures) for seat in seats}
        times = self.choose((1, 2))
        self.note("memory %s, %d times", {self.show(seat): figure for seat, figure in memory.items()}, times)
        for _ in range(times):
            serving = [seat for seat in memory if seat.state in (SERVING, STANDBY)]
            begun = {seat for seat in serving if seat.begun}
            self.tell(self.roster.measured, {seat: figure for seat, figure in memory.items() if seat in self.books})
            for seat in serving:
                book, soft, hard = self.books[seat], seat.plan.limits.max_memory, seat.plan.limits.hard_memory
                book.above = book.above + 1 if soft is not None and memory[seat] > soft else 0
                if book.above >= 2 and seat in begun:
                    assert seat.due or seat.state is STOPPING, "two readings in a row"
                if hard is not None and memory[seat] > hard:
                    assert seat.state is STOPPING and self.books[seat].killed
        return True

    def reset(self) -> bool:
        if not self.is_open:
            return False
        size = self.choose((None, None, self.choose(range(1, self.most + 1))))
        if self.choose((True, False)):
            plan = attrs.evolve(self.roster.plan)
            self.note("reset, size %s", size)
        else:
            plan = self.draw_plan(self.roster.size if size is None else size)
            self.note("reset, size %s: %s", size, plan)
        self.of_one_plan = False
        self.not_before.clear()
        self.tell(self.roster.reset, plan, size)
        assert self.roster.plan is plan or self.roster.change is None
        return True

    def resize(self) -> bool:
        if not self.is_open:
            return False
        size = self.choose(range(1, self.most + 2))
        self.note("resize to %d", size)
        self.not_before.clear()
        self.tell(self.roster.resize, size)
        return True

    def advance(self) -> bool:
        seconds = self.choose((0.01, 0.1, 0.2, 0.5, 1.0, 5.0, 60.0))
        self.lag = self.choose((0, 0, 2))
        self.now += seconds
        self.note("%g s pass%s", seconds, ", and nobody looks" if self.lag else "")
        return True

    def advance_to_deadline(self) -> bool:
        if not self.now < self.roster.next_deadline() < math.inf:
            return False
        self.now = self.roster.next_deadline()
        self.note("the deadline")
        return True

    def tick_early(self) -> bool:
        if self.now >= self.roster.next_deadline():
            return False
        self.note("tick early")
        self.tick(early=True)
        return True

    def rest(self) -> bool:
        self.note("all goes well for a while")
        self.play_nicely()
        return True

    def nothing_boots(self) -> bool:
        change = self.roster.change
        if not self.is_open or change is None or change.plan is self.roster.plan:
            return False
        self.note("nothing boots for a while")
        self.see_it_fail()
        return True

    def close(self) -> bool:
        if not self.is_open:
            return False
        self.note("close")
        busy = bool(self.live)
        self.tell(self.roster.close)
        assert self.roster.phase is (Phase.CLOSING if busy else Phase.ENDING)
        return True

    def abort(self) -> bool:
        if self.roster.phase is Phase.ABORTED:
            return False
        self.note("abort")
        self.tell(self.roster.abort)
        return True

    # the clock

    def tick(self, *, early: bool = False) -> None:
        roster = self.roster

        def tick() -> Actions:
            # When such a one is gone, it is looked at what comes next.
            awaited = not self.is_open or any(seat.state is STOPPING or seat.leaving for seat in roster.seats)
            before = {seat: seat.looked_at for seat in roster.seats}
            actions = roster.tick()
            assert not actions or not early or awaited, "what follows from a call follows at once"
            if any(seat.looked_at is not before[seat] for seat in roster.seats if seat in before):
                return actions  # once more, when the answer has been looked for
            assert roster.next_deadline() > self.now, "the housekeeper spins"
            for seat in roster.seats:
                exec_ttl = seat.plan.limits.exec_ttl
                if seat.state is SERVING and exec_ttl is not None:
                    for job in seat.jobs:
                        assert job.started + exec_ttl > self.now, "a job runs for too long"
            return actions

        self.tell(tick)
        if roster.next_deadline() <= self.now:
            self.tell(tick)

    def keep_house(self) -> None:
        if self.lag:
            self.lag -= 1
        if not self.lag and self.roster.next_deadline() <= self.now:
            self.tick()

    # all goes well

    def take_a_nice_step(self) -> bool:
        """Do what comes next if nothing goes wrong. Return whether there was anything."""
        if dying := self.seats_in(STOPPING):
            self.exit(dying[0])
        elif assigned := [job for job in self.live if job.state is ASSIGNED and not (job.lease and job.bound)]:
            self.write(assigned[0])
        elif written := self.with_written():
            self.answer(next(job for job in written[0].jobs if job.state is WRITTEN))
        elif leases := self.leases():
            self.leave(leases[0])
        elif starting := self.seats_in(STARTING):
            if self.books[starting[0]].boots:
                self.handshake(starting[0])
            else:
                self.exit(starting[0])
        else:
            return False
        return True

    def play_nicely(self) -> None:
        """See that the pool comes to rest, whole, if nothing goes wrong any more."""
        self.lag = 0
        for seat in self.seats:
            self.books[seat].stale = None
        for _ in range(CALM_ROUNDS):
            for _ in range(5000):
                self.keep_house()
                if not self.take_a_nice_step():
                    break
            else:
                raise AssertionError("it is never done")
            if self.is_at_rest():
                return
            assert self.roster.next_deadline() < math.inf, f"it will never be whole: {self.why_not_at_rest()}"
            self.now = max(self.now, self.roster.next_deadline())
        raise AssertionError(f"it is never whole: {self.why_not_at_rest()}")

    def see_it_fail(self) -> None:
        """See that a change to what never boots is taken back, and does not go on for ever."""
        change = self.roster.change
        self.lag = 0
        for _ in range(CALM_ROUNDS):
            if self.roster.change is not change or change is None or change.plan is self.roster.plan:
                return  # settled, or a mere `resize`
            if any(seat.announced and seat.plan is self.roster.plan for seat in self.roster.seats):
                return  # one has booted, so the others are tried until they do
            for seat in self.seats_in(STARTING):
                self.exit(seat)
                if self.roster.change is not change:
                    return
            self.keep_house()
            for _ in range(5000):
                if self.seats_in(STARTING) or not self.take_a_nice_step():
                    break
            if not self.seats_in(STARTING) and self.roster.next_deadline() < math.inf:
                self.now = max(self.now, self.roster.next_deadline())
        raise AssertionError("a change that can't succeed goes on")

    def see_it_shrink(self) -> None:
        """See that a pool without jobs has no more workers than were asked for, after two windows at the latest."""
        until = self.now + 2 * SHRINK_WINDOW
        while self.is_open and self.roster.target > self.roster.size:
            self.now = max(self.now, self.roster.next_deadline())
            assert self.now <= until, "it does not shrink"
            self.keep_house()
            while self.take_a_nice_step():
                self.keep_house()

    def is_at_rest(self) -> bool:
        return not self.why_not_at_rest()

    def why_not_at_rest(self) -> str:
        roster = self.roster
        if self.live:
            return f"jobs are left: {list(self.live)}"
        if roster.phase > Phase.OPEN:
            return "" if self.drained else "not drained"
        if roster.change is not None:
            return "a change is under way"
        if roster.plan.debug:
            return "seats are left" if roster.seats else ""
        serving = {seat.slot: seat for seat in roster.seats if seat.state is SERVING and not seat.leaving}
        if set(serving) != set(range(roster.target)):
            return f"slots {sorted(serving)} of {roster.target} serve"
        for seat in roster.seats:
            if seat.plan is not roster.plan:
                return f"{seat} is of another plan"
            if seat.state is STANDBY and not (serving[seat.slot].limit and serving[seat.slot].vacant):
                return f"{seat} stands by"
            if seat.due or seat.relief:
                return f"{seat} was due"
        return ""

    # the whole

    def step(self) -> None:
        """Let something happen."""
        while not self.happen(self.choose(self.menu)):
            pass

    def happen(self, name: str) -> bool:
        self.sound = False
        happened: bool = getattr(self, name)()
        if happened:
            self.keep_house()
            self.over = self.drained
        self.sound = True
        return happened

    def finish(self) -> None:
        """From wherever it is, the pool comes to rest, ends, and each of its jobs had one ending."""
        if not self.drained:
            self.note("to the end")
            if self.choose((True, True, False)):
                self.play_nicely()
                self.see_it_shrink()
            if self.is_open:
                self.close()
            self.play_nicely()
        assert self.drained and not self.seats and not self.live and not self.queue and not self.books
        for job, story in self.stories.items():
            assert job.state is DONE and story.over == (job.end or "ended")
        assert all(story.settled for story in self.changes.values()), "a change never settles"
        assert self.roster.exits.total() == self.roster.starts.total()


WEIGHTS: Final = {
    "submit": 12,
    "submit_many": 3,
    "reply": 10,
    "reply_all": 3,
    "boot": 12,
    "end": 8,
    "advance": 5,
    "advance_to_deadline": 5,
    "write_at_last": 4,
    "release": 3,
    "work_inside": 3,
    "resize": 2,
    "reset": 2,
    "measure": 3,
    "tick_early": 2,
    "cancel": 2,
    "leave_stream": 1,
    "reply_dirty": 1,
    "stop_request": 1,
    "go_stale": 1,
    "give_back": 1,
    "fail_boot": 2,
    "hang_boot": 1,
    "crash": 1,
    "suspect": 1,
    "deadline": 1,
    "stop_worker": 1,
    "kill_worker": 1,
    "rest": 1,
    "nothing_boots": 1,
}
HARMLESS: Final = frozenset(list(WEIGHTS)[: list(WEIGHTS).index("cancel")])


def write_menu(factor: Callable[[str], float]) -> list[str]:
    return [name for name, weight in WEIGHTS.items() for _ in range(round(weight * factor(name)))]


MENUS: Final = (
    write_menu(lambda name: 1),
    write_menu(lambda name: name in HARMLESS),
    write_menu(lambda name: 4 if name in ("reset", "resize", "fail_boot", "rest") else 1),
    write_menu(lambda name: 3 if name in ("submit", "submit_many", "advance_to_deadline", "reply_all") else 1),
    write_menu(lambda name: 4 if name in ("crash", "kill_worker", "stop_worker", "suspect", "fail_boot", "end") else 1),
)
"""What a life may choose from: of everything, nothing that does harm, many changes, many jobs, much harm."""


def live(seed: int, steps: int) -> Life:
    """Live one life; raise what was wrong, with its last events as a note."""
    rng = random.Random(seed)
    life: Life | None = None
    try:
        life = Life(rng.choice)
        close_at = rng.choice((steps, steps, rng.randrange(steps)))
        for number in range(steps):
            if life.over:
                break
            if number == close_at:
                life.happen(rng.choice(("close", "close", "abort")))
            else:
                life.step()
        life.finish()
    except BaseException as error:
        if life is not None:
            for line in life.log:
                error.add_note(line)
        error.add_note(f"python -m tests.roster_life --seed {seed} {steps}")
        raise
    return life


def run(steps: int, seed: int) -> int:
    """Live lives with so many events in all. Return how many calls the roster had."""
    rng = random.Random(seed)
    calls = done = 0
    while done < steps:
        count = rng.choice((30, 100, 200, 300))
        calls += live(rng.randrange(1 << 32), count).calls
        done += count
    return calls


def run_as_script(arguments: list[str]) -> None:
    if arguments[0] == "--seed":
        live(int(arguments[1]), int(arguments[2]))
        return
    steps = int(arguments[0])
    seed = int(arguments[1]) if len(arguments) > 1 else random.SystemRandom().randrange(1 << 32)
    print(f"{steps:,} steps, seed {seed}", flush=True)
    start = time.perf_counter()
    calls = run(steps, seed)
    print(f"{calls:,} calls in {time.perf_counter() - start:.0f} s: nothing is wrong")


if __name__ == "__main__":
    run_as_script(sys.argv[1:])
