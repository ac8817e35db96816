"""Between calls of Python functions and messages: what a Python pool puts on top of a core."""

import functools
import importlib
import inspect
import itertools
import pickle
import time
import types
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, cast

from . import _platform
from ._calls import CALL, CALLS, MOST_BUFFERS, OUT_OF_BAND, STREAM, encode, in_short, restore
from ._codec import Answer
from ._conversation import Failed, Replied
from ._errors import JobError, RemoteTraceback
from ._region import PLAIN, as_list

if TYPE_CHECKING:
    from ._calls import Link

PROTOCOL: Final = 5
"""Of pickle: the first with buffers out of band, and the same in every Python from 3.8 on."""

_GENERATOR: Final = inspect.CO_GENERATOR
_ASYNC: Final = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE

PicklerName = Literal["pickle", "cloudpickle"]
Buffers = Callable[[pickle.PickleBuffer], Any]


class _Pickler(Protocol):
    def dump(self, obj: Any, /) -> None: ...


class FunctionCodec:
    """Turns calls into messages and answers into results and exceptions.

    `main_problem` says why workers can't import the program's main module, if they can't.
    """

    dialect = ""
    """There is one wire, for there is one program."""
    recalls = _platform.HERE.has_packets()

    def __init__(self, pickler: object, max_frame_size: int | None, main_problem: str = "") -> None:
        if not isinstance(pickler, str):
            raise TypeError(f"pickler must be a str, not {type(pickler).__name__}")
        if pickler not in ("pickle", "cloudpickle"):
            raise ValueError(f'pickler must be "pickle" or "cloudpickle", not {pickler!r}')
        self._by_value = pickler == "cloudpickle"
        self._new_pickler: Callable[[BytesIO, Buffers], _Pickler] = _new_plain_pickler
        if self._by_value:
            self._new_pickler = _load_cloudpickle()
        self._limit = max_frame_size
        self._main_problem = "" if self._by_value else main_problem
        self._ids = itertools.count(1)
        self._known: dict[object, _Known] = {}
        self._buffers: list[memoryview] = []

    def encode_anew(self, payload: object) -> tuple[bytes | memoryview, ...]:
        """Refuse, as `encode` does: there is no other wire."""
        return self.encode(payload)

    def encode(self, payload: object) -> tuple[bytes | memoryview, ...]:
        """Refuse a job that is no call."""
        raise TypeError(
            f"a worker of a Python pool runs functions: use run_sync, not exec with {type(payload).__name__}"
        )

    def encode_call(
        self, function: Callable[..., object], arguments: Sequence[object], *, stream: bool = False
    ) -> tuple[bytes | memoryview, ...]:
        """Pickle a call, or raise an error that names what can't be, before any worker is taken."""
        known = self._known.get(function) if type(function) in _BY_NAME else None
        if known is None or (known.generator and not stream):
            known = self._get_to_know(function, stream=stream)
        body = known.pickled
        split = len(body)
        if split and not arguments:
            return self._finish(function, stream, split, body)
        if split and (len(arguments) == 1 or _ATOMS.issuperset(map(type, arguments))):
            # The usual case. A function that is pickled by its name shares nothing with its arguments.
            lifted = (_lift(arguments[0]),) if len(arguments) == 1 else arguments
            try:
                body += _dumps(lifted, PROTOCOL, buffer_callback=self._keep)
            except BaseException as error:
                self._buffers.clear()
                if not isinstance(error, Exception):
                    raise
                raise _explain(function, arguments, 1, error) from error
            return self._finish(function, stream, split, body)
        # One pickler for all pieces, so that what they share stays one object.
        file = BytesIO()
        dump = self._new_pickler(file, self._keep).dump
        position = 0
        try:
            dump(len(arguments))
            dump(function)
            for argument in arguments:
                position += 1
                # What is given twice stays inside, where one object stays one.
                piece = _lift(argument)
                if piece is not argument and sum(other is argument for other in arguments) > 1:
                    piece = argument
                dump(piece)
        except BaseException as error:
            self._buffers.clear()
            if not isinstance(error, Exception):
                raise
            raise _explain(function, arguments, position, error, by_value=self._by_value) from error
        return self._finish(function, stream, 0, file.getvalue())

    def encode_calls(self, function: Callable[..., object], columns: Sequence[Sequence[object]]) -> "Chunk":
        """Pickle as many of the calls `function(*row)` into one message as belong there, from the first on."""
        known = self._known.get(function) if type(function) in _BY_NAME else None
        if known is not None and known.pickled and not known.generator and _are_plain(columns):
            split = len(known.pickled)
            body = known.pickled + _dumps(columns, PROTOCOL)
            return Chunk(encode(CALLS, self._next_id(), body, split=split), len(columns[0]))
        calls: list[bytes] = []
        size = 0
        enough_at = time.perf_counter() + ENCODE_FOR
        rest: Exception | tuple[bytes | memoryview, ...] | None = None
        for row in zip(*columns, strict=True):
            try:
                pieces = self.encode_call(function, row)
            except Exception as error:
                rest = error
                break
            first = pieces[0]
            if len(pieces) > 1 or not isinstance(first, bytes) or (calls and size + len(first) > MOST_BYTES):
                rest = pieces
                break
            calls.append(first)
            size += len(first)
            if time.perf_counter() > enough_at:
                break
        if len(calls) == 1:
            return Chunk((calls[0],), 1, rest)
        return Chunk(encode(CALLS, self._next_id(), b"".join(calls)) if calls else (), len(calls), rest)

    def decode_calls(self, results: bytes, function: object) -> tuple[list[Any], dict[int, Exception]]:
        """Turn results of a chunk into values, and what is no value but an error, by its place."""
        values: list[Any] = _loads(as_list(results))
        failures: dict[int, Exception] = {}
        if _PACKED.isdisjoint(map(type, values)):
            return values, failures
        for place, value in enumerate(values):
            try:
                if type(value) is bytes:
                    values[place] = decode(Replied(b"", value), function)
                elif type(value) is bytearray:
                    values[place] = None
                    failures[place] = self.failure(Failed(*_loads(value)))
            except JobError as error:
                values[place] = None
                failures[place] = error
        return values, failures

    def _next_id(self) -> int:
        return next(self._ids) & 0xFFFFFFFF

    def _finish(self, function: object, stream: bool, split: int, body: bytes) -> tuple[bytes | memoryview, ...]:
        buffers = self._buffers
        if buffers:
            self._buffers = []  # the job alone holds them from now on
        pieces = encode(STREAM if stream else CALL, self._next_id(), body, buffers, split)
        if self._limit is not None:
            size = len(body) + sum([view.nbytes for view in buffers])
            if size > self._limit:
                raise ValueError(
                    f"a call of {name_of(function)} takes {size:,} bytes, more than max_frame_size ({self._limit:,})"
                )
        return pieces

    def _keep(self, buffer: pickle.PickleBuffer) -> bool:
        """Take a buffer out of the pickle that is being written, or (True) leave it inside."""
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND or len(self._buffers) == MOST_BUFFERS:
            return True
        self._buffers.append(view)
        return False

    def _get_to_know(self, function: Callable[..., object], *, stream: bool) -> "_Known":
        """Check a function; keep its pickle, where that is a mere name, for the next time."""
        _check_function(function, stream=stream)
        if self._main_problem and getattr(function, "__module__", None) == "__main__":
            raise pickle.PicklingError(f"{name_of(function)} can't be sent to a worker: {self._main_problem}")
        by_name = type(function) in _BY_NAME and isinstance(
            getattr(function, "__self__", None), types.ModuleType | None
        )
        if self._by_value or not by_name:
            return _Known(b"", generator=False)
        try:
            pickled = pickle.dumps(function, PROTOCOL)
        except Exception as error:
            raise _explain(function, (), 0, error) from error
        flags = getattr(getattr(function, "__code__", None), "co_flags", 0)
        known = _Known(pickled, generator=bool(flags & _GENERATOR))
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[function] = known
        return known

    def check(self, function: Callable[..., object], caller: str) -> None:
        """Raise TypeError for what is no plain function."""
        _check_function(function, what=caller)

    def encode_initializer(self, function: Callable[..., object], arguments: Sequence[object]) -> bytes:
        """Pickle an initializer, or raise an error that names what can't be."""
        _check_function(function, what="initializer")
        if self._main_problem and getattr(function, "__module__", None) == "__main__":
            raise pickle.PicklingError(f"initializer can't be sent to a worker: {self._main_problem}")
        file = BytesIO()
        try:
            self._new_pickler(file, lambda _: True).dump((function, tuple(arguments)))
        except Exception as error:
            text = f"initializer {name_of(function)} or its initargs can't be pickled: {in_short(error)}"
            raise pickle.PicklingError(_advise(text, by_value=self._by_value)) from error
        return file.getvalue()

    def failure(self, outcome: Failed) -> Exception:
        """Turn what a job raised into that exception, or into a `JobError` where it did not survive the way."""
        if outcome.exception:
            try:
                return _restore(pickle.loads(outcome.exception), outcome.message.decode("utf-8", "replace"))
            except BaseException as error:  # an exception may do anything as it is unpickled
                note = f"\n(the exception itself could not be read here: {in_short(error)})"
                return JobError(outcome.message + note.encode("utf-8", "backslashreplace"))
        return JobError(outcome.message)


class Chunk(NamedTuple):
    """Calls in one message: its `frames`, and the `number` of calls. A single one is an ordinary call.

    `rest`: why the call behind them can't be pickled, or its own frames, where it is too large to be with others. What
    comes after that is not looked at.
    """

    frames: tuple[bytes | memoryview, ...]
    number: int
    rest: Exception | tuple[bytes | memoryview, ...] | None = None


class _Known(NamedTuple):
    """What is remembered of a function: its pickle (empty where that is more than a name), and its kind."""

    pickled: bytes
    generator: bool


_BY_NAME: Final = frozenset((types.FunctionType, types.BuiltinFunctionType, type))

_ATOMS: Final = frozenset((int, str, float, bool, complex, types.NoneType))
"""Types whose values can always be pickled and read back, and of which nobody sees whether they are shared."""

_SIZED: Final = frozenset((str, bytes))
_SHARED: Final = PLAIN | _SIZED
"""Types of which nobody sees whether several calls share a value."""

_PACKED: Final = frozenset((bytes, bytearray))
"""Among the results of a chunk, what is not there as itself."""

MOST_BYTES: Final = 128 * 1024
"""Of arguments in one chunk: larger messages gain nothing."""

ENCODE_FOR: Final = 0.001
"""Seconds for pickling one chunk, before other tasks get their turn."""

MOST_KNOWN: Final = 1024
"""Functions remembered: more than a program calls again and again."""

_dumps = pickle.dumps
_loads = pickle.loads


def _new_plain_pickler(file: BytesIO, keep: Buffers) -> _Pickler:
    return pickle.Pickler(file, PROTOCOL, buffer_callback=keep)


def _load_cloudpickle() -> Callable[[BytesIO, Buffers], _Pickler]:
    try:
        cloudpickle: Any = importlib.import_module("cloudpickle")
    except ModuleNotFoundError as error:
        if error.name != "cloudpickle":
            raise  # it is there, and lacks something of its own
        raise ModuleNotFoundError(
            "pickler=\"cloudpickle\" needs the extra: pip install 'trio_workers[cloudpickle]'", name="cloudpickle"
        ) from None
    pickler: Callable[..., _Pickler] = cloudpickle.CloudPickler
    return lambda file, keep: pickler(file, PROTOCOL, buffer_callback=keep)


def _are_plain(columns: Sequence[Sequence[object]]) -> bool:
    """Whether the arguments can share one pickle and nobody sees it, and are not large."""
    for column in columns:
        types = set(map(type, column))
        if not types <= _SHARED:
            return False
        if not types.isdisjoint(_SIZED):
            sizes = [len(value) for value in column if isinstance(value, str | bytes)]
            if sum(sizes) > MOST_BYTES or max(sizes) >= OUT_OF_BAND:
                return False
    return True


def _lift(argument: object) -> object:
    """Let bytes travel beside the pickle, which would copy them twice."""
    if type(argument) is bytes and len(argument) >= OUT_OF_BAND:
        return pickle.PickleBuffer(argument)
    return argument


def decode(answer: Answer, function: object, what: str = "the result") -> Any:
    """Turn an answer into a result; raise `JobError` where it can't be unpickled here."""
    try:
        return _loads(answer.body, buffers=answer.buffers)
    except BaseException as error:  # an object may do anything as it is unpickled
        raise JobError(f"{what} of {name_of(function)} can't be unpickled here: {in_short(error)}") from error


def name_of(function: object) -> str:
    """Name a function in errors, logs and `Worker.current`: its qualified name, with the module's."""
    while isinstance(function, functools.partial):
        function = cast("functools.partial[object]", function).func
    name = getattr(function, "__qualname__", None)
    if not isinstance(name, str):
        return type(function).__qualname__
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if isinstance(module, str) else name


def _check_function(function: object, *, stream: bool = False, what: str = "") -> None:
    caller = what or ("stream" if stream else "run_sync")
    if not callable(function):
        if inspect.iscoroutine(function):
            function.close()
        raise TypeError(
            f"{caller} takes a function, not {type(function).__name__}: give it the function and its arguments, "
            f"{caller}(fn, ...), without calling it"
        )
    code = getattr(function, "__code__", None)
    if code is None:
        target: object = function
        while isinstance(target, functools.partial):
            target = cast("functools.partial[object]", target).func
        code = getattr(target, "__code__", None)
        if code is None:
            code = getattr(getattr(target, "__call__", None), "__code__", None)  # noqa: B004 - not whether, but how
    flags: int = getattr(code, "co_flags", 0)
    if flags & _ASYNC:
        raise TypeError(
            f"{caller} takes a plain function, and {name_of(function)} is async: write it without async, or let a "
            "plain function run it in an event loop of its own (trio.run(...), asyncio.run(...))"
        )
    if flags & _GENERATOR and not stream:
        kind = "it must not yield" if what == "initializer" else "take what it yields with stream()"
        raise TypeError(f"{caller} takes a function that returns, and {name_of(function)} is a generator: {kind}")


def _explain(
    function: object, arguments: Sequence[object], position: int, error: Exception, *, by_value: bool = False
) -> pickle.PicklingError:
    """Say which piece of a call can't be pickled, and what to do."""
    name = name_of(function)
    if position:
        argument = arguments[position - 1]
        what = f"argument {position} of {name}, of type {type(argument).__name__},"
    else:
        what = name
        if isinstance(function, types.MethodType):
            what = f"the object of the method {name}, of type {type(function.__self__).__name__},"
        if isinstance(function, functools.partial):
            what = _find_in_partial(cast("functools.partial[object]", function), name)
    text = f"{what} can't be pickled: {in_short(error)}"
    return pickle.PicklingError(_advise(text, by_value=by_value))


def _advise(text: str, *, by_value: bool) -> str:
    if by_value or not ("<lambda>" in text or "<locals>" in text):
        return text
    return (
        f"{text}. Lambdas and functions inside functions have no name to be found by: move it to the top level of a "
        "module, or open the pool with pickler=\"cloudpickle\" (pip install 'trio_workers[cloudpickle]')"
    )


def _find_in_partial(function: "functools.partial[object]", name: str) -> str:
    pieces: Iterable[tuple[str, object]] = (
        (name, function.func),
        *((f"argument {number} of {name}", value) for number, value in enumerate(function.args, 1)),
        *((f"argument {key!r} of {name}", value) for key, value in function.keywords.items()),
    )
    for what, value in pieces:
        try:
            pickle.dumps(value, PROTOCOL)
        except Exception:
            return what
    return name


def _restore(links: "Sequence[Link]", text: str) -> Exception:
    """Hang an exception and all that belongs to it together again, with the worker's traceback as its cause."""
    error = restore(links)
    remote = RemoteTraceback(text)
    remote.__cause__ = error.__cause__
    error.__cause__ = remote
    assert isinstance(error, Exception)
    return error
