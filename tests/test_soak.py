"""The storm (`tests/soak`), for some seconds over each kind of pool: a minute of what `nox -s soak` does for longer."""

import sys
from typing import Final

import pytest

from tests.soak.kinds import KINDS
from tests.soak.storm import run_storm

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for what is left"),
    pytest.mark.limit(300),  # everything in it has a limit of its own, which says more
]

SEED: Final = 1
SECONDS: Final = 4.0
"""For each of the kinds: with the time that a pool takes to come to rest, and to end, it is about a minute in all."""

SEEDS: Final[dict[str, tuple[str, int, float]]] = {
    "a dead worker's parts, given to the next job of the lease": ("functions", 23, SECONDS),
    "a pool that was left while it was reset to what can't boot": ("goridge-2-socketpair", 10, SECONDS),
}
"""Seeds that have failed, by what was wrong: kind, seed, seconds. A storm is not the same twice, but much of it is."""


@pytest.mark.parametrize("kind", KINDS)
async def test_storm(kind: str) -> None:
    """Point 8: each job ends in one of its ways, none runs twice, and nothing is lost or left."""
    result = await run_storm(kind, SEED, SECONDS)
    result.raise_complaints()
    assert result.rounds == 3
    # It was a storm: jobs were answered, and workers went, in many ways.
    assert result.endings["replied"] > 0
    assert len(result.exits) > 0


@pytest.mark.parametrize("name", SEEDS)
async def test_seed_that_failed(name: str) -> None:
    """Point 8: a storm that has found something does so no more."""
    (await run_storm(*SEEDS[name])).raise_complaints()
