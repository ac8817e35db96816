"""How a worker comes to life and connects.

A `Factory` is a frozen description, part of `Config`. The pool opens it in its own nursery and gets a `Spawner`, which
has what is live: listeners, limits, connections that nobody knows yet.
"""

import contextlib
import functools
import os
import socket
from abc import ABC, abstractmethod
from typing import Final, Literal

import attrs
import trio

from . import _platform
from ._conversation import Conversation
from ._process import Launch, OsProcess, WorkerProcess, spawn_process
from ._relay import FdRelay, Line

SPAWNS_AT_A_TIME: Final = 8
"""Threads of one spawner that start processes. A start takes about a millisecond, most of it in the kernel."""


class Spawner(ABC):
    """An opened `Factory`: starts processes and connects to them."""

    @abstractmethod
    async def spawn(self, launch: Launch) -> WorkerProcess:
        """Start a process. Raise `OSError` where the system refuses.

        Can't be cancelled once begun: whoever calls it owns the process that it returns, whatever else happens.
        """

    @abstractmethod
    async def connect(self, process: WorkerProcess, launch: Launch) -> Line:
        """Wait for the relay of a process started by `spawn`. The line belongs to the caller from then on.

        Where the handshake was needed to match them, it is done and `line.peer` is set; else the caller does it.
        There is no deadline here: the caller cancels at `boot_timeout` or when the process has ended.
        """

    def advice(self, error: Exception | None) -> str | None:
        """Say what to do about a worker that ended before it was ready; None for what the pool says by itself."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Let go of everything, when all processes are reaped. Never waits; a second call is harmless."""


class Factory(ABC):
    """A frozen description of how workers come to life and connect. Write one for ssh, docker, or tests."""

    @abstractmethod
    async def open(self, nursery: trio.Nursery) -> Spawner:
        """Open it; background tasks, such as listeners, go into the nursery given.

        Errors leave `open_pool` as they are.
        """


def with_relay(launch: Launch, address: str) -> Launch:
    return attrs.evolve(launch, env={**launch.env, "RR_RELAY": address})


def _check_transport(_: object, __: object, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"PipeFactory.transport must be a str, not {type(value).__name__}")
    if value not in ("pipe", "socketpair"):
        raise ValueError(f'PipeFactory.transport must be "pipe" or "socketpair", not {value!r}')


@attrs.frozen
class PipeFactory(Factory):
    """Workers that speak over their stdin and stdout.

    `transport` is "pipe" (two pipes, grown where the system allows it: what every program takes) or "socketpair" (one
    Unix socket as both: twice as fast for large payloads; PHP's goridge 2.0 refuses it, and the path `/dev/stdin` can't
    be opened on it). Raise ValueError for anything else.
    """

    transport: Literal["pipe", "socketpair"] = attrs.field(default="pipe", validator=_check_transport)

    async def open(self, nursery: trio.Nursery) -> Spawner:
        """Open it: there is nothing in the background."""
        await trio.lowlevel.checkpoint()
        return _PipeSpawner(self.transport)


class DescriptorSpawner(Spawner):
    """A spawner whose workers are born with their relay's other end; ours is kept from the spawn to `connect`."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(SPAWNS_AT_A_TIME)
        self._relays: dict[WorkerProcess, FdRelay] = {}

    def _keep(self, process: OsProcess, relay: FdRelay) -> WorkerProcess:
        """Keep the relay of a process that has just been spawned; close it with the process, if nobody takes it."""
        self._relays[process] = relay
        process.at_reap(functools.partial(self._discard, process))
        return process

    def _take(self, process: WorkerProcess) -> FdRelay:
        return self._relays.pop(process)

    def _discard(self, process: WorkerProcess) -> None:
        if relay := self._relays.pop(process, None):
            relay.close()

    def close(self) -> None:
        for process in list(self._relays):
            self._discard(process)


class _PipeSpawner(DescriptorSpawner):
    def __init__(self, transport: str) -> None:
        super().__init__()
        self._transport = transport

    @trio.lowlevel.enable_ki_protection
    async def spawn(self, launch: Launch) -> WorkerProcess:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as the_childs:
            if self._transport == "socketpair":
                one, other = socket.socketpair()
                read_fd = write_fd = one.detach()
                stdin = stdout = other.detach()
                ours.callback(os.close, read_fd)
                the_childs.callback(os.close, stdin)
            else:
                stdin, write_fd = os.pipe()
                the_childs.callback(os.close, stdin)
                ours.callback(os.close, write_fd)
                read_fd, stdout = os.pipe()
                ours.callback(os.close, read_fd)
                the_childs.callback(os.close, stdout)
                _platform.HERE.grow_pipe(write_fd)
                _platform.HERE.grow_pipe(read_fd)
            os.set_blocking(read_fd, False)
            os.set_blocking(write_fd, False)
            relay = FdRelay(read_fd, write_fd, kind="unix" if self._transport == "socketpair" else "pipe")
            process = await spawn_process(
                with_relay(launch, "pipes"), stdin=stdin, stdout=stdout, limiter=self._limiter
            )
            ours.pop_all()
        return self._keep(process, relay)

    @trio.lowlevel.enable_ki_protection
    async def connect(self, process: WorkerProcess, launch: Launch) -> Line:
        await trio.lowlevel.checkpoint()
        return Line(self._take(process), Conversation(launch.protocol, launch.max_frame_size))
