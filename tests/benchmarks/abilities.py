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
    """Let no more than one job be on the way to each worker; say why that can't be, if it can't.

    There is no public switch. Where the pool's core has a `depth`, that is how many there may be.
    """
    core = pool._core
    if not hasattr(core, "depth"):
        return "this version never has more than one on the way"
    core.depth = 1
    return None
