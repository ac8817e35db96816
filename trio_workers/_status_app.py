"""The application behind `status_app`: routes, the guard in front of them, and the feed of server-sent events.

The feed has no task of its own: an application that is mounted somewhere has no nursery. Each listener looks four times
a second, and all listeners share what the first of them has seen, so that 64 cost little more than one, and none
nothing.
"""

import hmac
import ipaddress
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from pathlib import Path
from string import Template
from typing import Any, Final

import trio
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ._control_protocol import MOST_WORKERS
from ._errors import WorkersError
from ._watch import AnyPool, describe_pool, describe_workers, watch_pool, why_not_ready

LISTENERS: Final = 64
"""Pages that may listen at a time."""

SPACING: Final = 0.25
"""Seconds between two looks of a listener, and so between two events."""

SHARE: Final = 20
"""A look that takes long is followed by a pause of so many times that: at most a twentieth of the pool's thread."""

SILENCE: Final = 15.0
"""Seconds after which a comment is sent where nothing happens, so that proxies keep the connection."""

READ_EVERY: Final = 1.0
"""Seconds between two readings of memory and processor time where nothing else changes."""

MOST_BODY: Final = 1024
"""Bytes of a request's body: {"to": 4} has nine."""

BODY_TIMEOUT: Final = 10.0
"""Seconds in which it must have come."""

SHORTEST_TOKEN: Final = 16

HOST: Final = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::([0-9]{1,5}))?")

CLOSED_POLICY: Final = "default-src 'none'; frame-ancestors 'none'"
PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(pool: AnyPool, token: object, hosts: Iterable[object]) -> Starlette:
    """Make the application, of values that are checked here."""
    status = _Status(pool, _check_token(token))
    return Starlette(
        routes=[
            Route("/", status.page),
            Route("/health", status.health),
            Route("/ready", status.ready),
            Route("/status", status.status),
            Route("/events", status.events),
            Route("/metrics", status.metrics),
            Route("/reset", status.reset, methods=["POST"]),
            Route("/resize", status.resize, methods=["POST"]),
        ],
        middleware=[Middleware(_Guard, hosts=_check_hosts(hosts))],
        exception_handlers={HTTPException: _tell_error},
    )


def _check_token(token: object) -> str | None:
    if token is None:
        return None
    if not isinstance(token, str):
        raise TypeError(f"token must be a string or None, not {type(token).__name__}")
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"token must have at least {SHORTEST_TOKEN} characters, all of ASCII and none of them a space; "
            "secrets.token_urlsafe() makes one"
        )
    return token


def _check_hosts(hosts: Iterable[object]) -> frozenset[str]:
    if isinstance(hosts, str):
        raise TypeError(f"hosts must be several names, as a list or a tuple: hosts=[{hosts!r}]")
    names: set[str] = set()
    for host in hosts:
        if not isinstance(host, str):
            raise TypeError(f"hosts must be strings, not {type(host).__name__}")
        if _read_address(host) is None and (_split_host(host) or ("", "port"))[1]:
            raise ValueError(f"each of hosts must be a name or an address without a port, not {host!r}")
        names.add(host.lower().strip("[]").removesuffix("."))
    return frozenset(names)


class _Json(Response):
    """JSON in ASCII: a label may hold half of a surrogate pair, which UTF-8 can't."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def _refuse(status: int, text: str, headers: Mapping[str, str] | None = None) -> _Json:
    return _Json({"ok": False, "error": text}, status, headers)


async def _tell_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {
        404: "there is nothing here; there are /, /status, /events, /health, /ready and /metrics",
        405: f"{request.method} does not go here; {(error.headers or {}).get('Allow', 'another method')} does",
    }
    return _refuse(error.status_code, texts.get(error.status_code, error.detail), error.headers)


class _Guard:
    """Lets in who came by a name of ours and from no other site's page, and puts the headers on every answer.

    Without it any page in a browser on this machine could read the status: by a name of its own that it lets lead to
    127.0.0.1 (DNS rebinding, which the Host header gives away), or by sending from where it is (the Origin header).
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("content-security-policy", CLOSED_POLICY)
            await send(message)

        app = self._judge(scope) or self._app
        await app(scope, receive, send_with_headers)

    def _judge(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        given = headers.getlist("host")
        host = _split_host(given[0]) if len(given) == 1 else None
        if host is None:
            return _refuse(400, "the request must have one Host header, a name or an address")
        if not self._is_ours(host[0], scope):
            return _refuse(
                421,
                f"this is not {host[0]}: a page is refused that was reached by an unknown name; where the name is "
                f"right, the application says so: hosts=[{host[0]!r}]",
            )
        for origin in headers.getlist("origin"):
            scheme, found, rest = origin.partition("://")
            there = _split_host(rest)
            port = {"http": "80", "https": "443"}.get(scheme)
            if not found or port is None or there is None or (there[0], there[1] or port) != (host[0], host[1] or port):
                return _refuse(403, "this is for its own page alone, and the request comes from another site's")
        return None

    def _is_ours(self, name: str, scope: Scope) -> bool:
        if name == "localhost" or name in self._hosts:
            return True
        address = _read_address(name)
        if address is None:
            return False
        # The address that was connected to: no name led here, so none can have been made to.
        server = scope.get("server")
        return address.is_loopback or (server is not None and address == _read_address(str(server[0])))


def _read_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _split_host(text: str) -> tuple[str, str] | None:
    """Take a Host header apart: the name, or the address without its brackets, and the port where there is one."""
    found = HOST.fullmatch(text.lower())
    if found is None:
        return None
    address, name, port = found.groups(default="")
    return address or name.removesuffix("."), port


class _Feed:
    """What a pool looks like, as text, made anew only where something has changed."""

    def __init__(self, pool: AnyPool) -> None:
        self._pool = pool
        self._watch = watch_pool(pool)
        self._pulse: object = None
        self._seen: object = None
        self._read_at = -READ_EVERY
        self._deaths_at: int | None = None
        self.listeners = 0
        self.spacing = SPACING
        self.version = 0
        """Counts what `text` has been."""
        self.text = b""
        self.deaths_version = 0
        self.deaths = b""
        self.closed = False

    def look(self) -> None:
        """Look at the pool, unless somebody has a moment ago."""
        now = trio.current_time()
        if now - self._read_at < self.spacing * 0.8:
            return
        seen = self._pool.statistics()
        pulse = (
            seen.target, seen.idle, seen.busy, seen.starting, seen.leased, seen.stopping, seen.waiting,
            seen.accepting, seen.closed, seen.starts, seen.failed_starts, sum(seen.jobs.values()), self._watch.events,
        )  # fmt: skip
        if pulse == self._pulse and now - self._read_at < READ_EVERY:
            return
        self._pulse, self._read_at, self.closed = pulse, now, seen.closed
        status, workers, reason = describe_pool(self._pool), describe_workers(self._pool), why_not_ready(self._pool)
        for worker in workers:
            if worker["last_death"] is not None:  # the words are among the deaths, which come once
                worker["last_death"] = {**worker["last_death"], "error": None}
        still = json.dumps(
            [
                {**status, "at": 0},
                [{**worker, "uptime": 0, "job": worker["job"] and worker["job"]["label"]} for worker in workers],
                reason,
            ]
        )
        if still != self._seen:
            self._seen = still
            self.version += 1
            self.text = json.dumps({"status": status, "workers": workers, "reason": reason}).encode()
        if self._watch.events != self._deaths_at:
            self._deaths_at = self._watch.events
            self.deaths_version += 1
            self.deaths = json.dumps(list(self._watch.deaths)).encode()
        self.spacing = max(SPACING, SHARE * (trio.current_time() - now))


class _Events(Response):
    """Server-sent events, until the reader goes or the pool is closed.

    The next state is made when the last one is sent: a slow reader has nothing in store, and sees fewer states.
    """

    def __init__(self, feed: _Feed) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if scope["method"] != "HEAD":
            self._feed.listeners += 1
            try:
                async with trio.open_nursery() as nursery:
                    watch = trio.CancelScope()
                    nursery.start_soon(_until_gone, receive, watch, nursery.cancel_scope)
                    await self._tell(send)
                    watch.cancel()
            finally:
                self._feed.listeners -= 1
            if nursery.cancel_scope.cancelled_caught:
                return  # nobody is there
        await send({"type": "http.response.body", "body": b""})

    async def _tell(self, send: Send) -> None:
        feed = self._feed
        told = told_deaths = 0
        said_at = trio.current_time()
        text = b"retry: 2000\n\n"
        while True:
            feed.look()
            if told != feed.version:
                told = feed.version
                text += b"data: " + feed.text + b"\n\n"
            if told_deaths != feed.deaths_version:
                told_deaths = feed.deaths_version
                text += b"event: deaths\ndata: " + feed.deaths + b"\n\n"
            if feed.closed:
                text += b"event: closed\ndata: {}\n\n"
            now = trio.current_time()
            if not text and now - said_at >= SILENCE:
                text = b": nothing has changed\n\n"
            if text:
                said_at = now
                await send({"type": "http.response.body", "body": text, "more_body": True})
                text = b""
            if feed.closed:
                return
            await trio.sleep(feed.spacing)


async def _until_gone(receive: Receive, watch: trio.CancelScope, scope: trio.CancelScope) -> None:
    with watch:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()


class _Status:
    """What the routes answer."""

    def __init__(self, pool: AnyPool, token: str | None) -> None:
        self._pool = pool
        self._token = token
        self._feed = _Feed(pool)
        self._registry: Any = None
        self._page = Template(Path(__file__).with_name("_status_page.html").read_text(encoding="utf-8"))

    async def page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        text = self._page.substitute(nonce=nonce, control="no" if self._token is None else "yes")
        headers = {"content-security-policy": PAGE_POLICY.format(nonce)}
        return Response(text, headers=headers, media_type="text/html")

    async def health(self, request: Request) -> Response:
        fact = describe_pool(self._pool)
        return _Json({"alive": True, "pool": fact["pool"], "pid": fact["pid"], "at": fact["at"]})

    async def ready(self, request: Request) -> Response:
        reason = why_not_ready(self._pool)
        return _Json({"ready": reason is None, "reason": reason}, 200 if reason is None else 503)

    async def status(self, request: Request) -> Response:
        return _Json(
            {
                "status": describe_pool(self._pool),
                "workers": describe_workers(self._pool),
                "deaths": list(watch_pool(self._pool).deaths),
                "reason": why_not_ready(self._pool),
            }
        )

    async def events(self, request: Request) -> Response:
        if self._feed.listeners >= LISTENERS:
            return _refuse(503, f"{LISTENERS} pages listen already; close one, or ask /status", {"retry-after": "10"})
        return _Events(self._feed)

    async def metrics(self, request: Request) -> Response:
        try:
            from .metrics import PoolCollector
        except ModuleNotFoundError as error:
            return _refuse(501, str(error))  # it names the extra
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder

        if self._registry is None:  # made when it is first asked for: keeping durations costs each job a little
            self._registry = CollectorRegistry()
            self._registry.register(PoolCollector(self._pool))
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), media_type=media_type)

    async def reset(self, request: Request) -> Response:
        return self._refuse_control(request) or await _carry_out(self._pool.reset, {"done": "reset"})

    async def resize(self, request: Request) -> Response:
        refused = self._refuse_control(request)
        if refused is not None:
            return refused
        to = await _read_number(request)
        if to is None:
            return _refuse(400, f'the body must be JSON with a number of workers from 1 to {MOST_WORKERS}: {{"to": 4}}')

        async def resize() -> None:
            await self._pool.resize(to)

        return await _carry_out(resize, {"done": "resize", "to": to})

    def _refuse_control(self, request: Request) -> Response | None:
        if self._token is None:
            return _refuse(403, "this only shows the pool: its application gave no token with which it can be turned")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token.encode()):
            text = "this takes the token of the application, in a header: Authorization: Bearer <token>"
            return _refuse(401, text, {"www-authenticate": "Bearer"})
        return None


async def _carry_out(change: Callable[[], Awaitable[None]], done: dict[str, object]) -> Response:
    try:
        await change()
    except trio.ClosedResourceError:
        return _refuse(409, "the pool is closed, or about to be")
    except (WorkersError, OSError, ValueError) as error:
        return _refuse(409, "\n".join([str(error), *getattr(error, "__notes__", [])]))  # the notes have its stderr
    return _Json({"ok": True, **done})


async def _read_number(request: Request) -> int | None:
    body = b""
    try:
        with trio.fail_after(BODY_TIMEOUT):
            async with aclosing(request.stream()) as parts:
                async for part in parts:
                    body += part
                    if len(body) > MOST_BODY:
                        return None
    except (ClientDisconnect, trio.TooSlowError):
        return None
    try:
        to = json.loads(body)["to"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return to if type(to) is int and 1 <= to <= MOST_WORKERS else None
