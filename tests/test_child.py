"""Workers written in Python, as real processes: `trio_workers.child` with a pool played by hand."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

import pytest

from trio_workers._conversation import STOP_STREAM, Conversation, Event, Failed, Part, Replied, Shaken, StopAsked
from trio_workers._goridge import (
    MORE,
    PONG,
    PROTOCOLS,
    STOP,
    context_frame_3,
    encode_control,
    encode_error,
    encode_job,
    frame_1,
    frame_2,
    frame_3,
)
from trio_workers.child import STOP_REQUEST, Job, Reply, serve

ROOT: Final = Path(__file__).parent.parent
ECHO: Final = "serve(lambda job: Reply(job.body, job.context))"
Transport = Literal["pipe", "socketpair", "tcp", "unix"]
TRANSPORTS: Final[tuple[Transport, ...]] = ("pipe", "socketpair", "tcp", "unix")


class Child:
    """A worker process and the pool's end of its relay."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", stderr: Path, reader: int, writer: int, protocol: str
    ) -> None:
        self.process = process
        self.protocol = protocol
        self.conversation = Conversation(protocol, 1 << 40)
        self.stderr_file = stderr
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.writer, data) :]

    def event(self) -> Event | None:
        """The next event, None at the end of the relay. What the worker says is checked as the pool checks it."""
        while (event := self.conversation.next_event()) is None:
            data = os.read(self.reader, 1 << 16)
            if not data:
                assert not self.conversation.pending
                return None
            self.conversation.receive(data)
        return event

    def shake(self) -> int:
        self.send(self.conversation.handshake())
        event = self.event()
        assert isinstance(event, Shaken)
        return event.pid

    def begin(self, body: bytes = b"", context: bytes = b"") -> None:
        self.conversation.begin_job()
        self.send(b"".join(encode_job(self.protocol, context, body)))

    def job(self, body: bytes = b"", context: bytes = b"") -> Event | None:
        self.begin(body, context)
        return self.event()

    def failure(self, body: bytes = b"") -> str:
        """The message of a job that fails."""
        event = self.job(body)
        assert isinstance(event, Failed), event
        return event.message.decode()

    def hang_up(self) -> None:
        for fd in {self.reader, self.writer}:
            os.close(fd)
        self.reader = self.writer = -1

    def ended(self) -> int:
        """Wait for its end; negative is a signal."""
        return self.process.wait()

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text(encoding="utf-8")

    def close(self) -> None:
        if self.reader != -1:
            self.hang_up()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


Start = Callable[..., Child]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start workers; they are gone when the test ends."""
    started: list[Child] = []

    def start_one(
        program: str = ECHO,
        *,
        protocol: str = "goridge-3",
        transport: Transport = "pipe",
        environment: dict[str, str] | None = None,
        prelude: str = "from trio_workers.child import STOP_REQUEST, Job, Reply, serve",
        closed: tuple[int, ...] = (),
    ) -> Child:
        path = tmp_path / f"worker{len(started)}.py"
        path.write_text(f"{prelude}\n{textwrap.dedent(program)}\n", encoding="utf-8")
        child_env = {**os.environ, "PYTHONPATH": str(ROOT), "TRIO_WORKERS_PROTOCOL": protocol, **(environment or {})}
        child_env.pop("RR_RELAY", None)
        argv = [sys.executable, "-W", "error", str(path)]
        if closed:
            # What a daemon does: the descriptors don't exist, and sys.stdout is None.
            closing = ";".join(f"os.close({fd})" for fd in closed)
            argv = [sys.executable, "-c", f"import os, sys;{closing};os.execv(sys.executable, sys.argv[1:])", *argv]
        stderr = tmp_path / f"stderr{len(started)}"
        with stderr.open("wb") as errors:
            if transport in ("pipe", "socketpair"):
                if transport == "pipe":
                    child_in, writer = os.pipe()
                    reader, child_out = os.pipe()
                else:
                    ours, theirs = socket.socketpair()
                    reader = writer = ours.detach()
                    child_in = child_out = theirs.detach()
                try:
                    process = subprocess.Popen(argv, stdin=child_in, stdout=child_out, stderr=errors, env=child_env)
                finally:
                    for fd in {child_in, child_out}:
                        os.close(fd)
            else:
                if transport == "tcp":
                    listener = socket.create_server(("127.0.0.1", 0))
                    child_env["RR_RELAY"] = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
                else:
                    # Short: a socket's path has 107 bytes at most.
                    listener = socket.socket(socket.AF_UNIX)
                    address = os.path.relpath(tmp_path / "relay")
                    listener.bind(address)
                    listener.listen()
                    child_env["RR_RELAY"] = f"unix://{os.path.abspath(address)}"
                with listener:
                    process = subprocess.Popen(
                        argv, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=child_env
                    )
                    reader = writer = listener.accept()[0].detach()
        child = Child(process, stderr, reader, writer, protocol)
        started.append(child)
        return child

    yield start_one
    for child in started:
        child.close()


# --- the protocol ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_handshake_jobs_stop(start: Start, protocol: str, transport: Transport) -> None:
    """In every dialect over every transport: a pid, jobs with and without context, large and empty, then a soft end."""
    child = start(protocol=protocol, transport=transport)
    assert child.shake() == child.process.pid
    large = bytes(range(256)) * 20480
    for context, body in ((b"", b"hello"), (b"ctx", b"hello"), (b"ctx", b""), (b"", b""), (large[:70000], large)):
        assert child.job(body, context) == Replied(context, body)
    child.send(child.conversation.stop())
    assert child.event() is None
    assert child.ended() == 0
    assert child.stderr == ""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_job_in_pieces(start: Start, protocol: str) -> None:
    """Where the writes cut a job makes no difference."""
    child = start(protocol=protocol)
    for byte in child.conversation.handshake():
        child.send(bytes((byte,)))
    assert child.event() == Shaken(child.process.pid)
    child.conversation.begin_job()
    for byte in b"".join(encode_job(protocol, b"ctx", b"hello")):
        child.send(bytes((byte,)))
    assert child.event() == Replied(b"ctx", b"hello")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_jobs_written_ahead(start: Start, protocol: str) -> None:
    """Jobs that lie in the pipe are done one after the other, in order."""
    child = start(protocol=protocol)
    child.shake()
    child.send(b"".join(b"".join(encode_job(protocol, b"", b"%d" % number)) for number in range(50)))
    for number in range(50):
        child.conversation.begin_job()
        data = b""
        while (event := child.conversation.next_event()) is None:
            # One reply at a time: what is behind it belongs to the next.
            data = os.read(child.reader, 1)
            child.conversation.receive(data)
        assert event == Replied(b"", b"%d" % number)


@pytest.mark.parametrize("protocol", ["goridge-1", "goridge-2"])
def test_an_empty_context_in_each_of_its_forms(start: Start, protocol: str) -> None:
    """Raw of size 0, as we write it, or none, as it is written elsewhere."""
    child = start(protocol=protocol)
    child.shake()
    frame = frame_1 if protocol == "goridge-1" else frame_2
    for flags in (0x14, 0x12):
        child.conversation.begin_job()
        child.send(frame(flags, b"") + frame(0, b"hello"))
        assert child.event() == Replied(b"", b"hello")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_control_frames_with_spaces(start: Start, protocol: str) -> None:
    """The two control frames are JSON, so another pool may write them with spaces."""
    child = start(protocol=protocol)
    child.send(encode_control(protocol, b'{ "pid": 1 }'))
    assert isinstance(child.event(), Shaken)
    child.send(encode_control(protocol, b'{"stop": true}'))
    assert child.event() is None
    assert child.ended() == 0


@pytest.mark.parametrize("when", ["before the handshake", "idle", "in a frame"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_pool_is_gone(start: Start, protocol: str, when: str) -> None:
    """At the end of the relay the worker ends, quietly, wherever it is."""
    child = start(protocol=protocol)
    if when != "before the handshake":
        child.shake()
    if when == "in a frame":
        child.send(b"".join(encode_job(protocol, b"ctx", b"hello"))[:-1])
    child.hang_up()
    assert child.ended() == 0
    assert child.stderr == ""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_pool_is_gone_in_a_job(start: Start, transport: Transport) -> None:
    """A reply that nobody takes is no error: EPIPE, or ECONNRESET where something was left unread."""
    child = start("serve(lambda job: bytes(1 << 22))", transport=transport)
    child.shake()
    child.begin()
    os.read(child.reader, 1)  # it is writing now
    child.hang_up()
    assert child.ended() == 0
    assert child.stderr == ""


BROKEN: Final = {
    "text": ("", b"hello"),
    "text after the handshake": ("shake", b"hello"),
    "a reply": ("shake", b"reply"),
    "an error": ("shake", b"error"),
    "a control frame that is none": ("shake", b"control"),
    "a job before the handshake": ("", b"job"),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pool_that_breaks_the_protocol(start: Start, protocol: str, what: str) -> None:
    """The worker says what it received and ends with status 1."""
    child = start(protocol=protocol)
    before, kind = BROKEN[what]
    if before:
        child.shake()
    old = frame_1 if protocol == "goridge-1" else frame_2
    made = {
        b"reply": context_frame_3(0, b"", b"part", MORE) if protocol == "goridge-3" else old(4, b"body"),
        b"error": encode_error(protocol, b"boom"),
        b"control": encode_control(protocol, b'{"what":1}'),
        b"job": b"".join(encode_job(protocol, b"ctx", b"hello")),
    }
    child.send(made.get(kind, kind))
    assert child.event() is None
    assert child.ended() == 1
    last = child.stderr.splitlines()[-1]
    assert last.startswith(f"RuntimeError: what the pool sent is not {protocol}")
    assert "the bytes received begin b'" in last


def test_another_dialect_than_the_pool_speaks(start: Start) -> None:
    """The error names the variable that is wrong."""
    child = start(protocol="goridge-1")
    child.send(encode_control("goridge-3", b'{"pid":1}'))
    assert child.ended() == 1
    assert "TRIO_WORKERS_PROTOCOL" in child.stderr
    assert "0x13" in child.stderr


def test_the_defaults_of_the_environment(start: Start) -> None:
    """Without either variable a worker speaks goridge-3 over pipes."""
    child = start(
        ECHO, prelude='import os; del os.environ["TRIO_WORKERS_PROTOCOL"]\nfrom trio_workers.child import Reply, serve'
    )
    child.shake()
    assert child.job(b"hello") == Replied(b"", b"hello")


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("TRIO_WORKERS_PROTOCOL", "goridge-4", "goridge-1, goridge-2, goridge-3"),
        ("RR_RELAY", "http://x", "tcp://HOST:PORT or unix:///PATH"),
        ("RR_RELAY", "tcp://localhost", "tcp://HOST:PORT or unix:///PATH"),
        ("RR_RELAY", "tcp://localhost:http", "tcp://HOST:PORT or unix:///PATH"),
        ("RR_RELAY", "unix://", "tcp://HOST:PORT or unix:///PATH"),
        ("RR_RELAY", "unix:///no/such/path", "while connecting to the pool: RR_RELAY is 'unix:///no/such/path'"),
    ],
)
def test_an_environment_that_makes_no_sense(start: Start, variable: str, value: str, text: str) -> None:
    """The error names the variable and what it may be."""
    child = start(f"import os; os.environ[{variable!r}] = {value!r}\n{ECHO}")
    assert child.ended() == 1
    assert value in child.stderr
    assert text in child.stderr


# --- standard streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_stray_output_goes_to_stderr(start: Start, transport: Transport) -> None:
    """What a print, a system call, a subprocess or a library in C writes never gets into the relay."""
    child = start(
        """
        import ctypes, os, subprocess, sys
        print("before serve")
        def handle(job):
            print("from print")
            print("half a line", end="")
            sys.stdout.flush()
            os.write(1, b", from write\\n")
            subprocess.run(["echo", "from a subprocess"], check=True)
            libc = ctypes.CDLL(None)
            libc.puts(b"from C")
            libc.fflush(None)
            print("no \\udc80 trouble")
            print("no newline", end="")
            return b"done"
        serve(handle)
        """,
        transport=transport,
        # Without a buffer what is printed before serve() is gone before serve() can do anything about it.
        environment={"PYTHONUNBUFFERED": ""},
    )
    child.shake()
    assert child.job() == Replied(b"", b"done")
    # All of it was there before the reply was, the last line as well.
    assert child.stderr.splitlines() == [
        "before serve",
        "from print",
        "half a line, from write",
        "from a subprocess",
        "from C",
        "no \\udc80 trouble",
        "no newline",
    ]


def test_stdin_is_empty(start: Start) -> None:
    """A handler that reads from stdin doesn't take the next job."""
    child = start(
        """
        import subprocess, sys
        def handle(job):
            if job.body == b"input":
                return input("name? ").encode()
            if job.body == b"subprocess":
                return subprocess.run(["cat"], stdout=subprocess.PIPE, check=True).stdout
            return sys.stdin.read().encode()
        serve(handle)
        """
    )
    child.shake()
    assert "EOFError" in child.failure(b"input")
    assert child.job(b"subprocess") == Replied(b"", b"")
    assert child.job(b"read") == Replied(b"", b"")


def test_no_child_of_a_worker_holds_the_relay(start: Start) -> None:
    """The relay's descriptors are close-on-exec and not among the standard ones."""
    child = start(
        """
        import os, subprocess
        def handle(job):
            listing = ["sh", "-c", "readlink /proc/self/fd/* | grep -c -e pipe -e socket; true"]
            return subprocess.run(listing, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, close_fds=False).stdout
        serve(handle)
        """
    )
    child.shake()
    assert child.job() == Replied(b"", b"1\n")  # the one to grep


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_standard_streams(start: Start, transport: Transport) -> None:
    """A worker whose standard streams are closed serves, and prints into the void."""
    closed = (2,) if transport in ("pipe", "socketpair") else (0, 1, 2)  # else the others are the relay
    child = start(
        """
        import os, subprocess, sys
        def handle(job):
            print("lost")
            print("lost too", file=sys.stderr)
            subprocess.run("echo lost; echo lost >&2", shell=True, check=True)
            os.write(1, b"lost")
            os.write(2, b"lost")
            return repr(sys.stderr).encode()
        serve(handle)
        """,
        transport=transport,
        closed=closed,
    )
    child.shake()
    assert child.job() == Replied(b"", b"None")
    assert child.job() == Replied(b"", b"None")
    assert child.stderr == ""


def test_a_relay_that_is_closed(start: Start) -> None:
    """Pipes need a stdin and a stdout."""
    child = start(closed=(1,))
    assert child.ended() == 1
    assert "RuntimeError: the relay is stdin and stdout, but descriptor 1 is closed" in child.stderr


@pytest.mark.parametrize("replaced", ["None", "io.StringIO()", "object()", "open(os.devnull)"])
def test_a_handler_that_replaces_stdout(start: Start, replaced: str) -> None:
    """Whatever a handler puts in the place of sys.stdout costs no job."""
    child = start(
        f"""
        import io, os, sys, warnings
        warnings.simplefilter("ignore")
        def handle(job):
            sys.stdout = {replaced}
            return b"done"
        serve(handle)
        """
    )
    child.shake()
    assert child.job() == Replied(b"", b"done")
    assert child.job() == Replied(b"", b"done")


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        ("b'bytes'", Replied(b"", b"bytes")),
        ("bytearray(b'mutable')", Replied(b"", b"mutable")),
        ("memoryview(b'0123456789')[::2]", Replied(b"", b"02468")),
        ("array.array('H', [1, 2])", Replied(b"", b"\1\0\2\0")),
        ("None", Replied(b"", b"")),
        ("b''", Replied(b"", b"")),
        ("Reply()", Replied(b"", b"")),
        ("Reply(context=b'ctx')", Replied(b"ctx", b"")),
        ("Reply(memoryview(b'body'), bytearray(b'ctx'))", Replied(b"ctx", b"body")),
        ("Reply(None, None)", Replied(b"", b"")),
        ("STOP_REQUEST", StopAsked()),
        ("b'{\"stop\":true}'", Replied(b"", STOP)),
        ("Reply(job.body, job.body)", Replied(STOP, STOP)),
    ],
)
def test_an_answer(start: Start, protocol: str, answer: str, reply: Event) -> None:
    """Anything bytes-like, a Reply, None, or the request to be replaced."""
    child = start(f"import array\nserve(lambda job: {answer})", protocol=protocol)
    child.shake()
    event = child.job(STOP)
    assert (event, type(event)) == (reply, type(reply))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_request_to_stop_is_an_identity(start: Start, protocol: str) -> None:
    """Equal bytes that came as a job are echoed; the constant asks for an end, which comes from the pool."""
    child = start("serve(lambda job: job.body if job.body else STOP_REQUEST)", protocol=protocol)
    child.shake()
    assert child.job(STOP) == Replied(b"", STOP)
    event = child.job()
    assert isinstance(event, StopAsked)
    # It waits for what the pool decides.
    assert child.job(b"one more") == Replied(b"", b"one more")
    child.send(child.conversation.stop())
    assert child.event() is None
    assert child.ended() == 0


def test_a_reply_that_means_something_else(start: Start) -> None:
    """An empty reply with the context of a request to stop would run the job twice: it is an error of this job."""
    child = start()
    child.shake()
    child.begin(b"", STOP)
    event = child.event()
    assert isinstance(event, Failed)
    assert b"return STOP_REQUEST" in event.message


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ("'text'", ["not str", ".encode()"]),
        ("42", ["not int"]),
        ("[b'list']", ["not list"]),
        ("{}", ["not dict"]),
        ("iter([b'no generator'])", ["not list_iterator"]),
        ("main()", ["not coroutine", "without async"]),
    ],
)
def test_an_answer_of_a_wrong_type(start: Start, protocol: str, answer: str, texts: list[str]) -> None:
    """A job error that says what is accepted, and the worker lives on."""
    child = start(
        f"async def main(): ...\nserve(lambda job: {answer} if job.body == b'wrong' else job.body)", protocol=protocol
    )
    child.shake()
    message = child.failure(b"wrong")
    for text in ["TypeError", "bytes, a Reply, None or STOP_REQUEST", *texts]:
        assert text in message
    assert "trio_workers" not in message
    assert child.job(b"next") == Replied(b"", b"next")
    assert child.stderr == ""


def test_a_reply_of_a_wrong_type(start: Start) -> None:
    """The fields of a Reply are named."""
    child = start("serve(lambda job: Reply('text', 42))")
    child.shake()
    assert "Reply.body and Reply.context are bytes-like or None, not str and int" in child.failure()


def test_a_reply_larger_than_a_frame_can_be(start: Start) -> None:
    """goridge-3 counts in 32 bits."""
    # bytes(n) is memory that is never touched.
    child = start("serve(lambda job: Reply(bytes(2**32 - 4), b'12345') if job.body else b'')")
    child.shake()
    message = child.failure(b"large")
    assert "OverflowError" in message or "MemoryError" in message
    assert child.job() == Replied(b"", b"")


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_exception_is_a_job_error(start: Start, protocol: str) -> None:
    """Its message is the handler's traceback, without our own frames, and the worker lives on."""
    child = start(
        """
        def inner(job):
            raise ValueError(f"no use for {job.body!r}")
        def handle(job):
            try:
                inner(job)
            except ValueError as error:
                raise RuntimeError("told to fail") from error
        serve(lambda job: handle(job) if job.body else b"fine")
        """,
        protocol=protocol,
    )
    child.shake()
    for _ in range(2):
        message = child.failure(b"this")
        assert message.startswith("Traceback (most recent call last):\n")
        assert "ValueError: no use for b'this'" in message
        assert "in inner\n" in message
        assert message.endswith("RuntimeError: told to fail")
        assert "trio_workers" not in message
        assert child.job() == Replied(b"", b"fine")


@pytest.mark.parametrize(
    ("raising", "text"),
    [
        ("raise ValueError('caf\\u00e9 \\ud800 \\0')", "ValueError: café \\ud800 \0"),
        ("raise Evil", "Evil: <exception str() failed>"),
        ("raise ExceptionGroup('both', [ValueError(1), TypeError(2)])", "TypeError: 2"),
        ("recurse()", "RecursionError"),
        ("raise StopIteration(7)", "StopIteration: 7"),
        ("raise trio_workers._goridge.FrameError('mine', b'')", "FrameError: mine"),
        ("raise BrokenPipeError('of the handler')", "BrokenPipeError: of the handler"),
        ("x = 1 +", "SyntaxError"),
        ("raise ValueError('x' * 5_000_000 + 'end')", "xend"),
    ],
)
def test_any_exception(start: Start, raising: str, text: str) -> None:
    """Whatever an exception holds, its text arrives, and its length is bounded."""
    child = start(
        f"""
        import trio_workers._goridge
        class Evil(Exception):
            def __str__(self):
                raise RuntimeError
        def recurse():
            recurse()
        def handle(job):
            if job.body:
                exec({raising!r})
            return b"fine"
        serve(handle)
        """
    )
    child.shake()
    message = child.failure(b"now")
    assert text in message
    assert len(message) < 1_100_000
    assert child.job() == Replied(b"", b"fine")


@pytest.mark.parametrize(
    ("statement", "status"),
    [
        ("sys.exit(3)", 3),
        ("sys.exit()", 0),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("raise GeneratorExit", 1),
        ("os._exit(4)", 4),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
    ],
)
@pytest.mark.parametrize("stream", ["", "yield b'part'"])
def test_what_ends_a_worker(start: Start, statement: str, status: int, stream: str) -> None:
    """An exit is an exit, with its own status and without a reply; in a stream as well."""
    child = start(
        f"""
        import os, sys
        def handle(job):
            {stream}
            {statement}
        serve(handle)
        """
    )
    child.shake()
    child.begin()
    if stream:
        assert child.event() == Part(b"", b"part")
    assert child.event() is None
    assert child.ended() == status


def test_sigint_is_ignored(start: Start) -> None:
    """Ctrl-C is for the pool to handle: idle or in a job, the worker goes on."""
    child = start(
        """
        import os, signal
        def handle(job):
            os.kill(os.getpid(), signal.SIGINT)
            return b"done"
        serve(handle)
        """
    )
    child.shake()
    child.process.send_signal(signal.SIGINT)
    assert child.job() == Replied(b"", b"done")
    assert child.stderr == ""


# --- streams --------------------------------------------------------------------------------------------------------

STREAM: Final = """
    import itertools, os, sys
    def handle(job):
        try:
            for number in itertools.count() if job.body == b"forever" else range(int(job.body)):
                yield Reply(b"part %d" % number, job.context)
        except GeneratorExit:
            print("closed")
            raise
    serve(handle)
    """


def test_a_generator_streams(start: Start) -> None:
    """Parts with their contexts, then an empty last frame; no part at all is an empty stream."""
    child = start(STREAM)
    child.shake()
    assert child.job(b"3", b"ctx") == Part(b"ctx", b"part 0")
    assert [child.event() for _ in range(3)] == [
        Part(b"ctx", b"part 1"),
        Part(b"ctx", b"part 2"),
        Replied(b"", b"", True),
    ]
    assert child.job(b"0") == Replied(b"", b"")
    assert child.job(b"1") == Part(b"", b"part 0")
    assert child.event() == Replied(b"", b"", True)
    assert child.stderr == ""


def test_what_a_generator_may_yield(start: Start) -> None:
    """What a handler may return it may also yield, but for a request to stop."""
    child = start(
        """
        def handle(job):
            yield b"bytes"
            yield bytearray(b"mutable")
            yield None
            yield Reply(b"", b'{"stop":true}')
        serve(handle)
        """
    )
    child.shake()
    assert child.job() == Part(b"", b"bytes")
    assert [child.event() for _ in range(4)] == [
        Part(b"", b"mutable"),
        Part(b"", b""),
        Part(STOP, b""),
        Replied(b"", b"", True),
    ]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stream_left_early(start: Start, transport: Transport) -> None:
    """After a stop-the-stream frame the generator is closed, and the last frame comes."""
    child = start(STREAM, transport=transport)
    child.shake()
    assert child.job(b"forever") == Part(b"", b"part 0")
    child.send(frame_3(0, b"", PONG) + STOP_STREAM)
    while isinstance(event := child.event(), Part):
        pass
    assert event == Replied(b"", b"", True)
    assert child.stderr == "closed\n"
    # It was one stream that was ended, not the worker.
    assert child.job(b"1") == Part(b"", b"part 0")
    assert child.event() == Replied(b"", b"", True)


def test_a_stop_that_comes_late(start: Start) -> None:
    """Pong and stop-the-stream frames do no harm to a worker that is not streaming."""
    child = start(STREAM)
    child.shake()
    child.send(STOP_STREAM + frame_3(0, b"", PONG) + STOP_STREAM)
    assert child.job(b"1") == Part(b"", b"part 0")
    assert child.event() == Replied(b"", b"", True)
    child.send(STOP_STREAM)
    assert child.job(b"1") == Part(b"", b"part 0")
    assert child.event() == Replied(b"", b"", True)


def test_what_comes_in_a_stream_is_kept(start: Start) -> None:
    """A job and a stop that were written while a stream ran have their turn after it."""
    child = start(STREAM)
    child.shake()
    jobs = [b"".join(encode_job("goridge-3", b"", body)) for body in (b"forever", b"2")]
    child.send(b"".join((*jobs, STOP_STREAM, child.conversation.stop())))
    child.conversation.begin_job()
    while isinstance(event := child.event(), Part):
        pass
    assert event in (Replied(b"", b""), Replied(b"", b"", True))  # the stop may have come before the first part
    child.conversation.begin_job()
    assert child.event() == Part(b"", b"part 0")
    assert child.event() == Part(b"", b"part 1")
    assert child.event() == Replied(b"", b"", True)
    assert child.event() is None
    assert child.ended() == 0


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("raise RuntimeError('told to fail')", "RuntimeError: told to fail"),
        ("yield 'text'", "TypeError: a handler returns bytes"),
        ("yield STOP_REQUEST", "TypeError: STOP_REQUEST says that the job did not run"),
        ("return b'lost'", "TypeError: a generator's answer is what it yields"),
        ("return STOP_REQUEST", "TypeError: a generator's answer is what it yields"),
        ("yield from handle(job)", "RecursionError"),
    ],
)
def test_an_error_in_a_stream(start: Start, body: str, text: str) -> None:
    """An error frame ends the stream, and the worker lives on."""
    child = start(
        f"""
        def handle(job):
            try:
                if job.body:
                    yield b"part"
                {body}
            finally:
                if not job.body:
                    print("cleaned up")
        serve(handle)
        """
    )
    child.shake()
    for _ in range(2):
        event = child.job(b"now")
        while isinstance(event, Part):
            event = child.event()
        assert isinstance(event, Failed)
        assert text in event.message.decode()
        assert "trio_workers" not in event.message.decode()
    assert text in child.failure()
    assert child.stderr.splitlines()[0] == "cleaned up"


def test_an_error_while_a_stream_is_closed(start: Start) -> None:
    """A generator that fails when it is closed ends its stream with an error frame."""
    child = start(
        """
        def handle(job):
            try:
                while True:
                    yield b"part"
            finally:
                raise RuntimeError("told to fail")
        serve(handle)
        """
    )
    child.shake()
    assert child.job() == Part(b"", b"part")
    child.send(STOP_STREAM)
    while isinstance(event := child.event(), Part):
        pass
    assert isinstance(event, Failed)
    assert event.message.endswith(b"RuntimeError: told to fail")


@pytest.mark.parametrize("protocol", ["goridge-1", "goridge-2"])
def test_streams_need_goridge_3(start: Start, protocol: str) -> None:
    """Elsewhere a generator is a job error that says so."""
    child = start("def handle(job):\n    yield b'part'\nserve(handle)", protocol=protocol)
    child.shake()
    for _ in range(2):
        assert f"streams need goridge-3; the pool speaks {protocol}" in child.failure()


def test_the_pool_is_gone_in_a_stream(start: Start) -> None:
    """The generator is closed and the worker ends, quietly."""
    child = start(STREAM)
    child.shake()
    assert child.job(b"forever") == Part(b"", b"part 0")
    child.hang_up()
    assert child.ended() == 0
    assert child.stderr == "closed\n"


def test_a_pool_that_says_no_more(start: Start) -> None:
    """A stream goes on to its end when the pool has only closed its own direction."""
    child = start(STREAM)
    child.send(child.conversation.handshake() + b"".join(encode_job("goridge-3", b"", b"20")))
    os.close(child.writer)
    child.writer = child.reader
    assert isinstance(child.event(), Shaken)
    child.conversation.begin_job()
    for number in range(20):
        assert child.event() == Part(b"", b"part %d" % number)
    assert child.event() == Replied(b"", b"", True)
    assert child.event() is None
    assert child.ended() == 0


# --- the process ----------------------------------------------------------------------------------------------------


def test_what_a_worker_imports(start: Start) -> None:
    """Start-up time is import time: neither trio nor attrs, nor anything slow of the standard library."""
    child = start(
        """
        import sys
        before = set(sys.modules)
        from trio_workers.child import serve
        serve(lambda job: " ".join(sorted(set(sys.modules) - before)).encode())
        """,
        prelude="",
    )
    child.shake()
    event = child.job()
    assert isinstance(event, Replied)
    assert set(event.body.decode().split()) <= {
        "_struct",
        "select",
        "struct",
        "trio_workers",
        "trio_workers._goridge",
        "trio_workers.child",
        "trio_workers.child._relay",
        "zlib",
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_of_a_job_is_kept(start: Start, protocol: str) -> None:
    """While a worker waits it holds neither the last job's payload nor its answer, nor those of a failed one."""
    child = start(
        """
        import gc, signal, sys, tracemalloc
        def look(number, frame):
            gc.collect()
            jobs = sum(isinstance(thing, (Job, Reply)) for thing in gc.get_objects())
            sys.stderr.write(f"{tracemalloc.get_traced_memory()[0]} {jobs}\\n")
            sys.stderr.flush()
            sys.stdout.flush()
        def handle(job):
            if job.context == b"fail":
                raise ValueError(job)
            return Reply(job.body, job.context)
        import traceback, linecache
        tracemalloc.start()
        signal.signal(signal.SIGUSR1, look)
        serve(handle)
        """,
        protocol=protocol,
    )
    child.shake()
    large = bytes(5 << 20)
    assert child.job(large) == Replied(b"", large)
    assert isinstance(child.job(large, b"fail"), Failed)
    lines: list[str] = []
    # It is on its way from the write of the reply to the next read: ask until it waits there.
    for context in (b"", b"fail"):
        child.job(large, context)
        while True:
            seen = len(lines)
            child.process.send_signal(signal.SIGUSR1)
            while len(lines) == seen:
                lines = child.stderr.splitlines()
            memory, jobs = map(int, lines[-1].split())
            if memory < 2 << 20 and jobs == 0:
                break


# --- the handler ----------------------------------------------------------------------------------------------------


class _Async:
    async def __call__(self, job: Job) -> bytes:
        return job.body


async def _coroutine(job: Job) -> bytes:
    return job.body


async def _async_generator(job: Job) -> object:
    yield job.body


def test_an_async_handler_is_refused() -> None:
    """A coroutine function is refused at once, with what to do instead, in whatever it is wrapped."""
    import functools

    for handler in (
        _coroutine,
        _async_generator,
        _Async(),
        _Async().__call__,
        functools.partial(_coroutine),
        functools.partial(functools.partial(_coroutine)),
        functools.partial(_Async()),
    ):
        with pytest.raises(TypeError, match="plain function, not an async one"):
            serve(handler)  # type: ignore[arg-type]


@pytest.mark.parametrize("handler", [None, b"bytes", 42])
def test_a_handler_that_is_none(handler: object) -> None:
    """What can't be called is refused at once."""
    with pytest.raises(TypeError, match=f"a function of one job, not {type(handler).__name__}"):
        serve(handler)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "handler", ["print_it", "functools.partial(print_it)", "Callable()", "Callable().__call__", "len", "Job.__repr__"]
)
def test_any_callable_is_a_handler(start: Start, handler: str) -> None:
    """A function, a method, an object that can be called, a function in C."""
    child = start(
        f"""
        import functools
        def print_it(job):
            return b"done"
        class Callable:
            __call__ = staticmethod(print_it)
        serve({handler})
        """
    )
    child.shake()
    event = child.job()
    if handler in ("len", "Job.__repr__"):
        assert isinstance(event, Failed)
        assert b"TypeError" in event.message
    else:
        assert event == Replied(b"", b"done")


def test_a_job_and_a_reply_show_themselves() -> None:
    """What a job holds is seen in a handler's own traceback."""
    assert repr(Job(b"body", b"ctx")) == "Job(body=b'body', context=b'ctx')"
    assert repr(Reply(b"body")) == "Reply(body=b'body', context=b'')"
    assert STOP_REQUEST is STOP


# --- the worker that the contract tests use -------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_worker_of_the_contract_tests(start: Start, protocol: str) -> None:
    """Each instruction of tests/workers/worker.py."""
    program = f"import runpy; runpy.run_path({str(ROOT / 'tests' / 'workers' / 'worker.py')!r}, run_name='__main__')"
    child = start(program, protocol=protocol, environment={"TRIO_WORKERS_SLOT": "3"})
    pid = child.shake()
    for body, reply in (
        (b"upper some text", b"SOME TEXT"),
        (b"pid", b"%d" % pid),
        (b"slot", b"3"),
        (b"print", b"printed"),
        (b"stderr a line", b"ok"),
        (b"sleep 0.01", b"slept"),
        (b"anything else", b"anything else"),
        (b"", b""),
    ):
        assert child.job(body, b"ctx") == Replied(b"ctx", reply)
    assert child.job(b"fail", b"echo") == Replied(b"echo", b"fail")
    assert child.failure(b"fail").endswith("RuntimeError: told to fail")
    assert child.failure(b"fail because").endswith("RuntimeError: because")
    assert isinstance(child.job(b"stop"), StopAsked)
    if protocol == "goridge-3":
        assert child.job(b"stream 1", b"ctx") == Part(b"ctx", b"part 0")
        assert child.event() == Replied(b"", b"", True)
        assert child.job(b"streamforever") == Part(b"", b"part 0")
        child.send(STOP_STREAM)
        while isinstance(child.event(), Part):
            pass
        assert child.job(b"streamfail 1") == Part(b"", b"part 0")
        event = child.event()
        assert isinstance(event, Failed)
        assert event.message.endswith(b"RuntimeError: told to fail")
    assert child.stderr == "hello from print\na line\n"
    assert child.job(b"exit 5") is None
    assert child.ended() == 5
    child = start(program, protocol=protocol)
    child.shake()
    assert child.job(b"kill") is None
    assert child.ended() == -signal.SIGKILL
