"""The pool's decisions, without I/O: who gets which job, whom to spawn, whom to retire, whom to kill.

Everything here is plain and synchronous. A call tells the roster what has happened; it changes its state, completely,
and returns the *actions* that follow from it. Nothing is awaited between reading and writing this state, so there is
no moment at which it is half true. `Pool` carries the actions out; the tests drive the same calls from a hypothesis
state machine with no process and no trio.

The rules, in the order in which they win:

* A job is handed to a seat once. It goes on to another seat only where it provably did not start, to the front of the
  queue, and at most `target + 1` times.
* Jobs get seats in the order in which they came; a job waits only while no seat has room.
* Jobs that wait may be lent to a line (`Lend`): they lie there ahead of their turn, wait all the same, and their turn
  comes with the reply to the one before. Where a line can give them back (`Plan.recalls`), it does so before its worker
  is killed, and when the job in front takes longer than `PATIENCE`; then they wait as if nothing had been.
* What to spawn is derived from the seats there are (`_heal`), never from a counter beside them. A slot is a number from
  0 to `target - 1`; a seat holds its slot until it is `vacant`: about to spend its last permitted job, to be replaced
  by plan, on its way out, or gone.
* A successor that is ready before its predecessor has done its last job stands by, so never more than `target` seats
  serve. All in all there are never more than twice as many workers as `target`.
* What is replaced by plan (`_relieve`: its time, its memory, a new plan) serves on until its successor is ready, so no
  capacity is lost whatever a boot does. It is done for one worker at a time, in a large pool for a share of them.
* `max_executions` alone is hard: not one job more. Its successor starts ahead, when what is left would last for about
  as long as a boot takes.
* A change (`reset`, `resize`) is what the roster aims for from the moment of the call. When a boot that it asked for
  fails, the roster aims for what was before; so it does when the pool is closed and nobody has seen the new work.
* A worker that died before it did anything for anybody is replaced after a delay that grows (`Restart`); every other at
  once.

With `debug` there are no standing seats: each job has one of its own, that is started for it (`_heal_for_jobs`).
"""

import math
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from ._backoff import BackOff
from ._growth import Growth
from ._model import WorkerEvent
from ._seats import (
    ASSIGNED,
    DONE,
    GONE,
    LEND,
    NEVER,
    NOTHING,
    SERVING,
    STANDBY,
    STARTING,
    STOPPING,
    WAITING,
    WATCH,
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
    Phase,
    Plan,
    Recall,
    Retire,
    Seat,
    Settled,
    Spawn,
    TakeBack,
    Wake,
)

MOST_AHEAD: Final = 15
"""Jobs that may lie in a line behind the one a worker has, where they can be taken back."""

PATIENCE: Final = 0.001
"""Seconds of work that may lie in such a line, and for how long a job may hold up those behind it: about as long as a
job that waits can do without a worker that has become free."""

RELIEVED_AT_A_TIME: Final = 8
"""One worker in so many may be in replacement by plan, at least one: a boot costs about a core for its time, and the
memory of one worker more."""

RESET: Final = "reset"
DISMISSED: Final = ("resize", "shrink")


class Roster:
    """Who works, who waits, and what follows from what happens."""

    def __init__(
        self,
        size: int,
        plan: Plan,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        capacity: int = 1,
        latest_first: bool = False,
        rng: random.Random | None = None,
    ) -> None:
        self.plan = plan
        self.size = size
        """How many workers were asked for."""
        self.target = size
        """How many there should be now; more than `size` where the pool has grown."""
        self.change: Change | None = None
        self.seats: list[Seat] = []
        self.phase = Phase.OPEN
        self.outcomes: Counter[str] = Counter()
        self.exits: Counter[str] = Counter()
        self.starts: Counter[int] = Counter()
        self.failed_starts = 0
        self.served = 0
        self._clock = clock
        self._wall = wall
        self._capacity = capacity
        self._latest_first = latest_first
        self._rng = rng or random.Random()
        self._backoff = BackOff(self._rng)
        self._growth = Growth()
        self._free: OrderedDict[Seat, None] = OrderedDict()
        self._waiting: OrderedDict[Job, None] = OrderedDict()
        self._queue: OrderedDict[Job, None] = OrderedDict()  # those of them that lie in no line
        self._roomy: dict[Seat, None] = {}
        self._late_at = math.inf
        self._boot_took = 0.0
        self.alarm = math.inf
        """When `tick` may have something to do, but for what the delays between boots say."""

    def __repr__(self) -> str:
        return (
            f"<Roster {self.phase.name}: {len(self.seats)} seats, {len(self._free)} free, {len(self._waiting)} waiting>"
        )

    # what can be seen

    @property
    def waiting(self) -> int:
        """How many jobs wait for a seat."""
        return len(self._waiting)

    @property
    def longest_wait(self) -> float:
        """For how many seconds the job that is next has waited."""
        for job in self._waiting:
            return job.waited + self._clock() - job.queued
        return 0.0

    @property
    def accepting(self) -> bool:
        """Whether a job that comes now would be taken."""
        if self.phase is not Phase.OPEN:
            return False
        bound = self.plan.max_queue
        return bound is None or (bool(self._free) and not self._queue) or not self._waits_impatiently(bound)

    @property
    def failed_in_a_row(self) -> int:
        """How many boots in a row have failed, in the whole pool."""
        return self._backoff.in_a_row

    @property
    def may_grow(self) -> bool:
        """Whether the pool may have more workers than there should be now."""
        return self.target < self._ceiling() and not self.plan.debug

    def next_deadline(self) -> float:
        """When `tick` may have something to do."""
        if not self._backoff.waits or not self._may_spawn():
            return self.alarm
        return min(self._backoff.next_try(self._held()), self.alarm)

    # the way of a job

    def submit(self, job: Job) -> Actions:
        """Take a job. With room it gets its seat now (`ASSIGNED`), else it waits, or is over with `job.end` set."""
        if self.phase is not Phase.OPEN:
            return self._over(job, End.CLOSED)
        if not self._queue and (seat := self._find_seat(job)) is not None:
            self._take_away(seat)
            return self._give(job, seat)
        bound = self.plan.max_queue
        if bound is not None and not job.patient and self._waits_impatiently(bound):
            return self._over(job, End.QUEUE_FULL)
        job.queued = job.handed_in = self._clock()
        self._waiting[job] = self._queue[job] = None
        plan = self.plan
        actions = self._set_late(job)
        if plan.debug:
            return [*actions, *self._heal()]
        if plan.max_workers is not None:
            actions = [*actions, *self._watch_queue()]
        if len(self._queue) == 1 and self._roomy:
            return [*actions, *LEND] if actions else LEND
        return actions

    def submit_to(self, seat: Seat, job: Job) -> Actions:
        """Give a job to a leased seat, outside the queue."""
        job.bound = True
        if seat.state is not SERVING:
            job.seat = seat
            return self._over(job, End.CLOSED if seat.planned else End.CRASHED)
        job.seat = seat
        job.state = ASSIGNED
        job.started = self._clock()
        seat.jobs.append(job)
        seat.begun += 1
        seat.changed = self._wall()
        watch = self._remind(job.started + seat.exec_ttl)
        if seat.vacant and seat.begun == seat.limit:
            return [*watch, *self._heal()]  # a closing pool counts on it no longer
        return watch

    def written(self, job: Job) -> Actions:
        """Note that the first bytes of an assigned job are on the wire."""
        job.state = WRITTEN
        seat = job.seat
        if seat is None or not seat.depth or job.alone:
            return NOTHING
        self._roomy[seat] = None
        return self._lend()

    def replied(self, seat: Seat, job: Job, dirt: BaseException | str | None = None) -> Actions:
        """Take note of a job's whole outcome; `dirt` says why the line can't carry another job.

        Whoever says so wakes the seat's next job: of several outcomes that are told in a row, that of the last.
        """
        job.state = DONE
        seat.jobs.remove(job)
        self._has_served(seat)
        if dirt is not None:
            return self.suspect(seat, dirt)
        plan = seat.plan
        if plan.read_ahead > 1:
            now = self._clock()
            if plan.recalls:
                self._note_pace(seat, now - job.started)
                seat.is_slow = False
            if seat.ahead and not seat.jobs and seat.state is SERVING:
                return self._go_on(seat, now)  # the usual case of `_make_room`, where many wait
        return self._make_room(seat)

    def stop_requested(self, seat: Seat, job: Job, dirt: BaseException | str | None = None) -> Actions:
        """A worker asks to be replaced instead of running the job: the job goes on, the worker goes."""
        seat.jobs.remove(job)
        seat.begun -= 1
        self._take_away(seat)
        actions: list[Action] = []
        # A worker has failed once, however many of those that lie in its line it does not want.
        again = seat.capacity == 1 and seat.leaving == "stop request"
        fresh = not seat.served and not seat.lease and not again
        if fresh and dirt is None and seat.state is SERVING and not seat.plan.debug:
            self._back_off(seat)  # it came up only to ask to be replaced: not a reason to spin
        self._hand_on([job], actions, End.RETIRED)
        actions.extend(self.retire(seat, "stop request") if dirt is None else self.suspect(seat, dirt))
        if seat.ahead and seat.state is SERVING:
            actions.append(Wake(seat.ahead[0]))
            actions.extend(self._go_on(seat, self._clock()))  # what has been written to it comes before the stop
        return actions

    def refused(self, seat: Seat, job: Job, why: BaseException | str) -> Actions:
        """The line could not even begin the job: the job goes on, the worker is suspect."""
        seat.jobs.remove(job)
        seat.begun -= 1
        self._take_away(seat)
        actions: list[Action] = []
        self._hand_on([job], actions, End.CRASHED)
        actions.extend(self.suspect(seat, why, grace=isinstance(why, str)))
        return actions

    def cancelled(self, job: Job) -> Actions:
        """The job's caller has gone, or its time is up."""
        seat, state = job.seat, job.state
        job.state = DONE
        if state is WAITING:
            self._waiting.pop(job, None)
            self._queue.pop(job, None)
            if job.reserved is not None:
                return self.kill(job.reserved, "cancelled")
            # A lease that needed a whole worker may have held back jobs that do not.
            return [*self._serve(), *self._lend(), *self._after_departure()]
        if state is DONE or seat is None:
            return NOTHING
        if job.lease:
            return self._end_lease(job, seat)
        seat.jobs.remove(job)
        if state is ASSIGNED:
            seat.begun -= 1
            return self._make_room(seat)
        seat.worked = True
        seat.cancelled = job
        return self.kill(seat, "cancelled")

    def returned(self, seat: Seat, jobs: Iterable[Job]) -> Actions:
        """Jobs come back that the seat's worker has not read and never will: they go on."""
        back = list(jobs)
        if not back:
            return NOTHING
        for job in back:
            seat.jobs.remove(job)
            seat.begun -= 1
        self._take_away(seat)
        actions: list[Action] = []
        self._hand_on(back, actions)
        actions.extend(self._make_room(seat))
        return actions

    def taken_back(self, seat: Seat, jobs: Iterable[Job]) -> Actions:
        """Jobs that lay in the seat's line are out of it, unread: they wait as if they had not been there."""
        actions: list[Action] = []
        self._roomy.pop(seat, None)
        self._end_loan(seat, list(jobs), actions)
        actions.extend(self._serve())
        actions.extend(self._heal())
        actions.extend(self._after_departure())
        return actions

    def released(self, job: Job) -> Actions:
        """A lease is over."""
        seat = job.seat
        if job.state is DONE or seat is None:
            return NOTHING
        job.state = DONE
        return self._end_lease(job, seat)

    # the life of a worker

    def open(self) -> Actions:
        """Begin: spawn what is missing."""
        return self._heal()

    def ready(self, seat: Seat) -> Actions:
        """The worker has shaken hands."""
        if seat.state is not STARTING:
            return NOTHING  # killed while it came up
        now = self._clock()
        seat.announced = True
        seat.ready_at = seat.free_since = now
        seat.changed = self._wall()
        # The latest boot counts, but a slow one for some time: boots beside a busy pool take longer than the first.
        self._boot_took = max(now - seat.spawned_at, 0.75 * self._boot_took)
        actions: list[Action] = [Emit(WorkerEvent.CREATED, seat)]
        if (ttl := seat.plan.limits.ttl) is not None:
            seat.expires_at = now + ttl * (1 - seat.plan.limits.jitter * self._rng.random())
            actions.extend(self._remind(seat.expires_at))
        if any(other.slot == seat.slot and other.state is SERVING for other in self.seats):
            seat.state = STANDBY
        else:
            seat.state = SERVING
            actions.extend(self._begin_to_serve(seat))
        change = self.change
        if change is not None and seat.plan is self.plan:
            change.slots.discard(seat.slot)
        actions.extend(self._relieve())
        actions.extend(self._heal())
        actions.extend(self._after_change())
        return actions

    def suspect(self, seat: Seat, why: BaseException | str, *, grace: bool = False) -> Actions:
        """Something is wrong with the worker: it gets no more jobs and is killed.

        `why` is a text where it just ended its relay (then `grace`: it may be ending by itself, with an exit status
        worth knowing), else the exception.
        """
        if seat.state in (STOPPING, GONE):
            return self._after_departure()
        seat.fault = why
        actions: list[Action] = []
        self._take_out(seat, actions)
        if not grace:
            seat.reason = "broke the protocol"
            actions.append(Emit(WorkerEvent.ERROR, seat, why))
            self._destruct(seat, actions)
        actions.append(Kill(seat, grace))
        actions.extend(self._after_departure())
        return actions

    def retire(self, seat: Seat, reason: str) -> Actions:
        """End the worker softly: after the jobs it has, with the stop frame. Its successor is started at once."""
        if seat.state in (STOPPING, GONE):
            return self._after_departure()
        if seat.state is STARTING:
            return self.kill(seat, reason)
        seat.at_once = True
        actions: list[Action] = []
        self._leave(seat, reason, actions)
        actions.extend(self._heal())
        actions.extend(self._after_departure())
        return actions

    def kill(self, seat: Seat, reason: str) -> Actions:
        """Kill the worker. It is replaced when it is gone."""
        if seat.state is GONE:
            return NOTHING
        if seat.state is STOPPING:
            seat.reason = seat.reason or reason  # the grace of a suspect is over
            return [Kill(seat), *self._after_departure()]
        seat.planned = True
        seat.reason = reason
        actions: list[Action] = []
        self._take_out(seat, actions)
        self._destruct(seat, actions)
        actions.append(Kill(seat))
        actions.extend(self._after_departure())
        return actions

    def about_to_kill(self, seat: Seat) -> Actions:
        """A deadline has passed (grace, `destroy_timeout`): the worker is killed now."""
        seat.reason = seat.reason or "closed its relay"
        actions: list[Action] = []
        if seat.announced and not seat.destructed:
            actions.append(Emit(WorkerEvent.ERROR, seat))
        self._destruct(seat, actions)
        return actions

    def exited(
        self, seat: Seat, ending: object, answered: Iterable[Job] = (), unstarted: Iterable[Job] = ()
    ) -> Actions:
        """The worker's process has ended.

        `answered`: jobs whose outcome had come before; `unstarted`: jobs it provably did not begin, which go on. All
        others it had end here.
        """
        done, fresh = set(answered), set(unstarted)
        early = not seat.announced
        stood_by = seat.state is STANDBY
        seat.state = GONE
        seat.ending = ending
        seat.changed = self._wall()
        self.seats.remove(seat)
        self._take_away(seat)
        actions: list[Action] = []
        if stood_by:
            self._serve_on(seat.slot, actions)
        going_on: list[Job] = []
        unread: list[Job] = []
        for job in [*seat.jobs, *seat.ahead]:
            if job.ahead is not None:
                if job in fresh and not job.bound and self.phase is not Phase.ABORTED:
                    unread.append(job)
                    continue
                self._take_over(seat, job)
            if job in done:
                job.state = DONE
                self._has_served(seat)
            elif job in fresh and not job.bound and self.phase is not Phase.ABORTED:
                going_on.append(job)
                seat.begun -= 1
                continue
            else:
                seat.worked = True
                self._over(job, self._end_with(seat, job))
            actions.append(Wake(job))
        seat.jobs.clear()
        self._end_loan(seat, unread, actions)
        if seat.lease is not None:
            lease, seat.lease = seat.lease, None
            if lease.bound or self.phase is Phase.ABORTED:
                self._over(lease, End.CLOSED if self.phase is Phase.ABORTED else End.CRASHED)
                actions.append(Wake(lease))
            else:
                going_on.append(lease)
        self._account_for_end(seat, early, actions)
        self._hand_on(going_on, actions, End.CRASHED)
        if unread:
            actions.extend(self._serve())
        if self.phase is not Phase.ABORTED and self._must_give_up():
            actions.append(GiveUp(seat))
            actions.extend(self.abort())
        actions.extend(self._promote(seat.slot))
        actions.extend(self._relieve())
        actions.extend(self._heal())
        actions.extend(self._after_departure())
        actions.extend(self._after_change())
        return actions

    def tick(self) -> Actions:
        """Look at the clock: a job, a worker, a delay may have had its time."""
        now = self._clock()
        actions: list[Action] = []
        exceeding: dict[Seat, Excess] = {}
        for seat in self.seats:
            if seat.exec_ttl < math.inf and seat.state is SERVING:
                for job in seat.jobs:
                    if job.started + seat.exec_ttl + job.slack > now:
                        continue
                    if seat.ahead and seat.looked_at is not job:
                        # Its worker may be at the next one already, and that must not pay for it: so look before.
                        seat.looked_at = job
                        actions.append(Recall(seat))
                    else:
                        exceeding[seat] = Excess("exec_ttl", now - job.started, seat.exec_ttl, job)
                    break
        self._exceed(exceeding, actions)
        for seat in self.seats:
            if seat.recall_at <= now:
                seat.recall_at = math.inf
                if seat.ahead and seat.state is SERVING:
                    seat.is_slow = True
                    actions.append(Recall(seat))
        if now >= self._late_at:
            self._see_who_is_late(now, actions)
        actions.extend(self._shrink(now))
        self._note_what_is_due(now)
        self._grow(now)
        actions.extend(self._relieve())
        actions.extend(self._heal())
        actions.extend(self._after_change())
        self._watch_queue()
        self.alarm = self._next_alarm()
        return actions

    def measured(self, memory: Mapping[Seat, int]) -> Actions:
        """Take note of the workers' memory, in bytes: once a second, while `Limits` set a bound to it."""
        exceeding: dict[Seat, Excess] = {}
        for seat, figure in memory.items():
            if seat.state is not SERVING and seat.state is not STANDBY:
                continue
            seat.memory = figure
            limits = seat.plan.limits
            if limits.hard_memory is not None and figure > limits.hard_memory:
                exceeding[seat] = Excess("hard_memory", figure, limits.hard_memory)
            elif limits.max_memory is not None and figure > limits.max_memory:
                seat.readings_above += 1
                # One that has done nothing yet would have a successor as large: that helps nobody.
                if seat.readings_above >= 2 and seat.begun:
                    seat.due = seat.due or "max_memory"
            else:
                seat.readings_above = 0
        actions: list[Action] = []
        self._exceed(exceeding, actions)
        actions.extend(self._relieve())
        actions.extend(self._heal())
        return actions

    # changes

    def reset(self, plan: Plan, size: int | None = None) -> tuple[Change, Actions]:
        """Replace every worker by one of this plan, and their number by `size`, where it is given."""
        change = self._join_change()
        if size is not None:
            change.new_size, change.sized = size, True
        self.target = change.new_size if plan.debug else max(self.target, change.new_size)
        # All slots that will be there: in a pool that has grown, which of them is first to be replaced is not known.
        change.slots = set() if plan.debug else set(range(change.new_size if change.sized else self.target))
        actions: list[Action] = []
        self._go_by(plan, actions)
        actions.extend(self._relieve())
        actions.extend(self._heal())
        actions.extend(self._watch_queue())
        actions.extend(self._after_change())
        return change, actions

    def resize(self, size: int) -> tuple[Change, Actions]:
        """Have this many workers."""
        change = self._join_change()
        change.new_size, change.sized = size, True
        self._growth.close_window()
        actions: list[Action] = []
        if change.plan is self.plan:
            missing = range(change.size, size)
            self.size = self.target = size
            change.sized = False  # that is done
        else:
            missing = range(size)
            self.target = max(self.target, size)
        there = {
            seat.slot
            for seat in self.seats
            if seat.state in (SERVING, STANDBY) and seat.plan is self.plan and not seat.vacant
        }
        change.slots = set() if self.plan.debug else set(missing) - there
        for slot in change.slots:
            self._backoff.tries(slot)
        self._dismiss(actions, "resize")
        actions.extend(self._relieve())
        actions.extend(self._heal())
        actions.extend(self._watch_queue())
        actions.extend(self._after_change())
        return change, actions

    # the end of the pool

    def close(self) -> Actions:
        """Take no more jobs, finish those there are, then stop the workers."""
        actions: list[Action] = []
        if self.phase is Phase.OPEN:
            self.phase = Phase.CLOSING
            change = self.change
            self._drop_change(actions)
            if change is not None and not self.plan.debug and not self._is_proved():
                # Jobs that wait must not depend on workers that nobody has seen come up.
                self._go_by(change.plan, actions)
                actions.extend(self._heal())
        actions.extend(self._after_departure())
        return actions

    def abort(self) -> Actions:
        """Kill everything. Waiting jobs are over now, running ones when their worker is gone."""
        if self.phase is Phase.ABORTED:
            return NOTHING
        self.phase = Phase.ABORTED
        actions: list[Action] = []
        self._drop_change(actions)
        for job in self._queue:
            self._over(job, End.CLOSED)
            actions.append(Wake(job))
            del self._waiting[job]
        self._queue.clear()
        for seat in list(self.seats):
            actions.extend(self.kill(seat, "closing"))
        if not self.seats:
            actions.append(Drained())
        return actions

    # how it is decided

    def _over(self, job: Job, end: End) -> Actions:
        job.state = DONE
        job.end = end
        return NOTHING

    def _find_seat(self, job: Job) -> Seat | None:
        """Find the seat that has been free for longest, or shortest; a lease needs one without any job."""
        for seat in reversed(self._free) if self._latest_first else self._free:
            if not (job.lease and seat.jobs):
                return seat
        return None

    def _waits_impatiently(self, bound: int) -> bool:
        """Whether so many jobs wait that `max_queue` counts."""
        if self.plan.debug and len(self.seats) < self.target:
            return False  # there is a place for a process
        waiting = self._waiting
        return len(waiting) >= bound and sum(not job.patient and job.reserved is None for job in waiting) >= bound

    def _take_away(self, seat: Seat) -> None:
        """Take a seat out of the free ones, if it is one."""
        self._free.pop(seat, None)
        if len(self._free) < self._growth.lowest_free:
            self._growth.lowest_free = len(self._free)

    def _give(self, job: Job, seat: Seat) -> Actions:
        """Give a job to a seat that is not among the free ones."""
        job.seat = seat
        job.state = ASSIGNED
        now = job.started = self._clock()
        seat.changed = self._wall()
        if job.lease:
            seat.lease = job
            return NOTHING
        seat.jobs.append(job)
        seat.begun += 1
        if not seat.spent and len(seat.jobs) < seat.capacity:
            self._free[seat] = None
        return self._note_start(seat, now)

    def _note_start(self, seat: Seat, now: float) -> Actions:
        """A job has begun: see what its worker's limits say."""
        watch = self._remind(now + seat.exec_ttl)
        if seat.limit and self._is_nearly_spent(seat, now) and (seat.spent or not seat.vacant):
            seat.vacant = True  # the successor starts now, ahead of the worker's end
            return [*watch, *self._heal()]
        return watch

    def _is_nearly_spent(self, seat: Seat, now: float) -> bool:
        """Whether what is left of `max_executions` lasts for no longer than a boot, at the pace of late."""
        if seat.begun > 1:
            took = now - seat.begun_at
            seat.pace = took if seat.pace == math.inf else 0.8 * seat.pace + 0.2 * took
        seat.begun_at = now
        left = seat.limit - seat.begun
        return left <= 0 or left * seat.pace <= self._boot_took

    def _serve(self) -> Actions:
        """Give waiting jobs to free seats, both in their order."""
        if not self._queue or not self._free:
            return NOTHING
        actions: list[Action] = []
        while self._queue and self._free:
            job = next(iter(self._queue))
            seat = self._find_seat(job)
            if seat is None:
                break
            self._take_away(seat)
            self._begin(job, seat, actions)
        return actions

    def _begin(self, job: Job, seat: Seat, actions: list[Action]) -> None:
        """Give a waiting job its seat, which is not among the free ones."""
        del self._waiting[job]
        del self._queue[job]
        job.waited += self._clock() - job.queued
        actions.extend(self._give(job, seat))
        actions.append(Begin(job))

    def _make_room(self, seat: Seat) -> Actions:
        """See what follows where a seat has room that it had not."""
        seat.changed = self._wall()
        if seat.state is not SERVING:
            return self._after_departure()
        if seat.ahead and not seat.jobs:
            return [Wake(seat.ahead[0]), *self._go_on(seat, self._clock())]
        if seat.leaving or seat.spent or seat.plan.debug:
            if seat.jobs or (seat.lease is not None and not seat.at_once):
                return NOTHING
            actions: list[Action] = []
            self._stop(seat, actions)
            actions.extend(self._after_departure())
            return actions
        if seat.lease is not None:
            return NOTHING
        if seat not in self._free:
            self._free[seat] = None
        if seat.idle_ttl < math.inf and seat.begun and not seat.jobs:
            seat.free_since = self._clock()
            if watch := self._remind(seat.free_since + seat.idle_ttl):
                return [*watch, *self._serve(), *self._after_departure()]
        if self._queue:
            return self._serve()
        if self.phase is Phase.OPEN:
            return NOTHING
        return self._after_departure()

    def _end_lease(self, job: Job, seat: Seat) -> Actions:
        seat.lease = None
        if seat.state is not SERVING:
            return self._after_departure()
        if seat.jobs:
            return self.kill(seat, "its lease ended under a job")
        if job.bound:  # else nobody ever had it
            self._has_served(seat)
        if seat.plan.debug:
            return self.retire(seat, "debug")
        if seat.spent:
            return self.retire(seat, "max_executions")
        actions: list[Action] = []
        if seat.due == "idle_ttl":
            seat.due = ""  # it was of use
            actions.extend(self._remind(seat.expires_at))
        if seat.leaving:
            return [*actions, *self._make_room(seat), *self._relieve(), *self._heal()]
        # What is due comes before the next lease: else leases one after the other would keep a worker for ever.
        actions += [*self._relieve(), *self._heal()]
        if self._has_room(seat):  # else it was kept, and has something to do already
            actions.extend(self._make_room(seat))
        return actions

    def _has_room(self, seat: Seat) -> bool:
        return seat.lease is None and len(seat.jobs) < seat.capacity

    def _set_late(self, job: Job) -> Actions:
        """Note until when a job may wait: what it has waited before counts."""
        job.late_at = job.queued - job.waited + self.plan.allocate_timeout
        if job.late_at >= self._late_at:
            return NOTHING
        self._late_at = job.late_at
        return self._remind(job.late_at)

    def _see_who_is_late(self, now: float, actions: list[Action]) -> None:
        self._late_at = math.inf
        serves = any(seat.state is SERVING for seat in self.seats)
        for job in self._waiting:
            if job.late_at <= now:
                if job.unhurried and serves:
                    job.late_at = now + self.plan.allocate_timeout
                else:
                    job.late, job.late_at = True, math.inf
                    actions.append(Wake(job))
            self._late_at = min(self._late_at, job.late_at)

    # jobs ahead of their turn

    def lend(self) -> Job | None:
        """Lend the next job that waits to the next line that has room (`job.ahead`); None where one of them is missing.

        It is to be written there at once: `taken_back` where that can't be.
        """
        queue, roomy = self._queue, self._roomy
        while queue and roomy:
            job = next(iter(queue))
            if job.alone or job.lease:
                return None  # nobody may get past it
            seat = next(iter(roomy))
            del roomy[seat]
            if not self._has_room_ahead(seat):
                continue
            del queue[job]
            job.ahead = seat
            seat.ahead.append(job)
            if len(seat.ahead) == 1 and seat.plan.recalls:
                seat.recall_at = seat.jobs[0].started + PATIENCE
                self._remind(seat.recall_at)
            if len(seat.ahead) < seat.depth:
                roomy[seat] = None
            return job
        return None

    def _lend(self) -> Actions:
        return LEND if self._queue and self._roomy else NOTHING

    def _has_room_ahead(self, seat: Seat) -> bool:
        if seat.state is not SERVING or seat.leaving or seat.lease is not None or len(seat.jobs) != 1:
            return False
        head, count = seat.jobs[0], len(seat.ahead)
        if head.state is not WRITTEN or head.alone or count >= seat.depth or seat.is_slow:
            return False
        return not 0 < seat.limit <= seat.begun + count

    def _go_on(self, seat: Seat, now: float) -> Actions:
        """Its worker has gone on to the next of those that lie in its line."""
        job = seat.ahead[0]
        self._take_over(seat, job)
        job.waited += now - job.queued
        job.state = WRITTEN
        job.started = now
        seat.jobs.append(job)
        seat.changed = self._wall()
        actions = NOTHING
        if seat.plan.recalls:
            seat.is_slow = False
            if seat.ahead:
                seat.recall_at = now + PATIENCE
                actions = self._remind(seat.recall_at)
            else:
                seat.recall_at = math.inf
        if seat.limit or seat.exec_ttl < math.inf:
            actions = [*actions, *self._note_start(seat, now)]
        if seat.depth:
            self._roomy[seat] = None
            if self._queue:
                return [*actions, *LEND] if actions else LEND
        return actions

    def _take_over(self, seat: Seat, job: Job) -> None:
        """A job that lay in a seat's line is the seat's."""
        del self._waiting[job]
        seat.ahead.remove(job)
        seat.begun += 1
        job.ahead = None
        job.seat = seat

    def _end_loan(self, seat: Seat, jobs: list[Job], actions: list[Action]) -> None:
        """Put jobs that lay in a seat's line back to where they were in the queue."""
        for job in jobs:
            seat.ahead.remove(job)
            job.ahead = None
            if job.bound or self.phase is Phase.ABORTED:
                del self._waiting[job]
                job.seat = seat
                self._over(job, End.CLOSED if self.phase is Phase.ABORTED else End.CRASHED)
            else:
                self._queue[job] = None
            actions.append(Wake(job))
        if jobs and len(self._queue) > 1:
            self._queue = OrderedDict((job, None) for job in self._waiting if job.ahead is None)

    def _note_pace(self, seat: Seat, took: float) -> None:
        """See how much work may lie in a line, from the time that its worker's jobs take."""
        took = min(took, 2 * PATIENCE)
        seat.took = took if seat.took == math.inf else 0.8 * seat.took + 0.2 * took
        seat.depth = min(MOST_AHEAD, int(PATIENCE / seat.took)) if seat.took > 0 else MOST_AHEAD

    def _hand_on(self, jobs: list[Job], actions: list[Action], end: End | None = None) -> None:
        """Put jobs that did not start back to the front of the queue, in their order.

        `end` is for those that have gone on too often; without it, what took them away was no worker's end or wish, and
        they may go on as often as they like.
        """
        for job in reversed(jobs):
            too_often = job.hand_ons > self.target
            if job.bound or (too_often and end is not None) or self.phase is Phase.ABORTED:
                self._over(job, End.CLOSED if self.phase is Phase.ABORTED else end or End.CRASHED)
            else:
                job.hand_ons += not too_often
                job.state = WAITING
                job.seat = None
                job.queued = self._clock()
                if job.handed_in == NEVER:
                    job.handed_in = job.started
                job.started = NEVER
                actions.extend(self._set_late(job))
                for waiting in (self._waiting, self._queue):
                    waiting[job] = None
                    waiting.move_to_end(job, last=False)
            actions.append(Wake(job))
        if jobs:
            actions.extend(self._watch_queue())
            actions.extend(self._serve())
            actions.extend(self._heal())  # a closing pool starts workers only for jobs that wait

    def _end_with(self, seat: Seat, job: Job) -> End:
        """How a job ends whose worker is gone."""
        if self.phase is Phase.ABORTED:
            return End.CLOSED
        return End.TIMED_OUT if isinstance(seat.fault, Excess) and seat.fault.job is job else End.CRASHED

    def _has_served(self, seat: Seat) -> None:
        seat.served += 1
        self.served += 1
        if self._backoff:
            self._backoff.has_helped(seat.slot, seat.ready_at)

    def _take_out(self, seat: Seat, actions: list[Action]) -> None:
        """Give it nothing more. Who stands by takes over; else its slot is held until it is known what it died of."""
        self._take_away(seat)
        stood_by = seat.state is STANDBY
        seat.state = STOPPING
        seat.changed = self._wall()
        if seat.ahead:
            actions.append(TakeBack(seat))
        if stood_by:
            self._serve_on(seat.slot, actions)
        lease = seat.lease
        if lease is not None and not lease.bound:
            seat.lease = None  # nobody has entered it yet
            self._hand_on([lease], actions, End.CRASHED)
        actions.extend(self._promote(seat.slot))
        if seat.vacant and self.phase is Phase.CLOSING:
            actions.extend(self._heal())  # it was counted on

    def _leave(self, seat: Seat, reason: str, actions: list[Action]) -> None:
        """Let a ready seat go when its jobs are done, and its lease is over; it gets no others."""
        seat.leaving = seat.leaving or reason
        seat.vacant = True
        self._take_away(seat)
        if not seat.jobs and not seat.ahead and (seat.lease is None or seat.at_once):
            self._stop(seat, actions)

    def _serve_on(self, slot: int, actions: list[Action]) -> None:
        """Let a worker that was about to go, by plan, serve on: its successor, who stood by, is no more."""
        for seat in self.seats:
            if seat.slot != slot or seat.state is not SERVING or not seat.leaving or seat.at_once:
                continue
            if seat.leaving in DISMISSED or seat.fault is not None or seat.plan.debug or self.plan.debug:
                continue
            if slot < self.target:
                seat.leaving = ""
                self._offer_room(seat, actions)

    def _offer_room(self, seat: Seat, actions: list[Action]) -> None:
        """Let a seat take jobs again, if it has room."""
        if seat not in self._free and self._has_room(seat):
            actions.extend(self._make_room(seat))

    def _exceed(self, exceeding: Mapping[Seat, Excess], actions: list[Action]) -> None:
        """Kill workers that have had more than a limit allows. None of them gets a job meanwhile."""
        for seat, excess in exceeding.items():
            self._take_away(seat)
            seat.fault, seat.reason = excess, excess.limit
        for seat in sorted(exceeding, key=lambda seat: seat.state is SERVING):  # who stands by must not be promoted
            self._take_out(seat, actions)
            actions.append(Emit(WorkerEvent.ERROR, seat, exceeding[seat]))
            self._destruct(seat, actions)
            actions.append(Kill(seat))
            actions.extend(self._after_departure())

    def _stop(self, seat: Seat, actions: list[Action]) -> None:
        seat.planned = True
        seat.reason = seat.leaving or ("debug" if seat.plan.debug else "max_executions")
        self._take_out(seat, actions)
        self._destruct(seat, actions)
        actions.append(Retire(seat))

    def _destruct(self, seat: Seat, actions: list[Action]) -> None:
        if seat.announced and not seat.destructed:
            seat.destructed = True
            actions.append(Emit(WorkerEvent.DESTRUCT, seat, seat.reason))

    def _promote(self, slot: int) -> Actions:
        """Let a successor serve whose predecessor no longer does."""
        actions: list[Action] = []
        if not any(seat.slot == slot and seat.state is SERVING for seat in self.seats):
            for seat in self.seats:
                if seat.slot == slot and seat.state is STANDBY:
                    seat.state = SERVING
                    actions.extend(self._begin_to_serve(seat))
                    break
        return actions

    def _begin_to_serve(self, seat: Seat) -> Actions:
        """Give a seat its first job, or let it be free."""
        if not seat.plan.debug:
            return self._make_room(seat)
        actions: list[Action] = []
        job = self._unreserve(seat)
        if job is None or job.state is not WAITING:
            self._leave(seat, "debug", actions)
        else:
            self._begin(job, seat, actions)
        return actions

    def _unreserve(self, seat: Seat) -> Job | None:
        """Part a seat and the job that it came up for (`debug`); return that."""
        job, seat.reserved = seat.reserved, None
        if job is not None:
            job.reserved = None
        return job

    def _account_for_end(self, seat: Seat, early: bool, actions: list[Action]) -> None:
        """Tell of a worker's end, and find out what its slot has to wait for."""
        if early:
            self.exits["boot failed" if not seat.planned else seat.reason] += 1
            job = self._unreserve(seat)
            if seat.planned:
                return
            self.failed_starts += 1
            actions.append(Emit(WorkerEvent.ERROR, seat))
            change = self.change
            if job is not None:
                self._waiting.pop(job, None)
                self._queue.pop(job, None)
                job.seat = seat
                self._over(job, End.NOT_BOOTED)
                actions.append(Wake(job))
            elif change is not None and seat.plan is self.plan and self._decides(seat, change):
                self._take_change_back(seat, change, actions)
            elif seat.plan is self.plan:
                self._backoff.in_a_row += 1
                self._back_off(seat)
            return
        if not seat.planned:
            seat.reason = seat.reason or "crashed"
            if seat.plan.debug or seat.plan is not self.plan:
                pass  # what comes next is another matter
            elif not seat.served and not seat.worked:
                self._back_off(seat)
            else:
                self._backoff.has_helped(seat.slot, seat.ready_at)
            if not seat.destructed:
                actions.append(Emit(WorkerEvent.ERROR, seat))
        self.exits[seat.reason] += 1
        self._destruct(seat, actions)

    def _back_off(self, seat: Seat) -> None:
        """Make the slot's next start wait: longer after each death that helped nobody."""
        now = self._clock()
        restart = self.plan.restart
        if seat.ready_at is not None and now - seat.ready_at >= restart.stable_after:
            self._backoff.has_lived(seat.slot)
        if seat.slot >= self.target:
            return
        self._backoff.has_failed(seat.slot, now)
        if not self._has_heir(seat):
            self._backoff.wait(seat.slot, now, restart)

    def _has_heir(self, seat: Seat) -> bool:
        """Whether another seat holds this one's slot already."""
        return any(other.slot == seat.slot and not other.vacant for other in self.seats if other is not seat)

    def _must_give_up(self) -> bool:
        limit = self.plan.restart.give_up_after
        return limit is not None and self._backoff.in_a_row >= limit

    def _held(self) -> set[int]:
        """The slots that need no other worker. When the pool closes, who can serve on does."""
        closing = self.phase is not Phase.OPEN
        return {
            seat.slot
            for seat in self.seats
            if not seat.vacant or (closing and seat.state is SERVING and not seat.leaving and not seat.spent)
        }

    def _room(self) -> int:
        """How many seats there may be more; those above the target are on their way out, and don't count."""
        return 2 * self.target - sum(seat.slot < self.target for seat in self.seats)

    def _may_spawn(self) -> bool:
        """Whether there is use for another worker, and a place."""
        wanted = self.phase is Phase.OPEN or (self.phase is Phase.CLOSING and bool(self._waiting))
        return wanted and not self.plan.debug and self._room() > 0

    def _heal(self) -> Actions:
        """Spawn what is missing: derived from the seats there are."""
        if self.plan.debug:
            return self._heal_for_jobs()
        if not self._may_spawn():
            return NOTHING
        held = self._held()
        if held.issuperset(range(self.target)):
            return NOTHING
        now = self._clock()
        room = self._room()
        actions: list[Action] = []
        for slot in range(self.target):
            if room <= 0:
                break
            if slot in held or not self._backoff.may_try(slot, now):
                continue
            self._backoff.tries(slot)
            actions.append(Spawn(self._add_seat(slot, self._draw_limit())))
            room -= 1
        return actions

    def _heal_for_jobs(self) -> Actions:
        """Spawn a seat for each job that waits (`debug`), as far as there are places."""
        if self.phase > Phase.CLOSING:
            return NOTHING
        actions: list[Action] = []
        for job in self._queue:
            if len(self.seats) >= self.target:
                break
            if job.reserved is None:
                taken = {seat.slot for seat in self.seats}
                seat = self._add_seat(next(slot for slot in range(self.target) if slot not in taken), 1)
                seat.reserved, job.reserved = job, seat
                actions.append(Spawn(seat))
        return actions

    def _add_seat(self, slot: int, limit: int) -> Seat:
        seat = Seat(slot, self._capacity, limit, self.plan, self._clock(), self._wall())
        self.seats.append(seat)
        self.starts[slot] += 1
        return seat

    def _draw_limit(self) -> int:
        """Draw how many jobs a worker is permitted: never more than `max_executions`, and by chance a few less."""
        limit, jitter = self.plan.max_executions, self.plan.limits.jitter
        return math.ceil(limit * (1 - jitter * self._rng.random())) if limit > 1 and jitter else limit

    # replacement by plan

    def _note_what_is_due(self, now: float) -> None:
        """See whose time has come. Who is idle in a pool that has grown is let go (`_shrink`) rather than replaced."""
        grown = self.target > self.size
        for seat in self.seats:
            if seat.state is not SERVING and seat.state is not STANDBY:
                continue
            if seat.expires_at <= now:
                seat.due = seat.due or "ttl"
            elif not grown and self._is_idle(seat) and seat.free_since + seat.idle_ttl <= now:
                seat.due = seat.due or "idle_ttl"

    def _is_idle(self, seat: Seat) -> bool:
        """Whether a worker has been at work, and is without a job."""
        return seat.begun > 0 and not seat.jobs and seat in self._free

    def _why_due(self, seat: Seat) -> str:
        return seat.due or (RESET if seat.plan is not self.plan or seat.relief else "")

    def _relieve(self) -> Actions:
        """Ask for successors of those whose time has come, and let those go whose successor is ready."""
        if self.phase is not Phase.OPEN or self.plan.debug:
            return NOTHING
        actions: list[Action] = []
        under_way = 0
        for seat in list(self.seats):
            serves_on = seat.state is SERVING and not seat.leaving and seat.vacant
            if serves_on and self._has_no_reason(seat):
                if self._has_successor(seat):
                    self._leave(seat, RESET, actions)
                else:
                    self._keep(seat, actions)
            elif serves_on and (why := self._why_due(seat)) and self._has_successor(seat):
                self._leave(seat, why, actions)
            if seat.relief and (seat.state is STOPPING or (seat.state is SERVING and not seat.leaving)):
                under_way += not self._is_held_up(seat)
        places = max(1, self.target // RELIEVED_AT_A_TIME) - under_way
        change = self.change
        to_come = change.new_size if change is not None and change.sized else self.target
        for seat in self.seats:
            if places <= 0:
                break
            if seat.state is not SERVING or seat.vacant or seat.lease is not None or not self._why_due(seat):
                continue
            if seat.slot >= to_come:
                continue  # it goes anyway
            if seat.due == "idle_ttl" and seat.jobs:
                seat.due = ""  # it is of use again
                actions.extend(self._remind(seat.expires_at))
                if not self._why_due(seat):
                    continue
            seat.relief = seat.vacant = True
            places -= 1
        return actions

    def _has_no_reason(self, seat: Seat) -> bool:
        """Whether a seat that was to be replaced is as good as any: the change that it was for has been taken back."""
        if seat.plan is not self.plan or seat.due or seat.spent:
            return False
        return seat.relief or seat.leaving == RESET or not seat.limit  # with a limit, its last jobs may be near

    def _is_held_up(self, seat: Seat) -> bool:
        """Whether a seat's successor has failed, and its slot waits for the next try: others must not wait with it."""
        if seat.state is not SERVING or self._backoff.may_try(seat.slot, self._clock()):
            return False
        return not any(other.slot == seat.slot and other.state in (STARTING, STANDBY) for other in self.seats)

    def _has_successor(self, seat: Seat) -> bool:
        return any(other.slot == seat.slot and other.state is STANDBY for other in self.seats)

    # growth

    def _ceiling(self) -> int:
        return max(self.size, self.plan.max_workers or 0)

    def _watch_queue(self) -> Actions:
        """Jobs wait: see in time whether the pool should grow."""
        growth = self._growth
        if growth.look_at < math.inf or not self._waiting or not self.may_grow:
            return NOTHING
        growth.begin_to_watch(self._clock(), self.served, self.plan.grow_after)
        return self._remind(growth.look_at)

    def _grow(self, now: float) -> None:
        """Have a worker more, if a job has waited for too long and one more can be of help."""
        growth, grow_after, waiting = self._growth, self.plan.grow_after, len(self._waiting)
        if now < growth.look_at:
            return
        if not self.may_grow or not waiting or self.phase is not Phase.OPEN:
            growth.stop_watching()
            return
        head = next(iter(self._waiting))
        due = head.queued - head.waited + grow_after
        if now < due:
            growth.look_again(due)
        elif growth.wants_more(now, waiting, self.served, self._boot_took, grow_after):
            coming = sum(seat.state is STARTING for seat in self.seats)
            serving = {seat.slot for seat in self.seats if seat.state is SERVING}
            # Where a slot's last worker has failed, and no other is there, more of them would be no help.
            if coming < waiting and self._backoff.failed <= serving:
                self.target += 1
                growth.open_window(now, self.plan.limits.idle_ttl, 0)

    def _shrink(self, now: float) -> Actions:
        """Let as many of the workers go that were added as have been free all the time."""
        growth = self._growth
        if now < growth.window_ends:
            return NOTHING
        actions: list[Action] = []
        if self.phase is Phase.OPEN and self.change is None:
            self.target -= max(0, min(growth.lowest_free, self.target - self.size))
            self._dismiss(actions, "shrink")
        growth.close_window()
        if self.target > self.size:
            growth.open_window(now, self.plan.limits.idle_ttl, len(self._free))
        return actions

    def _dismiss(self, actions: list[Action], reason: str) -> None:
        """Let those go that are above the target."""
        for seat in list(self.seats):
            if seat.slot >= self.target and not seat.leaving and not seat.plan.debug:
                if seat.state is STARTING:
                    actions.extend(self.kill(seat, reason))
                elif seat.state is STANDBY or seat.state is SERVING:
                    self._leave(seat, reason, actions)
        self._backoff.forget(self.target)
        self.alarm = self._next_alarm()

    # changes

    def _join_change(self) -> Change:
        """Return the change that is under way, or begin one."""
        if self.change is None:
            self.change = Change(
                plan=self.plan, size=self.size, target=self.target, new_size=self.size, sized=False, slots=set()
            )
        return self.change

    def _after_change(self) -> Actions:
        """See whether a change is done."""
        change = self.change
        if change is None or change.slots:
            return NOTHING
        actions: list[Action] = []
        if change.sized:
            change.sized = False
            self.size = self.target = change.new_size
            self._growth.close_window()
            self._dismiss(actions, "resize")
            actions.extend(self._heal())
            actions.extend(self._watch_queue())
        if not any(seat.plan is not self.plan or seat.slot >= self.target for seat in self.seats):
            self.change = None
            actions.append(Settled(change))
        return actions

    def _take_change_back(self, failed: Seat, change: Change, actions: list[Action]) -> None:
        """Go back to what was before, for a boot that was asked for has failed."""
        self.change = None
        change.failed = failed
        self.size, self.target = change.size, change.target
        if self.target > self.size:
            self._growth.open_window(self._clock(), change.plan.limits.idle_ttl, 0)
            actions.extend(self._remind(self._growth.window_ends))
        if change.plan is not self.plan:
            self._go_by(change.plan, actions)
            for seat in list(self.seats):
                if seat.plan is self.plan or seat.plan.debug or self.plan.debug:
                    continue
                if seat.announced and seat.plan.source is self.plan.source:
                    seat.plan = self.plan  # it is as good as those it was to replace
                elif seat.state is STOPPING:
                    seat.vacant = True
                elif seat.state is STANDBY:
                    self._leave(seat, RESET, actions)
            for seat in list(self.seats):
                if seat.state is SERVING and seat.vacant and self._has_no_reason(seat):
                    self._keep(seat, actions)
        self._dismiss(actions, "resize")
        actions.extend(self._watch_queue())
        actions.append(Settled(change))

    def _decides(self, failed: Seat, change: Change) -> bool:
        """Whether a change fails with this boot: it was asked for, or no worker of the new plan has ever come up."""
        return failed.slot in change.slots or (change.plan is not self.plan and not self._is_proved())

    def _go_by(self, plan: Plan, actions: list[Action]) -> None:
        """Make this the plan: what failed, and what comes up, by another one is no matter any more."""
        self.plan = plan
        self._backoff.forget()
        self._clear_for_debug(actions)
        self._stop_boots(actions)

    def _is_proved(self) -> bool:
        """Whether a worker of the plan has come up."""
        return any(seat.announced and seat.plan is self.plan for seat in self.seats)

    def _stop_boots(self, actions: list[Action]) -> None:
        """Let no slot wait for workers that come up by a plan which is not the pool's any more."""
        for seat in list(self.seats):
            if seat.plan is not self.plan and seat.state is STARTING:
                seat.vacant = True
                actions.extend(self.kill(seat, RESET))

    def _keep(self, seat: Seat, actions: list[Action]) -> None:
        """Let a seat serve on that was to be replaced, unless somebody has taken its place."""
        if (seat.relief or seat.leaving in ("", RESET)) and not self._has_heir(seat):
            seat.relief = seat.vacant = False
            seat.leaving = ""
            self._offer_room(seat, actions)

    def _drop_change(self, actions: list[Action]) -> None:
        """The pool is closed: nobody will see the change through."""
        change, self.change = self.change, None
        if change is not None:
            change.closed = True
            actions.append(Settled(change))

    def _clear_for_debug(self, actions: list[Action]) -> None:
        """A change to or from `debug`: seats of another plan have no successors, and go when their jobs are done."""
        for seat in list(self.seats):
            if seat.plan is self.plan or not (seat.plan.debug or self.plan.debug):
                continue
            if seat.state is STARTING:
                self._unreserve(seat)
                seat.vacant = True
                actions.extend(self.kill(seat, RESET))
            elif seat.state in (STANDBY, SERVING) and not seat.leaving:
                self._leave(seat, RESET, actions)

    # the clock

    def _remind(self, at: float) -> Actions:
        """Have the clock looked at no later than at that time."""
        if at >= self.alarm:
            return NOTHING
        self.alarm = at
        return WATCH

    def _next_alarm(self) -> float:
        """When something of what there is now will have had its time."""
        if self.phase is Phase.ABORTED:
            return math.inf
        alarm = min(self._growth.look_at, self._growth.window_ends, self._late_at)
        grown = self.target > self.size
        for seat in self.seats:
            if seat.state is SERVING:
                if seat.exec_ttl < math.inf:
                    alarm = min(alarm, *(job.started + seat.exec_ttl + job.slack for job in seat.jobs), math.inf)
                alarm = min(alarm, seat.recall_at)
                if not seat.due and not grown and self._is_idle(seat):
                    alarm = min(alarm, seat.free_since + seat.idle_ttl)
            if not seat.due and (seat.state is SERVING or seat.state is STANDBY):
                alarm = min(alarm, seat.expires_at)
        return alarm

    # the end

    def _after_departure(self) -> Actions:
        """See whether a closing pool is done with its jobs, an ending one with its workers, now that one has left."""
        if self.phase is Phase.OPEN:
            return NOTHING
        actions: list[Action] = []
        if self.phase is Phase.CLOSING and not self._waiting and not any(s.jobs or s.lease for s in self.seats):
            self.phase = Phase.ENDING
            for seat in list(self.seats):
                actions.extend(self.retire(seat, "closing"))
        if self.phase > Phase.CLOSING and not self.seats:
            actions.append(Drained())
        return actions
