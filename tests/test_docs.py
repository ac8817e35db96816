"""What the docs say of the code is true: test ids, names, layout, examples, bytes."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

import trio_workers
import trio_workers.child
import trio_workers.testing
from tests.test_endings import EXPECTED
from trio_workers import _exchange
from trio_workers import _goridge as goridge

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
    rows = ["cancel", "crash", "stop-request", "close", "error", "give-up"]
    places = ["waiting", "written", "running", "answered", "streaming", "leased"]
    assert set(table) == {(row, place) for row in rows for place in places}
    return [(row, place) for row in rows for place in places]


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


@pytest.mark.parametrize("kind", [trio_workers.Config, trio_workers.Restart])
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
    outcomes = {"replied", "failed", "cancelled", *_exchange._OUTCOMES.values(), *_exchange._ENDS.values()}
    assert set(table(page, heading, "outcome")) == outcomes
    reasons = set(re.findall(r'(?:retire|kill)\([\w.]+, "([^"]+)"\)', code))
    reasons |= set(re.findall(r'\.reason = (?:seat\.\w+ or )?"([^"]+)"', code)) | set(
        re.findall(r'exits\["([^"]+)"', code)
    )
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
    ("page", "minimum"), [("docs/tutorial.md", 10), ("docs/index.md", 2), ("docs/workers.md", 4), ("README.md", 0)]
)
def test_blocks_are_what_their_files_say(page: str, minimum: int) -> None:
    """A block below a comment that names a file is a run of whole lines of that file; nothing has drifted."""
    found = re.findall(r"^<!-- (\S+\.\w+) -->\n```\w+\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)
    assert len(found) >= minimum
    assert len(found) == len(re.findall(r"^<!-- \S+\.\w+ -->$", read(page), re.MULTILINE))
    for name, block in found:
        text = (ROOT / page).parent.joinpath(name).read_text(encoding="utf-8")
        assert f"\n{block}" in f"\n{text}", f"{page} shows what is not in {name}"


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
    named -= {"test_examples.py"}
    assert named == {path.name for path in (DOCS / "examples").glob("*.py")}


def test_loggers_are_listed() -> None:
    """The tutorial's table has each logger of the package."""
    in_code: set[str] = set()
    for path in (ROOT / "trio_workers").rglob("*.py"):
        in_code |= set(re.findall(r'getLogger\("([\w.]+)"\)', path.read_text(encoding="utf-8")))
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
