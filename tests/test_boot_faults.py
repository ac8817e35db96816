"""Workers that never become ready, as real processes: what is said of it, and that the pool tries again in time."""

import errno
import itertools
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from tests.support import require, until
from trio_workers import (
    AllocateTimeout,
    Config,
    Payload,
    PipeFactory,
    Pool,
    Restart,
    RestartLimitExceeded,
    SocketFactory,
    SpawnError,
    Worker,
    WorkerCrashed,
    WorkerEvent,
    WorkerState,
    _process,
    open_pool,
    open_worker,
)

pytestmark = pytest.mark.faults

ROOT: Final = Path(__file__).parent.parent
GOOD: Final = [sys.executable, "-S", str(Path(__file__).parent / "workers" / "worker.py")]
TCP: Final = SocketFactory("tcp://127.0.0.1:0")


def config(command: Any, **changes: Any) -> Config:
    fields: dict[str, Any] = {
        "command": command,
        "num_workers": 1,
        "boot_timeout": 30.0,
        "allocate_timeout": 30.0,
        "destroy_timeout": 10.0,
        "env": {"PYTHONPATH": str(ROOT), "SECRET": "hunter2"},
        "restart": Restart(initial=0.05, factor=2.0, jitter=0.0),
        "name": "boots",
    }
    return Config(**{**fields, **changes})


def python(source: str) -> list[str]:
    return [sys.executable, "-S", "-c", source]


def ready(pool: Pool) -> bool:
    return [worker.state.value for worker in pool.workers] == [WorkerState.READY] * pool.config.num_workers


async def fails_to_open(of: Config) -> SpawnError:
    """Open a pool and a single worker: both fail alike, and within their time."""
    for opener in (open_worker, open_pool):
        with trio.fail_after(20), pytest.raises(SpawnError) as caught:
            async with opener(of):
                pytest.fail("it opened")
    error = caught.value
    assert error.started is False
    assert error.slot == 0
    assert "hunter2" not in str(error)
    assert "hunter2" not in repr(of)
    return error


# opening


@pytest.mark.parametrize("factory", [PipeFactory(), PipeFactory("socketpair"), TCP], ids=["pipe", "socketpair", "tcp"])
async def test_program_missing(factory: Any) -> None:
    """Bad input: a program that isn't there is a SpawnError that names it, with the system's error as cause."""
    error = await fails_to_open(config(["no-such-program", "an argument"], factory=factory))
    assert "['no-such-program', 'an argument']" in str(error)
    assert "('no-such-program' is not to be found on PATH, or not executable)" in str(error)
    assert (error.phase, error.pid, error.returncode) == ("spawn", None, None)
    assert isinstance(error.__cause__, FileNotFoundError)


async def test_program_not_executable(tmp_path: Path) -> None:
    """Bad input: a file that can't be executed."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    error = await fails_to_open(config([program]))
    assert f"({str(program)!r} does not exist, or is not executable)" in str(error)  # nobody looks on PATH for a path
    assert (error.phase, error.pid) == ("spawn", None)
    assert isinstance(error.__cause__, PermissionError)


async def test_no_such_interpreter(tmp_path: Path) -> None:
    """Bad input: the first line of a script names an interpreter that isn't there."""
    program = tmp_path / "program"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    error = await fails_to_open(config([program]))
    assert str(program) in str(error)
    assert isinstance(error.__cause__, FileNotFoundError)


async def test_wrong_directory(tmp_path: Path) -> None:
    """Bad input: a directory that isn't there is named, as well as the program."""
    error = await fails_to_open(config(GOOD, cwd=tmp_path / "missing"))
    assert str(tmp_path / "missing") in str(error)
    assert repr(GOOD[0]) in str(error)
    assert error.phase == "spawn"
    assert isinstance(error.__cause__, FileNotFoundError)


@pytest.mark.parametrize("factory", [PipeFactory(), PipeFactory("socketpair"), TCP], ids=["pipe", "socketpair", "tcp"])
async def test_exits_at_boot(factory: Any) -> None:
    """Bad input: an exit before the handshake: status, pid, and what it said on stderr."""
    source = "import sys\nfor i in range(30): print('line', i, file=sys.stderr)\nsys.exit(7)"
    error = await fails_to_open(config(python(source), factory=factory))
    assert (error.phase, error.returncode, error.signal) == ("handshake", 7, None)
    assert error.pid
    assert error.stderr.endswith("line 28\nline 29")
    assert any("line 29" in note for note in error.__notes__)
    assert "status 7" in str(error)
    assert repr(source) in str(error)


async def test_killed_at_boot() -> None:
    """Bad input: a signal before the handshake."""
    error = await fails_to_open(config(python("import os; os.kill(os.getpid(), 9)")))
    assert (error.phase, error.returncode, error.signal) == ("handshake", -9, 9)
    assert "SIGKILL" in str(error)


async def test_prints_at_boot() -> None:
    """Bad input: text on stdout where the handshake belongs is shown."""
    source = "import time; print('Warning: \\x1b[31mall is lost', flush=True); time.sleep(1000)"
    error = await fails_to_open(config(python(source)))
    assert "Warning: " in str(error)
    assert "all is lost" in str(error)
    assert "\x1b" not in str(error)
    assert "stdout" in str(error)
    assert (error.phase, error.signal) == ("handshake", 9)


async def test_prints_and_exits_at_boot() -> None:
    """Bad input: the first bytes of stdout and the exit status of a program that said why and left."""
    error = await fails_to_open(config(python("print('All is lost'); raise SystemExit(3)")))
    assert "All is lost" in str(error)
    assert error.phase == "handshake"


async def test_missing_php_script() -> None:
    """Bad input: PHP reports a script that isn't there on stdout."""
    error = await fails_to_open(config([require("php"), "missing.php"]))
    assert "Could not open input file" in str(error)


@pytest.mark.parametrize("factory", [PipeFactory(), PipeFactory("socketpair"), TCP], ids=["pipe", "socketpair", "tcp"])
async def test_never_answers(factory: Any) -> None:
    """Bad input: a program that says nothing is killed after `boot_timeout`, and the error names that field."""
    source = "import sys, time; print('still here', file=sys.stderr, flush=True); time.sleep(1000)"
    error = await fails_to_open(config(python(source), factory=factory, boot_timeout=0.3))
    assert "boot_timeout" in str(error)
    assert (error.phase, error.signal) == ("handshake", 9)


async def test_half_a_handshake() -> None:
    """Bad input: half a handshake is no handshake, and the error shows it."""
    error = await fails_to_open(config(["sh", "-c", "printf '\\023\\011'; exec sleep 1000"], boot_timeout=2.0))
    assert "boot_timeout" in str(error)
    assert "\\x13\\t" in str(error)


@pytest.mark.parametrize(
    ("pool_speaks", "worker_speaks"), list(itertools.permutations(("goridge-1", "goridge-2", "goridge-3"), 2))
)
async def test_wrong_dialect(pool_speaks: str, worker_speaks: str) -> None:
    """Bad input: a worker of another dialect is a SpawnError, however it takes what it is told."""
    command = ["env", f"TRIO_WORKERS_PROTOCOL={worker_speaks}", *GOOD]
    error = await fails_to_open(config(command, protocol=pool_speaks, boot_timeout=1.0))
    assert error.phase == "handshake"
    assert "Config.protocol" in str(error)
    assert pool_speaks in str(error)


async def test_function_that_raises() -> None:
    """Bad input: a `command` or `env` function that raises or gives nonsense is the cause of a SpawnError."""

    def fails(slot: int) -> Any:
        raise KeyError(f"nothing for slot {slot}")

    error = await fails_to_open(config(fails))
    assert isinstance(error.__cause__, KeyError)
    assert "nothing for slot 0" in str(error)
    error = await fails_to_open(config(GOOD, env=fails))
    assert isinstance(error.__cause__, KeyError)
    error = await fails_to_open(config(lambda slot: "a string"))
    assert isinstance(error.__cause__, TypeError)
    assert "Config.command" in str(error)
    error = await fails_to_open(config(GOOD, env=lambda slot: {"SECRET": 12345}))
    assert isinstance(error.__cause__, TypeError)
    assert "Config.env" in str(error)
    assert "12345" not in str(error)


async def test_first_failure_ends_the_opening() -> None:
    """Promise 1: one bad worker among good and slow ones ends the opening with its own error, and nothing is left."""

    def command(slot: int) -> list[str]:
        return python("raise SystemExit(5)") if slot == 2 else GOOD if slot else python("import time; time.sleep(1000)")

    with trio.fail_after(20), pytest.raises(SpawnError) as caught:
        async with open_pool(config(command, num_workers=4)):
            pytest.fail("it opened")
    assert (caught.value.slot, caught.value.returncode) == (2, 5)


# while running


class Spawns:
    """Counts what the pool asks of the system, and may refuse it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.refuse: OSError | None = None
        self._lock = threading.Lock()
        spawn = subprocess.Popen

        def popen(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.count += 1
            if self.refuse is not None:
                raise self.refuse
            return spawn(*args, **kwargs)

        monkeypatch.setattr(_process.subprocess, "Popen", popen)


@pytest.fixture
def spawns(monkeypatch: pytest.MonkeyPatch) -> Spawns:
    return Spawns(monkeypatch)


def most_failures(elapsed: float) -> int:
    """How often a slot with this file's `Restart` can have failed in this time: at 0, 0.05, 0.15, 0.35, ... seconds."""
    count = 1
    while 0.05 * (2**count - 1) <= elapsed:
        count += 1
    return count


async def suffers(pool: Pool, told: list[object], spawns: Spawns) -> tuple[SpawnError, AllocateTimeout]:
    """Crash the only worker: the job pays, the next one waits in vain and says why, and the slot does not spin."""
    began, before, failed = trio.current_time(), spawns.count, pool.statistics().failed_starts
    with pytest.raises(WorkerCrashed):
        await pool.exec(Payload(b"exit 1"))
    await until(lambda: pool.statistics().failed_starts > failed)  # so that the next job can say why
    with pytest.raises(AllocateTimeout) as caught:
        await pool.exec(Payload(b"in vain"))
    assert caught.value.started is False
    await until(lambda: pool.statistics().failed_starts >= 2)
    failures = pool.statistics().failed_starts
    assert failures <= most_failures(trio.current_time() - began)
    assert spawns.count - before <= failures + 1
    errors = [error for error in told if isinstance(error, SpawnError)]
    assert len(errors) == failures
    assert isinstance(caught.value.last_spawn_error, SpawnError)
    assert str(caught.value.last_spawn_error) in str(caught.value)
    return errors[0], caught.value


async def recovers(pool: Pool) -> None:
    with trio.fail_after(30):
        while True:
            try:
                assert await pool.exec(Payload(b"well again")) == Payload(b"well again")
                break
            except AllocateTimeout:
                continue
    await until(lambda: ready(pool))


@pytest.mark.parametrize(
    "refused",
    [
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.E2BIG, "Argument list too long"),
    ],
    ids=["EAGAIN", "ENOMEM", "EMFILE", "E2BIG"],
)
@pytest.mark.parametrize("factory", [PipeFactory(), TCP], ids=["pipe", "tcp"])
async def test_spawn_refused(refused: OSError, factory: Any, spawns: Spawns, caplog: pytest.LogCaptureFixture) -> None:
    """Promise 6: a refused spawn is the ERROR event, the log and `last_spawn_error`; it heals, and never spins."""
    told: list[object] = []

    def observe(event: WorkerEvent, worker: Worker | None, context: object) -> None:
        if event is WorkerEvent.ERROR:
            told.append(context)

    async with open_pool(config(GOOD, factory=factory, allocate_timeout=0.2), observer=observe) as pool:
        spawns.refuse = refused
        error, _ = await suffers(pool, told, spawns)
        assert refused.strerror
        assert refused.strerror in str(error)
        assert error.__cause__ is refused
        assert (error.phase, error.pid) == ("spawn", None)
        assert refused.strerror in caplog.text
        assert "boots[0]: worker (slot 0) could not be started" in caplog.text  # there is no pid to name
        assert "None" not in caplog.text
        spawns.refuse = None
        await recovers(pool)


async def test_program_deleted(tmp_path: Path, spawns: Spawns, caplog: pytest.LogCaptureFixture) -> None:
    """Promise 6: a program deleted while the pool runs, and put back."""
    program = tmp_path / "program"

    def install() -> None:
        # What is being written can't be executed.
        new = tmp_path / "new"
        new.write_text(f"#!/bin/sh\nexec {GOOD[0]} {GOOD[1]} {GOOD[2]}\n")
        new.chmod(0o755)
        new.rename(program)

    told: list[object] = []

    def observe(event: WorkerEvent, worker: Worker | None, context: object) -> None:
        if event is WorkerEvent.ERROR:
            told.append(context)

    install()
    async with open_pool(config([program], allocate_timeout=0.2), observer=observe) as pool:
        await recovers(pool)
        program.unlink()
        error, _ = await suffers(pool, told, spawns)
        assert isinstance(error.__cause__, FileNotFoundError)
        assert str(program) in str(error)
        assert str(program) in caplog.text
        install()
        await recovers(pool)


async def test_no_descriptors_left(spawns: Spawns, caplog: pytest.LogCaptureFixture) -> None:
    """Promise 6: out of descriptors (a lowered limit): jobs go on where workers are, and later it heals."""
    told: list[object] = []

    def observe(event: WorkerEvent, worker: Worker | None, context: object) -> None:
        if event is WorkerEvent.ERROR:
            told.append(context)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with open_pool(config(GOOD, allocate_timeout=0.2), observer=observe) as pool:
        top = max(int(name) for name in os.listdir("/proc/self/fd"))
        taken: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (top + 8, hard))
        try:
            # What the dead worker gives back is not enough for another one.
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            assert await pool.exec(Payload(b"still served")) == Payload(b"still served")
            with pytest.raises(WorkerCrashed):
                await pool.exec(Payload(b"exit 1"))
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            began = trio.current_time()
            await until(lambda: pool.statistics().failed_starts)  # so that the next job can say why
            with pytest.raises(AllocateTimeout) as caught:
                await pool.exec(Payload(b"in vain"))
            await until(lambda: pool.statistics().failed_starts >= 3)
            assert pool.statistics().failed_starts <= 1 + most_failures(trio.current_time() - began)
            error = caught.value.last_spawn_error
            assert error is not None
            assert isinstance(error.__cause__, OSError)
            assert error.__cause__.errno == errno.EMFILE
            assert "Too many open files" in str(caught.value)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
        assert "Too many open files" in caplog.text
        assert any(isinstance(one, SpawnError) for one in told)
        await recovers(pool)


async def test_listener_out_of_descriptors() -> None:
    """Promise 10: a listener that can't accept for want of descriptors accepts again when there are some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with open_pool(config(GOOD, factory=TCP, allocate_timeout=0.2)) as pool:
        top = max(int(name) for name in os.listdir("/proc/self/fd"))
        taken: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (top + 8, hard))
        try:
            with pytest.raises(WorkerCrashed):
                await pool.exec(Payload(b"exit 1"))
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            await trio.sleep(0.2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
        await recovers(pool)


async def test_gives_up(tmp_path: Path) -> None:
    """Promise 6: after `give_up_after` failed boots in a row the block ends with RestartLimitExceeded, and says why."""
    broken = tmp_path / "broken"

    def command(slot: int) -> list[str]:
        return python("import sys; sys.exit('no licence')") if broken.exists() else GOOD

    began = False
    with trio.fail_after(30), pytest.raises(RestartLimitExceeded) as caught:
        async with open_pool(config(command, num_workers=2, restart=Restart(initial=0.01, give_up_after=4))) as pool:
            began = True
            broken.touch()
            with pytest.raises(WorkerCrashed):
                await pool.exec(Payload(b"exit 1"))
            await trio.sleep_forever()
    assert began
    assert isinstance(caught.value.__cause__, SpawnError)
    assert "no licence" in caught.value.__cause__.stderr
    assert pool.statistics().failed_starts == 4
