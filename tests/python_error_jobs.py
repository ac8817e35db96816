"""Jobs that raise, and arguments and results that can't be pickled or can't be read back.

Workers import this module, so it needs the core of the standard library only; what a single job needs it imports
itself.
"""

import functools
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, Self

PARENT = "TRIO_WORKERS_TEST_PARENT"
"""Variable of the environment with the pid of the tests: what behaves in another way there looks at it."""


def in_parent() -> bool:
    return os.environ.get(PARENT) == str(os.getpid())


# --- exceptions that arrive as themselves ---------------------------------------------------------------------------


class Plain(Exception):
    """An exception of the user's, with attributes of its own."""


class Reduced(Exception):
    """An exception that is told how to be pickled."""

    def __init__(self, first: str, *, second: str) -> None:
        super().__init__(f"{first} {second}")
        self.first = first
        self.second = second

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), second=self.second), (self.first,)


class Group(ExceptionGroup[Exception]):
    """A group of the user's."""

    def derive(self, excs: Any) -> "Group":
        return Group(self.message, excs)


class WithoutText(Exception):
    """An exception whose `str` and `repr` fail."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class RudeText(Exception):
    """An exception whose `str` and `repr` try to end the process."""

    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


def with_attributes() -> Plain:
    error = Plain("text", 1)
    error.code = 404  # type: ignore[attr-defined]
    error.where = {"file": "a", "line": 3}  # type: ignore[attr-defined]
    return error


def with_notes() -> Plain:
    error = Plain("text")
    error.add_note("first note")
    error.add_note("second note\nof two lines")
    return error


def nested_group() -> ExceptionGroup[Exception]:
    inner = ExceptionGroup("inner", [KeyError("key"), with_notes()])
    inner.add_note("note of the group")
    return ExceptionGroup("outer", [ValueError(1), inner, OSError(2, "No such file")])


def job_error() -> Exception:
    from trio_workers import JobError

    return JobError(b"bytes \xff and text")


def worker_crashed() -> Exception:
    from trio_workers import WorkerCrashed

    return WorkerCrashed(
        "worker 7 is gone", pid=7, slot=3, returncode=-9, stderr="last line", phase="running", started=True
    )


def spawn_error() -> Exception:
    from trio_workers import SpawnError

    return SpawnError("never ready", returncode=1, stderr="Traceback")


def allocate_timeout() -> Exception:
    from trio_workers import AllocateTimeout

    error = AllocateTimeout("nobody was free")
    error.last_spawn_error = None
    return error


def queue_full() -> Exception:
    from trio_workers import QueueFull

    return QueueFull("too many")


def closed_resource() -> Exception:
    import trio

    return trio.ClosedResourceError("of a pool inside the job")


def too_slow() -> Exception:
    import trio

    return trio.TooSlowError("inside the job")


def json_error() -> Exception:
    import json

    return json.JSONDecodeError("Expecting value", "doc", 1)


def called_process_error() -> Exception:
    import subprocess

    return subprocess.CalledProcessError(3, ["cmd"], b"out", b"err")


AS_THEMSELVES: dict[str, Callable[[], Exception]] = {
    "no arguments": ValueError,
    "arguments": lambda: ValueError("text", 1, None),
    "KeyError": lambda: KeyError("key"),
    "AssertionError": lambda: AssertionError("not so"),
    "FileNotFoundError": lambda: OSError(2, "No such file or directory", "name"),
    "two file names": lambda: OSError(17, "File exists", "one", None, "two"),
    "ConnectionResetError": lambda: ConnectionResetError(104, "Connection reset by peer"),
    "TimeoutError": lambda: TimeoutError("slow"),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "ImportError": lambda: ImportError("no", name="module", path="/path"),
    "SyntaxError": lambda: SyntaxError("invalid", ("file.py", 3, 5, "a b\n", 3, 6)),
    "MemoryError": lambda: MemoryError("none left"),
    "RecursionError": lambda: RecursionError("too deep"),
    "BlockingIOError": lambda: BlockingIOError(11, "would wait", 7),
    "BrokenPipeError": lambda: BrokenPipeError(32, "Broken pipe"),
    "EOFError": lambda: EOFError(),
    "JSONDecodeError": json_error,
    "CalledProcessError": called_process_error,
    "attributes": with_attributes,
    "notes": with_notes,
    "own __reduce__": lambda: Reduced("one", second="two"),
    "group": nested_group,
    "group of the user's": lambda: Group("mine", [Plain("a"), ValueError("b")]),
    "text that no encoding holds": lambda: ValueError("\ud800 \U0001f600 \0"),
    "bytes": lambda: ValueError(bytes(range(256))),
    "large": lambda: ValueError("x" * 3_000_000),
    "no text": lambda: WithoutText("argument"),
    "rude text": lambda: RudeText("argument"),
    "JobError": job_error,
    "WorkerCrashed": worker_crashed,
    "SpawnError": spawn_error,
    "AllocateTimeout": allocate_timeout,
    "QueueFull": queue_full,
    "ClosedResourceError": closed_resource,
    "TooSlowError": too_slow,
}


# --- and those that can't -------------------------------------------------------------------------------------------


class Keyword(Exception):
    """An exception with a required keyword."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class TwoArguments(Exception):
    """An exception whose arguments are not those that it hands on."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


class Holding(Exception):
    """An exception that holds what can't be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Reducing(Exception):
    """An exception that does something else where it should say how it is pickled."""

    def __init__(self, text: str, how: str) -> None:
        super().__init__(text)
        self.how = how

    def __reduce__(self) -> Any:
        match self.how:
            case "raises":
                raise RuntimeError("no pickle of me")
            case "raises without text":
                raise WithoutText
            case "exits":
                raise SystemExit(3)
            case "interrupts":
                raise KeyboardInterrupt
            case "lies":
                return ValueError, self.args
            case "is a name":
                return "PARENT"
            case "comes back as text":
                return str, ("text",)
            case "comes back with an error":
                return give_up, ("no way back",)
            case "comes back with an exit":
                return give_up, (3, SystemExit)
            case "comes back with an interrupt":
                return give_up, ("", KeyboardInterrupt)
            case "comes back with an error in the parent":
                return give_up_in_parent, (type(self), self.args, self.how, RuntimeError)
            case "comes back with an exit in the parent":
                return give_up_in_parent, (type(self), self.args, self.how, SystemExit)
            case "comes back with an error without text in the parent":
                return give_up_in_parent, (type(self), self.args, self.how, WithoutText)
            case _:
                raise AssertionError(self.how)


def give_up(text: object, kind: type[BaseException] = RuntimeError) -> NoReturn:
    raise kind(text)


def give_up_in_parent(kind: Any, args: Any, how: str, error: type[BaseException]) -> Any:
    if in_parent():
        raise error("not here")
    return kind(*args, how)


def local_class() -> Exception:
    class Local(Exception):
        """A class that has no name to be found by."""

    return Local("local")


class Base(BaseException):
    """An exception that is no `Exception`."""


def async_cancelled() -> BaseException:
    import asyncio

    return asyncio.CancelledError("stop it")


NOT_THEMSELVES: dict[str, Callable[[], BaseException]] = {
    "required keyword": lambda: Keyword(code=7),
    "other arguments": lambda: TwoArguments("first", "second"),
    "holds a lock": lambda: Holding("holds a lock"),
    "local class": local_class,
    **{
        f"pickle {how}": functools.partial(Reducing, "strange", how)
        for how in (
            "raises",
            "raises without text",
            "exits",
            "interrupts",
            "lies",
            "is a name",
            "comes back as text",
            "comes back with an error",
            "comes back with an exit",
            "comes back with an interrupt",
            "comes back with an error in the parent",
            "comes back with an exit in the parent",
            "comes back with an error without text in the parent",
        )
    },
    "group with a lock": lambda: ExceptionGroup("some", [ValueError("one"), Holding("two")]),
    "SystemExit": lambda: SystemExit(),
    "SystemExit(0)": lambda: SystemExit(0),
    "SystemExit with text": lambda: SystemExit("for good"),
    "KeyboardInterrupt": lambda: KeyboardInterrupt("stop"),
    "GeneratorExit": lambda: GeneratorExit("end"),
    "StopIteration": lambda: StopIteration(7),
    "StopAsyncIteration": lambda: StopAsyncIteration(7),
    "CancelledError": async_cancelled,
    "BaseException": lambda: BaseException("base"),
    "own BaseException": lambda: Base("own base"),
    "group of a KeyboardInterrupt": lambda: BaseExceptionGroup("both", [KeyboardInterrupt("stop"), ValueError("one")]),
    "group of a SystemExit in a group": lambda: BaseExceptionGroup(
        "outer", [BaseExceptionGroup("in", [SystemExit(1)])]
    ),
}


def make(name: str) -> BaseException:
    return {**AS_THEMSELVES, **NOT_THEMSELVES}[name]()


def fail(name: str) -> NoReturn:
    raise make(name)


def fail_on(name: str, number: int, bad: int) -> int:
    if number == bad:
        raise make(name)
    return number


class Failing:
    """An iterable that gives one part and then raises."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.given = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        if self.given:
            raise make(self.name)
        self.given = True
        return 1


def part_and_fail(name: str) -> Failing:
    return Failing(name)


def yield_and_fail(name: str) -> Iterator[int]:
    yield 1
    raise make(name)


def answer() -> int:
    return 42


# --- chains ---------------------------------------------------------------------------------------------------------


def look_up(key: str) -> NoReturn:
    error = KeyError(key)
    error.add_note("note of the cause")
    error.attribute = 5  # type: ignore[attr-defined]
    raise error


def raise_from() -> NoReturn:
    try:
        look_up("the key")
    except KeyError as error:
        raise Plain("the effect") from error


def raise_in_handler() -> NoReturn:
    try:
        look_up("the key")
    except KeyError:
        raise Plain("the effect")  # noqa: B904 - that is what is tested


def raise_from_none() -> NoReturn:
    try:
        look_up("the key")
    except KeyError:
        raise Plain("the effect") from None


def raise_from_long_chain(length: int) -> NoReturn:
    error: Exception = KeyError(0)
    for number in range(1, length):
        after = ValueError(number)
        after.__cause__ = error
        error = after
    raise error


def raise_from_three_kinds() -> NoReturn:
    """A cause that has a context that has a cause that is no `Exception`."""
    try:
        try:
            try:
                raise KeyboardInterrupt("the first")
            except BaseException as error:
                raise KeyError("the second") from error
        except KeyError:
            raise OSError(5, "the third")  # noqa: B904 - that is what is tested
    except OSError as error:
        raise Plain("the last") from error


def raise_in_a_circle() -> NoReturn:
    one, two = ValueError("one"), KeyError("two")
    one.__cause__ = two
    two.__cause__ = one
    raise one


def raise_from_itself() -> NoReturn:
    error = ValueError("alone")
    error.__cause__ = error
    raise error


def raise_from_unpicklable() -> NoReturn:
    try:
        raise Holding("with a lock")
    except Holding as error:
        raise Plain("the effect") from error


def raise_from_lie() -> NoReturn:
    raise Plain("the effect") from Reducing("the lie", "comes back as text")


def raise_from_broken_in_parent() -> NoReturn:
    raise Plain("the effect") from Reducing("the cause", "comes back with an error in the parent")


def raise_group_with_causes() -> NoReturn:
    errors: list[Exception] = []
    for job in (raise_from, raise_in_handler):
        try:
            job()
        except Plain as error:
            errors.append(error)
    raise ExceptionGroup("both", [*errors, ExceptionGroup("inner", [errors[0]])]) from errors[1]


def raise_large_group(count: int) -> NoReturn:
    raise ExceptionGroup("many", [ValueError(number) for number in range(count)])


def raise_deep_group(depth: int) -> NoReturn:
    error: Exception = ValueError("deepest")
    for _ in range(depth):
        error = ExceptionGroup("deep", [error])
    raise error


def recurse() -> int:
    return recurse() + 1


def recurse_differently(depth: int) -> None:
    """Raise through many functions of different names, so that the traceback is as long as that."""
    names: dict[str, Any] = {"last": lambda: fail("arguments")}
    text = "\n".join(
        f"def {'f' * 2000}{number}():\n    {'f' * 2000}{number - 1 if number else ''}()" for number in range(1, depth)
    )
    exec(f"def {'f' * 2000}0(): last()\n{text}", names)
    names[f"{'f' * 2000}{depth - 1}"]()


def raise_with_huge_note() -> NoReturn:
    error = ValueError("noted")
    error.add_note("n" * 3_000_000)
    raise error


def divide(number: int) -> float:
    return 1 / number


def nested_crash() -> NoReturn:
    """Run a pool whose job crashes, and let that error out of this job."""
    import trio

    from trio_workers import open_python_pool

    async def main() -> None:
        async with open_python_pool(1) as pool:
            await pool.run_sync(os._exit, 7)

    trio.run(main)
    raise AssertionError


def nested_failure() -> NoReturn:
    import trio

    from trio_workers import open_python_pool

    async def main() -> None:
        async with open_python_pool(1) as pool:
            await pool.run_sync(raise_from)

    trio.run(main)
    raise AssertionError


def raise_given(error: BaseException) -> NoReturn:
    raise error


class IterFails:
    """Something whose `__iter__` fails with the error that also means that there is none."""

    def __iter__(self) -> Iterator[int]:
        raise TypeError("mine")


def iter_fails() -> IterFails:
    return IterFails()


# --- arguments and results ------------------------------------------------------------------------------------------


class Loading:
    """Something that is pickled, and can't be read back; how depends on where."""

    def __init__(self, where: str, kind: type[BaseException] = RuntimeError) -> None:
        self.where = where
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return load, (self.where, self.kind)


def load(where: str, kind: type[BaseException]) -> Loading:
    if where == "anywhere" or (where == "in the parent") == in_parent():
        raise kind("can't be loaded")
    return Loading(where, kind)


class Dumping:
    """Something that raises where it is pickled."""

    def __init__(self, kind: type[BaseException] = RuntimeError) -> None:
        self.kind = kind

    def __reduce__(self) -> NoReturn:
        raise self.kind("can't be dumped")


class DumpingThere:
    """Something that is pickled by the parent and by no worker."""

    def __reduce__(self) -> tuple[Any, ...]:
        if in_parent():
            return DumpingThere, ()
        raise RuntimeError("can't be dumped in a worker")


def echo(value: Any) -> Any:
    return value


def echo_all(*values: Any) -> Any:
    return values


def take(*values: object, **named: object) -> int:
    return len(values) + len(named)


def give_loading(where: str, kind: type[BaseException] = RuntimeError) -> Loading:
    return Loading(where, kind)


def give(what: str) -> object:
    match what:
        case "lock":
            return threading.Lock()
        case "lambda":
            return lambda: 1
        case "local class":
            return local_class()
        case "generator":
            return (number for number in range(3))
        case "module":
            return os
        case "file":
            return sys.stderr
        case "nested":
            value: list[object] = []
            for _ in range(100_000):
                value = [value]
            return value
        case "no __reduce__":
            return Dumping()
        case "no __reduce__ and no text":
            return Dumping(WithoutText)
        case "exit in __reduce__":
            return Dumping(SystemExit)
        case "interrupt in __reduce__":
            return Dumping(KeyboardInterrupt)
        case "coroutine":
            return asynchronous()
        case _:
            raise AssertionError(what)


def yield_unpicklable(what: str) -> Iterator[object]:
    yield 1
    yield give(what)
    yield 3


def yield_loading(where: str) -> Iterator[object]:
    yield 1
    yield Loading(where)
    yield 3


async def asynchronous(*_: object) -> None: ...


async def asynchronous_generator(*_: object) -> Any:
    yield 1


def generator(*_: object) -> Iterator[int]:
    yield 1


class AsyncCallable:
    async def __call__(self) -> None: ...

    async def method(self) -> None: ...


class AsyncGeneratorCallable:
    async def __call__(self) -> Any:
        yield 1


class GeneratorCallable:
    def __call__(self) -> Iterator[int]:
        yield 1

    def method(self) -> Iterator[int]:
        yield 1


class WithMethod:
    """An object whose method is a job."""

    def is_self(self, other: object) -> bool:
        return self is other


def are_one(*values: object) -> bool:
    """Whether these are one and the same object."""
    return all(value is values[0] for value in values)


def are_one_inside(one: list[object], two: dict[str, object]) -> bool:
    return one[0] is two["inside"]


def describe(value: Any) -> tuple[str, str, int, bytes | None]:
    """The type of a value, whether it can be written to, its size, and its bytes where they are few."""
    with memoryview(value) as view:
        kind = "read-only" if view.readonly else "writable"
        return type(value).__name__, kind, view.nbytes, view.tobytes() if view.nbytes < 100_000 else None


def write_to_each(values: list[Any]) -> int:
    """Write to each of these, and count those that it changed, each alone."""
    for number, value in enumerate(values):
        memoryview(value).cast("B")[:4] = number.to_bytes(4, "little")
    return sum(memoryview(value).cast("B")[:4] == number.to_bytes(4, "little") for number, value in enumerate(values))


def sum_array(array: Any) -> tuple[float, bool, tuple[int, ...], str]:
    return float(array.sum()), bool(array.flags.writeable), array.shape, str(array.dtype)


def double_in_place(array: Any) -> Any:
    array *= 2
    return array


def give_array(size: int, *, writable: bool = True) -> Any:
    import numpy

    array = numpy.arange(size, dtype="u1")
    array.flags.writeable = writable
    return array


def add_one(value: int) -> int:
    return value + 1


# --- what is dropped ------------------------------------------------------------------------------------------------


class Tracked:
    """Something that can be seen to be gone."""

    def __init__(self, size: int = 0) -> None:
        self.data = bytes(size)


alive: list["weakref.ref[object]"] = []
"""What jobs were given, or gave back."""


def track(value: Any) -> None:
    alive.append(weakref.ref(value))


def track_all(*values: Any, key: Any = None) -> int:
    for value in (*values, *([key] if key is not None else [])):
        track(value)
    return len(alive)


def track_and_return(value: Any) -> Any:
    track(value)
    return value


def track_result(size: int = 0) -> Tracked:
    value = Tracked(size)
    track(value)
    return value


def track_array(array: Any) -> Any:
    """Keep a weak reference to an array that came, and to one that goes back."""
    track(array)
    back = array.copy()
    track(back)
    return back


def track_and_fail(value: Any, name: str = "arguments") -> NoReturn:
    track(value)
    fail(name)


def track_and_fail_with(value: Any) -> NoReturn:
    """Raise an exception that holds the argument."""
    track(value)
    raise Plain("holds it", value)


def track_and_give_unpicklable(value: Any) -> object:
    track(value)
    return [value, threading.Lock()]


def track_parts(value: Any, count: int) -> Iterator[Tracked]:
    track(value)
    for _ in range(count):
        part = Tracked()
        track(part)
        yield part
        del part


def count_parts_alive(count: int) -> Iterator[tuple[Tracked, int]]:
    """Yield parts, each with how many of those before it are still there."""
    references: list[weakref.ref[object]] = []
    for _ in range(count):
        part = Tracked()
        alive_before = sum(one() is not None for one in references)
        references.append(weakref.ref(part))
        yield part, alive_before
        del part


def track_parts_and_fail(value: Any) -> Iterator[Tracked]:
    yield from track_parts(value, 2)
    fail("arguments")


def count_alive() -> tuple[int, int]:
    """How many of them are still there, of how many; without a collection, which would hide what lives in circles."""
    count = sum(one() is not None for one in alive), len(alive)
    alive.clear()
    return count


def leave_in_circle(value: object) -> None:
    """Leave a value to the garbage collector, and call it."""
    values = [value]
    values.append(values)
    del values, value
    gc.collect()


def answer_in_part(writable: bool) -> NoReturn:
    """Send the first half of an answer, as the child would do, and never the second."""
    from trio_workers._calls import RESULT, encode

    frame: FrameType | None = sys._getframe()
    while frame is not None and "id_" not in frame.f_locals:
        frame = frame.f_back
    assert frame is not None
    data = memoryview(bytearray(1_000_000))
    pieces = encode(RESULT, frame.f_locals["id_"], b"", [data if writable else data.toreadonly()])
    for piece in (pieces[0], memoryview(pieces[1])[:500_000]):
        frame.f_locals["self"]._connection.sendall(piece)
    threading.Event().wait()
    raise AssertionError


def crash(_: object) -> NoReturn:
    os._exit(3)


def note_and_wait(path: str, value: object) -> NoReturn:
    """Say that the job has begun, and never end."""
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    threading.Event().wait()
    raise AssertionError(value)
