"""What the commands that make a pool share: the pool itself, `--watch`, what they say of errors, and Ctrl-C."""

import contextlib
import logging
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar

import trio

from .._config import Config
from .._control_server import serve_control
from .._core import Observer
from .._errors import WorkersError
from .._pool import Pool, open_pool
from .._sockets import SocketFactory
from ..reload import reset_on_change
from ._errors import INTERRUPTED, CommandError, Misuse
from ._jobs import ReaderGone, say

T = TypeVar("T")

LOGS: Final = "trio_workers"
"""The parent of the logs of all subjects."""


def tell(text: str) -> None:
    """Write a line to stderr."""
    with contextlib.suppress(BrokenPipeError):
        print(f"trio-workers: {text}", file=sys.stderr, flush=True)


class _Lines(logging.Handler):
    """Shows what the pool logs, each record in a line: what a worker wrote to its stderr has records of its own."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__()
        self._show = show
        self.opened = False

    def emit(self, record: logging.LogRecord) -> None:
        if self.opened or record.name != "trio_workers.pool":  # an opening that fails is told by its error
            self._show((record.getMessage().splitlines() or [""])[0])


@contextlib.contextmanager
def _show_log(level: int, show: Callable[[str], None]) -> Generator[_Lines]:
    log = logging.getLogger(LOGS)
    handler, before, propagates = _Lines(show), log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False
    try:
        yield handler
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        log.propagate = propagates


def check_watched(paths: Sequence[Path]) -> None:
    """Raise `Misuse` for a path that can't be watched."""
    for path in paths:
        if not path.exists():
            raise Misuse(f"--watch {path}: no such file or directory")


@asynccontextmanager
async def open_watched(
    config: Config,
    paths: Sequence[Path] = (),
    level: int = logging.WARNING,
    show: Callable[[str], None] = tell,
    observer: Observer | None = None,
    control: bool = False,
) -> AsyncGenerator[Pool]:
    """Open a pool that is reset when these paths change; what it logs from this level on is shown.

    With `control`, it has a control socket in the usual place, if one can be made there. Raise `Misuse` where the
    workers' address can't be listened to.
    """
    async with AsyncExitStack() as stack:
        lines = stack.enter_context(_show_log(level, show))
        try:
            pool = await stack.enter_async_context(open_pool(config, observer=observer))
        except OSError as error:
            if not isinstance(config.factory, SocketFactory):
                raise
            raise Misuse(f"{config.factory.address} can't be listened to: {error.strerror or error}") from None
        async with trio.open_nursery() as nursery:
            lines.opened = True
            if paths:
                await nursery.start(reset_on_change, pool, *paths)
            if control:
                try:
                    await nursery.start(serve_control, pool)
                except (OSError, ValueError) as error:  # ValueError: its path would be too long for a socket
                    if level <= logging.WARNING:
                        show(f"this pool can't be seen by trio-workers top: {error}")
            yield pool
            nursery.cancel_scope.cancel()


def run_trio(main: Callable[[], Awaitable[T]], interrupted: Callable[[], str]) -> T:
    """Run it, and make of whatever ends it what ends a command: one line and an exit code.

    `interrupted()` is what to say at Ctrl-C.
    """
    try:
        return trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
    except BaseException as error:
        found = list(_each(error))
        for one in found:
            if isinstance(one, KeyboardInterrupt):
                raise CommandError(interrupted(), INTERRUPTED) from None
        for one in found:
            if isinstance(one, CommandError | ReaderGone | ModuleNotFoundError):
                raise one from None
        for one in found:
            if isinstance(one, WorkersError | OSError):
                raise CommandError(say(one)) from None
        raise


def _each(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            yield from _each(one)  # pyright: ignore[reportUnknownArgumentType]
    else:
        yield error


__all__ = ["check_watched", "open_watched", "run_trio", "tell"]
