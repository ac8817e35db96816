"""The recipes of the page on logs: what each program sends is what the page shows, and what goes wrong is told."""

import array
import json
import logging
import os
import re
import runpy
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import sentry_sdk
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.transport import Transport

from tests.test_examples import EXAMPLES, ROOT, run
from tests.test_python_docs import matches
from trio_workers import (
    AllocateTimeout,
    JobError,
    JobTimeout,
    QueueFull,
    RemoteTraceback,
    RestartLimitExceeded,
    SpawnError,
    WorkerCrashed,
)

PAGE: Final = (ROOT / "docs" / "logging-recipes.md").read_text(encoding="utf-8")


def shown(name: str) -> str:
    """What the page shows of a program's output."""
    (output,) = re.findall(rf"^<!-- output of {re.escape(name)} -->\n```\w+\n(.*?)^```$", PAGE, re.M | re.S)
    assert isinstance(output, str)
    return output


def load(name: str) -> dict[str, Any]:
    """The names of an example, without running it."""
    return runpy.run_path(str(EXAMPLES / name))


# structlog


def test_structlog() -> None:
    """Lines of the pool and of the program are JSON of one form; the pool's have its fields, and no request's."""
    output, errors = run("structlog_logs.py")
    assert errors == ""
    assert matches(shown("structlog_logs.py"), output), output
    printed, words, death, lost = map(json.loads, output.splitlines())
    assert (printed["invoice"], printed["result"]) == (6, "invoice 6")
    for line in (words, death):
        assert (line["level"], line["pool"], line["slot"]) == ("warning", "printers", 0)
        assert "invoice" not in line
    assert (words["message"], words["logger"]) == ("out of paper", "trio_workers.worker")
    assert "reason" not in words
    assert death["reason"] == "crashed"
    assert (lost["pid"], lost["invoice"], lost["returncode"]) == (words["pid"], 7, 3)


def test_structlog_takes_records_of_others() -> None:
    """A record without the pool's fields, or with some of them, goes through unchanged."""
    tidy = load("structlog_logs.py")["tidy"]
    for event in ({"event": "hello"}, {"event": "hello", "pool": "a", "reason": "b"}):
        assert tidy(None, "info", dict(event)) == event


# sentry


class Kept(Transport):
    """Keeps what would be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        if (event := envelope.get_event()) is not None:
            self.events.append(dict(event))


@pytest.fixture
def sentry() -> Iterator[Kept]:
    """The example's Sentry, over a transport that keeps all; the process has none of it afterwards."""
    calls = logging.Logger.callHandlers
    kept = Kept()
    load("sentry_errors.py")["start_sentry"](
        dsn="https://key@sentry.invalid/1", transport=kept, default_integrations=False,
        integrations=[LoggingIntegration()],
    )  # fmt: skip
    with sentry_sdk.isolation_scope():
        yield kept
    sentry_sdk.get_client().close()
    sentry_sdk.get_global_scope().set_client(None)
    logging.Logger.callHandlers = calls  # type: ignore[method-assign]
    # What was set up once is not set up again, so that it must be forgotten with the patch above.
    sentry_sdk.integrations._processed_integrations.discard("logging")
    sentry_sdk.integrations._installed_integrations.discard("logging")


def test_sentry() -> None:
    """A crash is one event: with its worker as tags, the last words, and what the log said before as breadcrumbs."""
    environment = {name: value for name, value in os.environ.items() if name != "SENTRY_DSN"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "sentry_errors.py"],
        cwd=EXAMPLES, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert matches(shown("sentry_errors.py"), done.stdout), done.stdout
    assert done.stdout.count("\ntags: ") == 2  # two jobs failed, and the log of a death is no event of its own


def test_sentry_groups_by_what_went_wrong(sentry: Kept) -> None:
    """Crashes by how they ended, job errors by their text less its numbers, functions by where they raised."""
    failed = ValueError("no")
    failed.__cause__ = RemoteTraceback(
        'Traceback ...\n  File "a.py", line 1, in f\n    g()\n  File "b.py", line 2, in g\n'
    )
    cases: list[tuple[Exception, list[str] | None]] = [
        (WorkerCrashed("gone", slot=1, pid=7, returncode=-11, phase="running", stderr="ouch"), ["running", "-11"]),
        (SpawnError("no", slot=1, returncode=1, phase="handshake"), ["handshake", "1"]),
        (JobTimeout("slow", slot=1, pid=7), None),
        (JobError("no invoice 12 of 13\nmore 7"), ["no invoice N of N"]),
        (failed, ["b.py", "g"]),
        (KeyError("mine"), None),
    ]
    for error, _ in cases:
        sentry_sdk.capture_exception(error)
    assert len(sentry.events) == len(cases)
    for event, (error, fingerprint) in zip(sentry.events, cases, strict=True):
        expected = None if fingerprint is None else ["{{ default }}", *fingerprint]
        assert event.get("fingerprint") == expected, error
    crash, _, timeout, *_ = sentry.events
    assert crash["tags"] == {"slot": "1", "pid": "7", "phase": "running", "returncode": "-11"}
    assert crash["contexts"]["worker"] == {"started": None, "stderr": "ouch"}
    assert timeout["tags"] == {"slot": "1", "pid": "7"}


def test_sentry_says_nothing_twice(sentry: Kept) -> None:
    """Too much load is no event, a death's log line is a breadcrumb, and a pool that gives up is one event."""
    pool = logging.getLogger("trio_workers.pool")
    about = {"pool": "jobs", "slot": 0, "pid": 7, "reason": ""}
    pool.warning("jobs[0] 7: worker 7 exited with status 3", extra={**about, "reason": "crashed"})
    pool.error("jobs: gives up after 3 failed boots in a row", extra={**about, "reason": "gave up"})
    for refused in (QueueFull("full"), AllocateTimeout("late")):
        sentry_sdk.capture_exception(refused)
    assert sentry.events == []
    sentry_sdk.capture_exception(RestartLimitExceeded("the pool 'jobs' gives up"))
    (event,) = sentry.events
    assert [crumb["message"] for crumb in event["breadcrumbs"]["values"]] == [
        "jobs[0] 7: worker 7 exited with status 3",
        "jobs: gives up after 3 failed boots in a row",
    ]
    try:
        raise ValueError("mine")
    except ValueError:
        pool.exception("jobs: the observer raised an exception, which is ignored", extra=about)
    assert len(sentry.events) == 2
    assert sentry.events[1]["tags"] == {"pool": "jobs", "slot": "0", "pid": "7"}
    assert sentry.events[1]["exception"]["values"][0]["type"] == "ValueError"


# the journal


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    """Takes what a journal would; there is none here."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        journal.setblocking(False)
        yield journal


@pytest.fixture
def handler(tmp_path: Path) -> Iterator[logging.Handler]:
    handler = load("journal.py")["JournalHandler"]("invoices", str(tmp_path / "journal"))
    yield handler
    handler.close()


def received(journal: socket.socket) -> list[dict[str, str]]:
    """The fields of each entry that has come, read as the protocol has it."""
    entries: list[dict[str, str]] = []
    while True:
        try:
            data, ancillary, _, _ = journal.recvmsg(2**20, socket.CMSG_SPACE(4))
        except BlockingIOError:
            return entries
        for level, kind, rights in ancillary:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            assert data == b""
            (descriptor,) = array.array("i", rights)
            with open(descriptor, "rb") as file:
                with pytest.raises(PermissionError):
                    os.ftruncate(descriptor, 0)  # it is sealed
                file.seek(0)
                data = file.read()
        fields: dict[str, str] = {}
        while data:
            head, _, data = data.partition(b"\n")
            name, equals, value = head.partition(b"=")
            if not equals:
                (length,) = struct.unpack("<Q", data[:8])
                value, end, data = data[8 : 8 + length], data[8 + length : 9 + length], data[9 + length :]
                assert end == b"\n"
            assert re.fullmatch(rb"[A-Z][A-Z0-9_]{0,63}", name)  # the journal drops others
            fields[name.decode()] = value.decode()
        entries.append(fields)


def make_record(message: str, level: int = logging.WARNING, **extra: object) -> logging.LogRecord:
    record = logging.LogRecord("trio_workers.pool", level, __file__, 1, message, (), None)
    vars(record).update(extra)
    return record


def test_journal(journal: socket.socket, tmp_path: Path) -> None:
    """The journal gets each line with the pool's fields, and the lines of a tail as one entry."""
    output, errors = run("journal.py", str(tmp_path / "journal"))
    assert (output, errors) == ("", "")
    entries = received(journal)
    said = "\n".join("".join(f"{name}={value}\n" for name, value in entry.items()) for entry in entries)
    assert matches(shown("journal.py"), said), said
    assert [entry["TRIO_WORKERS_SLOT"] for entry in entries] == ["0", "0"]
    assert "TRIO_WORKERS_REASON" not in entries[0]


def test_journal_of_levels(journal: socket.socket, handler: logging.Handler) -> None:
    """Levels are syslog's priorities; fields that are missing are left out."""
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL, 35):
        handler.handle(make_record("x", level, pool="jobs", slot=0, pid=None, reason=""))
    entries = received(journal)
    assert [entry["PRIORITY"] for entry in entries] == ["7", "6", "4", "3", "2", "4"]
    assert all("TRIO_WORKERS_PID" not in entry and "TRIO_WORKERS_REASON" not in entry for entry in entries)
    assert entries[0]["TRIO_WORKERS_SLOT"] == "0"


def test_journal_of_what_is_large(journal: socket.socket, handler: logging.Handler) -> None:
    """What no datagram takes comes whole, as a sealed file; and no descriptor is left here."""
    text = "a line\n" * 2_000_000
    handler.handle(make_record(text))
    (entry,) = received(journal)
    assert entry["MESSAGE"] == text
    assert entry["LOGGER"] == "trio_workers.pool"


def test_journal_that_takes_nothing(journal: socket.socket, handler: logging.Handler) -> None:
    """A journal that hangs does not stop the pool; what is lost is counted, and told of when it is back."""
    sent = 0
    while not handler._lost:  # type: ignore[attr-defined]
        handler.handle(make_record(f"record {sent}"))
        sent += 1
    handler.handle(make_record("lost, too"))
    kept = received(journal)
    assert [entry["MESSAGE"] for entry in kept] == [f"record {number}" for number in range(sent - 1)]
    handler.handle(make_record("back"))
    first, second = received(journal)
    assert first["MESSAGE"] == "2 records were lost: the journal did not take them"
    assert (first["PRIORITY"], first["SYSLOG_IDENTIFIER"]) == ("4", "invoices")
    assert second["MESSAGE"] == "back"


def test_journal_that_is_not_there(tmp_path: Path) -> None:
    """The program goes on without one."""
    assert run("journal.py", str(tmp_path / "none")) == ("", "")


# records of jobs


@pytest.fixture
def job_logging() -> dict[str, Any]:
    return load("job_logging.py")


@pytest.fixture
def through(
    job_logging: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[[str], list[logging.LogRecord]]]:
    """Let a worker say a line, and return the records that come of it."""
    logger = logging.getLogger("trio_workers.worker")
    records = job_logging["JobRecords"]()
    logger.addFilter(records)

    def say(line: str) -> list[logging.LogRecord]:
        caplog.clear()
        about = {"pool": "jobs", "slot": 1, "pid": 7, "reason": ""}
        logger.warning("%s %d: %s", "jobs[1]", 7, line, extra=about)
        return list(caplog.records)

    with caplog.at_level(logging.INFO):
        yield say
    logger.removeFilter(records)


def test_job_logging() -> None:
    """A job's records have their level and logger again; what is printed is a warning, as ever."""
    output, errors = run("job_logging.py")
    assert errors == ""
    assert matches(shown("job_logging.py"), output), output


def test_job_logging_keeps_what_a_record_has(
    job_logging: dict[str, Any], through: Callable[[str], list[logging.LogRecord]]
) -> None:
    """Level, logger, time and text, and the worker it came from; a level that its logger does not take is left out."""
    source = logging.LogRecord("invoices", logging.ERROR, __file__, 1, "%s\nof %s: \x1b[31m…", ("a", "b"), None)
    source.created = 12.25
    (record,) = through(job_logging["LineFormatter"]().format(source))
    assert (record.levelname, record.name, record.getMessage()) == ("ERROR", "invoices", "a\nof b: \x1b[31m…")
    assert (record.created, record.msecs) == (12.25, 250)
    assert (record.pool, record.slot, record.pid) == ("jobs", 1, 7)  # type: ignore[attr-defined]
    source.levelno = logging.DEBUG
    assert through(job_logging["LineFormatter"]().format(source)) == []


@pytest.mark.parametrize(
    "text", ["x" * 100_000, "…" * 100_000, "a" * 50_000 + "😀" * 50_000, "\n" * 9_000, "x" * 4_000]
)
def test_job_logging_of_what_is_long(
    text: str, job_logging: dict[str, Any], through: Callable[[str], list[logging.LogRecord]]
) -> None:
    """A record that would be cut by the pool is made to fit: its beginning and its end arrive."""
    source = logging.LogRecord("n" * 10_000, logging.INFO, __file__, 1, f"begin {text} end", (), None)
    line = job_logging["LineFormatter"]().format(source)
    assert len(line.encode()) <= 4096
    assert "\n" not in line
    (record,) = through(line)
    assert record.getMessage().startswith("begin")
    assert record.getMessage().endswith("end")


MARK: Final = '{"job_logging": ['


@pytest.mark.parametrize(
    "line",
    [
        "",
        "a line",
        MARK,
        MARK + "]}",
        MARK + '20, "a", 1.0]}',
        MARK + '20, 7, 1.0, "a"]}',
        MARK + '"x", "a", 1.0, "a"]}',
        MARK + '20, "a", null, "a"]}',
        MARK + '1e999, "a", 1.0, "a"]}',
        MARK + '20, "a", 1.0, "a"], "more": 1}',
        MARK + "[" * 4000,
        MARK + '20, "a", 1.0, "a"]} and more',
        'no newline before it: {"job_logging": [20, "a", 1.0, "a"]}',
    ],
)
def test_job_logging_of_what_only_looks_like_a_record(
    line: str, through: Callable[[str], list[logging.LogRecord]]
) -> None:
    """Whatever a job prints, it ends up in the log as the line it was, and nothing is raised in the pool's task."""
    (record,) = through(line)
    assert record.levelname == "WARNING"
    assert record.name == "trio_workers.worker"
    assert record.getMessage() == f"jobs[1] 7: {line}"


def test_job_logging_of_a_record_that_names_the_pool_itself(
    through: Callable[[str], list[logging.LogRecord]],
) -> None:
    """A job that logs to the pool's own logger does not lead round in a circle."""
    inner = json.dumps({"job_logging": [20, "trio_workers.worker", 1.0, "again"]})
    outer = json.dumps({"job_logging": [30, "trio_workers.worker", 1.0, f"jobs[1] 7: {inner}"]})
    (record,) = through(outer)
    assert (record.levelname, record.getMessage()) == ("INFO", "again")


# the page


def test_unit_of_the_page(tmp_path: Path) -> None:
    """Its lines are ones that systemd takes, where there is something to ask."""
    (drop_in,) = re.findall(r"^```ini\n(.*?)^```$", PAGE, re.M | re.S)
    assert "ExecReload=/bin/kill -HUP $MAINPID\n" in drop_in
    try:
        path = tmp_path / "jobs.service"
        path.write_text(drop_in.replace("[Service]\n", f"[Service]\nExecStart={sys.executable} -V\n"), encoding="utf-8")
        done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs systemd-analyze")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
