"""Workers that connect to a listener of the pool: who may come in, and who is believed.

Each connection has a task of its own. The kernel is asked first whose it is, before a byte is exchanged; what it gives
to no worker that is expected is refused. So strangers cost a look-up each, and nothing that a worker needs.
"""

import functools
import ipaddress
import logging
import os
import socket
from typing import Final

import attrs
import trio

from . import _identity, _platform
from ._conversation import Conversation
from ._factories import SPAWNS_AT_A_TIME, Factory, Spawner, with_relay
from ._goridge import FrameError
from ._identity import Verdict
from ._process import Launch, WorkerProcess, spawn_process
from ._relay import FdRelay, Line, LineEnded
from ._socket_file import SocketFile, listen_at_path, why_too_long

LOOKUPS_AT_A_TIME: Final = 1
"""Threads of one spawner that look up whose a TCP connection is. That takes some milliseconds (the kernel goes through
its whole table of connections), so strangers may keep one core busy, and no more than that."""

LOOKUPS_WAITING: Final = 16
"""Connections that wait for their first look-up; further ones stay in the kernel's backlog. A look-up needs nothing of
the peer, so this is a queue that moves, and a worker keeps its place in it however many strangers come behind."""

CONNECTIONS_UNKNOWN: Final = 256
"""Connections that were looked up and may still be a worker's. A newcomer pushes out the oldest of them: a real worker
is known within milliseconds, and who holds a place for long is none."""

UNKNOWN_FOR: Final = 60.0
"""Seconds that a connection may stay unknown, as many as `Config.boot_timeout` has by default. On Linux it stays so
only while a spawn is under way; elsewhere until the worker answers the handshake, which it does once it has booted."""

NOBODY: Final = "no worker is expected"

REPORT_EVERY: Final = 1.0
"""Seconds between two log lines about strangers."""


_log = logging.getLogger("trio_workers.relay")


@attrs.frozen
class _Address:
    """A parsed `SocketFactory.address`: of a Unix socket (`path`), or of TCP (`host`, `port`)."""

    path: str = ""
    host: str = ""
    port: int = 0

    def url(self, port: int) -> str:
        """Return what a worker is told; where we listen on every address it uses the loopback one."""
        if self.path:
            return f"unix://{self.path}"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _parse(address: object, *, beyond_loopback: bool) -> _Address:
    if not isinstance(address, str):
        raise TypeError(f"SocketFactory.address must be a str, not {type(address).__name__}")
    scheme, separator, rest = address.partition("://")
    if separator and scheme == "unix":
        return _Address(path=_parse_path(address, rest))
    if separator and scheme == "tcp":
        host, colon, port = rest.rpartition(":")
        if not colon or not port.isascii() or not port.isdecimal() or int(port) > 65535:
            raise _refused(address, "the port must be a number from 0 (any free one) to 65535")
        bracketed = host.startswith("[") and host.endswith("]")
        numeric = "127.0.0.1" if host == "localhost" else host[1:-1] if bracketed else host
        try:
            parsed = ipaddress.ip_address(numeric)
        except ValueError:
            raise _refused(address, "the host must be a numeric address or localhost") from None
        if (parsed.version == 6) != bracketed:
            raise _refused(address, "an IPv6 address, and nothing else, stands in square brackets")
        if not beyond_loopback and not _identity.is_loopback(numeric):
            raise _refused(address, "others can reach what is no loopback address; beyond_loopback=True allows it")
        return _Address(host=numeric, port=int(port))
    raise _refused(address, "it must begin with tcp:// or unix://")


def _parse_path(address: str, path: str) -> str:
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise _refused(address, "the path must be absolute, as in unix:///run/pool.sock")
    if (why := why_too_long(path)) is not None:
        raise _refused(address, why)
    return path


def _refused(address: str, why: str) -> ValueError:
    return ValueError(f"SocketFactory.address {address!r}: {why}")


def _check_address(factory: "SocketFactory", _: object, value: str) -> None:
    _parse(value, beyond_loopback=factory.beyond_loopback)


@attrs.frozen
class SocketFactory(Factory):
    """Workers that connect to a listener of the pool, whose address they find in `RR_RELAY`.

    `address` is `tcp://127.0.0.1:0` (port 0 is any free one), `tcp://[::1]:0` or `unix:///path`. A connection is
    believed if the kernel says that the worker's process, or another of its group, made it. Any other address than a
    loopback one must be asked for by `beyond_loopback=True`; workers are processes of this machine all the same, and a
    peer on another one is refused. A Unix socket's file is private from birth, replaces only a dead socket, and goes
    away with the pool. The worker's stdin is empty, and its stdout goes to the log with its stderr.

    Raise TypeError or ValueError for an address that is none of these.
    """

    address: str = attrs.field(validator=_check_address)
    beyond_loopback: bool = attrs.field(default=False, kw_only=True, validator=attrs.validators.instance_of(bool))

    @trio.lowlevel.enable_ki_protection
    async def open(self, nursery: trio.Nursery) -> Spawner:
        """Listen. Raise `OSError` where that can't be done: the port is taken (EADDRINUSE), or the path (EEXIST)."""
        await trio.lowlevel.checkpoint()
        parsed = _parse(self.address, beyond_loopback=self.beyond_loopback)
        file: SocketFile | None = None
        if parsed.path:
            listener, file = listen_at_path(parsed.path)
        else:
            (listener,) = await trio.open_tcp_listeners(parsed.port, host=parsed.host)
        spawner = _SocketSpawner(parsed, listener, file)
        try:
            nursery.start_soon(spawner.serve, name=f"<connections to {spawner.url}>")
        except BaseException:
            spawner.close()
            raise
        return spawner


class _Listener(trio.abc.Listener[trio.SocketStream]):
    """Accepts a connection only where there is room to look it up."""

    def __init__(self, listener: trio.SocketListener, room: trio.Semaphore) -> None:
        self._listener = listener
        self._room = room

    async def accept(self) -> trio.SocketStream:
        await self._room.acquire()
        try:
            return await self._listener.accept()
        except BaseException:
            self._room.release()
            raise

    async def aclose(self) -> None:
        await self._listener.aclose()


class _Refused(Exception):
    """This connection is none of a worker's."""


@attrs.define(eq=False)
class _Expected:
    """A spawned process whose connection is awaited, or has been matched and not yet been reaped."""

    launch: Launch
    arrived: trio.Event = attrs.field(factory=trio.Event)
    line: Line | None = None


@attrs.define(eq=False)
class _Visitor:
    """A connection that is not yet matched, as long as its task runs."""

    connection: trio.socket.SocketType
    who: str
    earlier: set[object]
    """Spawns that were under way when it connected: it may be the worker of one of them."""
    scope: trio.CancelScope
    looked_up: bool = False
    group: int | None = None
    """The worker's process group that it belongs to, once the kernel has said so."""


class _SocketSpawner(Spawner):
    def __init__(self, address: _Address, listener: trio.SocketListener, file: SocketFile | None) -> None:
        self._listener = listener
        self._room = trio.Semaphore(LOOKUPS_WAITING)
        self._file = file
        self.url = address.url(0 if file else listener.socket.getsockname()[1])
        self._spawn_limiter = trio.CapacityLimiter(SPAWNS_AT_A_TIME)
        self._lookup_limiter = trio.CapacityLimiter(LOOKUPS_AT_A_TIME)
        self._under_way: dict[object, Launch] = {}
        self._expected: dict[int, _Expected] = {}
        self._visitors: dict[_Visitor, None] = {}
        self._news = trio.Event()
        self._scope = trio.CancelScope(shield=True)  # `close` ends it: till the last worker is gone
        self._serving = False
        self._next_report = -float("inf")
        self._unreported = 0

    # the pool's side

    @trio.lowlevel.enable_ki_protection
    async def spawn(self, launch: Launch) -> WorkerProcess:
        nothing = os.open(os.devnull, os.O_RDONLY)
        this = object()
        self._under_way[this] = launch
        try:
            process = await spawn_process(
                with_relay(launch, self.url), stdin=nothing, stdout=None, limiter=self._spawn_limiter
            )
            self._expected[process.pid] = _Expected(launch)
            process.at_reap(functools.partial(self._forget, process.pid))
            return process
        finally:
            os.close(nothing)
            del self._under_way[this]
            news, self._news = self._news, trio.Event()
            news.set()

    @trio.lowlevel.enable_ki_protection
    async def connect(self, process: WorkerProcess, launch: Launch) -> Line:
        expected = self._expected[process.pid]
        await expected.arrived.wait()
        line, expected.line = expected.line, None
        if line is None:
            raise LineEnded  # the process was reaped meanwhile
        return line

    def _forget(self, pid: int) -> None:
        expected = self._expected.pop(pid)
        if expected.line is not None:
            expected.line.relay.close()
            expected.line = None
        for visitor in self._visitors:
            if visitor.group == pid:
                visitor.scope.cancel()

    def close(self) -> None:
        self._scope.cancel()
        if not self._serving:
            self._stop_listening()
        if self._file is not None:
            self._file.remove()
            self._file = None

    def _stop_listening(self) -> None:
        self._listener.socket.close()

    # the listener's side

    @trio.lowlevel.enable_ki_protection
    async def serve(self) -> None:
        """Take connections, each in a task of its own, until cancelled."""
        self._serving = True
        try:
            with self._scope:
                await trio.serve_listeners(self._welcome, [_Listener(self._listener, self._room)])
        except* OSError:
            # trio goes on after what the network or a lack of descriptors does to accept; this is neither.
            _log.exception("the listener at %s failed: no worker can connect any more", self.url)
        finally:
            self._serving = False
            self.close()

    @trio.lowlevel.enable_ki_protection
    async def _welcome(self, stream: trio.SocketStream) -> None:
        """See a connection through until it is a worker's or refused. An error that left here would end the server."""
        connection = stream.socket
        scope = trio.CancelScope(deadline=trio.current_time() + self._patience())
        visitor = _Visitor(connection, _describe(connection), set(self._under_way), scope)
        try:
            with scope:
                await self._match(visitor)
            if scope.cancelled_caught:
                raise _Refused("it was too slow, gave way to newer ones, or its worker has ended")
        except (_Refused, FrameError) as error:
            self._report(visitor, error)
        except (OSError, LineEnded) as error:
            _log.debug("a connection to %s from %s went away: %r", self.url, visitor.who, error)
        except Exception:
            _log.exception("a connection to %s from %s met a bug of trio_workers", self.url, visitor.who)
        finally:
            self._visitors.pop(visitor, None)
            self._let_next_in(visitor)

    def _let_next_in(self, visitor: _Visitor) -> None:
        if not visitor.looked_up:
            visitor.looked_up = True
            self._room.release()

    def _stay(self, visitor: _Visitor) -> None:
        """Give a visitor a place; where all are taken the oldest makes way, one that is no worker's if there is any."""
        self._visitors[visitor] = None
        if len(self._visitors) > CONNECTIONS_UNKNOWN:
            first = next(iter(self._visitors))
            oldest = next((other for other in self._visitors if other.group is None), first)
            del self._visitors[oldest]
            oldest.scope.cancel()

    async def _match(self, visitor: _Visitor) -> None:
        await self._recognise(visitor)
        if visitor.group is not None:
            launch = self._expected[visitor.group].launch
        else:
            launches = [*(expected.launch for expected in self._expected.values()), *self._under_way.values()]
            if not launches:
                raise _Refused(NOBODY)
            launch = launches[0]  # they differ in nothing that a handshake needs
        line = self._open_line(visitor.connection, launch)
        try:
            await line.shake_hands()
            assert line.peer is not None
            expected = await self._check_claim(visitor, line.peer)
            expected.line = line
            expected.arrived.set()
        except BaseException:
            line.relay.close()
            raise

    async def _recognise(self, visitor: _Visitor) -> None:
        """Wait until the kernel gives the connection to a worker, which sets `visitor.group`, or can't tell."""
        while True:
            groups = self._groups()
            earlier, news = self._still_under_way(visitor), self._news
            if not groups and not earlier:
                raise _Refused(NOBODY)
            verdict = await _identity.group_of(visitor.connection, groups, limiter=self._lookup_limiter)
            self._let_next_in(visitor)
            if isinstance(verdict, int) and verdict in self._groups():  # and not matched or reaped meanwhile
                # Its worker's boot is the deadline from here on: the worker may connect early and answer late.
                visitor.group = verdict
                visitor.scope.deadline = float("inf")
            elif verdict is not Verdict.UNKNOWN and not earlier:
                raise _Refused(Verdict.STRANGER.value)
            self._stay(visitor)
            if visitor.group is not None or verdict is Verdict.UNKNOWN:
                return
            await news.wait()

    async def _check_claim(self, visitor: _Visitor, pid: int) -> _Expected:
        """Return the worker that a claimed pid belongs to, if the kernel says nothing against it."""
        while True:
            groups = self._groups()
            if visitor.group is not None:
                groups &= {visitor.group}
            group = _identity.claimed_group(pid, groups)
            if group is not None:
                return self._expected[group]
            if visitor.group is not None or not self._still_under_way(visitor):
                raise _Refused(f"it claims pid {pid}, which is not that of a worker that is expected there")
            await self._news.wait()

    def _patience(self) -> float:
        """Return for how long a connection may stay unknown: a worker that connects early may answer late."""
        launches = [*(expected.launch for expected in self._expected.values()), *self._under_way.values()]
        return max([UNKNOWN_FOR, *(launch.boot_timeout for launch in launches if launch.boot_timeout > 60)])

    def _groups(self) -> set[int]:
        """Return the process groups of workers that have no connection yet."""
        return {pid for pid, expected in self._expected.items() if not expected.arrived.is_set()}

    def _still_under_way(self, visitor: _Visitor) -> set[object]:
        visitor.earlier &= self._under_way.keys()
        return visitor.earlier

    def _open_line(self, connection: trio.socket.SocketType, launch: Launch) -> Line:
        kind = "unix" if connection.family == socket.AF_UNIX else "tcp"
        fd = connection.detach()  # serve_listeners closes the connection when its handler returns
        try:
            relay = FdRelay(fd, fd, kind=kind, quick_ack=kind == "tcp" and launch.protocol == "goridge-1")
        except BaseException:
            os.close(fd)
            raise
        return Line(relay, Conversation(launch.protocol, launch.max_frame_size))

    def _report(self, visitor: _Visitor, error: Exception) -> None:
        now = trio.current_time()
        if now < self._next_report:
            self._unreported += 1
            return
        more = f" ({self._unreported:,} more refused since the last report)" if self._unreported else ""
        self._next_report = now + REPORT_EVERY
        self._unreported = 0
        _log.warning("refused a connection to %s from %s: %s%s", self.url, visitor.who, error, more)


def _describe(connection: trio.socket.SocketType) -> str:
    try:
        if connection.family == socket.AF_UNIX:
            return f"pid {_platform.HERE.peer_pid(connection) or 'unknown'}"
        host, port = connection.getpeername()[:2]
        return f"{host} port {port}"
    except OSError as error:
        return f"somebody unknown ({error})"
