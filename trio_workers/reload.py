"""Reset a pool when its workers' files change, for development: `await nursery.start(reset_on_change, pool, "app/")`.

It needs watchfiles, which comes with the extra `cli`.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from ._errors import SpawnError
from ._watch import AnyPool, check_pool

if TYPE_CHECKING:
    from watchfiles._rust_notify import RustNotify

GATHER: Final = 500
"""Milliseconds at most over which changes that come together, such as those of a checkout, make one reset."""

STEP: Final = 50
"""Milliseconds without another change after which those that were seen are told; also how soon a cancel is noticed."""

POLL: Final = 300
"""Milliseconds between two looks, where `WATCHFILES_FORCE_POLLING` asks for that: some mounts tell of no changes."""

_log = logging.getLogger("trio_workers.reload")


async def reset_on_change(
    pool: AnyPool, *paths: str | os.PathLike[str], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Reset the pool at each change of these files, and of what is in these directories, at any depth.

    Run it as a task: `await nursery.start(reset_on_change, pool, "worker.php", "src/")` returns when the paths are
    watched. It ends when it is cancelled, and when it finds the pool closed at a change. What tools and editors leave
    (`.git`, `__pycache__`, `node_modules`, `.venv`, swap files and so on) doesn't count. A file may be replaced by
    another, as most editors do it.

    A reset that fails is a warning in the log `trio_workers.reload`, and the workers that were there go on; the next
    change is the next try. Changes while a reset is under way make another one after it.

    Raise TypeError for what is no pool, or where no path is given; `FileNotFoundError` for a path that is not there;
    `ModuleNotFoundError` without watchfiles.
    """
    check_pool(pool)
    if not paths:
        raise TypeError("reset_on_change() needs at least one path to watch")
    files: set[str] = set()
    directories: set[str] = set()
    for path in map(Path, paths):
        whole = str(path.absolute())
        if path.is_dir():
            directories.add(whole)
        elif path.exists():
            files.add(whole)
        else:
            raise FileNotFoundError(f"{path} can't be watched: there is no such file or directory")
    give, changes = trio.open_memory_channel[str](1)
    with contextlib.ExitStack() as stack:
        watches: list[tuple[RustNotify, Callable[[str], bool]]] = []
        if directories:
            watches.append((stack.enter_context(_open(directories, recursive=True)), _not_left_by_tools(directories)))
        if files:
            # Each in its directory: a watch of the file itself would be gone with it, once another takes its place.
            parents = {os.path.dirname(file) for file in files}
            watches.append((stack.enter_context(_open(parents, recursive=False)), files.__contains__))
        async with trio.open_nursery() as nursery:
            for watcher, counts in watches:
                nursery.start_soon(_watch, watcher, counts, give)
            task_status.started()
            async for changed in changes:
                await _reset(pool, changed)
                if pool.statistics().closed:
                    nursery.cancel_scope.cancel()


async def _reset(pool: AnyPool, changed: str) -> None:
    _log.info("%s changed: the workers are replaced", changed)
    try:
        await pool.reset()
    except trio.ClosedResourceError:
        _log.debug("the pool is closed, and has nothing to reset")
    except (OSError, SpawnError) as error:
        _log.warning("%s changed, but the reset failed, and the workers that were there go on: %s", changed, error)
    else:
        _log.info("all workers are new")


def _open(directories: set[str], *, recursive: bool) -> "RustNotify":
    """Begin to watch; what changes from now on is told by `_next`."""
    try:
        # Not `watchfiles.awatch`: that doesn't tell when it has begun to watch.
        from watchfiles._rust_notify import RustNotify
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "watchfiles":
            raise
        raise ModuleNotFoundError(
            "reset_on_change() needs watchfiles, which comes with: pip install 'trio_workers[cli]'", name=error.name
        ) from None
    polling = os.environ.get("WATCHFILES_FORCE_POLLING", "").lower() not in ("", "0", "false", "disable", "disabled")
    return RustNotify(sorted(directories), False, polling, POLL, recursive, True)


def _not_left_by_tools(directories: set[str]) -> Callable[[str], bool]:
    """Return what says whether a path counts. Only its part below our directories is looked at."""
    from watchfiles import Change, DefaultFilter

    wanted = DefaultFilter()

    def counts(path: str) -> bool:
        above = max((one for one in directories if path.startswith(f"{one}{os.sep}")), key=len, default="")
        return wanted(Change.modified, path[len(above) :])

    return counts


async def _watch(watcher: "RustNotify", counts: Callable[[str], bool], give: trio.MemorySendChannel[str]) -> None:
    """Tell of changes; while the last one was not taken, more of them change nothing."""
    limiter = trio.CapacityLimiter(1)
    while True:
        changed = sorted(path for _, path in await _next(watcher, limiter) if counts(path))
        if changed:
            # Where that blocks, a reset is to come already, and begins after this change.
            with contextlib.suppress(trio.WouldBlock):
                give.send_nowait(changed[0])


async def _next(watcher: "RustNotify", limiter: trio.CapacityLimiter) -> set[tuple[int, str]]:
    """Wait for changes in a thread, which ends when we are cancelled."""
    stop = threading.Event()

    async def stop_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            stop.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_when_cancelled)
        found = await trio.to_thread.run_sync(watcher.watch, GATHER, STEP, 0, stop, limiter=limiter)
        nursery.cancel_scope.cancel()
    await trio.lowlevel.checkpoint_if_cancelled()
    if isinstance(found, str):  # "stop" can't be, for then we are cancelled
        return set()
    return found


__all__ = ["reset_on_change"]
