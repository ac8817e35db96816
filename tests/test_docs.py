"""What the docs say of the code is true: test ids, names, layout, examples, bytes."""

import ast
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
import trio.testing

import trio_workers
import trio_workers.child
import trio_workers.control
import trio_workers.testing
from tests.test_endings import EXPECTED, LEAP, PLACES, ROWS, leap, until
from tests.test_python_docs import matches
from trio_workers import Config, JobTimeout, Limits, Payload, Restart, SpawnError, WorkerError, _exchange, open_pool
from trio_workers import _goridge as goridge
from trio_workers._core import READ_MEMORY_EVERY

ROOT: Final = Path(__file__).parent.parent
DOCS: Final = ROOT / "docs"
PAGES: Final = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *DOCS.glob("*.md")])
TEST_ID: Final = re.compile(r"tests/\w+\.py::[\w\[\]-]+")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def section(page: str, heading: str) -> str:
    """The text under a heading, up to the next one of its level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", read(page), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_each_test_that_is_named_exists() -> None:
    """An id in the docs is one that pytest knows, with or without its parameters."""
    named = {test_id for page in PAGES for test_id in TEST_ID.findall(read(page))}
    assert len(named) > 60
    files = sorted({test_id.partition("::")[0] for test_id in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert collected.returncode == 0, collected.stdout + collected.stderr
    ids = set(collected.stdout.splitlines())
    known = ids | {test_id.partition("[")[0] for test_id in ids}
    assert named <= known, sorted(named - known)


def test_each_cell_of_the_table_has_its_test() -> None:
    """The table of endings has one cell for each test, and one test for each cell."""
    rows = re.findall(
        r"^\| \*\*.+\*\* \|(.+)\|$", section("docs/what-happens.md", "The table of endings"), re.MULTILINE
    )
    cells = [TEST_ID.findall(cell) for row in rows for cell in row.split(" | ")]
    assert cells == [[f"tests/test_endings.py::test_ending[{row}-{place}]"] for row, place in in_order(EXPECTED)]


def in_order(table: dict[tuple[str, str], object]) -> list[tuple[str, str]]:
    assert set(table) == {(row, place) for row in ROWS for place in PLACES}
    return [(row, place) for row in ROWS for place in PLACES]


def test_each_promise_names_its_tests() -> None:
    """Eleven promises, and at least three tests for each."""
    promises = re.split(r"^\d+\. ", section("docs/what-happens.md", "The promises"), flags=re.MULTILINE)[1:]
    assert len(promises) == 11
    assert all(len(TEST_ID.findall(promise)) >= 3 for promise in promises)


def test_each_story_names_its_tests() -> None:
    """No story of the page is a mere claim."""
    stories = re.split(r"^## ", read("docs/what-happens.md"), flags=re.MULTILINE)[1:]
    assert len(stories) >= 15
    assert [story.splitlines()[0] for story in stories if not TEST_ID.search(story)] == []


STORY: Final = """
import os, sys, time
from trio_workers.child import serve

held = []

def handle(job):
    what, _, argument = job.body.decode().partition(" ")
    if what == "exit":
        os._exit(3)
    elif what == "wait":
        while not os.path.exists(argument):
            time.sleep(0.01)
        return
    elif what == "hang":
        print("page 1 of 7", file=sys.stderr, flush=True)
    held.append(b"x" * (int(argument or 0) << 20))
    if what == "hang":
        time.sleep(1000)

serve(handle)
"""
"""The worker of the stories whose log the page shows."""

BROKEN: Final = [sys.executable, "-c", "raise SystemExit('no such file: model.bin')"]


def story_config(**fields: Any) -> Config:
    fields = {"num_workers": 1, "env": {"PYTHONPATH": str(ROOT)}, "name": "jobs", **fields}
    return Config(**{"command": [sys.executable, "-c", STORY], **fields})


async def job_runs_too_long(log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = story_config(limits=Limits(exec_ttl=LEAP))
    async with open_pool(config) as pool, trio.open_nursery() as nursery:

        async def run() -> None:
            with pytest.raises(JobTimeout):
                await pool.exec(Payload(b"hang"), label="report 7")

        nursery.start_soon(run)
        await until(lambda: "page 1" in log.text)
        await leap(LEAP)
        await pool.exec(Payload(b"ok"))


async def worker_grows(log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = story_config(limits=Limits(max_memory=48 << 20, hard_memory=128 << 20))
    async with open_pool(config) as pool, trio.open_nursery() as nursery:
        await pool.exec(Payload(b"grow 64"))
        for _ in range(2):
            await leap(READ_MEMORY_EVERY)
        await until(lambda: pool.statistics().exits.get("max_memory"))

        async def run() -> None:
            with pytest.raises(WorkerError):
                await pool.exec(Payload(b"hang 256"), label="report 7")

        nursery.start_soon(run)  # until the next reading, a second later at most
        await until(lambda: "page 1" in log.text)
        await pool.exec(Payload(b"ok"))


async def all_come_of_age(log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    async with open_pool(story_config(num_workers=3, limits=Limits(ttl=LEAP, jitter=0))) as pool:
        await leap(LEAP)
        await until(lambda: pool.statistics().exits.get("ttl") == 3)


async def release_is_rolled_out(log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = story_config(num_workers=2)
    async with open_pool(config) as pool:
        await pool.reset(attrs.evolve(config, env={**(config.env or {}), "RELEASE": "2"}))  # type: ignore[dict-item]
        with pytest.raises(SpawnError):
            await pool.reset(attrs.evolve(config, command=BROKEN))


async def load_goes_up_and_down(log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    async with open_pool(story_config(max_workers=2, limits=Limits(idle_ttl=LEAP))) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(pool.exec, Payload(f"wait {go_on}".encode()))
            await until(lambda: pool.statistics().busy == 2)
            go_on.touch()
        for _ in range(2):
            await leap(LEAP)
        assert pool.statistics().target == 1


async def crash_loop(log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", STORY]]
    config = story_config(
        command=lambda _: commands.pop() if commands else BROKEN, restart=Restart(give_up_after=3, initial=0.01)
    )
    with pytest.raises(trio_workers.RestartLimitExceeded):
        async with open_pool(config) as pool:
            with pytest.raises(WorkerError):
                await pool.exec(Payload(b"exit"), label="report 7")
            await trio.sleep_forever()


async def debug_pool_does_not_start(log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    async with open_pool(story_config(command=BROKEN, debug=True)) as pool:
        with pytest.raises(SpawnError):
            await pool.exec(Payload(b"ok"), label="report 7")


STORIES: Final[dict[str, Callable[[pytest.LogCaptureFixture, Path], Awaitable[None]]]] = {
    "too-long": job_runs_too_long,
    "memory": worker_grows,
    "age": all_come_of_age,
    "reset": release_is_rolled_out,
    "growth": load_goes_up_and_down,
    "crash-loop": crash_loop,
    "debug": debug_pool_does_not_start,
}


@pytest.mark.faults
@pytest.mark.limit(60 + 2 * LEAP)
@pytest.mark.parametrize("name", STORIES)
async def test_log_of_a_story(
    name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    """What the page shows of the log is what real workers leave there, but for pids and what stands as "..."."""
    (shown,) = re.findall(rf"^<!-- log of {name} -->\n```text\n(.*?)^```$", read("docs/what-happens.md"), re.M | re.S)
    with caplog.at_level(logging.DEBUG, "trio_workers"), trio.fail_after(50 + 2 * LEAP):
        await STORIES[name](caplog, tmp_path)
    said = [
        f"{record.levelname} {record.getMessage()}"
        for record in caplog.records
        if record.name in ("trio_workers.pool", "trio_workers.worker")
    ]
    assert matches(shown, "\n".join(said)), "\n".join(said)


def test_reference_is_complete() -> None:
    """Each public name is in the reference, under the module it is imported from, and nothing else is."""
    documented: dict[str, set[str]] = {}
    module = ""
    for directive, name in re.findall(r"^\.\. (currentmodule|auto\w+):: (\w[\w.]*)", read("docs/reference.md"), re.M):
        if directive == "currentmodule":
            module = name
        else:
            documented.setdefault(module, set()).add(name)
    public = {
        "trio_workers": set(trio_workers.__all__),
        "trio_workers.control": set(trio_workers.control.__all__),
        "trio_workers.child": set(trio_workers.child.__all__),
        "trio_workers.testing": set(trio_workers.testing.__all__),
    }
    assert documented == public


def table(page: str, heading: str, first: str) -> dict[str, list[str]]:
    """A section's table whose first column has this title: the other cells by the first one, in order."""
    (body,) = re.findall(rf"^\| {first} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", section(page, heading), re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    return {row[0].strip("`"): row[1:] for row in rows}


def shown_default(default: Any) -> str:
    """How the reference shows the default of a field."""
    if default is attrs.NOTHING:
        return "required"
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        name = default.factory.__name__
        return "usable cores" if name == "available_cores" else f"`{name}()`"
    return f"`{default!r}`"


@pytest.mark.parametrize("kind", [trio_workers.Config, trio_workers.Limits, trio_workers.Restart])
def test_tables_of_the_configuration(kind: type) -> None:
    """Each field is there, in order, with its true default."""
    # A table begins after the paragraph that names its class.
    text = section("docs/reference.md", "Configuration").partition(f"\n`{kind.__name__}`, ")[2]
    rows = re.findall(
        r"^\| `(\w+)` \|[^|]+\| ([^|]+) \|[^|]+\|$", text.partition("\n\n|")[2].partition("\n\n")[0], re.M
    )
    assert rows == [(field.name, shown_default(field.default)) for field in attrs.fields(kind)]


def test_tables_of_the_statistics() -> None:
    """Fields, outcomes and reasons are those of the code."""
    page, heading = "docs/reference.md", "The pool's statistics"
    assert list(table(page, heading, "field")) == [field.name for field in attrs.fields(trio_workers.PoolStatistics)]
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "trio_workers").glob("_*.py"))
    outcomes = {"replied", "failed", "cancelled", "memory", *_exchange._OUTCOMES.values(), *_exchange._ENDS.values()}
    assert set(table(page, heading, "outcome")) == outcomes
    told = (
        r'(?:retire|kill|_leave|_dismiss)\([\w.]+, "([^"]+)"',
        r'\.reason = (?:seat\.\w+ or )?"([^"]+)"',
        r'\.due = seat\.due or "([^"]+)"',
        r'Excess\([\w, ]*"([^"]+)"',
        r'^RESET: Final = "([^"]+)"',
        r'exits\["([^"]+)"',
    )
    reasons = {reason for pattern in told for reason in re.findall(pattern, code, re.MULTILINE)}
    assert set(table(page, heading, "reason")) == reasons


def test_layout_is_true() -> None:
    """The list of modules in the design page has each file of the package, and no other."""
    (layout,) = re.findall(r"^trio_workers/\n(.*?)^tests/", section("docs/design.md", "Layout"), re.M | re.S)
    listed = re.findall(r"^  (\S+)", layout, re.MULTILINE)
    package = ROOT / "trio_workers"
    there = {path.name for path in package.iterdir() if path.is_file()}
    there |= {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    assert sorted(listed) == sorted(there)


@pytest.mark.parametrize("page", PAGES)
def test_code_compiles(page: str) -> None:
    """Each block of Python is Python; a part of an async function may stand alone."""
    for block in blocks(page, "python"):
        compile(block, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize(
    ("page", "minimum"),
    [
        ("docs/tutorial.md", 10),
        ("docs/index.md", 2),
        ("docs/workers.md", 4),
        ("docs/running-for-months.md", 5),
        ("docs/logging-recipes.md", 8),
        ("docs/turning.md", 2),
        ("README.md", 0),
    ],
)
def test_blocks_are_what_their_files_say(page: str, minimum: int) -> None:
    """A block below a comment that names a file is a run of whole lines of that file; nothing has drifted."""
    found = re.findall(r"^<!-- (\S+\.\w+) -->\n```\w+\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)
    assert len(found) >= minimum
    assert len(found) == len(re.findall(r"^<!-- \S+\.\w+ -->$", read(page), re.MULTILINE))
    for name, block in found:
        text = (ROOT / page).parent.joinpath(name).read_text(encoding="utf-8")
        assert f"\n{block}" in f"\n{text}", f"{page} shows what is not in {name}"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    """Each line of the unit is understood, and the signals that it sends are those that its program hears."""
    (unit,) = blocks("docs/running-for-months.md", "ini")
    program = read("docs/examples/service.py")
    assert "KillMode=mixed\n" in unit
    assert "signal.SIGTERM" in program
    assert "kill -HUP" in unit
    assert "signal.SIGHUP" in program
    path = tmp_path / "jobs.service"
    path.write_text(unit.replace("/srv/jobs/.venv/bin/python", sys.executable), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("page", ["docs/tutorial.md", "docs/index.md"])
def test_pages_show_their_code_on_a_forge(page: str) -> None:
    """A forge does not know Sphinx: what a reader needs there stands in the page itself."""
    assert "{literalinclude}" not in read(page)


def test_readme_shows_what_is_run() -> None:
    """Its first two programs are the files that the tests run, less their docstrings."""
    worker, hello, *_ = blocks("README.md", "python")
    for block, name in ((worker, "worker.py"), (hello, "hello.py")):
        assert read(f"docs/examples/{name}").partition('"""\n\n')[2] == block


@pytest.mark.parametrize("marker", ["command 1: main job", "command 2: tests"])
def test_readme_commands(marker: str) -> None:
    """Each is one line that makes its own virtual environment, right after its marker."""
    (command,) = re.findall(rf"<!-- {marker} -->\n```sh\n(.+)\n```", read("README.md"))
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -q ")
    for path in re.findall(r"docs/\S+", command):
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """A relative link names a file that is there."""
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[\w-]+)?\)", read(page)):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    for target in re.findall(r"^```\{literalinclude\} (\S+)", read(page), re.MULTILINE):
        assert (ROOT / page).parent.joinpath(target).is_file(), target


def test_examples_are_listed() -> None:
    """Each example is on the examples page, and each one named there exists."""
    text = read("docs/examples.md")
    named = set(re.findall(r"`(\w+\.py)`", text)) | set(re.findall(r"examples/(\w+\.py)", text))
    named = {name for name in named if not name.startswith("test_")}
    assert named == {path.name for path in (DOCS / "examples").glob("*.py")}


def test_loggers_are_listed() -> None:
    """The tutorial's table has each logger of the package."""
    in_code: set[str] = set()
    for path in (ROOT / "trio_workers").rglob("*.py"):
        in_code |= set(re.findall(r'getLogger\("(trio_workers\.\w+)"\)', path.read_text(encoding="utf-8")))
    assert set(re.findall(r"^\| `(trio_workers\.\w+)` \|", read("docs/tutorial.md"), re.MULTILINE)) == in_code


def test_bytes_of_goridge_3() -> None:
    """The examples on the page of the wire are what we send and what we understand."""
    (block,) = [b for b in blocks("docs/wire.md", "text") if "stop the stream" in b]
    shown = [bytes.fromhex(re.sub(r"[^0-9a-f]", "", line[30:])) for line in block.splitlines()]
    reply = goridge.encode_reply("goridge-3", b"", b"hi")
    assert shown == [
        goridge.encode_control("goridge-3", b'{"pid":7}'),
        b"".join(goridge.encode_job("goridge-3", b"c", b"hi")),
        reply,
        goridge.encode_reply("goridge-3", b"", b"hi", goridge.MORE),
        goridge.encode_error("goridge-3", b"no"),
        goridge.encode_control("goridge-3", goridge.STOP),
        goridge.frame_3(0, b"", goridge.STREAM_STOP),
        goridge.frame_3(0, b"", goridge.PONG),
    ]


@pytest.mark.parametrize("protocol", ["goridge-1", "goridge-2"])
def test_bytes_of_the_older_dialects(protocol: str) -> None:
    """The same, for both columns of the older dialects."""
    (block,) = [b for b in blocks("docs/wire.md", "text") if "goridge-2   " not in b and "no context" in b]
    first, second = block.splitlines()[0].index("goridge-1"), block.splitlines()[0].index("goridge-2")
    columns = slice(first, second) if protocol == "goridge-1" else slice(second, None)
    shown = [re.sub(r"[^0-9a-f]", "", line[columns]) for line in block.splitlines()[1:]]
    job = b"".join(goridge.encode_job(protocol, b"c", b"hi")).hex()
    reply = goridge.encode_reply(protocol, b"", b"hi").hex()
    assert shown[1] + shown[2] == job
    assert shown[3] + shown[4] == reply
    assert shown[5] == goridge.encode_error(protocol, b"no").hex()
    for line, payload in ((shown[0], b'{"pid":7}'), (shown[6], goridge.STOP)):
        assert line + payload.hex() == goridge.encode_control(protocol, payload).hex()
