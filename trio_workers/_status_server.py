"""How the page is served: connections of hypercorn, in a loop of our own.

`hypercorn.trio.serve` sends in a shield and without a limit: one reader that stops reading, a suspended laptop, keeps
the whole program from ending for as long as it likes. And an exception in one connection ends the server, and with it
the nursery that it runs in. Here a send has a deadline and can be cancelled, the number of connections is bounded, and
what a connection trips over is logged.
"""

import ipaddress
import logging
from functools import partial
from typing import Any, Final

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.logging import Logger
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

CONNECTIONS: Final = 256
"""Connections at a time; one more is closed at once. An idle one ends after hypercorn's `keep_alive_timeout`, 5 s."""

SEND_TIMEOUT: Final = 30.0
"""Seconds in which a reader must take what is sent: a page that comes back later connects anew by itself."""

LONGEST: Final = 3600.0
"""Seconds that a connection lasts at most, for not all of hypercorn's end by themselves; a page connects anew."""

PARTING: Final = 5.0
"""Seconds for what is under way when the other side sends no more: what hypercorn makes of an HTTP/2 upgrade would
never end."""

_log: Final = logging.getLogger("trio_workers.status")


class _QuietLogger(Logger):
    """hypercorn tells at INFO of what is no news to anybody."""

    async def info(self, message: str, *args: Any, **kwargs: Any) -> None:
        await self.debug(message, *args, **kwargs)


class _Connection(TCPServer):
    scope: trio.CancelScope

    async def _read_data(self) -> None:
        await super()._read_data()
        self.scope.deadline = min(self.scope.deadline, trio.current_time() + PARTING)

    async def protocol_send(self, event: Event) -> None:
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            try:
                with trio.fail_after(SEND_TIMEOUT):
                    await self.stream.send_all(event.data)
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
                await self.protocol.handle(Closed())  # busy: it is just being closed
            except trio.TooSlowError:
                await trio.aclose_forcefully(self.stream)  # something has been sent, so nothing else can be
                await self.protocol.handle(Closed())


def find_host(bind: object, *, public: bool) -> tuple[str, int]:
    """Take an address apart, and refuse one that is reached from outside where that was not asked for."""
    if not isinstance(bind, str):
        raise TypeError(f"bind must be a string, host:port, not {type(bind).__name__}")
    host, colon, text = bind.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not (text.isascii() and text.isdecimal()) or int(text) > 65535:
        raise ValueError(
            f"bind must be host:port, as in 127.0.0.1:8080 or [::1]:8080 (port 0 takes a free one), not {bind!r}"
        )
    if not public and not is_loopback(host):
        raise ValueError(
            f"{bind!r} can be reached from outside this machine, where everybody could see the labels of jobs and the "
            f"errors of workers; serve it on 127.0.0.1, or say public=True"
        )
    return host, int(text)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine and can't be anything else."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def serve_app(app: Any, host: str, port: int, task_status: "trio.TaskStatus[list[str]]") -> None:
    """Listen, say where, and serve until cancelled."""
    config = Config()
    config.accesslog = None
    config.errorlog = _log
    config.logger_class = _QuietLogger
    config.include_server_header = False
    wrapped = ASGIWrapper(app)
    context = WorkerContext(None)
    open_now = 0

    async def handle(stream: trio.SocketStream) -> None:
        nonlocal open_now
        if open_now >= CONNECTIONS:
            return  # trio closes it
        open_now += 1
        try:
            connection = _Connection(wrapped, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]
            with trio.move_on_after(LONGEST) as connection.scope:
                await connection
        except* Exception:
            _log.exception("a connection to the status page failed")
        finally:
            open_now -= 1

    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise OSError(
            error.errno, f"serve_status can't listen on {where}: {error.strerror or error}; choose another bind"
        ) from error
    urls: list[str] = []
    for listener in listeners:
        address, number, *_ = listener.socket.getsockname()
        urls.append(f"http://[{address}]:{number}" if ":" in address else f"http://{address}:{number}")
    await trio.serve_listeners(handle, listeners, task_status=_Told(task_status, urls))


class _Told:
    """Says the addresses where trio would say its listeners."""

    def __init__(self, task_status: "trio.TaskStatus[list[str]]", urls: list[str]) -> None:
        self._started = partial(task_status.started, urls)

    def started(self, value: object = None) -> None:
        self._started()
