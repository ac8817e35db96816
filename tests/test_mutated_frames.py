"""Damaged frames: a few thousand here, a million in `nox -s frames`."""

import random

import pytest

from tests.mutate_frames import run
from trio_workers._goridge import PROTOCOLS


@pytest.mark.parametrize("seed", [1, 2, 3, random.SystemRandom().randrange(1 << 32)], ids=["1", "2", "3", "any"])
def test_mutated_frames(seed: int) -> None:
    """Whatever a worker sends, the only way out is `FrameError`, and nothing is held that was not fed."""
    counts = run(1500, seed)
    for protocol in PROTOCOLS:
        # The cases reach every ending, else they would prove little.
        for ended in ("refused", "waits for more", "taken whole"):
            assert counts[f"{protocol}: {ended}"] > 5
