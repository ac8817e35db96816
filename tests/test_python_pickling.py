"""What goes to a worker and comes back: what can't, buffers of every kind and size, and what is dropped (point 5).

None of the failures costs the worker. The functions that run in workers are in `python_error_jobs.py`.
"""

import array
import contextlib
import functools
import gc
import operator
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from tests import python_error_jobs as jobs
from tests.support import under_ci
from tests.test_faults import until
from trio_workers import JobError, PythonPool, RelayError, WorkerCrashed, _functions, open_python_pool
from trio_workers._calls import OUT_OF_BAND

EXTRA: Final = "trio_workers[cloudpickle]"
JOBS: Final = jobs.__name__
MIB: Final = 1 << 20
SIZES: Final = (0, 1, 1000, OUT_OF_BAND - 1, OUT_OF_BAND, OUT_OF_BAND + 1, 65536, 65537, MIB)
"""Around the size from which on a buffer travels beside the pickle, and what is read at once."""


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what behaves in another way in the parent know which process that is."""
    monkeypatch.setenv(jobs.PARENT, str(os.getpid()))


def require_module(name: str) -> Any:
    """Return an optional module; without it the test is skipped, or fails where ``CI=true``."""
    return __import__(name) if under_ci() else pytest.importorskip(name)


@pytest.fixture
def numpy() -> Any:
    return require_module("numpy")


@pytest.fixture
def cloudpickle() -> Any:
    return require_module("cloudpickle")


@asynccontextmanager
async def one_worker(**parameters: Any) -> AsyncIterator[PythonPool]:
    """A pool of one worker, which must be the same one at the end, free, and fit for work."""
    async with open_python_pool(1, **{"boot_timeout": 30.0, **parameters}) as pool:
        pid = await pool.run_sync(os.getpid)
        yield pool
        assert await pool.run_sync(os.getpid) == pid
        assert await pool.run_sync(jobs.answer) == 42
        now = pool.statistics()
        assert (now.idle, now.busy, now.leased, now.starting) == (1, 0, 0, 0)
        assert now.starts == 1
        assert not now.exits


async def error_of(pool: PythonPool, function: Callable[..., object], *args: object) -> Exception:
    try:
        result = await pool.run_sync(function, *args)
    except Exception as error:
        return error
    raise AssertionError(f"no error, but {result!r}")


@contextmanager
def lifted(view: memoryview) -> Iterator[pickle.PickleBuffer]:
    """Put a view into a `PickleBuffer`, and end both.

    The two of them in the hands of the garbage collector, as part of a traceback, are a crash of Python itself.
    """
    buffer = pickle.PickleBuffer(view)
    try:
        yield buffer
    finally:
        buffer.release()
        view.release()


async def refusal(pool: PythonPool, function: Callable[..., object], *args: object) -> str:
    """The text of the error of a call that can't be pickled: no job was begun, by whatever way it was asked for."""

    async def by_run_sync() -> None:
        await pool.run_sync(function, *args)

    async def by_stream() -> None:
        async with pool.stream(function, *args):  # type: ignore[arg-type]
            raise AssertionError

    async def by_map() -> None:
        async with pool.map(function, *([one] for one in args)) as results:
            async for _ in results:
                raise AssertionError

    ways: list[Callable[[], Awaitable[None]]] = [by_run_sync, by_stream, *([by_map] if args else [])]
    before = pool.statistics()
    texts: set[str] = set()
    for way in ways:
        with pytest.raises(pickle.PicklingError) as caught:
            await way()
        assert caught.value.__cause__ is not None
        texts.add(str(caught.value))
    now = pool.statistics()
    assert now.jobs == before.jobs
    assert (now.idle, now.busy) == (before.idle, before.busy) == (1, 0)
    (text,) = texts
    return text


# --- arguments that can't be pickled --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
async def test_argument_that_can_not_be_pickled(count: int) -> None:
    """Point 5: which argument of which function, of which type, and why; no worker is taken for it."""
    async with one_worker() as pool:
        for position in range(1, count + 1):
            args: list[object] = [1] * count
            args[position - 1] = threading.Lock()
            assert await refusal(pool, jobs.take, *args) == (
                f"argument {position} of {JOBS}.take, of type lock, can't be pickled: "
                "TypeError: cannot pickle '_thread.lock' object"
            )


async def test_argument_of_a_stream_or_a_lease_that_can_not_be_pickled() -> None:
    """Point 5: the same for one worker of one's own, which stays one's own."""
    async with one_worker() as pool, pool.lease() as worker:
        with pytest.raises(pickle.PicklingError, match=r"argument 1 of .*take, of type lock, can't be pickled"):
            await worker.run_sync(jobs.take, threading.Lock())
        with pytest.raises(pickle.PicklingError, match=r"argument 2 of .*generator, of type lock, can't be pickled"):
            worker.stream(jobs.generator, 1, threading.Lock())
        assert await worker.run_sync(os.getpid) == worker.pid


async def test_argument_in_a_partial_that_can_not_be_pickled() -> None:
    """Point 5: a keyword, or an argument, that is bound in a partial is named as such."""
    lock = threading.Lock()
    async with one_worker() as pool:
        keyword = functools.partial(jobs.take, 1, key=2, other=lock)
        assert (await refusal(pool, keyword)).startswith(f"argument 'other' of {JOBS}.take can't be pickled: TypeError")
        bound = functools.partial(jobs.take, 1, lock, key=2)
        assert (await refusal(pool, bound)).startswith(f"argument 2 of {JOBS}.take can't be pickled: TypeError")
        nested = functools.partial(functools.partial(jobs.take, key=lock), 1)
        assert (await refusal(pool, nested)).startswith(f"argument 'key' of {JOBS}.take can't be pickled: TypeError")
        fine = functools.partial(jobs.take, 1, key=2)
        assert (await refusal(pool, fine, lock)).startswith(f"argument 1 of {JOBS}.take, of type lock, can't")
        assert await pool.run_sync(fine, 3) == 3


async def test_error_of_a_reduce() -> None:
    """Point 5: whatever a `__reduce__` raises is the cause; one without any text is none the less an error of ours."""
    async with one_worker() as pool:
        text = await refusal(pool, jobs.take, 1, jobs.Dumping(ZeroDivisionError))
        assert text == (
            f"argument 2 of {JOBS}.take, of type Dumping, can't be pickled: ZeroDivisionError: can't be dumped"
        )
        text = await refusal(pool, jobs.take, jobs.Dumping(jobs.WithoutText))
        assert text.startswith(f"argument 1 of {JOBS}.take, of type Dumping, can't be pickled: WithoutText")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, jobs.Base])
async def test_pickling_that_is_interrupted(kind: type[BaseException]) -> None:
    """Point 5: Ctrl-C or an exit while a call is pickled leaves as itself, and nothing of that call in the next one."""
    one, two = bytes(2 * OUT_OF_BAND), b"2" * (2 * OUT_OF_BAND)
    async with one_worker() as pool:
        for args in ([pickle.PickleBuffer(one), jobs.Dumping(kind)], [[pickle.PickleBuffer(one), jobs.Dumping(kind)]]):
            with pytest.raises(kind):
                await pool.run_sync(jobs.take, *args)
            with pytest.raises(kind):
                pool.stream(jobs.generator, *args)
            assert await pool.run_sync(jobs.echo, two) == two


async def test_nothing_of_a_failed_call_is_in_the_next() -> None:
    """Point 5: buffers of a call that could not be pickled don't travel with another."""
    one, two = bytes(2 * OUT_OF_BAND), b"2" * (2 * OUT_OF_BAND)
    async with one_worker() as pool:
        await refusal(pool, jobs.take, [pickle.PickleBuffer(one), threading.Lock()])
        await refusal(pool, jobs.take, one, threading.Lock())
        assert await pool.run_sync(jobs.echo, two) == two
        assert await pool.run_sync(jobs.echo_all, two, b"", two) == (two, b"", two)
        assert type(await error_of(pool, jobs.track_and_give_unpicklable, jobs.Tracked(MIB))) is JobError
        assert await pool.run_sync(jobs.echo, two) == two


async def test_deep_argument() -> None:
    """Point 5: what is nested deeper than pickle goes is an error that names it, and no crash."""
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    async with one_worker() as pool:
        text = await refusal(pool, jobs.take, 1, value)
        assert text.startswith(f"argument 2 of {JOBS}.take, of type list, can't be pickled: RecursionError")


async def test_memoryview_is_refused() -> None:
    """Point 5: a memoryview can't be pickled; the error names it. In a `PickleBuffer` it travels, if in one piece."""
    data = bytearray(range(256)) * 256
    async with one_worker() as pool:
        text = await refusal(pool, jobs.echo, memoryview(data))
        assert text.startswith(f"argument 1 of {JOBS}.echo, of type memoryview, can't be pickled: TypeError")
        for view in (memoryview(data), memoryview(data)[:100]):
            expected = bytes(view)
            with lifted(view) as buffer:
                assert await pool.run_sync(jobs.echo, buffer) == expected
        with lifted(memoryview(data)[::2]) as buffer:
            text = await refusal(pool, jobs.take, 1, buffer)
        assert text.startswith(f"argument 2 of {JOBS}.take, of type PickleBuffer, can't be pickled:")


async def test_released_buffer_is_refused() -> None:
    """Point 5: a buffer that is no more is an error that names it."""
    buffer = pickle.PickleBuffer(bytes(MIB))
    buffer.release()
    async with one_worker() as pool:
        assert f"argument 1 of {JOBS}.take, of type PickleBuffer, can't" in await refusal(pool, jobs.take, buffer)


# --- functions that can't be pickled, or are none -------------------------------------------------------------------


async def test_lambdas_and_closures_name_the_extra() -> None:
    """Point 5: a function without a name to be found by: the error says what to do, and names the extra."""

    def closure() -> int:
        return 1

    class Local:
        def __call__(self) -> int:
            return 1

    shown = "test_lambdas_and_closures_name_the_extra.<locals>."
    async with one_worker() as pool:
        for function, args, named in (
            (lambda: 1, [], f"{shown}<lambda> can't be pickled"),
            (closure, [], f"{shown}closure can't be pickled"),
            (functools.partial(closure), [], f"{shown}closure can't be pickled"),
            (Local(), [], "Local"),
            (jobs.take, [1, lambda: 1], f"argument 2 of {JOBS}.take, of type function, can't be pickled"),
            (jobs.take, [closure], f"argument 1 of {JOBS}.take, of type function, can't be pickled"),
            (jobs.take, [[{"a": closure}]], f"argument 1 of {JOBS}.take, of type list, can't be pickled"),
            (jobs.take, [Local()], f"argument 1 of {JOBS}.take, of type Local, can't be pickled"),
            (functools.partial(jobs.take, key=closure), [], f"argument 'key' of {JOBS}.take can't be pickled"),
        ):
            text = await refusal(pool, function, *args)
            assert named in text
            assert EXTRA in text
            assert 'pickler="cloudpickle"' in text
            assert "top level of a module" in text
        assert EXTRA not in await refusal(pool, jobs.take, threading.Lock())


async def test_lambda_as_initializer_names_the_extra() -> None:
    """Point 5: the same for an initializer and what it is called with, before any worker is started."""
    with pytest.raises(pickle.PicklingError) as caught:
        open_python_pool(1, initializer=lambda: None)
    assert "initializer" in str(caught.value)
    assert EXTRA in str(caught.value)
    with pytest.raises(pickle.PicklingError, match="initargs can't be pickled: TypeError: cannot pickle"):
        open_python_pool(1, initializer=jobs.take, initargs=[threading.Lock()])


ASYNC: Final[dict[str, Callable[..., object]]] = {
    "asynchronous": jobs.asynchronous,
    "asynchronous_generator": jobs.asynchronous_generator,
    "partial": functools.partial(jobs.asynchronous, 1),
    "partial of a partial": functools.partial(functools.partial(jobs.asynchronous_generator, 1), 2),
    "callable object": jobs.AsyncCallable(),
    "callable object that is an async generator": jobs.AsyncGeneratorCallable(),
    "partial of a callable object": functools.partial(jobs.AsyncCallable()),
    "method": jobs.AsyncCallable().method,
}


@pytest.mark.parametrize("name", ASYNC)
async def test_async_function_is_refused(name: str) -> None:
    """Point 5: an async function, in whatever dress, is a TypeError that says what to do; no coroutine is left."""
    function = ASYNC[name]
    match = r"takes a plain function, and .* is async: write it without async, or let .*trio\.run"
    async with one_worker() as pool:
        for _ in range(2):
            with pytest.raises(TypeError, match=f"run_sync {match}"):
                await pool.run_sync(function, 1)
            with pytest.raises(TypeError, match=f"stream {match}"):
                pool.stream(function, 1)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=match):
                async with pool.map(function, [1]) as results:
                    async for _ in results:
                        raise AssertionError
            async with pool.lease() as worker:
                with pytest.raises(TypeError, match=f"run_sync {match}"):
                    await worker.run_sync(function, 1)
    with pytest.raises(TypeError, match=f"initializer {match}"):
        open_python_pool(1, initializer=function)


@pytest.mark.parametrize(
    "function",
    [
        jobs.generator,
        functools.partial(jobs.generator, 1),
        jobs.GeneratorCallable(),
        functools.partial(jobs.GeneratorCallable()),
        jobs.GeneratorCallable().method,
    ],
    ids=["function", "partial", "callable object", "partial of a callable object", "method"],
)
async def test_generator_function_is_for_stream(function: Callable[..., Iterator[int]]) -> None:
    """Point 5: a generator function in `run_sync` or `map` is an error that names `stream`, where it works."""
    async with one_worker() as pool:
        for _ in range(2):
            error = await error_of(pool, function)
            # An object is seen through only when its result comes back.
            assert isinstance(error, TypeError | JobError)
            assert "stream()" in str(error)
            async with pool.stream(function) as parts:
                assert [part async for part in parts] == [1]
        assert isinstance(await error_of(pool, jobs.generator), TypeError)
        with pytest.raises(TypeError, match=r"stream\(\)"):
            async with pool.map(jobs.generator, [1]) as results:
                async for _ in results:
                    raise AssertionError
    with pytest.raises(TypeError, match=r"initializer takes a function that returns"):
        open_python_pool(1, initializer=jobs.generator)


async def test_what_is_no_function() -> None:
    """Point 5: what can't be called is a TypeError that says so."""
    async with one_worker() as pool:
        for value in (1, "name", None, jobs):
            with pytest.raises(TypeError, match="run_sync takes a function, not"):
                await pool.run_sync(value)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="stream takes a function, not"):
                pool.stream(value)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="map takes a function, not"):
                pool.map(value, [1])  # type: ignore[call-overload]


# --- what can't be read back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [RuntimeError, SystemExit, KeyboardInterrupt, StopIteration, jobs.WithoutText, jobs.Base]
)
@pytest.mark.parametrize("count", [1, 3])
async def test_argument_that_can_not_be_unpickled(kind: type[BaseException], count: int) -> None:
    """Point 5: an argument that the worker can't read back is named with its position and its function."""
    async with one_worker() as pool:
        for position in range(1, count + 1):
            args: list[object] = [bytes(MIB)] * count
            args[position - 1] = jobs.Loading("in a worker", kind)
            error = await error_of(pool, jobs.take, *args)
            assert type(error) is JobError
            text = str(error)
            assert text.startswith(
                f"argument {position} of {JOBS}.take can't be unpickled in the worker: {kind.__name__}"
            )
            assert "raise kind(" in text
            assert error.__cause__ is None


async def test_argument_of_a_partial_or_a_stream_that_can_not_be_unpickled() -> None:
    """Point 5: the same where it is bound in a partial, for a stream, and in a map."""
    loading = jobs.Loading("in a worker")
    async with one_worker() as pool:
        text = str(await error_of(pool, functools.partial(jobs.take, 1, key=loading), 2))
        assert "can't be unpickled in the worker: RuntimeError: can't be loaded" in text
        with pytest.raises(JobError, match=r"^argument 2 of .*generator can't be unpickled in the worker"):
            async with pool.stream(jobs.generator, 1, loading) as parts:
                async for _ in parts:
                    raise AssertionError
        async with pool.map(jobs.take, [1, loading, 3], return_exceptions=True) as results:
            found = [result async for result in results]
        assert found[::2] == [1, 1]
        assert str(found[1]).startswith(f"argument 1 of {JOBS}.take can't be unpickled in the worker")


async def test_function_that_the_worker_has_not() -> None:
    """Point 5: a function that is only here is named, with what the worker misses."""
    module = type(sys)("only_here")
    exec("def function(): pass", module.__dict__)
    sys.modules["only_here"] = module
    try:
        async with one_worker() as pool:
            for args in ((), (1,), ([1], 2)):
                error = await error_of(pool, module.function, *args)
                assert type(error) is JobError
                assert "the function" in str(error)
                assert "can't be unpickled in the worker: ModuleNotFoundError: No module named 'only_here'" in str(
                    error
                )
    finally:
        del sys.modules["only_here"]


RESULTS: Final = {
    "lock": "cannot pickle '_thread.lock' object",
    "lambda": "<lambda>",
    "local class": "local_class.<locals>.Local",
    "generator": "take it with stream() instead of run_sync()",
    "module": "cannot pickle 'module' object",
    "file": "TextIOWrapper",
    "nested": "RecursionError",
    "no __reduce__": "RuntimeError: can't be dumped",
    "no __reduce__ and no text": "WithoutText",
    "exit in __reduce__": "SystemExit: can't be dumped",
    "interrupt in __reduce__": "KeyboardInterrupt: can't be dumped",
    "coroutine": "cannot pickle 'coroutine' object",
}


@pytest.mark.parametrize("what", RESULTS)
async def test_result_that_can_not_be_pickled(what: str) -> None:
    """Point 5: a result, or a part of a stream, that can't be pickled is an error that names the function."""
    async with one_worker() as pool:
        for _ in range(2):
            error = await error_of(pool, jobs.give, what)
            assert type(error) is JobError
            first = str(error).splitlines()[0]
            assert first.startswith(f"the result of {JOBS}.give, of type ")
            assert "can't be pickled: " in first
            assert RESULTS[what] in first
        found: list[object] = []
        with pytest.raises(JobError) as caught:
            async with pool.stream(jobs.yield_unpicklable, what) as parts:
                async for part in parts:
                    found.append(part)  # noqa: PERF401
        assert found == [1]
        first = str(caught.value).splitlines()[0]
        assert first.startswith(f"a part of the stream of {JOBS}.yield_unpicklable, of type ")
        async with pool.map(jobs.give, [what] * 2, return_exceptions=True) as results:
            errors = [str(result) async for result in results]
        assert len(errors) == 2
        assert all(error.startswith(f"the result of {JOBS}.give, of type ") for error in errors)


async def test_result_with_its_own_objection() -> None:
    """Point 5: an object that came from here and can't be pickled there."""
    async with one_worker() as pool:
        text = str(await error_of(pool, jobs.echo, jobs.DumpingThere()))
        assert text.startswith(f"the result of {JOBS}.echo, of type DumpingThere, can't be pickled: RuntimeError")


@pytest.mark.parametrize(
    "kind", [RuntimeError, SystemExit, KeyboardInterrupt, StopIteration, jobs.WithoutText, jobs.Base]
)
async def test_result_that_can_not_be_unpickled(kind: type[BaseException]) -> None:
    """Point 5: a result that can't be read back here is an error that names the function; the worker stays."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.give_loading, "in the parent", kind)
        assert type(error) is JobError
        assert f"the result of {JOBS}.give_loading" in str(error)
        assert f"can't be unpickled here: {kind.__name__}" in str(error)
        assert type(error.__cause__) is kind
        async with pool.lease() as worker:
            with pytest.raises(JobError, match=f"the result of {JOBS}.give_loading"):
                await worker.run_sync(jobs.give_loading, "in the parent", kind)


async def test_part_that_can_not_be_unpickled() -> None:
    """Point 5: the same for a part of a stream, which can go on behind it, and for a result of a map."""
    async with one_worker() as pool:
        async with pool.stream(jobs.yield_loading, "in the parent") as parts:
            assert await anext(parts) == 1
            with pytest.raises(JobError, match=f"{JOBS}.yield_loading.* can't be unpickled here: RuntimeError"):
                await anext(parts)
            assert await anext(parts) == 3
            with pytest.raises(StopAsyncIteration):
                await anext(parts)
        with pytest.raises(JobError, match="can't be unpickled here"):
            async with pool.stream(jobs.yield_loading, "in the parent") as parts:
                async for _ in parts:
                    pass
        async with pool.map(jobs.give_loading, ["in the parent"] * 2, return_exceptions=True) as results:
            found = [result async for result in results]
        assert [type(result) for result in found] == [JobError] * 2
        assert all(f"{JOBS}.give_loading" in str(result) for result in found)


# --- cloudpickle ----------------------------------------------------------------------------------------------------


async def test_cloudpickle_runs_what_has_no_name(cloudpickle: Any) -> None:
    """Point 5: lambdas, closures and classes inside functions work with it, in both directions."""
    factor = 3

    def closure(value: int) -> int:
        return value * factor

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

        def __call__(self) -> int:
            return self.value

    class LocalError(Exception):
        pass

    def fail() -> None:
        raise LocalError("mine") from KeyError("key")

    def generate(count: int) -> Iterator[int]:
        yield from map(closure, range(count))

    async with one_worker(pickler="cloudpickle") as pool:
        assert await pool.run_sync(lambda: 7) == 7
        assert await pool.run_sync(lambda *values: sum(values), 1, 2, 3) == 6
        assert await pool.run_sync(closure, 5) == 15
        assert await pool.run_sync(functools.partial(closure, 6)) == 18
        assert await pool.run_sync(Local(9)) == 9
        assert await pool.run_sync(jobs.take, lambda: 1, Local(1)) == 2
        back = await pool.run_sync(lambda: lambda: 11)
        assert back() == 11
        same_class = await pool.run_sync(jobs.echo, Local(5))
        assert type(same_class) is Local
        assert same_class() == 5
        assert await pool.run_sync(jobs.add_one, 1) == 2
        with pytest.raises(LocalError, match="mine") as caught:
            await pool.run_sync(fail)
        assert caught.value.__cause__ is not None
        assert isinstance(caught.value.__cause__.__cause__, KeyError)
        async with pool.stream(generate, 3) as parts:
            assert [part async for part in parts] == [0, 3, 6]
        async with pool.map(lambda one, two: one - two, [5, 6], [1, 2]) as results:
            assert [result async for result in results] == [4, 4]
        data = b"x" * (2 * OUT_OF_BAND)
        assert await pool.run_sync(lambda *values: values, data, [pickle.PickleBuffer(data)], data) == (
            data,
            [data],
            data,
        )


async def test_cloudpickle_fails_with_the_same_errors(cloudpickle: Any) -> None:
    """Point 5: what can't be pickled by value either is named as without it, and the extra is not recommended."""

    def fail_locally() -> None:
        raise jobs.local_class()

    async with one_worker(pickler="cloudpickle") as pool:
        text = await refusal(pool, lambda *_: None, 1, threading.Lock())
        assert "argument 2 of " in text
        assert "<lambda>, of type lock, can't be pickled" in text
        assert EXTRA not in text
        lock = threading.Lock()
        text = await refusal(pool, lambda: lock)
        assert "<lambda> can't be pickled: TypeError" in text
        assert EXTRA not in text
        assert "the result of " in str(await error_of(pool, lambda: threading.Lock()))
        assert "argument 1 of " in str(await error_of(pool, lambda *_: None, jobs.Loading("in a worker")))
        with pytest.raises(TypeError, match="is async"):
            await pool.run_sync(jobs.asynchronous)
        error = await error_of(pool, fail_locally)
        assert type(error).__name__ in ("Local", "JobError")
        assert "local" in str(error)


async def test_cloudpickle_initializer(cloudpickle: Any) -> None:
    """Point 5: an initializer without a name works with it."""
    kept = "by value"

    def initialize(value: str) -> None:
        os.environ["KEPT"] = kept + value

    async with one_worker(pickler="cloudpickle", initializer=initialize, initargs=["!"]) as pool:
        assert await pool.run_sync(os.getenv, "KEPT") == "by value!"


async def test_cloudpickle_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Point 5: without the extra, one clear sentence names it, before any worker is started."""
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        open_python_pool(1, pickler="cloudpickle")
    assert str(caught.value) == f"pickler=\"cloudpickle\" needs the extra: pip install '{EXTRA}'"
    assert caught.value.name == "cloudpickle"
    assert caught.value.__suppress_context__
    async with one_worker() as pool:
        assert await pool.run_sync(jobs.answer) == 42


async def test_cloudpickle_that_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Point 5: one that is there and lacks something of its own is not said to be missing."""
    (tmp_path / "cloudpickle.py").write_text("import something_that_cloudpickle_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cloudpickle", raising=False)
    with pytest.raises(ModuleNotFoundError, match="something_that_cloudpickle_needs"):
        open_python_pool(1, pickler="cloudpickle")


@pytest.mark.parametrize("pickler", ["dill", "", None, pickle])
def test_other_picklers(pickler: Any) -> None:
    """Point 5: there are two."""
    with pytest.raises((TypeError, ValueError), match="pickler must be "):
        open_python_pool(1, pickler=pickler)


FROM_NOWHERE: Final = """
import trio
from trio_workers import open_python_pool

def double(value):
    return Kind(value.number * FACTOR)

class Kind:
    def __init__(self, number):
        self.number = number

FACTOR = 2

class Broken(Exception):
    pass

def fail():
    raise Broken("of main")

def count(number):
    yield from map(Kind, range(number))

async def main():
    async with open_python_pool(1, pickler="cloudpickle", boot_timeout=30) as pool:
        result = await pool.run_sync(double, Kind(21))
        assert type(result) is Kind
        print(result.number, await pool.run_sync(lambda: FACTOR))
        try:
            await pool.run_sync(fail)
        except Broken as error:
            print(type(error.__cause__).__name__)
        async with pool.stream(count, 2) as parts:
            print([part.number async for part in parts])

trio.run(main)
"""


@pytest.mark.parametrize("way", ["-c", "stdin"])
def test_cloudpickle_needs_no_main_module(way: str, cloudpickle: Any, tmp_path: Path) -> None:
    """Point 5: functions and classes of a program from stdin or from -c work with it, in both directions."""
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-W", "error", *(["-c", FROM_NOWHERE] if way == "-c" else ["-"])]
    done = subprocess.run(
        command,
        input=None if way == "-c" else FROM_NOWHERE,
        stdin=subprocess.DEVNULL if way == "-c" else None,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        timeout=50,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["42 2", "RemoteTraceback", "[0, 1]"]


# --- buffers --------------------------------------------------------------------------------------------------------


def pattern(size: int) -> bytes:
    """So many bytes, no two regions of which are alike."""
    block = b"".join(number.to_bytes(4, "little") for number in range(4096))
    return (block * (size // len(block) + 1))[:size]


PLAIN: Final[dict[str, Callable[[bytes], Any]]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "array": lambda data: array.array("B", data),
    "list of bytes": lambda data: [data, data[1:]],
    "dict of a bytearray": lambda data: {"key": bytearray(data)},
    "str": lambda data: data.decode("latin-1"),
}


@pytest.mark.parametrize("kind", PLAIN)
async def test_plain_buffers_go_round(kind: str) -> None:
    """Point 5: what is no array is the same type with the same content, there and back, at every size."""
    async with one_worker() as pool:
        for size in (*SIZES, 20 * MIB):
            value = PLAIN[kind](pattern(size))
            back = await pool.run_sync(jobs.echo, value)
            assert type(back) is type(value)
            assert back == value
            seen, mirrored = await pool.run_sync(jobs.echo_all, value, value)
            assert type(seen) is type(mirrored) is type(value)
            assert seen == mirrored == value


@pytest.mark.parametrize("source", ["bytes", "bytearray", "array"])
async def test_pickle_buffers_go_round(source: str) -> None:
    """Point 5: a `PickleBuffer` arrives as what holds its bytes: writable if it was, in the child and here."""
    async with one_worker() as pool:
        for size in (*SIZES, 20 * MIB):
            data = pattern(size)
            value: Any = {
                "bytes": lambda data=data: data,
                "bytearray": lambda data=data: bytearray(data),
                "array": lambda data=data: array.array("B", data),
            }[source]()
            read_only = source == "bytes"
            for lifted in (pickle.PickleBuffer(value), [pickle.PickleBuffer(value)]):
                back = await pool.run_sync(jobs.echo, lifted)
                if isinstance(lifted, list):
                    (back,) = back
                assert bytes(back) == data
                assert memoryview(back).readonly == read_only
                assert (type(back) is bytes) == read_only
            kind, access, count, shown = await pool.run_sync(jobs.describe, pickle.PickleBuffer(value))
            assert (access, count) == ("read-only" if read_only else "writable", size)
            assert (kind == "bytes") == read_only
            assert shown is None or shown == data


@pytest.mark.parametrize("pickler", ["pickle", "cloudpickle"])
async def test_arrays_go_round(pickler: str, numpy: Any, request: pytest.FixtureRequest) -> None:
    """Point 5: arrays of every size arrive with their type, shape and content, and writable on both sides."""
    if pickler == "cloudpickle":
        request.getfixturevalue("cloudpickle")
    async with one_worker(pickler=pickler) as pool:
        for size in (*SIZES, 20 * MIB):
            for dtype in ("u1", "f8"):
                value = numpy.arange(size // numpy.dtype(dtype).itemsize, dtype=dtype)
                total, writable, shape, name = await pool.run_sync(jobs.sum_array, value)
                assert (total, writable, shape, name) == (float(value.sum()), True, value.shape, str(value.dtype))
                back = await pool.run_sync(jobs.echo, value)
                assert back.dtype == value.dtype
                assert back.flags.writeable
                assert numpy.array_equal(back, value)
                back[...] = 1  # no memory of anybody else's
                assert not size or not numpy.array_equal(back, value) or size < 16
            doubled = await pool.run_sync(jobs.double_in_place, numpy.ones(size, dtype="u1"))
            assert (doubled == 2).all()
            assert doubled.flags.writeable


async def test_caller_keeps_its_array(numpy: Any) -> None:
    """Point 5: what a job writes to its argument is not seen here: the memory is the worker's own."""
    value = numpy.ones(MIB)
    async with one_worker() as pool:
        doubled = await pool.run_sync(jobs.double_in_place, value)
        assert (value == 1).all()
        assert (doubled == 2).all()
        doubled[:] = 3
        assert (await pool.run_sync(jobs.double_in_place, value) == 2).all()


async def test_read_only_arrays(numpy: Any) -> None:
    """Point 5: an array that can't be written to here can't be there either, at every size, and no less back here."""
    async with one_worker() as pool:
        for size in (1, 1000, OUT_OF_BAND - 1, OUT_OF_BAND, MIB):
            value = numpy.arange(size, dtype="u1")
            value.flags.writeable = False
            total, writable, shape, _ = await pool.run_sync(jobs.sum_array, value)
            assert (total, writable, shape) == (float(value.sum()), False, (size,))
            back = await pool.run_sync(jobs.echo, value)
            assert numpy.array_equal(back, value)
            assert not back.flags.writeable
            assert not (await pool.run_sync(functools.partial(jobs.give_array, size, writable=False))).flags.writeable
            assert (await pool.run_sync(jobs.give_array, size)).flags.writeable


async def test_arrays_of_every_layout(numpy: Any) -> None:
    """Point 5: pieces, steps, turned round, in Fortran's order, of structures, of objects, of no size, of one item."""
    base = numpy.arange(40_000, dtype="i4").reshape(200, 200)
    values = {
        "steps": base[::2, ::3],
        "turned round": base[::-1],
        "transposed": base.T,
        "Fortran": numpy.asfortranarray(base),
        "column": base[:, 5],
        "inner piece": base[10:190, 10:190],
        "rows": base[50:150],
        "broadcast": numpy.broadcast_to(numpy.arange(200), (200, 200)),
        "three axes": base.reshape(20, 10, 200).swapaxes(0, 2),
        "structure": numpy.zeros(5000, dtype=[("a", "i4"), ("b", "f8")]),
        "objects": numpy.array([None, "text", 3] * 5000, dtype=object),
        "other byte order": base.astype(">i4"),
        "bool": base > 1000,
        "complex": base.astype("c16"),
        "text": base.astype("U8"),
        "time": numpy.arange(10_000).astype("M8[s]"),
        "empty": numpy.empty((0, 5)),
        "single": numpy.array(7.5),
        "scalar": numpy.float64(7.5),
        "masked": numpy.ma.masked_less(base, 1000),
    }
    async with one_worker() as pool:
        for name, value in values.items():
            back = await pool.run_sync(jobs.echo, value)
            assert type(back) is type(value), name
            assert back.dtype == value.dtype, name
            assert back.shape == value.shape, name
            assert numpy.array_equal(back, value), name
            if name == "Fortran":
                assert back.flags.f_contiguous


async def test_five_thousand_buffers(numpy: Any) -> None:
    """Point 5: many buffers in one call arrive in their order, each in memory of its own, there and back."""
    block = numpy.zeros(OUT_OF_BAND, dtype="u1")
    values = [block[:] for _ in range(5000)]
    async with one_worker() as pool:
        assert await pool.run_sync(jobs.write_to_each, values) == 5000
        numbered = [numpy.full(OUT_OF_BAND, number % 251, dtype="u1") for number in range(500)]
        back = await pool.run_sync(jobs.echo, numbered)
        assert all((one == number % 251).all() for number, one in enumerate(back))
        assert await pool.run_sync(jobs.write_to_each, back) == 500


async def test_more_buffers_than_travel_beside(numpy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point 5: those above the number that travels beside the pickle go inside it, and nothing is lost."""
    monkeypatch.setattr(_functions, "MOST_BUFFERS", 10)
    values = [numpy.full(OUT_OF_BAND, number, dtype="u1") for number in range(15)]
    async with one_worker() as pool:
        back = await pool.run_sync(jobs.echo, values)
        assert all((one == number).all() and one.flags.writeable for number, one in enumerate(back))


async def test_buffers_in_streams_and_maps(numpy: Any) -> None:
    """Point 5: the same for the parts of a stream and for a map's items and results."""
    arrays = [numpy.full(100_000, number, dtype="u1") for number in range(5)]
    async with one_worker() as pool:
        async with pool.map(jobs.double_in_place, arrays) as results:
            found = [result async for result in results]
        assert all((one == 2 * number).all() and one.flags.writeable for number, one in enumerate(found))
        async with pool.stream(operator.itemgetter(slice(None)), arrays) as parts:
            found = [part async for part in parts]
        assert all((one == number).all() and one.flags.writeable for number, one in enumerate(found))
        async with pool.lease() as worker:
            assert numpy.array_equal(await worker.run_sync(jobs.echo, arrays[3]), arrays[3])


async def test_sixty_four_mebibytes(numpy: Any) -> None:
    """Point 5: 64 MiB there and back, as an array and as bytes."""
    async with one_worker() as pool:
        value = numpy.arange(8 * MIB, dtype="f8")
        back = await pool.run_sync(jobs.double_in_place, value)
        assert numpy.array_equal(back, 2 * value)
        del value, back
        data = pattern(64 * MIB)
        assert await pool.run_sync(jobs.echo, data) == data


async def test_bytes_are_not_copied_into_the_pickle() -> None:
    """Point 5: large bytes and buffers go out as they are: the pieces of a call are the objects themselves."""
    codec = _functions.FunctionCodec("pickle", None)
    data, writable = bytes(MIB), bytearray(MIB)
    for args in ([data], [data, 1], [1, [pickle.PickleBuffer(writable)], data]):
        pieces = codec.encode_call(jobs.take, args)
        beside = [piece.obj for piece in pieces if isinstance(piece, memoryview)]
        assert any(one is data for one in beside)
        assert sum(len(piece) for piece in pieces if not isinstance(piece, memoryview)) < 1000


IN_CIRCLES: Final = """
import gc, pickle, sys, trio
from tests import python_error_jobs as jobs
from trio_workers import open_python_pool

def circle(value):
    values = [value]
    values.append(values)

async def main():
    async with open_python_pool(1, boot_timeout=30) as pool:
        for size in (100, 100_000, 1_000_000):
            for _ in range(10):
                circle(await pool.run_sync(jobs.echo, pickle.PickleBuffer(bytearray(size))))
                circle(await pool.run_sync(jobs.echo, [bytes(size), pickle.PickleBuffer(bytes(size))]))
                gc.collect()
        for writable in (True, False):
            for _ in range(3):
                await pool.run_sync(jobs.answer)
                (worker,) = pool.workers
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pool.run_sync, jobs.answer_in_part, writable)
                    while not worker.line.conversation.pending:
                        await trio.sleep(0.001)
                    nursery.cancel_scope.cancel()
                del worker
                await pool.run_sync(jobs.answer)
                gc.collect()
    gc.collect()
    print("done")

trio.run(main)
gc.collect()
"""


@pytest.mark.faults
def test_results_in_circles(tmp_path: Path) -> None:
    """Point 5: results, and the halves of results that a cancel left, may end in the garbage collector's hands.

    In a process of its own: what goes wrong there is a crash of the interpreter.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "faulthandler", "-c", IN_CIRCLES],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


async def test_arguments_in_circles(caplog: pytest.LogCaptureFixture) -> None:
    """Point 5: the same for arguments in the worker: it neither crashes nor complains."""
    async with one_worker() as pool:
        for size in (100, 100_000, 1_000_000):
            for _ in range(10):
                await pool.run_sync(jobs.leave_in_circle, pickle.PickleBuffer(bytearray(size)))
                await pool.run_sync(jobs.leave_in_circle, [bytes(size), pickle.PickleBuffer(bytes(size))])
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]


# --- what is shared -------------------------------------------------------------------------------------------------


async def test_arguments_that_are_one_object(numpy: Any) -> None:
    """Point 5: f(x, x) gets one object twice, as it does here, also inside others and with the method's own object."""
    async with one_worker() as pool:
        for value in (
            [1, 2],
            jobs.Tracked(10),
            bytearray(MIB),
            "text" * 10,
            b"small",
            b"x" * OUT_OF_BAND,
            b"x" * MIB,
            numpy.ones(10),
            numpy.ones(MIB),
        ):
            assert await pool.run_sync(jobs.are_one, value, value), type(value)
            assert await pool.run_sync(jobs.are_one, value, value, value), type(value)
            assert not await pool.run_sync(jobs.are_one, value, [value])
            assert await pool.run_sync(jobs.are_one_inside, [value], {"inside": value}), type(value)
            if type(value) is not bytes:  # which nobody can change: large ones go their own way where they come alone
                assert await pool.run_sync(functools.partial(jobs.are_one, value), value), type(value)
        owner = jobs.WithMethod()
        assert await pool.run_sync(owner.is_self, owner)
        assert not await pool.run_sync(owner.is_self, jobs.WithMethod())


async def test_results_that_share() -> None:
    """Point 5: what is one object in a result is one here; two results share nothing."""
    async with one_worker() as pool:
        shared = [1]
        one, two = await pool.run_sync(jobs.echo_all, shared, shared)
        assert one is two
        circle: list[object] = []
        circle.append(circle)
        back = await pool.run_sync(jobs.echo, circle)
        assert back[0] is back
        assert await pool.run_sync(jobs.echo, shared) is not await pool.run_sync(jobs.echo, shared)


async def test_calls_share_nothing() -> None:
    """Point 5: an object that is sent twice is another one the second time, as it is then."""
    value = [1]
    async with one_worker() as pool:
        assert await pool.run_sync(jobs.echo_all, value, 1) == ([1], 1)
        value.append(2)
        assert await pool.run_sync(jobs.echo_all, value, 1) == ([1, 2], 1)


# --- max_frame_size -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [True, False], ids=["beside the pickle", "inside the pickle"])
async def test_call_over_the_limit(beside: bool) -> None:
    """Point 5: a call over `max_frame_size` is a ValueError that names the function, before any worker is taken."""
    value = b"x" * MIB if beside else "x" * MIB
    async with one_worker(max_frame_size=MIB // 2) as pool:
        before = pool.statistics().jobs
        for _ in range(2):
            with pytest.raises(
                ValueError, match=rf"a call of {JOBS}.take takes 1,\d\d\d,\d\d\d bytes, more than max_frame"
            ):
                await pool.run_sync(jobs.take, value)
            with pytest.raises(ValueError, match=f"a call of {JOBS}.generator takes .* more than max_frame_size"):
                pool.stream(jobs.generator, value)
        assert pool.statistics().jobs == before
        assert await pool.run_sync(jobs.echo, value[: MIB // 4]) == value[: MIB // 4]


async def test_call_of_exactly_the_limit() -> None:
    """Point 5: both sides count alike: a call and a result of the very size are taken, one of a byte more is not."""
    limit = 200_000
    async with one_worker(max_frame_size=limit) as pool:
        size = limit - 1000
        with pytest.raises(ValueError, match="more than max_frame_size") as caught:
            while True:
                assert len(await pool.run_sync(jobs.echo, bytes(size))) == size
                size += 1
        assert f"{limit + 1:,} bytes" in str(caught.value)


@pytest.mark.parametrize("job", ["bytes", "array", "str", "part"])
async def test_result_over_the_limit(job: str, numpy: Any) -> None:
    """Point 5: a result over `max_frame_size` is a `RelayError` of that job, and its worker is replaced."""
    async with open_python_pool(1, max_frame_size=MIB // 2, boot_timeout=30.0) as pool:
        pid = await pool.run_sync(os.getpid)
        with pytest.raises(RelayError, match="is larger than max_frame_size") as caught:
            match job:
                case "bytes":
                    await pool.run_sync(bytes, MIB)
                case "array":
                    await pool.run_sync(jobs.give_array, MIB)
                case "str":
                    await pool.run_sync(operator.mul, "x", MIB)
                case _:
                    async with pool.stream(map, bytes, [1, MIB]) as parts:
                        assert await anext(parts) == b"\0"
                        await anext(parts)
        assert not isinstance(caught.value, WorkerCrashed)
        assert caught.value.pid == pid
        assert len(await pool.run_sync(bytes, MIB // 4)) == MIB // 4
        assert await pool.run_sync(os.getpid) != pid


# --- what is dropped in the child -----------------------------------------------------------------------------------


async def alive_in_child(pool: PythonPool, count: int) -> int:
    """How many of so many objects of earlier jobs are still there, as a later job sees it."""
    still_there, tracked = await pool.run_sync(jobs.count_alive)
    assert tracked == count
    return still_there


async def test_child_drops_arguments() -> None:
    """Point 5: when a job is over its arguments are gone, however many there are, positional or bound."""
    async with one_worker() as pool:
        await pool.run_sync(jobs.track_all, jobs.Tracked(MIB))
        assert await alive_in_child(pool, 1) == 0
        await pool.run_sync(jobs.track_all, jobs.Tracked(), jobs.Tracked(MIB), jobs.Tracked())
        assert await alive_in_child(pool, 3) == 0
        await pool.run_sync(functools.partial(jobs.track_all, jobs.Tracked(), key=jobs.Tracked()))
        assert await alive_in_child(pool, 2) == 0
        async with pool.lease() as worker:
            await worker.run_sync(jobs.track_all, jobs.Tracked())
        assert await alive_in_child(pool, 1) == 0


async def test_child_drops_results() -> None:
    """Point 5: when a job is over its result is gone, of whatever kind."""
    async with one_worker() as pool:
        for size in (0, MIB):
            assert len((await pool.run_sync(jobs.track_result, size)).data) == size
            assert await alive_in_child(pool, 1) == 0
            await pool.run_sync(jobs.track_and_return, jobs.Tracked(size))
            assert await alive_in_child(pool, 1) == 0
        async with pool.map(jobs.track_result, [1, 2, 3]) as results:
            async for _ in results:
                pass
        assert await alive_in_child(pool, 3) == 0


@pytest.mark.parametrize("size", [100, 2 * OUT_OF_BAND, 2 * MIB])
async def test_child_drops_arrays(size: int, numpy: Any) -> None:
    """Point 5: also what travels beside the pickle, in both directions."""
    async with one_worker() as pool:
        await pool.run_sync(jobs.track_array, numpy.ones(size, dtype="u1"))
        assert await alive_in_child(pool, 2) == 0


@pytest.mark.parametrize(
    ("job", "kind"),
    [
        (jobs.track_and_fail, ValueError),
        (functools.partial(jobs.track_and_fail, name="required keyword"), JobError),
        (functools.partial(jobs.track_and_fail, name="SystemExit"), JobError),
        (functools.partial(jobs.track_and_fail, name="group"), ExceptionGroup),
        (jobs.track_and_fail_with, jobs.Plain),
        (jobs.track_and_give_unpicklable, JobError),
    ],
    ids=["exception", "unpicklable exception", "exit", "group", "exception that holds it", "unpicklable result"],
)
async def test_child_drops_after_an_exception(job: Callable[..., object], kind: type[Exception]) -> None:
    """Point 5: nor do an exception and its traceback hold anything once they have been sent."""
    async with one_worker() as pool:
        assert isinstance(await error_of(pool, job, jobs.Tracked()), kind)
        assert await alive_in_child(pool, 1) == 0


async def test_child_drops_what_a_stream_was() -> None:
    """Point 5: a stream's argument and its parts are gone with its end, its error, or its early leave."""
    async with one_worker() as pool:
        async with pool.stream(jobs.track_parts, jobs.Tracked(), 3) as parts:
            assert len([part async for part in parts]) == 3
        assert await alive_in_child(pool, 4) == 0
        with pytest.raises(ValueError, match="text"):
            async with pool.stream(jobs.track_parts_and_fail, jobs.Tracked()) as parts:
                async for _ in parts:
                    pass
        assert await alive_in_child(pool, 3) == 0
        async with pool.stream(jobs.track_parts, jobs.Tracked(), 10**9) as parts:
            await anext(parts)
        still_there, tracked = await pool.run_sync(jobs.count_alive)
        assert tracked >= 2
        assert still_there == 0


async def test_child_drops_parts_one_by_one() -> None:
    """Point 5: a part is gone once it is sent, not only when its stream ends."""
    async with one_worker() as pool, pool.stream(jobs.count_parts_alive, 5) as parts:
        # The one that is being sent may be there while the next one is made; none before it.
        assert [count async for _, count in parts] == [0] * 5


# --- what is dropped here -------------------------------------------------------------------------------------------


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Let nothing hide what lives in circles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def gone(*references: "weakref.ref[object]") -> None:
    """Wait until these are gone, which may take the end of a task."""
    await until(lambda: all(one() is None for one in references), 20)


async def run_and_forget(pool: PythonPool, kind: type[BaseException] | None, function: Any, *more: object) -> Any:
    """Run a job with an object that nobody else holds, and return a weak reference to it."""
    value = jobs.Tracked(2 * OUT_OF_BAND)
    reference = weakref.ref(value)
    if kind is None:
        await pool.run_sync(function, value, *more)
    else:
        with contextlib.suppress(kind):
            await pool.run_sync(function, value, *more)
            raise AssertionError
    return reference


@pytest.mark.parametrize(
    ("kind", "function", "more"),
    [
        (None, jobs.take, ()),
        (None, jobs.echo_all, (1, "text")),
        (ValueError, jobs.track_and_fail, ()),
        (JobError, jobs.track_and_fail, ("SystemExit",)),
        (JobError, jobs.track_and_give_unpicklable, ()),
        (pickle.PicklingError, jobs.take, (threading.Lock(),)),
        (TypeError, jobs.asynchronous, ()),
        (WorkerCrashed, jobs.crash, ()),
    ],
    ids=["result", "results", "exception", "JobError", "unpicklable result", "unpicklable", "async", "crash"],
)
async def test_parent_drops_arguments(
    kind: type[BaseException] | None, function: Callable[..., object], more: tuple[object, ...], no_collection: None
) -> None:
    """Point 5: when a call has returned or raised, nothing of the pool's holds its arguments."""
    async with open_python_pool(1, boot_timeout=30.0) as pool:
        await gone(await run_and_forget(pool, kind, function, *more))


@pytest.mark.parametrize("size", [100, 2 * OUT_OF_BAND, 4 * MIB])
async def test_parent_drops_arrays(size: int, numpy: Any, no_collection: None) -> None:
    """Point 5: also what was written from where it is, and results that were read where they stay."""
    async with one_worker() as pool:
        value = numpy.ones(size, dtype="u1")
        back = await pool.run_sync(jobs.double_in_place, value)
        references = weakref.ref(value), weakref.ref(back)
        del value, back
        await gone(*references)
        value = numpy.ones(size, dtype="u1")
        with contextlib.suppress(ValueError):
            await pool.run_sync(jobs.track_and_fail, value)
        references = weakref.ref(value), weakref.ref(value)
        del value
        await gone(*references)


@pytest.mark.faults
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
async def test_parent_drops_arguments_of_a_cancelled_job(
    large: bool, numpy: Any, no_collection: None, tmp_path: Path
) -> None:
    """Point 5: when a job was cancelled while it ran, or while its argument was on its way."""
    note = tmp_path / "note"
    async with open_python_pool(1, boot_timeout=30.0) as pool:
        value = numpy.ones(16 * MIB if large else 100, dtype="u1")
        reference = weakref.ref(value)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run_sync, jobs.note_and_wait, str(note), value)
            del value
            await until(note.exists)
            nursery.cancel_scope.cancel()
        await gone(reference)
        value = numpy.ones(16 * MIB if large else 100, dtype="u1")
        reference = weakref.ref(value)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run_sync, jobs.take, value)
            del value
            await until(lambda: pool.statistics().busy)
            nursery.cancel_scope.cancel()
        await gone(reference)
        assert await pool.run_sync(jobs.answer) == 42


async def test_parent_drops_arguments_of_a_job_that_waited(no_collection: None, tmp_path: Path) -> None:
    """Point 5: when a job was cancelled in the queue."""
    note = tmp_path / "note"
    async with open_python_pool(1, boot_timeout=30.0) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.run_sync, jobs.note_and_wait, str(note), 1)
        await until(note.exists)
        value = jobs.Tracked()
        reference = weakref.ref(value)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(pool.run_sync, jobs.take, value)
                del value
                await until(lambda: pool.statistics().waiting)
                scope.cancel()
        await gone(reference)
        nursery.cancel_scope.cancel()


async def test_parent_drops_what_a_map_took(no_collection: None) -> None:
    """Point 5: items and results that are done with are gone while the map goes on."""
    references: list[weakref.ref[object]] = []

    def source() -> Iterator[jobs.Tracked]:
        for _ in range(20):
            value = jobs.Tracked()
            references.append(weakref.ref(value))
            yield value
            del value

    async with one_worker() as pool:
        async with pool.map(jobs.echo, source(), window=2) as results:
            async for result in results:
                references.append(weakref.ref(result))
                del result
                assert sum(one() is not None for one in references) <= 6
        del results
        await gone(*references)


async def test_parent_drops_what_a_stream_took(no_collection: None) -> None:
    """Point 5: a stream's argument is gone when the stream is, its parts when their taker lets them go."""
    async with one_worker() as pool:
        value = jobs.Tracked()
        references: list[weakref.ref[object]] = [weakref.ref(value)]
        parts = pool.stream(jobs.track_parts, value, 3)
        del value
        async with parts:
            async for part in parts:
                references.append(weakref.ref(part))
                del part
                assert sum(one() is not None for one in references[1:]) == 0
        del parts
        await gone(*references)


async def test_parent_drops_exceptions(no_collection: None) -> None:
    """Point 5: a job's exception is gone when its catcher lets it go, with its traceback and its causes."""
    async with one_worker() as pool:
        for name in ("attributes", "group", "required keyword", "SystemExit"):
            references: list[weakref.ref[object]] = []
            try:
                await pool.run_sync(jobs.fail, name)
            except Exception as error:
                references.append(weakref.ref(error))
                if error.__cause__ is not None:
                    references.append(weakref.ref(error.__cause__))
            await gone(*references)
