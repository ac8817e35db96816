"""What a pool is to be, from flags and from a TOML file: both are derived from the fields of `Config`.

A value goes through three hands. cyclopts (flags) or cattrs (the file) sees that it is of the right type and says which
flag or key it came from; `build_config` puts the two together, flags above the file; `Config` itself judges the value.
What it says is told of the flag or key, not of the class.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, cast

import attrs
import cattrs
from cattrs.errors import AttributeValidationNote, ClassValidationError, ForbiddenExtraKeysError
from cyclopts import Group, Parameter

from .._config import Config, Limits, Restart
from .._factories import Factory, PipeFactory
from .._goridge import PROTOCOLS
from .._sockets import SocketFactory
from ._errors import Misuse

HELP: Final[Mapping[str, str]] = {
    "num_workers": "How many processes, at least 1. By default the cores that may be used here.",
    "max_executions": "Jobs a worker begins before it is replaced; 0 sets no bound.",
    "allocate_timeout": "Seconds a job waits for a free worker; inf is allowed.",
    "destroy_timeout": "Seconds from the request to stop until a worker is killed; 0 kills at once.",
    "boot_timeout": "Seconds from a process's start to its handshake.",
    "max_queue": "More waiting callers than this are refused; none sets no bound.",
    "factory": "How workers connect: pipe, socketpair, tcp://HOST:PORT or unix:///PATH.",
    "protocol": f"The dialect that the workers speak: {', '.join(PROTOCOLS)}.",
    "env": "KEY=VALUE, added to the environment of the workers. May be given more than once.",
    "cwd": "The workers' directory.",
    "max_frame_size": "Bytes of one job or reply.",
    "max_workers": "How many workers the pool may grow to by itself while jobs wait.",
    "grow_after": "Seconds a job has waited when a worker is added for it.",
    "read_ahead": "How many jobs may be on the way to a worker at once, for jobs that take microseconds.",
    "debug": "A new process for each job, so that edited code counts at once.",
    "name": "The pool's name in messages.",
    "restart.initial": "Seconds before a worker that helped nobody is replaced, the first time.",
    "restart.factor": "How many times as long it is each time after.",
    "restart.maximum": "The most seconds it becomes.",
    "restart.jitter": "The share, 0 to 1, by which each of these waits is varied.",
    "restart.stable_after": "Seconds a worker must live for the count to start again.",
    "restart.give_up_after": "Failed starts in a row that end the pool; none means never.",
    "limits.ttl": "Seconds that a worker lives.",
    "limits.idle_ttl": "Seconds that a worker which has been at work may be without a job.",
    "limits.exec_ttl": "Seconds that a job may take; then its worker is killed.",
    "limits.max_memory": "Bytes of memory above which a worker is replaced after its job.",
    "limits.hard_memory": "Bytes of memory above which a worker is killed, with its job.",
    "limits.jitter": "The share, 0 to 1, by which ttl and max_executions are drawn shorter for each worker.",
}
"""What `--help` says of each field: the beginning of what the docstrings of `Config`, `Limits` and `Restart` say."""


class Unset:
    """Stands for what was not given: None is a value."""

    def __repr__(self) -> str:
        return "<not given>"


UNSET: Final = Unset()

Kind = type[Any] | Literal["argv", "factory", "environment"]

KINDS: Final[Mapping[str, Kind]] = {"command": "argv", "factory": "factory", "env": "environment", "cwd": str}
"""Fields that are written otherwise than they are typed, in a flag and in a file."""


_WORDS: Final[Mapping[type[Any], str]] = {int: "an int", float: "a number", str: "a str", bool: "true or false"}
"""The types that values may have in a file, and in a flag."""


@attrs.frozen
class Leaf:
    """A field of `Config`, or of one of the classes in it, by its name in a file: `limits.ttl`."""

    name: str
    kind: Kind
    optional: bool

    @property
    def flag(self) -> str:
        """The name of its flag."""
        return f"--{self.name.replace('_', '-')}"


def _leaves(of: type[Any], before: str = "") -> Iterator[Leaf]:
    for field in attrs.fields(of):
        name = f"{before}{field.name}"
        if attrs.has(field.type):
            yield from _leaves(field.type, f"{name}.")
            continue
        kinds = list(getattr(field.type, "__args__", (field.type,)))
        optional = type(None) in kinds
        kind = KINDS.get(name)
        if kind is None:
            (kind,) = (one for one in kinds if one is not type(None))
            if kind not in _WORDS:
                raise TypeError(f"Config.{name}: how is a {kind} written in a flag, and in a file?")
        yield Leaf(name, kind, optional)


# the file


def _of_kind(kind: type[Any]) -> Callable[[Any, Any], Any]:
    """Take a value of just this type: cattrs would make an int of "4"."""
    accepted = (int, float) if kind is float else (kind,)

    def check(value: Any, _: Any) -> Any:
        if type(value) not in accepted:
            raise TypeError(f"must be {_WORDS[kind]}, not {_word_of(value)}")
        return value

    return check


def _word_of(value: object) -> str:
    return "array" if isinstance(value, list) else "table" if isinstance(value, dict) else type(value).__name__


def _argv(value: Any, _: Any) -> Any:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in cast("list[object]", value)):
        given = _word_of(cast("object", value))
        raise TypeError(f'must be an array of strings such as ["php", "worker.php"], not {given}')
    return cast("list[str]", value)


def _environment(value: Any, _: Any) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"must be a table of strings, not {_word_of(value)}")
    for key, one in cast("dict[str, object]", value).items():
        if not isinstance(one, str):
            raise TypeError(f"{key}: must be a str, not {_word_of(one)}")
    return cast("dict[str, str]", value)


class _Argv:
    """What `command` is in a file."""


class _Variables:
    """What `env` is in a file."""


class _Address:
    """What `factory` is in a file."""


_IN_A_FILE: Final = {"argv": _Argv, "environment": _Variables, "factory": _Address}


def _table_of(of: type[Any], before: str = "") -> type[Any]:
    """Make the class that a table of the file is read into: the fields of `of`, none of which must be there."""
    leaves = {leaf.name: leaf for leaf in _leaves(of, before)}
    fields: dict[str, Any] = {}
    for field in attrs.fields(of):
        leaf = leaves.get(f"{before}{field.name}")
        if leaf is None:
            kind: Any = _table_of(field.type, f"{field.name}.")
        else:
            kind = _IN_A_FILE[leaf.kind] if isinstance(leaf.kind, str) else leaf.kind
        fields[field.name] = attrs.field(default=UNSET, type=kind)
    return attrs.make_class(f"{of.__name__}Table", fields, kw_only=True)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    for kind in _WORDS:
        converter.register_structure_hook(kind, _of_kind(kind))
    converter.register_structure_hook(_Argv, _argv)
    converter.register_structure_hook(_Variables, _environment)
    converter.register_structure_hook(_Address, _of_kind(str))

    def table(kind: type[Any]) -> Callable[[Any, Any], Any]:
        structure = cattrs.gen.make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)

        def check(value: Any, to: Any) -> Any:
            if not isinstance(value, dict):
                raise TypeError(f"must be a table, not {_word_of(value)}")
            return structure(cast("dict[str, Any]", value), to)

        return check

    converter.register_structure_hook_factory(attrs.has, table)
    return converter


LEAVES: Final = tuple(_leaves(Config))
_TABLE: Final = _table_of(Config)
_CONVERTER: Final = _converter()


def _faults(error: BaseException, place: str = "") -> Iterator[str]:
    """Say each thing that is wrong in a file, after the key that it is about."""
    if isinstance(error, ClassValidationError):
        of_keys, others = error.group_exceptions()
        for one, note in of_keys:
            assert isinstance(note, AttributeValidationNote)
            yield from _faults(one, f"{place}{note.name}.")
        for one in others:
            yield from _faults(one, place)
    elif isinstance(error, ForbiddenExtraKeysError):
        for key in sorted(error.extra_fields):
            yield f"{place}{key}: no such key{_meant(f'{place}{key}')}"
    else:
        key = place.rstrip(".")
        yield f"{key}.{error}" if re.match(r"\S+: ", str(error)) else f"{key}: {error}"


def _meant(key: str) -> str:
    """Guess what a key that is none was meant to be: one like it in its table, or of its name in another."""
    table, _, name = key.rpartition(".")
    here = {leaf.name.rpartition(".")[2]: leaf.name for leaf in LEAVES if leaf.name.rpartition(".")[0] == table}
    tables = {leaf.name.partition(".")[0] for leaf in LEAVES if "." in leaf.name} if not table else set[str]()
    likely = difflib.get_close_matches(name, [*here, *tables], n=1)
    if not likely:
        likely = [leaf.name for leaf in LEAVES if leaf.name.rpartition(".")[2] == name][:1]
    return f"; did you mean {likely[0]}?" if likely else ""


# both


@attrs.frozen
class Given:
    """A value, and where it was given: `pool.toml: limits.ttl`, `--limits.ttl`."""

    value: Any
    place: str


def read_file(path: str | os.PathLike[str]) -> dict[str, Given]:
    """Read the values of a TOML file, by the names of their fields.

    Raise OSError where it can't be read, and ValueError with a line for each thing that is wrong in it.
    """
    shown = os.fspath(path)
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{shown}: is no TOML: {error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{shown}: is no TOML: it is not UTF-8") from None
    try:
        table = _CONVERTER.structure(raw, _TABLE)
    except ClassValidationError as error:
        raise ValueError("\n".join(f"{shown}: {fault}" for fault in _faults(error))) from None
    given: dict[str, Given] = {}
    for leaf in LEAVES:
        value: Any = table
        for part in leaf.name.split("."):
            value = UNSET if value is UNSET else getattr(value, part)
        if value is not UNSET:
            given[leaf.name] = Given(value, f"{shown}: {leaf.name}")
    return given


def load_config(path: str | os.PathLike[str]) -> Config:
    """Do what `trio_workers.cli.load_config` says."""
    return build_config(read_file(path), f"{os.fspath(path)}: command: is missing; it is the worker program")


def build_config(given: Mapping[str, Given], no_command: str) -> Config:
    """Make a `Config` of what was given. Raise ValueError that says where the wrong value stands."""
    if "command" not in given:
        raise ValueError(no_command)
    fields: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {"limits": {}, "restart": {}}
    for name, one in given.items():
        table, _, key = name.rpartition(".")
        value = _factory(one) if name == "factory" else one.value
        (inner[table] if table else fields)[key] = value
    try:
        return Config(**fields, limits=Limits(**inner["limits"]), restart=Restart(**inner["restart"]))
    except (TypeError, ValueError) as error:
        raise ValueError(_relocated(str(error), given)) from None


def _factory(given: Given) -> Factory:
    text: str = given.value
    if text in ("pipe", "socketpair"):
        return PipeFactory("socketpair" if text == "socketpair" else "pipe")
    if not text.startswith(("tcp://", "unix://")):
        raise ValueError(f"{given.place}: must be pipe, socketpair, tcp://HOST:PORT or unix:///PATH, not {text!r}")
    try:
        return SocketFactory(text)
    except ValueError as error:
        why = str(error).removeprefix("SocketFactory.address ").removesuffix("; beyond_loopback=True allows it")
        raise ValueError(f"{given.place}: {why}") from None


def _relocated(text: str, given: Mapping[str, Given]) -> str:
    """Tell of the flag or key what `Config` tells of its field."""
    first = True

    def place(found: re.Match[str]) -> str:
        nonlocal first
        table, key = found[1].lower(), found[2]
        name = key if table == "config" else f"{table}.{key}"
        one = given.get(name)
        begins, first = first, False
        if one is None:
            return name
        if not begins:
            return one.place.rpartition(": ")[2]
        colon = ":" if ": " in one.place and text.startswith(" ", found.end()) and text[found.end() + 1] != "(" else ""
        return f"{one.place}{colon}"

    return re.sub(r"\b(Config|Limits|Restart)\.(\w+)", place, text)


# flags


def _flags() -> type[Any]:
    """Make the class of all flags of a pool; each is UNSET where it was not given."""
    group = Group("The pool", sort_key=1)
    fields: dict[str, Any] = {}
    for leaf in LEAVES:
        if leaf.kind == "argv":
            continue  # comes after --
        listed = leaf.kind == "environment"
        kind: Any = list[str] if listed else str if leaf.kind == "factory" else leaf.kind
        parameter = Parameter(
            name=leaf.flag,
            help=HELP.get(leaf.name, ""),
            group=group,
            show_default=False,
            consume_multiple=False,
            negative=None if kind is bool else (),
        )
        kind = kind | None if leaf.optional and not listed else kind
        fields[leaf.name.replace(".", "_")] = attrs.field(default=UNSET, type=cast("Any", Annotated[kind, parameter]))
    return attrs.make_class("PoolFlags", fields, kw_only=True)


if TYPE_CHECKING:

    class PoolFlags:
        """The flags of a pool that were given: what a command takes as `pool: PoolArguments = None`."""

else:
    PoolFlags = _flags()

PoolArguments = Annotated[PoolFlags | None, Parameter(name="*")]
SWITCH: Final = Parameter(negative=(), show_default=False)
"""Of a flag that takes no value."""
SEVERAL: Final = Parameter(negative=(), consume_multiple=False)
"""Of a flag that may be given more than once."""


def given_by_flags(flags: PoolFlags | None) -> dict[str, Given]:
    """Return what was given, by the names of the fields."""
    given: dict[str, Given] = {}
    for leaf in LEAVES:
        value: Any = getattr(flags, leaf.name.replace(".", "_"), UNSET)
        if value is not UNSET:
            given[leaf.name] = Given(_pairs(value) if leaf.kind == "environment" else value, leaf.flag)
    return given


def _pairs(texts: Iterable[str]) -> dict[str, str]:
    variables: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--env: must be KEY=VALUE, not {text!r}")
        variables[key] = value
    return variables


def settle(command: Sequence[str], flags: PoolFlags | None, file: Path | None) -> Config:
    """Put flags and file together, flags above the file. Raise `Misuse` that says where the wrong value stands."""
    try:
        given = {} if file is None else read_file(file)
        by_flags = given_by_flags(flags)
        if "env" in given and "env" in by_flags:
            by_flags["env"] = Given({**given["env"].value, **by_flags["env"].value}, "--env")
        given |= by_flags
        if command:
            given["command"] = Given(list(command), "the command after --")
        return build_config(given, "no worker program was given; it comes last, after --: -- php worker.php")
    except OSError as error:
        raise Misuse(f"{file}: {error.strerror}") from None
    except ValueError as error:
        first, *others = str(error).splitlines()
        more = f" (and {len(others)} more)" if others else ""
        raise Misuse(f"{first}{more}") from None


__all__ = [
    "HELP",
    "LEAVES",
    "SEVERAL",
    "SWITCH",
    "PoolArguments",
    "PoolFlags",
    "build_config",
    "given_by_flags",
    "load_config",
    "read_file",
    "settle",
]
