"""What was wrong with jobs ahead of their turn, each so that it does not come back."""

from typing import Any, Final

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.test_pool_logic import config, settle, work
from trio_workers import Config, Payload, Pool, open_pool
from trio_workers._goridge import PIPE_BUF, PROTOCOLS, encode_job

LARGE: Final = b"#" * 100_000


class Answers:
    """What callers got, each in a task of its own, by what they asked."""

    def __init__(self, pool: Pool, nursery: trio.Nursery) -> None:
        self.pool = pool
        self.nursery = nursery
        self.found: dict[bytes, Any] = {}
        self.scopes: dict[bytes, trio.CancelScope] = {}

    async def ask(self, body: bytes, context: bytes = b"") -> None:
        """Ask in a task of its own; return when that waits for its answer."""
        scope = self.scopes[body] = trio.CancelScope()
        self.nursery.start_soon(self._run, scope, body, context)
        await settle()

    async def _run(self, scope: trio.CancelScope, body: bytes, context: bytes) -> None:
        with scope:
            try:
                answer = await self.pool.exec(Payload(body, context))
            except Exception as error:
                self.found[body] = error
            else:
                self.found[body] = answer.body
        if scope.cancelled_caught:
            self.found[body] = "cancelled"


def reading_ahead(read_ahead: int, handler: Any = work, **fields: Any) -> Config:
    """A pool of one worker in memory, to which so many jobs may be on the way."""
    return attrs.evolve(config(handler, **fields), read_ahead=read_ahead)


async def test_a_large_job_that_waits_through_a_reset(autojump_clock: MockClock) -> None:
    """It came when no job lay ahead of its turn, and lies so under no later plan."""
    async with open_pool(reading_ahead(1)) as pool:
        async with trio.open_nursery() as nursery:
            answers = Answers(pool, nursery)
            for body in (b"sleep 1", b"sleep 2", LARGE, b"small"):
                await answers.ask(body)
            nursery.start_soon(pool.reset, reading_ahead(8))
        assert answers.found == {body: body for body in (b"sleep 1", b"sleep 2", LARGE, b"small")}
        assert pool.statistics().exits == {"reset": 1}


@pytest.mark.parametrize("protocol", [one for one in PROTOCOLS if one != "goridge-3"])
async def test_a_job_that_another_wire_makes_large(protocol: str, autojump_clock: MockClock) -> None:
    """Small enough in the wire it was encoded for, it is none to lie ahead of its turn in that of a later plan."""
    context = b"c" * (PIPE_BUF - 17)
    (frame,) = encode_job("goridge-3", context, b"x")
    assert len(frame) <= PIPE_BUF
    assert len(encode_job(protocol, context, b"x")) == 2
    async with open_pool(reading_ahead(2)) as pool:
        async with trio.open_nursery() as nursery:
            answers = Answers(pool, nursery)
            await answers.ask(b"sleep 1")
            await answers.ask(b"sleep 2")
            await answers.ask(b"sleep 3")
            await answers.ask(b"x", context)
            nursery.start_soon(pool.reset, attrs.evolve(reading_ahead(8), protocol=protocol))
        assert answers.found == {body: body for body in (b"sleep 1", b"sleep 2", b"sleep 3", b"x")}
