"""What the roster speaks of: jobs, seats, plans, and the actions it may ask for. Plain data, no decisions."""

import enum
import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import attrs

from ._model import WorkerEvent

if TYPE_CHECKING:
    from ._config import Limits, Restart
    from ._worker import Worker


NEVER: Final = -math.inf


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
    TIMED_OUT = "it ran for longer than exec_ttl"
    NOT_BOOTED = "the process that was started for it did not boot"
    RETIRED = "workers asked to be replaced instead of running it"


class Job:
    """One thing a worker is to do: a frame to answer, or a lease (`lease`), which is a worker for itself.

    `bound`: it belongs to the seat it was given and is never handed on (jobs inside a lease, a lease once
    it has been entered, replies nobody wants any more). `patient`: `max_queue` does not count it.
    `proof` and `phase` are set when its worker is gone: whether it started, as far as can be proved, and where it was.
    `queued` is when it last began to wait, `waited` for how long it had before, `handed_in` when it came, if it had to
    wait at all. `reserved`: with `debug`, the seat that comes up for it. `unhurried`: it waits on while workers serve.
    `dialect` is the wire its `frames` are in; `payload` is what they are made of, where they may have to be made anew.
    `slack`: seconds that it may take beyond `exec_ttl`, for it is a chunk, and what is bounded is its last call.
    `sleeper` is the exchange's: the job's own task, while it sleeps. So is `left`, set when a stream that its caller
    has left early has been read to its end.

    `ahead`: the seat in whose line the job lies ahead of its turn, while it waits. `alone`: it never does (a stream, a
    lease, a chunk, what is too large), and nothing lies behind it. `outcome` is what another job's task has read for
    it.
    `late_at`: until when it may wait, and `late` says that it has.
    """

    seat: "Seat | None" = None
    state: JobState = WAITING
    end: End | None = None
    bound: bool = False
    patient: bool = False
    hand_ons: int = 0
    queued: float = 0.0
    waited: float = 0.0
    started: float = NEVER
    streaming: bool = False
    proof: bool | None = False
    phase: str = "idle"
    sleeper: Any = None
    left: Any = None
    handed_in: float = NEVER
    reserved: "Seat | None" = None
    unhurried: bool = False
    slack: float = 0.0
    payload: Any = None
    ahead: "Seat | None" = None
    alone: bool = False
    outcome: Any = None
    late_at: float = math.inf
    late: bool = False

    def __init__(
        self,
        frames: Sequence[bytes | memoryview] = (),
        label: str | None = None,
        *,
        lease: bool = False,
        dialect: str = "",
    ) -> None:
        self.frames = frames
        self.label = label
        self.lease = lease
        self.dialect = dialect

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
    which it is killed for. `vacant`: its slot may be given to a successor. `due`: why it should be replaced, and
    `relief`: its successor has been asked for, and it serves on until that is ready. `leaving`: why it goes when its
    jobs are done, or (`at_once` False) also the lease. `planned`: we ended it, or asked it to end. `reserved`: with
    `debug`, the job that it comes up for.

    Times are on the roster's clock: `spawned_at`, `ready_at`, `expires_at` (its `ttl`), `free_since`, `begun_at` (its
    last job). `pace` is the mean time between the starts of two jobs, of late. `memory`: bytes, as last read.

    `ahead` are the jobs that lie in its line behind the one it has, `depth` is how many may, and `took` the mean time
    of its jobs, of late. A worker takes them in their order, so whose turn it is follows from the replies. At
    `recall_at` they are taken back, and none are lent any more while its job `is_slow`. `looked_at`: the job whose time
    is over, and whose answer has been looked for once more.
    """

    worker: "Worker"
    ending: Any = None
    fault: "BaseException | Excess | str | None" = None
    due: str = ""
    relief: bool = False
    at_once: bool = False
    reserved: Job | None = None
    expires_at: float = math.inf
    free_since: float = 0.0
    begun_at: float = 0.0
    pace: float = math.inf
    memory: int = 0
    readings_above: int = 0
    took: float = math.inf
    recall_at: float = math.inf
    is_slow: bool = False
    looked_at: Job | None = None

    def __init__(self, slot: int, capacity: int, limit: int, plan: "Plan", now: float, wall: float) -> None:
        self.slot = slot
        self.capacity = capacity
        self.limit = limit
        self.plan = plan
        self.exec_ttl = _or_never(plan.limits.exec_ttl)
        self.idle_ttl = _or_never(plan.limits.idle_ttl)
        self.spawned_at = now
        self.state = STARTING
        self.jobs: deque[Job] = deque()
        self.ahead: deque[Job] = deque()
        self.depth = 0 if plan.recalls else plan.read_ahead - 1
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
        self.changed = wall

    @property
    def spent(self) -> bool:
        """Whether it has begun the last job it is permitted."""
        return 0 < self.limit <= self.begun

    def __repr__(self) -> str:
        leased = ", leased" if self.lease else ""
        return f"<Seat {self.slot}: {self.state.value}, {len(self.jobs)} of {self.capacity} jobs{leased}>"


def _or_never(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


class Excess(NamedTuple):
    """What a worker was killed for: more of something than a limit allows."""

    limit: str
    """The name of the limit: exec_ttl or hard_memory."""
    figure: float
    bound: float
    job: Job | None = None
    """The job that took too long."""


@attrs.frozen(kw_only=True, eq=False)
class Plan:
    """What workers are made of, and the rules for them; a `reset` makes a new one. See `Config` for the fields.

    `read_ahead`: how many jobs may be on the way to a worker. `recalls`: those it has not read can be taken back, and
    how many there are follows from the time that jobs take. `source` is the pool's own affair: the command, the
    factory, the wire.
    """

    restart: "Restart"
    limits: "Limits"
    max_executions: int = 0
    max_queue: int | None = None
    max_workers: int | None = None
    grow_after: float = 0.1
    allocate_timeout: float = math.inf
    debug: bool = False
    read_ahead: int = 1
    recalls: bool = False
    source: Any = None


@attrs.define(eq=False)
class Change:
    """A `reset` or `resize` under way; a second one joins the first, and both end as one.

    `plan`, `size` and `target` are what the pool had before, and goes back to when the new can't boot. `slots` are
    those in which the new has not come up yet. `failed`: the seat whose boot it failed for. `bell` is the pool's.
    """

    plan: Plan
    size: int
    target: int
    new_size: int
    sized: bool
    slots: set[int]
    failed: Seat | None = None
    closed: bool = False
    bell: Any = None


class Begin(NamedTuple):
    """Write the job to its seat's worker, and wake its task."""

    job: Job


class Lend(NamedTuple):
    """Write jobs that wait into the lines of workers at work, as long as `Roster.lend` gives one."""


class TakeBack(NamedTuple):
    """Take back the jobs that lie in the seat's line and have not been read, where the line can do that.

    Where one stays, see whether the one before it has been answered meanwhile.
    """

    seat: Seat


class Recall(NamedTuple):
    """The job in front takes long: see whether it has been answered meanwhile, else take back those behind it."""

    seat: Seat


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


class Settled(NamedTuple):
    """A change is over: done, failed, or the pool is closed."""

    change: Change


class Watch(NamedTuple):
    """There is something new to look at by the clock, sooner than all that was known."""


class Drained(NamedTuple):
    """The last seat is gone and no other will come."""


Action = Begin | Lend | TakeBack | Recall | Wake | Spawn | Retire | Kill | Emit | GiveUp | Settled | Watch | Drained
Actions = Sequence[Action]
NOTHING: Final[Actions] = ()
WATCH: Final[Actions] = (Watch(),)
LEND: Final[Actions] = (Lend(),)


class Phase(enum.IntEnum):
    """Where the pool's own life is."""

    OPEN = 0
    CLOSING = 1
    """No new jobs; those accepted are still done, by replacements if need be."""
    ENDING = 2
    """No jobs left; the workers are being stopped."""
    ABORTED = 3
    """The workers are being killed."""
