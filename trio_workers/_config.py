"""How a pool is to be: its configuration, and what is wrong with one."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import attrs

from ._factories import Factory, PipeFactory
from ._goridge import PROTOCOLS

Argument = str | bytes | os.PathLike[str]
Command = Sequence[Argument] | Callable[[int], Sequence[Argument]]
Environment = Mapping[str, str] | Callable[[int], Mapping[str, str]]

MAX_FRAME_SIZE: Final = 64 * 1024 * 1024
"""64 MiB: four times the largest post a PHP or web worker usually accepts, and what 24 workers can send at once
without a small server running out of memory."""

_Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _name(instance: object, attribute: "attrs.Attribute[Any]") -> str:
    return f"{type(instance).__name__}.{attribute.name}"


def _integer(minimum: int, *, optional: bool = False) -> _Validator:
    def check(instance: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
        if optional and value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool):
            also = " or None" if optional else ""
            raise TypeError(f"{_name(instance, attribute)} must be an int{also}, not {type(value).__name__}")
        if value < minimum:
            raise ValueError(f"{_name(instance, attribute)} must be at least {minimum}, not {value}")

    return check


def _number(
    *,
    zero: bool = False,
    infinite: bool = False,
    optional: bool = False,
    minimum: float = 0.0,
    maximum: float = math.inf,
) -> _Validator:
    def check(instance: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
        name = _name(instance, attribute)
        if optional and value is None:
            return
        if not isinstance(value, int | float) or isinstance(value, bool):
            also = " or None" if optional else ""
            raise TypeError(f"{name} must be a number{also}, not {type(value).__name__}")
        if math.isnan(value) or (math.isinf(value) and not infinite):
            raise ValueError(f"{name} must be finite, not {value}")
        if value < minimum or (value == 0 and not zero) or value > maximum:
            range_ = (
                f"from {minimum:g} to {maximum:g}"
                if maximum < math.inf
                else f"{'at least' if zero or minimum else 'more than'} {minimum:g}"
            )
            raise ValueError(f"{name} must be {range_}, not {value}")

    return check


def _check_command(instance: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    name = _name(instance, attribute)
    if callable(value):
        return
    check_argv(value, name)


def _check_for_the_system(name: str, *values: Argument) -> None:
    """Raise an error that names the field where the system could not take a value: no NUL, no lone surrogates."""
    for value in values:
        try:
            raw = os.fsencode(value)
        except UnicodeEncodeError:
            raise ValueError(f"{name} holds characters that the system's encoding can't express") from None
        if b"\0" in raw:
            raise ValueError(f"{name} must not hold a NUL character")


def check_argv(argv: object, name: str = "Config.command") -> tuple[Argument, ...]:
    """Return the arguments as a tuple, or raise an error that names the field."""
    kind = type(argv).__name__
    if isinstance(argv, str | bytes | os.PathLike) or not isinstance(argv, Sequence):
        raise TypeError(
            f"{name} must be a sequence of arguments such as ['php', 'worker.php'], or a function of the slot that "
            f"returns one, not {kind}"
        )
    items = cast("Sequence[object]", argv)
    if not items:
        raise ValueError(f"{name} is empty; its first item is the program")
    arguments: list[Argument] = []
    for item in items:
        kind = type(item).__name__
        if not isinstance(item, str | bytes | os.PathLike):
            raise TypeError(f"{name} must hold str, bytes or path-like items, not {kind}")
        argument = cast("Argument", item)
        _check_for_the_system(name, argument)
        arguments.append(argument)
    if not os.fspath(arguments[0]):
        raise ValueError(f"{name}: the program's name is empty")
    return tuple(arguments)


def check_env(env: object, name: str = "Config.env") -> dict[str, str]:
    """Return the variables as a dict, or raise an error that names the field (and never a value)."""
    if not isinstance(env, Mapping):
        raise TypeError(f"{name} must be a mapping of str to str, not {type(env).__name__}")
    variables: dict[str, str] = {}
    for key, value in cast("Mapping[object, object]", env).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"{name} must map str to str; the item {key!r} does not")
        if not key or "=" in key:
            raise ValueError(f"{name} has a variable that can't be set: {key!r}")
        _check_for_the_system(f"{name}: the variable {key!r}", key, value)
        variables[key] = value
    return variables


def _check_env(instance: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if value is not None and not callable(value):
        check_env(value, _name(instance, attribute))


def _check_cwd(instance: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str | bytes | os.PathLike):
        raise TypeError(f"{_name(instance, attribute)} must be a path or None, not {type(value).__name__}")
    path = cast("str | bytes | os.PathLike[str]", value)
    if not os.fspath(path):
        raise ValueError(f"{_name(instance, attribute)} must not be empty")
    _check_for_the_system(_name(instance, attribute), path)


def _instance(kind: type, hint: str = "") -> _Validator:
    def check(instance: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
        if not isinstance(value, kind):
            article = "an" if kind.__name__[0] in "AEIOU" else "a"
            raise TypeError(
                f"{_name(instance, attribute)} must be {article} {kind.__name__}{hint}, not {type(value).__name__}"
            )

    return check


def _check_protocol(instance: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{_name(instance, attribute)} must be a str, not {type(value).__name__}")
    if value not in PROTOCOLS:
        raise ValueError(f"{_name(instance, attribute)} must be one of {', '.join(PROTOCOLS)}, not {value!r}")


def _check_name(instance: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{_name(instance, attribute)} must be a str, not {type(value).__name__}")
    if not value or not value.isprintable():
        raise ValueError(f"{_name(instance, attribute)} must be printable and not empty, not {value!r}")


def available_cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0)) or 1
    except AttributeError:
        return os.cpu_count() or 1


@attrs.frozen(kw_only=True)
class Restart:
    """How long a slot waits before a worker that helped nobody is replaced, and when the pool gives up.

    After a failed boot, or a death while idle before the first job, the slot waits `initial` seconds, then `factor`
    times as long each time up to `maximum`, each delay varied by the share `jitter`. A job served, or a worker that
    lived for `stable_after` seconds, starts the count again. `give_up_after` failed boots in a row in the whole pool
    end the `open_pool` block with `RestartLimitExceeded`; None means never. With the defaults a slot whose program
    always fails spawns five times in its first three seconds.
    """

    initial: float = attrs.field(default=0.1, validator=_number())
    factor: float = attrs.field(default=2.0, validator=_number(minimum=1.0))
    maximum: float = attrs.field(default=30.0, validator=_number())
    jitter: float = attrs.field(default=0.1, validator=_number(zero=True, maximum=1.0))
    stable_after: float = attrs.field(default=10.0, validator=_number())
    give_up_after: int | None = attrs.field(default=None, validator=_integer(1, optional=True))

    def __attrs_post_init__(self) -> None:
        if self.maximum < self.initial:
            raise ValueError(f"Restart.maximum ({self.maximum}) must not be less than Restart.initial ({self.initial})")


@attrs.frozen(kw_only=True)
class Limits:
    """When a worker is replaced for its age, its idleness or its memory, and when a job is. None sets no limit.

    `ttl`: seconds that a worker lives. `idle_ttl`: seconds that one which has been at work may be without a job; one
    that is fresh is left alone, for another would be no fresher. Also the time over which a pool that has grown above
    its `num_workers` looks for workers it has too many (60 s where this is None).
    `exec_ttl`: seconds from a job's start to its end, a stream's last part included; past that its worker is killed,
    and the job is a `JobTimeout`.
    `max_memory`: bytes of resident memory, read once a second; a worker that is above it twice in a row, and has had
    a job, is replaced after the job it is on. `hard_memory`: bytes; a worker that is found above it is killed, and its
    job is a `WorkerError` with phase "memory".
    `jitter`: the share, 0 to 1, by which each worker's `ttl` and `max_executions` are drawn shorter, so that workers
    of one age do not come of age together. `max_executions` up to 10 is not changed by the default.

    Replacement by plan never lowers the pool's capacity: the old worker serves on until its successor is ready.
    Memory is what the kernel calls resident (RSS): pages that workers share count for each of them. It is read from
    `/proc`; elsewhere by psutil (the extra `memory`).
    """

    ttl: float | None = attrs.field(default=None, validator=_number(optional=True))
    idle_ttl: float | None = attrs.field(default=None, validator=_number(optional=True))
    exec_ttl: float | None = attrs.field(default=None, validator=_number(optional=True))
    max_memory: int | None = attrs.field(default=None, validator=_integer(1, optional=True))
    hard_memory: int | None = attrs.field(default=None, validator=_integer(1, optional=True))
    jitter: float = attrs.field(default=0.1, validator=_number(zero=True, maximum=1.0))

    def __attrs_post_init__(self) -> None:
        if self.max_memory is not None and self.hard_memory is not None and self.max_memory > self.hard_memory:
            raise ValueError(
                f"Limits.max_memory ({self.max_memory}) must not be more than Limits.hard_memory ({self.hard_memory})"
            )

    @property
    def bounds_memory(self) -> bool:
        """Whether the workers' memory must be read."""
        return self.max_memory is not None or self.hard_memory is not None


@attrs.frozen(kw_only=True)
class Config:
    """What a pool is made of. Every field is checked here: TypeError for a wrong type, ValueError for a wrong value.

    `command`: argv of the worker program, or a function of the slot that returns it, called for each spawn.
    `num_workers`: how many processes, at least 1; the cores this process may use by default. A replacement may double
    it for a moment.
    `max_executions`: jobs a worker begins before it is replaced, job errors included; 1 makes a new process for every
    job, 0 sets no bound.
    `allocate_timeout`: seconds a job waits for a free worker, in all; `math.inf` is allowed, 0 is not.
    `destroy_timeout`: seconds from the stop frame to SIGKILL of the worker's process group; 0 kills at once.
    `boot_timeout`: seconds from the process's start to its handshake.
    `max_queue`: more waiting callers than this get `QueueFull` at once; None sets no bound.
    `factory`: how a worker comes to life and connects.
    `protocol`: the goridge dialect that the workers speak: "goridge-1", "goridge-2" or "goridge-3".
    `env`: added to this process's environment for the workers: a mapping, or a function of the slot that returns one.
    `RR_RELAY`, `TRIO_WORKERS_SLOT` and `TRIO_WORKERS_PROTOCOL` are the pool's own to set.
    `cwd`: the workers' directory; None inherits.
    `max_frame_size`: bytes of one frame's payload, either way.
    `restart`: what happens when workers fail to start.
    `limits`: when a worker, or a job, has had its time.
    `max_workers`: how many workers the pool may grow to by itself; None is `num_workers`, so it does not grow. While a
    job has waited for `grow_after` seconds, a worker is added for it; above `num_workers` as many are retired as were
    free all the time over the last `limits.idle_ttl` (60 s where there is none).
    `read_ahead`: how many jobs may be on the way to a worker at once, for jobs that take microseconds; at 1 each is
    written when the one before has been answered, and nothing of what follows is so. Above, jobs that wait (none over
    PIPE_BUF bytes, 4096 on Linux; no stream, no lease) may lie in a worker's relay ahead of their turn, which can't be
    undone: a cancelled one may still run, its reply is dropped, and nobody is killed for it unless it takes longer than
    `destroy_timeout`; `allocate_timeout` ends no job that has been written; when a worker dies, jobs it had not read go
    on to others, and of those it may have begun nobody knows (`WorkerError` with `started=None`). None is run twice.
    `open_python_pool` has no such field: its pools do so by themselves, and can undo it.
    `debug`: no standing workers; each job gets a process that was started after the job was handed in, so edited code
    counts at once, with at most `num_workers` processes at a time. One that fails to boot is its job's `SpawnError`.
    `name`: the pool's name in logs and `repr`.
    """

    command: Command = attrs.field(validator=_check_command)
    num_workers: int = attrs.field(factory=available_cores, validator=_integer(1))
    max_executions: int = attrs.field(default=0, validator=_integer(0))
    allocate_timeout: float = attrs.field(default=60.0, validator=_number(infinite=True))
    destroy_timeout: float = attrs.field(default=10.0, validator=_number(zero=True))
    boot_timeout: float = attrs.field(default=60.0, validator=_number())
    max_queue: int | None = attrs.field(default=None, validator=_integer(0, optional=True))
    factory: Factory = attrs.field(factory=PipeFactory, validator=_instance(Factory, " such as PipeFactory()"))
    protocol: str = attrs.field(default="goridge-3", validator=_check_protocol)
    env: Environment | None = attrs.field(default=None, validator=_check_env, repr=False)
    cwd: str | bytes | os.PathLike[str] | None = attrs.field(default=None, validator=_check_cwd)
    max_frame_size: int = attrs.field(default=MAX_FRAME_SIZE, validator=_integer(1))
    restart: Restart = attrs.field(factory=Restart, validator=_instance(Restart))
    limits: Limits = attrs.field(factory=Limits, validator=_instance(Limits))
    max_workers: int | None = attrs.field(default=None, validator=_integer(1, optional=True))
    grow_after: float = attrs.field(default=0.1, validator=_number())
    read_ahead: int = attrs.field(default=1, validator=_integer(1))
    debug: bool = attrs.field(default=False, validator=_instance(bool))
    name: str = attrs.field(default="pool", validator=_check_name)

    def __attrs_post_init__(self) -> None:
        if self.max_workers is not None and self.max_workers < self.num_workers:
            raise ValueError(
                f"Config.max_workers ({self.max_workers}) must not be less than Config.num_workers ({self.num_workers})"
            )
