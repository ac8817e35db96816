"""The command line, `trio-workers` and `python -m trio_workers`; what it needs comes with the extra `cli`."""

import sys
from collections.abc import Sequence

NEEDED = frozenset({"attrs", "cattrs", "cyclopts", "rich", "watchfiles"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, of `sys.argv` where no arguments are given, and return its exit code; see `_errors.py`."""
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


def _missing(error: BaseException | None) -> str | None:
    """Name the module that an import was missing. Cyclopts wraps the error where it loads a command."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    return None if error is None or error.name is None else error.name.partition(".")[0]
