"""What workers of the peers and of a Python pool run. Loaded in each of them, so it imports next to nothing."""

import os
import time

TYPE_CHECKING = False  # typing itself would be one more import
if TYPE_CHECKING:
    from collections.abc import Iterator


def echo(data: bytes) -> bytes:
    return data


def give_back(value: object) -> object:
    return value


def yield_back(value: object) -> "Iterator[object]":
    yield value


def crash() -> None:
    os._exit(1)


def rest(seconds: float) -> int:
    """Keep a worker for a while, so that jobs beside this one need others; return which it was."""
    time.sleep(seconds)
    return os.getpid()
