"""What the two state machines of the roster share: how long they run, and with what."""

import os
import random
import time
from typing import Final

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.support import under_ci

MINUTES: Final = float(os.environ.get("TRIO_WORKERS_ROSTER_MINUTES", "0"))
SETTINGS: Final = settings(
    max_examples=400 if under_ci() else 150,  # `nox -s roster` has half an hour for each
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def run_machine(machine: type[RuleBasedStateMachine]) -> None:
    """Run a machine once; with `TRIO_WORKERS_ROSTER_MINUTES` again and again for so long, with fresh seeds."""
    if not MINUTES:
        run_state_machine_as_test(machine, settings=SETTINGS)
        return
    until = time.monotonic() + MINUTES * 60
    many = settings(SETTINGS, max_examples=1000)
    while time.monotonic() < until:
        seed = random.SystemRandom().randrange(1 << 32)
        print(f"seed {seed}", flush=True)
        seeded = hypothesis.seed(seed)(type("Seeded", (machine,), {}))
        run_state_machine_as_test(seeded, settings=many)
