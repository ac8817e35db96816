"""The calls of one `PythonPool.map` on their way through the pool: alone, or many in one message (a chunk).

To the pool a chunk is one job. For everybody else it is as many as it has calls: each has its own result or error, is
counted and told of by itself, and is begun at most once. What a chunk does not get to (its worker died, or its calls
were slower than expected) goes back to the map, to be run elsewhere.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import trio

from ._call_line import ID, CallLine
from ._conversation import Failed, Part, Replied
from ._core import PoolCore
from ._errors import JobTimeout, WorkerError
from ._exchange import outcome_of
from ._functions import FunctionCodec, decode
from ._map import Flow, Items
from ._pace import Pace
from ._region import BUDGET, DONE_HEAD, SIZE
from ._seats import WRITTEN, Job

Frames = tuple[bytes | memoryview, ...]

SMALLEST_LIMIT: Final = 2 * SIZE
"""With a smaller `max_frame_size` calls go alone, so that it bounds each of them and no more."""


LOOK_EVERY: Final = 0.01
"""Seconds between two looks at chunks under way: an item that takes longer than most keeps back the results of those
before it in its chunk for no longer than two of these."""


class _UnderWay:
    """A chunk with a worker: whose results are there, up to `at`.

    Those up to `sent_up_to` were sent by the child, which lets the region begin with the next; `seen` bytes of the
    region have been put down already. `begun`: how many items had begun when it was last looked at.
    """

    __slots__ = ("at", "begun", "id", "items", "job", "seen", "sent_up_to")

    def __init__(self, items: Items, job: Job) -> None:
        self.items = items
        self.job = job
        self.id = int.from_bytes(job.frames[0][ID], "little")
        self.at = self.sent_up_to = items.start
        self.seen = 0
        self.begun = 0

    @property
    def end(self) -> int:
        """The index behind its last item."""
        return self.items.start + len(self.items)

    @property
    def missing(self) -> int:
        """How many results are not there."""
        return self.end - self.at


class FunctionRunner:
    """Runs the items of one map as calls of its function."""

    def __init__(self, core: PoolCore, codec: FunctionCodec, function: Callable[..., object], label: str) -> None:
        self._core = core
        self._codec = codec
        self._function = function
        self._label = label
        self.pace = Pace()
        self._together = True
        self._under_way: list[_UnderWay] = []
        self._watching = False

    @property
    def size(self) -> int:
        """How many items the next chunk may have."""
        size = self.pace.size
        if size > 1:
            config = self._core.config
            if not self._together or config.max_executions or config.debug or config.max_frame_size < SMALLEST_LIMIT:
                return 1
        return size

    async def run(self, items: Items, flow: Flow[Any]) -> None:
        """Run items, put down their outcomes, and give back those that it did not get to."""
        start, number = items.start, len(items)
        count, job, rest = self._encode(items)
        known = count + (rest is not None)
        if known < number:
            flow.give_back(items.after(known))
        if job is not None and count > 1:
            await self._run_chunk(items.first(count), job, flow)
        elif job is not None:
            await self._run_alone(start, job, flow)
        if isinstance(rest, Exception):
            await trio.lowlevel.checkpoint()  # a source may have nothing but such items
            flow.put_error(start + count, rest)
        elif rest is not None and flow.has_returned_before(start + count):
            # The chunk was cut short, and what is left of it goes first.
            flow.give_back(items.first(known).after(count))
        elif rest is not None:
            self.pace.alone()
            await self._run_alone(start + count, rest, flow)

    def _encode(self, items: Items) -> tuple[int, Job | None, Job | Exception | None]:
        """Make a job of the first items, and another of the next where that can't be with them, or say why not."""
        if len(items) > 1:
            frames, count, rest = self._codec.encode_calls(self._function, items.columns)
        else:
            try:
                frames, count, rest = self._codec.encode_call(self._function, items.row(0)), 1, None
            except Exception as error:
                frames, count, rest = (), 0, error
        job = self._job(frames) if count else None
        return count, job, self._job(rest) if isinstance(rest, tuple) else rest

    def _job(self, frames: Frames) -> Job:
        job = Job(frames, self._label)
        job.patient, job.unhurried = True, self._core.roster.may_grow
        return job

    async def _run_alone(self, at: int, job: Job, flow: Flow[Any]) -> None:
        try:
            result = decode(await self._core.exchange.run(job), self._function)
        except Exception as error:
            flow.put_error(at, error)
            return
        self.pace.ran_alone(trio.current_time() - job.started, awaited=flow.was_awaited())
        flow.put(at, [result])

    async def _run_chunk(self, items: Items, job: Job, flow: Flow[Any]) -> None:
        exchange = self._core.exchange
        job.slack = BUDGET
        job.alone = True  # the region is for one chunk at a time
        chunk = _UnderWay(items, job)
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            exchange.enter(job)
        except Exception as error:  # the pool is closed
            exchange.hang_up(job)
            exchange.count(job, outcome_of(error), len(items) - 1)
            flow.put_error(items.start, error)
            return
        self._watch(chunk, flow)
        try:
            while type(outcome := await exchange.see_through(job)) is Part:
                job.streaming = False  # to all others it is a job that runs
                self._put(chunk, outcome.body, flow, outcome.buffers)
                chunk.sent_up_to = chunk.at
        except Exception as error:
            exchange.abandon(job)
            self._lose(chunk, error, flow)
            return
        except BaseException:
            self._count_missing(chunk, "cancelled")
            exchange.abandon(job)
            raise
        finally:
            self._under_way.remove(chunk)
        exchange.hang_up(job)
        if type(outcome) is Failed:
            self._count_missing(chunk, "failed")
            for place in range(chunk.at, chunk.end):
                flow.put_error(place, exchange.failure(outcome))
            return
        assert type(outcome) is Replied
        done, _, nanoseconds = DONE_HEAD.unpack_from(outcome.body)
        self.pace.ran(done, nanoseconds / 1e9, awaited=flow.was_awaited())
        self._put(chunk, outcome.body[DONE_HEAD.size :], flow)
        self._note_begun(job, done)
        if not _line_of(job).has_region:
            self._together = False
        if done < len(items):
            flow.give_back(items.after(done))

    def _put(self, chunk: "_UnderWay", body: bytes, flow: Flow[Any], buffers: Sequence[bytes | bytearray] = ()) -> None:
        """Put down results of a chunk, as they are in the region or were sent from there."""
        if buffers:
            values: list[Any] = [None]
            failures: dict[int, Exception] = {}
            try:
                values[0] = decode(Replied(b"", body, False, buffers), self._function)
            except Exception as error:
                failures[0] = error
        else:
            values, failures = self._codec.decode_calls(body[chunk.seen :], self._function)
        chunk.seen = 0
        at, exchange = chunk.at, self._core.exchange
        chunk.at += len(values)
        if len(values) > len(failures):
            exchange.count(chunk.job, "replied", len(values) - len(failures))
        if failures:
            exchange.count(chunk.job, "failed", len(failures))
        flow.put(at, values, failures)

    def _count_missing(self, chunk: "_UnderWay", outcome: str) -> None:
        """The chunk ended with one outcome for all its items that have no result: where there are none, for nobody."""
        if chunk.missing:
            self._core.exchange.count(chunk.job, outcome, chunk.missing)

    def _lose(self, chunk: "_UnderWay", error: Exception, flow: Flow[Any]) -> None:
        """The chunk ended with an error: see what became of the items whose results had not come before.

        One item pays: the one that its worker was in, or the first where none had begun (a job waits only so long, and
        is handed on only so often).
        """
        items, job = chunk.items, chunk.job
        if isinstance(error, WorkerError | JobTimeout) and job.seat is not None:
            line = _line_of(job)
            if line.remains is not None and line.remains[0] == chunk.id:
                begun, first, left = line.remains[1]
                self._note_begun(job, begun)
                hit = items.start + begun - 1
                if items.start + first != chunk.sent_up_to:
                    chunk.seen = 0
                while chunk.at < min(items.start + first, hit):  # sent, and lost with what broke the protocol
                    self._put_loss(chunk, error, flow)
                if chunk.at < hit:
                    self._put(chunk, left, flow)
                if begun and chunk.at > hit:
                    flow.give_back(items.after(begun))  # it died between two items, and cost none
                    return
        self._put_loss(chunk, error, flow)
        if chunk.missing:
            flow.give_back(items.after(chunk.at - items.start))

    def _put_loss(self, chunk: "_UnderWay", error: Exception, flow: Flow[Any]) -> None:
        self._core.exchange.count(chunk.job, outcome_of(error))
        flow.put_error(chunk.at, error)
        chunk.at += 1

    def _watch(self, chunk: "_UnderWay", flow: Flow[Any]) -> None:
        """See to it that an item which takes long does not hold up the results of those before it in its chunk."""
        self._under_way.append(chunk)
        if not self._watching:
            self._watching = True
            flow.start_task(self._look, flow)

    @trio.lowlevel.enable_ki_protection
    async def _look(self, flow: Flow[Any]) -> None:
        while self._under_way:
            await trio.sleep(LOOK_EVERY)
            for chunk in self._under_way:
                seat = chunk.job.seat
                if chunk.job.state is not WRITTEN or seat is None or not isinstance(seat.worker.line, CallLine):
                    continue
                begun, first, results = seat.worker.line.look()
                if begun != chunk.begun:
                    chunk.begun = begun  # it goes on, and will send them by itself
                elif chunk.at < chunk.items.start + begun - 1 and chunk.items.start + first == chunk.sent_up_to:
                    self._put(chunk, results, flow)
                    chunk.seen = len(results)
        self._watching = False

    def _note_begun(self, job: Job, count: int) -> None:
        """To the worker's own count of jobs, each call is one."""
        if job.seat is not None and count:
            job.seat.begun += count - 1


def _line_of(job: Job) -> CallLine:
    assert job.seat is not None
    line = job.seat.worker.line
    assert isinstance(line, CallLine)
    return line
