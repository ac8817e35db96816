"""The command line, `trio-workers` and `python -m trio_workers`; what it needs comes with the extra `cli`."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._config import Config

NEEDED = frozenset({"attrs", "cattrs", "cyclopts", "rich", "watchfiles"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, of `sys.argv` where no arguments are given, and return its exit code; see `_errors.py`."""
    if sys.stderr is None:
        _open_stderr()
    if sys.stdout is None:
        # Whatever is opened next would be at its place, and get what is written to it.
        print("trio-workers: stdout is closed; where nobody is to see it, lead it to /dev/null", file=sys.stderr)
        return 2
    try:
        from . import _app

        return _app.run(arguments)
    except ImportError as error:
        name = _missing(error)
        if name not in NEEDED:
            raise
        print(
            f"trio-workers: the command line needs {name}, which comes with: pip install 'trio_workers[cli]'",
            file=sys.stderr,
        )
        return 2


def load_config(path: str | os.PathLike[str]) -> "Config":
    """Read a `Config` from a TOML file, as `trio-workers run --config` does.

    Its keys are the fields of `Config`: `num_workers = 4`, and a table `[limits]` with `ttl = 3600.0`. `command` is an
    array of strings, `env` a table of strings, and `factory` "pipe", "socketpair", or an address such as
    `SocketFactory` takes. What is not in the file is as `Config` has it. A relative path is relative to this process's
    directory.

    Raise OSError where the file can't be read; ValueError where something in it is wrong, with a line for each thing
    that says where it stands: `pool.toml: limits.tll: no such key; did you mean ttl?`; `ModuleNotFoundError` without
    the extra `cli`.
    """
    try:
        from . import _settings
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        raise ModuleNotFoundError(
            f"load_config() needs {error.name}, which comes with: pip install 'trio_workers[cli]'", name=error.name
        ) from None
    return _settings.load_config(path)


def _open_stderr() -> None:
    """Put nothing in the place of a stderr that was closed, or the next file that is opened would get our errors."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != 2:
        os.dup2(nowhere, 2)
        os.close(nowhere)
    sys.stderr = open(2, "w", closefd=False, encoding="utf-8")  # noqa: SIM115 - it stays open to the end


def _missing(error: BaseException | None) -> str | None:
    """Name the module that an import was missing. Cyclopts wraps the error where it loads a command."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    return None if error is None or error.name is None else error.name.partition(".")[0]
