"""The way of a job, in its caller's own task: get a worker, see the job through, end.

`see_through` is the only exchange there is. It starts from any half-state a job can be in (waiting, given a worker,
written in part by somebody else, written whole, over) and goes on from there, so it does not matter who wrote first: an
`exec` that found a worker free wrote its own job, one that waited finds it written by whoever took the reply before it
(`begin`, called from the pool's `_carry_out`). `exec`, streams, leases, single workers and maps all go through it.

Whoever reads a whole outcome settles it in one synchronous block (`_settle`): the roster gives the seat's next job its
place, `begin` writes that job, its task is woken. Whoever sees the end of a relay, or garbage, decides nothing: it
reports the worker as suspect and waits until the worker's own task has told how it ended.

Rings. A task that waits for news of its job sleeps (`_sleep`), and whoever changes the job's state wakes it (`ring`). A
ring is a mere wake-up, and lost on who is awake; the truth is in `job.state`, which is looked at before each sleep. So
a deadline or a cancel that comes in the same pass as a worker loses nothing: whatever exception came first, what
happens next is decided by the state (`abandon`).
"""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from threading import get_ident
from types import TracebackType
from typing import Any, Final, Generic, NoReturn, Self, TypeVar

import attrs
import trio

from ._codec import Answer, Codec
from ._config import Config
from ._conversation import Event, Failed, Part, Replied, StopAsked
from ._errors import (
    AllocateTimeout,
    JobError,
    JobTimeout,
    RelayError,
    SpawnError,
    WorkerCrashed,
    WorkerError,
    WorkersError,
    how_it_ended,
)
from ._goridge import PIPE_BUF, FrameError
from ._relay import Line, LineEnded
from ._roster import Roster
from ._seats import (
    ASSIGNED,
    DONE,
    GONE,
    NEVER,
    NOTHING,
    STOPPING,
    WAITING,
    WRITTEN,
    Actions,
    End,
    Excess,
    Job,
    Seat,
)

_log = logging.getLogger("trio_workers.pool")

MIB: Final = 1024 * 1024

T = TypeVar("T")
E = TypeVar("E", bound=WorkerError)

LONGEST_LABEL: Final = 100
"""Characters of a job's label that an error or a log line shows."""

LEFT_ALONE: Final = 0.5
"""Seconds that a job which nobody waits for any more may take once its turn has come, at least: it had been written
into its worker's line, where jobs take microseconds, and those behind it would be lost with the worker."""

FEW: Final = 4
"""Below so many waiting jobs each is written into its line at once; else at the end of the pass, with others."""

Outcome = Replied | Failed | Part


@attrs.frozen
class Ending:
    """How a worker's process ended."""

    returncode: int | None
    stderr: str = ""


class Exchange:
    """Takes jobs through the pool."""

    def __init__(
        self,
        roster: Roster,
        carry_out: Callable[[Actions], None],
        background: Callable[..., None],
        explain: Callable[[Job], Exception],
        failure: Callable[[Failed], Exception],
        config: Config,
    ) -> None:
        self._roster = roster
        self._carry_out = carry_out
        self._background = background
        self._explain = explain
        self.failure = failure
        self.config = config
        self.tell: Callable[[Job, str, int], None] | None = None
        """Called with each job that has ended, and how many calls of it, where somebody wants to know."""
        self._settling = self._lend_behind = False
        self._unflushed: list[Line] = []
        self._flusher: trio.lowlevel.Task | None = None
        self._flush_asked = False
        self._thread = get_ident()

    # a whole job

    @trio.lowlevel.enable_ki_protection
    async def run(self, job: Job, seat: Seat | None = None) -> Replied:
        """Run a job to its reply: on any worker, or on a leased `seat`. Raise what else becomes of it."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if seat is not None and seat.jobs:
            await self.wait_for_leaving(seat)
        self.enter(job, seat)
        try:
            outcome = await self.see_through(job)
        except BaseException as error:
            self.count(job, outcome_of(error))
            self.abandon(job)
            raise
        self.hang_up(job)
        if type(outcome) is Replied:
            self.count(job, "replied")
            return outcome
        self.count(job, "failed")
        if type(outcome) is Failed:
            raise self.failure(outcome)
        self.leave(job)
        raise JobError(b"the worker streams its reply; take it with stream() instead of exec()")

    async def wait_for_leaving(self, seat: Seat) -> None:
        """Wait while a stream that its caller has left early is read to its end; then the worker is free again."""
        while seat.jobs and (left := seat.jobs[0].left) is not None:
            await left.wait()

    def count(self, job: Job, outcome: str, calls: int = 1) -> None:
        """Count a job that has ended, and tell of it; where it is a chunk, so many of its calls."""
        self._roster.outcomes[outcome] += calls
        if self.tell is not None:
            self.tell(job, outcome, calls)

    def outcome_of(self, job: Job) -> str:
        """Name the outcome of a job that is over without an answer."""
        return outcome_of(self._explain(job))

    def enter(self, job: Job, seat: Seat | None = None) -> None:
        """Hand a job in. Raise where it is not taken."""
        if get_ident() != self._thread:
            raise RuntimeError(
                "this pool belongs to the trio.run of another thread; from this one use trio.from_thread.run, or open "
                "a pool here"
            )
        roster = self._roster
        if seat is None:
            if not _fits_ahead(job.frames):
                job.alone = True  # whatever the plan is now: a reset may come while it waits
            actions = roster.submit(job)
        else:
            _check_held(seat)
            actions = roster.submit_to(seat, job)
        if actions:
            self._carry_out(actions)
        if job.state is DONE and job.end is not End.CRASHED:
            self.count(job, _ENDS[job.end])
            raise self._explain(job)

    async def wait_for_worker(self, job: Job) -> None:
        """Wait until a job that was handed in has its worker, and begin it. On an error the job is over."""
        try:
            while job.state is WAITING or (job.state is ASSIGNED and not job.lease):
                if job.state is WAITING:
                    await self._wait_turn(job)
                else:
                    self.begin(job)
            if job.state is DONE:
                raise await self._tell_end(job)
        except BaseException as error:
            self.count(job, outcome_of(error))
            self.abandon(job)
            raise

    async def see_through(self, job: Job) -> Outcome:
        """Return the job's next outcome, from whatever half-state it is in; raise what else becomes of it."""
        woken = False
        while True:
            if job.outcome is not None:  # read by the task of the job in front
                outcome: Outcome = job.outcome
                return outcome
            if job.state is ASSIGNED:
                self.begin(job)
                continue
            if job.state is WAITING:
                await self._wait_turn(job)
                woken = True
                continue
            seat = job.seat
            line = None if seat is None else seat.worker.line
            # A job that was over before it had the worker must not take what the one before it left on the line.
            if seat is None or line is None or (job.state is DONE and (job.started == NEVER or not line.has_more)):
                raise await self._tell_end(job)
            try:
                event = None
                if line.has_more:
                    await trio.lowlevel.checkpoint()
                    if _moved_on(job, seat):
                        continue  # another task has been here meanwhile: what is there now may be for others
                    event = line.take()
                if event is None:
                    if job.state is not WRITTEN or job.seat is not seat:
                        line.forget()  # it died meanwhile, in the middle of a frame
                        continue
                    if woken and line.whole:
                        woken = False
                        event = line.read()  # written before we were woken, so it may have been answered meanwhile
                    if event is None:
                        event = await self._next_event(job, line)
                        if event is None:
                            continue
            except (LineEnded, OSError) as error:
                await self._suspect(job, seat, str(error) or "it closed its relay", grace=True)
                continue
            except FrameError as error:
                await self._suspect(job, seat, error, grace=False)
                continue
            except trio.ClosedResourceError:
                if line.relay.closed:
                    await self._wait_for_news(job, seat)
                else:
                    await trio.lowlevel.checkpoint()  # it was woken, to look anew
                continue
            if type(event) is Part:
                job.streaming = True
                return event
            if job.state is not DONE:
                self._settle(job, seat, line, event)
            if type(event) is Replied or type(event) is Failed:
                return event

    async def _tell_end(self, job: Job) -> Exception:
        """Return what to raise for a job that is over; wait for its worker's end, which is part of it."""
        if job.end in (End.CRASHED, End.TIMED_OUT) and job.seat is not None and job.seat.state is not GONE:
            await job.seat.worker.ended.wait()
        return self._explain(job)

    # its parts

    async def _wait_turn(self, job: Job) -> None:
        """Wait until the job is given a worker, or the roster says that `allocate_timeout` is over."""
        while job.state is WAITING:
            if job.late and job.ahead is not None:
                self.take_back(job.ahead)
            if job.late and job.ahead is None:
                break
            await _sleep(job)
        if job.state is WAITING:
            await trio.lowlevel.checkpoint_if_cancelled()  # who is cancelled in the same moment is told that
            error = self._explain(job)
            self._carry_out(self._roster.cancelled(job))
            raise error

    def begin(self, job: Job) -> None:
        """Write a job that has been given a worker, as far as that goes at once."""
        seat = job.seat
        assert seat is not None
        line = seat.worker.line
        assert line is not None
        codec = seat.plan.source.codec
        if job.dialect != codec.dialect:  # it came before a reset, or goes to a worker from before one
            _encode_anew(job, codec)
        why = line.begin(job.frames)
        if why is None:
            if actions := self._roster.written(job):
                self._carry_out(actions)
        else:
            self._carry_out(self._roster.refused(seat, job, line.fault or why))

    def lend(self) -> None:
        """Write jobs that wait into the lines of workers that are at others, as far as the lines take them at once.

        While answers are being settled, when that is done: what has come already can be the answer to none of them.
        """
        if self._settling:
            self._lend_behind = True
            return
        alarm = self._roster.alarm
        while (job := self._roster.lend()) is not None:
            seat = job.ahead
            assert seat is not None
            line, codec = seat.worker.line, seat.plan.source.codec
            assert line is not None
            if job.dialect != codec.dialect:
                _encode_anew(job, codec)
            if job.alone or not line.begin_ahead(job.frames):
                self._carry_out(self._roster.taken_back(seat, [job]))
            elif not line.awaits_flush:
                line.awaits_flush = True
                self._unflushed.append(line)
        if self._roster.alarm < alarm:
            self._carry_out(NOTHING)  # the housekeeper is to be up in time
        if not self._unflushed or self._flush_asked:
            return
        if self._flusher is None or self._roster.waiting < FEW:
            self.flush()
        else:
            self._flush_asked = True
            trio.lowlevel.reschedule(self._flusher)
            self._flusher = None

    async def flush_when_asked(self) -> NoReturn:
        """Sleep, and write what has been lent at the end of each pass. The housekeeper does so until it is cancelled.

        A worker that is woken for one small job after the other costs more than the jobs.
        """
        while True:
            self._flusher = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._stop_flushing)
            self._flush_asked = False
            self.flush()

    def _stop_flushing(self, raise_cancel: object) -> trio.lowlevel.Abort:
        self._flusher = None
        return trio.lowlevel.Abort.SUCCEEDED

    def flush(self) -> None:
        """Write what has been lent to lines, as far as they take it at once."""
        lines, self._unflushed = self._unflushed, []
        for line in lines:
            line.awaits_flush = False
            line.flush_behind()

    def take_back(self, seat: Seat) -> None:
        """Take back what lies in a line and has not been read; where something stays, see how far its worker is."""
        line = seat.worker.line
        if line is None:
            return
        if ids := line.take_back():
            unread = [job for job in seat.jobs if line.is_of(job.frames, ids)]
            self._carry_out(self._roster.taken_back(seat, [job for job in seat.ahead if line.is_of(job.frames, ids)]))
            if unread:  # its worker has read the next one instead, in the same moment
                self._carry_out(self._roster.returned(seat, unread))
                line.relay.wake()
                return
        if seat.ahead and seat.jobs:
            self.look(seat)  # its worker may have read one of them, and then it has answered all before

    def recall(self, seat: Seat) -> None:
        """The job in front takes long: take back what lies behind it, if it has not been answered meanwhile."""
        if not self.look(seat):
            self.take_back(seat)

    def look(self, seat: Seat) -> bool:
        """See, without waiting, whether the job in front has been answered; settle it."""
        line = seat.worker.line
        if line is None or not seat.jobs:
            return False
        head = seat.jobs[0]
        self._look(head)
        if head in seat.jobs:
            return False
        line.relay.wake()
        return True

    async def _next_event(self, job: Job, line: Line) -> Event | None:
        """Wait for the line's next event: one pass of the run loop where the job is written and the reply is small.

        None where another task has read it meanwhile.
        """
        if not line.whole:
            await self._write_while_reading(job, line)
            return line.take() if _is_in_front(job, line) else None
        while True:
            await line.relay.wait_readable()
            if not _is_in_front(job, line):
                return None
            event = line.read()
            if event is not None:
                return event

    async def _write_while_reading(self, job: Job, line: Line) -> None:
        """Write what is unsent while reading: a worker that answers as it reads must not stop us both.

        What is read stays with the line, where others may look until the writing has ended.
        """
        failure: BaseException | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(line.flush)
                try:
                    event: Event | None = None
                    while event is None:
                        await line.relay.wait_readable()
                        if not _is_in_front(job, line):
                            break  # the next event is another's
                        event = line.read()
                    else:
                        line.events.appendleft(event)
                except BaseException as error:
                    failure = error
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:  # Cancelled, or what a user's relay raises of its own
            failure = failure or group.exceptions[0]
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # or this frame and the error hold each other, and so the job, until the collector comes

    async def _suspect(self, job: Job, seat: Seat, why: BaseException | str, *, grace: bool) -> None:
        if job.state is WRITTEN and job.seat is seat:
            self._carry_out(self._roster.suspect(seat, why, grace=grace))
        await self._wait_for_news(job, seat)

    async def _wait_for_news(self, job: Job, seat: Seat) -> None:
        """Wait until the worker's end has been told, and so what becomes of the job."""
        while job.state is WRITTEN and job.seat is seat:
            await _sleep(job)

    def _settle(self, job: Job, seat: Seat, line: Line, event: Event) -> None:
        """Take note of a whole outcome and hand the worker on, in one synchronous block.

        So with what came behind it: the answers to jobs that lay in the line, each for its own task. Who has the worker
        then reads on. Others are lent when all that is done, so an answer too many is left over, and gives the worker
        away.
        """
        settling, self._settling = self._settling, True
        try:
            self._settle_one(job, seat, line, event)
            if seat.jobs:
                if line.has_more:
                    self._settle_behind(seat, line)
                if seat.jobs:
                    self.ring(seat.jobs[0])
        finally:
            self._settling = settling
        if self._lend_behind and not settling:
            self._lend_behind = False
            self.lend()

    def _settle_behind(self, seat: Seat, line: Line) -> None:
        while seat.jobs and line.has_more:
            job = seat.jobs[0]
            try:
                event = line.take()
            except FrameError as error:
                self._carry_out(self._roster.suspect(seat, error))
                return
            if event is None or not _keep(job, line, event):
                return
            self._settle_one(job, seat, line, event)
            self.ring(job)

    def _settle_one(self, job: Job, seat: Seat, line: Line, event: Event) -> None:
        dirt: FrameError | None = None
        if line.is_last and not line.clean:
            if line.conversation.pending:
                dirt = FrameError("it sent more than the job's answer", line.conversation.leftover)
            else:
                dirt = FrameError("it answered before it had read the whole job", b"")
            line.fault = dirt
        if type(event) is StopAsked:
            actions = self._roster.stop_requested(seat, job, dirt)
        else:
            actions = self._roster.replied(seat, job, dirt)
        line.turn(more=bool(seat.jobs))
        if actions:
            self._carry_out(actions)

    # its end

    def abandon(self, job: Job) -> None:
        """The caller has gone, by whatever exception: what becomes of the worker follows from where the job is.

        Waiting: the job leaves the queue. Given a worker, nothing written: the worker goes back. Written: one last
        look, and a whole reply means a clean worker, which stays; else it is killed. What lies behind it in the line is
        taken back before that; where it can't be, the job runs on, and its answer is read behind the caller's back.
        """
        if self._leave_in_line(job):
            return
        if job.state is not DONE:
            self._carry_out(self._roster.cancelled(job))
        self.hang_up(job)

    def _leave_in_line(self, job: Job) -> bool:
        """See whether a job whose caller has gone must be left to its worker, for others' sake."""
        was_left = job.bound
        if job.ahead is not None:
            job.bound = True  # taken back, it goes on nowhere
            self.take_back(job.ahead)
        if job.state is WRITTEN and job.seat is not None and job.seat.ahead:  # also where its turn has just come
            job.bound = True
            self.take_back(job.seat)
        seat = job.seat
        if not job.streaming:
            self._look(job)
        if job.ahead is None and (job.state is not WRITTEN or seat is None or not seat.ahead or was_left):
            return False
        job.bound = True
        self._background(self._read_out, job)
        return True

    def _look(self, job: Job) -> None:
        """See, without waiting, whether the whole answer to a job is there, and settle it."""
        seat = job.seat
        line = None if seat is None else seat.worker.line
        if job.state is not WRITTEN or seat is None or line is None or not line.whole:
            return
        try:
            event = line.take()
            if event is None:
                event = line.read()
        except (LineEnded, FrameError, OSError):
            return
        if event is not None and _keep(job, line, event):
            self._settle(job, seat, line, event)

    def leave(self, job: Job) -> None:
        """The caller wants no more of a reply that is under way: read it out behind its back, keep the worker."""
        if job.state is not WRITTEN:
            self.abandon(job)
            return
        job.bound = True
        job.left = trio.Event()
        self._background(self._read_out, job)

    @trio.lowlevel.enable_ki_protection
    async def _read_out(self, job: Job) -> None:
        """A task of the pool: ask a stream to end, and read to the last frame of an answer that nobody waits for.

        A stream has `destroy_timeout` for that. So has a job that was left in a line, from the moment its turn came,
        but `LEFT_ALONE` at least: others lie behind it.
        """
        try:
            # Shielded, as all that ends workers is: this ends by itself, and at the latest with the worker.
            with trio.CancelScope(shield=True) as scope:
                time = self.config.destroy_timeout
                if job.left is None:
                    if job.state is WAITING:
                        await self._wait_turn(job)
                    time = max(time, LEFT_ALONE)
                scope.deadline = trio.current_time() + time
                asked = False
                while job.state is not DONE:
                    line = None if job.seat is None else job.seat.worker.line
                    if job.streaming and not asked and line is not None:
                        line.stop_stream()
                        asked = True
                    await self.see_through(job)
        except (WorkersError, trio.ClosedResourceError):
            pass  # the worker's end has been told already, and nobody waits for this job
        except Exception:  # two tasks in one stream, or a relay of the user's own
            seat = job.seat
            slot, pid = (None, None) if seat is None else (seat.slot, seat.worker.pid)
            about = {"pool": self.config.name, "slot": slot, "pid": pid, "reason": ""}
            _log.exception(
                "a stream that was left early could not be read to its end; its worker is killed", extra=about
            )
        finally:
            self.abandon(job)
            if job.left is not None:
                job.left.set()

    def hang_up(self, job: Job) -> None:
        """Let go of what a job that is over has: its frames, which may be large."""
        job.frames = ()
        job.payload = None

    def ring(self, job: Job) -> None:
        """Wake the job's task, if it sleeps."""
        task = job.sleeper
        if task is not None:
            job.sleeper = None
            trio.lowlevel.reschedule(task)


async def _sleep(job: Job) -> None:
    """Sleep until somebody rings: there may be news of the job."""

    def wake_up(raise_cancel: object) -> trio.lowlevel.Abort:
        job.sleeper = None
        return trio.lowlevel.Abort.SUCCEEDED

    job.sleeper = trio.lowlevel.current_task()
    await trio.lowlevel.wait_task_rescheduled(wake_up)


def _keep(job: Job, line: Line, event: Event) -> bool:
    """Keep what was read for a job by another task than its own; False where that is no whole outcome yet."""
    if type(event) is Part:
        line.events.appendleft(event)
        return False
    if type(event) is not StopAsked:
        job.outcome = event
    return True


def _fits_ahead(frames: Sequence[bytes | memoryview]) -> bool:
    return len(frames) == 1 and len(frames[0]) <= PIPE_BUF


def _encode_anew(job: Job, codec: Codec) -> None:
    """Encode a job for another wire, in which it may be larger."""
    job.frames, job.dialect = codec.encode_anew(job.payload), codec.dialect
    if not _fits_ahead(job.frames):
        job.alone = True


def _is_in_front(job: Job, line: Line) -> bool:
    return job.state is WRITTEN and job.seat is not None and job.seat.worker.line is line


def _moved_on(job: Job, seat: Seat) -> bool:
    return job.outcome is not None or job.seat is not seat or job.state is WAITING


def _check_held(seat: Seat) -> None:
    if seat.state is STOPPING or seat.state is GONE:
        return  # what became of it is said by `Roster.submit_to`
    if seat.lease is None:
        raise trio.BusyResourceError(
            "this worker belongs to its pool; use Pool.exec, or Pool.lease to have one to yourself"
        )
    if seat.jobs:
        raise trio.BusyResourceError("another task has a job on this worker")


class Parts(Generic[T]):
    """The reply of one job, part by part: an async iterator, inside its `async with`.

    The worker is held back by the relay while nobody asks for the next part. Leaving by `break`, return or an error
    asks the worker to end the stream, and the pool reads on to its last frame within `destroy_timeout`, so that the
    worker stays. Leaving by a cancel kills the worker. Cancelling `__anext__` alone loses no part.
    """

    _exchange: Exchange
    _job: Job
    _seat: Seat | None
    _decode: Callable[[Answer], T]
    _over: bool
    _entered: bool

    def __init__(self) -> None:
        raise TypeError("Parts has no public constructor; it comes from stream()")

    @classmethod
    def _create(
        cls, exchange: Exchange, job: Job, decode: Callable[[Answer], T], seat: Seat | None = None
    ) -> "Parts[T]":
        self: Parts[T] = object.__new__(cls)
        self._exchange = exchange
        self._job = job
        job.alone = True
        self._seat = seat
        self._decode = decode
        self._over = False
        self._entered = False
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("a stream can be entered only once; call stream() again for another job")
        self._entered = True
        await trio.lowlevel.checkpoint()
        if self._seat is not None and self._seat.jobs:
            await self._exchange.wait_for_leaving(self._seat)
        self._exchange.enter(self._job, self._seat)
        await self._exchange.wait_for_worker(self._job)
        return self

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    @trio.lowlevel.enable_ki_protection
    async def __anext__(self) -> T:
        """Return the next part. Raise `JobError` or `WorkerError` where the stream ends with one."""
        if not self._entered:
            raise RuntimeError(
                "a stream must be entered: async with pool.stream(...) as parts: async for part in parts"
            )
        if self._over:
            await trio.lowlevel.checkpoint()
            raise StopAsyncIteration
        try:
            outcome = await self._exchange.see_through(self._job)
        except (WorkersError, trio.ClosedResourceError) as error:
            self._end(outcome_of(error))
            raise
        if type(outcome) is Part:
            return self._decode(outcome)
        self._end("failed" if type(outcome) is Failed else "replied")
        if type(outcome) is Failed:
            raise self._exchange.failure(outcome)
        assert type(outcome) is Replied
        if outcome.streamed and not outcome.body and not outcome.context:
            raise StopAsyncIteration  # a mere end
        return self._decode(outcome)

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        job = self._job
        if error is None or isinstance(error, Exception):
            self._end("replied" if job.end is None else self._exchange.outcome_of(job))
            self._exchange.leave(job)
        else:
            self._end("cancelled")
            self._exchange.abandon(job)

    def _end(self, outcome: str) -> None:
        if not self._over:
            self._over = True
            self._exchange.count(self._job, outcome)


def explain_end(job: Job) -> WorkersError:
    """Say what became of a job whose worker is gone, or was handed on too often."""
    seat = job.seat
    assert seat is not None
    ending = seat.ending if isinstance(seat.ending, Ending) else Ending(None)
    what = named(job)
    if job.end is End.NOT_BOOTED and isinstance(seat.fault, SpawnError):
        return seat.fault
    if isinstance(seat.fault, Excess) and seat.fault.job is job:
        return explain_timeout(seat, job, seat.fault, ending.stderr)
    if job.end is End.RETIRED:
        again = "the worker asked" if job.bound else f"{job.hand_ons + 1} workers in a row asked"
        return WorkerError(
            f"{again} to be replaced instead of running {what}; it did not start, so a retry is safe",
            pid=seat.worker.pid, slot=seat.slot, stderr=ending.stderr, phase="retiring", started=False,
            returncode=ending.returncode,
        )  # fmt: skip
    return describe(seat, ending, phase=job.phase, what=what, started=job.proof)


def explain_timeout(seat: Seat, job: Job, excess: Excess, stderr: str) -> JobTimeout:
    """Say that a job took too long, and what became of its worker."""
    who, limit = f"worker {seat.worker.pid} (slot {seat.slot})", f"exec_ttl ({excess.bound:g} s)"
    if job.phase == "writing":
        what = f"{who} did not read {named(job)} to its end within {limit}, and was killed."
    else:
        what = f"{named(job)} ran for longer than {limit} on {who}, which was killed."
    return JobTimeout(
        what + _next_step(job.proof),
        pid=seat.worker.pid,
        slot=seat.slot,
        stderr=stderr,
        started=job.proof,
    )


def judge(seat: Seat, line: Line, *, dead: bool) -> None:
    """Note how far a worker has come with what it has, and once it is dead with what lay in its line, as that shows."""
    jobs = [*seat.jobs, *seat.ahead]
    unread = line.unread_jobs([sum(map(len, job.frames)) for job in jobs]) if seat.ahead else []
    for place, job in enumerate(jobs if dead else list(seat.jobs)):
        started = line.started
        in_front = place < len(seat.jobs)
        if unread and not (in_front and line.answered):
            # Those behind the one in front may have been read ahead by the program itself, and not begun.
            proved = in_front or seat.plan.recalls
            started = False if unread[place] else True if unread[place] is False and proved else None
        _judge(seat, line, job, started, dead=dead)


def _judge(seat: Seat, line: Line, job: Job, started: bool | None, *, dead: bool) -> None:
    job.proof = started
    # Written whole and provably not read whole: it was on its way, whatever we wrote.
    on_its_way = job.proof is False or (not line.whole and line.is_last)
    job.phase = "leased" if seat.lease else "writing" if on_its_way else "streaming" if job.streaming else "running"
    if job.proof is False and not dead:
        job.proof = None  # what is unread now may still be read


def describe_end(seat: Seat, ending: Ending) -> WorkerError:
    """Build the error for a worker that is gone, whatever it was doing."""
    for job in seat.jobs:
        return describe(seat, ending, phase=job.phase, what=named(job), started=job.proof)
    return describe(seat, ending, phase="idle")


def named(job: Job) -> str:
    """Name a job in a sentence: "a job", or "the job" with its label, cut where that is long."""
    label = job.label
    if label is None:
        return "a job"
    return f"the job {label if len(label) <= LONGEST_LABEL else label[:LONGEST_LABEL] + '...'!r}"


def describe(seat: Seat, ending: Ending, *, phase: str, what: str = "", started: bool | None = False) -> WorkerError:
    """Build the error for a worker that is gone: who, where, how, its last words, and what next."""
    worker = seat.worker
    who = f"worker {worker.pid} (slot {seat.slot})"
    doing = {
        "idle": f"before {what} came to it" if what else "while it was idle",
        "writing": f"while {what} was being written to it",
        "running": f"while it ran {what}",
        "streaming": f"in the middle of its streamed reply to {what}",
        "leased": f"while it ran {what} for its holder" if what else "while it was leased",
        "retiring": "while it was being stopped",
    }.get(phase, f"({phase})")

    def error(kind: type[E], text: str) -> E:
        return kind(
            f"{who} {text}{_next_step(started) if what else ''}",
            pid=worker.pid,
            slot=seat.slot,
            returncode=ending.returncode,
            stderr=ending.stderr,
            phase=phase,
            started=started,
        )

    fault = seat.fault
    if isinstance(fault, Excess) and fault.limit == "hard_memory":
        phase = "memory"
        # A bound below 1 MiB was meant in another unit: so show what it is in bytes.
        unit, name = (MIB, "MiB") if fault.bound >= MIB else (1, "bytes")
        used, bound = f"{fault.figure / unit:.0f} {name}", f"{fault.bound / unit:.0f} {name}"
        text = f"used {used} of memory, more than hard_memory ({bound}), {doing}, and was killed."
        return error(WorkerError, text)
    how = how_it_ended(ending.returncode)
    if isinstance(fault, BaseException):
        first = fault.received[:1] if isinstance(fault, FrameError) else b""
        stray = worker.line is not None and first.isascii() and first.isalpha()
        hint = f" {worker.line.conversation.stray}" if stray and worker.line is not None else ""
        still = ending.returncode is None and seat.ending is None
        now = "is being killed" if still else how
        return error(RelayError, f"broke the protocol {doing}: {fault}.{hint} It {now}.")
    if isinstance(fault, str) and seat.reason == "closed its relay":
        return error(WorkerCrashed, f"closed its relay without ending, and was killed, {doing}.")
    if seat.planned and seat.reason:
        how += f" ({seat.reason})"
    elif worker.killed:
        how += f" by the pool ({seat.reason})"
    elif ending.returncode == -9:
        how += f" ({_NOT_OURS})"
    elif ending.returncode == 0 and what:
        how += f" ({_LEFT_BY_ITSELF})"
    return error(WorkerCrashed, f"{how} {doing}.")


_NOT_OURS: Final = "the pool did not send it; the kernel's out-of-memory killer may have, and says so in its log"
_LEFT_BY_ITSELF: Final = "it left by itself, without an answer: does it call exit, or take this job's body for its end?"


def _next_step(started: bool | None) -> str:
    if started is False:
        return " The job had not started: a retry is safe."
    if started:
        return " The job had started: retry only if running it twice does no harm."
    return " Nobody can know whether the job had started: retry only if running it twice does no harm."


def outcome_of(error: BaseException) -> str:
    """Name what a job ends with, as it is counted."""
    if type(error) is WorkerError and error.phase == "memory":
        return "memory"
    return _OUTCOMES.get(type(error), "cancelled")


_OUTCOMES: Final[dict[type[BaseException], str]] = {
    AllocateTimeout: "allocate_timeout",
    WorkerCrashed: "crashed",
    RelayError: "relay_error",
    WorkerError: "retired",
    JobTimeout: "job_timeout",
    SpawnError: "boot_failed",
    trio.ClosedResourceError: "closed",
}
_ENDS: Final[dict[Any, str]] = {
    End.CLOSED: "closed",
    End.QUEUE_FULL: "queue_full",
    End.CRASHED: "crashed",
    End.RETIRED: "retired",
}
