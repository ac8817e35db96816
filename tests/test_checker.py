"""The checker for worker programs: right ones pass in every dialect and over every relay, wrong ones get their hint."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.support import ROOT, require, until
from trio_workers import Config, Limits, PipeFactory, SocketFactory, _checker
from trio_workers._check_session import KEPT
from trio_workers._checker import BODY, CONTEXT, Finding, Report, check_worker
from trio_workers._diagnosis import diagnose, dialect_of, show
from trio_workers._goridge import PROTOCOLS, encode_control, encode_error, encode_job, encode_reply
from trio_workers.cli import main
from trio_workers.testing import MemoryFactory

WORKERS: Final = ROOT / "tests" / "workers"
EXAMPLES: Final = ROOT / "docs" / "examples"
BROKEN: Final = WORKERS / "broken.py"
LIMIT: Final = 64 << 20


def config(*command: str | Path, **more: Any) -> Config:
    """A worker of real processes, with time enough on a loaded machine."""
    env = {"PYTHONPATH": str(ROOT), **more.pop("env", {})}
    seconds = more.pop("seconds", 20.0)
    fields: dict[str, Any] = {"boot_timeout": 20.0, "destroy_timeout": seconds, "limits": Limits(exec_ttl=seconds)}
    return Config(command=[str(part) for part in command], env=env, **{**fields, **more})


def broken(fault: str, **more: Any) -> Config:
    """The worker that is wrong in this way."""
    return config(sys.executable, "-S", BROKEN, fault, **more)


def wrong(report: Report) -> set[str]:
    """The checks that found something wrong."""
    return {finding.name for finding in report.findings if finding.verdict == "wrong"}


def names(report: Report) -> list[str]:
    return [finding.name for finding in report.findings]


ALL: Final = [
    "start", "handshake", "job", "stop", "stdout", "end of relay", "several jobs", "context", "empty body",
    "big bodies", "binary body", "payload in pieces", "header in pieces", "job error", "stderr",
]  # fmt: skip


# right ones


@pytest.mark.slow
@pytest.mark.limit(180)
@pytest.mark.parametrize(
    ("interpreter", "program", "protocol", "factory"),
    [
        *[("php", "worker.php", protocol, PipeFactory()) for protocol in PROTOCOLS],
        ("php", "worker.php", "goridge-3", PipeFactory("socketpair")),
        ("php", "worker.php", "goridge-2", SocketFactory("tcp://127.0.0.1:0")),
        ("perl", "worker.pl", "goridge-3", PipeFactory()),
        ("perl", "worker.pl", "goridge-3", SocketFactory("tcp://localhost:0")),
        ("node", "worker.mjs", "goridge-3", PipeFactory()),
        *[(sys.executable, "worker.py", protocol, PipeFactory()) for protocol in PROTOCOLS],
        (sys.executable, "worker.py", "goridge-3", PipeFactory("socketpair")),
        (sys.executable, "worker.py", "goridge-1", SocketFactory("tcp://127.0.0.1:0")),
    ],
    ids=str,
)
async def test_right_workers(interpreter: str, program: str, protocol: str, factory: Any) -> None:
    """The example workers of every language pass every check, without a note."""
    command = (require(interpreter), WORKERS / program)
    report = await check_worker(config(*command, protocol=protocol, factory=factory), failing_job=b"fail")
    assert [finding for finding in report.findings if finding.verdict not in ("ok", "note")] == []
    # On a loaded machine one may be slow to start, and that is a note.
    assert {finding.name for finding in report.findings if finding.verdict == "note"} <= {"start"}
    assert names(report) == ALL
    assert report.right


@pytest.mark.parametrize("name", ["sh", "unix"])
async def test_right_worker_otherwise(name: str, tmp_path: Path) -> None:
    """A right worker passes behind a shell, and over a Unix socket, whose file is gone afterwards."""
    command: list[str | Path] = [sys.executable, WORKERS / "worker.py"]
    more: dict[str, Any] = {}
    if name == "sh":
        command = [require("sh"), "-c", f"'{sys.executable}' '{WORKERS / 'worker.py'}'; exit $?"]
    else:
        more["factory"] = SocketFactory(f"unix://{tmp_path}/a socket?#.sock")
    report = await check_worker(config(*command, **more), failing_job=b"fail")
    assert wrong(report) == set()
    assert report["handshake"].verdict == "ok"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("program", "job", "reply"),
    [
        ("worker.py", "hello", "HELLO"),
        ("crash_worker.py", "3", "4"),
        ("lease_worker.py", "3", "3"),
        ("stream_worker.py", "3", "parts (4: '1', '2', '3', ...;"),
        ("service_worker.py", "x", "blue"),
        ("standard_library_worker.py", "x = 1", '"lines": 1'),
    ],
)
async def test_right_examples(program: str, job: str, reply: str) -> None:
    """The workers of the docs' examples pass: with a state, with streamed answers, with job errors for our probes."""
    command = config(sys.executable, EXAMPLES / program, env={"RELEASE": "blue"})
    report = await check_worker(command, jobs=[job.encode()])
    assert wrong(report) == set()
    assert reply in report["job"].found


async def test_jobs_and_what_is_expected_of_them() -> None:
    """Jobs that are named are shown with their replies; another than the one expected is wrong."""
    command = config(sys.executable, WORKERS / "worker.py")
    jobs = [b"upper one", b"upper two", b"fail three"]
    report = await check_worker(command, jobs=jobs, expect=[b"ONE", b"two"])
    assert report["job 1"] == Finding(name="job 1", verdict="ok", found="'upper one': replied 'ONE' (3 bytes).")
    assert report["job 2"].verdict == "wrong"
    assert report["job 2"].mend == "Expected 'two'."
    assert report["job 3"].verdict == "note"
    assert "job error 'Traceback" in report["job 3"].found
    assert wrong(report) == {"job 2"}


async def test_worker_that_asks_to_be_replaced() -> None:
    """The stop request is an answer."""
    report = await check_worker(config(sys.executable, WORKERS / "worker.py"), jobs=[b"stop"])
    assert wrong(report) == set()
    assert "asked to be replaced" in report["job"].found


async def test_endless_stream() -> None:
    """A streamed answer without an end is stopped, as the protocol has it."""
    report = await check_worker(config(sys.executable, WORKERS / "worker.py"), jobs=[b"streamforever"])
    assert wrong(report) == set()
    assert "parts" in report["job"].found


# wrong ones


@pytest.mark.parametrize(
    ("fault", "protocol", "check", "words"),
    [
        ("exit-at-start", "goridge-3", "start", "status 1 large-3"),
        ("bad-handshake", "goridge-3", "handshake", '{"pid":M} own'),
        ("bad-handshake", "goridge-1", "handshake", '{"pid":M} own'),
        ("print-at-start", "goridge-3", "handshake", "printed stdout Loading stderr"),
        ("print-at-start", "goridge-1", "stdout", "printed stdout Loading stderr"),
        ("mark", "goridge-3", "handshake", "byte order mark <?php"),
        ("blank-lines", "goridge-2", "handshake", "Blank lines <?php"),
        ("php-notice", "goridge-3", "handshake", "Deprecated display_errors=stderr"),
        ("print-in-job", "goridge-3", "job", "got a job print to stderr"),
        ("print-after-answer", "goridge-3", "job", "After an answer done stderr"),
        ("print-after-answer", "goridge-2", "stdout", "After an answer done stderr"),
        ("print-at-exit", "goridge-3", "stdout", "As it ended bye stderr buffer"),
        ("crash", "goridge-3", "job", "SIGSEGV job error"),
        ("exit-after-job", "goridge-3", "several jobs", "status 0 read the next job"),
        ("one-behind", "goridge-3", "several jobs", "order"),
        ("two-answers", "goridge-3", "several jobs", "more answers than once"),
        ("two-answers", "goridge-2", "several jobs", "more answers than once"),
        ("context-is-a-job", "goridge-1", "several jobs", "more answers than two frames"),
        ("context-in-body", "goridge-3", "context", "option"),
        ("keeps-context", "goridge-1", "context", "Forget"),
        ("dies-of-empty", "goridge-3", "empty body", "status 1 null"),
        ("ends-on-empty", "goridge-3", "empty body", "status 0 null"),
        ("one-read", "goridge-3", "big bodies", "several reads"),
        ("one-read", "goridge-1", "payload in pieces", "One read does not get everything"),
        ("text", "goridge-3", "binary body", "UTF-8 binary"),
        ("dies-of-binary", "goridge-3", "binary body", "UnicodeDecodeError binary"),
        ("reply-for-error", "goridge-3", "job error", "error frame 0x40"),
        ("reply-after-error", "goridge-3", "job error", "error"),
        ("dies-after-error", "goridge-3", "job error", "a job failed next job"),
        ("status", "goridge-3", "stop", "status 3 status 0"),
        ("size-small", "goridge-3", "job", "size too small bytes, not characters"),
        ("size-small", "goridge-2", "job", "size too small"),
        ("sizes-disagree", "goridge-2", "job", "two sizes disagree big-endian"),
        ("size-turned", "goridge-1", "job", "other way round little-endian"),
        ("checksum", "goridge-3", "job", "checksum payload bytes 0 to 5"),
        ("checksum-turned", "goridge-3", "job", "checksum little-endian"),
        ("frame-of-another", "goridge-3", "job", "goridge-1 one dialect"),
        ("goridge-1", "goridge-3", "handshake", "speaks goridge-1 --protocol goridge-1"),
        ("goridge-3", "goridge-2", "handshake", "speaks goridge-3 --protocol goridge-3"),
        ("goridge-3", "goridge-1", "handshake", "speaks goridge-3 --protocol goridge-3"),
    ],
)  # fmt: skip
async def test_broken_workers(fault: str, protocol: str, check: str, words: str) -> None:
    """Each fault is found by its check, with the words that mend it, and blamed on nothing else."""
    # One that takes a part for the whole may come to wait for what never comes.
    seconds = 5.0 if fault == "one-read" else 20.0
    boot = 8.0 if fault == "goridge-3" else 20.0  # that one waits for more, and is ended when the time is over
    cfg = broken(fault, protocol=protocol, seconds=seconds, boot_timeout=boot)
    report = await check_worker(cfg, failing_job=b"fail")
    found = report[check]
    assert found.verdict == "wrong"
    for word in words.split():
        assert word in f"{found.found} {found.mend}"
    assert wrong(report) <= {check, "handshake", "job", "stdout", "payload in pieces", "big bodies", "header in pieces"}
    hints = {finding.mend for finding in report.findings if finding.verdict == "wrong"}
    assert len(hints) == 1 or fault == "one-read"
    assert names(report) == ALL


@pytest.mark.slow
@pytest.mark.limit(120)
@pytest.mark.parametrize(
    ("fault", "protocol", "check", "words"),
    [
        ("hang-at-start", "goridge-3", "handshake", "read nothing --boot-timeout"),
        ("hang", "goridge-3", "job", "said nothing flush"),
        ("no-flush", "goridge-3", "handshake", "when stdin was closed flush"),
        ("size-large", "goridge-3", "job", "announces 21 bytes 18 came size flushed"),
        ("size-large", "goridge-2", "job", "announces 21 bytes 18 came size flushed"),
        ("half-a-frame", "goridge-1", "job", "9 bytes, and 5 came"),
        ("close-stdout", "goridge-3", "job", "closed runs on"),
        ("ignore-stop", "goridge-3", "stop", "ignored stop status 0"),
        ("stop-is-a-job", "goridge-3", "stop", "answered it like a job"),
        ("ignore-end", "goridge-3", "end of relay", "ran on leave the loop"),
        ("goridge-2", "goridge-3", "handshake", "speaks goridge-2 --protocol goridge-2"),
    ],
)
async def test_broken_workers_that_hang(fault: str, protocol: str, check: str, words: str) -> None:
    """What hangs is bounded by the times that are given, and gets its hint as well."""
    boot = 10.0 if fault == "goridge-2" else 5.0
    report = await check_worker(broken(fault, protocol=protocol, seconds=3.0, boot_timeout=boot), failing_job=b"fail")
    found = report[check]
    assert found.verdict == "wrong"
    for word in words.split():
        assert word in f"{found.found} {found.mend}"
    assert wrong(report) == {check}


async def test_two_answers_of_one_that_ignores_the_stop_frame() -> None:
    """How a worker is ended does not hide what it wrote."""
    command = config(
        "sh", "-c", f"'{sys.executable}' -S '{BROKEN}' two-answers; exec sleep 1000", seconds=3.0
    )  # ended by neither
    report = await check_worker(command)
    assert wrong(report) == {"stop", "end of relay", "several jobs"}


@pytest.mark.parametrize("protocol", ["goridge-1", "goridge-2"])
async def test_empty_body_in_the_older_dialects(protocol: str) -> None:
    """There PHP's usual loop ends on an empty body, and so do programs that serve well: that is a note."""
    report = await check_worker(broken("ends-on-empty", protocol=protocol))
    assert report["empty body"].verdict == "note"
    assert "!== null" in report["empty body"].mend
    assert report.right


async def test_answers_are_shown_as_they_are() -> None:
    """Capitals in what a worker says stay, and small letters."""
    program = "from trio_workers.child import serve\ndef fail(job): raise ValueError('No SUCH job')\nserve(fail)"
    report = await check_worker(config(sys.executable, "-c", program))
    assert report["empty body"].found.startswith("Job error 'Traceback (most recent call last):")


async def test_header_in_pieces() -> None:
    """Over pipes a pool never splits a header, so a worker that can't take that gets a note."""
    report = await check_worker(broken("one-read-of-header"))
    assert report["header in pieces"].verdict == "note"
    assert "short header" in report["header in pieces"].found
    assert report.right


async def test_wrong_pid() -> None:
    """Over pipes another pid may be one of a container: a note. Over a socket the pool refuses it."""
    report = await check_worker(broken("wrong-pid"))
    assert report["handshake"].verdict == "note"
    assert "pid 1;" in report["handshake"].found
    assert report.right

    lying = "import os; os.getpid = lambda: 1; from trio_workers.child import serve; serve(lambda job: job.body)"
    over_tcp = config(sys.executable, "-S", "-c", lying, factory=SocketFactory("tcp://127.0.0.1:0"))
    report = await check_worker(over_tcp)
    assert wrong(report) == {"handshake"}
    assert "getpid()" in report["handshake"].mend


async def test_worker_that_does_not_connect(tmp_path: Path) -> None:
    """A worker that looks for its relay in stdin and stdout is told of RR_RELAY; one that ends, how it ended."""
    more: dict[str, Any] = {"factory": SocketFactory(f"unix://{tmp_path}/s"), "boot_timeout": 2.0}
    report = await check_worker(config("sleep", "1000", **more))
    assert wrong(report) == {"handshake"}
    assert "RR_RELAY" in report["handshake"].mend
    report = await check_worker(config("sh", "-c", "echo no relay >&2; exit 4", **more))
    assert wrong(report) == {"start"}
    assert "status 4 before it connected" in report["start"].found
    assert "no relay" in report["start"].found


async def test_strangers_are_not_taken_for_the_worker(tmp_path: Path) -> None:
    """A connection of another process is closed, and the worker's own awaited."""
    path = tmp_path / "s"
    command = config(sys.executable, WORKERS / "worker.py", factory=SocketFactory(f"unix://{path}"))
    ended = 0

    async def intrude() -> None:
        nonlocal ended
        while True:
            try:
                stream = await trio.open_unix_socket(str(path))
            except OSError:
                await trio.sleep(0.01)
                continue
            async with stream:
                await stream.send_all(b"hello")
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.receive_some(1)
                ended += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(intrude)
        report = await check_worker(command)
        nursery.cancel_scope.cancel()
    assert wrong(report) == set()
    assert ended


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["no-such-program"], "can't be started no-such-program PATH"),
        (["/etc/passwd"], "can't be started /etc/passwd executable"),
        (["true"], "status 0 before live on"),
    ],
)
async def test_programs_that_do_not_start(command: list[str], words: str) -> None:
    """What can't be started, or is no worker at all, is a finding and no exception."""
    report = await check_worker(config(*command))
    assert wrong(report) == {"start"}
    for word in words.split():
        assert word in f"{report['start'].found} {report['start'].mend}"


async def test_directory_that_is_missing(tmp_path: Path) -> None:
    """A directory that is not there is named."""
    report = await check_worker(broken("", cwd=tmp_path / "nowhere"))
    assert wrong(report) == {"start"}
    assert "nowhere" in report["start"].found


async def test_php_program_that_is_missing() -> None:
    """PHP says so on stdout, and the hint is about the name."""
    report = await check_worker(config(require("php"), "missing.php"))
    assert "Could not open input file: missing.php" in report["handshake"].found
    assert "name right" in report["handshake"].mend


@pytest.mark.parametrize("command", [["yes"], ["cat", "/dev/zero"], ["cat", "/dev/urandom"]])
async def test_floods(command: list[str]) -> None:
    """A program that writes for ever is bounded in time and in memory."""
    report = await check_worker(config(*command, seconds=1.0, boot_timeout=2.0))
    assert not report.right


async def test_echo_of_everything() -> None:
    """`cat` answers every frame with itself; that looks right for long, and is found out."""
    report = await check_worker(config("cat", seconds=2.0))
    assert report["handshake"].verdict == "note"
    assert "stop" in wrong(report)


async def test_chatter() -> None:
    """What is written to stderr unasked is shown, and is no fault."""
    report = await check_worker(broken("chatter"))
    assert report.right
    assert report["stderr"].verdict == "note"
    assert "loaded the model | ready" in report["stderr"].found


async def test_slow_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow start is a note."""
    monkeypatch.setattr(_checker, "SLOW_START", 0.0)
    report = await check_worker(broken(""))
    assert report.right
    assert report["start"].verdict == "note"


# what is left, and what is refused


@pytest.mark.parametrize("after", ["start", "job", "stop", "big bodies"])
async def test_cancel(after: str) -> None:
    """Cancelled at any moment, nothing is left: the fixture looks for processes and descriptors."""
    with trio.CancelScope() as scope:

        def tell(finding: Finding) -> None:
            if finding.name == after:
                scope.cancel()

        await check_worker(broken(""), tell=tell)
    assert scope.cancelled_caught


async def test_cancel_while_it_hangs() -> None:
    """A cancel does not wait for the worker."""
    with trio.move_on_after(1.0) as scope:
        await check_worker(broken("hang-at-start", boot_timeout=1000.0))
    assert scope.cancelled_caught


async def test_children_are_ended_too(note: Path) -> None:
    """What a worker has started, and left with its relay open, is ended with it."""
    command = config("sh", "-c", f"sleep 1000 & echo $! >> '{note}'; exec '{sys.executable}' -S '{BROKEN}'")
    report = await check_worker(command)
    assert wrong(report) == set()
    for pid in pids(note):
        await until(lambda pid=pid: not runs(pid))  # type: ignore[misc]


def pids(note: Path) -> list[int]:
    return [int(pid) for pid in note.read_text().split()] if note.exists() else []


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_what_is_refused(tmp_path: Path) -> None:
    """Wrong arguments are errors, and no findings."""
    with pytest.raises(ValueError, match=r"more replies to expect \(2\) than jobs \(1\)"):
        await check_worker(broken(""), jobs=[b"one"], expect=[b"1", b"2"])
    with pytest.raises(ValueError, match="big must be from 1"):
        await check_worker(broken(""), big=0)
    with pytest.raises(TypeError, match="not MemoryFactory"):
        await check_worker(broken("", factory=MemoryFactory(lambda job: None)))  # type: ignore[arg-type,return-value]
    taken = tmp_path / "taken"
    taken.touch()
    with pytest.raises(OSError, match="in use"):
        await check_worker(broken("", factory=SocketFactory(f"unix://{taken}")))


async def test_small_frames() -> None:
    """`max_frame_size` bounds the probes too."""
    report = await check_worker(broken("", max_frame_size=4096), big=4000)
    assert wrong(report) == set()
    assert report["big bodies"].found == "4,000 bytes: 4,000 bytes came back."


# diagnosis


@pytest.mark.parametrize(
    ("data", "protocol"),
    [(encode(name, payload), name) for name in PROTOCOLS for payload in (b"", b"payload") for encode in (
        encode_control,
        encode_error,
        lambda protocol, payload: encode_reply(protocol, b"", payload),
        lambda protocol, payload: encode_reply(protocol, b"ctx", payload),
        lambda protocol, payload: b"".join(encode_job(protocol, b"ctx", payload)),
    )],
)  # fmt: skip
def test_dialect_by_its_bytes(data: bytes, protocol: str) -> None:
    """Each kind of frame is known by its header."""
    assert dialect_of(data) == protocol
    assert dialect_of(b"text " + data) is None


@given(
    data=st.binary(min_size=1, max_size=200) | st.text(min_size=1).map(str.encode),
    protocol=st.sampled_from(PROTOCOLS),
    front=st.booleans(),
    after_answer=st.booleans(),
    shaken=st.booleans(),
)
def test_any_bytes_get_a_diagnosis(data: bytes, protocol: str, front: bool, after_answer: bool, shaken: bool) -> None:
    """Whatever came, something can be said of it, on one line without control characters."""
    data = encode_reply(protocol, b"", b"x") + data if front else data
    found = diagnose(data, protocol, LIMIT, reason="no frame", after_answer=after_answer, shaken=shaken, sent=b"ab")
    assert not re.search(r"[\x00-\x1f\x7f]", found.found)
    assert found.mend


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"", "''"),
        ("größe\r\n".encode(), "'größe\\n'"),
        (b"\x1b[31mred\x00", "'\\x1b[31mred\\x00'"),
        (b"\xff\xfe", "b'\\xff\\xfe'"),
        (b"x" * 81, "'" + "x" * 80 + "'..."),
        ("ü".encode() * 41, "'" + "ü" * 40 + "'..."),
        (b"x" + "ü".encode() * 41, "'x" + "ü" * 39 + "'..."),
    ],
)
def test_bytes_on_one_line(data: bytes, shown: str) -> None:
    """Text is shown as text, everything else escaped, and long data cut."""
    assert show(data) == shown


# the command


def command(*arguments: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "trio_workers", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        **more,
    )


def test_command_of_a_right_worker() -> None:
    """Exit code 0, a table, and nothing on stderr."""
    done = command(
        "check", "--job", "upper hello", "--expect", "HELLO", "--failing-job", "fail", "--timeout", "20",
        "--boot-timeout", "20", "--", sys.executable, str(WORKERS / "worker.py"),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "replied 'HELLO'" in done.stdout
    assert "Right: nothing is wrong, in goridge-3 over pipes." in done.stdout


def test_command_of_a_broken_worker() -> None:
    """Exit code 1; the hint stands there once, and other rows point to it."""
    done = command("check", "--env", "A=b", "--", sys.executable, str(BROKEN), "print-at-start")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.count("print to stderr") == 1
    assert "As for `handshake`." in done.stdout
    assert "Wrong: 2 of 15 checks." in done.stdout


@pytest.mark.parametrize("relay", ["socketpair", "tcp", "unix"])
def test_command_in_json(relay: str) -> None:
    """One document with everything, over each relay."""
    done = command(
        "check", "--json", "--relay", relay, "--protocol", "goridge-2", "--timeout", "20", "--boot-timeout", "20",
        "--", sys.executable, str(WORKERS / "worker.py"),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts["right"] is True
    assert (facts["protocol"], facts["relay"]) == ("goridge-2", relay)
    assert facts["command"] == [sys.executable, str(WORKERS / "worker.py")]
    assert [check["name"] for check in facts["checks"]] == ALL
    assert set(facts["checks"][0]) == {"name", "verdict", "found", "mend"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check"], "after a --"),
        (["check", "--protocol", "goridge-4", "--", "true"], "goridge-4"),
        (["check", "--relay", "smoke", "--", "true"], "smoke"),
        (["check", "--env", "NAME", "--", "true"], "NAME=VALUE"),
        (["check", "--env", "A=\udc80", "--", "true"], None),
        (["check", "--timeout", "0", "--", "true"], "--timeout must be"),
        (["check", "--boot-timeout", "-1", "--", "true"], "--boot-timeout must be"),
        (["check", "--big", "-1", "--", "true"], "--big must be"),
        (["check", "--expect", "x", "--", "true"], "more replies to expect (1) than jobs (0)"),
        (["check", "--no-such-flag", "--", "true"], "no-such-flag"),
    ],
)
def test_command_misused(arguments: list[str], words: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line that names the flag; bytes that are no text are no misuse."""
    code = main(arguments)
    said = capsys.readouterr()
    if words is None:
        assert code == 1  # `true` is no worker
        return
    assert code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert words in said.err


def test_command_without_its_extra() -> None:
    """Without rich one sentence names the extra."""
    program = "import sys; sys.modules['rich'] = None; from trio_workers.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "check", "--", "true"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    said = "the command line needs rich, which comes with: pip install 'trio_workers[cli]'"
    assert done.stderr == f"trio-workers: {said}\n"


async def test_command_interrupted(note: Path) -> None:
    """Ctrl-C ends the worker with it: exit code 130, and no traceback."""
    worker = f"echo $$ > '{note}'; exec sleep 1000"
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "trio_workers", "check", "--boot-timeout", "1000", "--", "sh", "-c", worker],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    await until(lambda: pids(note))
    process.send_signal(signal.SIGINT)
    async with process.stdout, process.stderr:
        said = b"".join([part async for part in process.stderr])
    assert (await process.wait(), said) == (130, b"")
    assert not any(map(runs, pids(note)))


PAGE: Final = (ROOT / "docs" / "is-my-worker-right.md").read_text(encoding="utf-8")
COMMANDS: Final = re.findall(r"```console\n\$ (trio-workers check [^\n]*)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
@pytest.mark.limit(120)
@pytest.mark.parametrize(("line", "shown"), COMMANDS, ids=[line for line, _ in COMMANDS])
def test_page(line: str, shown: str, tmp_path: Path) -> None:
    """Each table of the page has the rows and the verdicts that the command prints; its numbers are of one run."""
    for program in ("php", "python"):
        if f" {program} " in line:
            require(program)
    script = tmp_path / "trio-workers"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m trio_workers "$@"\n')
    script.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", line.replace(" check ", " check --timeout 8 ")],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert rows(done.stdout)
    assert rows(done.stdout) == rows(shown)


def rows(text: str) -> list[str]:
    """The names and verdicts of a table, or the lines of what is none."""
    table = re.findall(r"^([a-z ]+?) +│ ([a-z ]+?) +│", text, re.MULTILINE)
    return [f"{name}: {'ok' if name == 'start' else verdict}" for name, verdict in table] or text.split()


def test_flags_are_listed() -> None:
    """The page has each flag, and no other."""
    flags = set(re.findall(r"`(--[a-z-]+)", PAGE))
    assert flags == {flag for flag in re.findall(r"(--[a-z-]+)", command("check", "--help").stdout) if flag != "--"}


def test_checks_are_listed() -> None:
    """The page has each check, in the order of the table."""
    section = PAGE.partition("## The checks")[2]
    assert re.findall(r"^\| ([a-z ]+) \|", section, re.MULTILINE)[1:] == ALL


def test_constants_fit() -> None:
    """The probes' bodies are small enough to be sent byte by byte, and unlike each other."""
    assert len(BODY) + len(CONTEXT) < KEPT
    assert CONTEXT not in BODY
