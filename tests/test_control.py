"""The control socket: who may come in, what is asked and answered, and what hostile clients can't do."""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

import trio_workers.control
from tests.support import ROOT, release, until
from trio_workers import (
    Config,
    Payload,
    Pool,
    WorkerCrashed,
    _control_place,
    _control_server,
    _platform,
    open_pool,
    open_python_pool,
    serve_control,
)
from trio_workers._control_protocol import (
    LONGEST_REQUEST,
    MOST_WORKERS,
    BadRequest,
    LineBuffer,
    LineTooLong,
    Request,
    decode_answer,
    encode_request,
    parse_request,
)
from trio_workers._platform import Linux, Portable
from trio_workers._socket_file import Pulse, knock
from trio_workers._watch import PoolFact, WorkerFact, watch_pool
from trio_workers.child import Job
from trio_workers.control import ControlClient, connect, find_sockets
from trio_workers.testing import BadBoot, Crash, MemoryFactory

NOBODY: Final = 65534
"""A second user, of whom there is one on every machine."""


class Mill:
    """A pool within this process whose jobs and boots wait for the test."""

    def __init__(self) -> None:
        self.go = trio.Event()
        self.broken = False
        self.held: trio.Event | None = None
        """Boots wait for it."""

    async def answer(self, job: Job) -> bytes:
        """Do as the body says."""
        if job.body == b"crash":
            raise Crash(3)
        if job.body == b"wait":
            await self.go.wait()
        return job.body

    async def boot(self, slot: int) -> None:
        """Boot, or not."""
        if self.held is not None:
            await self.held.wait()
        if self.broken:
            raise BadBoot("no such model")

    def config(self, **more: Any) -> Config:
        """Describe the pool."""
        factory = MemoryFactory(self.answer, boot=self.boot)
        return Config(**{"command": ["none"], "num_workers": 2, "factory": factory, "name": "mill", **more})


@pytest.fixture
def mill() -> Mill:
    return Mill()


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short path: a socket's has at most 107 bytes, 103 on some systems, and pytest's own may have more."""
    with tempfile.TemporaryDirectory(prefix="tw") as directory:
        yield Path(directory)


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of the test's own: no socket of another program is in the way."""
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    real = _control_place._places
    monkeypatch.setattr(_control_place, "_places", lambda: [place for place in real() if tmp_path in place.parents])
    return directory


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[_control_server._Server]:
    """The servers of this test, to look into."""
    made: list[_control_server._Server] = []

    class Server(_control_server._Server):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(_control_server, "_Server", Server)
    return made


@contextlib.asynccontextmanager
async def served(mill: Mill, path: Path | None = None, **more: Any) -> AsyncIterator[tuple[Pool, Path]]:
    """A pool that can be turned, and the path of its socket."""
    async with open_pool(mill.config(**more)) as pool, trio.open_nursery() as nursery:
        found = await nursery.start(partial(serve_control, pool, path=path))
        try:
            yield pool, found
        finally:
            mill.go.set()
            nursery.cancel_scope.cancel()


class Raw:
    """A client that sends what it likes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.data = b""

    async def say(self, data: bytes) -> None:
        """Send bytes."""
        await self.stream.send_all(data)

    async def hear(self) -> dict[str, Any]:
        """Read a line."""
        while b"\n" not in self.data:
            more = await self.stream.receive_some(65536)
            assert more, f"it was closed after {self.data!r}"
            self.data += more
        line, _, self.data = self.data.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def hear_answer(self) -> dict[str, Any]:
        """Read a line that was asked for: who was slow to ask has the status before."""
        while (answer := await self.hear()).get("unasked"):
            pass
        return answer

    async def ask(self, line: bytes) -> dict[str, Any]:
        """Send a line, and read its answer."""
        await self.say(line + b"\n")
        return await self.hear_answer()

    async def ends(self) -> bool:
        """Read to the end."""
        with contextlib.suppress(trio.BrokenResourceError):  # closed with bytes of ours unread
            while more := await self.stream.receive_some(65536):
                self.data += more
        return True


@contextlib.asynccontextmanager
async def raw(path: Path) -> AsyncIterator[Raw]:
    """Connect, and send nothing."""
    async with await trio.open_unix_socket(str(path)) as stream:
        yield Raw(stream)


# what is understood


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        (b"status", Request("status")),
        (b"", Request("status")),
        (b"  \r", Request("status")),
        (b"workers\r", Request("workers")),
        (b" reset ", Request("reset")),
        (b"watch", Request("watch")),
        (b"resize 3", Request("resize", 3)),
        (b"resize \t 0012", Request("resize", 12)),
        (b'{"do":"resize","to":3}', Request("resize", 3)),
        (b' { "do" : "watch" } ', Request("watch")),
        (f"resize {MOST_WORKERS}".encode(), Request("resize", MOST_WORKERS)),
    ],
)
def test_requests(line: bytes, request_: Request) -> None:
    """A bare word and a document say the same; spaces, and the end of a line of another system, do not matter."""
    assert parse_request(line) == request_


ALL = "understood are: status, workers, reset, resize N, watch"
NUMBER = f"resize takes a whole number from 1 to {MOST_WORKERS}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"foo", f"'foo' is not understood; {ALL}"),
        (b"STATUS", f"'STATUS' is not understood; {ALL}"),
        (b"status\0", f"'status\\x00' is not understood; {ALL}"),
        (b"GET / HTTP/1.1", f"'GET / HTTP/1.1' is not understood; {ALL}"),
        (b"status now", f"status takes nothing more, and there is 'now'; {ALL}"),
        (b"reset 3", f"reset takes nothing more, and there is '3'; {ALL}"),
        (b"\xff\xfe", f"is not UTF-8; {ALL}"),
        (b"x" * 4000, f"'{'x' * 60}...' is not understood"),
        (b"[]", f"'[]' is not understood; {ALL}"),
        (b"{", "is no JSON that can be read (Expecting property name"),
        (b"{}", f'"do" is missing; {ALL}'),
        (b'{"do":1}', f'"do" is a value of type int; {ALL}'),
        (b'{"do":"fly"}', f"\"do\" is 'fly'; {ALL}"),
        (b'{"do":["status"]}', f'"do" is a value of type list; {ALL}'),
        (b'{"do":"status","to":3}', f"status does not know 'to'; {ALL}"),
        (b'{"do":"resize","num":3}', f"resize does not know 'num'; {ALL}"),
        (b'{"do":' + b"[" * 4000, "is no JSON that can be read"),
        (b'{"do":"status","to":' + b"9" * 4000 + b"}", "status does not know 'to'"),
        (b"resize", NUMBER),
        (b"resize 3 4", NUMBER),
        (b"resize three", NUMBER),
        (b"resize -1", NUMBER),
        (b"resize +1", NUMBER),
        (b"resize 1_0", NUMBER),
        (b"resize 1.0", NUMBER),
        ("resize ٣".encode(), NUMBER),
        (b"resize 0", f"the number of workers is 0; {NUMBER}"),
        (b"resize " + b"9" * 50, f"the number of workers is {'9' * 50}; {NUMBER}"),
        (b"resize " + b"9" * 4000, NUMBER),
        (f"resize {MOST_WORKERS + 1}".encode(), NUMBER),
        (b'{"do":"resize"}', f'"to" is missing; {NUMBER}'),
        (b'{"do":"resize","to":true}', f'"to" is a value of type bool; {NUMBER}'),
        (b'{"do":"resize","to":3.0}', f'"to" is a value of type float; {NUMBER}'),
        (b'{"do":"resize","to":NaN}', f'"to" is a value of type float; {NUMBER}'),
        (b'{"do":"resize","to":"3"}', f"\"to\" is '3'; {NUMBER}"),
        (b'{"do":"resize","to":-1}', f"the number of workers is -1; {NUMBER}"),
        (b'{"do":"resize","to":' + b"9" * 4000 + b"}", f"the number of workers is far beyond; {NUMBER}"),
    ],
)
def test_bad_requests(line: bytes, said: str) -> None:
    """What is not understood is shown, shortened, with what would be."""
    with pytest.raises(BadRequest) as caught:
        parse_request(line)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode()))
def test_any_line_is_read_or_refused(line: bytes) -> None:
    """No bytes at all make anything but a request or a refusal."""
    with contextlib.suppress(BadRequest):
        assert isinstance(parse_request(line), Request)


@given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b" "))), st.integers(1, 10))
def test_lines_are_the_same_however_they_come(lines: list[bytes], size: int) -> None:
    """Lines are put together from any pieces; what has no end yet stays."""
    data = b"".join(line + b"\n" for line in lines) + b"rest"
    buffer = LineBuffer(30)
    found: list[bytes] = []
    for start in range(0, len(data), size):
        buffer.receive(data[start : start + size])
        while buffer.has_line:
            found.append(buffer.next_line() or b"")
    assert found == lines
    assert buffer.next_line() is None
    assert (buffer.rest(), buffer.rest()) == (b"rest", b"")


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_has_a_bound(end: bytes) -> None:
    """A line of the bound is one; a longer one is none, whether its end has come or not."""
    buffer = LineBuffer(4)
    buffer.receive(b"1234\n12345" + end)
    assert buffer.next_line() == b"1234"
    with pytest.raises(LineTooLong):
        buffer.next_line()


def test_requests_that_are_no_lines() -> None:
    """A client finds out before it has sent anything."""
    assert encode_request("resize 3") == b"resize 3\n"
    assert parse_request(encode_request({"do": "resize", "to": 3}).strip()) == Request("resize", 3)
    with pytest.raises(ValueError, match="a request is one line"):
        encode_request("status\nreset")
    with pytest.raises(ValueError, match="at most 4096 bytes, and this one 5000"):
        encode_request("x" * 5000)
    with pytest.raises(TypeError, match="must be a str or a mapping, not int"):
        encode_request(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("line", [b"", b"HTTP/1.1 400", b"[]", b"{}", b'{"ok":1}', b"[" * 100_000])
def test_answers_that_are_none(line: bytes) -> None:
    """What another program says is not taken for an answer."""
    with pytest.raises(ValueError, match=r"ok|JSON|deep"):
        decode_answer(line)


# what is answered


async def test_status_and_workers(mill: Mill) -> None:
    """The facts of the pool and of its workers, as everyone sees them, as a word and as a document."""
    async with served(mill) as (pool, path), raw(path) as client:
        await pool.exec(Payload(b"one"))
        answer = await client.ask(b"status")
        assert answer.keys() == {"ok", "status"}
        assert (answer["status"]["pool"], answer["status"]["pid"]) == ("mill", os.getpid())
        assert answer["status"]["jobs"] == {"replied": 1}
        workers = await client.ask(b'{"do":"workers"}')
        assert workers.keys() == {"ok", "workers"}
        assert [worker["slot"] for worker in workers["workers"]] == [0, 1]
        assert sum(worker["jobs"] for worker in workers["workers"]) == 1


async def test_deaths_before_anybody_asked(mill: Mill) -> None:
    """From when the socket is served, the ends of workers are remembered."""
    async with served(mill, num_workers=1) as (pool, path):
        with pytest.raises(WorkerCrashed):
            await pool.exec(Payload(b"crash"))
        async with raw(path) as client:
            (worker, *_) = (await client.ask(b"workers"))["workers"]
            assert "exited with status 3" in worker["last_death"]["error"]


async def test_reset_and_resize(mill: Mill) -> None:
    """The pool is turned, and the answer comes when that is done."""
    async with served(mill) as (pool, path), raw(path) as client:
        before = set(pool.workers)
        assert await client.ask(b"reset") == {"ok": True, "done": "reset"}
        assert not before & set(pool.workers)
        assert await client.ask(b"resize 3") == {"ok": True, "done": "resize", "to": 3}
        assert len(pool.workers) == 3
        assert await client.ask(b'{"do":"resize","to":1}') == {"ok": True, "done": "resize", "to": 1}
        assert len(pool.workers) == 1


async def test_who_asked_is_logged(mill: Mill, caplog: pytest.LogCaptureFixture) -> None:
    """A change that nobody in the program made has its author in the log."""
    with caplog.at_level(logging.INFO, "trio_workers.control"):
        async with served(mill) as (_, path), raw(path) as client:
            await client.ask(b"resize 1")
            await client.ask(b"status")
    pid = os.getpid() if sys.platform == "linux" else None
    assert caplog.messages == [f"mill: resize to 1, asked for by pid {pid} over the control socket"]


async def test_a_failed_reset_is_an_answer(mill: Mill) -> None:
    """Where no new worker boots the text of that is the answer, and the connection goes on."""
    async with served(mill) as (pool, path), raw(path) as client:
        before = pool.workers
        mill.broken = True
        answer = await client.ask(b"reset")
        assert answer.keys() == {"ok", "error"}
        assert not answer["ok"]
        assert "exited with status 1" in answer["error"]
        assert "no such model" in answer["error"]
        assert (await client.ask(b"resize 4"))["ok"] is False
        assert pool.workers == before
        assert (await client.ask(b"status"))["status"]["idle"] == 2


async def test_a_long_reset_holds_up_nobody_else(mill: Mill) -> None:
    """While one waits for the longest job, others are answered."""
    async with served(mill) as (pool, path), raw(path) as first, raw(path) as second, trio.open_nursery() as nursery:
        nursery.start_soon(pool.exec, Payload(b"wait"))
        await until(lambda: pool.statistics().busy == 1)
        await first.say(b"reset\nstatus\n")
        await until(lambda: pool.statistics().starts == 4)
        assert (await second.ask(b"status"))["status"]["busy"] == 1
        mill.go.set()
        assert await first.hear_answer() == {"ok": True, "done": "reset"}
        assert "status" in await first.hear_answer()  # in order


async def test_a_change_goes_on_when_its_client_hangs_up(mill: Mill, servers: list[_control_server._Server]) -> None:
    """The connection is given up, the change is not, even where bytes lie unread behind it."""
    async with served(mill) as (pool, path):
        before = set(pool.workers)
        mill.held = trio.Event()
        async with raw(path) as client:
            await client.say(b"reset\nstatus\n")
            await until(lambda: pool.statistics().starting)
            await client.say(b"status\n")
        await until(lambda: servers[0]._connections == 0)
        mill.held.set()
        await until(lambda: not before & set(pool.workers))
        assert pool.statistics().idle == 2


async def test_said_and_gone(mill: Mill, servers: list[_control_server._Server]) -> None:
    """A program that asks for a change, and does not wait for anything, has it."""
    async with served(mill) as (pool, path):
        for size in (3, 1):
            async with raw(path) as client:
                await client.say(f"resize {size}\n".encode())
            await until(lambda size=size: len(pool.workers) == size)  # type: ignore[misc]
        await until(lambda: servers[0]._connections == 0)


@pytest.mark.parametrize("lines", [b"", b"status\n", b"status", b"\n"])
async def test_only_the_sending_side_is_closed(mill: Mill, lines: bytes) -> None:
    """Who sends nothing more gets the status, or his answer, line end or not, and then the end."""
    async with served(mill) as (_, path), raw(path) as client:
        if lines:
            await client.say(lines)
        await client.stream.send_eof()
        assert (await client.hear())["status"]["pool"] == "mill"
        assert await client.ends()
        assert client.data == b""


async def test_one_who_says_nothing_gets_the_status(mill: Mill) -> None:
    """It is marked as unasked, and the connection is served on."""
    async with served(mill) as (_, path), raw(path) as client:
        answer = await client.hear()
        assert answer["unasked"] is True
        assert answer["status"]["pool"] == "mill"
        assert (await client.ask(b"reset"))["done"] == "reset"


async def test_half_a_line_is_no_silence(mill: Mill) -> None:
    """Who has begun a line is not interrupted."""
    async with served(mill) as (_, path), raw(path) as client:
        await client.say(b"rese")
        await trio.sleep(2 * _control_server.SILENT_FOR)
        assert await client.ask(b"t") == {"ok": True, "done": "reset"}


async def test_a_closed_pool(mill: Mill) -> None:
    """After the pool's end it is still told how it is, and what can't be done is said."""
    async with trio.open_nursery() as nursery:
        async with open_pool(mill.config()) as pool:
            path = await nursery.start(serve_control, pool)
        async with raw(path) as client:
            assert (await client.ask(b"status"))["status"]["closed"] is True
            assert (await client.ask(b"workers"))["workers"] == []
            said = {"ok": False, "error": "the pool 'mill' is closed, so there is nothing to reset"}
            assert await client.ask(b"reset") == said
            assert (await client.ask(b"resize 3"))["ok"] is False
            assert (await client.ask(b"watch"))["status"]["closed"] is True
        nursery.cancel_scope.cancel()
    assert not path.exists()


async def test_a_pool_that_closes_during_a_reset(mill: Mill) -> None:
    """Its client is told so, and leaving the pool waits for nobody."""
    async with trio.open_nursery() as nursery, contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(open_pool(mill.config(destroy_timeout=0)))
        path = await nursery.start(serve_control, pool)
        async with raw(path) as client:
            mill.held = trio.Event()
            await client.say(b"reset\n")
            await until(lambda: pool.statistics().starting)
            await stack.aclose()
            assert "the pool 'mill' is closed" in (await client.hear())["error"]
        nursery.cancel_scope.cancel()


async def test_a_python_pool() -> None:
    """Pools of functions are turned in the same way; on real processes."""
    async with open_python_pool(1, name="functions") as pool, trio.open_nursery() as nursery:
        path = await nursery.start(serve_control, pool)
        async with await connect(path) as client:
            (worker,) = (await client.ask("workers"))["workers"]
            assert worker["pid"] == pool.workers[0].pid
            assert await client.ask("reset") == {"ok": True, "done": "reset"}
            assert await client.ask("resize 2") == {"ok": True, "done": "resize", "to": 2}
            pids = {worker["pid"] for worker in (await client.ask("workers"))["workers"]}
        nursery.cancel_scope.cancel()
    assert len(pids) == 2
    assert worker["pid"] not in pids


async def test_a_pool_of_commands_under_load() -> None:
    """Real workers are replaced while jobs go on, and no job is lost."""
    async with open_pool(release("1")) as pool, trio.open_nursery() as nursery:
        path = await nursery.start(serve_control, pool)
        done = 0

        async def work() -> None:
            nonlocal done
            while True:
                await pool.exec(Payload(b"say"))
                done += 1

        async with await connect(path) as client, trio.open_nursery() as callers:
            for _ in range(3):
                callers.start_soon(work)
            for request in ("reset", "resize 3", "resize 1"):
                assert (await client.ask(request))["ok"]
                seen = done
                await until(lambda seen=seen: done > seen + 3)  # type: ignore[misc]
            status = (await client.ask("status"))["status"]
            callers.cancel_scope.cancel()
        nursery.cancel_scope.cancel()
    assert set(status["jobs"]) == {"replied"}
    assert status["exits"]["reset"] == 2


# watching


async def test_watch(mill: Mill) -> None:
    """A picture at once, and one at each change, coalesced; none while only ages go on."""
    async with served(mill) as (pool, path), raw(path) as client:
        first = await client.ask(b"watch")
        assert first.keys() == {"ok", "status", "workers"}
        assert first["status"]["jobs"] == {}
        for count in range(1, 4):
            await pool.exec(Payload(b"one"))
            while (picture := await client.hear())["status"]["jobs"] != {"replied": count}:
                pass
        await pool.reset()
        while (picture := await client.hear())["status"]["exits"] != {"reset": 2}:
            pass
        assert picture["workers"][0]["jobs"] == 0
        with trio.move_on_after(4 * _control_server.LOOK_EVERY) as patience:
            while True:
                # What else has changed may still come, such as memory; not one more each time it is looked at.
                last = await client.hear()
                assert last != picture
                picture = last
        assert patience.cancelled_caught


async def test_pictures_are_coalesced(mill: Mill, autojump_clock: trio.testing.MockClock) -> None:
    """However many events there are, twenty pictures a second at most are made, and the last shows the end."""
    pool: Any
    async with open_pool(mill.config()) as pool, trio.open_nursery() as nursery:
        gallery = _control_server._Gallery(pool)
        gallery.nursery = nursery
        looks: list[float] = []
        look = gallery._look

        def note() -> None:
            looks.append(trio.current_time())
            look()
            gallery._cost = 0.0

        gallery._look = note  # type: ignore[method-assign]
        connection = FakeConnection()
        nursery.start_soon(gallery.show, connection)
        begun = trio.current_time()
        for _ in range(100):
            await pool.reset()
            await trio.sleep(0.01)
        passed = trio.current_time() - begun
        await trio.sleep(1)
        assert len(looks) <= 2 + (passed + 1) / _control_server.PICTURE_EVERY
        assert min(after - before for before, after in pairwise(looks[1:])) >= 0.0499
        last = json.loads(connection.sent[-1])
        assert last["status"]["exits"] == {"reset": 200}
        nursery.cancel_scope.cancel()


class FakeConnection(_control_server._Connection):
    """One that takes everything at once."""

    def __init__(self) -> None:
        self.lines = LineBuffer(LONGEST_REQUEST)
        self.ended = False
        self.sent: list[bytes] = []

    async def send(self, line: bytes) -> None:
        """Keep it."""
        await trio.lowlevel.checkpoint()
        self.sent.append(line)

    async def wait_for_more(self) -> bool:
        """Wait for ever."""
        await trio.sleep_forever()
        return True


async def test_any_line_ends_a_watch(mill: Mill) -> None:
    """What is asked while pictures come is answered, and they come no more."""
    async with served(mill) as (pool, path), raw(path) as client:
        await client.ask(b"watch")
        await client.say(b"workers\n")
        while (answer := await client.hear()).keys() != {"ok", "workers"}:
            pass
        await pool.exec(Payload(b"one"))
        await trio.sleep(2 * _control_server.LOOK_EVERY)
        answer = await client.ask(b"status")
        assert answer.keys() == {"ok", "status"}
        answer = await client.ask(b"watch\nwatch\nreset")
        assert answer.keys() == {"ok", "status", "workers"}
        assert (await client.hear()).keys() == {"ok", "status", "workers"}
        assert await client.hear() == {"ok": True, "done": "reset"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody says that a half-closed client has gone")
async def test_a_watch_with_the_sending_side_closed(mill: Mill, servers: list[_control_server._Server]) -> None:
    """Who only listens gets his pictures, and is missed when he goes."""
    async with served(mill) as (pool, path):
        async with raw(path) as client:
            await client.say(b"watch\n")
            await client.stream.send_eof()
            await client.hear()
            await pool.exec(Payload(b"one"))
            while (await client.hear())["status"]["jobs"] != {"replied": 1}:
                pass
        await until(lambda: servers[0]._connections == 0)


async def test_nothing_runs_while_nobody_watches(mill: Mill, servers: list[_control_server._Server]) -> None:
    """The figures are looked at for those who watch, by one task for all, and for nobody else."""

    def painters() -> int:
        nursery = servers[0]._gallery.nursery
        return sum("_paint" in task.name for task in nursery.child_tasks)

    async with served(mill) as (pool, path):
        watch = watch_pool(pool)
        async with raw(path) as first, raw(path) as second:
            assert painters() == 0
            await first.ask(b"watch")
            await second.ask(b"watch")
            await until(lambda: watch._bells)
            assert painters() == 1
        await until(lambda: painters() == 0)
        assert not watch._bells
        async with raw(path) as third:
            await third.ask(b"watch")
            await pool.exec(Payload(b"one"))
            await third.hear()
            assert painters() == 1
            await third.ask(b"status")
            await until(lambda: painters() == 0)


# who may come in


async def test_private_and_gone_at_the_end(mill: Mill, runtime: Path) -> None:
    """The file is 0600 in a directory 0700, named after the pool and this process, and goes with the server."""
    before = os.umask(0)
    try:
        async with served(mill, name="my pool/../x") as (_, path):
            assert path == runtime / "trio_workers" / f"my_pool_.._x-{os.getpid()}.sock"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    finally:
        os.umask(before)
    assert not path.exists()


async def test_two_pools_of_one_name(mill: Mill) -> None:
    """Each has its own socket."""
    async with served(mill) as (_, one), served(mill) as (_, two):
        assert one != two
        assert find_sockets() == sorted([one, two])
        async with await connect(two):
            pass


async def test_without_a_runtime_directory(mill: Mill, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the variable is not set, or names what is not ours, the place is one in /tmp that carries our uid."""
    monkeypatch.undo()
    temporary = Path(f"/tmp/trio_workers-{os.geteuid()}")
    for value in ("", "relative", str(tmp_path / "missing")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        assert _control_place._places() == [temporary]
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert _control_place._places() == [tmp_path / "trio_workers", temporary]
    if os.geteuid() == 0:
        os.chown(tmp_path, NOBODY, NOBODY)
        assert _control_place._places() == [temporary]


@pytest.mark.parametrize("what", ["open", "file", "link", "stranger's"])
async def test_a_directory_that_is_not_ours_alone(mill: Mill, runtime: Path, tmp_path: Path, what: str) -> None:
    """It is named, with what is wrong and what to do; and nothing in it is found."""
    directory = runtime / "trio_workers"
    if what == "file":
        directory.touch()
        said = "it is no directory"
    elif what == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        directory.symlink_to(tmp_path / "elsewhere")
        said = "it is no directory"
    else:
        directory.mkdir(mode=0o700)
        if what == "open":
            directory.chmod(0o750)
            said = "its mode is 0750 where it must be 0700"
        else:
            if os.geteuid() != 0:
                pytest.skip("only root can give a directory away")
            os.chown(directory, NOBODY, NOBODY)
            said = f"it belongs to uid {NOBODY}"
    async with open_pool(mill.config()) as pool, trio.open_nursery() as nursery:
        with pytest.raises(PermissionError, match=re.escape(said)) as caught:
            await nursery.start(serve_control, pool)
        assert caught.value.filename == str(directory)
        assert "path=" in str(caught.value)
    assert find_sockets() == []


async def test_a_path_of_ones_own(mill: Mill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be relative, and is removed from where it was, wherever the program has gone."""
    monkeypatch.chdir(tmp_path)
    async with served(mill, Path("door")) as (_, path):
        assert path == tmp_path / "door"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        monkeypatch.chdir("/")
    assert not path.exists()
    assert find_sockets() == []


@pytest.mark.parametrize(
    ("path", "kind", "said"),
    [
        ("/" + "x" * 200, ValueError, "the path has 201 bytes, and a Unix socket's at most"),
        ("", ValueError, "path must name a file"),
        ("a\0b", ValueError, "path must name a file"),
        (b"/tmp/x", TypeError, "path must be a str or a path of str, not bytes"),
    ],
)
async def test_paths_that_are_none(mill: Mill, path: Any, kind: type[Exception], said: str) -> None:
    """Each is refused in words, before anything is made."""
    async with open_pool(mill.config()) as pool, trio.open_nursery() as nursery:
        with pytest.raises(kind, match=re.escape(said)):
            await nursery.start(partial(serve_control, pool, path=path))


async def test_only_a_dead_socket_is_replaced(mill: Mill, tmp_path: Path) -> None:
    """What a killed pool left is in nobody's way; a live one, and a file, are."""
    path = tmp_path / "door"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with served(mill, path) as (pool, _), trio.open_nursery() as nursery:
        with pytest.raises(FileExistsError, match="somebody is listening on that socket"):
            await nursery.start(partial(serve_control, pool, path=path))
        async with raw(path) as client:
            assert (await client.ask(b"status"))["ok"]
    path.write_text("precious")
    async with open_pool(mill.config()) as pool, trio.open_nursery() as nursery:
        with pytest.raises(FileExistsError, match="there is a file that is no socket") as caught:
            await nursery.start(partial(serve_control, pool, path=path))
    assert caught.value.filename == str(path)
    assert path.read_text() == "precious"


async def test_a_file_that_took_our_place_stays(mill: Mill, tmp_path: Path) -> None:
    """At the end only the socket that is ours is removed."""
    path = tmp_path / "door"
    async with served(mill, path):
        path.unlink()
        path.write_text("precious")
    assert path.read_text() == "precious"


async def test_what_killed_pools_left_is_swept(mill: Mill, runtime: Path) -> None:
    """Sockets of processes that are gone are removed; of those that are there, and what is no socket, are not."""
    directory = runtime / "trio_workers"
    directory.mkdir(mode=0o700)
    process = await trio.lowlevel.open_process(["true"])
    await process.wait()
    gone, there = directory / f"old-{process.pid}.sock", directory / f"new-{os.getpid()}.sock"
    other, file = directory / "other.sock", directory / f"file-{process.pid}.sock"
    for path in (gone, there, other):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    file.touch()
    async with served(mill) as (_, path):
        assert find_sockets() == [path]
    assert {path.name for path in directory.iterdir()} == {there.name, other.name, file.name}


async def test_the_same_on_another_system(mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel does not say who connects, the file's mode is what keeps others out."""
    monkeypatch.setattr(_platform, "HERE", Portable())
    async with served(mill) as (_, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with await connect(path) as client:
            assert await client.ask("reset") == {"ok": True, "done": "reset"}


def as_root() -> None:
    """Skip the test where there is no second user to be."""
    if sys.platform != "linux":
        pytest.skip("needs SO_PEERCRED")
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")


STRANGER: Final = """
import os, socket, sys
uid = int(sys.argv[2])
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
with socket.socket(socket.AF_UNIX) as sock:
    try:
        sock.connect(sys.argv[1])
    except OSError as error:
        print(type(error).__name__)
    else:
        sock.settimeout(30)
        data = b""
        try:
            sock.sendall(b"reset\\n")
        except OSError:
            pass  # refused already; why can still be read
        try:
            while more := sock.recv(4096):
                data += more
        except OSError:
            pass
        print(data.decode(), end="")
"""
"""Another user's program that knows the path. It becomes that user by itself, who may not enter where Python lies."""


async def visit(path: Path) -> str:
    """Connect as another user, and return what that got."""
    command = [sys.executable, "-S", "-c", STRANGER, str(path), str(NOBODY)]
    done = await trio.run_process(command, capture_stdout=True)
    return done.stdout.decode().strip()


async def test_another_user_can_not_open_the_socket(mill: Mill, open_directory: Path) -> None:
    """The file system keeps him out, whether he knows the path or not: by the directory, and by the file's own mode."""
    as_root()
    for path in (None, open_directory / "door"):
        async with served(mill, path) as (pool, found):
            before = pool.workers
            assert await visit(found) == "PermissionError"
            assert pool.workers == before


async def test_another_user_is_refused_by_the_kernels_word(
    mill: Mill, open_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where somebody has opened directory and socket to all the world, the server still asks who it is."""
    as_root()
    async with served(mill, open_directory / "door") as (pool, path):
        before = pool.workers
        path.chmod(0o666)
        answer = json.loads(await visit(path))
        assert answer == {
            "ok": False,
            "error": f"this socket is for uid 0 and for root, and you are uid {NOBODY}",
        }
        assert pool.workers == before
        assert pool.statistics().starts == 2
    assert f"refused a connection to {path} from uid {NOBODY}" in caplog.text


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that everybody may enter, where pytest's own are private."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        os.chmod(path, 0o777)
        yield Path(path)


async def test_root_may_turn_anybodys_pool(mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same user and root come in, by the number that the kernel says; nobody else."""
    if sys.platform != "linux":
        pytest.skip("needs SO_PEERCRED")
    ours = os.geteuid()
    for uid, let_in in ((0, True), (ours, True), (ours + 1, False)):
        monkeypatch.setattr(Linux, "peer_uid", lambda self, connection, uid=uid: uid)
        async with served(mill) as (_, path), raw(path) as client:
            assert (await client.ask(b"status"))["ok"] is let_in


# hostile clients


async def test_ten_thousand_bad_lines(mill: Mill) -> None:
    """Each has its answer, another client is served meanwhile, and the pool does its jobs."""
    lines = [b"foo", b"\xff\xfe", b"\0\0", b'{"do":' + b"[" * 200, b"resize 0", b"resize " + b"9" * 100]
    async with served(mill) as (pool, path), raw(path) as bad, raw(path) as good, trio.open_nursery() as nursery:
        count = 10_000

        async def send() -> None:
            block = b"".join(line + b"\n" for line in lines) * 10
            for _ in range(count // (10 * len(lines)) + 1):
                await bad.say(block)

        nursery.start_soon(send)
        for number in range(count):
            assert (await bad.hear())["ok"] is False
            if number % 1000 == 0:
                assert (await good.ask(b"status"))["ok"]
                await pool.exec(Payload(b"one"))
        assert pool.statistics().starts == 2
        nursery.cancel_scope.cancel()


async def test_a_line_without_end(mill: Mill, servers: list[_control_server._Server]) -> None:
    """After 4096 bytes there is an error and the end, however much would follow."""
    async with served(mill) as (_, path):
        for data in (b"x" * (LONGEST_REQUEST + 1), b"status\n" + b"y" * 100_000 + b"\nstatus\n"):
            async with raw(path) as client:
                await client.say(data)
                if data.startswith(b"status"):
                    assert "status" in await client.hear()
                answer = await client.hear()
                assert answer == {"ok": False, "error": "a line has at most 4096 bytes; this is the end"}
                assert await client.ends()
        await until(lambda: servers[0]._connections == 0)


async def test_half_a_line_and_gone(mill: Mill, servers: list[_control_server._Server]) -> None:
    """Who hangs up in the middle of a word has asked for nothing and leaves nothing behind."""
    async with served(mill) as (pool, path):
        for data in (b"res", b'{"do":"re', b"", b"status\nworkers\nwatch\n"):
            async with raw(path) as client:
                await client.say(data)
        await until(lambda: servers[0]._connections == 0)
        assert pool.statistics().starts == 2


async def test_a_line_in_single_bytes(mill: Mill) -> None:
    """It is put together."""
    async with served(mill) as (_, path), raw(path) as client:
        for byte in b"resize 1\n":
            await client.say(bytes([byte]))
            await trio.testing.wait_all_tasks_blocked()
        assert await client.hear() == {"ok": True, "done": "resize", "to": 1}


async def test_who_does_not_read_is_dropped(
    mill: Mill, servers: list[_control_server._Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that nobody takes are kept up to what a socket holds, and then for a time; others notice nothing."""
    monkeypatch.setattr(_control_server, "READS_WITHIN", 0.5)
    async with served(mill) as (pool, path), raw(path) as lazy, raw(path) as good, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                while True:
                    await lazy.say(b"foo\n" * 1000)

        # The one that sends sees the end: its connection is closed.
        await until(lambda: servers[0]._connections == 2)
        await until(lambda: servers[0]._connections == 1)
        assert (await good.ask(b"status"))["ok"]
        await pool.exec(Payload(b"one"))


class Narrow(_control_server._Connection):
    """One whose socket holds little."""

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


async def test_a_watcher_that_is_slow_gets_the_newest(
    mill: Mill, servers: list[_control_server._Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are not queued: what comes after those that the socket holds is the state of now."""
    monkeypatch.setattr(_control_server, "_Connection", Narrow)
    monkeypatch.setattr(_control_server, "LOOK_EVERY", _control_server.PICTURE_EVERY)
    monkeypatch.setattr(_control_server, "READS_WITHIN", 1000.0)
    async with served(mill, num_workers=10) as (pool, path), raw(path) as slow, raw(path) as quick:
        await slow.say(b"watch\n")
        await quick.say(b"watch\n")
        most = 20
        for count in range(1, most + 1):
            await pool.exec(Payload(b"one"))
            while (await quick.hear())["status"]["jobs"].get("replied") != count:
                pass
        seen = [0]
        while seen[-1] != most:
            seen.append((await slow.hear())["status"]["jobs"].get("replied", 0))
        assert seen == sorted(seen)
        assert len(seen) < most / 2
        assert len(servers[0]._gallery._watchers) == 2


async def test_two_hundred_idle_connections(mill: Mill) -> None:
    """They cost the pool and the next client nothing."""
    async with served(mill) as (pool, path), contextlib.AsyncExitStack() as stack:
        idle = [await stack.enter_async_context(raw(path)) for _ in range(200)]
        for client in idle[::10]:
            assert (await client.hear())["unasked"]
        async with raw(path) as client:
            assert (await client.ask(b"reset"))["ok"]
        await pool.exec(Payload(b"one"))
        assert (await idle[7].ask(b"status"))["ok"]


async def test_connections_have_a_bound(
    mill: Mill, servers: list[_control_server._Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One too many is told so, and has its place when another has gone."""
    assert _control_server.CONNECTIONS == 256
    monkeypatch.setattr(_control_server, "CONNECTIONS", 3)
    async with served(mill) as (_, path), contextlib.AsyncExitStack() as stack:
        others = [await stack.enter_async_context(raw(path)) for _ in range(3)]
        for client in others:
            await client.ask(b"status")
        async with raw(path) as late:
            assert (await late.hear())["error"] == "there are 3 connections already; close one of them"
            assert await late.ends()
        with pytest.raises(PermissionError, match="there are 3 connections already"):
            await connect(path)
        await others.pop().stream.aclose()
        await until(lambda: servers[0]._connections == 2)
        async with await connect(path):
            pass


async def test_a_bug_ends_one_connection_and_nothing_else(
    mill: Mill, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that nobody foresaw is logged, and neither the server nor the pool's nursery falls."""
    async with served(mill) as (pool, path), raw(path) as client:
        with monkeypatch.context() as patch:
            patch.setattr(_control_server, "describe_workers", lambda _: 1 // 0)
            await client.say(b"workers\n")
            assert await client.ends()
            async with raw(path) as watcher:
                await watcher.say(b"watch\n")
                assert await watcher.ends()
            patch.setattr(Pool, "reset", lambda _: 1 // 0)
            async with raw(path) as another:
                assert "reset failed: ZeroDivisionError" in (await another.ask(b"reset"))["error"]
        async with raw(path) as another:
            assert (await another.ask(b"workers"))["ok"]
        await pool.exec(Payload(b"one"))
    assert caplog.text.count("met a bug of trio_workers") == 2


async def test_a_bug_in_a_picture(
    mill: Mill, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the next picture is made."""
    async with served(mill) as (pool, path), raw(path) as client:
        await client.ask(b"watch")
        with monkeypatch.context() as patch:
            patch.setattr(_control_server, "describe_workers", lambda _: 1 // 0)
            await until(lambda: "making a picture of the pool met a bug" in caplog.text)
        await pool.exec(Payload(b"one"))
        while (await client.hear())["status"]["jobs"] != {"replied": 1}:
            pass


async def test_a_listener_that_fails_costs_the_pool_nothing(
    mill: Mill, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What keeps us from listening on is logged; the nursery around goes on."""

    async def fall(*_: object, **__: object) -> None:
        raise OSError("no more")

    monkeypatch.setattr(trio, "serve_listeners", fall)
    async with open_pool(mill.config()) as pool, trio.open_nursery() as nursery:
        path = await nursery.start(serve_control, pool)
        await until(lambda: not nursery.child_tasks)
        await pool.exec(Payload(b"one"))
    assert f"the control socket at {path} failed, and is closed" in caplog.text
    assert find_sockets() == []


async def test_cancelled_in_the_middle_of_everything(mill: Mill) -> None:
    """Clients that wait, watch, idle and stop in a line leave nothing behind when the server is cancelled."""
    async with open_pool(mill.config()) as pool, contextlib.AsyncExitStack() as stack:
        async with trio.open_nursery() as nursery:
            path = await nursery.start(serve_control, pool)
            clients = [await stack.enter_async_context(raw(path)) for _ in range(4)]
            mill.held = trio.Event()
            for client, data in zip(clients, (b"reset\n", b"watch\n", b"", b"res"), strict=True):
                await client.say(data)
            await until(lambda: pool.statistics().starting)
            nursery.cancel_scope.cancel()
        assert not path.exists()
        mill.held.set()
        for client in clients:
            assert await client.ends()
        await until(lambda: pool.statistics().exits.get("reset") == 2)  # only the wait was given up


async def test_what_is_no_pool_is_refused() -> None:
    """It is named."""
    async with trio.open_nursery() as nursery:
        with pytest.raises(TypeError, match="pool must be a Pool or a PythonPool, not str"):
            await nursery.start(serve_control, "pool")


async def test_start_that_is_cancelled(mill: Mill, runtime: Path) -> None:
    """A cancel before it is served leaves no socket."""
    async with open_pool(mill.config()) as pool, trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            scope.cancel()
            await nursery.start(serve_control, pool)
        assert scope.cancelled_caught
    assert find_sockets() == []


# the client


async def test_client(mill: Mill) -> None:
    """It asks in words and documents, and gives answers as they are, refusals too."""
    async with served(mill) as (_, path), await connect(path) as client:
        assert isinstance(client, ControlClient)
        assert client.path == path
        assert repr(client) == f"<ControlClient of {path}>"
        assert (await client.ask("status"))["status"]["pool"] == "mill"
        assert await client.ask({"do": "resize", "to": 3}) == {"ok": True, "done": "resize", "to": 3}
        assert (await client.ask("resize 0"))["ok"] is False
        for request in ("watch", " watch ", {"do": "watch"}):
            with pytest.raises(ValueError, match=r"use client\.watch\(\)"):
                await client.ask(request)  # type: ignore[arg-type]
        assert (await client.ask("status"))["ok"]
    with pytest.raises(trio.ClosedResourceError):
        await client.ask("status")
    client.close()
    with pytest.raises(TypeError, match="no public constructor"):
        ControlClient()


async def test_client_watches(mill: Mill) -> None:
    """Pictures come as things change; it may be left, asked between, and gone on with."""
    async with served(mill) as (pool, path), await connect(path) as client:
        count = 0
        async for picture in client.watch():
            if picture["status"]["jobs"].get("replied", 0) != count:
                continue
            count += 1
            if count == 4:
                break
            await pool.exec(Payload(b"one"))
            assert (await client.ask("workers")).keys() == {"ok", "workers"}
        pictures = client.watch()
        with trio.move_on_after(0):
            await anext(pictures)
        assert (await anext(pictures))["status"]["jobs"] == {"replied": 3}
        with trio.move_on_after(0.01):
            await anext(pictures)
        assert (await client.ask("status")).keys() == {"ok", "status"}
        assert (await anext(pictures))["status"]["jobs"] == {"replied": 3}


async def test_client_asks_while_another_task_watches(mill: Mill) -> None:
    """The task that waits for a picture gives way, and its pictures come again."""
    async with served(mill) as (pool, path), await connect(path) as client, trio.open_nursery() as nursery:
        seen: list[dict[str, int]] = []

        @nursery.start_soon
        async def look_on() -> None:
            async for picture in client.watch():
                seen.append(picture["status"]["jobs"])  # noqa: PERF401 - it is looked at meanwhile

        await until(lambda: seen)
        for count in range(1, 5):
            async with trio.open_nursery() as askers:
                for request in ("status", "workers", "resize 2"):
                    askers.start_soon(client.ask, request)
            await pool.exec(Payload(b"one"))
            await until(lambda count=count: seen[-1] == {"replied": count})  # type: ignore[misc]
        nursery.cancel_scope.cancel()


async def test_watching_ends_with_the_pools_side(mill: Mill) -> None:
    """The iteration ends; a question is an error that says what to look for."""
    async with open_pool(mill.config()) as pool, trio.open_nursery() as nursery:
        path = await nursery.start(serve_control, pool)
        async with await connect(path) as client, await connect(path) as other:
            async for _ in client.watch():
                nursery.cancel_scope.cancel()
            with pytest.raises(ConnectionResetError, match="has its program ended") as caught:
                await other.ask("status")
            assert caught.value.filename == str(path)


async def test_a_cancelled_question_closes_its_client(mill: Mill) -> None:
    """Its answer can't be taken for that of the next question; the change goes on."""
    async with served(mill) as (pool, path), await connect(path) as client:
        before = set(pool.workers)
        mill.held = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.ask, "reset")
            await until(lambda: pool.statistics().starting)
            nursery.cancel_scope.cancel()
        with pytest.raises(trio.ClosedResourceError):
            await client.ask("status")
        mill.held.set()
        await until(lambda: not before & set(pool.workers))


async def test_a_client_that_is_slow_to_ask(mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status that came unasked is not taken for an answer."""
    monkeypatch.setattr(_control_server, "SILENT_FOR", 0.0)
    async with served(mill) as (_, path), await connect(path) as client:
        assert (await client.ask("workers")).keys() == {"ok", "workers"}


def make_nothing(path: Path) -> None:
    """Make none."""


def make_dead(path: Path) -> None:
    """Make a socket that nobody listens to."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (make_nothing, FileNotFoundError, "there is no such socket; has the pool ended?"),
        (make_dead, ConnectionRefusedError, "nobody listens to that socket any more: its program has ended"),
        (Path.touch, OSError, "that is no socket"),
        (Path.mkdir, OSError, "that is no socket"),
    ],
)
async def test_sockets_that_are_none(
    tmp_path: Path, make: Callable[[Path], None], kind: type[OSError], said: str
) -> None:
    """Each is an error that names the path and says what is wrong."""
    path = tmp_path / "door"
    make(path)
    with pytest.raises(kind, match=re.escape(said)) as caught:
        await connect(path)
    assert caught.value.filename == str(path)


async def test_a_path_that_is_too_long_to_be_one() -> None:
    """The system's own error has not even a number."""
    with pytest.raises(OSError, match="the path has 201 bytes"):
        await connect("/" + "x" * 200)


@pytest.mark.parametrize(
    ("says", "said"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "that is no pool's control socket: it speaks no JSON"),
        (b'{"jsonrpc": 1}\n', "that is no pool's control socket: its answer has no ok"),
        (b'{"ok":true}\n', "that is no pool's control socket: its status has none"),
        (b"", "has closed the connection"),
        (None, "no answer within"),
    ],
)
async def test_sockets_of_other_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: bytes | None, said: str
) -> None:
    """What does not speak as a pool does is no pool's, and what says nothing is not waited for."""
    monkeypatch.setattr(trio_workers.control, "ANSWERS_WITHIN", 0.1 if says is None else 30.0)
    path = tmp_path / "door"
    with trio.socket.socket(socket.AF_UNIX) as sock:
        await sock.bind(str(path))
        sock.listen()

        async def speak(stream: trio.SocketStream) -> None:
            await stream.receive_some(100)
            if says is None:
                await trio.sleep_forever()
            await stream.send_all(says)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, speak, [trio.SocketListener(sock)])
            with pytest.raises(OSError, match=said) as caught:
                await connect(path)
            nursery.cancel_scope.cancel()
    assert caught.value.filename == str(path)


CONNECTS: Final = """
import sys, trio
from trio_workers.control import connect
try:
    trio.run(connect, sys.argv[1])
except PermissionError as error:
    print(error.strerror)
"""


async def test_a_client_of_another_user(mill: Mill) -> None:
    """It is told who may."""
    as_root()
    async with served(mill) as (_, path):
        code = f"import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        program = CONNECTS.replace("try:", code + "try:", 1)
        done = await trio.run_process(
            [sys.executable, "-c", program, str(path)], capture_stdout=True, env={"PYTHONPATH": str(ROOT)}
        )
    assert done.stdout.decode() == "only the user who runs the pool, and root, may connect\n"


def test_find_sockets_where_there_are_none(runtime: Path) -> None:
    """An empty list, and no directory is made for it."""
    assert find_sockets() == []
    assert list(runtime.iterdir()) == []


def test_knock_leaves_nothing(tmp_path: Path) -> None:
    """A look at a path tells the four things apart."""
    path = tmp_path / "door"
    assert knock(str(path)) is Pulse.GONE
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        assert knock(str(path)) is Pulse.DEAD
        sock.listen()
        assert knock(str(path)) is Pulse.LIVE
    path.unlink()
    path.touch()
    assert knock(str(path)) is Pulse.OTHER


KILLED: Final = """
import trio
from trio_workers import Config, open_pool, serve_control
from trio_workers.testing import MemoryFactory

async def main():
    async def answer(job): return b""
    async with open_pool(Config(command=["none"], num_workers=1, factory=MemoryFactory(answer))) as pool:
        async with trio.open_nursery() as nursery:
            print(await nursery.start(serve_control, pool), flush=True)

trio.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_a_program_that_is_killed(number: signal.Signals) -> None:
    """Ctrl-C removes the socket; SIGKILL leaves a dead one, which is not listed."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", KILLED],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    async with process.stdout:
        try:
            path = trio.Path((await process.stdout.receive_some(1000)).decode().strip())
            assert find_sockets() == [Path(path)]
            async with await connect(path) as client:
                assert (await client.ask("status"))["status"]["pid"] == process.pid
                process.send_signal(number)
                async for _ in client.watch():
                    pass  # it comes to an end
            await process.wait()
        finally:
            process.kill()
            await process.wait()
    assert await path.exists() is (number is signal.SIGKILL)
    assert find_sockets() == []


# what the page says


def fields_on_the_page(heading: str) -> list[str]:
    """The first column of the table of fields that comes after a line."""
    text = (ROOT / "docs" / "turning.md").read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    return re.findall(r"^\| `(\w+)` \|", text.split("\n\n")[0], re.MULTILINE)


def test_fields_on_the_page() -> None:
    """Its tables have each field, in order, and no other."""
    assert fields_on_the_page("The fields of `status`:") == list(PoolFact.__annotations__)
    assert fields_on_the_page("Those of each of the `workers`:") == list(WorkerFact.__annotations__)


def test_figures_on_the_page() -> None:
    """Bounds that it names are those of the code."""
    page = " ".join((ROOT / "docs" / "turning.md").read_text(encoding="utf-8").split())
    assert f"1 to {MOST_WORKERS} |" in page
    assert f"A line has at most {LONGEST_REQUEST} bytes" in page
    assert f"not read for {_control_server.READS_WITHIN:g} s" in page
    assert f"{_control_server.CONNECTIONS} connections at a time" in page
    assert f"after {_control_server.SILENT_FOR} s comes the status" in page
    assert f"{1 / _control_server.PICTURE_EVERY:g} lines a second at most" in page
    assert _control_server.LOOK_EVERY == 0.5
    assert "looked at twice a second" in page


@pytest.mark.skipif(shutil.which("nc") is None, reason="needs nc")
async def test_nc_is_enough(mill: Mill) -> None:
    """It gets the status for nothing, and answers for lines."""
    async with served(mill) as (_, path):
        done = await trio.run_process(
            ["nc", "-NU", str(path)], stdin=b"resize 3\nworkers", capture_stdout=True, capture_stderr=True, check=False
        )
        if b"invalid option" in done.stderr:
            pytest.skip("this is another nc than OpenBSD's")
    answers = map(json.loads, done.stdout.splitlines())
    resized, workers = (answer for answer in answers if not answer.get("unasked"))  # which comes if nc is slow to ask
    assert resized["to"] == 3
    assert len(workers["workers"]) == 3
