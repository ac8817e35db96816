"""Functions that the tests of traces send to workers."""

import os
import sys
import threading
import time
from collections.abc import Iterator


def current() -> tuple[int, int, bool]:
    """The trace and the span that a function runs in, and whether that is one of another process."""
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return context.trace_id, context.span_id, context.is_remote


def loaded() -> list[str]:
    """What of tracing the worker has loaded."""
    return sorted(name for name in sys.modules if name in ("opentelemetry", "trio_workers.child._traced"))


def forbid() -> None:
    """Be a worker that has no opentelemetry."""
    sys.modules["opentelemetry"] = None  # type: ignore[assignment]


def add(first: int, second: int = 0) -> int:
    """Add."""
    return first + second


def fail(number: int) -> float:
    """Fail, a call deep."""
    return divide(number)


def divide(number: int) -> float:
    """Divide by zero, after another error."""
    try:
        raise KeyError(number)
    except KeyError:
        return number / 0


def end(status: int) -> None:
    """End the worker."""
    os._exit(status)


def sleep(path: str) -> None:
    """Say that it runs, and sleep."""
    with open(path, "w"):
        time.sleep(1000)


def give_lock() -> object:
    """Return what can't be sent back."""
    return threading.Lock()


def count(to: int) -> Iterator[int]:
    """Count."""
    yield from range(to)


async def later() -> None:
    """Be no plain function."""


class Holder:
    """An object that can't be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def method(self) -> None:
        """Do nothing."""
