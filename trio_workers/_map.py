"""Bounded streams of jobs: a source goes in, results come out, and no more than a window is under way.

One task for each worker takes items and has them run (`Runner`), one at a time or many, as the runner says. A sync
source is taken from by these tasks themselves; an async one, which may make them wait, by a task of its own (`_draw`),
as far as they have use for it. What a runner did not get to comes back (`give_back`) and goes first.
"""

import inspect
import math
from bisect import insort
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import islice
from operator import attrgetter
from time import perf_counter
from typing import Any, Final, Generic, Protocol, TypeVar, cast

import attrs
import trio

from ._errors import RemoteTraceback, first_of, more_urgent

T = TypeVar("T")
Source = Iterator[Any] | AsyncIterator[Any]

TAKE_FOR: Final = 0.001
"""Seconds for taking from a source before what was taken is run, and before other tasks get their turn."""

YIELD_EVERY: Final = 0.001
"""Seconds for which `__anext__` may give results that are there without letting other tasks run."""

AT_ONCE: Final = frozenset(
    type(iter(source))
    for source in cast("tuple[Iterable[object], ...]", ([], (), range(0), "", b"", {}, {0: 0}.values()))
)
"""Iterators that never take long over an item, nor raise an error of a user's own."""


@attrs.frozen(eq=False)
class Items:
    """Items in a row: the index of the first of them, and for each source a column of what was taken from it."""

    start: int
    columns: Sequence[list[Any]]

    def __len__(self) -> int:
        return len(self.columns[0])

    def row(self, at: int) -> tuple[Any, ...]:
        """Return the arguments of one item."""
        return tuple([column[at] for column in self.columns])

    def first(self, count: int) -> "Items":
        """Return the first so many of them."""
        return self if count == len(self) else Items(self.start, [column[:count] for column in self.columns])

    def after(self, count: int) -> "Items":
        """Return those after so many."""
        return Items(self.start + count, [column[count:] for column in self.columns])


class Runner(Protocol):
    """What runs the items of a map."""

    @property
    def size(self) -> int:
        """How many items it would have now, all in one."""
        ...

    async def run(self, items: Items, flow: "Flow[Any]") -> None:
        """Run items; `put` or `put_error` the outcome of each, or `give_back` what was not begun."""
        ...


class OneByOne:
    """Runs each item by itself."""

    size: int = 1

    def __init__(self, run: Callable[..., Awaitable[Any]]) -> None:
        self._run = run

    async def run(self, items: Items, flow: "Flow[Any]") -> None:
        """See `Runner.run`."""
        index, row = items.start, items.row(0)
        del items
        try:
            result = await self._run(*row)
        except Exception as error:
            flow.put_error(index, error)
        else:
            flow.put(index, [result])


class _Failure:
    """Stands among the results for an error that is to be raised."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error


class Flow(Generic[T]):
    """A map under way: its sources, the tasks that have items run, and the outcomes that wait to be taken."""

    _runner: Runner
    _sources: Sequence[Source]
    _ordered: bool
    _return_exceptions: bool
    _nursery: trio.Nursery
    _width: Callable[[], int]
    _bound: int | None
    _base: int
    _drawing: bool
    _tasks: int
    _taken: int
    _delivered: int
    _exhausted: bool
    _closed: bool
    _source_error: Exception | None
    _returned: deque[Items]
    _drawn: Items
    _by_index: dict[int, list[Any]]
    _as_ready: deque[list[Any]]
    _ready: list[Any]
    _failures: int
    _last: float
    _news: trio.lowlevel.ParkingLot
    _idle: trio.lowlevel.ParkingLot
    _drawer: trio.lowlevel.ParkingLot
    _awaited: bool
    _together: bool
    _yield_at: float

    def __init__(
        self,
        runner: Runner,
        sources: Sequence[Source],
        *,
        ordered: bool,
        window: int | None,
        base: int,
        width: Callable[[], int],
        return_exceptions: bool,
    ) -> None:
        self._runner = runner
        self._sources = sources
        self._ordered = ordered
        self._return_exceptions = return_exceptions
        self._width = width if window is None else lambda: min(width(), window)
        self._bound = window
        self._base = base
        self._drawing = any(isinstance(source, AsyncIterator) for source in sources)
        self._tasks = 0
        self._taken = 0
        self._delivered = 0
        self._exhausted = False
        self._closed = False
        self._source_error = None
        self._returned = deque()
        self._drawn = Items(0, [[] for _ in sources])
        self._by_index = {}
        self._as_ready = deque()
        self._ready = []
        self._failures = 0
        self._last = math.inf
        self._news = trio.lowlevel.ParkingLot()
        self._idle = trio.lowlevel.ParkingLot()
        self._drawer = trio.lowlevel.ParkingLot()
        self._awaited = False
        self._together = False
        self._yield_at = 0.0

    # taking results

    @trio.lowlevel.enable_ki_protection
    async def take(self) -> T:
        """See `Results.__anext__`."""
        if (self._ready or self._refill()) and perf_counter() < self._yield_at:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()
            self._note_checkpoint()
        while not self._ready and not self._refill():
            self._raise_end()
            self._awaited = True
            await self._news.park()
            self._note_checkpoint()
        result = self._ready.pop()
        self._note_delivered(1)
        if type(result) is _Failure:
            self._fail(result)
        return result  # type: ignore[no-any-return]

    @trio.lowlevel.enable_ki_protection
    async def take_batch(self) -> list[T]:
        """See `Results.batches`."""
        await trio.lowlevel.checkpoint()
        while not self._ready and not self._refill():
            self._raise_end()
            self._awaited = True
            await self._news.park()
        batch: list[T] = []
        while self._ready or self._refill():
            if self._failures:
                result = self._ready[-1]
                if type(result) is _Failure:
                    if batch:
                        break
                    self._ready.pop()
                    self._note_delivered(1)
                    self._fail(result)
                batch.append(self._ready.pop())
                self._note_delivered(1)
            else:
                some, self._ready = self._ready, []
                some.reverse()
                self._note_delivered(len(some))
                if batch:
                    batch += some
                else:
                    batch = some
        return batch

    def _note_checkpoint(self) -> None:
        if self._together:
            self._yield_at = perf_counter() + YIELD_EVERY

    def _refill(self) -> bool:
        """Look whether more results have come that are next; they are kept with the next one last."""
        if self._ordered:
            block = self._by_index.pop(self._delivered, None)
        else:
            block = self._as_ready.popleft() if self._as_ready else None
        if block is None:
            return False
        block.reverse()
        self._ready = block
        return True

    def _note_delivered(self, count: int) -> None:
        self._delivered += count
        if self._drawing:
            if self._drawer:
                self._drawer.unpark()
        elif self._idle and self._has_items():
            self._idle.unpark()

    def _raise_end(self) -> None:
        """Raise where nothing is to come."""
        if self._exhausted and self._delivered >= self._taken:
            error, self._source_error = self._source_error, None
            if error is not None:
                raise error
            raise StopAsyncIteration

    def _fail(self, failure: _Failure) -> None:
        self.close()
        error, failure.error = failure.error, None
        assert error is not None
        try:
            raise error
        finally:
            del error  # or this frame and the error hold each other, and so the job, until the collector comes

    def close(self) -> None:
        """After an error nothing follows."""
        self._exhausted = self._closed = True
        self._delivered = self._taken
        self._by_index.clear()
        self._as_ready.clear()
        self._returned.clear()
        self._drawn = Items(self._taken, [[] for _ in self._sources])
        self._ready = []
        self._failures = 0
        self._source_error = None
        self._news.unpark_all()

    # putting them down

    def was_awaited(self) -> bool:
        """Whether somebody had to wait for a result, since this was last asked."""
        awaited, self._awaited = self._awaited or bool(self._news), False
        return awaited

    def put(self, start: int, values: list[Any], failures: Mapping[int, Exception] | None = None) -> None:
        """Put down the results of items in a row, and errors in the place of some."""
        if self._closed or not values:
            return
        if failures:
            for place, error in failures.items():
                if self._return_exceptions:
                    values[place] = error
                else:
                    values[place] = _Failure(error)
                    self._end_with(start + place)
        if len(values) > 1:
            self._together = True
        if self._ordered:
            self._by_index[start] = values
            if start != self._delivered + len(self._ready):
                return
        else:
            self._as_ready.append(values)
        self._news.unpark_all()

    def put_error(self, index: int, error: Exception) -> None:
        """Put down what an item ended with. A pool that is closed ends the map, whatever else was wished."""
        closed = type(error) is trio.ClosedResourceError and not isinstance(error.__cause__, RemoteTraceback)
        if closed and self._return_exceptions and not self._closed:
            self._end_with(index)
            self.put(index, [_Failure(error)])
            return
        self.put(index, [None], {0: error})

    def _end_with(self, index: int) -> None:
        """Note that the map ends with the error in this place: what would come after it need not be run."""
        self._failures += 1
        self._exhausted = True
        self._last = min(self._last, index if self._ordered else 0)

    def give_back(self, items: Items) -> None:
        """Take back items that were not begun: they go first, in their order."""
        if not self._closed:
            insort(self._returned, items, key=attrgetter("start"))
            self._idle.unpark()

    def has_returned_before(self, index: int) -> bool:
        """Whether items that were given back, and nobody has begun, come before this one."""
        return bool(self._returned) and self._returned[0].start < index

    # running items

    @trio.lowlevel.enable_ki_protection
    async def _work(self) -> None:
        """Get items when there are some, have them run: one of as many tasks as workers."""
        while True:
            if self._tasks > max(1, self._width()):
                self._tasks -= 1  # there are fewer workers now
                self._idle.unpark()
                return
            await trio.lowlevel.checkpoint_if_cancelled()
            items = self._next_items()
            if items is None:
                self._drawer.unpark()
                await self._idle.park()
                continue
            self._start_tasks()  # there may be more workers now
            if self._idle and self._has_items():
                self._idle.unpark()
            running = self._runner.run(items, self)
            del items
            await running
            del running

    def start(self, nursery: trio.Nursery) -> None:
        """Begin, with tasks in this nursery, which is cancelled at the end."""
        self._nursery = nursery
        if self._drawing:
            self._nursery.start_soon(self._draw)
        self._start_tasks()

    def start_task(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Start a task of the runner's own; it ends with the map."""
        self._nursery.start_soon(function, *args)

    def _start_tasks(self) -> None:
        while self._tasks < self._width():
            self._tasks += 1
            self._nursery.start_soon(self._work)

    def _room(self) -> int:
        """How many items may be taken now, or 0 where it is better to wait until there is room for some more."""
        size = self._runner.size
        if self._bound is not None:
            size = min(size, max(1, self._bound // self._base))  # some for each worker
        return size if self._window_left() >= size else 0

    def _window_left(self) -> int:
        """How many items more there may be that are taken and not delivered."""
        window = self._base * self._runner.size if self._bound is None else self._bound
        return window - (self._taken - self._delivered)

    def _has_items(self) -> bool:
        """Whether there is something to run."""
        if self._closed:
            return False
        if self._returned or self._drawn:
            return True
        return not self._exhausted and not self._drawing and self._room() > 0

    def _next_items(self) -> Items | None:
        """Get as many items as the runner wants, as far as they are there."""
        if self._closed:
            return None
        size = self._runner.size
        while self._returned:
            items = self._returned.popleft()
            if len(items) > size:
                self._returned.appendleft(items.after(size))
            if items.start < self._last:
                return items.first(min(size, len(items)))
        if self._drawing:
            items = self._drawn
            if not items or items.start >= self._last:
                return None
            count = min(size, len(items))
            self._drawn = items.after(count)
            self._drawer.unpark()
            return items.first(count)
        room = 0 if self._exhausted else self._room()
        if not room:
            return None
        start = self._taken
        columns: list[list[Any]] = [[] for _ in self._sources]
        try:
            self._take_now(columns, room)
        except StopIteration:
            self._exhausted = True
        except Exception as error:
            self._exhausted = True
            self._source_error = error
        count = len(columns[-1])
        if self._exhausted:
            for column in columns:
                del column[count:]  # the last source ended first
            self._news.unpark_all()
        self._taken += count
        return Items(start, columns) if count else None

    @trio.lowlevel.disable_ki_protection
    def _take_now(self, columns: list[list[Any]], count: int) -> None:
        """Take up to so many items of sync sources, for `TAKE_FOR` at most; the first source that ends is the end."""
        sources: list[Iterator[Any]] = self._sources  # type: ignore[assignment]
        if len(sources) == 1 and type(sources[0]) in AT_ONCE:
            columns[0] += islice(sources[0], count)
            if len(columns[0]) < count:
                raise StopIteration
            return
        enough_at = perf_counter() + TAKE_FOR
        for _ in range(count):
            for source, column in zip(sources, columns, strict=True):
                column.append(next(source))
            if perf_counter() > enough_at:
                return

    @trio.lowlevel.enable_ki_protection
    async def _draw(self) -> None:
        """Take from sources that may make us wait, ahead of the tasks that run items, as far as they have use."""
        yield_at = 0.0
        while True:
            while not self._wants_more():
                await self._drawer.park()
            if perf_counter() > yield_at:
                await trio.lowlevel.checkpoint()
                yield_at = perf_counter() + TAKE_FOR
            try:
                item = await self._take()
            except Exception as error:
                if not self._closed:
                    if not isinstance(error, StopAsyncIteration):
                        self._source_error = error
                    self._exhausted = True
                    self._news.unpark_all()
                return
            if self._closed or self._exhausted:
                return  # a result was an error, and ended the map meanwhile
            for column, value in zip(self._drawn.columns, item, strict=True):
                column.append(value)
            del item
            self._taken += 1
            if self._idle:
                self._idle.unpark()

    def _wants_more(self) -> bool:
        if self._exhausted or self._window_left() <= 0:
            return False
        size = self._runner.size
        return len(self._drawn) < (len(self._idle) if size == 1 else size * self._tasks)

    @trio.lowlevel.disable_ki_protection
    async def _take(self) -> list[Any]:
        """Take an item of each source; the first that ends is the end."""
        item: list[Any] = []
        for source in self._sources:
            if isinstance(source, AsyncIterator):
                item.append(await anext(source))
                continue
            try:
                item.append(next(source))
            except StopIteration:
                raise StopAsyncIteration from None  # a coroutine can't raise the other one
        return item


class Results(Generic[T]):
    """The results of a map: an async iterator, inside its `async with`. Several tasks may take from it.

    `async for result in results` gives them one by one, `async for some in results.batches()` as lists of what has
    arrived. Both take from the same results, and may be mixed.
    """

    _flow: Flow[T]

    def __init__(self) -> None:
        raise TypeError("Results has no public constructor; it comes from map()")

    @classmethod
    def _create(cls, flow: Flow[T]) -> "Results[T]":
        self: Results[T] = object.__new__(cls)
        self._flow = flow
        return self

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, T]:
        """Return the next result. Cancelling loses none.

        Each is a checkpoint, but where many calls go to a worker together (`PythonPool.map` of a quick function): then
        a cancel is noticed at each, and other tasks get their turn whenever there is something to wait for and about
        once a millisecond.
        """
        return self._flow.take()

    def batches(self) -> AsyncIterator[list[T]]:
        """Take results as lists: `async for some in results.batches()`, at a fraction of the cost for each result.

        A list has what has arrived, in the order of `async for`, and at least one result; it never waits for more. An
        error comes as there, after a list of the results before it. Each list is a checkpoint, and cancelling loses
        nothing.
        """
        return _Batches(self._flow)


class _Batches(Generic[T]):
    """The iterator of `Results.batches`."""

    def __init__(self, flow: Flow[T]) -> None:
        self._flow = flow

    def __aiter__(self) -> "_Batches[T]":
        return self

    def __anext__(self) -> Coroutine[Any, Any, list[T]]:
        return self._flow.take_batch()


def open_map(
    runner: Runner,
    *sources: object,
    ordered: bool,
    window: object,
    base: int,
    width: Callable[[], int],
    return_exceptions: bool,
) -> AbstractAsyncContextManager[Results[Any]]:
    """Run the items of the sources: by `width()` tasks side by side, `window` items taken and not delivered.

    With None for a window it is `base` for items that are run one by one, and grows with the runner's `size`.
    """
    if window is not None:
        if not isinstance(window, int) or isinstance(window, bool):
            raise TypeError(f"window must be an int or None, not {type(window).__name__}")
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
    iterators = [_iterate(source) for source in sources]
    flow = Flow[Any](
        runner,
        iterators,
        ordered=ordered,
        window=window,
        base=base,
        width=width,
        return_exceptions=return_exceptions,
    )
    return _block(flow, iterators)


def _iterate(source: object) -> Source:
    if isinstance(source, AsyncIterable):
        return aiter(source)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(source, Iterable):
        return iter(source)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    raise TypeError(f"map takes an iterable or an async iterable, not {type(source).__name__}")


@asynccontextmanager
async def _block(flow: Flow[T], sources: Sequence[Source]) -> AsyncGenerator[Results[T]]:
    """As in `open_core`, nothing of the user's enters the nursery, so nothing of it leaves in a group."""
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                flow.start(nursery)
                yield Results[T]._create(flow)  # pyright: ignore[reportPrivateUsage]
            except BaseException as error:
                failure = error
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if (others := group.split(trio.Cancelled)[1]) is not None:
            failure = more_urgent(
                failure, first_of(others)
            )  # KeyboardInterrupt or the like, from the source's own code
        if failure is None:
            failure = group.exceptions[0]
    finally:
        flow.close()
        for source in sources:
            try:
                if inspect.isasyncgen(source):
                    await source.aclose()
                elif inspect.isgenerator(source):
                    source.close()
            except BaseException as error:  # the others are closed all the same; what came first is told
                failure = failure or error
    if failure is not None:
        try:
            raise failure
        finally:
            del failure
