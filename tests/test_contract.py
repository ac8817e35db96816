"""What every kind of worker is held to: languages, dialects, transports, on what the system has and on the fallbacks.

One pool serves all checks of a case, one after the other: most of the time goes into starting processes.
"""

import os
import sys
from pathlib import Path
from typing import Final, Literal

import pytest
import trio

from tests.support import require, until
from trio_workers import (
    Config,
    Factory,
    JobError,
    Payload,
    PipeFactory,
    Pool,
    Restart,
    SocketFactory,
    Worker,
    WorkerCrashed,
    WorkerError,
    WorkerEvent,
    WorkerState,
    _core,
    _platform,
    _supervise,
    open_pool,
    open_worker,
)

ROOT: Final = Path(__file__).parent.parent
WORKERS: Final = Path(__file__).parent / "workers"
DIALECTS: Final = ("goridge-1", "goridge-2", "goridge-3")
TRANSPORTS: Final = ("pipe", "socketpair", "tcp", "unix")
LARGE: Final = os.urandom(3 << 20)

CASES: Final = [
    *((language, dialect, kind) for language in ("python", "php") for dialect in DIALECTS for kind in TRANSPORTS),
    *((language, "goridge-3", kind) for language in ("node", "perl") for kind in TRANSPORTS),
]


def command_of(language: str) -> list[str]:
    if language == "python":
        return [sys.executable, str(WORKERS / "worker.py")]
    return [
        require(language),
        str(WORKERS / {"php": "worker.php", "node": "worker.mjs", "perl": "worker.pl"}[language]),
    ]


def factory_of(transport: str, tmp_path: Path) -> Factory:
    match transport:
        case "pipe" | "socketpair":
            return PipeFactory(transport=transport)
        case "tcp":
            return SocketFactory("tcp://127.0.0.1:0")
        case _:
            return SocketFactory(f"unix://{tmp_path}/pool.sock")


@pytest.fixture(params=["native", "portable"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the pool knows of the system that it runs on."""
    for module in (_supervise, _core):  # a worker that has closed its socket may be held up on the way to its exit
        monkeypatch.setattr(module, "GRACE", 10.0)
    if request.param == "portable":
        monkeypatch.setattr(_platform, "HERE", _platform.Portable())
    return request.param


@pytest.fixture(params=CASES, ids=["-".join(case) for case in CASES])
def config(request: pytest.FixtureRequest, system: str, tmp_path: Path) -> Config:
    language, dialect, transport = request.param
    return Config(
        command=command_of(language),
        protocol=dialect,
        factory=factory_of(transport, tmp_path),
        num_workers=2,
        allocate_timeout=30.0,
        destroy_timeout=10.0,
        boot_timeout=30.0,
        env={"PYTHONPATH": str(ROOT)},
        restart=Restart(initial=0.02),
        name=language,
    )


def ready(pool: Pool) -> bool:
    return [worker.state.value for worker in pool.workers] == [WorkerState.READY] * pool.config.num_workers


def pids(pool: Pool) -> set[int | None]:
    return {worker.pid for worker in pool.workers}


def account(pool: Pool) -> None:
    now = pool.statistics()
    assert now.idle + now.busy + now.starting + now.leased + now.stopping == len(pool.workers)


async def check_payloads(pool: Pool) -> None:
    """Whatever goes in comes out, with a context and without."""
    for payload in (
        Payload(b"hello"),
        Payload(b"hello", b"context"),
        Payload(b"", b"echo"),
        Payload(b"", b"another context"),
        Payload(b"0"),
        Payload(),
        Payload(bytes(range(256)), bytes(range(256))),
        Payload(b"\0", b"echo"),
        Payload(LARGE, b"echo"),
        Payload(LARGE[:-1], LARGE[: 1 << 16]),
    ):
        assert await pool.exec(payload) == payload
    assert await pool.exec(Payload(b"upper abc", b"c")) == Payload(b"ABC", b"c")
    async with pool.map(Payload(b"%d" % number, b"echo") for number in range(50)) as replies:
        assert [int(reply.body) async for reply in replies] == list(range(50))


async def check_place(pool: Pool) -> None:
    """A worker's pid and slot are what it knows of itself."""
    assert [worker.slot for worker in pool.workers] == [0, 1]
    seen: set[int] = set()
    for _ in range(2):
        async with pool.lease() as worker:
            assert (await worker.exec(Payload(b"slot"))).body == b"%d" % worker.slot
            assert (await worker.exec(Payload(b"pid"))).body == b"%d" % (worker.pid or 0)
            seen.add(worker.slot)
    assert seen == {0, 1}  # the one that has been free for longest is the next


async def check_job_error(pool: Pool) -> None:
    """A job error is the job's alone: the worker stays."""
    before = pids(pool)
    for _ in range(3):
        with pytest.raises(JobError) as caught:
            await pool.exec(Payload(b"fail with these words", b"context"))
        assert b"with these words" in caught.value.message
        assert "with these words" in str(caught.value)
    assert ready(pool)
    assert pids(pool) == before


async def check_stop_request(pool: Pool) -> None:
    """A worker that asks to be replaced is, and the job goes on; at the end of its patience it says so."""
    before = pids(pool)
    async with pool.lease() as worker:
        with pytest.raises(WorkerError) as caught:
            await worker.exec(Payload(b"stop", b"context"))
    assert type(caught.value) is WorkerError
    assert (caught.value.phase, caught.value.started, caught.value.slot) == ("retiring", False, worker.slot)
    await worker.wait()
    assert worker.state.value is WorkerState.STOPPED
    with pytest.raises(WorkerError) as caught:
        await pool.exec(Payload(b"stop"))
    assert (caught.value.phase, caught.value.started) == ("retiring", False)
    # Told to one worker, and handed on as often as there are workers, and once more.
    assert "4 workers in a row" in str(caught.value)
    await until(lambda: ready(pool))
    assert not before & pids(pool)
    assert await pool.exec(Payload(b"again")) == Payload(b"again")


async def check_crash(pool: Pool, *, proof: bool | None) -> None:
    """A crash is told to the job that was on that worker, and to no other."""
    for body, returncode in ((b"exit 7", 7), (b"kill", -9)):
        async with pool.lease() as other:
            await until(lambda: pool.statistics().idle == 1)
            victim = next(worker for worker in pool.workers if worker is not other)
            with pytest.raises(WorkerCrashed) as caught:
                await pool.exec(Payload(body))
            assert await other.exec(Payload(b"still here")) == Payload(b"still here")
        error = caught.value
        assert (error.returncode, error.pid, error.slot) == (returncode, victim.pid, victim.slot)
        assert error.signal == (9 if returncode < 0 else None)
        assert (error.phase, error.started) == ("running", proof)
        assert victim.state.value is WorkerState.ERRORED
        await until(lambda: ready(pool))
        assert victim not in pool.workers


async def check_cancel(pool: Pool) -> None:
    """A cancelled job ends at once and its worker with it, and another one comes."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.exec, Payload(b"sleep 60"))
        await until(lambda: pool.statistics().busy == 1)
        (victim,) = (worker for worker in pool.workers if worker.current is not None)
        nursery.cancel_scope.cancel()
    with pytest.raises(WorkerError, match="cancelled"):
        await victim.wait()
    await until(lambda: ready(pool))
    assert victim.pid not in pids(pool)
    assert await pool.exec(Payload(b"after")) == Payload(b"after")


async def check_stream(pool: Pool) -> None:
    """A stream comes part by part, and is left early without losing its worker."""
    before = pids(pool)
    async with pool.stream(Payload(b"stream 3", b"c")) as parts:
        assert [part async for part in parts] == [Payload(b"part %d" % number, b"c") for number in range(3)]
    async with pool.stream(Payload(b"streamfail 2")) as parts:
        assert [(await anext(parts)).body for _ in range(2)] == [b"part 0", b"part 1"]
        with pytest.raises(JobError, match="told to fail"):
            await anext(parts)
    for count in (0, 1, 200):
        async with pool.stream(Payload(b"streamforever")) as parts:
            for number in range(count):
                assert (await anext(parts)).body == b"part %d" % number
    with pytest.raises(JobError, match="stream"):
        await pool.exec(Payload(b"stream 2"))
    await until(lambda: ready(pool))
    assert pids(pool) == before


async def check_no_stream(pool: Pool) -> None:
    """In the older dialects a reply is one part."""
    async with pool.stream(Payload(b"whole", b"c")) as parts:
        assert [part async for part in parts] == [Payload(b"whole", b"c")]
    with pytest.raises(JobError, match="goridge-3"):
        await pool.exec(Payload(b"stream 2"))


async def test_contract(config: Config, system: str) -> None:
    """Promises 1 to 6: a pool of any workers keeps them, from the handshake to the last soft stop."""
    told: list[tuple[WorkerEvent, Worker | None]] = []
    async with open_pool(config, observer=lambda event, worker, _: told.append((event, worker))) as pool:
        assert ready(pool)
        assert [event for event, _ in told] == [WorkerEvent.CREATED] * 2
        await check_payloads(pool)
        await check_place(pool)
        await check_job_error(pool)
        if config.protocol == "goridge-3":
            await check_stream(pool)
        else:
            await check_no_stream(pool)
        await check_stop_request(pool)
        tells = system == "native" and not (
            isinstance(config.factory, SocketFactory) and config.factory.address.startswith("tcp")
        )
        await check_crash(pool, proof=True if tells else None)
        await check_cancel(pool)
        account(pool)
        last = pool.workers
    for worker in last:
        await worker.wait()
        assert worker.state.value is WorkerState.STOPPED
        assert worker.process is not None
        assert worker.process.peek() == 0
    created = [worker for event, worker in told if event is WorkerEvent.CREATED]
    destructed = [worker for event, worker in told if event is WorkerEvent.DESTRUCT]
    assert len(set(created)) == len(created)
    assert set(created) == set(destructed)
    assert len(created) == len(destructed)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_single_worker(
    transport: Literal["pipe", "socketpair", "tcp", "unix"], system: str, tmp_path: Path
) -> None:
    """Promise 1: `open_worker` is held to the same, and replaces nothing."""
    config = Config(
        command=command_of("python"),
        factory=factory_of(transport, tmp_path),
        env={"PYTHONPATH": str(ROOT)},
        boot_timeout=30.0,
    )
    async with open_worker(config) as worker:
        assert await worker.exec(Payload(LARGE, b"echo")) == Payload(LARGE, b"echo")
        with pytest.raises(JobError, match="told to fail"):
            await worker.exec(Payload(b"fail"))
        async with worker.stream(Payload(b"streamforever")) as parts:
            assert await anext(parts) == Payload(b"part 0")
        # The tail of the stream is read by then: the worker is no longer on a job.
        await until(lambda: worker.state.value is WorkerState.READY)
        assert (await worker.exec(Payload(b"pid"))).body == b"%d" % (worker.pid or 0)
    assert worker.state.value is WorkerState.STOPPED
    async with open_worker(config) as worker:
        with pytest.raises(WorkerCrashed) as caught:
            await worker.exec(Payload(b"exit 3"))
        assert caught.value.returncode == 3
        with pytest.raises(WorkerCrashed):
            await worker.exec(Payload(b"is anybody there?"))
    assert worker.state.value is WorkerState.ERRORED
