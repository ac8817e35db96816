"""What becomes of workers when the pool's own process is interrupted, killed, forked, or not alone with its children.

Each test runs an application as a process of its own, and follows its workers by the pids that they note in a file.
"""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and the kernel's life line"),
]

ROOT: Final = Path(__file__).parent.parent

# A worker notes its pid, and those of the children that it makes, before it does anything else.
WORKER: Final = """
import ctypes, os, signal, subprocess, sys, time
from trio_workers.child import serve

def note(what, pid):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{what} {pid}\\n")

def handle(job):
    exec(job.body)
    return b"%d" % os.getpid()

note("worker", os.getpid())
for line in os.environ.get("AT_BOOT", "").splitlines():
    exec(line)
serve(handle)
"""

APPLICATION: Final = """
import os, signal, sys
import trio
from trio_workers import *

def note(what, pid):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{what} {pid}\\n")

def config(**changes):
    return Config(**{"command": [sys.executable, "-S", "-c", os.environ["WORKER"]], "num_workers": 2,
                     "destroy_timeout": 5.0, **changes})

async def main():
%s

try:
    trio.run(main)
except KeyboardInterrupt:
    note("interrupted", os.getpid())
except BaseExceptionGroup as group:
    # From a nursery of the application's own it comes in a group, and must be alone in there.
    matched, others = group.split(KeyboardInterrupt)
    if matched is None or others is not None:
        raise
    note("interrupted_in_nursery", os.getpid())
"""


class Application:
    """An application in a process of its own."""

    def __init__(self, notes: Path, source: str, at_boot: str = "") -> None:
        self._notes = notes
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "NOTES": str(notes), "WORKER": WORKER, "AT_BOOT": at_boot}
        program = APPLICATION % textwrap.indent(textwrap.dedent(source), "    ")
        self.process = subprocess.Popen(
            # Python 3.12 and later warn of a fork of a process with threads, which is what one of the tests is about.
            [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c", program],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def notes(self, what: str) -> list[int]:
        """The pids noted so far."""
        if not self._notes.exists():
            return []
        # Lines are short, and each is one write.
        lines = self._notes.read_text().splitlines()
        return [int(line.split()[1]) for line in lines if line.split()[0] == what]

    def wait_for(self, what: str, count: int = 1) -> list[int]:
        wait(lambda: len(self.notes(what)) >= count or self.process.poll() is not None)
        assert len(self.notes(what)) >= count, self.process.communicate()[1]
        return self.notes(what)

    @property
    def started(self) -> list[int]:
        """Whatever the application's workers are made of."""
        return self.notes("worker") + self.notes("child")

    def wait_for_end(self) -> tuple[int, str]:
        _, stderr = self.process.communicate(timeout=30)
        return self.process.returncode, stderr


def wait(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def runs(pid: int) -> bool:
    """Whether there is such a process, other than as a zombie that waits for init."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Application]]:
    """Start an application; at the end of the test nothing of it is left, or the test fails."""
    applications: list[Application] = []

    def start(source: str, at_boot: str = "") -> Application:
        application = Application(tmp_path / f"notes{len(applications)}", source, at_boot)
        applications.append(application)
        return application

    yield start
    left: list[int] = []
    for application in applications:
        if application.process.poll() is None:
            application.process.kill()
        application.process.communicate()
        left += [pid for pid in application.started if runs(pid)]
    with contextlib.suppress(AssertionError):
        wait(lambda: not any(map(runs, left)), 2)
        left = []
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left


# Ctrl-C


def interrupted(application: Application, how: str = "interrupted") -> None:
    """KeyboardInterrupt has ended the application, and nothing runs any more."""
    status, stderr = application.wait_for_end()
    assert status == 0, stderr
    assert application.notes(how), stderr
    assert not [pid for pid in application.started if runs(pid)]


def test_interrupt_while_opening(run: Callable[..., Application]) -> None:
    """Promise 1: SIGINT while workers boot is a KeyboardInterrupt, and nothing is left."""
    application = run(
        """
        async with open_pool(config()) as pool:
            note("opened", 0)
        """,
        at_boot="time.sleep(1000)",
    )
    application.wait_for("worker", 2)
    application.process.send_signal(signal.SIGINT)
    interrupted(application)
    assert not application.notes("opened")


def test_interrupt_in_a_job(run: Callable[..., Application]) -> None:
    """Promise 1: SIGINT in a job is a KeyboardInterrupt, and nothing is left."""
    application = run(
        """
        async with open_pool(config()) as pool:
            await pool.exec(Payload(b"note('in_job', os.getpid()); time.sleep(1000)"))
        """
    )
    application.wait_for("in_job")
    application.process.send_signal(signal.SIGINT)
    interrupted(application)


def test_interrupt_among_jobs(run: Callable[..., Application]) -> None:
    """Promise 1: SIGINT wherever it hits a pool that is busy with quick jobs of many callers."""
    application = run(
        """
        async def call(pool):
            while True:
                await pool.exec(Payload(b""))

        async with open_pool(config()) as pool:
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(call, pool)
                # By a task, for trio's own nursery is misnested where it is hit while its block is left.
                nursery.start_soon(pool.exec, Payload(b"note('going', 0)"))
        """
    )
    application.wait_for("going")
    application.process.send_signal(signal.SIGINT)
    interrupted(application, "interrupted_in_nursery")


def test_interrupt_while_closing(run: Callable[..., Application]) -> None:
    """Promise 1: SIGINT while the block waits for its last job is a KeyboardInterrupt, and nothing is left."""
    application = run(
        """
        async def call(pool):
            try:
                await pool.exec(Payload(b"note('in_job', os.getpid()); time.sleep(1000)"))
            except trio.ClosedResourceError:
                note("closed", os.getpid())

        @trio.lowlevel.enable_ki_protection
        async def tell(pool):
            while not pool.statistics().closed:
                await trio.sleep(0.001)
            note("closing", os.getpid())

        async with trio.open_nursery() as nursery:
            async with open_pool(config()) as pool:
                nursery.start_soon(call, pool)
                nursery.start_soon(tell, pool)
                while not pool.statistics().busy:
                    await trio.sleep(0.001)
            note("left", os.getpid())
        """
    )
    application.wait_for("in_job")
    application.wait_for("closing")  # on the way there the block is not yet left, and can be torn
    application.process.send_signal(signal.SIGINT)
    interrupted(application, "interrupted_in_nursery")
    assert application.notes("closed")
    assert not application.notes("left")


def test_interrupt_while_stopping(run: Callable[..., Application]) -> None:
    """Promise 1: SIGINT while workers that don't stop have their `destroy_timeout` ends that at once."""
    application = run(
        """
        def observe(event, worker, context):
            if event is WorkerEvent.DESTRUCT:
                note("stopping", 0)

        async with open_pool(config(destroy_timeout=1000.0), observer=observe) as pool:
            for worker in pool.workers:
                os.kill(worker.pid, signal.SIGSTOP)
        """
    )
    application.wait_for("stopping", 2)
    application.process.send_signal(signal.SIGINT)
    interrupted(application)


def test_interrupt_reaches_no_worker(run: Callable[..., Application]) -> None:
    """Promise 1: an application that handles SIGINT itself keeps its workers: they are not in its process group."""
    application = run(
        """
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            async with open_pool(config(num_workers=1)) as pool:
                note("opened", 0)
                async for _ in signals:
                    break
                await pool.exec(Payload(b"note('still_there', os.getpid())"))
        """
    )
    application.wait_for("opened")
    for pid in application.notes("worker"):
        os.kill(pid, signal.SIGINT)
    application.process.send_signal(signal.SIGINT)
    assert application.wait_for_end()[0] == 0
    assert application.notes("still_there") == application.notes("worker")


# the pool's process is killed

SPINS: Final = {
    "idle": "",
    "sleeping": "time.sleep(1000)",
    "in_python": "while True: pass",
    # PyDLL keeps the GIL: no Python code of this process runs any more.
    "in_c": "ctypes.PyDLL(None).pause()",
    "computing_in_c": "pow(7, 10 ** 9)",
    "deaf": "[signal.signal(n, signal.SIG_IGN) for n in range(1, 65) if n not in (9, 19, 32, 33)]; time.sleep(1000)",
}


@pytest.mark.parametrize("spin", SPINS)
def test_killed(spin: str, run: Callable[..., Application]) -> None:
    """Promise 8: SIGKILL of the pool's process: every worker is dead at once, and every child of one."""
    source = f"note('child', subprocess.Popen(['sleep', '1000']).pid); note('ready', os.getpid())\n{SPINS[spin]}"
    application = run(
        f"""
        async with open_pool(config()) as pool:
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(pool.exec, Payload({source.encode()!r}))
            note("idle", os.getpid())
            await trio.sleep_forever()
        """
    )
    application.wait_for("ready", 2)
    if spin == "idle":
        application.wait_for("idle")
    pids = application.started
    assert len(pids) == 4
    assert all(map(runs, pids))
    application.process.kill()
    assert application.wait_for_end()[0] == -signal.SIGKILL
    wait(lambda: not any(map(runs, pids)), 10)


def test_killed_while_opening(run: Callable[..., Application]) -> None:
    """Promise 8: SIGKILL of the pool's process while workers boot."""
    application = run(
        """
        async with open_pool(config()) as pool:
            pass
        """,
        at_boot="note('child', subprocess.Popen(['sleep', '1000']).pid)\nnote('ready', 0)\nwhile True: pass",
    )
    application.wait_for("ready", 2)
    application.process.kill()
    application.wait_for_end()
    pids = application.started
    assert len(pids) == 4
    wait(lambda: not any(map(runs, pids)), 10)


def test_fork_holds_the_life_line(run: Callable[..., Application]) -> None:
    """Promise 8: a fork of the application holds the life line too: the workers go with the last of the two."""
    application = run(
        """
        async with open_pool(config()) as pool:
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(pool.exec, Payload(b"note('ready', 0); time.sleep(1000)"))
                while not pool.statistics().busy == 2:
                    await trio.sleep(0.001)
                if (fork := os.fork()) == 0:
                    os.close(2)
                    signal.pause()
                    os._exit(0)
                note("fork", fork)
                await trio.sleep_forever()
        """
    )
    application.wait_for("ready", 2)
    (fork,) = application.wait_for("fork")
    try:
        wait(lambda: not os.path.exists(f"/proc/{fork}/fd/2"))
        application.process.kill()
        application.wait_for_end()
        assert all(map(runs, application.started))
        assert len(application.started) == 2
    finally:
        os.kill(fork, signal.SIGKILL)
    wait(lambda: not any(map(runs, application.started)), 10)


# others in the application


def test_somebody_else_waits_for_our_children(run: Callable[..., Application]) -> None:
    """Fault: exit statuses that `os.waitpid(-1)` of somebody else took are None, and nothing hangs or is left."""
    application = run(
        """
        import threading, time

        def thief():
            while True:
                try:
                    pid, status = os.waitpid(-1, 0)
                    note("stolen", pid)
                except ChildProcessError:
                    time.sleep(0.001)

        threading.Thread(target=thief, daemon=True).start()
        unknown = known = 0
        async with open_pool(config()) as pool:
            for _ in range(20):
                try:
                    await pool.exec(Payload(b"os._exit(3)"))
                except WorkerCrashed as error:
                    assert error.returncode in (None, 3), error.returncode
                    unknown += error.returncode is None
                    known += error.returncode == 3
                    assert ("taken by someone else" in str(error)) == (error.returncode is None)
            while pool.statistics().idle < 2:
                await trio.sleep(0.001)
            workers = pool.workers
        for worker in workers:
            await worker.wait()
            assert worker.state.value is WorkerState.STOPPED
        assert unknown + known == 20
        note("unknown", unknown)
        """
    )
    status, stderr = application.wait_for_end()
    assert status == 0, stderr
    # A thread that waits all the time is the first to know, if not always.
    assert application.notes("unknown")[0] > 0
    assert application.notes("stolen")


def test_ignored_children(run: Callable[..., Application]) -> None:
    """Fault: where SIGCHLD is ignored the kernel reaps by itself: statuses are None, and nothing hangs or is left."""
    application = run(
        """
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        async with open_pool(config()) as pool:
            for _ in range(3):
                try:
                    await pool.exec(Payload(b"os._exit(3)"))
                except WorkerCrashed as error:
                    assert error.returncode is None
                else:
                    raise AssertionError
            await pool.exec(Payload(b""))
        """
    )
    status, stderr = application.wait_for_end()
    assert status == 0, stderr
