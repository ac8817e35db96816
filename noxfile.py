"""Sessions of trio_workers: ``nox -l`` lists them, ``nox`` alone runs what a change must pass."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["tests", "lint", "types", "docs"]

PYTHONS = ["3.11", "3.12", "3.13"]

# Most tests wait most of the time, for processes that start or end: three fill two cores.
ON_THREE_PROCESSES = ("-n", "3", "--dist", "worksteal")

# A process that keeps one core busy, and ends with its parent even where that one is killed.
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))"


@contextlib.contextmanager
def all_cores_busy() -> Iterator[None]:
    """Keep every core busy while the block runs."""
    with contextlib.ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            process = subprocess.Popen([sys.executable, "-c", BUSY])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def take_number(session: nox.Session, default: int) -> tuple[int, list[str]]:
    """Split the arguments after ``--`` into a leading number, or the default, and the rest."""
    arguments = list(session.posargs)
    if arguments and arguments[0].isdecimal():
        return int(arguments[0]), arguments[1:]
    return default, arguments


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the suite; arguments after ``--`` go to pytest."""
    session.install(".[test]")
    session.run("python", "-m", "pytest", "-W", "error", *ON_THREE_PROCESSES, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Look at style, format and spelling."""
    session.install(".[lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types, and that every public name has one."""
    session.install(".[types,cli,metrics,otel,status]")
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--verifytypes", "trio_workers", "--ignoreexternal")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the docs into docs/_build; a warning is an error."""
    session.install(".[docs]")
    session.run("sphinx-build", "-W", "-n", "--keep-going", "-b", "html", "docs", "docs/_build/html", *session.posargs)


@nox.session
def roster(session: nox.Session) -> None:
    """Drive the roster's two state machines for 30 minutes each, or for ``-- MINUTES``; then 2,000,000 plain steps."""
    minutes, arguments = take_number(session, 30)
    session.install(".[test]")
    environment = {"TRIO_WORKERS_ROSTER_MINUTES": str(minutes), "TRIO_WORKERS_TEST_LIMIT": "0"}
    machines = ("tests/test_roster_machine.py", "tests/test_roster_life.py::test_life_by_hypothesis")
    session.run("python", "-m", "pytest", *machines, *arguments, env=environment)
    session.run("python", "-m", "tests.roster_life", "2000000")


@nox.session
def frames(session: nox.Session) -> None:
    """Push 1,000,000 mutated frames, or ``-- COUNT``, through the three dialects."""
    count, arguments = take_number(session, 1_000_000)
    session.install(".[test]")
    session.run("python", "tests/mutate_frames.py", str(count), *arguments)


@nox.session
def repeat(session: nox.Session) -> None:
    """Run the whole suite 10 times, or ``-- TIMES``, each in another order."""
    times, arguments = take_number(session, 10)
    session.install(".[test]")
    for turn in range(1, times + 1):
        session.log(f"turn {turn} of {times}")
        session.run("python", "-m", "pytest", "-q", *ON_THREE_PROCESSES, *arguments)


@nox.session
def faults(session: nox.Session) -> None:
    """Run the tests of faults and cancellation 50 times, or ``-- TIMES``, with every core busy."""
    times, arguments = take_number(session, 50)
    session.install(".[test]")
    with all_cores_busy():
        for turn in range(1, times + 1):
            session.log(f"turn {turn} of {times}")
            session.run("python", "-m", "pytest", "-q", "-m", "faults", *ON_THREE_PROCESSES, *arguments)


@nox.session
def flat(session: nox.Session) -> None:
    """Put 100,000 jobs, or ``-- COUNT``, through one pool: memory, descriptors and tasks must stay flat."""
    session.install(".")
    session.run("python", "-W", "error", "tests/hundred_thousand.py", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Put pools of every kind into a storm, for 3 minutes or ``-- MINUTES [SEED]``; ``--only KIND`` is one kind."""
    minutes, arguments = take_number(session, 3)
    seed = arguments[:1] if arguments and arguments[0].isdecimal() else []
    chosen = ["--minutes", str(minutes), *(["--seed", *seed] if seed else []), *arguments[len(seed) :]]
    session.install(".[test]")
    session.run("python", "-W", "error", "-m", "tests.soak", *chosen)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure, and print the tables; ``-- --write`` puts them and their charts into the docs and the README.

    That takes about a quarter of an hour. ``--only SECTION ...`` is a part of it, ``--quick`` the least of everything,
    ``--json FILE`` has the figures of each round, and ``--million`` puts 1,000,000 jobs through each path instead.
    """
    session.install(".[bench]")
    session.run("python", "-m", "tests.benchmarks", *session.posargs)
