"""A factory of one's own: its workers speak over a socketpair that is a trio stream to us. For Linux."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import trio

from trio_workers import (
    Config,
    Conversation,
    Factory,
    Launch,
    Line,
    Payload,
    Spawner,
    StreamRelay,
    WorkerProcess,
    open_pool,
)

WORKER = Path(__file__).with_name("worker.py")


class Process(WorkerProcess):
    """A process in a group of its own. Its stderr is ours."""

    stderr_tail = ""

    def __init__(self, launch: Launch, relay: socket.socket) -> None:
        env = {**launch.env, "RR_RELAY": "pipes"}
        self._popen = subprocess.Popen(launch.argv, stdin=relay, stdout=relay, env=env, cwd=launch.cwd, process_group=0)
        self.pid = self._popen.pid
        self._pidfd = os.pidfd_open(self.pid)

    async def wait_exit(self) -> None:
        await trio.lowlevel.wait_readable(self._pidfd)  # takes no exit status, so pid and group stay ours

    def kill(self) -> None:
        if self._popen.returncode is None:  # reaped, its number may be somebody else's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def peek(self) -> int | None:
        if self._popen.returncode is not None:
            return self._popen.returncode
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    async def drain_stderr(self) -> None:
        await trio.lowlevel.checkpoint()  # nothing to read here

    def finish(self) -> None:
        self.kill()  # what is left of its group

    def reap(self) -> int | None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        return self._popen.wait()  # it has ended: returns at once


class SocketpairSpawner(Spawner):
    """Starts processes and connects to them."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._sockets: dict[WorkerProcess, socket.socket] = {}

    async def spawn(self, launch: Launch) -> WorkerProcess:
        await trio.lowlevel.checkpoint()  # from here on nothing is awaited: whoever called owns the process
        with contextlib.ExitStack() as undo:
            ours, theirs = map(undo.enter_context, socket.socketpair())
            process = Process(launch, theirs)
            undo.pop_all()
        theirs.close()
        self._sockets[process] = ours
        return process

    async def connect(self, process: WorkerProcess, launch: Launch) -> Line:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(self._sockets.pop(process)))
        return Line(StreamRelay(stream, self._nursery), Conversation(launch.protocol, launch.max_frame_size))

    def close(self) -> None:
        while self._sockets:
            self._sockets.popitem()[1].close()


class SocketpairFactory(Factory):
    """What stands in the configuration."""

    async def open(self, nursery: trio.Nursery) -> Spawner:
        await trio.lowlevel.checkpoint()
        return SocketpairSpawner(nursery)


async def main() -> None:
    config = Config(command=[sys.executable, str(WORKER)], num_workers=2, factory=SocketpairFactory())
    async with open_pool(config) as pool:
        print((await pool.exec(Payload(b"over a stream"))).body.decode())


trio.run(main)
