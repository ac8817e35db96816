"""Which running pool a command is for, and how to talk with it: over the control socket, in the words of its errors."""

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, TypeVar, TypeVarTuple, cast

import attrs
import cattrs
import trio
from cyclopts import Parameter

from .._watch import PoolFact, WorkerFact
from ..control import ControlClient, connect, find_sockets
from ._errors import CommandError, Misuse
from ._top_view import printable

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

ANSWER_WITHIN: Final = 10.0
"""Seconds that a pool's process has to say how it is: it does so at once, unless it hangs or was stopped."""
LOOK_WITHIN: Final = 3.0
"""The same where several are asked which one is meant."""
END_WITHIN: Final = 2.0
"""Seconds from the end of a connection until the pool's socket is gone, where the pool has ended."""

SocketOption = Annotated[Path | None, Parameter(help="The pool's control socket.")]
PoolOption = Annotated[str | None, Parameter(help="The name of the pool: Config.name.")]


class Lost(CommandError):
    """The pool has hung up."""


def run(function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
    """Run an async function, and raise the one error that ended it, not a group around it."""
    try:
        return trio.run(function, *args, restrict_keyboard_interrupt_to_checkpoints=True)
    except BaseExceptionGroup as group:
        errors = _leaves(group)
        if all(isinstance(error, CommandError | KeyboardInterrupt) for error in errors):
            raise errors[0] from None
        raise


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    within = cast("BaseExceptionGroup[BaseException]", error)
    return [leaf for one in within.exceptions for leaf in _leaves(one)]


def print_facts(text: str) -> None:
    """Print to stdout at once. Raise BrokenPipeError where nobody reads it any more, as with `... | head`."""
    print(text, flush=True)


class Link:
    """A connection to a pool's control socket, and what is said there: `async with Link(path) as link`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = contextlib.AsyncExitStack()
        self._client: ControlClient | None = None

    async def __aenter__(self) -> "Link":
        await self.again()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def again(self) -> None:
        """Connect, once more where it has been connected. Raise CommandError, as a rule Misuse, where that can't be."""
        await self._stack.aclose()
        try:
            client = await connect(self.path)
        except TimeoutError as error:
            raise CommandError(_words(error, self.path)) from None
        except (OSError, ValueError) as error:
            raise Misuse(_words(error, self.path)) from None
        self._client = await self._stack.enter_async_context(client)

    async def look(self) -> tuple[PoolFact, list[WorkerFact]]:
        """Ask how the pool and its workers are."""
        status = await self._ask("status")
        workers = await self._ask("workers")
        try:
            return cattrs.structure(status["status"], PoolFact), cattrs.structure(workers["workers"], list[WorkerFact])
        except Exception:  # cattrs' errors, and whatever a wrong document leads to
            raise CommandError(
                f"{shown(self.path)}: that is no pool of trio_workers, or one of another version"
            ) from None

    async def look_soon(self) -> tuple[PoolFact, list[WorkerFact]]:
        """Do what `look` does, and raise CommandError where no answer comes."""
        with trio.move_on_after(ANSWER_WITHIN):
            return await self.look()
        raise CommandError(
            f"the pool at {shown(self.path)} did not answer within {ANSWER_WITHIN:g} s; its process may be stopped"
        )

    async def turn(self, request: str) -> dict[str, Any]:
        """Ask for a change, and return the answer when it is done. Raise CommandError with the pool's own words."""
        return await self._ask(request)

    async def _ask(self, request: str) -> dict[str, Any]:
        assert self._client is not None
        try:
            answer = await self._client.ask(request)
        except ConnectionResetError as error:
            raise Lost(_words(error, self.path)) from None
        except OSError as error:
            raise CommandError(_words(error, self.path)) from None
        if not answer["ok"]:
            raise CommandError(printable(str(answer.get("error", "refused, without a reason")), 2000))
        return answer


@attrs.frozen
class _Found:
    """A live socket, and what its pool says."""

    path: Path
    status: PoolFact | None

    def __str__(self) -> str:
        if self.status is None:
            return f"one that does not answer ({shown(self.path)})"
        return f"{printable(self.status['pool'])} (pid {self.status['pid']}, {shown(self.path)})"


async def find(socket: Path | None, pool: str | None) -> Path:
    """Choose the pool that is meant, and return the path of its socket. Raise Misuse that lists them where none is."""
    if socket is not None:
        if pool is not None:
            raise Misuse("--socket and --pool both say which pool is meant; give one of them")
        return socket
    paths = find_sockets()
    if not paths:
        raise Misuse(
            "no pool of this user has a control socket in the usual place; a pool gets one by serve_control(pool), and "
            "one that lies elsewhere is reached by --socket PATH"
        )
    if pool is None and len(paths) == 1:
        return paths[0]
    found = await _ask_all(paths)
    if pool is not None:
        named = [one for one in found if one.status is not None and one.status["pool"] == pool]
        if len(named) == 1:
            return named[0].path
        if named:
            raise Misuse(f"{len(named)} pools are named {printable(pool)!r}; say which by --socket: {_listed(named)}")
        raise Misuse(f"no pool here is named {printable(pool)!r}; there is {_listed(found)}")
    raise Misuse(f"{len(found)} pools run here; say which by --pool or --socket: {_listed(found)}")


async def _ask_all(paths: list[Path]) -> list[_Found]:
    found: dict[Path, _Found] = {}

    async def ask(path: Path) -> None:
        found[path] = _Found(path, None)
        with trio.move_on_after(LOOK_WITHIN), contextlib.suppress(CommandError):
            async with Link(path) as link:
                found[path] = _Found(path, (await link.look())[0])

    async with trio.open_nursery() as nursery:
        for path in paths:
            nursery.start_soon(ask, path)
    return [found[path] for path in paths]


def _listed(found: list[_Found]) -> str:
    return ", ".join(map(str, found))


async def ended_well(path: Path, status: PoolFact) -> bool:
    """Whether a pool whose connection ended has ended by itself: then its socket goes away with it."""
    if status["closed"]:
        return True
    there = trio.Path(path)
    with trio.move_on_after(END_WITHIN):
        while await there.exists():  # noqa: ASYNC110 - nobody tells when a file of another process goes
            await trio.sleep(0.02)
        return True
    return False


def shown(path: Path) -> str:
    """Write a path on one line."""
    return printable(str(path))


def _words(error: OSError | ValueError, path: Path) -> str:
    """Tell an error of the control socket in one line."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{shown(path)}: {printable(why, 1000)}"


__all__ = ["Link", "Lost", "PoolOption", "SocketOption", "ended_well", "find", "print_facts", "run", "shown"]
