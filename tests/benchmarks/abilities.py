"""What this version of the package can: a table of what it can't yet says so in its row, and is measured later."""

from typing import Final

import attrs

from trio_workers import Config, PythonPool, Results

READ_AHEAD: Final = 32
"""Jobs in a command worker's pipe, where more than one may lie there."""

NO_READ_AHEAD: Final = (
    None if "read_ahead" in {field.name for field in attrs.fields(Config)} else "this version has no Config.read_ahead"
)
NO_BATCHES: Final = None if hasattr(Results, "batches") else "this version has no Results.batches"


def limit_to_one_job(pool: PythonPool) -> str | None:
    """Let no more than one job be on the way to each worker of a fresh pool; say why that can't be, if it can't.

    There is no public switch. A seat has room for jobs ahead of their turn once the roster has noted its pace: here it
    never does.
    """
    roster = pool._core.roster
    if not hasattr(roster, "_note_pace"):
        return "this version never has more than one on the way"
    roster._note_pace = lambda seat, took: None
    return None
