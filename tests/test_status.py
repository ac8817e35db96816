"""The status of a pool over HTTP: what is answered, to whom, and that nobody can do harm."""

import json
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.support import ROOT, until
from trio_workers import (
    Config,
    Payload,
    SpawnError,
    WorkerCrashed,
    _status_app,
    _status_server,
    open_pool,
    open_python_pool,
    serve_status,
    status_app,
)
from trio_workers.child import Job
from trio_workers.testing import BadBoot, Crash, MemoryFactory

TOKEN: Final = "a token that has no spaces".replace(" ", "-")
BEARER: Final = f"Bearer {TOKEN}"


async def answer(job: Job) -> bytes:
    """Do as the body says."""
    if job.body == b"crash":
        raise Crash(3)
    if job.body == b"nap":
        await trio.sleep(2)
    return job.body


def config(**more: object) -> Config:
    """Describe a pool of one worker inside this process."""
    return Config(**{"command": ["none"], "num_workers": 1, "factory": MemoryFactory(answer), **more})  # type: ignore[arg-type]


@attrs.define
class Answer:
    """What came back from a request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def scope_of(method: str, path: str, headers: dict[str, str], server: str = "127.0.0.1") -> dict[str, Any]:
    """An ASGI scope, as hypercorn makes it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.1"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()],
        "client": ("127.0.0.1", 4711),
        "server": (server, 80),
        "state": {},
        "extensions": {},
    }


async def ask(
    app: Any,
    path: str,
    method: str = "GET",
    *,
    host: str | None = "localhost",
    body: bytes = b"",
    server: str = "127.0.0.1",
    **headers: str,
) -> Answer:
    """Ask the application itself, without a server."""
    if host is not None:
        headers["host"] = host
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        await trio.lowlevel.checkpoint()
        if messages:
            return messages.pop()
        return await trio.sleep_forever()

    async def send(message: Any) -> None:
        await trio.lowlevel.checkpoint()
        sent.append(message)

    await app(scope_of(method, path, headers, server), receive, send)
    assert sent[-1].get("more_body", False) is False
    names = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], names, b"".join(message.get("body", b"") for message in sent))


class Listener:
    """A reader of server-sent events that takes them when it is told to."""

    def __init__(self, app: Any, *, eager: bool = True) -> None:
        self.app = app
        self.may_take = trio.Semaphore(0)
        self.eager = eager
        self.chunks: list[tuple[float, bytes]] = []
        self.over = trio.Event()
        self.gone = trio.Event()

    async def run(self) -> None:
        async def receive() -> Any:
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body" and message["body"]:
                if not self.eager:
                    await self.may_take.acquire()
                self.chunks.append((trio.current_time(), message["body"]))
            await trio.lowlevel.checkpoint()

        await self.app(scope_of("GET", "/events", {"host": "localhost"}), receive, send)
        self.over.set()

    def events(self, kind: str = "message") -> list[Any]:
        """The data of all events of a kind up to now."""
        found: list[Any] = []
        for block in b"".join(chunk for _, chunk in self.chunks).decode().split("\n\n"):
            fields = dict(line.partition(": ")[::2] for line in block.splitlines())
            if "data" in fields and fields.get("event", "message") == kind:
                found.append(json.loads(fields["data"]))
        return found


# what is answered


async def test_health_and_readiness(autojump_clock: object) -> None:
    """Alive as long as it answers; ready with all workers busy, and not with a full queue or a closed pool."""
    async with open_pool(config(max_queue=0, name="mill")) as pool:
        app = status_app(pool)
        alive = await ask(app, "/health")
        assert (alive.status, alive.json["alive"], alive.json["pool"]) == (200, True, "mill")
        ready = await ask(app, "/ready")
        assert (ready.status, ready.json) == (200, {"ready": True, "reason": None})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.exec, Payload(b"nap"))
            await until(lambda: pool.statistics().busy == 1)
            full = await ask(app, "/ready")
    assert (full.status, full.json["ready"]) == (503, False)
    assert full.json["reason"] == "the queue is full: 0 callers wait, and max_queue is 0"
    closed = await ask(app, "/ready")
    assert (closed.status, closed.json["reason"]) == (503, "the pool is closed, or about to be")
    assert (await ask(app, "/health")).status == 200
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.exec, Payload(b"nap"))
        await until(lambda: pool.statistics().busy == 1)
        assert (await ask(status_app(pool), "/ready")).status == 200


async def test_not_ready_while_no_worker_boots(autojump_clock: object) -> None:
    """Where no worker comes up any more, the answer says what the last one said."""
    broken = False

    async def boot(slot: int) -> None:
        if broken:
            raise BadBoot("no such model\n")

    async with open_pool(config(factory=MemoryFactory(answer, boot=boot))) as pool:
        app = status_app(pool)
        broken = True
        with pytest.raises(WorkerCrashed):
            await pool.exec(Payload(b"crash"))
        await until(lambda: pool.statistics().failed_in_a_row)
        told = await ask(app, "/ready")
        assert told.status == 503
        assert "there is no worker, and the last" in told.json["reason"]
        assert "the last said: " in told.json["reason"]


async def test_status_says_all(autojump_clock: object) -> None:
    """The pool, its workers, the deaths and whether it is ready, in one document."""
    async with open_pool(config(name="mill")) as pool, trio.open_nursery() as nursery:
        app = status_app(pool)
        with pytest.raises(WorkerCrashed):
            await pool.exec(Payload(b"crash"))
        await until(lambda: pool.statistics().idle == 1)
        nursery.start_soon(partial(pool.exec, Payload(b"nap"), label="half a pair: \ud83d"))
        await until(lambda: pool.statistics().busy == 1)
        told = (await ask(app, "/status")).json
        nursery.cancel_scope.cancel()
    assert told["status"]["pool"] == "mill"
    assert told["status"]["busy"] == 1
    (worker,) = told["workers"]
    assert (worker["slot"], worker["restarts"], worker["job"]["label"]) == (0, 1, "half a pair: \ud83d")
    assert worker["last_death"] == told["deaths"][-1]
    assert "exited with status 3" in told["deaths"][-1]["error"]
    assert told["reason"] is None


async def test_page(autojump_clock: object) -> None:
    """The page comes with a policy that lets in nothing from outside, and with a nonce that is new each time."""
    async with open_pool(config()) as pool:
        app = status_app(pool)
        first, second = [await ask(app, "/") for _ in range(2)]
    assert first.headers["content-type"] == "text/html; charset=utf-8"
    policy = first.headers["content-security-policy"]
    (nonce,) = {part.partition("'nonce-")[2].rstrip("'") for part in policy.split("; ") if "nonce" in part}
    assert first.body.count(f'nonce="{nonce}"'.encode()) == 2
    assert policy != second.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert b'data-control="no"' in first.body
    for outside in (b'src="', b'href="http', b"url(", b"@import", b"innerHTML", b"insertAdjacent", b"Storage"):
        assert outside not in first.body


async def test_headers_are_on_every_answer(autojump_clock: object) -> None:
    """Nothing is stored, sniffed, framed or read by another site: errors too."""
    async with open_pool(config()) as pool:
        app = status_app(pool)
        answers = [
            await ask(app, "/"),
            await ask(app, "/status"),
            await ask(app, "/nothing"),
            await ask(app, "/status", "POST"),
            await ask(app, "/status", host="evil.example"),
        ]
    assert [answer.status for answer in answers] == [200, 200, 404, 405, 421]
    for answer in answers:
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    for answer in answers[2:]:
        assert answer.json["ok"] is False
        assert answer.json["error"]


# who is answered


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "localhost.",
        "127.0.0.1",
        "127.8.9.1:99",
        "[::1]:8080",
        "pool.example",
        "10.0.0.7",
    ],
)
async def test_hosts_that_are_ours(host: str, autojump_clock: object) -> None:
    """Loopback names and addresses, those of `hosts`, and the address that the connection came in on."""
    async with open_pool(config()) as pool:
        app = status_app(pool, hosts=["Pool.Example", "fd00::7"])
        assert (await ask(app, "/status", host=host, server="10.0.0.7")).status == 200
        assert (await ask(app, "/status", host="[fd00::7]")).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example:80", 421),
        ("10.0.0.8", 421),
        ("[fd00::8]", 421),
        ("0.0.0.0", 421),
        ("", 400),
        (None, 400),
        ("localhost:80:80", 400),
        ("user@localhost", 400),
        ("local host", 400),
        ("ünder.example", 400),
        ("[::1", 400),
    ],
)
@pytest.mark.parametrize("path", ["/", "/status", "/events", "/reset"])
async def test_foreign_hosts(host: str | None, status: int, path: str, autojump_clock: object) -> None:
    """A name that was made to lead here is refused, whatever is asked for, and so is a Host that is none."""
    async with open_pool(config()) as pool:
        app = status_app(pool, token=TOKEN)
        told = await ask(app, path, "POST" if path == "/reset" else "GET", host=host, server="10.0.0.7")
    assert told.status == status
    assert told.json["ok"] is False
    if status == 421:
        assert "hosts=[" in told.json["error"]


async def test_two_hosts_are_refused(autojump_clock: object) -> None:
    """Where there are two Host headers, which one counts is anybody's guess."""
    async with open_pool(config()) as pool:
        assert (await ask(status_app(pool), "/status", host="localhost", Host="localhost")).status == 400


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8080", 200),
        ("HTTP://LOCALHOST:8080", 403),
        ("http://localhost", 403),
        ("http://localhost:8081", 403),
        ("http://127.0.0.1:8080", 403),
        ("https://evil.example", 403),
        ("http://localhost:8080.evil.example", 403),
        ("null", 403),
        ("", 403),
        ("file://", 403),
    ],
)
async def test_foreign_origins(origin: str, status: int, autojump_clock: object) -> None:
    """A request that another site's page sent is refused, be it to read or to turn the pool."""
    async with open_pool(config()) as pool:
        app = status_app(pool, token=TOKEN)
        assert (await ask(app, "/status", host="localhost:8080", origin=origin)).status == status
        reset = await ask(app, "/reset", "POST", host="localhost:8080", origin=origin, authorization=BEARER)
        assert reset.status == status


async def test_origin_behind_a_proxy(autojump_clock: object) -> None:
    """A proxy that takes off the encryption leaves the name: the page's own requests go on."""
    async with open_pool(config()) as pool:
        app = status_app(pool, hosts=["pool.example"])
        assert (await ask(app, "/status", host="pool.example", origin="https://pool.example")).status == 200
        assert (await ask(app, "/status", host="pool.example", origin="https://pool.example:444")).status == 403


# turning the pool


async def test_reset_and_resize(autojump_clock: object) -> None:
    """With the token the pool is turned, and the answer comes when it is done."""
    async with open_pool(config()) as pool:
        app = status_app(pool, token=TOKEN)
        pid = pool.workers[0].pid
        done = await ask(app, "/reset", "POST", authorization=BEARER)
        assert (done.status, done.json) == (200, {"ok": True, "done": "reset"})
        assert pool.workers[0].pid != pid
        done = await ask(app, "/resize", "POST", authorization=BEARER, body=b'{"to": 3}')
        assert (done.status, done.json) == (200, {"ok": True, "done": "resize", "to": 3})
        assert len(pool.workers) == 3
        assert b'data-control="yes"' in (await ask(app, "/")).body


async def test_turning_takes_the_token(autojump_clock: object) -> None:
    """Without the token, with another, or where the application gave none, nothing is done."""
    async with open_pool(config()) as pool:
        pid = pool.workers[0].pid
        app = status_app(pool, token=TOKEN)
        for wrong in (
            {},
            {"authorization": f"Bearer {TOKEN}x"},
            {"authorization": f"Basic {TOKEN}"},
            {"authorization": "\xff"},
        ):
            told = await ask(app, "/reset", "POST", **wrong)
            assert told.status == 401
            assert "Authorization: Bearer" in told.json["error"]
            assert told.headers["www-authenticate"] == "Bearer"
        for path in ("/reset", "/resize"):
            told = await ask(status_app(pool), path, "POST", authorization=BEARER, body=b'{"to": 3}')
            assert told.status == 403
            assert "its application gave no token" in told.json["error"]
        assert [worker.pid for worker in pool.workers] == [pid]


@pytest.mark.parametrize("path", ["/reset", "/resize"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
async def test_turning_is_never_a_get(path: str, method: str, autojump_clock: object) -> None:
    """A link or a picture can't turn the pool."""
    async with open_pool(config()) as pool:
        told = await ask(status_app(pool, token=TOKEN), path, method, authorization=BEARER, body=b'{"to": 3}')
        assert told.status == 405
        assert told.headers["allow"] == "POST"
        if method != "HEAD":
            assert told.json["error"] == f"{method} does not go here; POST does"
        assert len(pool.workers) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"3",
        b"{}",
        b'{"to": 0}',
        b'{"to": 1001}',
        b'{"to": true}',
        b'{"to": "3"}',
        b'{"to": 1.5}',
        b"\xff",
        b"[" * 900,
        b" " * 5000,
    ],
)
async def test_resize_to_nonsense(body: bytes, autojump_clock: object) -> None:
    """A body that has no number in it is named as that."""
    async with open_pool(config()) as pool:
        told = await ask(status_app(pool, token=TOKEN), "/resize", "POST", authorization=BEARER, body=body)
        assert (told.status, told.json["error"]) == (
            400, 'the body must be JSON with a number of workers from 1 to 1000: {"to": 4}',
        )  # fmt: skip


async def test_turning_that_fails(autojump_clock: object) -> None:
    """Workers that don't boot, and a pool that is closed, are told with their reason."""
    broken = False

    async def boot(slot: int) -> None:
        if broken:
            raise BadBoot("no such model\n")

    async with open_pool(config(factory=MemoryFactory(answer, boot=boot))) as pool:
        app = status_app(pool, token=TOKEN)
        broken = True
        told = await ask(app, "/resize", "POST", authorization=BEARER, body=b'{"to": 2}')
        assert told.status == 409
        assert "no such model" in told.json["error"]
        with pytest.raises(SpawnError):
            await pool.resize(2)
    told = await ask(app, "/reset", "POST", authorization=BEARER)
    assert (told.status, told.json["error"]) == (409, "the pool is closed, or about to be")


# events


async def test_events_at_each_change(autojump_clock: object) -> None:
    """The state at once, again as a job begins and ends, a death with its words; nothing while nothing happens."""
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        listener = Listener(status_app(pool))
        nursery.start_soon(listener.run)
        await trio.sleep(5)
        assert len(listener.events()) == 1
        assert listener.events("deaths") == [[]]
        await pool.exec(Payload(b"nap"), label="a nap")
        await trio.sleep(1)
        first, busy, *_, idle = listener.events()
        assert first["workers"][0]["job"] is None
        assert busy["workers"][0]["job"]["label"] == "a nap"
        assert (idle["workers"][0]["job"], idle["status"]["jobs"]) == (None, {"replied": 1})
        with pytest.raises(WorkerCrashed):
            await pool.exec(Payload(b"crash"))
        await trio.sleep(1)
        last = listener.events()[-1]
        assert (last["workers"][0]["restarts"], last["workers"][0]["last_death"]["reason"]) == (1, "crashed")
        assert "exited with status 3" in listener.events("deaths")[-1][0]["error"]
        assert not listener.over.is_set()
        nursery.cancel_scope.cancel()


async def test_events_keep_the_connection(autojump_clock: object) -> None:
    """Where nothing changes a comment is sent every fifteen seconds."""
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        listener = Listener(status_app(pool))
        nursery.start_soon(listener.run)
        await trio.sleep(60.5)
        nursery.cancel_scope.cancel()
    times = [time for time, chunk in listener.chunks if chunk.startswith(b":")]
    assert len(times) in (3, 4)
    assert all(15 <= later - earlier < 15.5 for earlier, later in pairwise(times))


async def test_events_come_four_times_a_second_at_most(autojump_clock: object) -> None:
    """However many jobs there are, a listener gets no more than that, and the last state is the true one."""
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        listeners = [Listener(status_app(pool)) for _ in range(2)]
        for listener in listeners:
            nursery.start_soon(listener.run)
        for _ in range(200):
            await pool.exec(Payload(b"quick"))
            await trio.sleep(0.02)
        await trio.sleep(0.6)
        nursery.cancel_scope.cancel()
    for listener in listeners:
        assert 10 <= len(listener.chunks) <= 20
        assert listener.events()[-1]["status"]["jobs"] == {"replied": 200}


async def test_a_slow_reader_gets_the_latest_state(autojump_clock: object) -> None:
    """Nothing is stored for one that does not read: the next thing it gets after that is how it is now."""
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        listener = Listener(status_app(pool), eager=False)
        nursery.start_soon(listener.run)
        listener.may_take.release()
        await trio.sleep(1)
        for _ in range(100):
            await pool.exec(Payload(b"quick"))
            await trio.sleep(0.3)
        listener.may_take.release()
        listener.may_take.release()
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    # One that had been made when it stopped to read, and the one after.
    assert [sum(state["status"]["jobs"].values()) for state in listener.events()] in ([0, 0, 100], [0, 1, 100])


async def test_events_end_with_the_pool(autojump_clock: object) -> None:
    """The last state says that it is closed, and the connection ends; a new one is told the same."""
    async with trio.open_nursery() as nursery:
        async with open_pool(config()) as pool:
            app = status_app(pool)
            listener = Listener(app)
            nursery.start_soon(listener.run)
            await trio.sleep(1)
        await listener.over.wait()
        later = Listener(app)
        await later.run()
    for one in (listener, later):
        assert one.events()[-1]["status"]["closed"] is True
        assert one.events("closed") == [{}]


async def test_a_listener_that_goes(autojump_clock: object) -> None:
    """One that goes is noticed, nothing more is sent to it, and its place is free."""
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        app = status_app(pool)
        listener = Listener(app)
        nursery.start_soon(listener.run)
        await trio.sleep(1)
        listener.gone.set()
        await listener.over.wait()
        assert len(listener.chunks) == 1


async def test_listeners_are_bounded(autojump_clock: object) -> None:
    """The 65th listener is told to come back; when one has gone there is room again."""
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        app = status_app(pool)
        listeners = [Listener(app) for _ in range(_status_app.LISTENERS)]
        for listener in listeners:
            nursery.start_soon(listener.run)
        await trio.sleep(1)
        told = await ask(app, "/events")
        assert (told.status, told.headers["retry-after"]) == (503, "10")
        assert "64 pages listen already" in told.json["error"]
        listeners[0].gone.set()
        await listeners[0].over.wait()
        one_more = Listener(app)
        nursery.start_soon(one_more.run)
        await trio.sleep(1)
        assert one_more.events()
        nursery.cancel_scope.cancel()


async def test_head_of_events(autojump_clock: object) -> None:
    """HEAD gets the headers, and does not listen."""
    async with open_pool(config()) as pool:
        told = await ask(status_app(pool), "/events", "HEAD")
        assert (told.status, told.body) == (200, b"")
        assert told.headers["content-type"].startswith("text/event-stream")


# mounted


async def test_mounted(autojump_clock: object) -> None:
    """Under a path of another application it is the same, and the page asks for what is beside it."""
    async with open_pool(config()) as pool:
        app = Starlette(routes=[Mount("/pools/mill", app=status_app(pool))])
        assert (await ask(app, "/pools/mill/ready")).status == 200
        page = await ask(app, "/pools/mill/")
        assert b'EventSource("events")' in page.body
        led = await ask(app, "/pools/mill")
        assert (led.status, led.headers["location"]) == (307, "http://localhost/pools/mill/")
        assert (await ask(app, "/pools/mill/status", host="evil.example")).status == 421


# wrong arguments


async def test_wrong_arguments(autojump_clock: object) -> None:
    """What can't be right is named at once."""
    async with open_pool(config()) as pool:
        with pytest.raises(TypeError, match="pool must be a Pool or a PythonPool, not int"):
            status_app(3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="token must be a string or None, not bytes"):
            status_app(pool, token=b"secret")  # type: ignore[arg-type]
        for token in ("", "short", "a token with spaces in it", "a-töken-of-enough-characters"):
            with pytest.raises(ValueError, match=r"at least 16 characters.+secrets\.token_urlsafe"):
                status_app(pool, token=token)
        with pytest.raises(TypeError, match=r"hosts must be several names.+hosts=\['pool.example'\]"):
            status_app(pool, hosts="pool.example")
        with pytest.raises(TypeError, match=r"hosts must be several names.+hosts=\['pool.example'\]"):
            await serve_status(pool, hosts="pool.example")
        with pytest.raises(TypeError, match="hosts must be strings, not int"):
            status_app(pool, hosts=[3])  # type: ignore[list-item]
        for host in ("pool.example:80", "http://pool.example", "", "*"):
            with pytest.raises(ValueError, match="without a port"):
                status_app(pool, hosts=[host])


@pytest.mark.parametrize(
    "bind", ["", "8080", "localhost", "localhost:", ":80", "localhost:http", "::1:80", "[::1]", "a:70000"]
)
async def test_wrong_binds(bind: str, autojump_clock: object) -> None:
    """What is no address is named, with one that is."""
    async with open_pool(config()) as pool:
        with pytest.raises(ValueError, match=r"bind must be host:port, as in 127\.0\.0\.1:8080"):
            await serve_status(pool, bind)
        with pytest.raises(TypeError, match="bind must be a string"):
            await serve_status(pool, 80)  # type: ignore[arg-type]


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "[::]:0", "10.0.0.7:0", "pool.example:0", "127.0.0.1.example:0"])
async def test_loopback_only(bind: str, autojump_clock: object) -> None:
    """Nobody shows a pool to the world by mistake."""
    async with open_pool(config()) as pool:
        with pytest.raises(ValueError, match=r"can be reached from outside this machine.+public=True"):
            await serve_status(pool, bind)


@pytest.mark.parametrize("missing", ["starlette", "hypercorn"])
def test_without_the_extra(missing: str) -> None:
    """The names can be imported, `import *` included; whoever uses them is told in one sentence what is missing."""
    program = f"""
import sys
sys.modules[{missing!r}] = None
import trio
from trio_workers import *
from trio_workers.testing import MemoryFactory

async def main():
    async def answer(job): ...
    async with open_pool(Config(command=["none"], num_workers=1, factory=MemoryFactory(answer))) as pool:
        for use in (serve_status, status_app):
            try:
                done = use(pool)
                if use is serve_status:
                    await done
            except ModuleNotFoundError as error:
                print(error)
            else:
                print("done")

trio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT)},
    )
    served, made = done.stdout.splitlines()
    sentence = f"the status page needs {missing}, which comes with: pip install 'trio_workers[status]'"
    assert served == sentence, done.stderr
    assert made == ("done" if missing == "hypercorn" else sentence)
    assert done.stderr == ""


# over the wire


class Wire:
    """A plain HTTP client over a socket, that does only what it is told."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.data = b""

    async def until(self, mark: bytes) -> bytes:
        """Read until the mark has come, and return what came up to it."""
        while mark not in self.data:
            part = await self.stream.receive_some(65536)
            if not part:
                raise EOFError(self.data)
            self.data += part
        before, _, self.data = self.data.partition(mark)
        return before

    async def ask(self, path: str, method: str = "GET", host: str = "localhost") -> Answer:
        await self.stream.send_all(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        first, *lines = (await self.until(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = b""
        if method != "HEAD" and (length := int(headers.get("content-length", 0))):
            while len(self.data) < length:
                self.data += await self.stream.receive_some(65536)
            body, self.data = self.data[:length], self.data[length:]
        return Answer(int(first.split()[1]), headers, body)


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@asynccontextmanager
async def dialled(url: str) -> AsyncIterator[Wire]:
    """Connect to where a pool is served."""
    async with await trio.open_tcp_stream("127.0.0.1", port_of(url)) as stream:
        yield Wire(stream)


async def test_served(caplog: pytest.LogCaptureFixture) -> None:
    """The address comes back from `nursery.start`, it answers there, and nothing is said in the log at INFO."""
    caplog.set_level(logging.INFO)
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        (url,) = await nursery.start(serve_status, pool)
        assert url.startswith("http://127.0.0.1:")
        async with dialled(url) as wire:
            told = await wire.ask("/status")
            assert (told.status, told.json["status"]["idle"]) == (200, 1)
            assert "server" not in told.headers
            assert (await wire.ask("/status", host="evil.example")).status == 421
            assert (await wire.ask("/reset")).status == 405
        nursery.cancel_scope.cancel()
    assert caplog.records == []


async def test_served_to_functions_and_by_name() -> None:
    """A pool of functions is shown too; a host with two addresses has two."""
    async with open_python_pool(1) as pool, trio.open_nursery() as nursery:
        urls = await nursery.start(serve_status, pool, "localhost:0")
        assert {url.rpartition(":")[0] for url in urls} <= {"http://127.0.0.1", "http://[::1]"}
        async with dialled(next(url for url in urls if "127" in url)) as wire:
            assert (await wire.ask("/status")).json["workers"][0]["pid"] == pool.workers[0].pid
        nursery.cancel_scope.cancel()


async def test_served_in_public() -> None:
    """Where that was asked for it listens on all addresses, and answers under the one that was connected to."""
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        (url,) = await nursery.start(partial(serve_status, pool, "0.0.0.0:0", public=True))
        async with dialled(url) as wire:
            assert (await wire.ask("/ready", host="127.0.0.1")).status == 200
            assert (await wire.ask("/ready", host="10.11.12.13")).status == 421
        nursery.cancel_scope.cancel()


async def test_address_in_use() -> None:
    """One error that says where it could not listen; and the pool goes on."""
    async with open_pool(config()) as pool:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            bind = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(OSError, match=f"serve_status can't listen on {bind}: .+; choose another bind"):
                await serve_status(pool, bind)
        await pool.exec(Payload(b"on"))


async def test_name_that_leads_nowhere() -> None:
    """A host that can't be found is the same kind of error."""
    async with open_pool(config()) as pool:
        with pytest.raises(OSError, match=r"serve_status can't listen on pool\.invalid:0: .+; choose another bind"):
            await serve_status(pool, "pool.invalid:0", public=True)


async def test_cancel_ends_it_at_once_though_readers_do_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that takes nothing, and one that idles, hold nobody up: that needs a loop of our own."""
    # Events that no buffer of the kernel has room for.
    look = _status_app._Feed.look

    def large(feed: Any) -> None:
        look(feed)
        if len(feed.text) < 30 << 20:
            feed.text += b" " * (30 << 20)

    monkeypatch.setattr(_status_app._Feed, "look", large)
    async with open_pool(config()) as pool, trio.open_nursery() as outer:
        async with trio.open_nursery() as nursery:
            (url,) = await nursery.start(serve_status, pool)
            listener = await trio.open_tcp_stream("127.0.0.1", port_of(url))
            outer.start_soon(sleep_with, listener)
            await listener.send_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await listener.receive_some(100)
            idle = await trio.open_tcp_stream("127.0.0.1", port_of(url))
            outer.start_soon(sleep_with, idle)
            async with dialled(url) as wire:
                assert (await wire.ask("/ready")).status == 200
            nursery.cancel_scope.cancel()
        await pool.exec(Payload(b"on"))
        outer.cancel_scope.cancel()


async def send_and_read(url: str, data: bytes) -> None:
    """Send it, say that there is no more, and read until the other side has had enough."""
    async with await trio.open_tcp_stream("127.0.0.1", port_of(url)) as stream:
        try:
            await stream.send_all(data)
            await stream.send_eof()
            async for _ in stream:
                pass
        except trio.BrokenResourceError:
            pass  # it hung up on us


async def sleep_with(stream: trio.SocketStream) -> None:
    async with stream:
        await trio.sleep_forever()


async def test_a_reader_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while its connection is closed, and its place as a listener is free."""
    monkeypatch.setattr(_status_server, "SEND_TIMEOUT", 0.05)
    monkeypatch.setattr(_status_app, "LISTENERS", 1)
    look = _status_app._Feed.look

    def large(feed: Any) -> None:
        look(feed)
        if len(feed.text) < 30 << 20:
            feed.text += b" " * (30 << 20)

    monkeypatch.setattr(_status_app._Feed, "look", large)
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        (url,) = await nursery.start(serve_status, pool)
        async with await trio.open_tcp_stream("127.0.0.1", port_of(url)) as stream, dialled(url) as wire:
            await stream.send_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await stream.receive_some(100)
            status = 503
            while status == 503:
                told = await wire.ask("/events", "HEAD")
                status = told.status
                await trio.sleep(0.01)
            assert status == 200
        nursery.cancel_scope.cancel()


async def test_what_comes_in_can_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nonsense, half requests, resets and two hundred idle connections: the pool and the page go on."""
    monkeypatch.setattr(_status_server, "PARTING", 0.5)
    nonsense = [
        b"\0\1\2\3\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000,
        b"POST /resize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf",
        b"GET /%ff%fe/../.. HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://localhost/status HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: !!\r\n\r\n",
    ]
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        (url,) = await nursery.start(partial(serve_status, pool, token=TOKEN))
        async with trio.open_nursery() as crowd:
            for data in nonsense * 5:
                crowd.start_soon(send_and_read, url, data)
        async with trio.open_nursery() as crowd:
            for _ in range(200):
                crowd.start_soon(sleep_with, await trio.open_tcp_stream("127.0.0.1", port_of(url)))
            async with dialled(url) as wire:
                assert (await wire.ask("/ready")).status == 200
            crowd.cancel_scope.cancel()
        await pool.exec(Payload(b"on"))
        nursery.cancel_scope.cancel()


async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is closed at once."""
    monkeypatch.setattr(_status_server, "CONNECTIONS", 1)
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        (url,) = await nursery.start(serve_status, pool)
        async with dialled(url) as first:
            assert (await first.ask("/ready")).status == 200
            async with dialled(url) as second:
                with pytest.raises((EOFError, trio.BrokenResourceError)):
                    await second.ask("/ready")
        nursery.cancel_scope.cancel()


async def test_events_over_the_wire() -> None:
    """A job is seen to begin and to end by one who listens; when the pool closes the response ends."""
    async with trio.open_nursery() as nursery:
        async with open_pool(config()) as pool:
            (url,) = await nursery.start(serve_status, pool)
            stream = await trio.open_tcp_stream("127.0.0.1", port_of(url))
            wire = Wire(stream)
            await stream.send_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await wire.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            await wire.until(b'"jobs": {}')
            await pool.exec(Payload(b"one"))
            await wire.until(b'"jobs": {"replied": 1}')
        await wire.until(b"event: closed")
        await wire.until(b"0\r\n\r\n")
        await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_an_error_of_ours_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in an answer is a 500 and a record with its traceback; the server goes on."""

    def fall(pool: object) -> None:
        raise RuntimeError("fell")

    monkeypatch.setattr(_status_app, "why_not_ready", fall)
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        (url,) = await nursery.start(serve_status, pool)
        async with dialled(url) as wire:
            assert (await wire.ask("/ready")).status == 500
        async with dialled(url) as wire:
            assert (await wire.ask("/health")).status == 200
        nursery.cancel_scope.cancel()
    assert "RuntimeError: fell" in caplog.text
    assert {record.name for record in caplog.records} == {"trio_workers.status"}


async def test_a_body_that_does_not_come(autojump_clock: object) -> None:
    """Who sends the half of a request is not waited for, and who goes before is no error."""

    async def ask_in_part(*messages: dict[str, object]) -> list[Any]:
        left = list(messages)
        sent: list[Any] = []

        async def receive() -> Any:
            return left.pop(0) if left else await trio.sleep_forever()

        async def send(message: Any) -> None:
            sent.append(message)

        await app(
            scope_of("POST", "/resize", {"host": "localhost", "authorization": BEARER}, "127.0.0.1"), receive, send
        )
        return sent

    async with open_pool(config()) as pool:
        app = status_app(pool, token=TOKEN)
        part = {"type": "http.request", "body": b'{"to"', "more_body": True}
        assert (await ask_in_part(part))[0]["status"] == 400
        assert (await ask_in_part(part, {"type": "http.disconnect"}))[0]["status"] == 400


# metrics


async def test_metrics_without_the_extra(monkeypatch: pytest.MonkeyPatch, autojump_clock: object) -> None:
    """Where prometheus_client is not there, the answer names the extra."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "prometheus_client"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "trio_workers.metrics", raising=False)
    async with open_pool(config()) as pool:
        told = await ask(status_app(pool), "/metrics")
    assert told.status == 501
    assert told.json["error"].endswith("which comes with: pip install 'trio_workers[metrics]'")


async def test_metrics(autojump_clock: object) -> None:
    """Prometheus' own parser reads them, in both formats that are asked for; a second scrape counts on."""
    async with open_pool(config(name="mill")) as pool:
        app = status_app(pool)
        for count in (1, 2):
            await pool.exec(Payload(b"one"))
            told = await ask(app, "/metrics")
            assert told.status == 200
            samples = {
                (sample.name, *sorted(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(told.body.decode())
                for sample in family.samples
            }
            assert samples["trio_workers_jobs_total", ("outcome", "replied"), ("pool", "mill")] == count
        told = await ask(app, "/metrics", accept="application/openmetrics-text; version=1.0.0")
        assert told.headers["content-type"].startswith("application/openmetrics-text")
        assert told.body.endswith(b"# EOF\n")


# the wheel


def test_the_page_is_in_the_wheel(tmp_path: Path) -> None:
    """The page is beside the module, where a build packs it."""
    page = Path(_status_app.__file__).with_name("_status_page.html")
    assert page.is_file()
    assert 'packages = ["trio_workers"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
