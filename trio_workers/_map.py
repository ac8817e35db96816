"""Bounded streams of jobs: a source goes in, results come out, and no more than a window is under way."""

import inspect
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Generic, TypeVar

import trio

from ._errors import first_of, more_urgent

T = TypeVar("T")
Source = Iterator[Any] | AsyncIterator[Any]


class Results(Generic[T]):
    """The results of a map: an async iterator, inside its `async with`. Several tasks may take from it."""

    _run: Callable[..., Awaitable[T]]
    _sources: Sequence[Source]
    _ordered: bool
    _return_exceptions: bool
    _nursery: trio.Nursery
    _width: Callable[[], int]
    _tasks: int
    _room: trio.Semaphore
    _turn: trio.StrictFIFOLock
    _taken: int
    _delivered: int
    _exhausted: bool
    _closed: bool
    _source_error: Exception | None
    _by_index: dict[int, tuple[T | None, Exception | None]]
    _as_ready: deque[tuple[T | None, Exception | None]]
    _news: trio.lowlevel.ParkingLot

    def __init__(self) -> None:
        raise TypeError("Results has no public constructor; it comes from map()")

    @classmethod
    def _create(
        cls,
        run: Callable[..., Awaitable[T]],
        sources: Sequence[Source],
        *,
        ordered: bool,
        window: int,
        width: Callable[[], int],
        return_exceptions: bool,
    ) -> "Results[T]":
        self: Results[T] = object.__new__(cls)
        self._run = run
        self._sources = sources
        self._ordered = ordered
        self._return_exceptions = return_exceptions
        self._width = lambda: min(width(), window)
        self._tasks = 0
        self._room = trio.Semaphore(window)
        self._turn = trio.StrictFIFOLock()
        self._taken = 0
        self._delivered = 0
        self._exhausted = False
        self._closed = False
        self._source_error = None
        self._by_index = {}
        self._as_ready = deque()
        self._news = trio.lowlevel.ParkingLot()
        return self

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    @trio.lowlevel.enable_ki_protection
    async def __anext__(self) -> T:
        """Return the next result. Cancelling loses none."""
        await trio.lowlevel.checkpoint()
        while True:
            if self._ordered:
                outcome = self._by_index.pop(self._delivered, None)
            else:
                outcome = self._as_ready.popleft() if self._as_ready else None
            if outcome is not None:
                return self._deliver(*outcome)
            if self._exhausted and self._delivered >= self._taken:
                error, self._source_error = self._source_error, None
                if error is not None:
                    raise error
                raise StopAsyncIteration
            await self._news.park()

    def _deliver(self, result: T | None, error: Exception | None) -> T:
        self._delivered += 1
        self._room.release()
        if error is None:
            return result  # type: ignore[return-value]
        if self._return_exceptions:
            return error  # type: ignore[return-value]
        self._close()
        try:
            raise error
        finally:
            del error  # or this frame and the error hold each other, and so the job, until the collector comes

    def _is_over(self) -> bool:
        return self._exhausted

    def _close(self) -> None:
        """After an error nothing follows."""
        self._exhausted = self._closed = True
        self._delivered = self._taken
        self._by_index.clear()
        self._as_ready.clear()
        self._source_error = None
        self._news.unpark_all()

    @trio.lowlevel.enable_ki_protection
    async def _work(self) -> None:
        """Take an item when there is room, run it, put the result down: one of as many tasks as workers."""
        while True:
            if self._tasks > max(1, self._width()):
                self._tasks -= 1  # there are fewer workers now
                return
            async with self._turn:
                await self._room.acquire()
                if self._is_over():
                    return
                try:
                    item = await self._take()
                except Exception as error:
                    if not isinstance(error, StopIteration | StopAsyncIteration):
                        self._source_error = error
                    self._exhausted = True
                    self._news.unpark_all()
                    return
                if self._is_over():
                    return  # a result was an error, and ended the map meanwhile
                index = self._taken
                self._taken += 1
                self._start_tasks()  # there may be more workers now
            result: T | None = None
            failure: Exception | None = None
            try:
                result = await self._run(*item)
            except Exception as error:
                failure = error
            del item
            if self._closed:
                return
            outcome, result, failure = (result, failure), None, None  # held by nobody else
            if self._ordered:
                self._by_index[index] = outcome
                del outcome
                if index != self._delivered:
                    continue
            else:
                self._as_ready.append(outcome)
                del outcome
            self._news.unpark_all()

    def _start_tasks(self) -> None:
        while self._tasks < self._width():
            self._tasks += 1
            self._nursery.start_soon(self._work)

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


def open_map(
    run: Callable[..., Awaitable[T]],
    *sources: object,
    ordered: bool,
    window: object,
    width: Callable[[], int],
    return_exceptions: bool,
) -> AbstractAsyncContextManager[Results[T]]:
    """Run `run(*items)` for an item of each source: `width()` side by side, `window` taken and not delivered."""
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(f"window must be an int or None, not {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    iterators = [_iterate(source) for source in sources]
    results = Results[T]._create(  # pyright: ignore[reportPrivateUsage]
        run, iterators, ordered=ordered, window=window, width=width, return_exceptions=return_exceptions
    )
    return _block(results, iterators)


def _iterate(source: object) -> Source:
    if isinstance(source, AsyncIterable):
        return aiter(source)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(source, Iterable):
        return iter(source)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    raise TypeError(f"map takes an iterable or an async iterable, not {type(source).__name__}")


@asynccontextmanager
async def _block(results: Results[T], sources: Sequence[Source]) -> AsyncGenerator[Results[T]]:
    """As in `open_core`, nothing of the user's enters the nursery, so nothing of it leaves in a group."""
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                results._nursery = nursery  # pyright: ignore[reportPrivateUsage]
                results._start_tasks()  # pyright: ignore[reportPrivateUsage]
                yield results
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
        results._close()  # pyright: ignore[reportPrivateUsage]
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
