"""The examples of the docs, each run as a reader runs it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Final

import pytest

ROOT: Final = Path(__file__).parent.parent
EXAMPLES: Final = ROOT / "docs" / "examples"


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start Python in the examples' directory; a warning is an error."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", *arguments],
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(*arguments: str) -> tuple[str, str]:
    """Run it to its end, and return what it wrote to stdout and to stderr."""
    with start(*arguments) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output, errors


def test_every_example_is_run_here() -> None:
    """A program among the examples that no test runs would rot."""
    tests = Path(__file__).parent
    files = (*tests.glob("test_*examples.py"), *tests.glob("test_*recipes.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    programs = {path.name for path in EXAMPLES.glob("*.py") if "serve(" not in path.read_text(encoding="utf-8")}
    assert len(programs) >= 8
    assert programs == {name for name in programs if f'"{name}"' in text}


def test_hello() -> None:
    """The README's first program."""
    assert run("hello.py") == ("HELLO, WORKER\n", "")


def test_hello_from_another_directory(tmp_path: Path) -> None:
    """It finds its worker beside itself."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / "hello.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("HELLO, WORKER\n", "")


def test_own_factory() -> None:
    """A factory of one's own, with public names alone; no descriptor is left open (a warning would be an error)."""
    assert "trio_workers._" not in (EXAMPLES / "own_factory.py").read_text(encoding="utf-8")
    assert run("own_factory.py") == ("OVER A STREAM\n", "")


def test_crash() -> None:
    """A crash names the worker, how it ended, the job, whether a retry is safe, and its last words."""
    output, errors = run("crash.py")
    lines = output.splitlines()
    assert lines[0].endswith("ZeroDivisionError: integer division or modulo by zero")
    assert re.search(
        r"WorkerCrashed: worker \d+ \(slot 0\) exited with status 3 while it ran the job 'invoice 7'", output
    )
    assert "retry only if running it twice does no harm" in output
    assert "The last lines of its stderr:\nout of paper\n" in output
    assert "error.returncode=3 error.phase='running' error.started=True" in lines
    assert lines[-1] == "A new worker has taken its place, and says: 4"
    assert "out of paper" in errors  # the pool's log is seen without any configuration


def test_map() -> None:
    """Replies come in order, an error in its place, and an endless source does no harm."""
    output, errors = run("map.py")
    lines = output.splitlines()
    assert lines[:5] == [
        "12 // 0 is a job error",
        "12 // 1 is 12",
        "12 // 2 is 6",
        "12 // 3 is 4",
        "12 // 4 is 3",
    ]
    jobs = re.fullmatch(r"(\d+) jobs were run, of a million\.", lines[5])
    assert jobs is not None
    assert 5 <= int(jobs[1]) <= 9  # the five taken, and the window of four
    assert errors == ""


def test_stream() -> None:
    """A stream that is left early costs no worker."""
    assert run("stream.py") == ("1\n2\n3\nand again ['1']\nThe same worker: True\n", "")


def test_lease() -> None:
    """Jobs of one lease are not mixed with those of another."""
    output, errors = run("lease.py")
    assert set(output.splitlines()) == {"1 to 10: 55", "1 to 100: 5050", "1 to 1000: 500500"}
    assert errors == ""


def test_single() -> None:
    """A worker without a pool around it."""
    assert run("single.py") == ("ONE\nREADY 1\nSTOPPED\n", "")


def test_control() -> None:
    """A client finds the pool, looks at it and turns it; what can't be done is an answer too."""
    output, errors = run("control.py")
    assert output == (
        "listed: True\n"
        "mill: 2 of 2 workers are idle, jobs: {'replied': 1}\n"
        "{'ok': True, 'done': 'resize', 'to': 3}\n"
        "{'ok': True, 'done': 'reset'}\n"
        "{'ok': False, 'error': 'the number of workers is 0; resize takes a whole number from 1 to 1000, as in "
        'resize 3 or {"do":"resize","to":3}\'}\n'
        "['idle', 'idle', 'idle']\n"
    )
    assert errors == ""


def test_logs() -> None:
    """The log tells of a worker's life, at the levels that the docs name, in step with the observer."""
    output, errors = run("logs.py")
    lines = output.splitlines()
    assert re.match(r"DEBUG   trio_workers\.pool slot=0: printers\[0\] \d+: ready", lines[0])
    assert lines[1] == "CREATED  slot 0: NoneType"
    assert re.search(r"^WARNING trio_workers\.worker slot=0: printers\[0\] \d+: out of paper$", output, re.MULTILINE)
    assert re.search(r"^WARNING trio_workers\.pool slot=0: .*exited with status 3", output, re.MULTILINE)
    lives = [line for line in lines if line.startswith("DEBUG")]
    for line, (logger, said) in zip(
        lives,
        2 * [("pool", "ready"), ("pool", r"stopping \(\w+\)"), ("supervision", r"exited with status \d")],
        strict=True,
    ):
        assert re.fullmatch(rf"DEBUG   trio_workers\.{logger} slot=0: printers\[0\] \d+: {said}", line)
    assert lives[-1].endswith("exited with status 0")
    events = [line.split()[0] for line in lines if re.match(r"[A-Z]+ +slot", line)]
    assert events == ["CREATED", "ERROR", "DESTRUCT", "CREATED", "DESTRUCT"]
    assert errors == ""


def test_memory() -> None:
    """How to test without processes: it takes minutes of a clock that jumps."""
    output, _ = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "memory_test.py")
    assert re.search(r"^1 passed", output, re.MULTILINE)


def test_standard_library() -> None:
    """The main job: it does all its work although a worker is killed on the way, and says what it found."""
    output, errors = run("standard_library.py", "--limit", "250")
    assert re.match(r"250 source files of .+ go to \d+ workers\.", output)
    assert "\n250 of 250 files\n" in output
    assert re.search(
        r"WorkerCrashed: worker \d+ \(slot \d+\) was killed by SIGKILL .* while it ran the job .+\.py", output
    )
    again = re.search(r"^(.+\.py) is sent again\.$", output, re.MULTILINE)
    assert again is not None
    found = re.search(r"^([\d,]+) files, ([\d,]+) lines, ([\d,]+) functions, ([\d,]+) classes$", output, re.MULTILINE)
    assert found is not None
    files, lines, functions, classes = (int(number.replace(",", "")) for number in found.groups())
    refused = re.search(r"^Not parsed, each a job error: (\d+) files", output, re.MULTILINE)
    assert files + (int(refused[1]) if refused else 0) == 250
    assert lines > 10_000
    assert functions > 500
    assert classes > 50
    longest = [
        int(n.replace(",", "")) for n in re.findall(r"^ +([\d,]+) lines  \w+  \(.+\.py\)$", output, re.MULTILINE)
    ]
    assert len(longest) == 5
    assert longest == sorted(longest, reverse=True)
    workers = re.search(
        r"^Workers: (\d+) started, (\d+) died and replaced; jobs sent again: (\d+)$", output, re.MULTILINE
    )
    assert workers is not None
    assert int(workers[2]) >= 1
    assert 1 <= int(workers[3]) <= int(workers[2])
    assert errors == ""


def shown(name: str) -> str:
    """What the page on running it for months shows of a program's output."""
    page = (ROOT / "docs" / "running-for-months.md").read_text(encoding="utf-8")
    (output,) = [
        block for block in re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if OUTPUTS[name] in block
    ]
    return output


OUTPUTS: Final = {
    "limits.py": "replaced for its memory",
    "deploy.py": "lost or refused",
    "growth.py": "twelve at once",
    "job_log.py": "Each has its times",
}


def without_numbers(text: str) -> str:
    """A text in which pids and counts don't count."""
    return re.sub(r"\d+", "7", text).replace("7 jobs", "7 job")


def test_limits() -> None:
    """A worker that grew is replaced at no job's cost; one that hangs is killed."""
    output, errors = run("limits.py")
    assert without_numbers(output) == without_numbers(shown("limits.py"))
    replaced = re.search(r"after (\d+) of (\d+) calls", output)
    assert replaced is not None
    assert 20 < int(replaced[1]) <= int(replaced[2])
    assert "ran for longer than exec_ttl (2 s)" in errors


def test_deploy() -> None:
    """Under load a release takes over from another, and one that is broken does not."""
    output, errors = run("deploy.py")
    assert output == shown("deploy.py")
    assert "before it was ready" in errors


def test_growth() -> None:
    """A pool grows while jobs wait, and shrinks when nobody needs its workers."""
    output, errors = run("growth.py")
    assert without_numbers(output) == without_numbers(shown("growth.py"))
    assert re.findall(r"^workers: (\d)$", output, re.MULTILINE) == ["1", "3", "1"]
    assert errors == ""


def test_job_log() -> None:
    """Each job is told of once, with its label, its outcome and its times."""
    output, errors = run("job_log.py")
    assert output == shown("job_log.py")
    assert "exited with status 3" in errors


def find_line(stream: IO[str], start: str) -> str:
    """Read until a line begins so, and return it."""
    passed: list[str] = []
    for line in stream:
        if line.startswith(start):
            return line
        passed.append(line)
    raise AssertionError(f"no line begins with {start!r}: {passed}")


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """The file that names the release of the service."""
    release = tmp_path / "release"
    release.write_text("1\n", encoding="utf-8")
    return release


def test_service(release: Path) -> None:
    """SIGHUP rolls a release out, a broken one changes nothing, and SIGTERM ends the service in an orderly way."""
    with start("service.py", str(release)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "answered by release 1\n"
        release.write_text("2\n", encoding="utf-8")
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "answered by release 2\n"
        assert process.stderr.readline() == "INFO service: release 2 is in place\n"
        release.write_text("broken\n", encoding="utf-8")
        process.send_signal(signal.SIGHUP)
        line = process.stderr.readline()
        while not line.startswith("ERROR"):
            assert line.startswith(("WARNING trio_workers", "The last lines of", "no such model")), line
            line = process.stderr.readline()
        assert line.startswith("ERROR service: nothing is rolled out, the old release goes on: worker ")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate()
    assert process.returncode == 0
    # While one is rolled out both may answer; afterwards the new one alone.
    assert f"answered by release 2\n{output}".endswith("answered by release 2\nstopped; no worker is left\n")
    assert session_members(process.pid) == []


def test_service_goes_on(release: Path) -> None:
    """No file, an empty one, one with nonsense, and a release that crashes under each job: none ends the service."""
    with start("service.py", str(release)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "answered by release 1\n"
        refused = "ERROR service: nothing is rolled out, the old release goes on: "
        for text, why in ((None, "No such file"), ("\n", "names no release"), ("a\0b", "NUL"), (b"\xff", "decode")):
            release.unlink(missing_ok=True)
            if text is not None:
                release.write_bytes(text if isinstance(text, bytes) else text.encode())
            process.send_signal(signal.SIGHUP)
            line = process.stderr.readline()
            assert line.startswith(refused)
            assert why in line
        release.write_text("crashing", encoding="utf-8")
        process.send_signal(signal.SIGHUP)
        find_line(process.stderr, "INFO service: release crashing is in place")
        assert "exited with status 3" in find_line(process.stderr, "ERROR service: a job failed: ")
        release.write_text("2", encoding="utf-8")
        process.send_signal(signal.SIGHUP)
        find_line(process.stderr, "INFO service: release 2 is in place")
        find_line(process.stdout, "answered by release 2")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate()
    assert process.returncode == 0
    assert output == "stopped; no worker is left\n"
    assert session_members(process.pid) == []


def test_service_that_is_told_too_early_and_too_late(release: Path) -> None:
    """A SIGHUP while the pool is not open yet is heard when it is; one while it is left does nothing."""
    release.unlink()
    os.mkfifo(release)
    with start("service.py", str(release)) as process:
        assert process.stderr is not None
        with release.open("w", encoding="utf-8") as first:  # it waits here for what its first release is
            release.unlink()
            release.write_text("2", encoding="utf-8")
            process.send_signal(signal.SIGHUP)
            first.write("1")
        assert process.stderr.readline() == "INFO service: release 2 is in place\n"
        process.send_signal(signal.SIGTERM)
        while process.poll() is None:  # so that there is one at each stage of its way out
            process.send_signal(signal.SIGHUP)
            time.sleep(0.001)
        output, _ = process.communicate()
    assert process.returncode == 0
    assert output.endswith("stopped; no worker is left\n")
    assert session_members(process.pid) == []


def test_service_that_can_not_open(release: Path) -> None:
    """A service whose workers don't start ends with status 1, so that whoever watches it can see it."""
    release.write_text("broken", encoding="utf-8")
    with start("service.py", str(release)) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert re.search(r"^trio_workers.SpawnError: worker \d+ \(slot \d\) exited with status 1", errors, re.MULTILINE)


def session_members(leader: int) -> list[int]:
    """The processes of a session, zombies left out; its workers are in groups of their own but in this session."""
    found: list[int] = []
    if sys.platform != "linux":
        return found
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            try:
                state, _, _, session = (directory / "stat").read_text(errors="replace").rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == leader and state != "Z":
                found.append(int(directory.name))
    return found


def test_standard_library_interrupted() -> None:
    """Ctrl-C, twice in a row, ends it in an orderly way and leaves no process."""
    with start("standard_library.py") as process:
        assert process.stdout is not None
        assert "source files" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert process.returncode == 130, errors
    assert output.endswith("Interrupted; no worker is left.\n")
    assert errors == ""
    end = time.monotonic() + 10  # a killed process is seen until its new parent has reaped it
    while session_members(process.pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert session_members(process.pid) == []
