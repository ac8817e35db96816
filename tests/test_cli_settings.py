"""What a pool is to be, from flags and from a TOML file."""

import math
import sys
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from tests.support import ROOT
from trio_workers import Config, Limits, PipeFactory, Restart, SocketFactory
from trio_workers.cli import load_config, main
from trio_workers.cli._app import app
from trio_workers.cli._errors import Misuse
from trio_workers.cli._settings import HELP, LEAVES, settle

EXAMPLE: Final = ROOT / "docs" / "examples" / "pool.toml"


def fields_of(kind: type[Any], before: str = "") -> set[str]:
    """The names of all fields, those of the classes inside too."""
    names: set[str] = set()
    for field in attrs.fields(kind):
        inner = attrs.has(field.type)
        names |= fields_of(field.type, f"{field.name}.") if inner else {f"{before}{field.name}"}
    return names


ONE_OF_EACH: Final[dict[str, tuple[str, str, object]]] = {
    "num_workers": ("3", "3", 3),
    "max_executions": ("7", "7", 7),
    "allocate_timeout": ("inf", "inf", math.inf),
    "destroy_timeout": ("2.5", "2.5", 2.5),
    "boot_timeout": ("5", "5", 5.0),
    "max_queue": ("0", "0", 0),
    "factory": ("socketpair", '"socketpair"', PipeFactory("socketpair")),
    "protocol": ("goridge-2", '"goridge-2"', "goridge-2"),
    "env": ("A=b=c", '{ A = "b=c" }', {"A": "b=c"}),
    "cwd": ("/tmp", '"/tmp"', "/tmp"),
    "max_frame_size": ("4096", "4_096", 4096),
    "max_workers": ("99", "99", 99),
    "grow_after": ("0.25", "0.25", 0.25),
    "read_ahead": ("4", "4", 4),
    "name": ("thumbs", '"thumbs"', "thumbs"),
    "restart.initial": ("0.5", "0.5", 0.5),
    "restart.factor": ("3", "3", 3.0),
    "restart.maximum": ("60", "60.0", 60.0),
    "restart.jitter": ("0", "0", 0.0),
    "restart.stable_after": ("1", "1", 1.0),
    "restart.give_up_after": ("4", "4", 4),
    "limits.ttl": ("3600", "3600", 3600.0),
    "limits.idle_ttl": ("60", "60", 60.0),
    "limits.exec_ttl": ("1.5", "1.5", 1.5),
    "limits.max_memory": ("1000", "1000", 1000),
    "limits.hard_memory": ("2000", "2000", 2000),
    "limits.jitter": ("1", "1", 1.0),
}
"""Of each field how it is written as a flag and in a file, and what it is then; less `command` and `debug`."""


def by_flags(*arguments: str, file: Path | None = None) -> Config:
    """What a command makes of its flags."""
    _, bound, _ = app.parse_args(["run", *arguments], exit_on_error=False, print_error=False)
    return settle(bound.args, bound.kwargs.get("pool"), file)


def value_of(config: Config, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_every_field_is_a_flag_and_a_key() -> None:
    """None is forgotten: neither by what is derived, nor by the help, nor by this test."""
    fields = fields_of(Config)
    assert {leaf.name for leaf in LEAVES} == fields
    assert set(HELP) == fields - {"command"}
    assert set(ONE_OF_EACH) == fields - {"command", "debug"}
    assert len(fields_of(Limits)) + len(fields_of(Restart)) == sum("." in name for name in fields)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_each_field(name: str, tmp_path: Path) -> None:
    """A flag and a key of a file say the same."""
    flag, written, value = ONE_OF_EACH[name]
    given = by_flags(f"--{name.replace('_', '-')}", flag, "--", "php", "worker.php")
    assert value_of(given, name) == value
    file = tmp_path / "pool.toml"
    file.write_text(f'command = ["php", "worker.php"]\n{name} = {written}\n')
    read = load_config(file)
    assert read == given
    assert type(value_of(read, name)) is type(value_of(given, name)) or isinstance(value, float)


@pytest.mark.parametrize(("flag", "value"), [("--debug", True), ("--no-debug", False)])
def test_debug(flag: str, value: bool, tmp_path: Path) -> None:
    """What is true or false takes no value, and has a flag for either."""
    file = tmp_path / "pool.toml"
    file.write_text(f'command = ["php"]\ndebug = {str(not value).lower()}\n')
    assert load_config(file).debug is not value
    assert by_flags(flag, file=file).debug is value


def test_what_is_not_given_is_as_config_has_it(tmp_path: Path) -> None:
    """Nothing has a default of its own here."""
    file = tmp_path / "pool.toml"
    file.write_text('command = ["php"]\n')
    assert load_config(file) == Config(command=["php"]) == by_flags("--", "php")


def test_the_example() -> None:
    """The file of the docs is one."""
    assert load_config(EXAMPLE) == load_config(str(EXAMPLE))
    config = load_config(EXAMPLE)
    assert config.command == ["php", "worker.php"]
    assert config.env == {"APP_ENV": "production"}
    assert config.limits == Limits(exec_ttl=30.0, max_memory=1 << 28)
    assert config.restart == Restart(give_up_after=20)
    assert (config.num_workers, config.max_executions, config.name) == (4, 10_000, "thumbnails")


def test_flags_win_over_the_file() -> None:
    """A flag wins over its key, the command after -- over the file's; variables are put together."""
    config = by_flags("--num-workers", "2", "--limits.exec-ttl", "5", "--env", "B=1", "--env", "APP_ENV=", file=EXAMPLE)
    assert config.command == ["php", "worker.php"]
    assert config.num_workers == 2
    assert config.limits == Limits(exec_ttl=5, max_memory=1 << 28)
    assert config.env == {"APP_ENV": "", "B": "1"}
    assert by_flags("--limits.exec-ttl", "none", file=EXAMPLE).limits.exec_ttl is None
    assert by_flags("--", "perl", "-w", "--num-workers", file=EXAMPLE).command == ["perl", "-w", "--num-workers"]


def test_factories() -> None:
    """How workers connect is a word, or an address."""
    assert by_flags("--factory", "pipe", "--", "php").factory == PipeFactory()
    assert by_flags("--factory", "tcp://127.0.0.1:0", "--", "php").factory == SocketFactory("tcp://127.0.0.1:0")
    assert by_flags("--factory", "unix:///run/x", "--", "php").factory == SocketFactory("unix:///run/x")


WRONG: Final = {
    "[limits]\ntll = 3": "limits.tll: no such key; did you mean ttl?",
    "num_worker = 3": "num_worker: no such key; did you mean num_workers?",
    "ttl = 3": "ttl: no such key; did you mean limits.ttl?",
    "limit = 3": "limit: no such key; did you mean limits?",
    "zzz = 3": "zzz: no such key",
    'num_workers = "4"': "num_workers: must be an int, not str",
    "num_workers = true": "num_workers: must be an int, not bool",
    "num_workers = 4.0": "num_workers: must be an int, not float",
    "boot_timeout = 2020-01-01": "boot_timeout: must be a number, not date",
    'debug = "yes"': "debug: must be true or false, not str",
    "name = 3": "name: must be a str, not int",
    "limits = 3": "limits: must be a table, not int",
    "[num_workers]": "num_workers: must be an int, not table",
    'restart.initial = "x"': "restart.initial: must be a number, not str",
    'command = "php worker.php"': 'command: must be an array of strings such as ["php", "worker.php"], not str',
    "command = [1]": 'command: must be an array of strings such as ["php", "worker.php"], not array',
    "command = []": "command: is empty; its first item is the program",
    "env = 3": "env: must be a table of strings, not int",
    "[env]\nA = 3": "env.A: must be a str, not int",
    'env = { "A=" = "b" }': "env: has a variable that can't be set: 'A='",
    'factory = "pip"': "factory: must be pipe, socketpair, tcp://HOST:PORT or unix:///PATH, not 'pip'",
    'factory = "tcp://x:1"': "factory: 'tcp://x:1': the host must be a numeric address or localhost",
    'factory = "tcp://8.8.8.8:0"': "factory: 'tcp://8.8.8.8:0': others can reach what is no loopback address",
    "num_workers = 0": "num_workers: must be at least 1, not 0",
    "limits.ttl = nan": "limits.ttl: must be finite, not nan",
    "limits.max_memory = 5\nlimits.hard_memory = 3": (
        "limits.max_memory (5) must not be more than limits.hard_memory (3)"
    ),
    "num_workers = 4\nmax_workers = 2": "max_workers (2) must not be less than num_workers (4)",
    'protocol = "http"': "protocol: must be one of goridge-1, goridge-2, goridge-3, not 'http'",
    "num_workers = ": "is no TOML: Invalid value (at end of document)",
    "command = ": "is no TOML: Invalid value (at end of document)",
    "#": "command: is missing; it is the worker program",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_files(text: str, tmp_path: Path) -> None:
    """What is wrong is named with its place."""
    file = tmp_path / "pool.toml"
    command = "" if "command" in text or text == "#" else 'command = ["php"]\n'
    file.write_text(f"{command}{text}")
    with pytest.raises(ValueError) as caught:
        load_config(file)
    assert str(caught.value) == f"{file}: {WRONG[text]}"


def test_all_that_is_wrong(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A program is told all of it, a line each; the command line the first, and how much more there is."""
    file = tmp_path / "pool.toml"
    file.write_text('num_workers = "x"\nzzz = 1\n[limits]\nttl = "y"\n')
    with pytest.raises(ValueError) as caught:
        load_config(file)
    assert sorted(str(caught.value).splitlines()) == [
        f"{file}: limits.ttl: must be a number, not str",
        f"{file}: num_workers: must be an int, not str",
        f"{file}: zzz: no such key",
    ]
    assert main(["run", "--config", str(file)]) == 2
    said = capfd.readouterr().err
    assert said == f"trio-workers: {str(caught.value).splitlines()[0]} (and 2 more)\n"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A program gets the OSError, the command line a sentence."""
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "none.toml")
    with pytest.raises(Misuse, match=r"none\.toml: No such file or directory$"):
        by_flags(file=tmp_path / "none.toml")
    with pytest.raises(Misuse, match=r": Is a directory$"):
        by_flags(file=tmp_path)
    file = tmp_path / "pool.toml"
    file.write_bytes(b"name = '\xff'")
    with pytest.raises(ValueError, match="is no TOML: it is not UTF-8"):
        load_config(file)


MISUSED: Final = {
    ("--num-workers", "x", "--", "php"): 'Invalid value for --num-workers: unable to convert "x" into int.',
    ("--num-workers", "0", "--", "php"): "--num-workers must be at least 1, not 0",
    ("--limits.ttl", "-1", "--", "php"): "--limits.ttl must be more than 0, not -1.0",
    ("--limits.tll", "1", "--", "php"): "Unknown option: --limits.tll. Did you mean --limits.ttl?",
    ("--env", "A", "--", "php"): "--env: must be KEY=VALUE, not 'A'",
    ("--factory", "x", "--", "php"): "--factory: must be pipe, socketpair, tcp://HOST:PORT or unix:///PATH, not 'x'",
    ("--num-workers", "3", "--max-workers", "1", "--", "php"): (
        "--max-workers (1) must not be less than --num-workers (3)"
    ),
    (
        "--",
        "",
    ): "the command after --: the program's name is empty",
    (): "no worker program was given; it comes last, after --: -- php worker.php",
    ("--config", "/nowhere/pool.toml"): "/nowhere/pool.toml: No such file or directory",
}


@pytest.mark.parametrize("arguments", MISUSED, ids=" ".join)
@pytest.mark.parametrize("command", ["run", "bench"])
def test_wrong_flags(command: str, arguments: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """One line, and exit code 2."""
    assert main([command, *arguments]) == 2
    assert capfd.readouterr() == ("", f"trio-workers: {MISUSED[arguments]}\n")


def test_help(capfd: pytest.CaptureFixture[str]) -> None:
    """All flags are shown, under one heading."""
    assert main(["run", "--help"]) == 0
    shown = capfd.readouterr().out
    assert all(leaf.flag in shown for leaf in LEAVES if leaf.name != "command")
    assert shown.count("─ The pool ─") == 1


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named, with what it comes with."""
    monkeypatch.delitem(sys.modules, "trio_workers.cli._settings")
    monkeypatch.delattr("trio_workers.cli._settings")
    monkeypatch.setitem(sys.modules, "cattrs", None)
    with pytest.raises(ModuleNotFoundError, match=r"^load_config\(\) needs cattrs, which comes with: pip install 'tri"):
        load_config(EXAMPLE)
