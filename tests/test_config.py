"""What is wrong with a configuration, and that it is said at construction, with the name of the field."""

import decimal
import math
import os
import pathlib
from typing import Any, Final

import attrs
import pytest

from trio_workers import (
    Config,
    Factory,
    Limits,
    Payload,
    PipeFactory,
    Restart,
    SocketFactory,
    SpawnError,
    State,
    Worker,
    open_pool,
    open_python_pool,
    open_worker,
)
from trio_workers import _config as config_module

COMMAND: Final = ["php", "worker.php"]


class Text(str):
    """What numbers and names must not be mistaken for."""


NO_INTS: Final = (True, False, 1.0, "1", b"1", [], decimal.Decimal(1), 1j)
NO_NUMBERS: Final = (True, False, "1", b"1", [], decimal.Decimal(1), 1j)
NO_BOOLS: Final = (None, 0, 1, 1.0, "", "yes", b"1", [])
NO_PATHS: Final = (0, 1.0, True, [], object())

WRONG_TYPES: Final[dict[str, tuple[object, ...]]] = {
    "command": (
        None,
        "php worker.php",
        b"php",
        pathlib.Path("php"),
        0,
        {"php"},
        {"php": 1},
        iter(COMMAND),
        bytearray(b"php"),
        memoryview(b"php"),
        [1],
        ["php", None],
        ["php", 1],
        ["php", True],
        ["php", ["worker.php"]],
        range(2),
    ),
    "num_workers": (None, *NO_INTS),
    "max_executions": (None, *NO_INTS),
    "allocate_timeout": (None, *NO_NUMBERS),
    "destroy_timeout": (None, *NO_NUMBERS),
    "boot_timeout": (None, *NO_NUMBERS),
    "max_queue": NO_INTS,
    "factory": (None, "pipes", PipeFactory, "tcp://127.0.0.1:0", 0),
    "protocol": (None, 3, True, b"goridge-3", ["goridge-3"]),
    "env": (0, "A=1", [("A", "1")], {"A": 1}, {"A": None}, {1: "A"}, {b"A": b"1"}, {"A": b"1"}),
    "cwd": NO_PATHS,
    "max_frame_size": (None, *NO_INTS),
    "restart": (None, Restart, {"initial": 1}, 1.0, True),
    "limits": (None, Limits, Restart(), {"ttl": 1}, 1.0, True),
    "max_workers": NO_INTS,
    "grow_after": (None, *NO_NUMBERS),
    "read_ahead": (None, *NO_INTS),
    "debug": NO_BOOLS,
    "name": (None, 1, True, b"pool", ["pool"]),
}
WRONG_VALUES: Final[dict[str, tuple[object, ...]]] = {
    "command": (
        [],
        (),
        [""],
        [b""],
        ["", "worker.php"],
        ["php\0"],
        ["php", "a\0b"],
        ["php", b"a\0b"],
        ["\ud800"],
        ["php", "\udc00"],
    ),
    "num_workers": (0, -1),
    "max_executions": (-1,),
    "allocate_timeout": (0, 0.0, -0.0, -1, math.nan, -math.inf),
    "destroy_timeout": (-1, -0.1, math.nan, math.inf, -math.inf),
    "boot_timeout": (0, 0.0, -1, math.nan, math.inf, -math.inf),
    "max_queue": (-1,),
    "factory": (),
    "protocol": ("", "goridge", "goridge-4", "Goridge-3", "goridge-3 "),
    "env": ({"": "1"}, {"A=B": "1"}, {"A": "1\0"}, {"A\0": "1"}, {"A": "\ud800"}, {"\ud800": "1"}),
    "cwd": ("", b"", "a\0b", b"a\0b", pathlib.Path("a\0b"), "\ud800"),
    "max_frame_size": (0, -1),
    "restart": (),
    "limits": (),
    "max_workers": (0, -1),
    "grow_after": (0, 0.0, -1, math.nan, math.inf, -math.inf),
    "read_ahead": (0, -1),
    "debug": (),
    "name": ("", "a\nb", "a\x1b[31mb", "\0"),
}
RIGHT: Final[dict[str, tuple[object, ...]]] = {
    "command": (("php",), [b"php"], [pathlib.Path("php"), "x"], lambda slot: COMMAND, len, ["php", ""]),
    "num_workers": (1, 1000),
    "max_executions": (0, 1),
    "allocate_timeout": (0.001, 1, math.inf),
    "destroy_timeout": (0, 0.0, 1),
    "boot_timeout": (0.001, 1),
    "max_queue": (None, 0, 1),
    "factory": (PipeFactory(), PipeFactory("socketpair"), SocketFactory("tcp://127.0.0.1:0")),
    "protocol": ("goridge-1", "goridge-2", "goridge-3"),
    "env": (None, {}, {"A": ""}, {"A": "b=c"}, os.environ, lambda slot: {}),
    "cwd": (None, ".", b".", pathlib.Path()),
    "max_frame_size": (1, 1 << 40),
    "restart": (Restart(),),
    "limits": (Limits(), Limits(ttl=1, max_memory=1)),
    "max_workers": (None, 1000),
    "grow_after": (0.001, 1),
    "read_ahead": (1, 32),
    "debug": (False, True),
    "name": ("pool", "ein Name", "池"),
}

RESTART_WRONG_TYPES: Final[dict[str, tuple[object, ...]]] = {
    **dict.fromkeys(("initial", "factor", "maximum", "jitter", "stable_after"), (None, *NO_NUMBERS)),
    "give_up_after": NO_INTS,
}
RESTART_WRONG_VALUES: Final[dict[str, tuple[object, ...]]] = {
    "initial": (0, -1, math.nan, math.inf),
    "factor": (0, 0.9, -1, math.nan, math.inf),
    "maximum": (0, -1, math.nan, math.inf, 0.01),
    "jitter": (-0.1, 1.1, math.nan, math.inf),
    "stable_after": (0, -1, math.nan, math.inf),
    "give_up_after": (0, -1),
}

LIMITS_WRONG_TYPES: Final[dict[str, tuple[object, ...]]] = {
    **dict.fromkeys(("ttl", "idle_ttl", "exec_ttl"), NO_NUMBERS),
    **dict.fromkeys(("max_memory", "hard_memory"), NO_INTS),
    "jitter": (None, *NO_NUMBERS),
}
LIMITS_WRONG_VALUES: Final[dict[str, tuple[object, ...]]] = {
    **dict.fromkeys(("ttl", "idle_ttl", "exec_ttl"), (0, 0.0, -0.0, -1, -0.1, math.nan, math.inf, -math.inf)),
    **dict.fromkeys(("max_memory", "hard_memory"), (0, -1)),
    "jitter": (-0.1, 1.1, math.nan, math.inf),
}
LIMITS_RIGHT: Final[dict[str, tuple[object, ...]]] = {
    **dict.fromkeys(("ttl", "idle_ttl", "exec_ttl"), (None, 0.001, 1, 1e9)),
    **dict.fromkeys(("max_memory", "hard_memory"), (None, 1, 1 << 50)),
    "jitter": (0, 0.0, 0.5, 1, 1.0),
}


def make(name: str, value: object) -> Config:
    return Config(**{"command": COMMAND, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Config, Restart, Limits])
def test_every_field_is_tried(kind: type) -> None:
    """A new field comes with its wrong types, wrong values and right ones."""
    fields = {field.name for field in attrs.fields(kind)}
    if kind is Config:
        assert fields == set(WRONG_TYPES) == set(WRONG_VALUES) == set(RIGHT)
    elif kind is Limits:
        assert fields == set(LIMITS_WRONG_TYPES) == set(LIMITS_WRONG_VALUES) == set(LIMITS_RIGHT)
    else:
        assert fields == set(RESTART_WRONG_TYPES) == set(RESTART_WRONG_VALUES)


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_type(name: str) -> None:
    """Bad input: a wrong type is a TypeError that names the field, at construction."""
    config = Config(command=COMMAND)
    for value in WRONG_TYPES[name]:
        with pytest.raises(TypeError, match=rf"\bConfig\.{name}\b"):
            raise AssertionError(f"{value!r} was taken: {make(name, value)}")
        with pytest.raises(TypeError, match=rf"\bConfig\.{name}\b"):
            raise AssertionError(f"{value!r} was taken: {attrs.evolve(config, **{name: value})}")


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_wrong_value(name: str) -> None:
    """Bad input: a wrong value is a ValueError that names the field, at construction."""
    for value in WRONG_VALUES[name]:
        with pytest.raises(ValueError, match=rf"\bConfig\.{name}\b"):
            raise AssertionError(f"{value!r} was taken: {make(name, value)}")


@pytest.mark.parametrize("name", RIGHT)
def test_right_value(name: str) -> None:
    """What is right is taken, and kept as it is."""
    for value in RIGHT[name]:
        assert getattr(make(name, value), name) is value


@pytest.mark.parametrize("name", RESTART_WRONG_TYPES)
def test_restart(name: str) -> None:
    """Bad input: the same for the fields of Restart."""
    for value in RESTART_WRONG_TYPES[name]:
        with pytest.raises(TypeError, match=rf"\bRestart\.{name}\b"):
            raise AssertionError(f"{value!r} was taken: {Restart(**{name: value})}")  # type: ignore[arg-type]
    for value in RESTART_WRONG_VALUES[name]:
        with pytest.raises(ValueError, match=rf"\bRestart\.{name}\b"):
            raise AssertionError(f"{value!r} was taken: {Restart(**{name: value})}")  # type: ignore[arg-type]


def test_the_least_is_said() -> None:
    """Bad input: a value below the least tells whether the least itself is taken, and it is so."""
    assert Restart(factor=1).factor == 1
    with pytest.raises(ValueError, match=r"^Restart\.factor must be at least 1, not 0\.5$"):
        Restart(factor=0.5)
    with pytest.raises(ValueError, match=r"^Restart\.initial must be more than 0, not 0$"):
        Restart(initial=0)
    assert Config(command=COMMAND, destroy_timeout=0).destroy_timeout == 0
    with pytest.raises(ValueError, match=r"^Config\.destroy_timeout must be at least 0, not -1$"):
        Config(command=COMMAND, destroy_timeout=-1)


@pytest.mark.parametrize("name", LIMITS_WRONG_TYPES)
def test_limits(name: str) -> None:
    """Bad input: the same for the fields of Limits."""
    wrong: Any
    for wrong in LIMITS_WRONG_TYPES[name]:
        with pytest.raises(TypeError, match=rf"\bLimits\.{name}\b"):
            raise AssertionError(f"{wrong!r} was taken: {Limits(**{name: wrong})}")
    for wrong in LIMITS_WRONG_VALUES[name]:
        with pytest.raises(ValueError, match=rf"\bLimits\.{name}\b"):
            raise AssertionError(f"{wrong!r} was taken: {Limits(**{name: wrong})}")
    right: Any
    for right in LIMITS_RIGHT[name]:
        assert getattr(Limits(**{name: right}), name) is right


def test_more_soft_memory_than_hard() -> None:
    """Bad input: a soft bound above the hard one would never be looked at: an error that names both."""
    with pytest.raises(ValueError, match=r"Limits\.max_memory \(2\).*Limits\.hard_memory \(1\)"):
        Limits(max_memory=2, hard_memory=1)
    with pytest.raises(ValueError, match=r"Limits\.hard_memory"):
        attrs.evolve(Limits(max_memory=2), hard_memory=1)
    assert Limits(max_memory=2, hard_memory=2).bounds_memory
    assert Limits(max_memory=2).bounds_memory
    assert Limits(hard_memory=2).bounds_memory
    assert not Limits(ttl=1).bounds_memory


def test_fewer_workers_at_most_than_always() -> None:
    """Bad input: `max_workers` below `num_workers` is an error that names both."""
    with pytest.raises(ValueError, match=r"Config\.max_workers \(2\).*Config\.num_workers \(3\)"):
        Config(command=COMMAND, num_workers=3, max_workers=2)
    with pytest.raises(ValueError, match=r"Config\.max_workers"):
        attrs.evolve(Config(command=COMMAND, num_workers=2, max_workers=2), num_workers=3)
    assert Config(command=COMMAND, num_workers=3, max_workers=3).max_workers == 3


@pytest.mark.parametrize("name", ["limits", "max_workers", "grow_after", "debug"])
def test_open_python_pool(name: str) -> None:
    """Bad input: a pool of functions has the same fields, and the same errors, at the call itself."""
    value: Any
    for value in WRONG_TYPES[name]:
        if name == "limits" and value is None:
            continue  # there it means none
        with pytest.raises(TypeError, match=rf"\bConfig\.{name}\b"):
            open_python_pool(1, **{name: value})
    for value in WRONG_VALUES[name]:
        with pytest.raises(ValueError, match=rf"\bConfig\.{name}\b"):
            open_python_pool(1, **{name: value})
    with pytest.raises(ValueError, match=r"Config\.max_workers"):
        open_python_pool(3, max_workers=2)


def test_defaults() -> None:
    """The defaults are those of the design's table."""
    config = Config(command=COMMAND)
    assert config.num_workers == len(os.sched_getaffinity(0))
    assert attrs.asdict(config, recurse=False) == {
        "command": COMMAND,
        "num_workers": config.num_workers,
        "max_executions": 0,
        "allocate_timeout": 60.0,
        "destroy_timeout": 10.0,
        "boot_timeout": 60.0,
        "max_queue": None,
        "factory": PipeFactory("pipe"),
        "protocol": "goridge-3",
        "env": None,
        "cwd": None,
        "max_frame_size": 64 << 20,
        "restart": Restart(initial=0.1, factor=2.0, maximum=30.0, jitter=0.1, stable_after=10.0, give_up_after=None),
        "limits": Limits(),
        "max_workers": None,
        "grow_after": 0.1,
        "read_ahead": 1,
        "debug": False,
        "name": "pool",
    }
    assert attrs.asdict(Limits()) == {
        "ttl": None,
        "idle_ttl": None,
        "exec_ttl": None,
        "max_memory": None,
        "hard_memory": None,
        "jitter": 0.1,
    }


def test_frozen_and_keywords_only() -> None:
    """A configuration does not change, and takes no arguments by place."""
    with pytest.raises(TypeError):
        Config(COMMAND)  # type: ignore[misc]
    with pytest.raises(TypeError):
        Restart(1.0)  # type: ignore[misc]
    with pytest.raises(TypeError):
        Limits(1.0)  # type: ignore[misc]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Limits().ttl = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError, match="command"):
        Config()  # type: ignore[call-arg]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Config(command=COMMAND).num_workers = 2  # type: ignore[misc]
    assert Config(command=COMMAND) == Config(command=COMMAND)


def test_command_as_one_string() -> None:
    """Bad input: a shell's line is refused by a sentence that shows what to write instead."""
    with pytest.raises(TypeError, match=r"\['php', 'worker\.php'\]"):
        Config(command="php worker.php")  # type: ignore[arg-type]


def test_env_is_not_in_errors() -> None:
    """Secrets: what stands in `env` is in no error about it."""
    env: Any
    for env in (
        {"TOKEN": "hunter2", "BAD=": "hunter2"},
        {"TOKEN": b"hunter2"},
        {"TOKEN": "hunter2\0"},
        {"TOKEN": ["hunter2"]},
        "TOKEN=hunter2",
        ["TOKEN=hunter2"],
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            Config(command=COMMAND, env=env)
        assert "hunter2" not in str(caught.value)


def test_env_is_not_in_repr() -> None:
    """Secrets: what stands in `env` is in no `repr`."""
    config = Config(command=COMMAND, env={"TOKEN": "hunter2"})
    assert "hunter2" not in repr(config)
    assert "TOKEN" not in repr(config)
    assert "hunter2" not in repr(attrs.evolve(config, name="another"))


async def test_env_is_not_in_spawn_errors() -> None:
    """Secrets: nor in the error of a worker that could not be started with it."""
    config = Config(command=["no-such-program"], num_workers=1, env={"TOKEN": "hunter2"})
    with pytest.raises(SpawnError) as caught:
        async with open_pool(config):
            pass
    error: BaseException | None = caught.value
    while error is not None:
        assert "hunter2" not in f"{error} {error!r} {error.args}"
        error = error.__cause__ or error.__context__


def test_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """`num_workers` is by default the cores that this process may use, not all there are."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 7})
    assert Config(command=COMMAND).num_workers == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert config_module.available_cores() == 1


# factories


def test_pipe_factory() -> None:
    """Bad input: a wrong type or value names the field."""
    wrong: Any
    for wrong in (None, 1, True, b"pipe", ["pipe"]):
        with pytest.raises(TypeError, match=r"PipeFactory\.transport"):
            raise AssertionError(PipeFactory(wrong))
    for wrong in ("", "pipes", "Pipe", "tcp"):
        with pytest.raises(ValueError, match=r"PipeFactory\.transport"):
            raise AssertionError(PipeFactory(wrong))


def test_socket_factory() -> None:
    """Bad input: a wrong type or a wrong address names the field."""
    wrong: Any
    for wrong in (None, 1, True, b"tcp://127.0.0.1:0", ("127.0.0.1", 0)):
        with pytest.raises(TypeError, match=r"SocketFactory\.address"):
            raise AssertionError(SocketFactory(wrong))
    for wrong in (
        "",
        "127.0.0.1:0",
        "tcp:127.0.0.1:0",
        "udp://127.0.0.1:0",
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:http",
        "tcp://127.0.0.1:٣",
        "tcp://:0",
        "tcp://*:0",
        "tcp://example.org:0",
        "tcp://::1:0",
        "tcp://[127.0.0.1]:0",
        "tcp://0.0.0.0:0",
        "tcp://[::]:0",
        "tcp://192.0.2.1:0",
        "unix://",
        "unix://relative/path",
        "unix:///path/",
        "unix:///a\0b",
        "unix:///" + "x" * 200,
    ):
        with pytest.raises(ValueError, match=r"SocketFactory\.address"):
            raise AssertionError(SocketFactory(wrong))


def test_wider_than_loopback_by_name() -> None:
    """Promise 10: wider than loopback is refused unless asked for by name."""
    assert SocketFactory("tcp://0.0.0.0:0", beyond_loopback=True).beyond_loopback
    with pytest.raises(TypeError, match="beyond_loopback"):
        SocketFactory("tcp://0.0.0.0:0", beyond_loopback=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        SocketFactory("tcp://0.0.0.0:0", True)  # type: ignore[misc]


def test_factory_is_abstract() -> None:
    """`Factory` is an ABC."""
    with pytest.raises(TypeError):
        Factory()  # type: ignore[abstract]


# payloads


@pytest.mark.parametrize("field", ["body", "context"])
def test_payload_types(field: str) -> None:
    """Payloads: bytes-like, `None` and `b""` are one; what could change later is copied."""
    for value in (b"data", bytearray(b"data"), memoryview(b"data"), memoryview(b"_d_a_t_a")[1::2]):
        assert getattr(Payload(**{field: value}), field) == b"data"
        assert type(getattr(Payload(**{field: value}), field)) is bytes
    assert Payload(**{field: None}) == Payload(**{field: b""}) == Payload()
    buffer = bytearray(b"data")
    payload = Payload(**{field: buffer})
    buffer[:] = b"lost"
    assert getattr(payload, field) == b"data"
    same = b"data"
    assert getattr(Payload(**{field: same}), field) is same


@pytest.mark.parametrize("field", ["body", "context"])
def test_payload_wrong_type(field: str) -> None:
    """Bad input: a body that is not bytes-like is a TypeError that names the field."""
    value: Any
    for value in ("text", Text("text"), 1, True, 1.5, ["list"], {"a": 1}, object(), Payload()):
        with pytest.raises(TypeError, match=rf"Payload\.{field}"):
            raise AssertionError(Payload(**{field: value}))


def test_payload_is_frozen() -> None:
    """A payload does not change, and can be a key."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Payload(b"a").body = b"b"  # type: ignore[misc]
    assert {Payload(b"a", b"b"): 1}[Payload(b"a", b"b")] == 1


# what opens a pool


@pytest.mark.parametrize("opener", [open_pool, open_worker])
def test_open_with_no_config(opener: Any) -> None:
    """Bad input: whatever is no Config is refused by the call itself, before anything is awaited."""
    for config in (None, COMMAND, "php worker.php", {"command": COMMAND}, Config):
        with pytest.raises(TypeError, match="config must be a Config"):
            opener(config)


@pytest.mark.parametrize("opener", [open_pool, open_worker])
def test_open_with_no_observer(opener: Any) -> None:
    """Bad input: an observer that can't be called."""
    with pytest.raises(TypeError, match="observer"):
        opener(Config(command=COMMAND), observer=1)


@pytest.mark.parametrize("kind", [State, Worker])
def test_no_public_constructor(kind: Any) -> None:
    """What only a pool can make says where it comes from."""
    with pytest.raises(TypeError, match="no public constructor"):
        kind()
