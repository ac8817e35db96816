"""How commands end.

| exit code | when |
|---|---|
| 0 | what was asked for was done |
| 1 | it was tried and failed: a job, a check, a reset |
| 2 | it was not tried: wrong flags, files, sockets, addresses, or an extra that is missing |
| 130 | Ctrl-C |
| 141 | who read its stdout has gone, as `head` does |
"""

from typing import Final

DONE: Final = 0
FAILED: Final = 1
MISUSED: Final = 2
INTERRUPTED: Final = 130
UNREAD: Final = 141
"""128 and the number of SIGPIPE: what a shell shows of other programs to which that happens."""


class CommandError(Exception):
    """Ends a command with one line on stderr, and an exit code."""

    def __init__(self, text: str, code: int = FAILED) -> None:
        super().__init__(text)
        self.code = code


class Misuse(CommandError):
    """Ends a command that was not tried, for what it was given is wrong."""

    def __init__(self, text: str) -> None:
        super().__init__(text, MISUSED)
