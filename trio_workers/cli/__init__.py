"""The command line, `trio-workers` and `python -m trio_workers`; what it needs comes with the extra `cli`."""

import sys
from collections.abc import Sequence

NEEDED = frozenset({"attrs", "cattrs", "cyclopts", "rich", "watchfiles"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, of `sys.argv` where no arguments are given, and return its exit code; see `_errors.py`."""
    try:
        from . import _app
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        print(
            f"trio-workers: the command line needs {error.name}, which comes with: pip install 'trio_workers[cli]'",
            file=sys.stderr,
        )
        return 2
    return _app.run(arguments)
