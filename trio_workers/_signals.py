"""A pool that is turned by signals, as services are by habit: HUP for anew, TTIN and TTOU for more and fewer."""

import logging
import signal
import threading
from typing import Final

import trio

from ._watch import AnyPool, check_pool

STEPS: Final = {signal.SIGTTIN: 1, signal.SIGTTOU: -1}
"""What gunicorn and unicorn take these two for."""

_log = logging.getLogger("trio_workers.control")


@trio.lowlevel.enable_ki_protection
async def serve_signals(pool: AnyPool, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
    """Turn the pool by signals: `await nursery.start(serve_signals, pool)`.

    SIGHUP replaces every worker (`reset`), SIGTTIN adds one, and SIGTTOU takes one away, but never the last. What was
    done is logged (`trio_workers.control`, INFO), and what failed as a WARNING, with the error: the pool is then as it
    was. A SIGHUP during a reset is one more reset after it, however many come; equal signals that come in one moment
    are one, as everywhere.

    The signals are heard from when `start` returns, until this is cancelled; then they do again what they did before.
    It does not end by itself: inside the `open_pool` block, cancel its nursery. For one pool of a program at a time.

    Raise RuntimeError outside the main thread, where Python can't take signals. Cancelling gives up the wait for a
    change that is under way, not the change.
    """
    check_pool(pool)
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("serve_signals must run in the main thread: Python tells no other one of signals")
    await trio.lowlevel.checkpoint_if_cancelled()
    turner = _Turner(pool)
    with trio.open_signal_receiver(signal.SIGHUP, *STEPS) as signals:
        async with trio.open_nursery() as nursery:
            task_status.started()
            async for number in signals:
                step = STEPS.get(signal.Signals(number))
                if step is not None:
                    nursery.start_soon(turner.resize, signal.Signals(number).name, step)
                elif turner.resetting:
                    turner.again = True
                else:
                    turner.resetting = True
                    nursery.start_soon(turner.reset)


class _Turner:
    def __init__(self, pool: AnyPool) -> None:
        self._pool = pool
        self.resetting = False
        self.again = False
        """Whether a signal came during a reset: workers that it had replaced already may be too old again."""

    @trio.lowlevel.enable_ki_protection
    async def reset(self) -> None:
        try:
            while True:
                self.again = False
                name = self._pool.config.name
                _log.info("%s: SIGHUP: replacing all workers", name)
                try:
                    await self._pool.reset()
                except Exception as error:
                    self._say_why_not("SIGHUP", "reset", error)
                else:
                    _log.info("%s: SIGHUP: all workers are replaced", name)
                if not self.again:
                    return
        finally:
            self.resetting = False

    @trio.lowlevel.enable_ki_protection
    async def resize(self, signal_name: str, step: int) -> None:
        name, before = self._pool.config.name, self._pool.config.num_workers
        size = before + step
        if size < 1:
            _log.info("%s: %s: the last worker stays", name, signal_name)
            return
        _log.info("%s: %s: from %d to %d workers", name, signal_name, before, size)
        try:
            await self._pool.resize(size)
        except Exception as error:
            self._say_why_not(signal_name, "resize", error)

    def _say_why_not(self, signal_name: str, what: str, error: Exception) -> None:
        """Log what failed. It must not leave the task: that would end whatever stands around it."""
        name = self._pool.config.name
        if isinstance(error, trio.ClosedResourceError):
            _log.warning("%s: %s: no %s, for the pool is closed", name, signal_name, what)
        else:
            _log.warning("%s: %s: the %s failed, and the pool is as it was: %s", name, signal_name, what, error)
