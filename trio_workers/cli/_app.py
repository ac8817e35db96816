"""Which commands there are, and how their errors are told: one line, never a traceback."""

import errno
import os
import select
import sys
from collections.abc import Sequence
from typing import Final, TypeGuard

import cyclopts

from .._errors import first_of
from ._errors import DONE, FAILED, INTERRUPTED, MISUSED, UNREAD, CommandError

COMMANDS: Final[dict[str, str]] = {
    "check": "trio_workers.cli._check:check",
    "top": "trio_workers.cli._top:top",
    "status": "trio_workers.cli._turn:status",
    "reset": "trio_workers.cli._turn:reset",
    "resize": "trio_workers.cli._turn:resize",
    "run": "trio_workers.cli._run:run",
    "bench": "trio_workers.cli._bench:bench",
    "demo": "trio_workers.cli._demo:demo",
}
"""Where each command's function is. A module is loaded when its command is given."""

UNWRITABLE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""What writing to stdout can end in, and nothing else that a command leaves to its caller."""

app = cyclopts.App(
    name="trio-workers",
    help="Pools of worker processes: look at one that runs, turn it, or make one here.",
    version_flags=["--version"],
)
for name, place in COMMANDS.items():
    app.command(place, name=name)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        # Its number would go to the next file that is opened, and a worker's pipe must not get what is printed.
        _tell("stdout is closed; lead it to /dev/null where nobody needs it")
        return MISUSED
    if not arguments or arguments[0] in app.help_flags:
        for name in COMMANDS:
            _ = app[name]  # loads it, for what its function says of itself
    try:
        code = app(
            arguments,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        sys.stdout.flush()  # here, where it can still be said how that ends
    except BaseException as error:
        ending = _ending(error)
        if ending is None:
            raise
        return ending
    return code if isinstance(code, int) else DONE


def _ending(error: BaseException) -> int | None:
    """Tell of an error, and return the exit code for it; None for what is a bug."""
    if isinstance(error, BaseExceptionGroup):  # nurseries make one even of a single error
        group: BaseExceptionGroup[BaseException] = error  # pyright: ignore[reportUnknownVariableType]
        if group.subgroup(KeyboardInterrupt) is not None:
            return INTERRUPTED
        meant, others = group.split(
            lambda one: isinstance(one, CommandError | BrokenPipeError) or _of_stdout(one) or _of_rich(one)
        )
        if meant is None or others is not None:
            return None
        error = first_of(meant)
    if isinstance(error, CommandError):
        _tell(str(error))
        return error.code
    if isinstance(error, cyclopts.UnusedCliTokensError):
        _tell(f"not understood here: {' '.join(map(repr, error.unused_tokens or ()))}; {_help_of(error)} says what is")
        return MISUSED
    if isinstance(error, cyclopts.CycloptsError):
        _tell(" ".join(str(error).split()))
        return MISUSED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return UNREAD
    if _of_stdout(error):
        _tell(f"stdout: {os.strerror(error.errno or errno.EIO)}")
        _drop_the_rest(sys.stdout.fileno())
        return FAILED
    return UNREAD if _of_rich(error) else None


def _help_of(error: cyclopts.CycloptsError) -> str:
    return " ".join(("trio-workers", *(error.command_chain or ()), "--help"))


def _of_stdout(error: BaseException) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename is None


def _of_rich(error: BaseException) -> bool:
    """Whether this is what rich makes of a broken pipe, after which it writes nowhere."""
    return isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)


def _nobody_reads() -> bool:
    """Whether stdout leads to somebody who has gone. What is still to be written there is dropped then."""
    try:
        stdout = sys.stdout.fileno()
    except OSError:
        return False  # it is no file
    poll = select.poll()
    poll.register(stdout, 0)
    if not poll.poll(0):
        return False
    _drop_the_rest(stdout)
    return True


def _drop_the_rest(stdout: int) -> None:
    """Let what is still in a buffer go nowhere: the interpreter writes it at its end, and would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stdout)
    os.close(nowhere)


def _tell(text: str) -> None:
    print(f"trio-workers: {text}", file=sys.stderr)
