"""The kinds of pool that a storm can be over, and what the pools of a storm are made of."""

import random
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs

from tests.soak import acts, jobs, ledger
from tests.soak.targets import CommandTarget, FunctionTarget, Target
from trio_workers import (
    Config,
    Factory,
    Limits,
    PipeFactory,
    Pool,
    PythonPool,
    Restart,
    SocketFactory,
    open_pool,
    open_python_pool,
)

ROOT: Final = Path(__file__).parent.parent.parent
WORKER: Final = Path(__file__).parent / "worker.py"

DIALECTS: Final = ("goridge-1", "goridge-2", "goridge-3")
TRANSPORTS: Final = ("pipe", "socketpair", "unix", "tcp")
FUNCTIONS: Final = "functions"
CROWD: Final = "-crowd"
"""What the kinds are called besides in which crowds hand in tiny jobs, so that jobs lie ahead of their turn."""
KINDS: Final = (
    *(f"{dialect}-{transport}" for dialect in DIALECTS for transport in TRANSPORTS),
    *(f"{dialect}-pipe{CROWD}" for dialect in DIALECTS),
    *(f"goridge-3-{transport}{CROWD}" for transport in TRANSPORTS if transport != "pipe"),
    FUNCTIONS,
    FUNCTIONS + CROWD,
)

READ_AHEADS: Final = (2, 8, 32)
"""How many jobs may be on the way to a command worker of such a kind. Functions need no such number."""

BOOT_TIMEOUT: Final = 30.0
"""Seconds, for a loaded machine; a boot that fails does so at once."""

EXEC_TTLS: Final = (0.3, 0.8)
SHORTEST_EXEC_TTL: Final = min(EXEC_TTLS)
"""Seconds. Every pool has a bound, which ends the jobs that would hang for ever."""
SLOW_EXEC_TTL: Final = 2.0
"""Seconds, where memory has a bound as well: it is looked at once a second."""

HARD_MEMORY: Final = acts.FAT * 2 // 3
MAX_MEMORY: Final = 24 * 1024 * 1024
"""Bytes: a worker is above this after a job of 8 MiB."""

DESTROY_TIMEOUTS: Final = (0.0, 0.2, 0.6)
LONGEST_DESTROY_TIMEOUT: Final = max(DESTROY_TIMEOUTS)


@attrs.define
class Environment:
    """What workers find in their environment; a function of the slot, called for each start.

    `release` goes up with each reset, and each answer names it: so it shows whether an old worker has answered.
    """

    ledger: str
    mark: str
    release: int

    def __call__(self, slot: int) -> dict[str, str]:
        """Return the variables."""
        name, _, value = self.mark.partition("=")
        return {ledger.PATH: self.ledger, name: value, "SOAK_RELEASE": str(self.release), "PYTHONPATH": str(ROOT)}


@attrs.frozen(kw_only=True)
class Settings:
    """What differs from one pool to the next: the fields of `Config` of the same names."""

    num_workers: int
    max_workers: int
    max_executions: int
    max_queue: int | None
    allocate_timeout: float
    destroy_timeout: float
    debug: bool
    limits: Limits

    @property
    def fields(self) -> dict[str, Any]:
        """All of them, and those that are the same for all."""
        return {
            **attrs.asdict(self, recurse=False),
            "boot_timeout": BOOT_TIMEOUT,
            "grow_after": 0.02,
            "restart": Restart(initial=0.02, maximum=0.2),
        }


def has_crowds(kind: str) -> bool:
    """Whether crowds hand in tiny jobs."""
    return kind.endswith(CROWD)


def reads_ahead(kind: str) -> bool:
    """Whether more than one job may be on the way to a worker from where none can be taken back."""
    return has_crowds(kind) and not kind.startswith(FUNCTIONS)


def draw_settings(rng: random.Random, kind: str) -> Settings:
    """Draw what a pool is made of. Limits are so short that each of them is reached."""
    crowd = has_crowds(kind)
    num_workers = rng.randint(1, 2 if crowd else 4)  # crowds must be more than they can serve
    bounds_memory = rng.random() < (0.1 if crowd else 0.2)
    debug = rng.random() < (0.0 if crowd else 0.1)
    max_executions = rng.choice((0, 0, 0, 100, 1000) if crowd else (0, 0, 1, 3, 20))
    boots_for_each_job = debug or max_executions == 1
    return Settings(
        num_workers=num_workers,
        max_workers=num_workers + rng.randint(0, 1 if crowd else 3),
        max_executions=max_executions,
        max_queue=rng.choice((None, None, None, 16) if crowd else (None, None, 4, 16)),
        allocate_timeout=rng.choice((2.0 if boots_for_each_job else 0.1, 2.0, 20.0)),
        destroy_timeout=rng.choice(DESTROY_TIMEOUTS),
        debug=debug,
        limits=Limits(
            ttl=rng.choice((None, None, 1.0) if crowd else (None, 0.3, 1.0)),
            idle_ttl=rng.choice((None, 0.2)),
            exec_ttl=SLOW_EXEC_TTL if bounds_memory else rng.choice(EXEC_TTLS),
            max_memory=MAX_MEMORY if bounds_memory else None,
            hard_memory=HARD_MEMORY if bounds_memory else None,
            jitter=rng.choice((0.0, 0.1, 0.5)),
        ),
    )


def draw_config(rng: random.Random, kind: str, directory: str, settings: Settings, environment: Environment) -> Config:
    """Make the config of a kind of command workers."""
    dialect, _, transport = kind.removesuffix(CROWD).rpartition("-")
    reader = rng.choice(("hand", "child"))
    return Config(
        command=[sys.executable, "-S", "-P", str(WORKER), reader],
        protocol=dialect,
        factory=_factory_of(transport, directory, environment.release),
        env=environment,
        name=f"{kind}, release {environment.release}",
        read_ahead=rng.choice(READ_AHEADS) if reads_ahead(kind) else 1,
        **settings.fields,
    )


def draw_another(rng: random.Random, kind: str, directory: str, environment: Environment) -> Config:
    """Make a config of any dialect and any transport; with crowds where `kind` has them."""
    another = f"{rng.choice(DIALECTS)}-{rng.choice(TRANSPORTS)}{CROWD if has_crowds(kind) else ''}"
    return draw_config(rng, another, directory, draw_settings(rng, another), environment)


def break_config(config: Config) -> Config:
    """Return the config with a program that can't boot, and must: with `debug` that would be each job's affair."""
    return attrs.evolve(config, command=[sys.executable, "-S", "-c", "raise SystemExit(3)"], debug=False)


def _factory_of(transport: str, directory: str, release: int) -> Factory:
    match transport:
        case "pipe":
            return PipeFactory(transport="pipe")
        case "socketpair":
            return PipeFactory(transport="socketpair")
        case "unix":
            return SocketFactory(f"unix://{directory}/{release}.sock")
        case _:
            return SocketFactory("tcp://127.0.0.1:0")


@asynccontextmanager
async def open_target(
    config: Config | None, settings: Settings, environment: Environment, **observers: Any
) -> AsyncGenerator[tuple[Pool | PythonPool, Target]]:
    """Open a pool of commands, or without a config one of functions."""
    if config is not None:
        async with open_pool(config, **observers) as pool:
            yield pool, CommandTarget(pool)
    else:
        async with open_python_pool(
            initializer=jobs.prepare, env=environment, name="functions", **observers, **settings.fields
        ) as functions:
            yield functions, FunctionTarget(functions)
