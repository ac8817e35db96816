"""How workers come to life and connect, and who does not get in."""

# ruff: noqa: ASYNC110, ASYNC222, ASYNC240 - tests may block for a moment, and wait for states that no event tells

import contextlib
import fcntl
import functools
import logging
import os
import resource
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from tests.test_races import InOrder
from trio_workers import _factories, _identity, _platform, _sockets
from trio_workers._conversation import Replied
from trio_workers._factories import Factory, PipeFactory, Spawner
from trio_workers._goridge import PROTOCOLS, encode_control, encode_job
from trio_workers._platform import PIPE_SIZE, Linux, Platform, Portable
from trio_workers._process import Launch, OsProcess, WorkerProcess
from trio_workers._relay import FdRelay, Line, LineEnded
from trio_workers._sockets import SocketFactory

PACKAGE_PARENT = str(Path(_factories.__file__).parents[1])
WORKER = (sys.executable, str(Path(__file__).parent / "workers" / "worker.py"))
LAUNCH = Launch(
    argv=WORKER,
    env={"PATH": os.environ["PATH"], "PYTHONPATH": PACKAGE_PARENT},
    slot=0,
    label="pool[0]",
    protocol="goridge-3",
    max_frame_size=1024 * 1024,
)
NEVER = attrs.evolve(LAUNCH, argv=("sleep", "1000"))
"""A worker that never connects."""
TCP = SocketFactory("tcp://127.0.0.1:0")
LISTENS = pytest.mark.parametrize("scheme", ["tcp", "unix"])


@pytest.fixture(params=[Linux, Portable])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Platform:
    if request.param is Linux and sys.platform != "linux":
        pytest.skip("not on this system")
    here: Platform = request.param()
    monkeypatch.setattr(_platform, "HERE", here)
    return here


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "door"


@pytest.fixture
def factory_of(socket_path: Path) -> Callable[[str], Factory]:
    def make(name: str) -> Factory:
        return {
            "pipe": PipeFactory(),
            "socketpair": PipeFactory("socketpair"),
            "tcp": TCP,
            "tcp6": SocketFactory("tcp://[::1]:0"),
            "unix": SocketFactory(f"unix://{socket_path}"),
        }[name]

    return make


@contextlib.asynccontextmanager
async def opened(factory: Factory) -> AsyncIterator[Any]:
    """Open a factory as a pool does: the spawner is closed first, which ends what it has in the nursery."""
    async with trio.open_nursery() as nursery:
        spawner = await factory.open(nursery)
        try:
            yield spawner
        finally:
            spawner.close()
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def spawned(spawner: Spawner, launch: Launch = LAUNCH) -> AsyncIterator[WorkerProcess]:
    """Run a process of a spawner; in the end it is killed and reaped."""
    process = await spawner.spawn(launch)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.drain_stderr)
            yield process
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait_exit()
            process.finish()
            process.reap()


@contextlib.asynccontextmanager
async def connected(spawner: Spawner, process: WorkerProcess, launch: Launch = LAUNCH) -> AsyncIterator[Line]:
    line = await spawner.connect(process, launch)
    try:
        if line.peer is None:
            await line.shake_hands()
        yield line
    finally:
        line.relay.close()


async def echo(line: Line, body: bytes = b"hello", protocol: str = "goridge-3") -> None:
    """Send one job and get it back."""
    assert line.begin(encode_job(protocol, b"echo", body)) is None
    await line.flush()
    while (event := line.read()) is None:
        await line.relay.wait_readable()
    assert event == Replied(b"echo", body)


async def works(spawner: Spawner, launch: Launch = LAUNCH) -> None:
    """Run a worker that gets in and does a job."""
    async with spawned(spawner, launch) as process, connected(spawner, process, launch) as line:
        await echo(line, protocol=launch.protocol)


def behind(wrapper: str) -> Launch:
    return attrs.evolve(LAUNCH, argv=("sh", "-c", wrapper, "sh", *WORKER))


async def dial(spawner: Any) -> trio.SocketStream:
    """Connect as a stranger."""
    scheme, _, rest = spawner.url.partition("://")
    if scheme == "unix":
        return await trio.open_unix_socket(rest)
    host, _, port = rest.rpartition(":")
    return await trio.open_tcp_stream(host.strip("[]"), int(port))


async def read_to_end(stream: trio.SocketStream) -> bytes:
    data = b""
    with contextlib.suppress(trio.BrokenResourceError):  # it may end by a reset
        async for part in stream:
            data += part
    return data


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "trio_workers.relay"]


# descriptions


@pytest.mark.parametrize("transport", ["", "pipes", "PIPE"])
def test_transport_that_does_not_exist(transport: Any) -> None:
    """The error names the field and what may stand there."""
    with pytest.raises(ValueError, match="transport must be"):
        PipeFactory(transport)
    with pytest.raises(TypeError, match="transport must be"):
        PipeFactory(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("", "begin with"),
        ("127.0.0.1:80", "begin with"),
        ("udp://127.0.0.1:80", "begin with"),
        ("tcp:127.0.0.1:80", "begin with"),
        ("tcp://127.0.0.1", "port"),
        ("tcp://127.0.0.1:", "port"),
        ("tcp://127.0.0.1:x", "port"),
        ("tcp://127.0.0.1:-1", "port"),
        ("tcp://127.0.0.1:65536", "port"),
        ("tcp://127.0.0.1:\u0661", "port"),  # a digit, but not of ASCII
        ("tcp://:80", "host"),
        ("tcp://example.org:80", "host"),
        ("tcp://::1:80", "brackets"),
        ("tcp://[127.0.0.1]:80", "brackets"),
        ("tcp://[]:80", "host"),
        ("tcp://0.0.0.0:80", "beyond_loopback"),
        ("tcp://192.0.2.1:80", "beyond_loopback"),
        ("tcp://[::]:80", "beyond_loopback"),
        ("unix://", "absolute"),
        ("unix://relative/path", "absolute"),
        ("unix:///directory/", "absolute"),
        ("unix:///a\0b", "absolute"),
        ("unix:///" + "é" * 60, "121 bytes"),
    ],
)
def test_address_that_does_not_work(address: str, why: str) -> None:
    """Each is refused at construction, by an error that names the field, the value, and what is wrong."""
    with pytest.raises(ValueError, match=why) as caught:
        SocketFactory(address)
    assert "SocketFactory.address" in str(caught.value)
    assert repr(address) in str(caught.value)


def test_types_of_an_address() -> None:
    """A wrong type is a TypeError that names the field."""
    with pytest.raises(TypeError, match=r"address must be a str"):
        SocketFactory(Path("/tmp/x"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="beyond_loopback"):
        SocketFactory("tcp://127.0.0.1:0", beyond_loopback=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:"),
        ("tcp://localhost:0", "tcp://127.0.0.1:"),
        ("tcp://[::1]:0", "tcp://[::1]:"),
        ("tcp://0.0.0.0:0", "tcp://127.0.0.1:"),
        ("tcp://[::]:0", "tcp://[::1]:"),
    ],
)
async def test_address_that_workers_are_told(address: str, url: str) -> None:
    """It has the port that was found free, and is one to connect to."""
    async with opened(SocketFactory(address, beyond_loopback=True)) as spawner:
        assert spawner.url.startswith(url)
        assert int(spawner.url.removeprefix(url)) > 0
        await works(spawner)


def test_descriptions_are_values() -> None:
    """Frozen, comparable, with a `repr` that says what they are."""
    assert TCP == SocketFactory("tcp://127.0.0.1:0") != SocketFactory("tcp://127.0.0.1:1")
    assert repr(PipeFactory()) == "PipeFactory(transport='pipe')"
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        TCP.address = "x"  # type: ignore[misc]


# connecting


@pytest.mark.parametrize("name", ["pipe", "socketpair", "tcp", "tcp6", "unix"])
async def test_connect(platform: Platform, name: str, factory_of: Callable[[str], Factory]) -> None:
    """Several workers of one spawner, each with its own line."""
    async with opened(factory_of(name)) as spawner, contextlib.AsyncExitStack() as stack:
        processes = [await stack.enter_async_context(spawned(spawner)) for _ in range(3)]
        lines = [await stack.enter_async_context(connected(spawner, process)) for process in processes]
        for process, line in zip(processes, lines, strict=True):
            assert line.peer == process.pid
            await echo(line, os.urandom(300_000))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["pipe", "tcp", "unix"])
async def test_connect_in_each_dialect(protocol: str, name: str, factory_of: Callable[[str], Factory]) -> None:
    """The dialect is that of the launch."""
    env = {**LAUNCH.env, "TRIO_WORKERS_PROTOCOL": protocol}
    async with opened(factory_of(name)) as spawner:
        await works(spawner, attrs.evolve(LAUNCH, protocol=protocol, env=env))


@pytest.mark.parametrize("name", ["pipe", "socketpair", "tcp", "unix"])
async def test_worker_behind_a_shell(platform: Platform, name: str, factory_of: Callable[[str], Factory]) -> None:
    """What a wrapper started is its worker: over pipes the pipe proves it, else the process group."""
    async with opened(factory_of(name)) as spawner:
        launch = behind('exec 3<&0; "$@" <&3 & wait')
        async with spawned(spawner, launch) as process, connected(spawner, process) as line:
            assert line.peer is not None
            assert line.peer != process.pid == os.getpgid(line.peer)
            await echo(line)


async def test_ends_of_the_pipes(platform: Platform, capfd: pytest.CaptureFixture[str]) -> None:
    """Ours don't block, the worker's do; they are grown where that can be had; the worker is told "pipes"."""
    code = (
        "import os, sys; os.write(2, f'{os.get_blocking(0)} {os.get_blocking(1)} {os.environ[\"RR_RELAY\"]}'.encode())"
    )
    for factory in (PipeFactory(), PipeFactory("socketpair")):
        async with opened(factory) as spawner:
            launch = attrs.evolve(LAUNCH, argv=(sys.executable, "-S", "-c", code))
            async with spawned(spawner, launch) as process:
                line = await spawner.connect(process, launch)
                assert line.peer is None
                relay = line.relay
                assert isinstance(relay, FdRelay)
                ends = (relay._read_fd, relay._write_fd)
                assert [os.get_blocking(fd) for fd in ends] == [False, False]
                if factory.transport == "pipe" and isinstance(platform, Linux):
                    assert [fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) for fd in ends] == [PIPE_SIZE, PIPE_SIZE]
                await process.wait_exit()
                relay.close()
            assert process.stderr_tail == "True True pipes"


@LISTENS
async def test_stdin_and_stdout_beside_a_socket(
    platform: Platform, scheme: str, factory_of: Callable[[str], Factory]
) -> None:
    """The worker reads nothing from its stdin, and its stdout is logged with its stderr."""
    async with opened(factory_of(scheme)) as spawner:
        launch = attrs.evolve(LAUNCH, argv=("sh", "-c", 'cat; echo "$RR_RELAY"'))
        async with spawned(spawner, launch) as process:
            await process.wait_exit()
        assert process.stderr_tail == spawner.url


@pytest.mark.parametrize("name", ["pipe", "socketpair", "tcp", "unix"])
@pytest.mark.parametrize("change", [{"argv": ("/no/such/program",)}, {"cwd": "/no/such/directory"}])
async def test_what_can_not_start(name: str, change: dict[str, Any], factory_of: Callable[[str], Factory]) -> None:
    """The error comes through; nothing is left, nobody is expected, and the next one starts."""
    async with opened(factory_of(name)) as spawner:
        with pytest.raises(FileNotFoundError):
            await spawner.spawn(attrs.evolve(LAUNCH, **change))
        await works(spawner)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["pipe", "socketpair", "tcp", "unix"])
async def test_out_of_descriptors(name: str, factory_of: Callable[[str], Factory]) -> None:
    """Whichever descriptor of a spawn can't be had: EMFILE, nothing is left, and it works once there are enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    failures = 0
    async with opened(factory_of(name)) as spawner:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            process: WorkerProcess | None = None
            while process is None:
                try:
                    process = await spawner.spawn(attrs.evolve(LAUNCH, argv=("true",)))
                except OSError:
                    failures += 1
                    os.close(held.pop())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in held:
                os.close(fd)
        await process.wait_exit()
        process.finish()
        assert process.reap() == 0
        assert failures > 5
        await works(spawner)


@pytest.mark.parametrize("name", ["pipe", "socketpair", "tcp", "unix"])
async def test_line_that_nobody_took(platform: Platform, name: str, factory_of: Callable[[str], Factory]) -> None:
    """A process that is reaped without `connect` leaves no relay, also where it had connected."""
    async with opened(factory_of(name)) as spawner:
        async with spawned(spawner) as process:
            if isinstance(spawner, _sockets._SocketSpawner):
                await spawner._expected[process.pid].arrived.wait()
        if isinstance(spawner, _sockets._SocketSpawner):
            assert spawner._expected == {}


@LISTENS
async def test_cancelled_connect_loses_nothing(scheme: str, factory_of: Callable[[str], Factory]) -> None:
    """The connection is still there for the next call."""
    async with opened(factory_of(scheme)) as spawner, spawned(spawner) as process:
        with trio.CancelScope() as scope:
            scope.cancel()
            await spawner.connect(process, LAUNCH)
        assert scope.cancelled_caught
        async with connected(spawner, process) as line:
            await echo(line)


@pytest.mark.parametrize("first", ["connect", "reap"])
@LISTENS
async def test_reaped_while_connecting(
    scheme: str, first: str, factory_of: Callable[[str], Factory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is reaped in the pass that brings its line: who waits gets the line, or learns that it has ended."""
    order = InOrder()
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr("trio._core._run._r", order)
    async with opened(factory_of(scheme)) as spawner:
        told: list[str] = []

        async def connect(process: WorkerProcess) -> None:
            order.ranks[trio.lowlevel.current_task()] = 1 if first == "connect" else 99
            try:
                line = await spawner.connect(process, LAUNCH)
            except LineEnded:
                told.append("ended")
            else:
                told.append("line")
                assert not line.relay.closed
                line.relay.close()

        async with trio.open_nursery() as nursery, spawned(spawner) as process:
            arrived = spawner._expected[process.pid].arrived
            nursery.start_soon(connect, process)
            await arrived.wait()
            # `connect` goes on in the same pass of the run loop as we do.
            assert told == (["line"] if first == "connect" else [])
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            process.finish()
            process.reap()
        assert told == ["line" if first == "connect" else "ended"]


# strangers


@pytest.mark.parametrize("sends", [b"", b"GET / HTTP/1.0\r\n\r\n", b"\x13", bytes(3_000_000), "claim"])
@LISTENS
async def test_stranger_gets_nothing(
    scheme: str, sends: bytes | str, factory_of: Callable[[str], Factory], caplog: pytest.LogCaptureFixture
) -> None:
    """Silent, garbage, oversize, or with the pid of a worker that boots: refused before a byte goes out to it."""
    async with opened(factory_of(scheme)) as spawner:
        async with spawned(spawner, NEVER) as process, await dial(spawner) as stranger:
            data = encode_control("goridge-3", b'{"pid":%d}' % process.pid) if isinstance(sends, str) else sends
            with contextlib.suppress(trio.BrokenResourceError):
                await stranger.send_all(data)
            assert await read_to_end(stranger) == b""
        await works(spawner)
    (refusal,) = refusals(caplog)
    assert "no worker that is expected" in refusal
    assert spawner.url in refusal


@LISTENS
async def test_stranger_when_nobody_is_expected(
    scheme: str, factory_of: Callable[[str], Factory], caplog: pytest.LogCaptureFixture
) -> None:
    """It is refused without even asking the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_identity, "group_of", None)
        async with opened(factory_of(scheme)) as spawner, await dial(spawner) as stranger:
            assert await read_to_end(stranger) == b""
    assert "no worker is expected" in refusals(caplog)[0]


@pytest.mark.faults
@pytest.mark.parametrize("size", [0, 3])
@LISTENS
async def test_hundreds_of_strangers(
    scheme: str, size: int, factory_of: Callable[[str], Factory], caplog: pytest.LogCaptureFixture
) -> None:
    """Real workers still get in, and the log takes it: one line a second, with the number of the others."""
    async with opened(factory_of(scheme)) as spawner, trio.open_nursery() as nursery:
        ends: list[bytes] = []

        async def stranger() -> None:
            with contextlib.suppress(OSError):
                async with await dial(spawner) as stream:
                    with contextlib.suppress(trio.BrokenResourceError):
                        await stream.send_all(bytes(size))
                    ends.append(await read_to_end(stream))

        async with spawned(spawner) as process:
            for _ in range(400):
                nursery.start_soon(stranger)
            async with connected(spawner, process) as line:
                await echo(line)
            await works(spawner)
    assert set(ends) == {b""}
    assert 1 <= len(refusals(caplog)) < 100


@LISTENS
async def test_worker_of_another_is_a_stranger(scheme: str, factory_of: Callable[[str], Factory]) -> None:
    """Two pools on one machine: the worker of one can't get into the other."""
    async with opened(factory_of(scheme)) as spawner, spawned(spawner, NEVER):
        argv = [sys.executable, "-S", "-c", CLAIMS, spawner.url, "own"]
        done = await trio.to_thread.run_sync(functools.partial(subprocess.run, argv, capture_output=True, check=True))
        assert done.stdout == b"received b''\n"


# Connects and claims a pid, its own or another; says what it gets from the pool after that.
CLAIMS = """
import os, socket, struct, sys, zlib
url, claim = sys.argv[1:]
if url.startswith("unix://"):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(url[7:])
else:
    sock = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
payload = b'{"pid":%d}' % (os.getpid() if claim == "own" else int(claim))
head = struct.pack("<BBI", 0x13, 0x09, len(payload))
received = b""
try:
    sock.sendall(head + struct.pack("<IBB", zlib.crc32(head), 0, 0) + payload)
    while data := sock.recv(100):
        received += data
except ConnectionError:
    pass
print("received", bytes(received)[:2], flush=True)
"""


def with_claims(wrapper: str) -> Launch:
    """Return a worker behind a shell that may also run `$CLAIMS`: it has what the program needs in its environment."""
    claims = 'claim() { "$PYTHON" -S -c "$CLAIMS" "$RR_RELAY" "$1"; }; '
    return attrs.evolve(behind(claims + wrapper), env={**LAUNCH.env, "PYTHON": sys.executable, "CLAIMS": CLAIMS})


@LISTENS
async def test_failed_claim_uses_nothing_up(
    platform: Platform, scheme: str, factory_of: Callable[[str], Factory], caplog: pytest.LogCaptureFixture
) -> None:
    """Something of the worker's own group that claims a pid outside it is refused; the worker itself gets in."""
    async with opened(factory_of(scheme)) as spawner:
        launch = with_claims(f'claim {os.getpid()}; "$@" & wait')
        async with spawned(spawner, launch) as process, connected(spawner, process) as line:
            await echo(line)
    (refusal,) = refusals(caplog)
    assert f"it claims pid {os.getpid()}" in refusal


@LISTENS
async def test_first_confirmed_claim_wins(
    platform: Platform, scheme: str, factory_of: Callable[[str], Factory], caplog: pytest.LogCaptureFixture
) -> None:
    """A second connection for the same worker is refused, and the first is none the worse for it."""
    read_fd, write_fd = os.pipe()
    wrapper = f'"$@" & read go </proc/{os.getpid()}/fd/{read_fd}; claim $!'
    async with opened(factory_of(scheme)) as spawner:
        try:
            async with spawned(spawner, with_claims(wrapper)) as process, connected(spawner, process) as line:
                await echo(line)
                os.write(write_fd, b"\n")
                while "received" not in process.stderr_tail:
                    await trio.sleep(0.01)
                await echo(line)
        finally:
            os.close(read_fd)
            os.close(write_fd)
    assert len(refusals(caplog)) == 1


@pytest.fixture
def held_spawn(monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """Hold every spawn, once the process runs, until this is set: the pool does not know its pid yet."""
    event = trio.Event()
    spawn_process = _sockets.spawn_process

    async def hold(*args: Any, **kwargs: Any) -> OsProcess:
        process = await spawn_process(*args, **kwargs)
        await event.wait()
        return process

    monkeypatch.setattr(_sockets, "spawn_process", hold)
    return event


async def visitors(spawner: Any, count: int) -> None:
    while len(spawner._visitors) != count:
        await trio.sleep(0.001)


@LISTENS
async def test_worker_that_connects_before_its_pid_is_known(
    platform: Platform, scheme: str, factory_of: Callable[[str], Factory], held_spawn: trio.Event
) -> None:
    """It waits until the spawn has told, and is not taken for a stranger."""
    async with opened(factory_of(scheme)) as spawner, trio.open_nursery() as nursery:
        nursery.start_soon(works, spawner)
        await visitors(spawner, 1)
        held_spawn.set()


async def test_strangers_while_a_spawn_is_under_way(
    held_spawn: trio.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who may be that worker waits; too many push out the oldest; when the spawn is over the rest is refused."""
    monkeypatch.setattr(_sockets, "CONNECTIONS_UNKNOWN", 3)
    async with opened(TCP) as spawner, contextlib.AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        go = tmp_path / "go"
        nursery.start_soon(works, spawner, behind(f'while [ ! -e {go} ]; do sleep 0.01; done; "$@" & wait'))
        while not spawner._under_way:
            await trio.lowlevel.checkpoint()
        strangers = []
        for number in range(5):
            strangers.append(await stack.enter_async_context(await dial(spawner)))
            await visitors(spawner, min(number + 1, 3))
        for stranger in strangers[:2]:
            assert await read_to_end(stranger) == b""
        held_spawn.set()
        for stranger in strangers[2:]:
            assert await read_to_end(stranger) == b""
        go.touch()
    assert "gave way to newer ones" in refusals(caplog)[0]


@LISTENS
async def test_fallback_gives_up_on_who_says_nothing(
    scheme: str, factory_of: Callable[[str], Factory], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the kernel's word a silent stranger has a deadline, and garbage is shown."""
    monkeypatch.setattr(_platform, "HERE", Portable())
    monkeypatch.setattr(_sockets, "UNKNOWN_FOR", 1.0)
    monkeypatch.setattr(_sockets, "REPORT_EVERY", 0.0)
    hello = encode_control("goridge-3", b'{"pid":%d}' % os.getpid())
    async with opened(factory_of(scheme)) as spawner, spawned(spawner, NEVER):
        async with await dial(spawner) as silent:
            assert await read_to_end(silent) == hello
        monkeypatch.setattr(_sockets, "UNKNOWN_FOR", 60.0)
        for garbage in (b"GET / HTTP/1.0\r\n\r\n", hello, b"\x13\x09" + bytes(10)):
            async with await dial(spawner) as stranger:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stranger.send_all(garbage)
                assert await read_to_end(stranger) in (hello, b"")
    said = refusals(caplog)
    assert len(said) == 4
    assert "too slow" in said[0]
    assert "GET / HTTP" in said[1]
    assert f"claims pid {os.getpid()}" in said[2]
    assert "CRC32" in said[3]


@LISTENS
async def test_connection_of_a_dead_worker_goes_with_it(scheme: str, factory_of: Callable[[str], Factory]) -> None:
    """One that the kernel gave to a worker has no deadline, but ends with that worker."""
    code = """
import os, socket, sys
os.dup2(2, 1)
url = os.environ["RR_RELAY"]
sock = socket.socket(socket.AF_UNIX if url.startswith("unix") else socket.AF_INET)
sock.connect(url[7:] if url.startswith("unix") else ("127.0.0.1", int(url.rpartition(":")[2])))
if os.fork() == 0:
    os.setsid()
    print(os.getpid(), flush=True)
    sock.recv(100)  # our handshake, which it leaves unanswered
    sock.recv(100)
"""
    async with opened(factory_of(scheme)) as spawner:
        launch = attrs.evolve(LAUNCH, argv=(sys.executable, "-S", "-c", code))
        async with spawned(spawner, launch) as process:
            with trio.move_on_after(0.2):
                await spawner.connect(process, LAUNCH)
        await visitors(spawner, 0)


@LISTENS
async def test_bug_in_a_handler_does_not_end_the_server(
    scheme: str, factory_of: Callable[[str], Factory], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It costs one connection and is logged with its traceback."""
    group_of = _identity.group_of
    calls: list[object] = []

    async def fail_once(*args: Any, **kwargs: Any) -> object:
        calls.append(args)
        if len(calls) == 1:
            raise ZeroDivisionError
        return await group_of(*args, **kwargs)

    monkeypatch.setattr(_identity, "group_of", fail_once)
    async with opened(factory_of(scheme)) as spawner:
        async with spawned(spawner, NEVER), await dial(spawner) as stranger:
            assert await read_to_end(stranger) == b""
        await works(spawner)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "bug" in record.getMessage()


@pytest.mark.faults
@LISTENS
async def test_accept_without_descriptors(
    scheme: str, factory_of: Callable[[str], Factory], caplog: pytest.LogCaptureFixture
) -> None:
    """EMFILE while a connection waits to be accepted ends nothing: it is accepted when there is room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    async with opened(factory_of(scheme)) as spawner:
        kind = socket.AF_UNIX if scheme == "unix" else socket.AF_INET
        with trio.socket.socket(kind) as stranger:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 3, hard))
            try:
                with contextlib.suppress(OSError):
                    while True:
                        held.append(os.dup(0))
                address = spawner.url.removeprefix("unix://")
                port = 0 if scheme == "unix" else int(address.rpartition(":")[2])
                await stranger.connect(address if scheme == "unix" else ("127.0.0.1", port))
                while not any(record.name == "trio.serve_listeners" for record in caplog.records):
                    await trio.sleep(0.01)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for fd in held:
                    os.close(fd)
            assert await stranger.recv(1) == b""
        await works(spawner)


# listeners


async def test_port_that_is_taken() -> None:
    """The system's error comes through."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with trio.open_nursery() as nursery:
            with pytest.raises(OSError, match="in use"):
                await SocketFactory(f"tcp://127.0.0.1:{server.getsockname()[1]}").open(nursery)


@pytest.mark.parametrize("umask", [0, 0o077])
async def test_unix_socket_is_private_and_goes_away(platform: Platform, socket_path: Path, umask: int) -> None:
    """Its file is 0600 whatever the umask, and gone at the end."""
    before = os.umask(umask)
    try:
        async with opened(SocketFactory(f"unix://{socket_path}")):
            assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert not socket_path.exists()


async def test_dead_socket_is_replaced(platform: Platform, socket_path: Path) -> None:
    """What a killed pool left behind is in nobody's way."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path))
    async with opened(SocketFactory(f"unix://{socket_path}")) as spawner:
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
        await works(spawner)
    assert not socket_path.exists()


async def test_socket_that_is_alive_is_refused(platform: Platform, socket_path: Path) -> None:
    """Another pool there keeps its socket, and its workers."""
    factory = SocketFactory(f"unix://{socket_path}")
    async with opened(factory) as first:
        async with trio.open_nursery() as nursery:
            with pytest.raises(FileExistsError, match="listening") as caught:
                await factory.open(nursery)
        assert caught.value.filename == str(socket_path)
        await works(first)


async def test_socket_that_is_busy_or_of_another_kind_is_refused(socket_path: Path) -> None:
    """A full backlog, and a datagram socket, are alive too."""
    for kind, backlog in ((socket.SOCK_STREAM, 0), (socket.SOCK_DGRAM, None)):
        with socket.socket(socket.AF_UNIX, kind) as other, socket.socket(socket.AF_UNIX, kind) as client:
            other.bind(str(socket_path))
            if backlog is not None:
                other.listen(backlog)
                client.connect(str(socket_path))
            async with trio.open_nursery() as nursery:
                with pytest.raises(FileExistsError, match="may be in use"):
                    await SocketFactory(f"unix://{socket_path}").open(nursery)
        socket_path.unlink()


@pytest.mark.parametrize("what", ["file", "directory", "link", "link to a dead socket"])
async def test_other_files_are_never_replaced(socket_path: Path, tmp_path: Path, what: str) -> None:
    """Only a socket may be removed, and never through a link."""
    if what == "file":
        socket_path.write_text("precious")
    elif what == "directory":
        socket_path.mkdir()
    else:
        target = tmp_path / "target"
        if what != "link":
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(target))
        socket_path.symlink_to(target)
    before = os.lstat(socket_path)
    async with trio.open_nursery() as nursery:
        with pytest.raises(FileExistsError, match="no socket"):
            await SocketFactory(f"unix://{socket_path}").open(nursery)
    assert os.lstat(socket_path) == before


async def test_directory_that_is_missing(tmp_path: Path) -> None:
    """The error names the path, which the system's own does not."""
    path = str(tmp_path / "missing" / "door")
    async with trio.open_nursery() as nursery:
        with pytest.raises(FileNotFoundError) as caught:
            await SocketFactory(f"unix://{path}").open(nursery)
    assert caught.value.filename == path


async def test_socket_of_somebody_else_is_left(socket_path: Path) -> None:
    """Who has put another file in our place keeps it."""
    async with opened(SocketFactory(f"unix://{socket_path}")):
        socket_path.unlink()
        socket_path.write_text("precious")
    assert socket_path.read_text() == "precious"


@LISTENS
async def test_opening_that_is_cancelled(
    scheme: str, socket_path: Path, factory_of: Callable[[str], Factory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever point it comes: nothing is left, neither a file nor a descriptor."""
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.cancel()
        await factory_of(scheme).open(nursery)
    assert not socket_path.exists()
    async with trio.open_nursery() as nursery:
        with monkeypatch.context() as patch:
            # As if the cancel came once the listener is there.
            patch.setattr(trio.lowlevel, "checkpoint", trio.lowlevel.cancel_shielded_checkpoint)
            spawner = await factory_of(scheme).open(nursery)
            nursery.cancel_scope.cancel()
            spawner.close()
    assert not socket_path.exists()


@LISTENS
async def test_nursery_that_is_closed(scheme: str, socket_path: Path, factory_of: Callable[[str], Factory]) -> None:
    """That is a bug of the caller, who leaves no listener by it."""
    async with trio.open_nursery() as nursery:
        pass
    with pytest.raises(RuntimeError):
        await factory_of(scheme).open(nursery)
    assert not socket_path.exists()


@pytest.mark.parametrize("name", ["pipe", "tcp", "unix"])
async def test_close_at_any_time(name: str, factory_of: Callable[[str], Factory], socket_path: Path) -> None:
    """Before the first connection, while serving, when the nursery has ended: closed once or twice, all is gone."""
    for passes in range(3):
        async with trio.open_nursery() as nursery:
            spawner = await factory_of(name).open(nursery)
            for _ in range(passes):
                await trio.lowlevel.checkpoint()
            spawner.close()
            spawner.close()
            assert not socket_path.exists()
        spawner.close()


@pytest.mark.parametrize("platform", [Linux], indirect=True)
@pytest.mark.parametrize("protocol", ["goridge-1", "goridge-3"])
@LISTENS
async def test_no_delay(platform: Platform, scheme: str, protocol: str, factory_of: Callable[[str], Factory]) -> None:
    """TCP sends small frames at once; only goridge-1 needs the quick acknowledgement."""
    launch = attrs.evolve(LAUNCH, protocol=protocol, env={**LAUNCH.env, "TRIO_WORKERS_PROTOCOL": protocol})
    async with (
        opened(factory_of(scheme)) as spawner,
        spawned(spawner, launch) as process,
        connected(spawner, process, launch) as line,
    ):
        assert isinstance(line.relay, FdRelay)
        assert line.relay.kind == scheme
        assert (line.relay._quick_ack is not None) == (scheme == "tcp" and protocol == "goridge-1")
        with socket.socket(fileno=os.dup(line.relay._read_fd)) as sock:
            if scheme == "tcp":
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
