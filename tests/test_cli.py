"""The command line: a pool that runs is looked at and turned, and whatever is wrong ends in one line."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.served_pool import answer, serving
from tests.support import ROOT, until
from trio_workers import Config, Payload, Pool, control, open_pool
from trio_workers.cli import _reach, main
from trio_workers.cli._app import COMMANDS
from trio_workers.control import serve_control
from trio_workers.testing import BadBoot, MemoryFactory

Command = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where control sockets lie, for this test alone."""
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    # One that is left in the place of last resort is not ours.
    monkeypatch.setattr(control, "find_sockets", lambda: [])
    monkeypatch.setattr(_reach, "find_sockets", lambda: sorted((directory / "trio_workers").glob("*.sock")))
    return directory


@pytest.fixture
def command(runtime: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in a thread of its own, and return its exit code, stdout and stderr."""

    async def run(*arguments: str) -> tuple[int, str, str]:
        code = await trio.to_thread.run_sync(main, list(arguments))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@contextlib.asynccontextmanager
async def running(name: str = "mill", **more: Any) -> AsyncIterator[Pool]:
    """A pool inside this process, with a control socket."""
    config = Config(**{"command": ["none"], "num_workers": 2, "factory": MemoryFactory(answer), "name": name, **more})
    async with open_pool(config) as pool, trio.open_nursery() as nursery:
        await nursery.start(serve_control, pool)
        yield pool
        nursery.cancel_scope.cancel()


def environment(**more: str) -> dict[str, str]:
    """For a command as a process."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def socket_in(runtime: Path) -> str:
    """The only one there. For commands as processes: they would also find what else runs on this machine."""
    (path,) = (runtime / "trio_workers").glob("*.sock")
    return str(path)


def one_line(text: str) -> str:
    """What a command says when it fails: one line, with its name."""
    assert text.startswith("trio-workers: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text.removeprefix("trio-workers: ").rstrip("\n")


# a pool that runs


async def test_status(command: Command) -> None:
    """A line for the pool and a row for each worker; without a terminal no colours, and no blanks at the ends."""
    async with running() as pool:
        await pool.exec(Payload(b"one"))
        code, out, err = await command("status")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == f"mill · 2 workers: 2 idle · pid {os.getpid()}"
    assert "1 jobs so far" in lines[1]
    assert lines[4].startswith("slot")
    assert [line.split()[0] for line in lines[5:]] == ["0", "1"]
    assert out.isprintable() or set(filter(lambda letter: not letter.isprintable(), out)) == {"\n"}
    assert lines == [line.rstrip() for line in lines]


async def test_status_as_json(command: Command) -> None:
    """The facts, as the control socket has them."""
    async with running() as pool:
        code, out, err = await command("status", "--json")
        facts = json.loads(out)
        assert (code, err) == (0, "")
        assert facts["status"]["pool"] == "mill"
        assert facts["status"]["idle"] == 2
        assert [worker["pid"] for worker in facts["workers"]] == [worker.pid for worker in pool.workers]


async def test_a_hostile_label(command: Command) -> None:
    """What a label would do to a terminal is shown, not done."""
    async with running() as pool, trio.open_nursery() as nursery:
        nursery.start_soon(partial(pool.exec, Payload(b"wait"), label="\x1b[2J[red]日本\n" + "x" * 5000))
        await until(lambda: pool.statistics().busy == 1)
        code, out, _ = await command("status")
        nursery.cancel_scope.cancel()
    assert code == 0
    assert "\\x1b[2J[red]日本\\nxxxx" in out
    assert "\x1b" not in out


async def test_reset(command: Command) -> None:
    """When it returns no old worker is left."""
    async with running() as pool:
        before = {worker.pid for worker in pool.workers}
        code, out, err = await command("reset")
        assert (code, err) == (0, "")
        assert out.startswith("mill: every worker is a fresh one, after ")
        assert not before & {worker.pid for worker in pool.workers}
        code, out, _ = await command("reset", "--json")
        assert (code, json.loads(out)) == (0, {"ok": True, "done": "reset"})


async def test_resize(command: Command) -> None:
    """When it returns there are so many."""
    async with running() as pool:
        code, out, err = await command("resize", "3")
        assert (code, err) == (0, "")
        assert out.startswith("mill: 3 workers, after ")
        assert pool.statistics().idle == 3
        code, out, _ = await command("resize", "1", "--json")
        assert (code, json.loads(out)) == (0, {"ok": True, "done": "resize", "to": 1})
        assert len(pool.workers) == 1
        assert (await command("resize", "1"))[1].startswith("mill: 1 worker, after ")


async def test_a_change_that_fails(command: Command) -> None:
    """Exit code 1 and the pool's own sentence, in one line; the pool is as it was."""
    broken = False

    async def boot(slot: int) -> None:
        if broken:
            raise BadBoot(stderr="no such model")

    async with running(factory=MemoryFactory(answer, boot=boot)) as pool:
        broken = True
        for arguments in (["reset"], ["resize", "3"], ["reset", "--json"]):
            code, out, err = await command(*arguments)
            assert (code, out) == (1, "")
            assert "exited with status 1 before it was ready" in one_line(err)
        broken = False
        assert pool.statistics().target == 2


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5", "1001", "1" * 5000, "", "True"])
async def test_no_number_of_workers(command: Command, number: str) -> None:
    """What can't be a number of workers is not asked for."""
    async with running() as pool:
        code, out, err = await command("resize", number)
        assert (code, out) == (2, "")
        assert len(one_line(err)) < 200
        assert pool.statistics().starts == 2


async def test_control_c_gives_up_the_wait(runtime: Path) -> None:
    """A reset that waits for a job is left by Ctrl-C with 130 and no word; the reset goes on."""
    async with running(num_workers=1) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.exec, Payload(b"wait"))
        await until(lambda: pool.statistics().busy == 1)
        line = [sys.executable, "-m", "trio_workers", "reset", "--socket", socket_in(runtime)]
        waiting: subprocess.CompletedProcess[bytes] | None = None

        async def wait(task_status: "trio.TaskStatus[trio.Process]") -> None:
            nonlocal waiting
            run = partial(
                trio.run_process, line, env=environment(), capture_stdout=True, capture_stderr=True, check=False
            )
            waiting = await run(task_status=task_status)

        started = await nursery.start(wait)
        await until(lambda: pool.statistics().starts == 2)
        started.send_signal(signal.SIGINT)
        await until(lambda: waiting is not None)
        assert waiting is not None
        assert (waiting.returncode, waiting.stdout, waiting.stderr) == (130, b"", b"")
        nursery.cancel_scope.cancel()


async def test_the_pool_ends_meanwhile(command: Command) -> None:
    """A reset whose pool hangs up failed, and says so."""
    config = Config(command=["none"], num_workers=1, factory=MemoryFactory(answer))
    async with open_pool(config) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.exec, Payload(b"wait"))
        await until(lambda: pool.statistics().busy == 1)
        scope = trio.CancelScope()

        async def serve(task_status: "trio.TaskStatus[Path]") -> None:
            with scope:
                await serve_control(pool, task_status=task_status)

        async def hang_up() -> None:
            await until(lambda: pool.statistics().starts == 2)
            scope.cancel()

        await nursery.start(serve)
        nursery.start_soon(hang_up)
        code, out, err = await command("reset")
        assert (code, out) == (1, "")
        assert "has closed the connection" in one_line(err)
        nursery.cancel_scope.cancel()


# which pool


async def test_no_pool(command: Command) -> None:
    """Where there is none, it is said how a pool gets a socket."""
    code, out, err = await command("status")
    assert (code, out) == (2, "")
    assert "serve_control(pool)" in one_line(err)
    assert "--socket PATH" in err


async def test_several_pools(command: Command) -> None:
    """They are listed with name, pid and path; each can be taken by its name or its socket."""
    async with running("mill"), running("press") as press:
        code, out, err = await command("status")
        assert (code, out) == (2, "")
        assert one_line(err).startswith("2 pools run here; say which by --pool or --socket: mill (pid ")
        assert f"press (pid {os.getpid()}, " in err
        path = err.rstrip(")\n").rpartition(" ")[2]
        assert (await command("status", "--pool", "mill"))[1].startswith("mill · ")
        assert (await command("status", "--socket", path))[1].startswith("press · ")
        assert (await command("resize", "1", "--pool=press"))[0] == 0
        assert len(press.workers) == 1
        code, _, err = await command("status", "--pool", "mall")
        assert code == 2
        assert one_line(err).startswith("no pool here is named 'mall'; there is mill (pid ")
        code, _, err = await command("status", "--pool", "mill", "--socket", path)
        assert code == 2
        assert "give one of them" in one_line(err)


async def test_two_of_one_name(command: Command) -> None:
    """A name that two have does not say which; their sockets do."""
    async with running("mill"), running("mill"):
        code, _, err = await command("reset", "--pool", "mill")
        assert code == 2
        assert one_line(err).startswith("2 pools are named 'mill'; say which by --socket: mill (pid ")


async def test_one_that_does_not_answer(command: Command, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool whose process is stopped keeps nobody from reaching another; asked itself, it is a failure."""
    monkeypatch.setattr(_reach, "LOOK_WITHIN", 0.2)
    monkeypatch.setattr(control, "ANSWERS_WITHIN", 0.2)
    async with running("mill"):
        path = runtime / "trio_workers" / "hung-1.sock"
        with socket.socket(socket.AF_UNIX) as hung:
            hung.bind(str(path))
            hung.listen()
            code, _, err = await command("status")
            assert code == 2
            assert f"one that does not answer ({path})" in one_line(err)
            code, _, err = await command("status", "--socket", str(path))
            assert code == 1
            assert f"{path}: no answer within 0.2 s" in one_line(err)


async def test_sockets_that_are_none(command: Command, tmp_path: Path) -> None:
    """A path with nothing, with something else, with a dead socket: one line that names it, exit code 2."""
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    for name, why in (
        ("nothing", "there is no such socket"),
        ("file", "that is no socket"),
        ("file/in", "Not a directory"),
        ("dead", "nobody listens"),
        ("", "that is no socket"),
        ("x" * 300, "a Unix socket's at most"),
        ("new\nline", "there is no such socket"),
        ("nul\0", "embedded null"),
    ):
        for arguments in (["status"], ["reset"], ["resize", "2"], ["top", "--json"]):
            code, out, err = await command(*arguments, "--socket", f"{tmp_path}/{name}")
            assert (code, out) == (2, "")
            assert why in one_line(err), name


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"[]\n",
        b'{"ok":true}\n',
        b'{"ok":true,"status":{}}\n',
        b'{"ok":true,"status":3,"workers":{}}\n',
        b'{"ok":true,"status":{"pool":[]},"workers":[3]}\n',
        b"\xff\n",
        b"",
    ],
)
async def test_one_who_speaks_otherwise(command: Command, tmp_path: Path, said: bytes) -> None:
    """Whatever listens there and is no pool is named in one line."""

    async def speak(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while said and await stream.receive_some():
                await stream.send_all(said)

    path = tmp_path / "other"
    with trio.socket.socket(socket.AF_UNIX) as sock:
        await sock.bind(str(path))
        sock.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, speak, [trio.SocketListener(sock)])
            code, out, err = await command("status", "--socket", str(path))
            nursery.cancel_scope.cancel()
    assert (code in {1, 2}, out) == (True, "")
    assert str(path) in one_line(err)


AS_NOBODY = """
import contextlib, io, os, sys
from trio_workers.cli import main
with contextlib.redirect_stderr(io.StringIO()):
    main(["status", "--socket", "/nowhere"])  # loads what nobody may not be able to read
os.setuid(65534)
sys.exit(main(["status", "--socket", sys.argv[1]]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="to be another user takes root")
async def test_another_users_pool(tmp_path: Path) -> None:
    """It is refused in one line."""
    path = tmp_path / "mill"
    async with running() as pool, trio.open_nursery() as nursery:
        await nursery.start(partial(serve_control, pool, path=path))
        line = [sys.executable, "-c", AS_NOBODY, str(path)]
        done = await trio.run_process(line, env=environment(), capture_stdout=True, capture_stderr=True, check=False)
        nursery.cancel_scope.cancel()
    assert (done.returncode, done.stdout) == (2, b"")
    assert f"{path}: only the user who runs the pool, and root, may connect" in one_line(done.stderr.decode())


# top without a terminal


async def test_top_needs_a_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none, or one that can't be drawn in, it says what else there is."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    code, out, err = await command("top")
    assert (code, out) == (2, "")
    assert "trio-workers status" in one_line(err)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for kind in ("dumb", ""):
        monkeypatch.setenv("TERM", kind)
        code, out, err = await command("top")
        assert (code, out) == (2, "")
        assert f"TERM={kind!r}" in one_line(err)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "x", "3601"])
async def test_no_interval(command: Command, seconds: str) -> None:
    """The interval is a number that makes sense."""
    code, out, err = await command("top", "--json", "--interval", seconds)
    assert (code, out) == (2, "")
    assert "interval" in one_line(err).lower()


@contextlib.asynccontextmanager
async def top_as_json(*arguments: str) -> AsyncIterator[trio.Process]:
    """`top --json` as a process, whose end is waited for."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "trio_workers", "top", "--json", "--interval", "0.1", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    async with process.stdout, process.stderr:
        try:
            yield process
        except BaseException:
            process.kill()
            raise
        finally:
            with trio.CancelScope(shield=True):
                await process.wait()


async def documents(process: trio.Process) -> AsyncIterator[dict[str, Any]]:
    """What it prints, line by line."""
    assert process.stdout is not None
    data = b""
    async for more in process.stdout:
        *lines, data = (data + more).split(b"\n")
        for line in lines:
            yield json.loads(line)


async def test_top_as_json(runtime: Path) -> None:
    """A document a line, with rates from the second on, until the pool ends: that is no failure."""
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(running())
        async with top_as_json("--socket", socket_in(runtime)) as process:
            seen: list[dict[str, Any]] = []
            asked = 0
            async for document in documents(process):
                seen.append(document)
                if document["status"]["jobs"].get("replied", 0) < asked:
                    continue  # of before that job
                if asked < 4:
                    asked += 1
                    await pool.exec(Payload(b"one"))
                elif not pool.statistics().closed:
                    await stack.aclose()
            assert process.stderr is not None
            assert await process.stderr.receive_some() == b""
    assert process.returncode == 0
    assert seen[0]["rates"] == {"jobs": None, "cpu": {}}
    last = next(document for document in seen if document["status"]["jobs"].get("replied") == 4)
    assert last["rates"]["jobs"] > 0
    assert [worker["slot"] for worker in last["workers"]] == [0, 1]


async def test_top_as_json_of_a_pool_that_is_killed(tmp_path: Path) -> None:
    """Where the pool's process is killed, that is said, with exit code 1."""
    path = tmp_path / "mill.sock"
    async with serving(path) as server, top_as_json("--socket", str(path)) as process:
        async for _ in documents(process):
            server.kill()
        assert process.stderr is not None
        said = (await process.stderr.receive_some()).decode()
        await process.wait()
        assert process.returncode == 1
        assert f"the pool 'mill' was of process {server.pid}" in one_line(said)


async def test_control_c_ends_top_as_json(runtime: Path) -> None:
    """With 130, and without a word."""
    async with running(), top_as_json("--socket", socket_in(runtime)) as process:
        async for _ in documents(process):
            process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert await process.stderr.receive_some() == b""
        assert await process.wait() == 130


# the command line at large


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command says what it does, and what each of its flags is for."""
    assert main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"trio-workers {name}" in out
    assert len(out.splitlines()) > 5


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_each_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The list of commands says in a line or two what each does."""
    assert main(arguments) == 0
    out, _ = capsys.readouterr()
    for name in COMMANDS:
        (line,) = (line for line in out.splitlines() if line.startswith(f"│ {name} "))
        assert len(line.strip("│ ").split()) > 3, line


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["status", "--bogus"],
        ["status", "more"],
        ["resize"],
        ["--pool", "x"],
        ["resize", "1", "2"],
        ["status", "--socket"],
    ],
)
def test_what_is_not_understood(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr, exit code 2."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    one_line(err)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints one."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()


def without(module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in an interpreter that lacks a module."""
    program = (
        "import sys; sys.modules[sys.argv[1]] = None; from trio_workers.cli import main; sys.exit(main(sys.argv[2:]))"
    )
    line = [sys.executable, "-c", program, module, *arguments]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize("missing", ["cyclopts", "rich", "cattrs"])
@pytest.mark.parametrize("arguments", [["status"], ["top"], [], ["--help"]])
def test_an_extra_that_is_missing(missing: str, arguments: list[str]) -> None:
    """Without the extra each command ends in one sentence that names it."""
    done = without(missing, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    said = one_line(done.stderr)
    assert said == f"the command line needs {missing}, which comes with: pip install 'trio_workers[cli]'"


def test_another_missing_module_is_no_extra() -> None:
    """What an extra would not bring is told as it is."""
    done = without("trio_workers.cli._turn", "status")
    assert done.returncode == 1
    assert "ImportError" in done.stderr


async def test_nobody_reads(runtime: Path) -> None:
    """Where the reader of stdout has gone, as with `| head -0`, a command ends without a word, as by SIGPIPE."""
    async with running():
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = await trio.run_process(
                [sys.executable, "-m", "trio_workers", "status", "--socket", socket_in(runtime)],
                stdout=writing, capture_stderr=True, check=False, env=environment(),
            )  # fmt: skip
        finally:
            os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("arguments", ["status", "--version", "demo --seconds 0.1", "run -- cat"])
def test_streams_that_are_closed(arguments: str, tmp_path: Path) -> None:
    """A closed stdout is told of; a closed stderr is nowhere, and neither gets what was meant for another file."""
    program = f"{sys.executable} -m trio_workers {arguments}"
    shell = f"{program} >&-; echo $? >&2; {program} >&- 2>&-; echo $? >&2"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, env=environment(), check=False)
    assert done.stderr.decode().splitlines() == [
        "trio-workers: stdout is closed; where nobody is to see it, lead it to /dev/null",
        "2",
        "2",
    ]


async def test_a_terminal_of_few_letters(runtime: Path) -> None:
    """What an encoding does not have is replaced; nothing fails."""
    async with running("мельница"):
        done = await trio.run_process(
            [sys.executable, "-m", "trio_workers", "status", "--socket", socket_in(runtime)],
            capture_stdout=True, capture_stderr=True, check=False, env=environment(PYTHONIOENCODING="ascii"),
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"???????? ? 2 workers: 2 idle")
