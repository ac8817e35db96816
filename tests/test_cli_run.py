"""A pool in the shell: `trio-workers run`."""

import base64
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from pathlib import Path
from typing import Final

import psutil
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from tests.support import ROOT, until
from trio_workers import JobError, Payload, WorkerCrashed
from trio_workers.cli._errors import CommandError
from trio_workers.cli._jobs import (
    HEAD,
    Output,
    ReaderGone,
    Splitter,
    Ticket,
    TooLong,
    format_json,
    parse_json,
    parse_line,
    read_jobs,
    say,
)

WORKER: Final = """
import os, sys, time
from trio_workers.child import Reply, serve

def handle(job):
    what, _, argument = job.body.partition(b" ")
    if what == b"crash":
        os._exit(3)
    if what == b"fail":
        raise ValueError("no such picture")
    if what == b"sleep":
        open(argument, "w").close()
        time.sleep(1000)
    if what == b"wait":
        while not os.path.exists(argument):
            time.sleep(0.005)
    if what == b"context":
        return Reply(job.context, b"seen")
    if what == b"print":
        print("from the worker", file=sys.stderr, flush=True)
    return b"<" + job.body + b">"

serve(handle)
"""


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    """A worker program's command, after `--`."""
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return ["--", sys.executable, "-S", str(path)]


@pytest.fixture(autouse=True)
def a_place_for_sockets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control sockets lie where nobody else's do; the path is short, for those of sockets must be."""
    monkeypatch.setitem(ENVIRONMENT, "XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trio_workers", "run", *arguments]


ENVIRONMENT: Final = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


def run(*arguments: str, jobs: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the command to its end."""
    return subprocess.run(command(*arguments), input=jobs, capture_output=True, env=ENVIRONMENT, check=False)


def start(*arguments: str, **how: object) -> subprocess.Popen[bytes]:
    """Start it, with pipes where nothing else is said."""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.Popen(command(*arguments), env=ENVIRONMENT, **streams)  # type: ignore[call-overload,no-any-return]


# lines


def split(blocks: list[bytes], longest: int, separator: bytes = b"\n") -> list[bytes | TooLong]:
    splitter = Splitter(separator, longest)
    found = [line for block in blocks for line in splitter.feed(block)]
    return [*found, *splitter.end()]


@given(st.lists(st.binary(max_size=20).map(lambda data: data.replace(b"x", b"\n"))), st.integers(1, 30))
def test_lines_of_blocks(blocks: list[bytes], longest: int) -> None:
    """However the blocks are cut, the lines are the same, and what is too long is only counted."""
    lines = b"".join(blocks).split(b"\n")
    if not lines[-1]:
        lines.pop()
    expected = [line if len(line) <= longest else TooLong(line[:HEAD], len(line)) for line in lines]
    assert split(blocks, longest) == expected


def test_a_long_line_is_not_kept() -> None:
    """Of a line that is too long no more than its beginning stays in memory."""
    splitter = Splitter(b"\n", 100)
    for _ in range(1000):
        assert list(splitter.feed(b"y" * 1000)) == []
        assert len(splitter._rest) <= 100
    assert list(splitter.feed(b"\nz\n")) == [TooLong(b"y" * HEAD, 1_000_000), b"z"]


@given(st.binary(), st.binary())
def test_json_lines_hold_any_bytes(body: bytes, context: bytes) -> None:
    """What is written of a reply can be read as a job again."""
    line = format_json(Ticket(3, b""), Payload(body, context))
    assert b"\n" not in line
    assert b"\0" not in line
    written = json.loads(line)
    assert written.pop("job") == 3
    assert parse_json(json.dumps(written).encode()) == Payload(body, context)


BAD_JSON: Final = {
    b"{": "is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    b"\xff": "is no JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    b"[1]": 'is no JSON object such as {"body": "..."}',
    b'{"bod": "a"}': "has a key 'bod'; those known are body, body_base64, context, context_base64",
    b'{"body": 3}': "body must be a string, not int",
    b'{"body": "a", "body_base64": "YQ=="}': "has body and body_base64; one of them, please",
    b'{"body_base64": "?"}': "body_base64 is no base64: Only base64 data is allowed",
    b'{"body": "\\ud800"}': "body holds half a surrogate pair; body_base64 takes any bytes",
}


@pytest.mark.parametrize("line", BAD_JSON)
def test_bad_json_lines(line: bytes) -> None:
    """What is wrong with a line is said."""
    with pytest.raises(ValueError) as caught:
        parse_json(line)
    assert str(caught.value).replace("Illegal", "illegal") == BAD_JSON[line]


def test_what_is_no_job_in_json_lines() -> None:
    """Blank lines are none, an empty object is an empty job."""
    assert parse_json(b"  \r") is None
    assert parse_json(b"{}") == Payload()


def test_errors_in_one_line() -> None:
    """Of a traceback the last line is shown, of another text the first."""
    assert say(JobError("Traceback (most recent call last):\n  File ...\nValueError: no")) == "JobError: ValueError: no"
    assert say(JobError("no\nsuch")) == "JobError: no"
    assert say(JobError()) == "JobError"
    assert say(JobError("\x1b]0;no\x07\rsuch\x9b")) == r"JobError: \x1b]0;no\x07\rsuch\x9b"
    assert str(Ticket(7, b"a\tb\x1b\xff")) == r"job 7 (a\tb\x1b\xff)"
    assert str(Ticket(8, b"x" * HEAD)) == f"job 8 ({'x' * HEAD}...)"


def test_errors_as_json() -> None:
    """An error stands in the place of its reply, and says whether the job had begun."""
    assert json.loads(format_json(Ticket(1, b""), JobError("a\nb"))) == {"job": 1, "error": "a\nb", "kind": "JobError"}
    crashed = json.loads(format_json(Ticket(2, b""), WorkerCrashed("gone", started=True)))
    assert crashed == {"job": 2, "error": "gone", "kind": "WorkerCrashed", "started": True}
    bad = json.loads(format_json(Ticket(3, b"", "is no JSON"), TypeError("not seen")))
    assert bad == {"job": 3, "error": "is no JSON", "kind": "BadLine"}


# out


async def test_a_named_pipe_without_a_writer(tmp_path: Path) -> None:
    """Jobs may come from one; while nobody has opened its other end, all else goes on."""
    path = tmp_path / "jobs"
    os.mkfifo(path)
    found: list[bytes] = []

    async def read() -> None:
        jobs = read_jobs([str(path)], b"\n", 100, parse_line, lambda size: None)
        async with aclosing(jobs):
            async for _, payload in jobs:
                assert payload is not None
                found.append(bytes(payload.body))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        writing = os.open(path, os.O_WRONLY)
        os.write(writing, b"a\nb\n")
        os.close(writing)
    assert found == [b"a", b"b"]


async def test_a_full_pipe_blocks_nobody() -> None:
    """Where nobody reads, other tasks go on; all is written in the end, and the pipe is as blocking as before."""
    read_fd, write_fd = os.pipe()
    data = os.urandom(1 << 20)
    got = bytearray()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Output(write_fd).write, data)
            await trio.testing.wait_all_tasks_blocked()
            while len(got) < len(data):
                got += await trio.to_thread.run_sync(os.read, read_fd, 1 << 16)
        assert got == data
        assert os.get_blocking(write_fd)
    finally:
        os.close(read_fd)
        os.close(write_fd)


async def test_cancel_at_a_full_pipe() -> None:
    """A write that waits can be cancelled."""
    read_fd, write_fd = os.pipe()
    try:
        with trio.move_on_after(0.01) as scope:
            await Output(write_fd).write(bytes(1 << 20))
        assert scope.cancelled_caught
    finally:
        os.close(read_fd)
        os.close(write_fd)


async def test_nobody_reads() -> None:
    """A reader that is gone is not an error like others."""
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    try:
        with pytest.raises(ReaderGone):
            await Output(write_fd).write(b"x")
    finally:
        os.close(write_fd)


async def test_what_cannot_be_written(tmp_path: Path) -> None:
    """A full disk is told of."""
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(CommandError, match=r"^stdout: No space left on device$"):
            await Output(full).write(b"x")
        with trio.CancelScope() as scope:
            scope.cancel()
            await Output(full).write(b"x")
        assert scope.cancelled_caught
    finally:
        os.close(full)


# the command


def test_replies_in_order(worker: list[str]) -> None:
    """A job a line, a reply a line, as they come; the last line may lack its end, and an empty one is a job too."""
    done = run("--num-workers", "3", *worker, jobs=b"one\n\ntwo\r\n\xff\nlast")
    assert done.stderr == b""
    assert done.stdout == b"<one>\n<>\n<two\r>\n<\xff>\n<last>\n"
    assert done.returncode == 0


def test_no_jobs(worker: list[str]) -> None:
    """Nothing in, nothing out."""
    assert run(*worker).stdout == b""
    done = subprocess.run(command(*worker), stdin=subprocess.DEVNULL, capture_output=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_nul(worker: list[str]) -> None:
    """With --null a job may have newlines."""
    assert run("--null", *worker, jobs=b"a\nb\0c\0").stdout == b"<a\nb>\0<c>\0"


def test_files(worker: list[str], tmp_path: Path) -> None:
    """Jobs come from files, one after the other, and stdin where it is named; the end of a file ends a line."""
    (tmp_path / "a").write_bytes(b"1\n2")
    (tmp_path / "b").write_bytes(b"5\n")
    files = ["--input", str(tmp_path / "a"), "--input", "-", "--input", str(tmp_path / "b")]
    done = run(*files, *worker, jobs=b"3\n4\n")
    assert done.stdout == b"<1>\n<2>\n<3>\n<4>\n<5>\n"


def test_failed_jobs(worker: list[str]) -> None:
    """Each failed job has a line on stderr with its number and its beginning; the others go on; exit code 1."""
    done = run("--num-workers", "1", *worker, jobs=b"a\nfail x\nb\ncrash\nc\n")
    assert done.stdout == b"<a>\n<b>\n<c>\n"
    assert done.returncode == 1
    lines = done.stderr.decode().splitlines()
    assert "trio-workers: job 2 (fail x): JobError: ValueError: no such picture" in lines
    (crashed,) = (line for line in lines if "job 4 (crash): WorkerCrashed: worker" in line)
    assert "exited with status 3" in crashed
    assert lines[-1] == "trio-workers: 2 of 5 jobs failed"
    assert all(line.startswith("trio-workers: ") for line in lines)


def test_on_error(worker: list[str]) -> None:
    """In the place of a failed job there is nothing, an empty line, or the end."""
    jobs = b"a\nfail\nb\n"
    assert run("--quiet", "--on-error", "skip", *worker, jobs=jobs).stdout == b"<a>\n<b>\n"
    done = run("--quiet", "--on-error", "empty", *worker, jobs=jobs)
    assert (done.stdout, done.stderr, done.returncode) == (b"<a>\n\n<b>\n", b"", 1)
    done = run("--on-error", "stop", "--num-workers", "1", *worker, jobs=jobs)
    assert (done.stdout, done.returncode) == (b"<a>\n", 1)
    assert done.stderr.decode().splitlines()[-1] == "trio-workers: 1 of 2 jobs failed"


def test_too_long_lines(worker: list[str]) -> None:
    """A line that no frame may hold is a job that failed, and nothing more."""
    done = run("--max-frame-size", "100", *worker, jobs=b"a\n" + b"x" * 200_000 + b"\nb\n" + b"y" * 101)
    assert done.stdout == b"<a>\n<b>\n"
    said = done.stderr.decode()
    assert f"job 2 ({'x' * HEAD}...): has 200,000 bytes, and at most 100 are taken" in said
    assert f"job 4 ({'y' * HEAD}...): has 101 bytes, and at most 100 are taken" in said
    assert done.returncode == 1


def test_json_lines(worker: list[str]) -> None:
    """Jobs with a context, and bytes that are no text; errors stand in their place."""
    jobs = [
        b'{"body": "a\\nb"}',
        b"",
        b'{"body": "context", "context": "c"}',
        b"nonsense",
        b'{"body": "fail"}',
        b'{"body_base64": "%s"}' % base64.b64encode(b"\xff\0"),
    ]
    done = run("--jsonl", *worker, jobs=b"\n".join(jobs))
    first, second, third, fourth, fifth = map(json.loads, done.stdout.splitlines())
    assert first == {"job": 1, "body": "<a\nb>"}
    assert second == {"job": 2, "body": "c", "context": "seen"}
    assert third["job"] == 3
    assert third["error"].startswith("is no JSON")
    assert fourth["error"].endswith("ValueError: no such picture")
    assert "job 4" in done.stderr.decode()
    assert base64.b64decode(fifth["body_base64"]) == b"<\xff\0>"
    assert done.returncode == 1


@pytest.mark.parametrize("unordered", [False, True])
def test_order(worker: list[str], tmp_path: Path, unordered: bool) -> None:
    """A slow job holds back those after it, but with --unordered: each is written as it is ready."""
    go = tmp_path / "go"
    arguments = ["--num-workers", "2", "--jsonl", *(["--unordered"] if unordered else []), *worker]
    with start(*arguments) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"body": f"wait {go}"}).encode() + b'\n{"body": "b"}\n{"body": "fail"}\n')
        process.stdin.flush()
        if unordered:
            assert json.loads(process.stdout.readline()) == {"job": 2, "body": "<b>"}
            assert json.loads(process.stdout.readline())["job"] == 3
        go.touch()
        process.stdin.close()
        rest = [json.loads(line)["job"] for line in process.stdout]
        process.stdout.close()
        assert rest == ([1] if unordered else [1, 2, 3])
    assert process.returncode == 1


def test_all_jobs_unordered(worker: list[str]) -> None:
    """Whatever the order, each job has its reply."""
    jobs = [b"%d" % number for number in range(2000)]
    done = run("--unordered", "--num-workers", "3", "--read-ahead", "2", *worker, jobs=b"\n".join(jobs))
    assert sorted(done.stdout.splitlines()) == sorted(b"<%s>" % job for job in jobs)
    assert done.returncode == 0
    stopped = run("--unordered", "-q", "--on-error", "stop", *worker, jobs=b"fail\n" * 100)
    assert stopped.returncode == 1


def test_each_reply_at_once(worker: list[str]) -> None:
    """As a part of an interactive pipeline it keeps nothing back."""
    with start(*worker) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(3):
            process.stdin.write(b"%d\n" % number)
            process.stdin.flush()
            assert process.stdout.readline() == b"<%d>\n" % number
        process.communicate()
    assert process.returncode == 0


def test_the_reader_is_gone(worker: list[str]) -> None:
    """As with `| head`: it ends, without a word, with the exit code that SIGPIPE would have."""
    shell = " ".join(map(_quoted, command(*worker)))
    script = f"set -o pipefail; yes | {shell} | head -2"
    done = subprocess.run(["bash", "-c", script], capture_output=True, env=ENVIRONMENT, check=False)
    assert done.stdout == b"<y>\n<y>\n"
    assert done.stderr == b""
    assert done.returncode == 128 + signal.SIGPIPE


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


@pytest.mark.parametrize("unordered", [[], ["--unordered"]], ids=["in order", "unordered"])
def test_ctrl_c(worker: list[str], tmp_path: Path, unordered: list[str]) -> None:
    """Ctrl-C ends it and its workers at once, with one line and exit code 130."""
    noted = tmp_path / "began"
    process = start("--num-workers", "2", *unordered, *worker)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"a\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"<a>\n"
    process.stdin.write(b"sleep %s\n" % os.fsencode(noted))
    process.stdin.flush()
    trio.run(until, noted.exists)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.send_signal(signal.SIGINT)
    out, said = process.communicate()
    assert process.returncode == 130
    assert out == b""
    assert said == b"trio-workers: interrupted after 1 jobs, 0 of which failed\n"
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in workers)


def test_workers_say_something(worker: list[str]) -> None:
    """What a worker writes to its stderr is shown, but with --quiet."""
    assert re.fullmatch(rb"trio-workers: \S+ \d+: from the worker\n", run(*worker, jobs=b"print").stderr)
    assert run("-q", *worker, jobs=b"print").stderr == b""


def test_a_program_that_is_none() -> None:
    """A worker that can't be started is told of once, and was tried: exit code 1."""
    done = run("--", "no-such-program")
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert re.match(r"trio-workers: SpawnError: worker \(slot \d+\) could not be started: FileNotFoundError", line)
    assert "no-such-program" in line


def test_a_program_that_ends() -> None:
    """What it said before it ended is shown as well."""
    done = run("--num-workers", "1", "--", sys.executable, "-c", "raise SystemExit('no such file: model.bin')")
    said, error = done.stderr.decode().splitlines()
    assert said.endswith("no such file: model.bin")
    assert error.startswith("trio-workers: SpawnError: worker")
    assert done.returncode == 1


def test_a_pool_that_gives_up(tmp_path: Path) -> None:
    """Where workers can't be started any more, it ends and says why."""
    program = tmp_path / "worker.py"
    program.write_text(WORKER.replace("serve(handle)", f"os.unlink({str(program)!r}); serve(handle)"))
    flags = ["--num-workers", "1", "--restart.give-up-after", "2", "--restart.initial", "0.01"]
    done = run(*flags, "--", sys.executable, "-S", str(program), jobs=b"crash\n" * 5)
    assert done.returncode == 1
    assert "RestartLimitExceeded" in done.stderr.decode().splitlines()[-1]


MISUSED: Final = {
    ("--input", "/nowhere/jobs", "--", "x"): "--input /nowhere/jobs: no such file",
    ("--input", "/", "--", "x"): "--input /: is a directory",
    ("--watch", "/nowhere/app", "--", "x"): "--watch /nowhere/app: no such file or directory",
    ("--null", "--jsonl", "--", "x"): "--null and --jsonl exclude each other: a line of JSON holds any byte as it is",
    ("--on-error", "panic", "--", "x"): ('Invalid value "panic" for --on-error. Choose from: "skip", "empty", "stop".'),
}


@pytest.mark.parametrize("arguments", MISUSED, ids=" ".join)
def test_misuse(arguments: tuple[str, ...]) -> None:
    """What can't be done is said in one line, before anything was begun."""
    done = run(*arguments)
    assert (done.returncode, done.stderr.decode()) == (2, f"trio-workers: {MISUSED[arguments]}\n")


@pytest.mark.parametrize("name", ["nowhere/pool.sock", "taken"])
def test_an_address_that_can_not_be_listened_to(worker: list[str], tmp_path: Path, name: str) -> None:
    """It is named in one line, and nothing was tried."""
    (tmp_path / "taken").touch()
    address = f"unix://{tmp_path}/{name}"
    done = run("--factory", address, *worker)
    (said,) = done.stderr.decode().splitlines()
    assert said.startswith(f"trio-workers: {address} can't be listened to: ")
    assert done.returncode == 2


def test_stderr_is_closed(worker: list[str]) -> None:
    """Nobody is told of what fails, and no other file gets it."""
    shell = " ".join(map(_quoted, command(*worker)))
    done = subprocess.run(
        ["bash", "-c", f"{shell} 2>&-"], input=b"a\nfail\nb\n", capture_output=True, env=ENVIRONMENT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, b"<a>\n<b>\n", b"")


def test_stdin_is_closed(worker: list[str]) -> None:
    """A shell may close stdin."""
    shell = " ".join(map(_quoted, command(*worker)))
    done = subprocess.run(["bash", "-c", f"{shell} <&-"], capture_output=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 2
    assert done.stderr == b"trio-workers: stdin is closed; give a file of jobs by --input FILE\n"


WITHOUT: Final = """
import sys
sys.modules[sys.argv[1]] = None
from trio_workers.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("missing", ["cattrs", "cyclopts", "rich", "watchfiles"])
def test_without_the_extra(worker: list[str], missing: str) -> None:
    """What is missing is named, with the extra that it comes with."""
    program = [sys.executable, "-c", WITHOUT, missing, "run", "--watch", worker[-1], *worker]
    done = subprocess.run(program, input=b"a", capture_output=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.decode() == (
        f"trio-workers: the command line needs {missing}, which comes with: pip install 'trio_workers[cli]'\n"
    )


def test_watch_is_all_that_needs_watchfiles(worker: list[str]) -> None:
    """Without --watch nobody asks for it."""
    program = [sys.executable, "-c", WITHOUT, "watchfiles", "run", *worker]
    done = subprocess.run(program, input=b"a", capture_output=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"<a>\n", b"")


def test_stdin_that_somebody_made_non_blocking(worker: list[str]) -> None:
    """It may be: what is shared with others is theirs, too."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    with start(*worker, stdin=read_fd) as process:
        os.close(read_fd)
        assert process.stdout is not None
        for _ in range(2):
            os.write(write_fd, b"a\n")
            assert process.stdout.readline() == b"<a>\n"
        os.close(write_fd)
        process.communicate()
    assert process.returncode == 0


def test_config_file(worker: list[str], tmp_path: Path) -> None:
    """The command may be in the file, and the one after -- wins."""
    file = tmp_path / "pool.toml"
    file.write_text(f"num_workers = 1\ncommand = {json.dumps(worker[1:])}\n")
    assert run("--config", str(file), jobs=b"a").stdout == b"<a>\n"
    file.write_text('num_workers = 1\ncommand = ["no-such-program"]\n')
    assert run("--config", str(file), *worker, jobs=b"a").stdout == b"<a>\n"


def test_watch(worker: list[str], tmp_path: Path) -> None:
    """A worker program that is edited serves from then on."""
    program = Path(worker[-1])
    with start("--num-workers", "1", "--watch", str(program), *worker) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask() -> bytes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"a\n")
            process.stdin.flush()
            return process.stdout.readline()

        assert ask() == b"<a>\n"
        program.write_text(WORKER.replace('b"<"', 'b"new <"'))
        while ask() != b"new <a>\n":
            pass
        program.write_text("raise SystemExit('a mistake')")
        assert process.stderr is not None
        for line in process.stderr:
            if b"the reset failed, and the workers that were there go on" in line:
                break
        assert ask() == b"new <a>\n"
        process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize("flag", [["--no-control"], []], ids=["not seen", "seen"])
def test_others_see_it(worker: list[str], tmp_path: Path, flag: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other commands find the pool, and turn it, where that isn't forbidden."""
    monkeypatch.setitem(ENVIRONMENT, "XDG_RUNTIME_DIR", str(tmp_path))
    status = [sys.executable, "-m", "trio_workers", "status", "--json", "--pool", "shell"]
    with start("--num-workers", "1", "--name", "shell", *flag, *worker) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"a\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"<a>\n"
        seen = subprocess.run(status, capture_output=True, env=ENVIRONMENT, check=False)
        process.communicate()
    assert process.returncode == 0
    if flag:
        assert seen.returncode == 2
    else:
        assert b'"shell"' in seen.stdout
    assert not list(tmp_path.rglob("*.sock"))


def test_no_place_for_a_control_socket(worker: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it can't be made, the jobs are done all the same."""
    monkeypatch.setitem(ENVIRONMENT, "XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "trio_workers").touch()
    done = run(*worker, jobs=b"a\n")
    assert (done.returncode, done.stdout) == (0, b"<a>\n")
    assert done.stderr.startswith(b"trio-workers: this pool can't be seen by trio-workers top: ")


def test_too_long_a_place_for_a_control_socket(
    worker: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the name of the directory keep jobs from being done."""
    long = tmp_path / ("x" * 100)
    long.mkdir(mode=0o700)
    monkeypatch.setitem(ENVIRONMENT, "XDG_RUNTIME_DIR", str(long))
    done = run(*worker, jobs=b"a\n")
    assert (done.returncode, done.stdout) == (0, b"<a>\n")
    (said,) = done.stderr.decode().splitlines()
    assert said.startswith("trio-workers: this pool can't be seen by trio-workers top: path ")


# in a terminal


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """A terminal's two ends."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))
    try:
        yield ours, theirs
    finally:
        os.close(theirs)
        os.close(ours)


def read_until(fd: int, wanted: Callable[[bytes], object]) -> bytes:
    """Read a terminal until it has shown something."""
    got = b""
    while not wanted(got):
        got += os.read(fd, 1 << 16)
    return got


def test_progress(worker: list[str], terminal: tuple[int, int], tmp_path: Path) -> None:
    """In a terminal stderr has a line that shows how far it is; errors stand above it, and it is gone at the end."""
    ours, theirs = terminal
    go = tmp_path / "go"
    process = start("--num-workers", "1", *worker, stderr=theirs)
    assert process.stdin is not None
    process.stdin.write(b"a\nfail\nwait %s\n" % os.fsencode(go))
    process.stdin.close()
    shown = read_until(ours, lambda got: b"2 jobs, 1 failed" in got and b"1 of 1 workers busy" in got)
    assert b"job 2 (fail): JobError: ValueError: no such picture\r\n" in shown
    go.touch()
    shown = read_until(ours, lambda got: b"1 of 3 jobs failed" in got)
    assert process.stdout is not None
    with closing(process.stdout):
        assert process.stdout.read().startswith(b"<a>\n<wait ")
    assert process.wait() == 1


@pytest.mark.parametrize("flag", ["--no-progress", "--quiet"])
def test_no_progress(worker: list[str], terminal: tuple[int, int], flag: str) -> None:
    """Who doesn't want it has none."""
    ours, theirs = terminal
    process = start(flag, *worker, stderr=theirs)
    assert process.communicate(b"a\n")[0] == b"<a>\n"
    os.write(theirs, b"end")
    assert read_until(ours, lambda got: b"end" in got) == b"end"


def test_all_in_a_terminal(worker: list[str], terminal: tuple[int, int]) -> None:
    """Where all three are one terminal, jobs are typed and replies shown, and its flags are left as they were."""
    ours, theirs = terminal
    process = start("--num-workers", "1", *worker, stdin=theirs, stdout=theirs, stderr=theirs)
    read_until(ours, lambda got: b"jobs are read from this terminal, one a line; end them with Ctrl-D\r\n" in got)
    os.write(ours, b"hello\n")
    read_until(ours, lambda got: b"<hello>\r\n" in got)
    assert os.get_blocking(theirs)
    os.write(ours, b"\x04")
    assert process.wait() == 0
    assert os.get_blocking(theirs)


# the whole


PEAK: Final = """
import resource, sys
from trio_workers.cli import main
code = main(sys.argv[1:])
if sys.platform == "linux":
    # Not ru_maxrss: with vfork that of the child is never below that of its parent, which is pytest.
    with open("/proc/self/status") as status:
        peak = next(line.split()[1] for line in status if line.startswith("VmHWM:"))
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("peak", peak, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.limit(600)
def test_a_hundred_thousand_lines(worker: list[str], tmp_path: Path) -> None:
    """Through four workers, in order, with one killed on the way and its job told of, in memory that doesn't grow."""

    def send(lines: int, crash: int) -> int:
        jobs = tmp_path / "jobs"
        with jobs.open("wb") as file:
            file.writelines(b"crash\n" if number == crash else b"line %d\n" % number for number in range(1, lines + 1))
        replies, said = tmp_path / "replies", tmp_path / "said"
        arguments = ["run", "--num-workers", "4", "--input", str(jobs), *worker]
        with replies.open("wb") as out, said.open("wb") as err:
            program = [sys.executable, "-c", PEAK, *arguments]
            done = subprocess.run(program, stdout=out, stderr=err, env=ENVIRONMENT, check=False)
        assert done.returncode == 1
        with replies.open("rb") as file:
            for number in range(1, lines + 1):
                if number != crash:
                    assert file.readline() == b"<line %d>\n" % number
            assert file.read() == b""
        _, job, count, peak = said.read_text().splitlines()
        assert job.startswith(f"trio-workers: job {crash} (crash): WorkerCrashed: worker ")
        assert count == f"trio-workers: 1 of {lines:,} jobs failed"
        return int(peak.split()[1])

    few = send(5_000, 2_500)
    many = send(100_000, 50_000)
    assert many < few + 4096, (few, many)
