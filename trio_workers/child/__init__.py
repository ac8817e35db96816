"""The inside of a worker written in Python.

    from trio_workers.child import serve

    serve(lambda job: job.body.upper())

That is a whole worker program. It imports neither trio nor anything else that takes long to import: a worker is ready
within milliseconds, and a pool may start many. So this package goes without `typing`, `json`, `re`, `enum` and
whatever imports them, and loads `traceback` when the first job fails.
"""

import os
import sys

from .._goridge import STOP, FrameError
from ._relay import open_relay

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Generator, Iterator
    from typing import Final, TypeAlias, TypeGuard

    from ._relay import Relay

    Buffer: TypeAlias = bytes | bytearray | memoryview
    Part: TypeAlias = "Buffer | Reply | None"
    Answer: TypeAlias = "Part | Iterator[Part]"  # what a generator function is often annotated with
else:
    import _signal as signal  # the C half of it, which is all we need: the other imports enum

__all__ = ["STOP_REQUEST", "Job", "Reply", "serve"]

STOP_REQUEST: "Final" = STOP
"""Return this very object to be replaced: the job counts as not run and goes to another worker.

Equal bytes are an ordinary reply, so a handler that echoes what it gets is safe.
"""

LONGEST_ERROR: "Final" = 1 << 20
"""Of a longer error message only the two ends are sent, so that it fits any sensible `Config.max_frame_size`."""
LARGEST_3: "Final" = 0xFFFFFFFF
"""Largest payload of a goridge-3 frame: its size is a u32."""

_CO_ASYNC: "Final" = 0x80 | 0x200  # CO_COROUTINE and CO_ASYNC_GENERATOR of the inspect module
_ACCEPTED: "Final" = "bytes, a Reply, None or STOP_REQUEST, or is a generator of bytes and Replies"


class Job:
    """One job: a binary `body` and a binary `context`, as they were given to `Payload`."""

    __slots__ = ("body", "context")

    def __init__(self, body: bytes, context: bytes) -> None:
        self.body: bytes = body
        self.context: bytes = context

    def __repr__(self) -> str:
        return f"Job(body={self.body!r}, context={self.context!r})"


class Reply:
    """An answer with a `context` beside its `body`. Both are bytes-like; `None` and `b""` mean the same."""

    __slots__ = ("body", "context")

    def __init__(self, body: "Buffer | None" = b"", context: "Buffer | None" = b"") -> None:
        self.body: Buffer | None = body
        self.context: Buffer | None = context

    def __repr__(self) -> str:
        return f"Reply(body={self.body!r}, context={self.context!r})"


def serve(handler: "Callable[[Job], Answer]") -> None:
    """Serve jobs until the pool says stop or is gone.

    `handler(job)` is called for one job after the other, in the calling thread, which must be the main thread. It
    returns bytes or any bytes-like object, a `Reply`, None (an empty reply), or `STOP_REQUEST`. A generator function
    streams its answer: each part it yields is sent at once, and when the caller has had enough the generator is
    closed (`GeneratorExit`); that takes goridge-3. An `Exception` that leaves the handler is a job error with its
    traceback as message, and the worker lives on. `SystemExit`, `KeyboardInterrupt` and `GeneratorExit` end it.

    The environment says where the pool is: `RR_RELAY` is `pipes` (the default), `tcp://HOST:PORT` or `unix:///PATH`,
    and `TRIO_WORKERS_PROTOCOL` the dialect (default `goridge-3`). Over pipes the relay is taken away from stdin and
    stdout: from then on a `print`, also one of a subprocess or of a library in C, goes to stderr, and stdin is empty.
    SIGINT is ignored from then on: the pool decides when its workers end.

    Raises TypeError for a handler that can't be called or is async, ValueError for an environment that makes no sense,
    OSError where nobody listens, and RuntimeError when what arrives is not the dialect.
    """
    _check_handler(handler)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    relay = open_relay(os.environ.get("RR_RELAY", "pipes"), os.environ.get("TRIO_WORKERS_PROTOCOL", "goridge-3"))
    # A print is seen when it happens, not when a buffer is full; and no text can make it raise, as on stderr.
    if (reconfigure := getattr(sys.stdout, "reconfigure", None)) is not None:
        reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        while _serve_one(relay, handler):
            pass
    except FrameError as error:
        raise RuntimeError(
            f"what the pool sent is not {relay.protocol} (TRIO_WORKERS_PROTOCOL names the dialect): {error}"
        ) from None


def _check_handler(handler: object) -> None:
    if not callable(handler):
        raise TypeError(f"serve() takes a function of one job, not {type(handler).__name__}")
    target: object = handler
    partial: type[object] | None = getattr(sys.modules.get("functools"), "partial", None)
    while partial is not None and isinstance(target, partial):
        target = getattr(target, "func", None)
    call: object = getattr(target, "__call__", None)  # noqa: B004 - not whether, but how
    code = getattr(target, "__code__", None) or getattr(call, "__code__", None)
    if getattr(code, "co_flags", 0) & _CO_ASYNC:
        raise TypeError(
            "serve() takes a plain function, not an async one: a worker does one job at a time, so write it without "
            "async, or run your event loop inside it (trio.run(main, job), asyncio.run(main(job)))"
        )


def _serve_one(relay: "Relay", handler: "Callable[[Job], Answer]") -> bool:
    # A function of its own, so that a job and its answer are forgotten before the next one is waited for.
    payload = relay.next_job()
    if payload is None:
        return False
    parts: Generator[Part, None, object] | None = None
    data = b""
    try:
        answer = handler(Job(*payload))
        if not _is_generator(answer):
            data = _encode(relay, answer)
        elif relay.protocol == "goridge-3":
            parts = answer
        else:
            answer.close()
            raise TypeError(f"this handler streams, and streams need goridge-3; the pool speaks {relay.protocol}")
    except Exception as error:
        data = relay.error(_describe(error))
    if parts is not None:
        return _stream(relay, parts)
    _flush()
    return relay.write(data)


def _is_generator(answer: object) -> "TypeGuard[Generator[Part, None, object]]":
    return hasattr(answer, "send") and hasattr(answer, "__next__")


def _stream(relay: "Relay", parts: "Generator[Part, None, object]") -> bool:
    # Only what the handler's own code raises is a job error, so the relay is used outside of the `try`.
    while True:
        asked = relay.stream_stop_asked()
        try:
            if asked:
                parts.close()
                data = relay.reply(b"", b"")
                break
            data = _encode_part(relay, parts)
        except StopIteration:
            data = relay.reply(b"", b"")
            break
        except Exception as error:
            data = relay.error(_describe(error))
            break
        if not relay.write(data):
            return False
    _flush()
    return relay.write(data)


def _encode_part(relay: "Relay", parts: "Generator[Part, None, object]") -> bytes:
    try:
        part = next(parts)
        if part is STOP_REQUEST:
            raise TypeError("STOP_REQUEST says that the job did not run, so it can't be a part of a stream")
        return _encode(relay, part, more=True)
    except StopIteration as end:
        if end.value is not None:
            raise TypeError("a generator's answer is what it yields; what it returns would be lost") from None
        raise
    except BaseException:
        parts.close()  # if it was the part that was wrong; a generator that raised has ended and doesn't mind
        raise


def _encode(relay: "Relay", answer: object, *, more: bool = False) -> bytes:
    if answer is STOP_REQUEST:
        return relay.reply(STOP, b"")
    if isinstance(answer, Reply):
        body, context = _to_bytes(answer.body), _to_bytes(answer.context)
        if body is None or context is None:
            names = f"{type(answer.body).__name__} and {type(answer.context).__name__}"
            raise TypeError(f"Reply.body and Reply.context are bytes-like or None, not {names}")
    else:
        body, context = _to_bytes(answer), b""
        if body is None:
            raise _wrong_type(answer)
    size = len(context) + len(body)
    if size > LARGEST_3 and relay.protocol == "goridge-3":
        raise OverflowError(f"an answer of {size:,} bytes is larger than a goridge-3 frame can be ({LARGEST_3:,})")
    if more:
        return relay.part(context, body)
    if not body and context == STOP:
        raise ValueError(
            "an empty reply with this context means on the wire that the job did not run, and it would be run again; "
            "return STOP_REQUEST if that is meant"
        )
    return relay.reply(context, body)


def _to_bytes(value: object) -> "bytes | None":
    # None stands for what can't be converted: here None is an empty payload.
    if type(value) is bytes:
        return value
    if value is None:
        return b""
    try:
        return memoryview(value).tobytes()  # type: ignore[arg-type]
    except TypeError:
        return None


def _wrong_type(answer: object) -> TypeError:
    name = type(answer).__name__
    text = f"a handler returns {_ACCEPTED}; not {name}"
    if name == "str":
        text += " (encode it, for instance with .encode())"
    elif name == "coroutine":
        answer.close()  # type: ignore[attr-defined]
        text += " (write the handler without async)"
    return TypeError(text)


def _describe(error: Exception) -> bytes:
    import traceback

    # Our own frames say nothing about the handler.
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals is globals():
        trace = trace.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, trace)).rstrip("\n")
    except Exception as another:  # an exception may have any __str__
        text = f"{type(error).__name__}, which can't be shown: {type(another).__name__}"
    message = text.encode("utf-8", "backslashreplace")
    if len(message) > LONGEST_ERROR:
        half = LONGEST_ERROR // 2
        message = b"%s\n... %d bytes left out ...\n%s" % (message[:half], len(message) - 2 * half, message[-half:])
    return message


def _flush() -> None:
    # Part of a line is shown as well. What a handler did to sys.stdout (None, closed, its own) is worth no job.
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except Exception:
        pass
