"""The Python child: runs functions for a pool that was opened with `open_python_pool`.

`_start.py` starts it. The relay is a socket of its own, under a number that is never 0, 1
or 2 and that no program started by a job inherits. stdin is /dev/null; stdout and stderr lead to the pool's log.

Imports cost start-up time and memory, of every worker: this module imports C modules only, and `traceback` and
`importlib` when they are first needed.
"""

import faulthandler
import os
import select
import sys
from collections import deque
from contextvars import Context, copy_context
from errno import ENOSYS
from io import BytesIO
from itertools import islice
from time import perf_counter

from .._arena import IN_ARENA, KEPT_FOR, Arena, Filling, Kept
from .._calls import (
    CALL,
    CALLS,
    DONE,
    END,
    ERROR,
    FROM_POOL,
    GATHERED,
    HELLO,
    LOOK,
    MOST_BUFFERS,
    MOST_PACKET,
    OUT_OF_BAND,
    PART,
    READY,
    REFUSED,
    RESULT,
    SOME,
    STOP,
    STOP_STREAM,
    STREAM,
    Decoder,
    Message,
    buffers_of,
    drop_sent,
    encode,
    excused,
    in_short,
    link,
    links,
    placed,
    restore,
    split_calls,
)
from .._region import (
    ASLEEP,
    BEGUN,
    BUDGET,
    DONE_HEAD,
    FIRST,
    FLOAT,
    LAST_PLACE,
    PLAIN,
    RESULTS,
    SIZE,
    SMALL,
    SMALL_INT,
    open_in_child,
)
from . import _main_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    import pickle
    import signal
    import socket
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Final

    from .._calls import Link
else:
    # The C halves of them, which are all we need: the others import enum and re.
    import _pickle as pickle
    import _signal as signal
    import _socket as socket

READ_SIZE: "Final" = 65536
"""Bytes asked for in one read: most messages are smaller, and what is larger is read in place."""

LONGEST_TEXT: "Final" = 1 << 20
"""Of a longer traceback only the two ends are sent."""

MOST_KNOWN: "Final" = 1024
"""Functions remembered by their pickles."""

TOO_QUICK_TO_FORK: "Final" = 10e-6
"""Seconds: a fork copies page tables and takes longer, in the child as well, so what took less has not forked."""

CLEAN_EVERY: "Final" = 50e-6
"""Seconds between two clean-ups within a chunk, at least: they take about 1 µs, longer than the quickest items."""

NO_LIMIT: "Final" = 1 << 63
"""The pool bounds what it sends, so the child needs no bound of its own."""


class JobFailed(Exception):
    """A job that failed before or after its function ran: the text is all there is to say."""


class Child:
    """One worker: its end of the relay and how it pickles."""

    def __init__(
        self,
        connection: "socket.socket",
        packets: "socket.socket | None" = None,
        region: int = -1,
        arena: Arena | None = None,
    ) -> None:
        self._connection = connection
        self._packets = packets
        self._arena = arena
        self._kept = Kept()
        # Without a region that the pool sees, a chunk ends after its first item: nobody could tell how far it came.
        self._region, self._words = open_in_child(region)
        self._budget = BUDGET if region >= 0 else 0.0
        self._decoder = Decoder(FROM_POOL, NO_LIMIT, arena, self._kept)
        self._ahead: list[Message] = []
        self._latest = 0
        self._pid = os.getpid()
        self._poll = select.poll()
        self._poll.register(connection.fileno(), select.POLLIN)
        self._dumps: Callable[..., bytes] = pickle.dumps
        self._known: dict[bytes, tuple[dict[str, Any], str, Callable[..., Any]]] = {}
        self._buffers: list[memoryview] = []
        # A copy of stderr that a job can't close by closing 2: for what the interpreter says as it dies.
        self._log = os.dup(2)
        faulthandler.enable(self._log)

    # the relay

    def receive(self) -> Message | None:
        """Wait for the next message; None when the pool is gone."""
        if self._ahead:
            return self._ahead.pop(0)
        decoder = self._decoder
        while (message := decoder.next_message()) is None:
            space = decoder.space
            try:
                if space is not None:
                    count = self._connection.recv_into(space)
                    space.release()
                    decoder.filled(count)
                    if not count:
                        return None
                    continue
                data = self._connection.recv(READ_SIZE)
            except ConnectionResetError:
                return None
            if not data:
                return None
            message = decoder.take_whole(data)
            if message is not None:
                return message
            decoder.receive(data)
        return message

    def _grow_older(self) -> None:
        """Give back memory that is kept, once it has not been of use for long."""
        self._kept.grow_older()
        if not self._poll.poll(1000 * KEPT_FOR):
            self._kept.clear()

    def send(self, pieces: "Sequence[bytes | memoryview]") -> bool:
        """Send a message; False when the pool is gone."""
        try:
            if len(pieces) == 1:
                self._connection.sendall(pieces[0])
                return True
            left = deque(self._place(pieces))
            while left:
                drop_sent(left, self._connection.sendmsg([*islice(left, GATHERED)]))
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def _place(self, pieces: "Sequence[bytes | memoryview]") -> "Sequence[bytes | memoryview]":
        """Put large buffers of an answer into the arena, if that can be had and all before them has been taken out."""
        arena, buffers = self._arena, buffers_of(pieces)
        if arena is None or sum([view.nbytes for view in buffers]) < IN_ARENA or not arena.free:
            return pieces
        try:
            Filling(arena, buffers).go_on()
        except (OSError, ImportError) as error:
            arena.give_back()  # part of it came before there was none left
            return excused(pieces, error.errno or ENOSYS if isinstance(error, OSError) else ENOSYS)
        arena.sent += 1
        return placed(pieces)

    def _stream_stop_asked(self, id_: int) -> bool:
        """Look, without waiting, whether the pool has asked to end this stream; other messages are kept."""
        while self._poll.poll(0):
            try:
                data = self._connection.recv(READ_SIZE)
            except ConnectionResetError:
                break
            if not data:
                break
            self._decoder.receive(data)
        asked = False
        while (message := self._decoder.next_message()) is not None:
            if message.kind != STOP_STREAM:
                self._ahead.append(message)
            elif message.id == id_:
                asked = True
        return asked

    # becoming ready

    def greet(self) -> bool:
        """Take the pool's hello, become what it says, and answer; False where there is nothing to serve."""
        message = self.receive()
        if message is None or message.kind != HELLO:
            return False
        hello: dict[str, Any] = pickle.loads(message.body)
        sys.path[:] = hello["path"]
        sys.argv[:] = hello["argv"]
        _main_module.install(hello["main"])
        if hello["pickler"] == "cloudpickle":
            self._dumps = _dumps_by_value
        if not hello["keeps_memory"]:
            self._kept.keep_nothing()
        if hello["initializer"] is not None:
            try:
                try:
                    function, arguments = pickle.loads(hello["initializer"])
                except ModuleNotFoundError as error:
                    if not _main_module.answer_to_its_name(error):
                        raise
                    function, arguments = pickle.loads(hello["initializer"])
                function(*arguments)
            except BaseException as error:
                self._leave_if_forked(error)
                text, exception = self._describe(error)
                text = in_short(error).encode("utf-8", "backslashreplace") + b"\n\n" + text
                self.send(encode(REFUSED, body=text + exception, split=len(text)))
                _flush()
                os._exit(1)
            self._leave_if_forked()
            self.clean_up()
        return self.send(encode(READY, body=self._pid.to_bytes(8, "little")))

    # jobs

    def next_job(self) -> Message | None:
        """Wait for the next job, or the stop; None when the pool is gone.

        A job on the relay goes before the packets, which lie behind it. Who sleeps says so (`ASLEEP`), and looks once
        more: a packet that comes later is announced on the relay, by a `LOOK`.
        """
        decoder, words = self._decoder, self._words
        while True:
            message = self._ahead.pop(0) if self._ahead else decoder.next_message()
            if message is None:
                if not decoder.pending:
                    if (job := self._packet()) is not None:
                        return job
                    words[ASLEEP] = self._latest
                    if (job := self._packet()) is not None:
                        words[ASLEEP] = 0
                        return job
                    if self._kept:
                        self._grow_older()
                message = self.receive()
                words[ASLEEP] = 0
                if message is None:
                    return None
            # Else it comes too late: the stream had ended, or the packet has been found already.
            if message.kind != STOP_STREAM and message.kind != LOOK:
                self._latest = message.id
                return message

    def _packet(self) -> Message | None:
        """Take a job that lies behind the last one, if there is one. Without waiting: see `_call_line.PacketLine`."""
        if self._packets is None:
            return None
        try:
            return self._decoder.take_whole(self._packets.recv(MOST_PACKET, socket.MSG_DONTWAIT))
        except (BlockingIOError, ConnectionResetError):
            return None

    def serve_one(self) -> bool:
        """Run one job; False when the pool says stop or is gone. What belongs to the job is dropped on return."""
        message = self.next_job()
        if message is None or message.kind == STOP:
            return False
        if message.kind == CALL:
            return self._call(message)
        if message.kind == CALLS:
            return self._calls(message)
        return message.kind != STREAM or self._stream(message)

    def _call(self, message: Message) -> bool:
        id_ = message.id
        try:
            function, arguments = self._load(message)
            del message
            answer = self._encode(RESULT, id_, copy_context().run(function, *arguments), function)
        except BaseException as error:
            answer = self._failed(id_, error)
        self._leave_if_forked()
        return self.send(answer)

    def _calls(self, message: Message) -> bool:
        """Run a chunk: one call after the other, each as if it were alone, and account for each (`_region.py`)."""
        began = now = clean = perf_counter()
        id_, split, body = message.id, message.split, message.body
        del message
        calls: Iterator[Any] = split_calls(body)
        name = None
        try:
            if split:
                name = Message(CALL, id_, split, body[:split])
                calls = zip(*pickle.loads(body[split:]), strict=True)
        except BaseException as error:  # there is no memory for so many
            return self.send(self._failed(id_, error))
        del body
        region, words, budget = self._region, self._words, self._budget
        dumps, copy, pack_int, pack_float = pickle.dumps, copy_context, SMALL_INT.pack_into, FLOAT.pack_into
        region[:RESULTS] = bytes(RESULTS)
        words[0] = id_
        function: Any = None
        arguments: Any
        result: Any = None
        kind: type[object] = object
        data: bytes | None
        done, at = 0, RESULTS
        for arguments in calls:
            if at > LAST_PLACE:
                if not self._send_results(id_, done, at):
                    return False
                at = RESULTS
            words[BEGUN + done] = at - RESULTS + 1
            try:
                if name is None:
                    function, arguments = self._load(arguments)
                elif function is None:
                    function, _ = self._load(name)
                result = copy().run(function, *arguments)
                kind = type(result)  # pyright: ignore[reportUnknownVariableType]
                if kind is float or (kind is int and -SMALL <= result < SMALL):
                    data = None
                elif kind in PLAIN:
                    data = dumps(result, 5)
                else:
                    data = self._pickle(RESULT, result, function)
                    if not self._buffers:
                        data = dumps(data, 5)
            except BaseException as error:
                self._leave_if_forked(error)
                data = dumps(bytearray(dumps(self._describe(error), 5)), 5)
            before, now = now, perf_counter()
            if now - before > TOO_QUICK_TO_FORK:
                self._leave_if_forked()
            if data is None:
                if kind is int:
                    pack_int(region, at, b"J", result)
                    at += SMALL_INT.size
                else:
                    pack_float(region, at, b"G", result)
                    at += FLOAT.size
            elif self._buffers or len(data) > SIZE - at:
                if not self._send_results(id_, done, at) or not self._send_large(id_, done, data):
                    return False
                at = RESULTS
            else:
                region[at : at + len(data)] = data
                at += len(data) - 1  # what comes next takes the place of the byte that ends a pickle
            arguments = result = None
            done += 1
            if now - began > budget:
                break
            if now - clean > CLEAN_EVERY:
                self.clean_up()
                clean = now
        self._leave_if_forked()
        size = at - RESULTS
        head = DONE_HEAD.pack(done, size, int((perf_counter() - began) * 1e9))
        return self.send(encode(DONE, id_, head if budget else head + region[RESULTS:at]))

    def _send_results(self, id_: int, done: int, at: int) -> bool:
        """Send the results in the region, and let the next be the first there; False when the pool is gone.

        What is sent stays there until `FIRST` says otherwise, and what has come twice the pool knows by its number.
        """
        sent = at == RESULTS or self.send(encode(SOME, id_, bytes(self._region[RESULTS:at])))
        self._words[FIRST] = done
        return sent

    def _send_large(self, id_: int, done: int, data: bytes) -> bool:
        """Send a result that has buffers, or is too large for the region."""
        buffers, self._buffers = self._buffers, []
        sent = self.send(encode(SOME, id_, data if buffers else data[:-1], buffers))
        self._words[FIRST] = done + 1
        return sent

    def _stream(self, message: Message) -> bool:
        id_ = message.id
        parts: Iterator[object] | None = None
        context = copy_context()
        try:
            function, arguments = self._load(message)
            del message
            parts = _iterate(context, function, arguments)
            del arguments
            while True:
                if self._stream_stop_asked(id_):
                    _close(context, parts)
                    break
                try:
                    part = context.run(next, parts)
                except StopIteration:
                    break
                pieces = self._encode(PART, id_, part, function)
                del part
                self._leave_if_forked()
                if not self.send(pieces):
                    return False
                del pieces
            answer = encode(END, id_)
        except BaseException as error:
            if parts is not None:
                _close_anyhow(context, parts)
            answer = self._failed(id_, error)
        self._leave_if_forked()
        return self.send(answer)

    def _load(self, message: Message) -> "tuple[Callable[..., Any], Sequence[object]]":
        """Unpickle a call, piece by piece, so that an error can say which piece it was."""
        body, split = message.body, message.split
        position = 0
        function: Any = None
        try:
            if split:
                function = self._find(body[:split])
                if split == len(body):
                    return function, ()
                position = 1
                return function, pickle.loads(body[split:], buffers=message.buffers)
            load = pickle.Unpickler(BytesIO(body), buffers=message.buffers).load
            count = load()
            function = load()
            arguments: list[object] = []
            while position < count:
                position += 1
                arguments.append(load())
            return function, arguments
        except BaseException as error:
            if _main_module.answer_to_its_name(error):
                return self._load(message)
            what = f"argument {position} of {_name(function)}" if position else "the function"
            text = f"{what} can't be unpickled in the worker: {in_short(error)}"
            if isinstance(error, AttributeError) and ("__main__" in text or _main_module.NAME in text):
                text += f". {_main_module.BEHIND}"
            raise JobFailed(text) from error

    def _find(self, pickled: bytes) -> "Callable[..., Any]":
        """Unpickle a function that is pickled by its name, or remember it, as long as that name still means it."""
        known = self._known.get(pickled)
        if known is not None and known[0].get(known[1]) is known[2]:
            found: Callable[..., Any] = known[2]
            return found
        function: Callable[..., Any] = pickle.loads(pickled)
        module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
        if isinstance(module, str) and module in sys.modules:
            names = sys.modules[module].__dict__
            if names.get(name) is function:
                if len(self._known) >= MOST_KNOWN:
                    self._known.clear()
                self._known[pickled] = (names, name, function)
        return function

    def _encode(self, kind: int, id_: int, result: object, function: object) -> "tuple[bytes | memoryview, ...]":
        body = self._pickle(kind, result, function)
        buffers = self._buffers
        if buffers:
            self._buffers = []  # the answer alone holds them from now on
        return encode(kind, id_, body, buffers)

    def _pickle(self, kind: int, result: object, function: object) -> bytes:
        """Pickle a result; its large buffers are in `self._buffers` then."""
        try:
            if type(result) is bytes and len(result) >= OUT_OF_BAND:
                result = pickle.PickleBuffer(result)
            return self._dumps(result, 5, buffer_callback=self._keep)
        except BaseException as error:
            self._buffers.clear()
            what = "a part of the stream of" if kind == PART else "the result of"
            hint = "; take it with stream() instead of run_sync()" if kind == RESULT and _is_generator(result) else ""
            raise JobFailed(
                f"{what} {_name(function)}, of type {type(result).__name__}, can't be pickled: {in_short(error)}{hint}"
            ) from error

    def _keep(self, buffer: pickle.PickleBuffer) -> bool:
        """Take a buffer out of the pickle that is being written, or (True) leave it inside."""
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND or len(self._buffers) == MOST_BUFFERS:
            return True
        self._buffers.append(view)
        return False

    def _failed(self, id_: int, error: BaseException) -> "tuple[bytes | memoryview, ...]":
        self._leave_if_forked(error)
        text, exception = self._describe(error)
        return encode(ERROR, id_, text + exception, split=len(text))

    def _describe(self, error: BaseException) -> "tuple[bytes, bytes]":
        """Return an error's traceback as text, and the error itself, pickled, where it survives the round trip."""
        text = _traceback(error)
        exception = b""
        if isinstance(error, JobFailed):
            pass
        elif not isinstance(error, Exception) or isinstance(error, StopIteration | StopAsyncIteration):
            text += f"\n({type(error).__name__} can't leave a job as itself)".encode()
        else:
            try:
                exception = self._pickle_error(error)
            except BaseException as why:
                note = f"\n(the exception itself could not be sent: {in_short(why)})"
                text += note.encode("utf-8", "backslashreplace")
        return text, exception

    def _pickle_error(self, error: Exception) -> bytes:
        """Pickle an exception with all that hangs on it, or alone; try it, and raise where it can't be read back."""
        try:
            return self._try_error(links(error))
        except BaseException:
            return self._try_error([link(error)])

    def _try_error(self, sent: "list[Link]") -> bytes:
        data = self._dumps(sent, 5)
        read: list[Link] = pickle.loads(data)
        for (one, *_), (back, *_) in zip(sent, read, strict=True):
            if type(back) is not type(one):
                raise TypeError(f"{type(one).__name__} comes back from pickle as {type(back).__name__}")
        restore(read)
        return data

    # between jobs

    def _leave_if_forked(self, error: BaseException | None = None) -> None:
        """A fork that comes out of its job is no worker: it ends here, and answers nothing."""
        if os.getpid() == self._pid:
            return
        status = 0
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            status = 1
            os.write(2, _traceback(error) + b"\n")
        _flush()
        os._exit(status)

    def clean_up(self) -> None:
        """Show what the job printed, and mend what it closed; the answer is on its way already."""
        _flush()
        for fd in (0, 1, 2):
            try:
                os.get_inheritable(fd)  # the cheapest question there is
            except OSError:
                self._reopen(fd)
        _renew("stdout", 1)
        _renew("stderr", 2)

    def _reopen(self, fd: int) -> None:
        """A job closed a standard stream: the next one shall not find its own file in that place."""
        if fd:
            os.dup2(self._log, fd)
            return
        null = os.open(os.devnull, os.O_RDONLY)
        if null:
            os.dup2(null, 0)
            os.close(null)
        else:
            os.set_inheritable(0, True)


def _dumps_by_value(value: object, protocol: int, **options: object) -> bytes:
    dumps: Callable[..., bytes] = __import__("cloudpickle").dumps
    return dumps(value, protocol, **options)


def _iterate(context: Context, function: "Callable[..., Any]", arguments: "Sequence[object]") -> "Iterator[object]":
    result: object = context.run(function, *arguments)
    if not hasattr(type(result), "__iter__") and not hasattr(type(result), "__getitem__"):
        raise JobFailed(
            f"stream() takes a generator function, or one that returns an iterable; {_name(function)} returned "
            f"{type(result).__name__}"
        )
    parts: Iterator[object] = context.run(iter, result)  # type: ignore[arg-type]
    return parts


def _is_generator(result: object) -> bool:
    # Asked of the type: an object may have any __getattr__.
    return hasattr(type(result), "send") and hasattr(type(result), "__next__")


def _close(context: Context, parts: "Iterator[object]") -> None:
    close = getattr(parts, "close", None)
    if close is not None and _is_generator(parts):
        context.run(close)


def _close_anyhow(context: Context, parts: "Iterator[object]") -> None:
    """After an error: one more says nothing new."""
    try:  # noqa: SIM105 - contextlib takes long to import
        _close(context, parts)
    except BaseException:
        pass


def _name(function: object) -> str:
    try:
        while (inner := getattr(function, "func", None)) is not None and callable(inner):
            function = inner  # functools.partial
        name = f"{function.__module__}.{function.__qualname__}"  # type: ignore[attr-defined]
        return name.replace(_main_module.NAME, "__main__", 1) if name.startswith(_main_module.NAME) else name
    except BaseException:  # an object may have any __getattr__
        return type(function).__qualname__


def _traceback(error: BaseException) -> bytes:
    import traceback

    # Our own frames say nothing about the job.
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__package__") == __package__:
        trace = trace.tb_next
    try:
        if isinstance(error, JobFailed):
            cause = error.__cause__
            lines = [] if cause is None else traceback.format_exception(type(cause), cause, cause.__traceback__)
            text = "".join([f"{error}\n", *lines])
        else:
            text = "".join(traceback.format_exception(type(error), error, trace))
    except BaseException as another:  # an exception may have any __str__
        text = f"{type(error).__name__}, which can't be shown: {type(another).__name__}"
    data = text.rstrip("\n").encode("utf-8", "backslashreplace")
    if len(data) > LONGEST_TEXT:
        half = LONGEST_TEXT // 2
        data = b"%s\n... %d bytes left out ...\n%s" % (data[:half], len(data) - 2 * half, data[-half:])
    return data


def _renew(name: str, fd: int) -> None:
    """Open a standard stream anew whose object a job has closed."""
    stream: Any = getattr(sys, name)
    if stream is not None and stream is getattr(sys, f"__{name}__") and stream.closed:
        stream = open(fd, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _flush() -> None:
    # Part of a line is shown as well. What a job did to the streams (None, closed, its own) is worth no worker.
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except Exception:
            continue
    ctypes = sys.modules.get("ctypes")
    if ctypes is not None:
        ctypes.pythonapi.fflush(None)  # what C code has printed; where it isn't loaded the end of the process does it


def _end() -> None:
    """Leave in an orderly way, whatever threads a job left behind: nobody waits for those."""
    import atexit

    threading = sys.modules.get("threading")
    if threading is None or all(one.daemon or one is threading.main_thread() for one in threading.enumerate()):
        return  # the interpreter's own way
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    _flush()
    os._exit(0)


def _do_nothing(number: int, frame: object) -> None:
    return


def main(fd: int, packets_fd: int, region: int, arena_fd: int) -> None:
    """Serve until the pool says stop or is gone.

    Jobs that lie behind others come as packets, by `packets_fd`. `region` and `arena_fd` are descriptors of a
    `_region.Region` and an `_arena.Arena`. Each of the three is -1 where there is none.
    """
    os.set_inheritable(fd, False)
    arena = None
    if arena_fd >= 0:
        os.set_inheritable(arena_fd, False)
        arena = Arena(arena_fd)
    # The pool decides when its workers end. A function, for SIG_IGN would be inherited by programs that jobs start.
    signal.signal(signal.SIGINT, _do_nothing)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    connection = socket.socket(fileno=fd)
    packets = None
    if packets_fd >= 0:
        os.set_inheritable(packets_fd, False)
        packets = socket.socket(fileno=packets_fd)
    child = Child(connection, packets, region, arena)
    if child.greet():
        while child.serve_one():
            child.clean_up()
    connection.detach()  # the end of the process closes it
    if packets is not None:
        packets.detach()
    _end()
