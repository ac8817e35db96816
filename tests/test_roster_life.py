"""The roster under random lives: driven by a seeded `random.Random`, and by hypothesis, which finds the short ones.

What is checked after each call stands in `roster_life.py`. `TRIO_WORKERS_ROSTER_MINUTES=30` (`nox -s roster`) lets
hypothesis go on with fresh seeds for that long, and prints them.
"""

import random
from collections.abc import Sequence
from typing import Final, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.roster_life import WEIGHTS, Life, live, run
from tests.roster_machines import MINUTES, SETTINGS, run_machine

T = TypeVar("T")


FAILED_ONCE: Final[dict[str, tuple[int, int]]] = {
    "a closing pool counts on a worker that is spent inside a lease": (2374522739, 200),
    "a worker is replaced for a change that was taken back": (1819821569, 100),
    "a successor stands by for ever, for a change that was taken back": (285819685, 100),
    "a seat that is kept as its lease ends gets two jobs at once": (3510675761, 200),
    "one more is relieved as a leased one leaves": (2854953882, 300),
    "a reset does not look at the queue": (5014, 60),
    "a change is done, and nobody is told": (5841, 30),
    "boots of a plan that has failed go on": (5189, 30),
    "what has grown during a change is thrown away": (5864, 15),
    "more processes than num_workers, with debug": (5218, 60),
    "a ttl lowers the capacity": (5070, 60),
    "a reset lowers the capacity": (5602, 60),
    "a limit of memory lowers the capacity": (5379, 200),
    "a job begins on a worker that is killed at once": (6108, 15),
    "a standing worker in a pool that has gone back to debug": (5131, 200),
    "two workers for one job, with debug": (5345, 30),
    "the clock wakes up for nothing": (5403, 200),
    "a change never settles": (5599, 200),
    "brought back in a pool that is debug now": (5919, 200),
    "a resize is done before its workers came": (5990, 60),
    "dismissed, and brought back": (4175, 200),
    "idle no more, but of an older plan": (1763633351, 300),
}
"""Seeds, and events, of lives that found a defect of the roster, by what it was.

A seed names a life only as long as `Life` draws its choices in the same order: after a change of that it is any life.
"""


class LifeMachine(RuleBasedStateMachine):
    """Lives one life by what hypothesis draws."""

    life: Life | None = None

    def choose(self, options: Sequence[T], /) -> T:
        return self.data.draw(st.sampled_from(options))

    @initialize(data=st.data(), open_for=st.integers(0, 2 * SETTINGS.stateful_step_count))
    def begin(self, data: st.DataObject, open_for: int) -> None:
        self.data = data
        self.open_for = open_for
        self.life = Life(self.choose)

    @precondition(lambda self: self.life is not None and not self.life.over)
    @rule(data=st.data(), name=st.sampled_from(list(WEIGHTS)))
    def happen(self, data: st.DataObject, name: str) -> None:
        assert self.life is not None
        self.data = data
        self.open_for -= 1
        self.life.happen(name)

    @precondition(lambda self: self.life is not None and not self.life.over and self.open_for <= 0)
    @rule(data=st.data(), abort=st.booleans())
    def end(self, data: st.DataObject, abort: bool) -> None:
        assert self.life is not None
        self.data = data
        self.life.happen("abort" if abort else "close")

    @rule()
    def look(self) -> None:
        """There is always something that may be done."""
        assert self.life is not None
        self.life.check()

    def teardown(self) -> None:
        if self.life is not None and self.life.sound:
            self.life.choose = random.Random(0).choice
            self.life.finish()


@pytest.mark.limit(MINUTES * 60 + 600)
def test_life_by_hypothesis() -> None:
    """Whatever happens in whatever order, the roster keeps what `design.md` promises (promises 2 to 6, and 9)."""
    run_machine(LifeMachine)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.limit(300)
def test_lives(seed: int) -> None:
    """The same by a plain driver, whose lives are longer; two million events of it are in `nox -s roster`."""
    assert run(5000, seed) > 5000


@pytest.mark.parametrize(("seed", "steps"), FAILED_ONCE.values(), ids=FAILED_ONCE)
def test_what_failed_once(seed: int, steps: int) -> None:
    """Lives that found a defect of the roster."""
    live(seed, steps)
