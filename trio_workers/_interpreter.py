"""How a Python child comes to life: the interpreter's flags, what it must know, and its own socket."""

import contextlib
import fcntl
import logging
import os
import pickle
import socket
import subprocess
import sys
from typing import Any, Final, cast

import attrs
import trio

from ._call_line import CallConversation, CallLine
from ._calls import in_short
from ._factories import DescriptorSpawner, Factory, Spawner
from ._process import Launch, WorkerProcess, spawn_process
from ._region import Region
from ._relay import FdRelay, Line

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

    async def open(self, nursery: trio.Nursery) -> Spawner:
        """Open it: there is nothing in the background."""
        await trio.lowlevel.checkpoint()
        return _PythonSpawner(self)

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
            },
            5,
        )


class _PythonSpawner(DescriptorSpawner):
    def __init__(self, factory: PythonFactory) -> None:
        super().__init__()
        self._factory = factory
        self._regions: dict[WorkerProcess, Region] = {}
        self._told = False

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
            relay = FdRelay(fd, fd, kind="unix")
            inherited = [child_fd]
            region = self._open_region(launch)
            if region is not None:
                ours.callback(region.close)
                the_childs.callback(region.release_fd)
                inherited.append(region.fd)
            process = await spawn_process(
                attrs.evolve(launch, argv=(*launch.argv, str(child_fd), ROOT, str(region.fd if region else -1))),
                stdin=null, stdout=None, limiter=self._limiter, inherited=tuple(inherited),
            )  # fmt: skip
            ours.pop_all()
        if region is not None:
            self._regions[process] = region
            process.at_reap(lambda: self._regions.pop(process).close())
        return self._keep(process, relay)

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
        region = self._regions.get(process)
        return CallLine(self._take(process), CallConversation(hello, launch.max_frame_size, region))

    def advice(self, error: Exception | None) -> str | None:
        if isinstance(error, RuntimeError):
            return str(error)
        if isinstance(error, TimeoutError):
            return "its initializer or the start of the interpreter takes longer than that; raise boot_timeout"
        if self._factory.initializer_name:
            return f"that was while it ran its initializer {self._factory.initializer_name}, or before"
        return "what it wrote to stderr, if anything, says why"


def _absolute(entry: str) -> str:
    # The child may have another directory. What is no path at all belongs to an import hook.
    return os.path.abspath(entry) if os.path.exists(entry or ".") else entry


def _above_2(end: socket.socket) -> int:
    return fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3)
