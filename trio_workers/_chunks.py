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
from ._seats import Job

Frames = tuple[bytes | memoryview, ...]

SMALLEST_LIMIT: Final = 2 * SIZE
"""With a smaller `max_frame_size` calls go alone, so that it bounds each of them and no more."""


class FunctionRunner:
    """Runs the items of one map as calls of its function."""

    def __init__(self, core: PoolCore, codec: FunctionCodec, function: Callable[..., object], label: str) -> None:
        self._core = core
        self._codec = codec
        self._function = function
        self._label = label
        self.pace = Pace()
        self._together = True

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
        elif rest is not None:
            self.pace.alone()
            await self._run_alone(start + count, rest, flow)

    def _encode(self, items: Items) -> tuple[int, Job | None, Job | Exception | None]:
        """Make a job of the first items, and one of the next where that can't be with them, or say why that can't be."""
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
        id_ = int.from_bytes(job.frames[0][ID], "little")
        start = at = items.start
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            exchange.enter(job)
        except Exception as error:  # the pool is closed
            exchange.hang_up(job)
            exchange.count(job, outcome_of(error), len(items) - 1)
            flow.put_error(start, error)
            return
        try:
            while type(outcome := await exchange.see_through(job)) is Part:
                job.streaming = False  # to all others it is a job that runs
                at += self._put(at, outcome.body, outcome.buffers, job, flow)
        except Exception as error:
            exchange.abandon(job)
            self._lose(items, at, id_, job, error, flow)
            return
        except BaseException:
            exchange.count(job, "cancelled", start + len(items) - at)
            exchange.abandon(job)
            raise
        exchange.hang_up(job)
        if type(outcome) is Failed:
            exchange.count(job, "failed", start + len(items) - at)
            for place in range(at, start + len(items)):
                flow.put_error(place, exchange.failure(outcome))
            return
        assert type(outcome) is Replied
        done, _, nanoseconds = DONE_HEAD.unpack_from(outcome.body)
        self.pace.ran(done, nanoseconds / 1e9, awaited=flow.was_awaited())
        self._put(at, outcome.body[DONE_HEAD.size :], (), job, flow)
        self._note_begun(job, done)
        if not _line_of(job).has_region:
            self._together = False
        if done < len(items):
            flow.give_back(items.after(done))

    def _put(
        self, at: int, body: bytes, buffers: Sequence[bytes | bytearray], job: Job, flow: Flow[Any], skip: int = 0
    ) -> int:
        """Put down results of a chunk, but for those that are there already; return how many they were."""
        failures: dict[int, Exception] = {}
        if buffers:
            values: list[Any] = [None]
            try:
                values[0] = decode(Replied(b"", body, False, buffers), self._function)
            except Exception as error:
                failures[0] = error
        else:
            values, failures = self._codec.decode_calls(body, self._function)
            if skip:
                values = values[skip:]
                failures = {place - skip: error for place, error in failures.items() if place >= skip}
        count = len(values)
        exchange = self._core.exchange
        if count > len(failures):
            exchange.count(job, "replied", count - len(failures))
        if failures:
            exchange.count(job, "failed", len(failures))
        flow.put(at, values, failures)
        return count

    def _lose(self, items: Items, at: int, id_: int, job: Job, error: Exception, flow: Flow[Any]) -> None:
        """The chunk ended with an error, and results up to `at` had come before that: see what became of the others.

        One item pays: the one that its worker was in, or the first where none had begun (a job waits only so long, and
        is handed on only so often).
        """
        begun = at - items.start
        if isinstance(error, WorkerError | JobTimeout) and job.seat is not None:
            line = _line_of(job)
            if line.remains is not None and line.remains[0] == id_:
                begun, first, left = line.remains[1]
                self._note_begun(job, begun)
                got = at - items.start
                for _ in range(got, min(first, begun - 1)):  # these were sent, and lost with what broke the protocol
                    self._core.exchange.count(job, outcome_of(error))
                    flow.put_error(at, error)
                    at, got = at + 1, got + 1
                if begun - 1 > got:
                    at += self._put(at, left, (), job, flow, skip=got - first)
                if begun and at - items.start >= begun:
                    flow.give_back(items.after(begun))  # it died between two items, and cost none
                    return
        self._core.exchange.count(job, outcome_of(error))
        flow.put_error(at, error)
        if at + 1 < items.start + len(items):
            flow.give_back(items.after(at + 1 - items.start))

    def _note_begun(self, job: Job, count: int) -> None:
        """To the worker's own count of jobs, each call is one."""
        if job.seat is not None and count:
            job.seat.begun += count - 1


def _line_of(job: Job) -> CallLine:
    assert job.seat is not None
    line = job.seat.worker.line
    assert isinstance(line, CallLine)
    return line
