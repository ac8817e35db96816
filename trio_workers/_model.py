"""What goes in, what comes out, and what a worker looks like from outside."""

import enum
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import attrs

from ._goridge import STOP, printable

STOP_REQUEST: Final = STOP
"""Context of a worker's answer that asks for its own replacement: the job did not run, the pool hands it on."""

Buffer = bytes | bytearray | memoryview
"""What a payload may be made of."""


def _to_bytes(value: Buffer | None, name: str) -> bytes:
    """Take any bytes-like object; `None` and `b""` are one. A copy is made of what could change later."""
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    try:
        return bytes(memoryview(value))
    except TypeError:
        hint = "; encode it first, for instance with .encode()" if type(value).__name__ == "str" else ""
        raise TypeError(f"Payload.{name} must be bytes-like or None, not {type(value).__name__}{hint}") from None


def _to_body(value: Buffer | None) -> bytes:
    return _to_bytes(value, "body")


def _to_context(value: Buffer | None) -> bytes:
    return _to_bytes(value, "context")


@attrs.frozen
class Payload:
    """What is carried to a worker and back: a binary `body` and a binary `context`.

    Both are bytes-like; `None` and `b""` mean the same. `str` is a `TypeError`: the wire carries bytes. Mutable
    buffers are copied, so that what is sent is what was given. The `repr` shows the beginning only.
    """

    body: bytes = attrs.field(default=b"", converter=_to_body, repr=printable)
    context: bytes = attrs.field(default=b"", converter=_to_context, repr=printable)


_set_body: Final = Payload.__dict__["body"].__set__
_set_context: Final = Payload.__dict__["context"].__set__


def payload_of(body: bytes, context: bytes) -> Payload:
    """Make a payload of what is bytes already, without asking what it is."""
    payload: Payload = object.__new__(Payload)
    _set_body(payload, body)
    _set_context(payload, context)
    return payload


class WorkerState(enum.IntEnum):
    """A worker's state, with the numbers of RoadRunner's pool."""

    INACTIVE = 0
    """No job can be taken: starting, or on its way out."""
    READY = 1
    """Free."""
    WORKING = 2
    """On a job."""
    STOPPED = 3
    """Ended by a soft stop."""
    ERRORED = 4
    """Died or was killed."""


class WorkerEvent(enum.IntEnum):
    """What an observer is told about a worker."""

    CREATED = 0
    """The handshake is done. Context: None."""
    DESTRUCT = 1
    """The process is about to be ended or reaped, once for each CREATED. Context: the reason, a string."""
    ERROR = 2
    """Something went wrong with a worker. Context: the exception."""


@attrs.frozen(kw_only=True, weakref_slot=False)
class JobRecord:
    """How a job went, from its beginning to its end: a `job_observer` gets one for each.

    Times are monotonic seconds, on the clock of `trio.current_time`.
    """

    label: str | None
    """What the job was called; a function's qualified name by default."""
    slot: int | None
    """The slot of the worker it ended on; None where it ended without one."""
    pid: int | None
    """The pid of that worker."""
    queued: float
    """When it was handed in."""
    started: float | None
    """When it got that worker; None where it ended without one."""
    ended: float
    """When it was over for its caller."""
    outcome: str
    """How it ended; one of the keys of `PoolStatistics.jobs`."""


class _Draft:
    """A record that can still be written: it has the slots of `JobRecord` and nothing else, so it can become one."""

    __slots__ = tuple(field.name for field in attrs.fields(JobRecord))


def record_of(
    label: str | None,
    slot: int | None,
    pid: int | None,
    queued: float,
    started: float | None,
    ended: float,
    outcome: str,
) -> JobRecord:
    """Make a record, past the frozen class's own way: a fifth of the time, for there is one for each job."""
    record: Any = _Draft()
    record.label = label
    record.slot = slot
    record.pid = pid
    record.queued = queued
    record.started = started
    record.ended = ended
    record.outcome = outcome
    record.__class__ = JobRecord
    return record  # type: ignore[no-any-return]


class State:
    """A live, read-only view of a worker's state. You get one from `Worker.state`."""

    __slots__ = ("_read",)

    _read: Callable[[], tuple[WorkerState, int, float]]

    def __init__(self) -> None:
        raise TypeError("State has no public constructor; it comes from Worker.state")

    @classmethod
    def _create(cls, read: Callable[[], tuple[WorkerState, int, float]]) -> "State":
        self = object.__new__(cls)
        self._read = read
        return self

    @property
    def value(self) -> WorkerState:
        """The state now."""
        return self._read()[0]

    @property
    def num_execs(self) -> int:
        """How many jobs the worker has begun, failed ones included."""
        return self._read()[1]

    @property
    def updated(self) -> datetime:
        """When the state last changed: an aware datetime in UTC."""
        return datetime.fromtimestamp(self._read()[2], UTC)

    def __repr__(self) -> str:
        value, num_execs, _ = self._read()
        return f"<State {value.name}: {num_execs} jobs>"
