"""Exceptions of jobs: they arrive as themselves, or as a `JobError` with everything there is to say (point 4).

None of them costs the worker. The functions that run in workers are in `python_error_jobs.py`.
"""

import os
import pickle
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio

from tests import python_error_jobs as jobs
from trio_workers import (
    JobError,
    PythonPool,
    RelayError,
    RemoteTraceback,
    SpawnError,
    WorkerCrashed,
    open_python_pool,
)

JOBS_FILE: Final = os.path.basename(jobs.__file__)
OUR_FILES: Final = (os.path.join("trio_workers", "child"), os.path.join("trio_workers", "_"))
ON_TOP: Final = "Traceback (most recent call last):\n"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what behaves in another way in the parent know which process that is."""
    monkeypatch.setenv(jobs.PARENT, str(os.getpid()))


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
        assert set(now.jobs) <= {"replied", "failed"}


async def error_of(pool: PythonPool, function: Callable[..., object], *args: object) -> Exception:
    with pytest.raises(Exception) as caught:
        await pool.run_sync(function, *args)
    assert isinstance(caught.value, Exception)
    return caught.value


def text_of(error: BaseException) -> str:
    """The worker's traceback, as it is shown; every exception that came as itself has one."""
    remote = error.__cause__
    assert type(remote) is RemoteTraceback
    return str(remote)


def check_text(text: str, *, function: str) -> None:
    """A traceback begins in the job and shows nothing of ours."""
    assert text.lstrip("\n").startswith((ON_TOP, "  + Exception Group " + ON_TOP))
    first = next(line for line in text.splitlines() if 'File "' in line)
    assert JOBS_FILE in first
    assert f"in {function}" in first
    assert not any(name in text for name in OUR_FILES)


def shown(value: object) -> str:
    try:
        return repr(value)
    except BaseException as error:
        return f"{type(value).__name__} with {type(error).__name__}"


def same(one: BaseException, two: BaseException) -> None:
    """Two exceptions say the same, with all that hangs on their members."""
    assert type(one) is type(two)
    assert one.__dict__ == two.__dict__
    if isinstance(one, BaseExceptionGroup):
        assert isinstance(two, BaseExceptionGroup)
        assert one.message == two.message
        for ones, twos in zip(one.exceptions, two.exceptions, strict=True):
            same(ones, twos)
    else:
        assert one.args == two.args
        for name in ("errno", "filename", "filename2", "name", "path", "lineno", "offset", "text", "value", "message"):
            assert getattr(one, name, None) == getattr(two, name, None)
    assert shown(one) == shown(two)


# --- as themselves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", jobs.AS_THEMSELVES)
async def test_arrives_as_itself(name: str) -> None:
    """Point 4: type, arguments, attributes and notes are those of the exception that the job raised."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.fail, name)
        same(error, jobs.make(name))
        text = text_of(error)
        check_text(text, function="fail")
        assert "raise make(name)" in text
        assert type(error).__name__ in text
        assert error.__cause__ is not None
        assert error.__cause__.__cause__ is None
        assert error.__context__ is None


async def test_the_caller_sees_both_tracebacks() -> None:
    """Point 4: what is printed of it shows the worker's frames, then ours, and says which led to which."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.divide, 0)
    assert type(error) is ZeroDivisionError
    printed = "".join(traceback.format_exception(error))
    there, middle, here = printed.partition("\nThe above exception was the direct cause of the following exception:\n")
    assert middle
    assert f"trio_workers.RemoteTraceback: \n{ON_TOP}" in there
    assert "return 1 / number" in there
    assert "in error_of" in here
    assert here.rstrip().endswith("ZeroDivisionError: division by zero")


async def test_notes_are_shown_once() -> None:
    """Point 4: notes are with the exception and in the worker's text, and are not doubled."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.fail, "notes")
    assert error.__notes__ == ["first note", "second note\nof two lines"]
    assert text_of(error).count("first note") == 1


async def test_frames_of_the_job_are_all_there() -> None:
    """Point 4: from the job's function down to the line that raised."""
    async with one_worker() as pool:
        text = text_of(await error_of(pool, jobs.raise_from))
    assert "in raise_from" in text
    assert "in look_up" in text
    assert "note of the cause" in text


async def test_error_of_c_code() -> None:
    """Point 4: a function without a frame of its own has a traceback without frames, and none of ours."""
    async with one_worker() as pool:
        error = await error_of(pool, int, "no number")
        assert type(error) is ValueError
        assert str(error) == "invalid literal for int() with base 10: 'no number'"
        text = text_of(error)
        assert "ValueError: invalid literal" in text
        assert not any(name in text for name in OUR_FILES)


async def test_wrong_number_of_arguments() -> None:
    """Point 4: a call that does not fit the function is the TypeError that it is anywhere."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.divide)
        assert type(error) is TypeError
        assert "missing 1 required positional argument" in str(error)


async def test_error_can_be_pickled_again() -> None:
    """Point 4: what came from a worker can be raised in another one, or be written to a file."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.fail, "attributes")
        same(pickle.loads(pickle.dumps(error)), error)
        again = await error_of(pool, jobs.raise_given, error)
        same(again, error)
        assert again is not error
        remote = pickle.loads(pickle.dumps(error.__cause__))
        assert str(remote) == str(error.__cause__)


async def test_same_error_twice() -> None:
    """Point 4: each job's exception is an object of its own, with its own traceback."""
    async with one_worker() as pool:
        one, two = await error_of(pool, jobs.fail, "notes"), await error_of(pool, jobs.fail, "notes")
    assert one is not two
    assert one.__cause__ is not two.__cause__
    assert one.__notes__ == two.__notes__


# --- chains and groups ----------------------------------------------------------------------------------------------


def check_cause(cause: BaseException | None) -> None:
    assert type(cause) is KeyError
    assert cause.args == ("the key",)
    assert cause.__notes__ == ["note of the cause"]
    assert cause.attribute == 5  # type: ignore[attr-defined]


async def test_raise_from() -> None:
    """Point 4: an explicit cause hangs behind the worker's traceback, as an object, and is in the text."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.raise_from)
    assert type(error) is jobs.Plain
    remote = error.__cause__
    assert remote is not None
    check_cause(remote.__cause__)
    assert error.__context__ is remote.__cause__
    text = text_of(error)
    assert "The above exception was the direct cause of the following exception:" in text
    check_text(text, function="raise_from")
    printed = "".join(traceback.format_exception(error))
    assert printed.count("The above exception was the direct cause of the following exception:") == 3


async def test_raise_in_a_handler() -> None:
    """Point 4: an implicit context is kept, as an object and in the text."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.raise_in_handler)
    check_cause(error.__context__)
    assert error.__cause__ is not None
    assert error.__cause__.__cause__ is None
    text = text_of(error)
    assert "During handling of the above exception, another exception occurred:" in text
    check_text(text, function="raise_in_handler")


async def test_raise_from_none() -> None:
    """Point 4: a context that the job wants not to be shown is not shown, and is still there."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.raise_from_none)
    check_cause(error.__context__)
    assert error.__suppress_context__
    text = text_of(error)
    assert "KeyError" not in text
    assert "KeyError" not in "".join(traceback.format_exception(error))


async def test_three_kinds_of_links() -> None:
    """Point 4: a chain keeps the kind of each link, past one that is no `Exception`."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.raise_from_three_kinds)
    assert error.__cause__ is not None
    third = error.__cause__.__cause__
    assert isinstance(third, OSError)
    assert third.errno == 5
    assert third.__cause__ is None
    assert not third.__suppress_context__
    second = third.__context__
    assert isinstance(second, KeyError)
    assert second.__suppress_context__
    first = second.__cause__
    assert type(first) is KeyboardInterrupt
    assert first is second.__context__
    assert first.args == ("the first",)
    assert first.__context__ is None


async def test_long_chain() -> None:
    """Point 4: five hundred links are five hundred links."""
    async with one_worker() as pool:
        error: BaseException | None = await error_of(pool, jobs.raise_from_long_chain, 500)
    assert error is not None
    assert error.__cause__ is not None
    found = [error.args[0]]
    error = error.__cause__.__cause__
    while error is not None:
        found.append(error.args[0])
        error = error.__cause__
    assert found == list(range(499, -1, -1))


@pytest.mark.parametrize("job", [jobs.raise_in_a_circle, jobs.raise_from_itself])
async def test_circle(job: Callable[[], object]) -> None:
    """Point 4: a chain that leads back to its beginning arrives, and can be printed."""
    async with one_worker() as pool:
        error = await error_of(pool, job)
    assert type(error) is ValueError
    assert type(error.__cause__) is RemoteTraceback
    assert "ValueError" in "".join(traceback.format_exception(error))


@pytest.mark.parametrize("job", [jobs.raise_from_unpicklable, jobs.raise_from_lie])
async def test_cause_that_can_not_be_sent(job: Callable[[], object]) -> None:
    """Point 4: a link that does not survive takes nothing with it but the chain: the text has it all."""
    async with one_worker() as pool:
        error = await error_of(pool, job)
    same(error, jobs.Plain("the effect"))
    text = text_of(error)
    assert "The above exception was the direct cause of the following exception:" in text
    assert "Holding: with a lock" in text or "Reducing: the lie" in text
    assert error.__cause__ is not None
    assert error.__cause__.__cause__ is None


async def test_cause_that_can_not_be_read_here() -> None:
    """Point 4: a link that survives in the child and not here costs the exception, and not its text."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.raise_from_broken_in_parent)
    assert type(error) is JobError
    assert "Reducing: the cause" in str(error)
    assert "Plain: the effect" in str(error)
    assert str(error).endswith("(the exception itself could not be read here: RuntimeError: not here)")


async def test_group_with_causes() -> None:
    """Point 4: members of a group keep their own causes and contexts, and stay one where they were one."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.raise_group_with_causes)
    assert isinstance(error, ExceptionGroup)
    first, second, inner = error.exceptions
    check_cause(first.__cause__)
    assert first.__context__ is first.__cause__
    check_cause(second.__context__)
    assert second.__cause__ is None
    assert isinstance(inner, ExceptionGroup)
    assert inner.exceptions[0] is first
    assert error.__cause__ is not None
    assert error.__cause__.__cause__ is second
    assert "+---------------- 2 ----------------" in text_of(error)
    with pytest.raises(ExceptionGroup) as caught:
        try:
            raise error
        except* KeyError:
            raise AssertionError from None
    assert caught.value.subgroup(jobs.Plain) is not None


async def test_except_star_on_a_group() -> None:
    """Point 4: a group is taken apart by the caller as if it had been raised here."""
    found: list[str] = []
    async with one_worker() as pool:
        try:
            await pool.run_sync(jobs.fail, "group")
        except* KeyError as group:
            found += [type(member).__name__ for member in group.exceptions]
        except* (ValueError, jobs.Plain):
            found.append("others")
        except* OSError:
            found.append("system")
    assert found == ["ExceptionGroup", "others", "system"]


async def test_large_group() -> None:
    """Point 4: thousands of members arrive."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.raise_large_group, 20_000)
    assert isinstance(error, ExceptionGroup)
    assert [member.args[0] for member in error.exceptions] == list(range(20_000))


async def test_deep_group() -> None:
    """Point 4: groups in groups arrive, or, where they are deeper than pickle goes, are a `JobError`."""
    async with one_worker() as pool:
        error: Any = await error_of(pool, jobs.raise_deep_group, 50)
        for _ in range(50):
            (error,) = error.exceptions
        assert error.args == ("deepest",)
        assert isinstance(await error_of(pool, jobs.raise_deep_group, 3000), ExceptionGroup | JobError)


# --- what can't be sent ---------------------------------------------------------------------------------------------


def check_job_error(error: BaseException, name: str, *, function: str = "fail") -> None:
    """A `JobError` has the exception's type, its text and the traceback, and says why it is none itself."""
    made = jobs.make(name)
    assert type(error) is JobError
    text = str(error)
    assert error.message.decode() == text
    check_text(text, function=function)
    assert type(made).__name__ in text
    if not isinstance(made, BaseExceptionGroup | StopIteration | StopAsyncIteration):
        assert str(made) in text
    if isinstance(made, Exception) and not isinstance(made, StopIteration | StopAsyncIteration):
        assert "(the exception itself could not be " in text
    else:
        assert f"({type(made).__name__} can't leave a job as itself)" in text
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize("name", jobs.NOT_THEMSELVES)
async def test_arrives_as_job_error(name: str) -> None:
    """Point 4: what can't make the round trip, and what is no `Exception`, is a `JobError`; the worker stays."""
    async with one_worker() as pool:
        check_job_error(await error_of(pool, jobs.fail, name), name)
        # Once more, now that it is known.
        check_job_error(await error_of(pool, jobs.fail, name), name)


async def test_job_error_says_why() -> None:
    """Point 4: why an exception could not be sent is said, for that is what its author can mend."""
    async with one_worker() as pool:
        for name, reason in (
            ("required keyword", "Keyword.__init__() takes 1 positional argument but 2 were given"),
            ("other arguments", "missing 1 required positional argument: 'two'"),
            ("holds a lock", "cannot pickle '_thread.lock' object"),
            ("local class", "local_class.<locals>.Local"),
            ("pickle raises", "RuntimeError: no pickle of me"),
            ("pickle lies", "Reducing comes back from pickle as ValueError"),
            ("pickle comes back as text", "Reducing comes back from pickle as str"),
            ("pickle comes back with an error", "RuntimeError: no way back"),
            ("pickle comes back with an error in the parent", "could not be read here: RuntimeError: not here"),
        ):
            last = str(await error_of(pool, jobs.fail, name)).splitlines()[-1]
            assert last.startswith("(the exception itself could not be ")
            assert reason in last


async def test_exit_is_no_exit() -> None:
    """Point 4: `sys.exit` in a job ends the job alone, and its argument is in the text."""
    async with one_worker() as pool:
        assert "SystemExit: for good" in str(await error_of(pool, jobs.fail, "SystemExit with text"))


EXAMPLES: Final = (
    "attributes",
    "group",
    "WorkerCrashed",
    "required keyword",
    "pickle exits",
    "SystemExit",
    "KeyboardInterrupt",
    "GeneratorExit",
    "StopIteration",
    "StopAsyncIteration",
    "CancelledError",
    "group of a KeyboardInterrupt",
)


def check_either(error: BaseException, name: str, *, function: str = "fail") -> None:
    if name in jobs.AS_THEMSELVES:
        same(error, jobs.make(name))
        check_text(text_of(error), function=function)
    else:
        check_job_error(error, name, function=function)


@pytest.mark.parametrize("name", EXAMPLES)
async def test_in_a_lease(name: str) -> None:
    """Point 4: the same through a lease, which goes on with the same worker; and out of its block, not in a group."""
    async with one_worker() as pool:
        with pytest.raises(Exception) as caught:
            async with pool.lease() as worker:
                pid = worker.pid
                with pytest.raises(Exception) as inside:
                    await worker.run_sync(jobs.fail, name)
                check_either(inside.value, name)
                assert await worker.run_sync(os.getpid) == pid
                await worker.run_sync(jobs.fail, name)
        check_either(caught.value, name)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("ordered", [True, False])
async def test_in_a_map(name: str, ordered: bool) -> None:
    """Point 4: the same through a map, as its end or as one of its results."""
    async with one_worker() as pool:
        with pytest.raises(Exception) as caught:
            async with pool.map(jobs.fail, [name], ordered=ordered) as results:
                async for _ in results:
                    raise AssertionError
        check_either(caught.value, name)
        async with pool.map(
            jobs.fail_on, [name] * 4, range(4), [2] * 4, ordered=ordered, return_exceptions=True
        ) as mixed:
            found = [result async for result in mixed]
        assert [result for result in found if isinstance(result, int)] == [0, 1, 3]
        (error,) = (result for result in found if isinstance(result, Exception))
        check_either(error, name, function="fail_on")


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "StopIteration"])
async def test_in_a_stream(name: str) -> None:
    """Point 4: the same through a stream, behind the parts before it."""
    async with one_worker() as pool:
        for function, first in ((jobs.part_and_fail, "__next__"), (jobs.yield_and_fail, "yield_and_fail")):
            found: list[int] = []
            with pytest.raises(Exception) as caught:
                async with pool.stream(function, name) as parts:
                    async for part in parts:
                        found.append(part)  # noqa: PERF401
            assert found == [1]
            if name == "StopAsyncIteration" and function is jobs.yield_and_fail:
                continue  # Python itself may make something else of it
            check_either(caught.value, name, function=first)


async def test_stop_iteration_in_streams() -> None:
    """Point 4: out of an iterator it is the end, as everywhere; out of a generator it is Python's RuntimeError."""
    async with one_worker() as pool:
        async with pool.stream(jobs.part_and_fail, "StopIteration") as parts:
            assert [part async for part in parts] == [1]
        with pytest.raises(RuntimeError, match="generator raised StopIteration") as caught:
            async with pool.stream(jobs.yield_and_fail, "StopIteration") as others:
                async for _ in others:
                    pass
        assert "StopIteration: 7" in text_of(caught.value)


@pytest.mark.parametrize("name", EXAMPLES)
async def test_in_the_call_of_a_stream(name: str) -> None:
    """Point 4: a function that raises instead of giving an iterable."""
    async with one_worker() as pool:
        with pytest.raises(Exception) as caught:
            async with pool.stream(jobs.fail, name) as parts:
                async for _ in parts:
                    raise AssertionError
        check_either(caught.value, name)


async def test_iter_that_fails() -> None:
    """Point 4: a TypeError of the job's own `__iter__` is not taken for a function that is no stream."""
    async with one_worker() as pool:
        with pytest.raises(TypeError, match="mine"):
            async with pool.stream(jobs.iter_fails) as parts:
                async for _ in parts:
                    raise AssertionError
        with pytest.raises(JobError, match=r"stream\(\) takes a generator function.*answer returned int"):
            async with pool.stream(jobs.answer) as others:  # type: ignore[arg-type]
                async for _ in others:
                    raise AssertionError


@pytest.mark.parametrize(
    "name",
    [
        "attributes",
        "no text",
        "rude text",
        "group",
        "pickle comes back with an exit in the parent",
        "required keyword",
        "SystemExit",
        "KeyboardInterrupt",
        "CancelledError",
    ],
)
async def test_in_an_initializer(name: str) -> None:
    """Point 4: the same out of an initializer, as the cause of a `SpawnError`."""
    with pytest.raises(SpawnError) as caught:
        async with open_python_pool(1, initializer=jobs.fail, initargs=(name,), boot_timeout=30.0):
            raise AssertionError
    error = caught.value.__cause__
    assert error is not None
    check_either(error, name)


# --- size and depth -------------------------------------------------------------------------------------------------


async def test_recursion() -> None:
    """Point 4: a RecursionError arrives as itself, its traceback short by the lines that repeat."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.recurse)
        assert type(error) is RecursionError
        text = text_of(error)
        assert "maximum recursion depth exceeded" in text
        assert "Previous line repeated" in text
        assert len(text) < 10_000


async def test_huge_traceback() -> None:
    """Point 4: of a traceback of megabytes the two ends are shown; the exception is whole."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.recurse_differently, 700)
        same(error, jobs.make("arguments"))
        text = text_of(error)
        assert 1 << 19 < len(text) < 1 << 21
        assert "bytes left out" in text
        assert text.rstrip().endswith("ValueError: ('text', 1, None)")


async def test_huge_note() -> None:
    """Point 4: a note of megabytes is cut in the text, and whole where it belongs."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.raise_with_huge_note)
        assert error.__notes__ == ["n" * 3_000_000]
        assert len(text_of(error)) < 1 << 21


async def test_error_larger_than_the_limit() -> None:
    """Point 4: an exception larger than `max_frame_size` is what a result of that size is: an error of that job."""
    async with open_python_pool(1, max_frame_size=1 << 20, boot_timeout=30.0) as pool:
        with pytest.raises(RelayError, match="max_frame_size"):
            await pool.run_sync(jobs.fail, "large")
        assert await pool.run_sync(jobs.answer) == 42


# --- where it is caught ---------------------------------------------------------------------------------------------


async def test_caught_while_another_is_handled() -> None:
    """Point 4: in an `except` block of the caller, the chain leads on to what is handled there, as for a plain call."""
    async with one_worker() as pool:
        try:
            raise LookupError("the caller's")
        except LookupError as handled:
            for job in (jobs.raise_from, jobs.raise_in_handler, jobs.raise_from_none):
                with pytest.raises(jobs.Plain) as caught:
                    await pool.run_sync(job)
                error = caught.value
                assert type(error.__cause__) is RemoteTraceback
                assert ("KeyError: 'the key'" in text_of(error)) == (job is not jobs.raise_from_none)
                links: list[BaseException] = []
                link: BaseException | None = error
                while link is not None and link not in links:
                    links.append(link)
                    link = link.__context__
                assert handled in links
                assert handled.__context__ is None
            assert await pool.run_sync(jobs.answer) == 42


async def test_handled_with_more_jobs() -> None:
    """Point 4: a handler may run the next job, try again, raise something of its own."""
    async with one_worker() as pool:
        tries = 0
        while True:
            tries += 1
            try:
                result = await pool.run_sync(jobs.divide, tries - 1)
            except ZeroDivisionError:
                assert await pool.run_sync(jobs.answer) == 42
            else:
                break
        assert (result, tries) == (1.0, 2)
        with pytest.raises(LookupError) as caught:
            try:
                await pool.run_sync(jobs.divide, 0)
            except ZeroDivisionError as error:
                raise LookupError("the caller's") from error
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert type(caught.value.__cause__.__cause__) is RemoteTraceback


async def test_leaves_the_block_as_itself() -> None:
    """Point 4: out of the pool's block it is neither wrapped in a group nor told apart from its cause."""
    with pytest.raises(jobs.Plain) as caught:
        async with open_python_pool(1) as pool:
            await pool.run_sync(jobs.raise_from)
    assert type(caught.value.__cause__) is RemoteTraceback
    check_cause(caught.value.__cause__.__cause__)


async def test_many_callers_each_have_their_own() -> None:
    """Point 4: errors and results of callers side by side are not mixed up."""
    names = [*EXAMPLES, *jobs.AS_THEMSELVES]
    found: dict[str, Exception] = {}

    async def call(name: str) -> None:
        found[name] = await error_of(pool, jobs.fail, name)

    async with open_python_pool(2, boot_timeout=30.0) as pool:
        pids = {worker.pid for worker in pool.workers}
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(call, name)
        assert {worker.pid for worker in pool.workers} == pids
    for name in set(names):
        check_either(found[name], name)


# --- errors of a pool inside the job --------------------------------------------------------------------------------


async def test_crash_in_a_nested_pool() -> None:
    """Point 4: what a pool inside a job raises arrives as itself, and is no crash of this pool's worker."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.nested_crash)
        assert type(error) is WorkerCrashed
        assert error.returncode == 7
        assert error.phase == "running"
        assert error.pid not in {worker.pid for worker in pool.workers}
        assert "in nested_crash" in text_of(error)
        assert "crashed" not in pool.statistics().jobs
        assert pool.statistics().jobs["failed"] == 1


async def test_failure_in_a_nested_pool() -> None:
    """Point 4: an exception that comes through two pools has both tracebacks, and its own cause behind them."""
    async with one_worker() as pool:
        error = await error_of(pool, jobs.nested_failure)
    assert type(error) is jobs.Plain
    outer = error.__cause__
    assert type(outer) is RemoteTraceback
    assert "in nested_failure" in str(outer)
    inner = outer.__cause__
    assert type(inner) is RemoteTraceback
    check_text(str(inner), function="raise_from")
    check_cause(inner.__cause__)


@pytest.mark.parametrize("name", ["WorkerCrashed", "SpawnError", "AllocateTimeout", "QueueFull", "ClosedResourceError"])
async def test_our_own_errors_from_a_job_are_counted_as_failures(name: str) -> None:
    """Point 4: by whatever way it comes, it is a job that failed, not a worker or a pool that did."""

    async def by_stream(pool: PythonPool) -> None:
        async with pool.stream(jobs.yield_and_fail, name) as parts:
            async for _ in parts:
                pass

    async def by_lease(pool: PythonPool) -> None:
        async with pool.lease() as worker:
            await worker.run_sync(jobs.fail, name)

    async def by_map(pool: PythonPool) -> None:
        async with pool.map(jobs.fail, [name]) as results:
            async for _ in results:
                pass

    async def by_run_sync(pool: PythonPool) -> None:
        await pool.run_sync(jobs.fail, name)

    ways: list[Callable[[PythonPool], Awaitable[None]]] = [by_run_sync, by_stream, by_lease, by_map]
    async with one_worker() as pool:
        for number, way in enumerate(ways, 1):
            with pytest.raises(type(jobs.make(name))) as caught:
                await way(pool)
            same(caught.value, jobs.make(name))
            assert pool.statistics().jobs["failed"] == number
