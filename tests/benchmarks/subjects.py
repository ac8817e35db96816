"""What is measured: the bare floor, the pool, and the peers, all behind one face.

A subject is opened with a number of workers and then has three operations: `prepare(body)` returns an echo call that
can be awaited again and again (what can be made ready beforehand is); `crash()` ends a worker under a job and returns
when the caller has been told; `pids()` names its workers, which are all up then. The peers are optional: one that is
not installed says so in its row.
"""

import contextlib
import fcntl
import importlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import attrs
import trio

import trio_workers
from tests.benchmarks.abilities import NO_READ_AHEAD
from tests.benchmarks.functions import crash, echo, rest
from trio_workers import Config, Payload, PipeFactory, Pool, WorkerCrashed, open_pool, open_python_pool
from trio_workers._goridge import encode_control, encode_job

Call = Callable[[], Awaitable[object]]

ECHO: Final = "import os\nwhile d := os.read(0, 65536): os.write(1, d)"
WORKER: Final = "from trio_workers.child import serve\nserve(lambda job: job.body)"
CRASHING_WORKER: Final = "import os\nfrom trio_workers.child import serve\nserve(lambda job: job.body or os._exit(1))"
PHP_WORKER: Final = Path(__file__).parent.parent / "workers" / "worker.php"
# The workers use the package that is measured, installed or not.
ENVIRONMENT: Final = {"PYTHONPATH": str(Path(trio_workers.__file__).parent.parent)}

REST: Final = 0.1
"""Seconds that a job keeps its worker, so that another must take the next."""
PIPE_SIZE: Final = 1 << 20
"""Asked for by hand, so that large bodies meet the same pipes as the pool's."""


@attrs.frozen(kw_only=True)
class Opened:
    """A subject with its workers up."""

    prepare: Callable[[bytes], Call]
    crash: Call | None = None
    pids: Callable[[], Awaitable[Sequence[int]]] | None = None
    pool: Pool | None = None


@attrs.frozen
class Subject:
    """Something to be measured. `missing` says why it can't be."""

    name: str
    open: Callable[[int], AbstractAsyncContextManager[Opened]]
    missing: str | None = None


def missing_module(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except ImportError:
        return "not installed: pip install 'trio_workers[bench]'"
    return None


# by hand


@asynccontextmanager
async def open_by_hand(argv: Sequence[str], protocol: str | None, *, socketpair: bool) -> AsyncIterator[Opened]:
    """Start one child and speak to it with bare system calls; with a `protocol`, shake hands first."""
    if socketpair:
        ours, theirs = socket.socketpair()
        reader = writer = ours.detach()
        child_in = child_out = theirs.detach()
    else:
        (child_in, writer), (reader, child_out) = os.pipe(), os.pipe()
        for fd in (writer, reader):
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    environment = {**os.environ, **ENVIRONMENT, "TRIO_WORKERS_PROTOCOL": protocol or ""}
    process = subprocess.Popen(  # noqa: ASYNC220 - before anything is measured
        argv, stdin=child_in, stdout=child_out, env=environment
    )
    for fd in {child_in, child_out}:
        os.close(fd)
    for fd in {reader, writer}:
        os.set_blocking(fd, False)

    def prepare(body: bytes) -> Call:
        frame = b"".join(encode_job(protocol or "goridge-3", b"", body))
        size = len(frame)

        async def call_small() -> None:
            os.write(writer, frame)
            await trio.lowlevel.wait_readable(reader)
            os.read(reader, 65536)

        async def call_large() -> None:
            # The child answers while it reads: where it takes no more, there is or will be something to read.
            unsent = memoryview(frame)
            missing = size
            while missing:
                with contextlib.suppress(BlockingIOError):
                    while unsent:
                        unsent = unsent[os.write(writer, unsent) :]
                await trio.lowlevel.wait_readable(reader)
                with contextlib.suppress(BlockingIOError):
                    while missing:
                        missing -= len(os.read(reader, 65536))

        return call_small if size <= 4096 else call_large

    async def pids() -> Sequence[int]:
        return [process.pid]

    try:
        if protocol is not None:
            os.write(writer, encode_control(protocol, b'{"pid":%d}' % os.getpid()))
            await trio.lowlevel.wait_readable(reader)
            os.read(reader, 65536)
        yield Opened(prepare=prepare, pids=pids)
    finally:
        for fd in {reader, writer}:
            os.close(fd)
        process.wait()


def by_hand(name: str, argv: Sequence[str], protocol: str | None = None, *, socketpair: bool = False) -> Subject:
    return Subject(name, lambda workers: open_by_hand(argv, protocol, socketpair=socketpair))


# the pool


@asynccontextmanager
async def open_ours(cfg: Config, context: bytes, deadly: bytes) -> AsyncIterator[Opened]:
    async with open_pool(cfg) as pool:

        def prepare(body: bytes) -> Call:
            async def call() -> Payload:
                return await pool.exec(Payload(body, context))

            return call

        async def crash() -> None:
            with contextlib.suppress(WorkerCrashed):
                await pool.exec(Payload(deadly))
                raise AssertionError("the worker did not crash")

        async def pids() -> Sequence[int]:
            return [worker.pid for worker in pool.workers if worker.pid is not None]

        yield Opened(prepare=prepare, crash=crash, pids=pids, pool=pool)


def read_ahead_of(depth: int) -> tuple[dict[str, Any], str | None]:
    """Return the config's fields, and what is missing for them; one is what every version does."""
    return ({}, None) if depth == 1 else ({"read_ahead": depth}, NO_READ_AHEAD)


def python_pool(
    name: str,
    program: str = WORKER,
    *,
    transport: Any = "pipe",
    protocol: str = "goridge-3",
    read_ahead: int = 1,
) -> Subject:
    fields, missing = read_ahead_of(read_ahead)

    def open_(workers: int) -> AbstractAsyncContextManager[Opened]:
        cfg = Config(
            command=[sys.executable, "-c", program],
            num_workers=workers,
            factory=PipeFactory(transport=transport),
            protocol=protocol,
            env=ENVIRONMENT,
            **fields,
        )
        return open_ours(cfg, b"", b"")

    return Subject(name, open_, missing)


def php_pool(name: str, protocol: str = "goridge-3", *, read_ahead: int = 1) -> Subject:
    fields, missing = read_ahead_of(read_ahead)

    def open_(workers: int) -> AbstractAsyncContextManager[Opened]:
        cfg = Config(command=["php", str(PHP_WORKER)], num_workers=workers, protocol=protocol, **fields)
        return open_ours(cfg, b"echo", b"exit 1")

    return Subject(name, open_, missing if shutil.which("php") else "php is not on PATH")


@asynccontextmanager
async def open_functions(workers: int) -> AsyncIterator[Opened]:
    async with open_python_pool(workers) as pool:

        def prepare(body: bytes) -> Call:
            async def call() -> bytes:
                return await pool.run_sync(echo, body)

            return call

        async def crash_one() -> None:
            with contextlib.suppress(WorkerCrashed):
                await pool.run_sync(crash)
                raise AssertionError("the worker did not crash")

        async def pids() -> Sequence[int]:
            return [worker.pid for worker in pool.workers if worker.pid is not None]

        yield Opened(prepare=prepare, crash=crash_one, pids=pids)


# the peers


async def bring_up(run: Callable[..., Awaitable[int]], workers: int) -> Sequence[int]:
    """Have every worker do a job; return their pids."""
    pids: set[int] = set()

    async def run_one() -> None:
        pids.add(await run(rest, REST))

    while len(pids) < workers:
        async with trio.open_nursery() as nursery:
            for _ in range(workers):
                nursery.start_soon(run_one)
    return list(pids)


@asynccontextmanager
async def open_trio_parallel(workers: int) -> AsyncIterator[Opened]:
    import trio_parallel

    limiter = trio.CapacityLimiter(workers)
    async with trio_parallel.open_worker_context() as context:

        def prepare(body: bytes) -> Call:
            async def call() -> bytes:
                return await context.run_sync(echo, body, limiter=limiter)

            return call

        async def crash_one() -> None:
            with contextlib.suppress(trio_parallel.BrokenWorkerError):
                await context.run_sync(crash, limiter=limiter)

        async def pids() -> Sequence[int]:
            return await bring_up(lambda *job: context.run_sync(*job, limiter=limiter), workers)

        yield Opened(prepare=prepare, crash=crash_one, pids=pids)


@asynccontextmanager
async def open_anyio(workers: int) -> AsyncIterator[Opened]:
    """Its processes belong to the event loop: they are shared by whoever opens this, and end with `trio.run`."""
    import anyio
    import anyio.to_process

    limiter = anyio.CapacityLimiter(workers)

    def prepare(body: bytes) -> Call:
        async def call() -> bytes:
            return await anyio.to_process.run_sync(echo, body, limiter=limiter)

        return call

    async def crash_one() -> None:
        with contextlib.suppress(anyio.BrokenWorkerProcess):
            await anyio.to_process.run_sync(crash, limiter=limiter)

    async def pids() -> Sequence[int]:
        return await bring_up(lambda *job: anyio.to_process.run_sync(*job, limiter=limiter), workers)

    yield Opened(prepare=prepare, crash=crash_one, pids=pids)


@asynccontextmanager
async def open_executor(workers: int) -> AsyncIterator[Opened]:
    """Started with "spawn", as a program with threads must. A crash ends it as a whole, so it has no `crash`."""
    token = trio.lowlevel.current_trio_token()
    executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))

    async def run(function: Callable[..., Any], *args: Any) -> Any:
        done = trio.Event()

        def tell(future: Future[Any]) -> None:
            token.run_sync_soon(done.set)

        future = executor.submit(function, *args)
        future.add_done_callback(tell)
        await done.wait()
        return future.result()

    def prepare(body: bytes) -> Call:
        async def call() -> object:
            return await run(echo, body)

        return call

    async def pids() -> Sequence[int]:
        return await bring_up(run, workers)

    try:
        yield Opened(prepare=prepare, pids=pids)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(executor.shutdown)


FLOOR: Final = by_hand("bare floor: by hand to an echo child", [sys.executable, "-S", "-c", ECHO])
FLOOR_SOCKETPAIR: Final = by_hand("bare floor over a socketpair", [sys.executable, "-S", "-c", ECHO], socketpair=True)
BY_HAND: Final = by_hand("by hand to the pool's Python worker", [sys.executable, "-c", WORKER], "goridge-3")
POOL: Final = python_pool("trio_workers, Python worker")
POOL_SOCKETPAIR: Final = python_pool("trio_workers, Python worker, socketpair", transport="socketpair")
RUN_SYNC: Final = Subject("trio_workers, run_sync", open_functions)
CRASHING_POOL: Final = python_pool("trio_workers, Python worker", CRASHING_WORKER)
PHP: Final = php_pool("trio_workers, PHP worker")
PHP_2: Final = php_pool("trio_workers, PHP worker, goridge-2", "goridge-2")
PHP_1: Final = php_pool("trio_workers, PHP worker, goridge-1", "goridge-1")
TRIO_PARALLEL: Final = Subject("trio-parallel", open_trio_parallel, missing_module("trio_parallel"))
ANYIO: Final = Subject("anyio.to_process on trio", open_anyio, missing_module("anyio"))
EXECUTOR: Final = Subject("ProcessPoolExecutor, awaited from trio", open_executor)
PEERS: Final = (TRIO_PARALLEL, ANYIO, EXECUTOR)
