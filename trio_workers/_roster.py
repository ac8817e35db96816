"""The pool's decisions, without I/O: who gets which job, whom to spawn, whom to retire, whom to kill.

Everything here is plain and synchronous. A call tells the roster what has happened; it changes its state, completely,
and returns the *actions* that follow from it. Nothing is awaited between reading and writing this state, so there is
no moment at which it is half true. `Pool` carries the actions out; the tests drive the same calls from a hypothesis
state machine with no process and no trio.

The rules, in the order in which they win:

* A job is handed to a seat once. It goes on to another seat only where it provably did not start, to the front of the
  queue, and at most `target + 1` times.
* Jobs get seats in the order in which they came; a job waits only while no seat has room.
* What to spawn is derived from the seats there are (`_heal`), never from a counter beside them. A slot is a number from
  0 to `target - 1`; a seat holds its slot until it is `vacant`: on its last permitted job, on its way out by plan, or
  gone.
* A successor that is ready before its predecessor has done its last job stands by, so never more than `target` seats
  serve. All in all there are never more than twice as many workers as `target`.
* A worker that died before it did anything for anybody is replaced after a delay that grows (`Restart`); every other at
  once.
"""

import enum
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ._model import WorkerEvent

if TYPE_CHECKING:
    from ._config import Restart
    from ._worker import Worker


class JobState(enum.Enum):
    """Where a job is."""

    WAITING = "waiting for a worker"
    ASSIGNED = "has a worker, nothing written yet"
    WRITTEN = "on the wire"
    DONE = "over"


WAITING: Final = JobState.WAITING
ASSIGNED: Final = JobState.ASSIGNED
WRITTEN: Final = JobState.WRITTEN
DONE: Final = JobState.DONE


class End(enum.Enum):
    """Why a job is over without an answer."""

    CLOSED = "the pool is closed"
    QUEUE_FULL = "too many callers are waiting"
    CRASHED = "its worker is gone"
    RETIRED = "workers asked to be replaced instead of running it"


class Job:
    """One thing a worker is to do: a frame to answer, or a lease (`lease`), which is a worker for itself.

    `bound`: it belongs to the seat it was given and is never handed on (jobs inside a lease, a lease once
    it has been entered, replies nobody wants any more). `patient`: `max_queue` does not count it.
    `proof` and `phase` are set when its worker is gone: whether it started, as far as can be proved, and where it was.
    `bell` is the exchange's: how the job's own task is woken. It says nothing; the truth is in `state`. So is
    `left`, set when a stream that its caller has left early has been read to its end.
    """

    seat: "Seat | None" = None
    state: JobState = WAITING
    end: End | None = None
    bound: bool = False
    patient: bool = False
    hand_ons: int = 0
    queued: float = 0.0
    waited: float = 0.0
    started: float = 0.0
    streaming: bool = False
    proof: bool | None = False
    phase: str = "idle"
    bell: Any = None
    left: Any = None
    rung: bool = False

    def __init__(
        self, frames: Sequence[bytes | memoryview] = (), label: str | None = None, *, lease: bool = False
    ) -> None:
        self.frames = frames
        self.label = label
        self.lease = lease

    def __repr__(self) -> str:
        return f"<{'Lease' if self.lease else 'Job'} {self.label or hex(id(self))}: {self.state.value}>"


class SeatState(enum.Enum):
    """Where a worker's place at the roster is."""

    STARTING = "starting"
    STANDBY = "ready, waiting for its predecessor's last job"
    SERVING = "serving"
    STOPPING = "stopping"
    GONE = "gone"


STARTING: Final = SeatState.STARTING
STANDBY: Final = SeatState.STANDBY
SERVING: Final = SeatState.SERVING
STOPPING: Final = SeatState.STOPPING
GONE: Final = SeatState.GONE


class Seat:
    """A worker's place: how many jobs it takes at a time (`capacity`), which it has, and how far its life has come.

    `begun` counts jobs it was given, `served` those it answered; `worked` says that one ended with it, `cancelled`
    which it is killed for. `vacant`: its slot may be given to a successor. `leaving`: why it goes when its jobs are
    done. `planned`: we ended it, or asked it to end.
    """

    worker: "Worker"
    ending: Any = None
    fault: BaseException | str | None = None

    def __init__(self, slot: int, capacity: int, limit: int, now: float) -> None:
        self.slot = slot
        self.capacity = capacity
        self.limit = limit
        self.state = STARTING
        self.jobs: deque[Job] = deque()
        self.lease: Job | None = None
        self.begun = 0
        self.served = 0
        self.worked = False
        self.cancelled: Job | None = None
        self.vacant = False
        self.leaving = ""
        self.planned = False
        self.reason = ""
        self.ready_at: float | None = None
        self.announced = False
        self.destructed = False
        self.changed = now

    @property
    def spent(self) -> bool:
        """Whether it has begun the last job it is permitted."""
        return 0 < self.limit <= self.begun

    def __repr__(self) -> str:
        leased = ", leased" if self.lease else ""
        return f"<Seat {self.slot}: {self.state.value}, {len(self.jobs)} of {self.capacity} jobs{leased}>"


class Begin(NamedTuple):
    """Write the job to its seat's worker, and wake its task."""

    job: Job


class Wake(NamedTuple):
    """The job's state has changed without its task: let it look."""

    job: Job


class Spawn(NamedTuple):
    """Start a worker for the seat."""

    seat: Seat


class Retire(NamedTuple):
    """Send the stop frame; kill after `destroy_timeout`."""

    seat: Seat


class Kill(NamedTuple):
    """Kill the worker's process group: at once, or (`grace`) after a moment in which it may end by itself."""

    seat: Seat
    grace: bool = False


class Emit(NamedTuple):
    """Tell observers and the log."""

    event: WorkerEvent
    seat: Seat
    context: Any = None


class GiveUp(NamedTuple):
    """Too many boots in a row have failed."""

    seat: Seat


class Drained(NamedTuple):
    """The last seat is gone and no other will come."""


Action = Begin | Wake | Spawn | Retire | Kill | Emit | GiveUp | Drained
Actions = Sequence[Action]
NOTHING: Final[Actions] = ()


class Phase(enum.IntEnum):
    """Where the pool's own life is."""

    OPEN = 0
    CLOSING = 1
    """No new jobs; those accepted are still done, by replacements if need be."""
    ENDING = 2
    """No jobs left; the workers are being stopped."""
    ABORTED = 3
    """The workers are being killed."""


class Roster:
    """Who works, who waits, and what follows from what happens."""

    def __init__(
        self,
        target: int,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        restart: "Restart",
        max_executions: int = 0,
        max_queue: int | None = None,
        capacity: int = 1,
        latest_first: bool = False,
        rng: random.Random | None = None,
    ) -> None:
        self.target = target
        self.seats: list[Seat] = []
        self.phase = Phase.OPEN
        self.outcomes: Counter[str] = Counter()
        self.exits: Counter[str] = Counter()
        self.starts: Counter[int] = Counter()
        self.failed_starts = 0
        self.failed_in_a_row = 0
        self._clock = clock
        self._wall = wall
        self._restart = restart
        self._limit = max_executions
        self._max_queue = max_queue
        self._capacity = capacity
        self._latest_first = latest_first
        self._rng = rng or random.Random()
        self._free: OrderedDict[Seat, None] = OrderedDict()
        self._waiting: OrderedDict[Job, None] = OrderedDict()
        self._failures: dict[int, int] = {}
        self._retry_at: dict[int, float] = {}

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

    def next_deadline(self) -> float:
        """When `tick` has something to do."""
        if not self._retry_at or not self._may_spawn():
            return float("inf")
        held = self._held()
        return min((at for slot, at in self._retry_at.items() if slot not in held), default=float("inf"))

    # the way of a job

    def submit(self, job: Job) -> Actions:
        """Take a job. With room it gets its seat now (`ASSIGNED`), else it waits, or is over with `job.end` set."""
        if self.phase is not Phase.OPEN:
            return self._over(job, End.CLOSED)
        if not self._waiting and (seat := self._find_seat(job)) is not None:
            del self._free[seat]
            return self._give(job, seat)
        if self._max_queue is not None and not job.patient and self._waits_impatiently(self._max_queue):
            return self._over(job, End.QUEUE_FULL)
        job.queued = self._clock()
        self._waiting[job] = None
        return NOTHING

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
        return NOTHING

    def written(self, job: Job) -> None:
        """Note that the first bytes of an assigned job are on the wire."""
        job.state = WRITTEN

    def replied(self, seat: Seat, job: Job, dirt: BaseException | str | None = None) -> Actions:
        """Take note of a job's whole outcome; `dirt` says why the line can't carry another job."""
        job.state = DONE
        seat.jobs.remove(job)
        self._has_served(seat)
        if dirt is not None:
            return self.suspect(seat, dirt)
        return self._make_room(seat)

    def stop_requested(self, seat: Seat, job: Job, dirt: BaseException | str | None = None) -> Actions:
        """A worker asks to be replaced instead of running the job: the job goes on, the worker goes."""
        seat.jobs.remove(job)
        seat.begun -= 1
        self._free.pop(seat, None)
        actions: list[Action] = []
        if not seat.served and not seat.lease and dirt is None and seat.state is SERVING:
            self._back_off(seat)  # it came up only to ask to be replaced: not a reason to spin
        self._hand_on([job], actions, End.RETIRED)
        actions.extend(self.retire(seat, "stop request") if dirt is None else self.suspect(seat, dirt))
        return actions

    def refused(self, seat: Seat, job: Job, why: BaseException | str) -> Actions:
        """The line could not even begin the job: the job goes on, the worker is suspect."""
        seat.jobs.remove(job)
        seat.begun -= 1
        self._free.pop(seat, None)
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
            # A lease that needed a whole worker may have held back jobs that do not.
            return [*self._serve(), *self._after_departure()]
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
        self._free.pop(seat, None)
        actions: list[Action] = []
        self._hand_on(back, actions, End.CRASHED)
        actions.extend(self._make_room(seat))
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
        seat.announced = True
        seat.ready_at = self._clock()
        seat.changed = self._wall()
        actions: list[Action] = [Emit(WorkerEvent.CREATED, seat)]
        if any(other.slot == seat.slot and other.state is SERVING for other in self.seats):
            seat.state = STANDBY
        else:
            seat.state = SERVING
            actions.extend(self._make_room(seat))
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
        seat.leaving = seat.leaving or reason
        seat.vacant = True
        self._free.pop(seat, None)
        actions: list[Action] = []
        if not seat.jobs:
            self._stop(seat, actions)
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
        early = seat.state is STARTING or not seat.announced
        seat.state = GONE
        seat.ending = ending
        seat.changed = self._wall()
        self.seats.remove(seat)
        self._free.pop(seat, None)
        actions: list[Action] = []
        going_on: list[Job] = []
        for job in list(seat.jobs):
            if job in done:
                job.state = DONE
                self._has_served(seat)
            elif job in fresh and not job.bound and self.phase is not Phase.ABORTED:
                going_on.append(job)
                seat.begun -= 1
                continue
            else:
                seat.worked = True
                self._over(job, End.CLOSED if self.phase is Phase.ABORTED else End.CRASHED)
            actions.append(Wake(job))
        seat.jobs.clear()
        if seat.lease is not None:
            lease, seat.lease = seat.lease, None
            if lease.bound or self.phase is Phase.ABORTED:
                self._over(lease, End.CLOSED if self.phase is Phase.ABORTED else End.CRASHED)
                actions.append(Wake(lease))
            else:
                going_on.append(lease)
        self._account_for_end(seat, early, actions)
        self._hand_on(going_on, actions, End.CRASHED)
        if self.phase is not Phase.ABORTED and self._must_give_up():
            actions.append(GiveUp(seat))
            actions.extend(self.abort())
        actions.extend(self._promote(seat.slot))
        actions.extend(self._heal())
        actions.extend(self._after_departure())
        return actions

    def tick(self) -> Actions:
        """Look at the clock: a delay may be over."""
        return self._heal()

    # the end of the pool

    def close(self) -> Actions:
        """Take no more jobs, finish those there are, then stop the workers."""
        if self.phase is Phase.OPEN:
            self.phase = Phase.CLOSING
        return self._after_departure()

    def abort(self) -> Actions:
        """Kill everything. Waiting jobs are over now, running ones when their worker is gone."""
        if self.phase is Phase.ABORTED:
            return NOTHING
        self.phase = Phase.ABORTED
        actions: list[Action] = []
        for job in self._waiting:
            self._over(job, End.CLOSED)
            actions.append(Wake(job))
        self._waiting.clear()
        for seat in self.seats:
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
        return len(self._waiting) >= bound and sum(not job.patient for job in self._waiting) >= bound

    def _give(self, job: Job, seat: Seat) -> Actions:
        """Give a job to a seat that has just been taken out of the free ones."""
        job.seat = seat
        job.state = ASSIGNED
        job.started = self._clock()
        seat.changed = self._wall()
        if job.lease:
            seat.lease = job
            return NOTHING
        seat.jobs.append(job)
        seat.begun += 1
        if seat.spent:
            seat.vacant = True  # its last permitted job: the successor starts now, ahead of the worker's end
            return self._heal()
        if len(seat.jobs) < seat.capacity:
            self._free[seat] = None
        return NOTHING

    def _serve(self) -> Actions:
        """Give waiting jobs to free seats, both in their order."""
        if not self._waiting or not self._free:
            return NOTHING
        actions: list[Action] = []
        while self._waiting and self._free:
            job = next(iter(self._waiting))
            seat = self._find_seat(job)
            if seat is None:
                break
            del self._waiting[job]
            del self._free[seat]
            job.waited += self._clock() - job.queued
            actions.extend(self._give(job, seat))
            actions.append(Begin(job))
        return actions

    def _make_room(self, seat: Seat) -> Actions:
        """See what follows where a seat has room that it had not."""
        seat.changed = self._wall()
        if seat.state is not SERVING:
            return self._after_departure()
        if seat.leaving or (seat.spent and seat.lease is None):
            if seat.jobs:
                return NOTHING
            actions: list[Action] = []
            self._stop(seat, actions)
            actions.extend(self._after_departure())
            return actions
        if seat.lease is not None:
            return NOTHING
        if seat not in self._free:
            self._free[seat] = None
        if self._waiting:
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
        if seat.spent:
            return self.retire(seat, "max_executions")
        return self._make_room(seat)

    def _hand_on(self, jobs: list[Job], actions: list[Action], end: End) -> None:
        """Put jobs that did not start back to the front of the queue, in their order.

        `end` is for those that have gone on too often.
        """
        for job in reversed(jobs):
            if job.bound or job.hand_ons > self.target or self.phase is Phase.ABORTED:
                self._over(job, End.CLOSED if self.phase is Phase.ABORTED else end)
            else:
                job.hand_ons += 1
                job.state = WAITING
                job.seat = None
                job.queued = self._clock()
                self._waiting[job] = None
                self._waiting.move_to_end(job, last=False)
            actions.append(Wake(job))
        if jobs:
            actions.extend(self._serve())
            actions.extend(self._heal())  # a closing pool starts workers only for jobs that wait

    def _has_served(self, seat: Seat) -> None:
        seat.served += 1
        if self._failures or self.failed_in_a_row:
            self._failures.pop(seat.slot, None)
            self.failed_in_a_row = 0

    def _take_out(self, seat: Seat, actions: list[Action]) -> None:
        """Give it nothing more. Who stands by takes over; else its slot is held until it is known what it died of."""
        self._free.pop(seat, None)
        seat.state = STOPPING
        seat.changed = self._wall()
        lease = seat.lease
        if lease is not None and not lease.bound:
            seat.lease = None  # nobody has entered it yet
            self._hand_on([lease], actions, End.CRASHED)
        actions.extend(self._promote(seat.slot))

    def _stop(self, seat: Seat, actions: list[Action]) -> None:
        seat.planned = True
        seat.reason = seat.leaving or "max_executions"
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
                    actions.extend(self._make_room(seat))
                    break
        return actions

    def _account_for_end(self, seat: Seat, early: bool, actions: list[Action]) -> None:
        """Tell of a worker's end, and find out what its slot has to wait for."""
        if early:
            self.exits["boot failed" if not seat.planned else seat.reason] += 1
            if not seat.planned:
                self.failed_starts += 1
                self.failed_in_a_row += 1
                self._back_off(seat)
                actions.append(Emit(WorkerEvent.ERROR, seat))
            return
        if not seat.planned:
            seat.reason = seat.reason or "crashed"
            if not seat.served and not seat.worked:
                self._back_off(seat)
            else:
                self._failures.pop(seat.slot, None)
                self.failed_in_a_row = 0
            if not seat.destructed:
                actions.append(Emit(WorkerEvent.ERROR, seat))
        self.exits[seat.reason] += 1
        self._destruct(seat, actions)

    def _back_off(self, seat: Seat) -> None:
        """Make the slot's next start wait: longer after each death that helped nobody."""
        now = self._clock()
        restart = self._restart
        if seat.ready_at is not None and now - seat.ready_at >= restart.stable_after:
            self._failures.pop(seat.slot, None)
            self.failed_in_a_row = 0
        failures = self._failures[seat.slot] = self._failures.get(seat.slot, 0) + 1
        if any(other.slot == seat.slot and not other.vacant for other in self.seats if other is not seat):
            return  # its successor is there already; what that one dies of is another matter
        try:
            delay = min(restart.initial * restart.factor ** (failures - 1), restart.maximum)
        except OverflowError:
            delay = restart.maximum
        self._retry_at[seat.slot] = now + delay * (1 + restart.jitter * self._rng.uniform(-1, 1))

    def _must_give_up(self) -> bool:
        limit = self._restart.give_up_after
        return limit is not None and self.failed_in_a_row >= limit

    def _held(self) -> set[int]:
        return {seat.slot for seat in self.seats if not seat.vacant}

    def _may_spawn(self) -> bool:
        """Whether there is use for another worker, and a place."""
        wanted = self.phase is Phase.OPEN or (self.phase is Phase.CLOSING and bool(self._waiting))
        return wanted and len(self.seats) < 2 * self.target

    def _heal(self) -> Actions:
        """Spawn what is missing: derived from the seats there are."""
        if not self._may_spawn():
            return NOTHING
        held = self._held()
        if len(held) >= self.target:
            return NOTHING
        now = self._clock()
        room = 2 * self.target - len(self.seats)
        actions: list[Action] = []
        for slot in range(self.target):
            if room <= 0:
                break
            if slot in held or self._retry_at.get(slot, now) > now:
                continue
            self._retry_at.pop(slot, None)
            seat = Seat(slot, self._capacity, self._limit, self._wall())
            self.seats.append(seat)
            self.starts[slot] += 1
            room -= 1
            actions.append(Spawn(seat))
        return actions

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
