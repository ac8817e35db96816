"""The storm (`tests/soak`), for some seconds over each kind of pool: a little of what `nox -s soak` does for longer.

Each is a process of its own, by the command: whether memory is flat can't be seen in one that has run other tests.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from tests.soak.kinds import KINDS, has_crowds

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for what is left"),
    pytest.mark.limit(300),  # everything in it has a limit of its own, which says more
]

ROOT: Final = Path(__file__).parent.parent
SEED: Final = 1
SECONDS: Final = 4.0
"""For each of the kinds: with the time that a pool takes to come to rest, and to end, it is two minutes in all."""

SEEDS: Final[dict[str, tuple[str, int, float]]] = {
    "a dead worker's parts, given to the next job of the lease": ("functions", 23, SECONDS),
    "a pool that was left while it was reset to what can't boot": ("goridge-2-socketpair", 10, SECONDS),
}
"""Seeds that have failed, by what was wrong: kind, seed, seconds. A storm is not the same twice, but much of it is."""


async def run_storm(kind: str, seed: int, seconds: float, directory: Path) -> dict[str, Any]:
    """Run a storm in a process of its own. Return its figures; fail with what it says where a promise was broken."""
    figures = directory / "figures.json"
    command = [sys.executable, "-W", "error", "-m", "tests.soak", "--only", kind, "--seed", str(seed)]
    command += ["--minutes", str(seconds / 60), "--json", str(figures)]
    done = await trio.run_process(
        command, cwd=ROOT, capture_stdout=True, stderr=subprocess.STDOUT, check=False, stdin=b""
    )
    assert done.returncode == 0, done.stdout.decode("utf-8", "replace")
    found: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))["kinds"][kind]
    return found


@pytest.mark.parametrize("kind", KINDS)
async def test_storm(kind: str, tmp_path: Path) -> None:
    """Point 8: each job ends in one of its ways, none runs twice, and nothing is lost or left."""
    found = await run_storm(kind, SEED, SECONDS, tmp_path)
    assert found["rounds"] == 3
    # It was a storm: jobs were answered, and workers went.
    assert found["endings"]["replied"] > 0
    assert found["exits"]
    if has_crowds(kind):
        assert found["ahead"] > 0


@pytest.mark.parametrize("name", SEEDS)
async def test_seed_that_failed(name: str, tmp_path: Path) -> None:
    """Point 8: a storm that has found something does so no more."""
    await run_storm(*SEEDS[name], tmp_path)
