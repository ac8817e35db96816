"""Which commands there are, and how their errors are told: one line, never a traceback."""

import sys
from collections.abc import Sequence
from typing import Final

import cyclopts

from ._errors import DONE, INTERRUPTED, MISUSED, CommandError

COMMANDS: Final[dict[str, str]] = {
    "top": "trio_workers.cli._top:top",
    "status": "trio_workers.cli._turn:status",
    "reset": "trio_workers.cli._turn:reset",
    "resize": "trio_workers.cli._turn:resize",
    "run": "trio_workers.cli._run:run",
    "bench": "trio_workers.cli._bench:bench",
    "demo": "trio_workers.cli._demo:demo",
}
"""Where each command's function is. A module is loaded when its command is given."""

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
    except CommandError as error:
        _tell(str(error))
        return error.code
    except cyclopts.CycloptsError as error:
        _tell(" ".join(str(error).split()))
        return MISUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    return code if isinstance(code, int) else DONE


def _tell(text: str) -> None:
    print(f"trio-workers: {text}", file=sys.stderr)
