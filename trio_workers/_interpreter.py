"""How a Python child comes to life: the interpreter's flags, what it must know, and its own socket."""

import contextlib
import errno
import fcntl
import functools
import logging
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final, cast

import attrs
import trio

from . import _platform
from ._arena import KEPT_FOR, Arena, Kept
from ._call_line import CallConversation, CallLine, CallRelay, PacketLine, Packets
from ._calls import in_short
from ._factories import DescriptorSpawner, Factory, Spawner
from ._process import Launch, WorkerProcess, spawn_process
from ._region import Region
from ._relay import Line

SOCKET_BUFFER: Final = 1024 * 1024
"""Bytes that a socket between pool and child holds, where the system allows it: fewer turns for large arguments."""

ROOT: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""Where this package is, for a child whose own path may not have it."""

START: Final = os.path.join(ROOT, "trio_workers", "child", "_start.py")
"""The child's first lines."""

NO_MAIN: Final = (
    "its main module came from standard input, from -c or from a notebook, where workers can't import it: put the "
    'functions and classes of jobs in a module of their own, or open the pool with pickler="cloudpickle" '
    "(pip install 'trio_workers[cloudpickle]')"
)


_log = logging.getLogger("trio_workers.pool")


def interpreter() -> list[str]:
    """Return the command of an interpreter like this one: the same program, with the same flags."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise RuntimeError(
            "sys.executable names no Python interpreter, as in a frozen program; a Python pool needs one for workers"
        )
    own = cast("Any", subprocess)._args_from_interpreter_flags  # as multiprocessing has it
    flags: list[str] = own()
    given = {flags[at + 1] for at in range(len(flags) - 1) if flags[at] == "-X"}
    given |= {flag[2:] for flag in flags if flag.startswith("-X")}
    options: dict[str, str | bool] = cast("Any", sys)._xoptions
    for option, value in options.items():
        text = option if value is True else f"{option}={value}"
        if text not in given:
            flags += ["-X", text]
    return [sys.executable, *flags]


def describe_main() -> tuple[str, str] | str:
    """Say where workers find the program's main module, or why they can't."""
    ours = sys.modules.get("trio_workers.child._main_module")
    if ours is not None and ours.described:
        # A pool inside a job: the main module is the program's, and may not have been needed here yet.
        sys.modules.setdefault("__mp_main__", sys.modules["__main__"])
        return cast("tuple[str, str] | str", ours.described)
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    spec = getattr(main, "__spec__", None)
    if main is None or (spec is None and not (isinstance(file, str) and os.path.isfile(file))):
        return NO_MAIN
    # What a worker pickles of it has the name under which it was imported there.
    sys.modules["__mp_main__"] = main
    if spec is not None and spec.name != "__main__":
        return "module", spec.name
    assert isinstance(file, str)
    file = os.path.abspath(file)
    return ("script", file) if spec is None else ("directory", os.path.dirname(file))


def check_not_importing() -> None:
    """Raise RuntimeError inside a worker that is importing the main module: it would open this pool once more."""
    ours = sys.modules.get("trio_workers.child._main_module")
    if ours is not None and ours.importing:
        raise RuntimeError(ours.GUARD)


@attrs.frozen(kw_only=True)
class PythonFactory(Factory):
    """Children of our own, each with a socket of its own beside its standard streams."""

    main: tuple[str, str] | str
    pickler: str
    initializer: bytes | None = attrs.field(default=None, repr=False)
    initializer_name: str = ""
    keeps_memory: bool = True
    """Whether workers keep the memory of large arguments for the next ones: not where their memory is bounded, for to a
    limit it looks like theirs."""

    async def open(self, nursery: trio.Nursery) -> Spawner:
        """Open it: there is nothing in the background before a job is large."""
        await trio.lowlevel.checkpoint()
        return _PythonSpawner(self, nursery)

    def command(self, slot: int) -> list[str]:
        """Return the child's command, but for the number of its socket."""
        if os.path.isfile(START):
            return [*interpreter(), START]
        # In a zip, where the interpreter can't take a program from.
        loader: Any = __spec__.loader
        return [*interpreter(), "-c", loader.get_data(START).decode()]

    def hello(self) -> bytes:
        """Return what a child must know, as it is now."""
        return pickle.dumps(
            {
                "path": [_absolute(entry) for entry in sys.path],
                "argv": list(sys.argv),
                "main": self.main,
                "pickler": self.pickler,
                "initializer": self.initializer,
                "keeps_memory": self.keeps_memory,
            },
            5,
        )


class _PythonSpawner(DescriptorSpawner):
    def __init__(self, factory: PythonFactory, nursery: trio.Nursery) -> None:
        super().__init__()
        self._factory = factory
        self._nursery = nursery
        self._lines: dict[WorkerProcess, CallLine] = {}
        self._kept = Kept()
        self._complaints: set[tuple[str, int]] = set()
        self._tidying: trio.CancelScope | None = None
        self._regions: dict[WorkerProcess, Region] = {}
        self._told = False
        self._beside: dict[WorkerProcess, Packets] = {}

    @trio.lowlevel.enable_ki_protection
    async def spawn(self, launch: Launch) -> WorkerProcess:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as the_childs:
            pair = socket.socketpair()
            for one in pair:
                the_childs.callback(one.close)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
            # Above 2: in the child the standard streams go there, over what a parent without them may have put.
            fd = _above_2(pair[0])
            ours.callback(os.close, fd)
            child_fd = _above_2(pair[1])
            the_childs.callback(os.close, child_fd)
            null = os.open(os.devnull, os.O_RDONLY)
            the_childs.callback(os.close, null)
            os.set_blocking(fd, False)
            inherited = [child_fd]
            packets = self._packets(ours) if _platform.HERE.has_packets() else None
            if packets is not None:
                inherited.append(packets.theirs.fileno())
            complain = functools.partial(self._complain, launch.label.rpartition("[")[0])
            arena_fd = _open_arena(complain)
            arena = None
            if arena_fd >= 0:
                ours.callback(os.close, arena_fd)
                arena = Arena(arena_fd)
                inherited.append(arena_fd)
            region = self._open_region(launch)
            if region is not None:
                ours.callback(region.close)
                the_childs.callback(region.release_fd)
                inherited.append(region.fd)
            relay = CallRelay(fd, arena, complain)
            packets_fd = packets.theirs.fileno() if packets else -1
            fds = f"{child_fd},{packets_fd},{region.fd if region else -1},{arena_fd}"
            process = await spawn_process(
                attrs.evolve(launch, argv=(*launch.argv, fds, ROOT)),
                stdin=null, stdout=None, limiter=self._limiter, inherited=tuple(inherited),
            )  # fmt: skip
            ours.pop_all()
        if region is not None:
            self._regions[process] = region
            process.at_reap(lambda: self._regions.pop(process).close())
        if packets is not None:
            self._beside[process] = packets
            process.at_reap(functools.partial(self._drop_packets, process))
        return self._keep(process, relay)

    def _packets(self, ours: contextlib.ExitStack) -> Packets:
        ends: list[socket.socket] = []
        for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET):
            with end:
                above = socket.socket(fileno=_above_2(end))
            ours.callback(above.close)
            ends.append(above)
        # The child's end is one open file with our copy of it, so it can't be non-blocking; we ask for that each time.
        ends[0].setblocking(False)
        return Packets(*ends)

    def _drop_packets(self, process: WorkerProcess) -> None:
        for end in self._beside.pop(process, ()):
            end.close()

    def _open_region(self, launch: Launch) -> Region | None:
        try:
            return Region()
        except OSError as error:
            if not self._told:
                self._told = True
                _log.warning(
                    "%s: no memory can be shared with workers, so a map of functions runs slower: %s",
                    launch.label,
                    error,
                )
            return None

    @trio.lowlevel.enable_ki_protection
    async def connect(self, process: WorkerProcess, launch: Launch) -> Line:
        await trio.lowlevel.checkpoint()
        try:
            hello = self._factory.hello()
        except Exception as error:
            text = f"sys.path or sys.argv can't be sent to a worker: {in_short(error)}"
            raise RuntimeError(text) from error
        relay = self._take(process)
        assert isinstance(relay, CallRelay)
        region = self._regions.get(process)
        talk = CallConversation(hello, launch.max_frame_size, relay.arena, self._kept, region)
        packets = self._beside.pop(process, None)
        if packets is None:
            line = CallLine(relay, talk, self._note_large)
        else:
            line = PacketLine(relay, talk, packets, self._note_large)
        self._lines[process] = line
        return line

    def _discard(self, process: WorkerProcess) -> None:
        super()._discard(process)
        self._lines.pop(process, None)

    def close(self) -> None:
        super().close()
        if self._tidying is not None:
            self._tidying.cancel()

    def _complain(self, pool: str, where: str, number: int) -> None:
        """Say once for each reason that large buffers take the socket."""
        if (where, number) in self._complaints:
            return
        self._complaints.add((where, number))
        level = logging.INFO if number == errno.ENOSYS else logging.WARNING  # a system without is as it is
        text = "%s: no shared memory for large buffers%s (%s): they take the socket, which is slower"
        reason = errno.errorcode.get(number, "")  # a worker may say anything
        _log.log(level, text, pool, where, os.strerror(number), extra={"pool": pool, "reason": reason})

    def _note_large(self) -> None:
        """Something large was moved: what that needed is given back when it has not been needed for a while."""
        if self._tidying is None:
            self._tidying = trio.CancelScope(shield=True)  # `close` ends it: then the last worker is gone
            self._nursery.start_soon(self._tidy, self._tidying, name="<memory of large buffers, to be given back>")

    @trio.lowlevel.enable_ki_protection
    async def _tidy(self, scope: trio.CancelScope) -> None:
        """A task of the pool, as long as there is something to be given back."""
        uses: dict[CallLine, int] = {}
        with scope:
            while True:
                await trio.sleep(KEPT_FOR)
                before, uses = uses, {line: line.arena_uses for line in self._lines.values()}
                unused = [line for line, count in uses.items() if before.get(line) == count and line.shared_memory]
                for line in unused:
                    line.give_back()
                if uses == before:
                    self._kept.clear()
                if not self._kept and not any(line.shared_memory for line in uses):
                    break
        self._tidying = None

    def advice(self, error: Exception | None) -> str | None:
        if isinstance(error, RuntimeError):
            return str(error)
        if isinstance(error, TimeoutError):
            return "its initializer or the start of the interpreter takes longer than that; raise boot_timeout"
        if self._factory.initializer_name:
            return f"that was while it ran its initializer {self._factory.initializer_name}, or before"
        return "what it wrote to stderr, if anything, says why"


def _open_arena(complain: Callable[[str, int], None]) -> int:
    """Open the file of an arena; return its descriptor, -1 where there is none to be had."""
    try:
        return _platform.HERE.shared_file()
    except OSError as error:
        complain("", error.errno or errno.ENOSYS)
        return -1


def _absolute(entry: str) -> str:
    # The child may have another directory. What is no path at all belongs to an import hook.
    return os.path.abspath(entry) if os.path.exists(entry or ".") else entry


def _above_2(end: socket.socket) -> int:
    return fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3)
