"""The pool's end of a control socket: who may come in, and what is answered.

Each connection has a task of its own, and answers what it is asked in order. None of them holds anything that another
needs: what is read from one is bounded by a line, what is sent to it by what its socket takes. A picture for those who
watch is made once for all of them, and only the newest is kept: a slow reader misses pictures and delays nobody.
"""

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import trio

from . import _platform
from ._control_place import make_private_directory, name_for, sweep
from ._control_protocol import (
    LONGEST_REQUEST,
    BadRequest,
    LineBuffer,
    LineTooLong,
    Request,
    encode_answer,
    encode_refusal,
    parse_request,
)
from ._errors import WorkersError
from ._socket_file import SocketFile, listen_at_path, why_too_long
from ._watch import AnyPool, PoolFact, WorkerFact, describe_pool, describe_workers, watch_pool

CONNECTIONS: Final = 256
"""Connections at a time: each costs a descriptor, of which a process has as a rule 1,024. Further ones are refused."""

SILENT_FOR: Final = 0.2
"""Seconds after which a connection that sends nothing gets the status: a program has sent its first line by then."""

READS_WITHIN: Final = 10.0
"""Seconds that a client may take to read an answer for which its socket has no room."""

LOOK_EVERY: Final = 0.5
"""Seconds between two looks at the figures while somebody watches; changes of workers are told at once."""

PICTURE_EVERY: Final = 0.05
"""Seconds between two pictures at least: twenty a second, more than anybody reads."""

SHARE: Final = 10
"""Of the time up to the next picture, making one may take this part at most: that of a thousand workers takes long."""

NAMES_TRIED: Final = 100
"""Pools of one name in one process that can have a socket in the usual place."""

REPORT_EVERY: Final = 1.0
"""Seconds between two log lines about strangers."""

_log = logging.getLogger("trio_workers.control")


@trio.lowlevel.enable_ki_protection
async def serve_control(
    pool: AnyPool,
    *,
    path: str | os.PathLike[str] | None = None,
    task_status: "trio.TaskStatus[Path]" = trio.TASK_STATUS_IGNORED,
) -> None:
    """Let the pool be looked at and turned over a Unix socket: `path = await nursery.start(serve_control, pool)`.

    One JSON document a line, both ways: the requests `status`, `workers`, `reset`, `resize N` and `watch`, and their
    answers; `trio_workers.control.connect` speaks it, and so does a terminal (`nc -U`). The value of `start` is the
    socket's path: `path`, or a new one in `$XDG_RUNTIME_DIR/trio_workers` (where that variable is not set, or names a
    directory of another user, in `/tmp/trio_workers-<uid>`), a directory for this user alone.

    The socket is for this user and root: its mode is 0600 from birth, and on Linux the kernel is asked who connects
    (`SO_PEERCRED`). It takes the place of a dead socket only, and is removed at the end.

    Serves until cancelled, and touches the pool by its public methods only. Once the pool is closed, `reset` and
    `resize` are refused, and the rest is still answered. In a nursery inside the `open_pool` block, cancel it there:
    a nursery waits for its tasks, and this one does not end by itself. Cancelling gives up the wait for a change that
    is under way, not the change.

    Raise FileExistsError where something that is no dead socket is at `path`, PermissionError where the usual directory
    is not for this user alone, other `OSError` where the socket can't be made, and ValueError for a path that is too
    long for a socket: 107 bytes on Linux.
    """
    watch_pool(pool)  # from now on deaths are remembered
    await trio.lowlevel.checkpoint_if_cancelled()
    listener, file = _listen(pool, path)
    try:
        await _Server(pool, file.path).serve(listener, task_status)
    finally:
        listener.socket.close()
        file.remove()


def _listen(pool: AnyPool, path: str | os.PathLike[str] | None) -> tuple[trio.SocketListener, SocketFile]:
    if path is not None:
        return listen_at_path(_check_path(path))
    directory = make_private_directory()
    sweep(directory)
    for number in range(1, NAMES_TRIED + 1):
        with contextlib.suppress(FileExistsError):
            return listen_at_path(_check_path(directory / name_for(pool.config.name, number)))
    raise FileExistsError(errno.EEXIST, f"there are {NAMES_TRIED} sockets of this pool's name already", str(directory))


def _check_path(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"path must be a str or a path of str, not {type(path).__name__}")
    if not text or "\0" in text:
        raise ValueError(f"path must name a file, not {text!r}")
    text = os.path.abspath(text)  # another directory later must not keep us from removing it
    if (why := why_too_long(text)) is not None:
        raise ValueError(f"path {text!r}: {why}")
    return text


class _Dropped(Exception):
    """This connection is over."""


class _Bell:
    """Rung by many, waited for by one."""

    def __init__(self) -> None:
        self._rung = trio.Event()

    def ring(self) -> None:
        self._rung.set()

    async def wait(self) -> None:
        await self._rung.wait()
        self._rung = trio.Event()


class _Server:
    def __init__(self, pool: AnyPool, path: str) -> None:
        self._pool = pool
        self._path = path
        self._connections = 0
        self._gallery = _Gallery(pool)
        self._next_report = -float("inf")

    async def serve(self, listener: trio.SocketListener, task_status: "trio.TaskStatus[Path]") -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._gallery.nursery = nursery
                task_status.started(Path(self._path))
                await trio.serve_listeners(self._welcome, [listener], handler_nursery=nursery)
        except* OSError:
            # trio goes on after a lack of descriptors; this is something else, and no reason to end the pool.
            _log.exception("the control socket at %s failed, and is closed", self._path)

    @trio.lowlevel.enable_ki_protection
    async def _welcome(self, stream: trio.SocketStream) -> None:
        """See a connection through. An error that left here would end the server, and whatever is around it."""
        self._connections += 1
        try:
            connection = _Connection(stream)
            await self._check(connection)
            await self._converse(connection)
        except (_Dropped, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            _log.debug("a connection to %s is over: %r", self._path, error)
        except Exception:
            _log.exception("a connection to %s met a bug of trio_workers", self._path)
        finally:
            self._connections -= 1

    async def _check(self, connection: "_Connection") -> None:
        uid, ours = connection.uid, os.geteuid()
        if uid is not None and uid not in (ours, 0):
            now = trio.current_time()
            if now >= self._next_report:
                self._next_report = now + REPORT_EVERY
                _log.warning("refused a connection to %s from uid %d, pid %s", self._path, uid, connection.pid)
            await connection.send(encode_refusal(f"this socket is for uid {ours} and for root, and you are uid {uid}"))
            raise _Dropped("a stranger")
        if self._connections > CONNECTIONS:
            await connection.send(encode_refusal(f"there are {CONNECTIONS} connections already; close one of them"))
            raise _Dropped("one too many")

    async def _converse(self, connection: "_Connection") -> None:
        with trio.move_on_after(SILENT_FOR):
            await connection.read()
        if not connection.has_sent:
            # Marked, for a client that was about to ask: it must not take this for its answer.
            await connection.send(encode_answer(unasked=True, status=describe_pool(self._pool)))
        while True:
            try:
                while (line := connection.lines.next_line()) is not None:
                    await self._answer(connection, line)
            except LineTooLong:
                await connection.send(encode_refusal(f"a line has at most {LONGEST_REQUEST} bytes; this is the end"))
                raise _Dropped("a line without end") from None
            if connection.ended:
                break
            await connection.read()
        if last := connection.lines.rest():  # as printf sends it, which ends no line
            await self._answer(connection, last)

    async def _answer(self, connection: "_Connection", line: bytes) -> None:
        try:
            request = parse_request(line)
        except BadRequest as error:
            await connection.send(encode_refusal(str(error)))
            return
        match request.do:
            case "status":
                await connection.send(encode_answer(status=describe_pool(self._pool)))
            case "workers":
                await connection.send(encode_answer(workers=describe_workers(self._pool)))
            case "watch":
                await self._gallery.show(connection)
            case _:
                await connection.send(await self._turn(connection, request))

    async def _turn(self, connection: "_Connection", request: Request) -> bytes:
        """Change the pool, and return the answer."""
        name, do, to = self._pool.config.name, request.do, request.to
        what = do if to is None else f"{do} to {to}"
        _log.info("%s: %s, asked for by pid %s over the control socket", name, what, connection.pid)
        try:
            if to is None:
                await connection.unless_hung_up(self._pool.reset)
                return encode_answer(done=do)
            await connection.unless_hung_up(lambda: self._pool.resize(to))
            return encode_answer(done=do, to=to)
        except trio.ClosedResourceError:
            return encode_refusal(f"the pool {name!r} is closed, so there is nothing to {do}")
        except (WorkersError, OSError) as error:
            # The notes of a worker's error are the last lines it wrote to stderr, which as a rule say why.
            return encode_refusal("\n".join([str(error), *getattr(error, "__notes__", ())]))
        except Exception as error:
            _log.exception("%s: %s failed", name, what)
            return encode_refusal(f"{do} failed: {error!r}")


class _Connection:
    """One client: what it has sent and is not answered yet, and whether it still listens."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.lines = LineBuffer(LONGEST_REQUEST)
        self.has_sent = False
        self.ended = False
        """It sends no more; it may still listen."""
        self.uid = _platform.HERE.peer_uid(stream.socket)
        self.pid = _platform.HERE.peer_pid(stream.socket)

    async def read(self) -> None:
        """Wait for bytes, or for the end of them. Cancelling loses none."""
        data = await self._stream.receive_some(LONGEST_REQUEST)
        if data:
            self.has_sent = True
            self.lines.receive(bytes(data))
        else:
            self.ended = True

    async def send(self, line: bytes) -> None:
        """Send a line. One who does not read it is dropped."""
        with trio.move_on_after(READS_WITHIN) as patience:
            await self._stream.send_all(line)
        if patience.cancelled_caught:
            raise _Dropped(f"it has not read for {READS_WITHIN:g} s")

    @property
    def hung_up(self) -> bool:
        """Whether it neither sends nor listens."""
        return _platform.HERE.hung_up(self._stream.socket.fileno())

    async def unless_hung_up(self, change: Callable[[], Awaitable[None]]) -> None:
        """Wait for a change of the pool, and for its client: one who is gone must not hold a place for long."""
        if not await _run_beside(change, self._cancel_at_hang_up):
            raise _Dropped("it hung up; the change goes on")

    async def _cancel_at_hang_up(self, scope: trio.CancelScope) -> None:
        # What it sent meanwhile stays unread, and keeps the socket readable: no event would tell.
        while not self.hung_up:  # noqa: ASYNC110
            await trio.sleep(LOOK_EVERY)
        scope.cancel()

    async def wait_for_more(self) -> bool:
        """Wait until there are bytes to read, and leave them there. False at their end."""
        try:
            self.ended = not await self._stream.socket.recv(1, socket.MSG_PEEK)
        except OSError:
            self.ended = True  # it was closed, with an answer unread
        return not self.ended


class _Gallery:
    """Pictures of the pool for those who watch. While nobody does, nothing runs."""

    nursery: trio.Nursery

    def __init__(self, pool: AnyPool) -> None:
        self._pool = pool
        self._watchers: set[_Bell] = set()
        self._scope = trio.CancelScope()
        self._seen: object = None
        self._line = b""
        self._number = 0
        """Of the newest picture; one that shows nothing new has the number of the one before."""
        self._cost = 0.0

    async def show(self, connection: _Connection) -> None:
        """Send a picture now and after each change, until the client sends something else, or hangs up."""
        bell = _Bell()
        more = connection.lines.has_line

        async def listen(_: trio.CancelScope) -> None:
            nonlocal more
            if not connection.ended and await connection.wait_for_more():
                more = True
            bell.ring()  # no cancel: a line that is half sent must not be cut

        async def send_pictures() -> None:
            self._look()
            number = self._number
            await connection.send(self._line)
            while not more and not (connection.ended and connection.hung_up):
                # After the end of its bytes no event tells that the client has gone.
                with trio.move_on_after(LOOK_EVERY if connection.ended else float("inf")):
                    await bell.wait()
                if number != self._number:
                    number = self._number
                    await connection.send(self._line)

        if not self._watchers:
            self._scope = trio.CancelScope()
            self.nursery.start_soon(self._paint, self._scope)
        self._watchers.add(bell)
        try:
            await _run_beside(send_pictures, listen)
        finally:
            self._watchers.remove(bell)
            if not self._watchers:
                self._scope.cancel()

    @trio.lowlevel.enable_ki_protection
    async def _paint(self, scope: trio.CancelScope) -> None:
        bell = _Bell()
        with scope, watch_pool(self._pool).tell(bell.ring):
            while True:
                pause = max(PICTURE_EVERY, SHARE * self._cost)
                await trio.sleep(pause)
                with trio.move_on_after(max(0.0, LOOK_EVERY - pause)):
                    await bell.wait()
                try:
                    self._look()
                except Exception:
                    _log.exception("making a picture of the pool met a bug of trio_workers")

    def _look(self) -> None:
        """Make a picture, and ring for those who watch where it shows something new."""
        begun = time.perf_counter()
        status, workers = describe_pool(self._pool), describe_workers(self._pool)
        self._line = encode_answer(status=status, workers=workers)
        seen = _lasting(status, workers)
        if seen != self._seen:
            self._seen = seen
            self._number += 1
            for bell in self._watchers:
                bell.ring()
        self._cost = time.perf_counter() - begun


def _lasting(status: PoolFact, workers: list[WorkerFact]) -> object:
    """Return what makes two pictures different: all but ages and the time, which always go on."""
    return (
        {**status, "at": None, "longest_wait": None},
        [
            {**worker, "uptime": None, "job": None if worker["job"] is None else worker["job"]["label"]}
            for worker in workers
        ],
    )


async def _run_beside(
    main: Callable[[], Awaitable[None]], companion: Callable[[trio.CancelScope], Awaitable[None]]
) -> bool:
    """Run `main` with a companion that may cancel it, and return whether it came to its end.

    What it raises leaves as it is, where a nursery alone would wrap it.
    """
    failed: Exception | None = None
    done = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(companion, nursery.cancel_scope)
        try:
            await main()
            done = True
        except Exception as error:
            failed = error
        nursery.cancel_scope.cancel()
    if failed is not None:
        raise failed
    return done
